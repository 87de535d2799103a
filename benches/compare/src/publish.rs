//! Committed results as tables and charts beside them, as a short section of the README, and as the long
//! ones of a page of the docs.

use crate::gpu::results::{Launch, Results, headlines, headlines_of};
use crate::report::Report;
use crate::{Failure, accuracy, gpu, svg};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

const ACCURACY: &str = "accuracy";
const SPEED: &str = "speed";
const PERFORMANCE: &str = "performance";
const GPU: &str = "gpu";
/// Results of the host backend are `host-<machine>.json`.
const HOST_PREFIX: &str = "host-";
/// Those of a GPU are `gpu-<device>-<commit>.json`.
const GPU_PREFIX: &str = "gpu-";
/// The sources of the kernels, beside the README.
const KERNELS: &str = "cuda";
/// The page of the long tables, beside the README too, and the way from there to the README's folder.
const DETAILS: &str = "docs/performance.md";
const UP: &str = "../";

/// Why a section of a text could not be replaced.
#[derive(Debug, PartialEq)]
pub enum MarkerError {
    Missing(String),
    Repeated(String),
    /// The end stands before the beginning, which is named.
    Order(String),
}

impl fmt::Display for MarkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(marker) => {
                write!(f, "there is no {marker}: add it where its text belongs")
            }
            Self::Repeated(marker) => write!(f, "{marker} stands more than once: leave one"),
            Self::Order(marker) => write!(f, "{marker} comes after its end: swap the two"),
        }
    }
}

impl std::error::Error for MarkerError {}

/// `text` with `section` between the two markers of this name, and the rest as it was.
fn replaced(text: &str, name: &str, section: &str) -> Result<String, MarkerError> {
    let find = |edge: &str| {
        let marker = format!("<!-- {name}: {edge} -->");
        let mut found = text.match_indices(&marker).map(|(at, _)| at);
        match (found.next(), found.next()) {
            (Some(at), None) => Ok((at, marker)),
            (None, _) => Err(MarkerError::Missing(marker)),
            (Some(_), Some(_)) => Err(MarkerError::Repeated(marker)),
        }
    };
    let ((begin, marker), (end, _)) = (find("begin")?, find("end")?);
    if end < begin {
        return Err(MarkerError::Order(marker));
    }
    let (head, tail) = (&text[..begin + marker.len()], &text[end..]);
    Ok(format!("{head}\n{section}{tail}"))
}

/// A committed file of results.
struct Published<T> {
    /// The name of its file without `.json`.
    stem: String,
    report: T,
}

/// All results whose files begin so.
fn read<T>(
    folder: &Path,
    prefix: &str,
    parse: impl Fn(&str) -> Result<T, Failure>,
) -> Result<Vec<Published<T>>, Failure> {
    let mut results = Vec::new();
    for path in files_of(folder, prefix)? {
        let (Some(stem), Some("json")) = (name(path.file_stem()), name(path.extension())) else {
            continue;
        };
        let report = std::fs::read_to_string(&path)
            .map_err(Failure::from)
            .and_then(|text| parse(&text))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let stem = stem.to_owned();
        results.push(Published { stem, report });
    }
    Ok(results)
}

fn of_host(text: &str) -> Result<Report, Failure> {
    let report: Report = serde_json::from_str(text)?;
    match report.quick {
        true => Err("numbers of a quick run mean nothing".into()),
        false => Ok(report),
    }
}

fn of_gpu(text: &str) -> Result<Results, Failure> {
    Ok(text.parse()?)
}

fn name(part: Option<&OsStr>) -> Option<&str> {
    part.and_then(OsStr::to_str)
}

/// Files whose name says that they are results, or made of some; in order.
fn files_of(folder: &Path, prefix: &str) -> Result<Vec<PathBuf>, Failure> {
    let entries = std::fs::read_dir(folder)
        .map_err(|error| format!("{}: {error}", folder.display()))?
        .map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<Result<Vec<_>, std::io::Error>>()?;
    paths.retain(|path| name(path.file_name()).is_some_and(|name| name.starts_with(prefix)));
    paths.sort();
    Ok(paths)
}

/// All that the results give: paths and what stands there.
fn outputs(folder: &Path, readme: &Path) -> Result<Vec<(PathBuf, String)>, Failure> {
    let hosts = read(folder, HOST_PREFIX, of_host)?;
    let gpus = read(folder, GPU_PREFIX, of_gpu)?;
    let chart = svg::accuracy(&accuracy::curves()?);
    let mut outputs = vec![(folder.join(format!("{ACCURACY}.svg")), chart)];
    for Published { stem, report } in &hosts {
        let mut text = report.markdown() + "\n## Charts\n";
        for (suffix, chart) in svg::charts(report) {
            let file = format!("{stem}{suffix}.svg");
            text += &format!("\n![{}]({file})\n", alternative(&suffix));
            outputs.push((folder.join(file), chart));
        }
        outputs.push((folder.join(format!("{stem}.md")), text));
    }
    let kernels = kernels_beside(readme, &gpus)?;
    for Published { stem, report } in &gpus {
        let mut text = gpu::markdown(report, kernels);
        text += &format!("\n## Chart\n\n![{}]({stem}.svg)\n", alternative(GPU));
        outputs.push((folder.join(format!("{stem}.md")), text));
        outputs.push((folder.join(format!("{stem}.svg")), svg::gpu(report)));
    }
    let link = link(readme, folder)?;
    outputs.push(with_sections(
        readme.to_owned(),
        &[
            (ACCURACY, accuracy_section(&link)),
            (SPEED, speed_section(&hosts, &gpus, kernels)),
        ],
    )?);
    let link = format!("{UP}{link}");
    outputs.push(with_sections(
        beside(readme, DETAILS),
        &[
            (PERFORMANCE, performance_section(&link, &hosts)),
            (GPU, gpu_section(&link, &gpus, kernels)),
        ],
    )?);
    Ok(outputs)
}

/// A file and its text with these sections.
fn with_sections(path: PathBuf, sections: &[(&str, String)]) -> Result<(PathBuf, String), Failure> {
    let named = |error: Failure| format!("{}: {error}", path.display());
    let mut text = std::fs::read_to_string(&path).map_err(|error| named(error.into()))?;
    for (name, section) in sections {
        text = replaced(&text, name, section).map_err(|error| named(error.into()))?;
    }
    Ok((path, text))
}

/// A path from the README's folder on.
fn beside(readme: &Path, path: &str) -> PathBuf {
    readme.parent().unwrap_or(Path::new("")).join(path)
}

/// What the kernels are now, where results of GPUs are held against them.
fn kernels_beside(readme: &Path, gpus: &[Published<Results>]) -> Result<u32, Failure> {
    match gpus {
        [] => Ok(0),
        _ => gpu::kernels(&beside(readme, KERNELS)),
    }
}

/// The folder as the README calls it.
fn link(readme: &Path, folder: &Path) -> Result<String, Failure> {
    let (readme, folder) = (readme.canonicalize()?, folder.canonicalize()?);
    let root = readme.parent().unwrap_or(Path::new(""));
    let below = folder.strip_prefix(root).map_err(|_| {
        let (folder, root) = (folder.display(), root.display());
        format!("{folder} is not in {root}, so that the README cannot link to it")
    })?;
    let parts: Vec<_> = below.iter().map(|part| part.to_string_lossy()).collect();
    Ok(parts.join("/"))
}

/// What a chart shows, for those who do not see it.
fn alternative(suffix: &str) -> &'static str {
    match suffix {
        svg::GROWTH => "Time of a call against tokens, heads, head_dim and threads",
        GPU => "Time of a call against tokens, of phasor, its peers and a copy of the same bytes",
        _ => "Share of the update pass's speed, of each library in each case",
    }
}

fn accuracy_section(link: &str) -> String {
    format!(
        "![Largest error of cos and sin against position, from 1 to 2^31. phasor's stays below 7e-8. That \
         of angles in f32 grows with the position until nothing is left; in bf16 sooner still.]\
         ({link}/{ACCURACY}.svg)\n"
    )
}

/// One table of each GPU and one of each host.
fn speed_section(hosts: &[Published<Report>], gpus: &[Published<Results>], kernels: u32) -> String {
    let mut text = String::new();
    for Published { report, .. } in gpus {
        text += &format!(
            "On a GPU: {}. Microseconds of one call in a replayed CUDA graph, on buffers that are not in L2; \
             bf16, half-split, in place. **{}**\n\n",
            report.meta.device,
            gpu::age(report, kernels)
        );
        text += &headlines_of(&report.rows, &[Launch::Ordinary]);
        text += "\n";
    }
    for Published { report, .. } in hosts {
        text += &format!(
            "On a host: {}, one thread, {}, bf16. A share is that of the speed of a pass that reads and \
             writes the same bytes.\n\n",
            report.machine.cpu, report.isa
        );
        text += &report.first_lines();
        text += "\n";
    }
    text + &format!(
        "q and k are Llama-3-8B's: 32 and 8 heads of 128. phasor forms its angles in each call; most others \
         read tables that were made before. [{DETAILS}]({DETAILS}) has all cases, types, threads and versions, \
         and how to measure a machine of your own.\n"
    )
}

fn performance_section(link: &str, results: &[Published<Report>]) -> String {
    let mut text = "## Performance\n\n\
        The host backend beside two passes over the same bytes, and beside other implementations. A share\n\
        is the time of the pass over the time of the library: 1 is the speed of the pass. q and k are\n\
        Llama-3-8B's unless the case says otherwise; phasor forms its angles in each call, most others\n\
        read tables. [benches/compare](../benches/compare/README.md) says exactly what is measured.\n"
        .to_owned();
    for Published { stem, report } in results {
        let image = |suffix| {
            let seen = alternative(suffix);
            format!("![{seen}]({link}/{stem}{suffix}.svg)\n\n")
        };
        text += &format!("\n### {}\n\n", report.machine.cpu);
        text += &format!("{}\n\n", report.conditions().join("\n"));
        text += &image(svg::OVERVIEW);
        text += &format!("{}\n", report.headlines());
        if !report.growth.is_empty() {
            text += "<details><summary>How time grows with tokens, heads, head_dim and threads</summary>\n\n";
            text += &image(svg::GROWTH);
            text += "</details>\n\n";
        }
        text += &format!(
            "[All cases, types, pairings and libraries, and more charts]({link}/{stem}.md);\n\
             [the results as data]({link}/{stem}.json).\n"
        );
    }
    text + "\nTo measure a machine, in `benches/compare` (its README says how to install the peers):\n\n\
        ```sh\n\
        cargo run --release -- --growth --python venv/bin/python --json ../results/host-NAME.json\n\
        cargo run --release -- --publish ../results --readme ../../README.md\n\
        ```\n"
}

fn gpu_section(link: &str, results: &[Published<Results>], kernels: u32) -> String {
    let mut text = "## Performance on GPUs\n\n\
        Time of one call: medians over replays of a CUDA graph of many calls, on buffers that rotate past\n\
        L2. q and k are Llama-3-8B's (32 and 8 heads of 128) in bf16, half-split, in place. The copy kernel\n\
        moves the same bytes. Most peers read a table of cos and sin made beforehand; phasor forms its\n\
        angles in each call. A dependent launch (programmatic dependent launch) may start before the kernel\n\
        before it is done.\n"
        .to_owned();
    for Published { stem, report } in results {
        text += &format!("\n### {}\n\n", report.meta.device);
        text += &format!("{}\n\n", gpu::conditions(report).join("\n"));
        text += &format!("**{}**\n\n", gpu::age(report, kernels));
        text += &headlines(&report.rows);
        text += &format!("\n![{}]({link}/{stem}.svg)\n", alternative(GPU));
        text += &gpu::steps_section("####", report);
        text += "\n";
        text += &format!(
            "[All sizes, types, pairings, limits and peers, in L2 too]({link}/{stem}.md);\n\
             [the results as data]({link}/{stem}.json).\n"
        );
    }
    text + "\nTo measure a GPU (`scripts/gpu-bundle` packs the same for a machine without Rust):\n\n\
        ```sh\n\
        scripts/gpu-check --json benches/results/gpu-NAME.json\n\
        scripts/gpu-peers benches/results/gpu-NAME.json # adds the peers that its Python has\n\
        ```\n"
}

/// Writes all that the results give.
pub fn write(folder: &Path, readme: &Path) -> Result<(), Failure> {
    for (path, text) in outputs(folder, readme)? {
        std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// Fails unless all is there as the results give it, and nothing beside it.
pub fn check(folder: &Path, readme: &Path) -> Result<(), Failure> {
    let outputs = outputs(folder, readme)?;
    let mut complaints: Vec<String> = outputs
        .iter()
        .filter(|(path, text)| std::fs::read_to_string(path).ok().as_ref() != Some(text))
        .map(|(path, _)| {
            format!(
                "{} is not what the results give: publish again",
                path.display()
            )
        })
        .collect();
    let mut files = files_of(folder, HOST_PREFIX)?;
    files.extend(files_of(folder, GPU_PREFIX)?);
    let strays = files.into_iter().filter(|path| {
        let is_output = outputs.iter().any(|(output, _)| output == path);
        !is_output && name(path.extension()) != Some("json")
    });
    complaints.extend(strays.map(|path| format!("{} is of no results: remove it", path.display())));
    match complaints.is_empty() {
        true => Ok(()),
        false => Err(complaints.join("\n").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Machine, Measurement};
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;

    const README: &str = "a\n<!-- accuracy: begin -->\nold\n<!-- accuracy: end -->\nb\n\
        <!-- speed: begin -->\n<!-- speed: end -->\nc\n";
    const PAGE: &str = "a\n<!-- performance: begin -->\n<!-- performance: end -->\nb\n\
        <!-- gpu: begin -->\n<!-- gpu: end -->\nc\n";

    /// A folder with a README and a page to publish to; gone when dropped.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str) -> Self {
            let name = format!("compare-{name}-{}", std::process::id());
            let root = Self(std::env::temp_dir().join(name));
            for folder in ["results", "docs", KERNELS] {
                fs::create_dir_all(root.0.join(folder)).unwrap();
            }
            fs::write(root.readme(), README).unwrap();
            fs::write(root.page(), PAGE).unwrap();
            root
        }

        fn results(&self) -> PathBuf {
            self.0.join("results")
        }

        fn readme(&self) -> PathBuf {
            self.0.join("README.md")
        }

        fn page(&self) -> PathBuf {
            self.0.join(DETAILS)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let text = replaced(README, ACCURACY, "new\n").unwrap();
        assert_eq!(text, README.replace("old", "new"));
        assert_eq!(replaced(&text, ACCURACY, "new\n").unwrap(), text);
    }

    #[test]
    fn markers_that_do_not_mark_a_section_are_named() {
        let begin = "<!-- accuracy: begin -->".to_owned();
        let end = "<!-- accuracy: end -->".to_owned();
        let of = |text: &str| replaced(text, ACCURACY, "new\n").unwrap_err();
        assert_eq!(of("a"), MarkerError::Missing(begin.clone()));
        assert_eq!(of(&begin), MarkerError::Missing(end.clone()));
        assert_eq!(
            of(&format!("{end}{begin}")),
            MarkerError::Order(begin.clone())
        );
        let twice = format!("{begin}{begin}{end}");
        assert_eq!(of(&twice), MarkerError::Repeated(begin.clone()));
        assert!(of("a").to_string().contains(&begin));
    }

    fn report() -> Report {
        let row = |case: &str, library: &str, seconds: f64| Measurement {
            case: case.to_owned(),
            dtype: "bf16".to_owned(),
            pairing: "half-split".to_owned(),
            threads: 1,
            library: library.to_owned(),
            seconds,
            low: seconds - 1e-3,
            high: seconds + 2e-3,
            memcpy: 2e-3,
            update: 1e-3,
            bytes: 20_000_000,
        };
        Report {
            date: "2026-01-01".to_owned(),
            machine: Machine {
                cpu: "a processor".to_owned(),
                threads: 1,
                caches: Vec::new(),
                last_level_cache: 1 << 20,
                memory: None,
            },
            versions: BTreeMap::new(),
            isa: "scalar".to_owned(),
            quick: false,
            measurements: vec![
                row("prefill, in place, cold", "phasor", 2e-3),
                row("prefill, in place, cold", "phasor, scalar", 3e-3),
                row("prefill, in place, cold", "slow", 9e-3),
                row("prefill, in place, cold", "fast", 5e-3),
                row("head_dim 80, in place, cold", "phasor", 2e-3),
            ],
            growth: Vec::new(),
            skipped: BTreeSet::new(),
        }
    }

    #[test]
    fn the_short_table_holds_phasor_against_the_fastest_peer() {
        let table = report().headlines();
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| 1 | prefill, in place, cold | bf16 half-split | 10.0 | 0.50 | 1.00 | fast | 0.20 | 2.5x |"
            ]
        );
    }

    #[test]
    fn rows_slower_than_the_fastest_peer_are_counted() {
        let mut report = report();
        let line = |report: &Report| {
            let text = report.markdown();
            let line = text.lines().find(|line| line.starts_with("Slower"));
            line.expect("every table is followed by one").to_owned()
        };
        assert_eq!(line(&report), "Slower than the fastest peer: 0 of 1 rows.");
        // 4 to 7 ms and 8 to 11 ms are those of the fastest peer and, below, of ours.
        report.measurements[0].seconds = 9e-3;
        report.measurements[0].low = 8e-3;
        report.measurements[0].high = 11e-3;
        assert_eq!(
            line(&report),
            "Slower than the fastest peer: 1 of 1 rows, of which 0 within noise \
             (the middle halves of the samples overlap)."
        );
        report.measurements[0].low = 6e-3;
        let text = report.markdown();
        assert!(line(&report).contains("of which 1 within noise"), "{text}");
        assert!(text.contains("| phasor | 9000 | 6000 to 11000 |"), "{text}");
        assert!(text.contains("| fast | 0.20 | 0.56x |"), "{text}");
    }

    #[test]
    fn what_is_published_passes_the_check_until_something_changes() {
        let root = Root::new("publish");
        let (folder, readme) = (root.results(), root.readme());
        let json = folder.join("host-a.json");
        fs::write(&json, serde_json::to_string(&report()).unwrap()).unwrap();
        let complaint = || check(&folder, &readme).unwrap_err().to_string();

        assert!(complaint().contains("README.md"));
        write(&folder, &readme).unwrap();
        check(&folder, &readme).unwrap();
        let text = fs::read_to_string(&readme).unwrap();
        assert!(text.contains("(results/accuracy.svg)"), "{text}");
        let first = "| prefill, in place, cold | half-split | 10.0 | 0.50 | fast | 2.5x |";
        assert!(text.contains(first), "{text}");
        let page = fs::read_to_string(root.page()).unwrap();
        let overview = "(../results/host-a-overview.svg)";
        assert!(page.contains(overview), "{page}");
        for file in [
            "accuracy.svg",
            "host-a.svg",
            "host-a-overview.svg",
            "host-a.md",
        ] {
            let path = folder.join(file);
            let saved = fs::read_to_string(&path).unwrap();
            fs::write(&path, saved.clone() + " ").unwrap();
            assert!(complaint().contains(file));
            fs::write(&path, saved).unwrap();
        }
        fs::write(&readme, text.replace("2.5x", "9.5x")).unwrap();
        assert!(complaint().contains("README.md"));
        fs::write(&readme, text).unwrap();
        fs::write(root.page(), page.replace("2.5x", "9.5x")).unwrap();
        assert!(complaint().contains("performance.md"));
        fs::write(root.page(), page).unwrap();
        fs::write(folder.join("host-b.svg"), "").unwrap();
        assert!(complaint().contains("host-b.svg is of no results"));
        fs::remove_file(folder.join("host-b.svg")).unwrap();
        check(&folder, &readme).unwrap();

        let mut quick = report();
        quick.quick = true;
        fs::write(&json, serde_json::to_string(&quick).unwrap()).unwrap();
        assert!(complaint().contains("quick"));
        fs::write(&json, "{").unwrap();
        assert!(complaint().contains("host-a.json"));
    }

    #[test]
    fn results_of_a_gpu_are_called_old_once_the_kernels_change() {
        let root = Root::new("publish-gpu");
        let (folder, readme, kernels) = (root.results(), root.readme(), root.0.join(KERNELS));
        fs::write(kernels.join("a.cu"), "1234").unwrap();
        fs::write(kernels.join("b.h"), "56789").unwrap();
        fs::write(kernels.join("notes.txt"), "no kernel").unwrap();
        let mut results = gpu::tests::results();
        results.meta.kernels = Some(gpu::kernels(&kernels).unwrap());
        fs::write(folder.join("gpu-a.json"), results.to_string()).unwrap();
        let complaint = || check(&folder, &readme).unwrap_err().to_string();

        write(&folder, &readme).unwrap();
        check(&folder, &readme).unwrap();
        for path in [&readme, &root.page()] {
            let text = fs::read_to_string(path).unwrap();
            assert!(text.contains("| ordinary | 1 | 1.20 | 2.40 |"), "{text}");
            assert!(text.contains("at commit abc, with the kernels that are"));
        }
        let page = fs::read_to_string(root.page()).unwrap();
        assert!(page.contains("(../results/gpu-a.svg)"), "{page}");
        for file in ["gpu-a.svg", "gpu-a.md"] {
            let path = folder.join(file);
            let saved = fs::read_to_string(&path).unwrap();
            fs::write(&path, saved.clone() + " ").unwrap();
            assert!(complaint().contains(file));
            fs::write(&path, saved).unwrap();
        }

        fs::write(kernels.join("a.cu"), "0").unwrap();
        assert!(complaint().contains("README.md"));
        write(&folder, &readme).unwrap();
        check(&folder, &readme).unwrap();
        for path in [&readme, &root.page()] {
            let text = fs::read_to_string(path).unwrap();
            assert!(text.contains("at commit abc. Its kernels have changed since"));
        }
        fs::write(folder.join("gpu-b.md"), "").unwrap();
        assert!(complaint().contains("gpu-b.md is of no results"));
    }
}
