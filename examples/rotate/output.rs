//! Writing the rotated tensors, all or nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::report::{Report, thousands};
use super::{Failure, Result, fail};

/// Writes a file under another name in the same folder, then renames it: whoever looks at `path`
/// sees the whole file, or what was there before.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let failure = |error: io::Error| Failure(format!("cannot write {}: {error}", path.display()));
    // A link stays a link; a device or folder must not be renamed over.
    let path_to_replace = match fs::metadata(path) {
        Ok(there) if there.is_file() => fs::canonicalize(path).map_err(failure)?,
        Ok(_) => {
            return fail(format!(
                "cannot write {}: it exists and is not a file",
                path.display()
            ));
        }
        Err(_) => path.to_path_buf(),
    };
    if path_to_replace.file_name().is_none() {
        return fail(format!("cannot write {}: no file name", path.display()));
    }
    let name = format!(".rotate-{}.tmp", std::process::id());
    let mut file = File::create_new(path_to_replace.with_file_name(&name)).map_err(failure)?;
    let unfinished = Unfinished(path_to_replace.with_file_name(name));
    file.write_all(bytes).map_err(failure)?;
    file.sync_all().map_err(failure)?;
    drop(file);
    fs::rename(&unfinished.0, &path_to_replace).map_err(failure)
}

/// Says what was written.
pub fn report(report: &mut Report, path: &Path, bytes: &[u8]) {
    let bytes = thousands(bytes.len() as u64);
    report.heading(&format!("Wrote {}, {bytes} bytes", path.display()));
}

/// Removes a file when dropped; once it has been renamed there is nothing to remove.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
