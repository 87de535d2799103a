//! Compiles the kernels with nvcc where there is one, and regenerates the parameter bindings where
//! that is asked for. Without nvcc the checked-in PTX alone is embedded, so nothing is needed.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every kernel module: one per family and element type, and the one that reports struct layouts.
const MODULES: [&str; 10] = [
    "rope_f32",
    "rope_f16",
    "rope_bf16",
    "append_f32",
    "append_f16",
    "append_bf16",
    "fused_f32",
    "fused_f16",
    "fused_bf16",
    "call_layout",
];
const DEFAULT_ARCHS: &str = "75,80,86,89,90,100,120";
/// The kernels use `__grid_constant__` and C++17.
const OLDEST_NVCC: (u32, u32) = (12, 0);

fn main() {
    println!("cargo::rustc-check-cfg=cfg(phasor_fatbin)");
    for name in [
        "PHASOR_NVCC",
        "PHASOR_REQUIRE_NVCC",
        "PHASOR_CUDA_ARCHS",
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "PATH",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");

    #[cfg(feature = "bindgen")]
    generate_bindings();

    if env::var_os("CARGO_FEATURE_CUDA").is_some()
        && env::var_os("DOCS_RS").is_none()
        && let Some(nvcc) = wanted_nvcc()
    {
        // cc wraps host flags for nvcc only where it takes nvcc from this variable.
        // SAFETY: the build script has one thread.
        unsafe { env::set_var("NVCC", &nvcc.path) };
        match MODULES
            .iter()
            .try_for_each(|module| compile_fatbin(&nvcc, module))
        {
            Ok(()) => println!("cargo::rustc-cfg=phasor_fatbin"),
            Err(message) if nvcc.asked_for => {
                fail(&format!("{message} (PHASOR_NVCC=0 builds without it)"))
            }
            // Such as one that does not take this machine's C++ compiler.
            Err(message) => println!("cargo::warning={message}; only the prebuilt PTX is embedded"),
        }
    }
}

/// Stops the build with one message.
fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    std::process::exit(1);
}

struct Nvcc {
    path: PathBuf,
    /// `compute_XY` targets it knows, as XY.
    targets: Vec<u32>,
    /// By the user, not found by chance: then it must work.
    asked_for: bool,
}

/// A variable that is set to something.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn required() -> bool {
    variable("PHASOR_REQUIRE_NVCC").as_deref() == Some("1")
}

/// The nvcc to use, if any: found, really runnable, and new enough.
fn wanted_nvcc() -> Option<Nvcc> {
    let required = required();
    if variable("PHASOR_NVCC").as_deref() == Some("0") {
        if required {
            fail("PHASOR_REQUIRE_NVCC=1 contradicts PHASOR_NVCC=0: unset one of them");
        }
        return None;
    }
    // One that the user names must work; elsewhere, what does not run is not there.
    if let Some(named) = variable("NVCC") {
        let path = PathBuf::from(named);
        match probe(&path) {
            Ok(nvcc) => {
                return Some(Nvcc {
                    asked_for: true,
                    ..nvcc
                });
            }
            Err(reason) => fail(&format!("NVCC={}: {reason}", path.display())),
        }
    }
    let folders = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(|name| variable(name))
        .map(PathBuf::from)
        .chain([PathBuf::from("/usr/local/cuda")]);
    let candidates = [PathBuf::from("nvcc")]
        .into_iter()
        .chain(folders.map(|folder| folder.join("bin").join("nvcc")));
    let mut reason = String::from("none found in PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda");
    for path in candidates {
        match probe(&path) {
            Ok(nvcc) => return Some(nvcc),
            Err(Unusable::Missing) => {}
            Err(unusable) => {
                reason = format!("{}: {unusable}", path.display());
                if !required {
                    println!("cargo::warning=nvcc is not used, {reason}");
                }
            }
        }
    }
    if required {
        fail(&format!(
            "PHASOR_REQUIRE_NVCC=1, but nvcc is not usable: {reason}"
        ));
    }
    None
}

enum Unusable {
    Missing,
    Broken(String),
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unusable::Missing => f.write_str("there is no such program"),
            Unusable::Broken(reason) => f.write_str(reason),
        }
    }
}

fn probe(path: &Path) -> Result<Nvcc, Unusable> {
    let run = |argument: &str| {
        let output = match Command::new(path).arg(argument).output() {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Unusable::Missing);
            }
            Err(error) => return Err(Unusable::Broken(error.to_string())),
        };
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr)
                .trim()
                .replace('\n', " ");
            return Err(Unusable::Broken(format!(
                "`nvcc {argument}` failed ({}): {message}",
                output.status
            )));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let text = run("--version")?;
    let version = parse_version(&text)
        .ok_or_else(|| Unusable::Broken("`nvcc --version` names no release".into()))?;
    if version < OLDEST_NVCC {
        return Err(Unusable::Broken(format!(
            "release {}.{} is older than {}.{}, which the kernels need",
            version.0, version.1, OLDEST_NVCC.0, OLDEST_NVCC.1
        )));
    }
    let targets = run("--list-gpu-arch")?
        .lines()
        .filter_map(|line| line.trim().strip_prefix("compute_")?.parse().ok())
        .collect();
    Ok(Nvcc {
        path: path.to_path_buf(),
        targets,
        asked_for: required(),
    })
}

/// From "... release 13.0, V13.0.88".
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let release = text.split("release ").nth(1)?.split(',').next()?;
    let (major, minor) = release.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The architectures asked for that this nvcc knows, lowest first.
fn architectures(nvcc: &Nvcc) -> Vec<u32> {
    let asked = variable("PHASOR_CUDA_ARCHS").unwrap_or_else(|| DEFAULT_ARCHS.into());
    let mut archs = Vec::new();
    for name in asked.split(',').map(str::trim) {
        match name.parse::<u32>() {
            Ok(arch) => archs.push(arch),
            Err(_) => fail(&format!(
                "PHASOR_CUDA_ARCHS={asked}: {name:?} is no compute capability such as 90"
            )),
        }
    }
    archs.sort_unstable();
    archs.dedup();
    archs.retain(|arch| nvcc.targets.contains(arch));
    if archs.is_empty() {
        fail(&format!(
            "PHASOR_CUDA_ARCHS={asked}: {} knows none of them, only {:?}",
            nvcc.path.display(),
            nvcc.targets
        ));
    }
    archs
}

fn compile_fatbin(nvcc: &Nvcc, module: &str) -> Result<(), String> {
    let out = out_dir().join(format!("{module}.fatbin"));
    let archs = architectures(nvcc);
    let mut command = cc::Build::new()
        .cuda(true)
        .cudart("none")
        // A debug build of the crate would otherwise carry unoptimised kernels.
        .debug(false)
        .opt_level(3)
        .cargo_metadata(false)
        .get_compiler()
        .to_command();
    command.args(["-std=c++17", "-fatbin", "--threads", "0"]);
    for arch in &archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    // PTX for GPUs between and beyond those.
    let mut portable = vec![archs[0], archs[archs.len() - 1]];
    portable.dedup();
    for arch in portable {
        command.arg(format!("-gencode=arch=compute_{arch},code=compute_{arch}"));
    }
    command.arg(format!("cuda/{module}.cu")).arg("-o").arg(&out);
    // Flags from elsewhere, such as --use_fast_math, would change the bits.
    command.env_remove("NVCC_PREPEND_FLAGS");
    command.env_remove("NVCC_APPEND_FLAGS");
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            eprint!("{}", String::from_utf8_lossy(&output.stdout));
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
            let message = String::from_utf8_lossy(&output.stderr);
            let first = message
                .lines()
                .find(|line| line.contains("error") || line.contains("fatal"))
                .or(message.lines().next())
                .unwrap_or("no message");
            Err(format!(
                "nvcc failed on cuda/{module}.cu ({}): {first}",
                output.status
            ))
        }
        Err(error) => Err(format!("{}: {error}", nvcc.path.display())),
    }
}

fn out_dir() -> PathBuf {
    match env::var_os("OUT_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => fail("OUT_DIR is not set: run this through cargo"),
    }
}

#[cfg(feature = "bindgen")]
fn generate_bindings() {
    let bindings = bindgen::Builder::default()
        .header("cuda/phasor_call.h")
        .allowlist_item("Phasor.*|PHASOR_.*")
        .blocklist_item("PHASOR_CALL_H|PHASOR_(FIELDS_|STRUCTS|DECLARE_|SIZE_OF_|STATIC_ASSERT).*")
        .derive_default(true)
        .raw_line("// Generated from cuda/phasor_call.h by bindgen; see src/call/mod.rs.")
        .generate();
    let written = bindings
        .map_err(|error| error.to_string())
        .and_then(|bindings| {
            bindings
                .write_to_file(out_dir().join("bindings.rs"))
                .map_err(|error| error.to_string())
        });
    if let Err(error) = written {
        fail(&format!("bindgen on cuda/phasor_call.h: {error}"));
    }
}
