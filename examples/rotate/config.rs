//! The rotation that a Hugging Face `config.json` describes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use phasor::Pairing;
use phasor::config::{ModelConfig, RopeConfig};

use super::{Failure, Result, fail};

/// A config is a few kilobytes; anything much larger is another file.
const MAX_BYTES: u64 = 1 << 24;

/// Reads the rotation of the layers of one type, or of all where there is one kind only.
pub fn read(path: &Path, layer_type: Option<&str>) -> Result<RopeConfig> {
    let mut json = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut json))
        .map_err(|error| Failure(format!("cannot read {}: {error}", path.display())))?;
    if json.len() as u64 > MAX_BYTES {
        return fail(format!("{}: too large for a config", path.display()));
    }
    let config = ModelConfig::from_hf_config(&json).and_then(|model| {
        Ok(match layer_type {
            Some(layer_type) => model.rope_for(layer_type)?.clone(),
            None => model.rope()?.clone(),
        })
    });
    // Layouts skip what does not rotate, see tensors.rs.
    let config = config.map(|config| {
        let offset = config.rotary_offset();
        config.with_layout_offset(offset)
    });
    config.map_err(|error| Failure(format!("{}: {error}", path.display())))
}

/// The rotation in words; `pairing` may differ from the config's.
pub fn describe(config: &RopeConfig, pairing: Pairing) -> String {
    let pairing_name = pairing.name().replace('_', "-");
    let rule = if pairing == config.pairing() {
        config.pairing_rule().to_string()
    } else {
        "chosen by --pairing".to_string()
    };
    let dims = match (
        config.rotary_dim(),
        config.head_dim(),
        config.rotary_offset(),
    ) {
        (rotary_dim, head_dim, _) if rotary_dim == head_dim => {
            format!("all {head_dim} dims of a head")
        }
        (rotary_dim, head_dim, 0) => format!("the first {rotary_dim} of {head_dim} dims of a head"),
        (rotary_dim, head_dim, _) => format!("the last {rotary_dim} of {head_dim} dims of a head"),
    };
    let scaling = config.scaling().name();
    format!(
        "{pairing_name} ({rule}), {dims}, theta {:?}, rope type {scaling}",
        config.theta()
    )
}
