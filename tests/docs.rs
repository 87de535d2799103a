//! The pages of the repository: where their links lead, and code that stands in two of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All pages, by their path from the root on.
fn pages() -> BTreeMap<PathBuf, String> {
    let folders = ["", "docs", "benches/compare", "benches/results", "crates"];
    let mut folders: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    let crates = fs::read_dir(root().join("crates")).unwrap();
    folders.extend(crates.map(|entry| entry.unwrap().path()));
    let files = folders
        .iter()
        .filter(|folder| folder.is_dir())
        .flat_map(|folder| {
            let entries = fs::read_dir(folder).unwrap();
            entries.map(|entry| entry.unwrap().path())
        });
    files
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path.strip_prefix(root()).unwrap().to_path_buf(), text)
        })
        .collect()
}

/// A page without its blocks of code.
fn prose(text: &str) -> String {
    let parts = text.split("\n```").enumerate();
    parts
        .filter(|(i, _)| i % 2 == 0)
        .map(|(_, part)| part)
        .collect()
}

/// What stands in round brackets behind square ones.
fn links(text: &str) -> Vec<String> {
    let text = prose(text);
    let targets = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'));
    targets.map(|(target, _)| target.to_string()).collect()
}

/// The anchors of a page's headings, as GitHub forms them.
fn anchors(text: &str) -> Vec<String> {
    let prose = prose(text);
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let heading = line.trim_start_matches('#').trim().to_lowercase();
            let kept = heading
                .chars()
                .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn links_lead_somewhere() {
    let pages = pages();
    assert!(pages.contains_key(Path::new("docs/README.md")));
    let mut broken = Vec::new();
    for (page, text) in &pages {
        for link in links(text) {
            if link.contains("://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match path {
                "" => page.clone(),
                path => page.parent().unwrap().join(path),
            };
            let there = root().join(&target);
            let is_there = there.exists() && {
                let text = fs::read_to_string(&there);
                anchor.is_empty() || text.is_ok_and(|text| anchors(&text).contains(&anchor.into()))
            };
            if !is_there {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn every_page_of_the_docs_is_in_the_index() {
    let pages = pages();
    let index = links(&pages[Path::new("docs/README.md")]);
    for page in pages.keys().filter(|page| page.starts_with("docs")) {
        let name = page.file_name().unwrap().to_str().unwrap();
        assert!(
            name == "README.md" || index.iter().any(|link| link == name),
            "{name}"
        );
    }
    let readme = links(&pages[Path::new("README.md")]);
    assert!(readme.contains(&"docs/README.md".to_string()));
}

/// The README's example for candle is compiled and run in that crate, whose README begins with it.
#[test]
fn the_example_for_candle_is_one_that_is_tested() {
    let pages = pages();
    let block = |page: &str, opening: &str| {
        let text = &pages[Path::new(page)];
        let block = text.split_once(opening).expect("a block of code").1;
        block.split_once("```").unwrap().0.to_string()
    };
    let ours = block("README.md", "## With candle\n\n```rust,ignore\n");
    assert_eq!(ours, block("crates/phasor-candle/README.md", "```rust\n"));
}
