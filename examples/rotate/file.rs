//! Rotates the tensors of a user's file.

use std::path::Path;

use phasor::half::{bf16, f16};
use phasor::{Device, Frequencies, Positions, Rope};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as FileDtype, SafeTensors};

use super::config::Config;
use super::options::Options;
use super::report::{Report, thousands};
use super::tensors::{QueriesKeys, Stored, Tensor};
use super::{Failure, Result, fail, output, speed};

pub fn rotate(options: &Options, path: &Path) -> Result<String> {
    let bytes = std::fs::read(path)
        .map_err(|error| Failure(format!("cannot read {}: {error}", path.display())))?;
    let in_file = |reason: &dyn std::fmt::Display| Failure(format!("{}: {reason}", path.display()));
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| in_file(&format!("not a safetensors file: {error}")))?;
    let Some(first) = ["q", "k"].iter().find_map(|name| file.tensor(name).ok()) else {
        return Err(in_file(&"it has no tensor named q or k"));
    };
    let rotate = match first.dtype() {
        FileDtype::F32 => rotate_as::<f32>,
        FileDtype::F16 => rotate_as::<f16>,
        FileDtype::BF16 => rotate_as::<bf16>,
        other => {
            return Err(in_file(&format!(
                "q and k are {other}: they must be F32, F16 or BF16"
            )));
        }
    };
    let config = options.config.as_deref().map(Config::read).transpose()?;
    rotate(options, config, &file).map_err(|Failure(reason)| in_file(&reason))
}

fn rotate_as<T: Stored>(
    options: &Options,
    config: Option<Config>,
    file: &SafeTensors<'_>,
) -> Result<String> {
    let tensors = QueriesKeys {
        q: Tensor::<T>::read(file, "q")?,
        k: Tensor::<T>::read(file, "k")?,
    };
    if let (Some(q), Some(k)) = (&tensors.q, &tensors.k)
        && q.shape.len() != k.shape.len()
    {
        return fail(format!(
            "{}: they must have the same number of dims",
            tensors.shapes()
        ));
    }
    let (rope, rotation) = rope(options, config, &tensors)?;
    let positions = FilePositions::read(options, file, &tensors)?;
    let device = Device::from_name(options.device(), &[T::DTYPE])?;

    let rotated = tensors.rotated(&device, &rope, positions.get())?;
    let measured = if tensors.is_empty() {
        None
    } else {
        let row = speed::measure(options, &device, &rope, &tensors, positions.get())?;
        Some(row)
    };

    let mut report = Report::default();
    report.heading("Rotary position embedding of the tensors in a file");
    report.field("tensors", &format!("{}, {}", tensors.shapes(), T::DTYPE));
    report.field("rotation", &rotation);
    report.field("positions", &positions.describe());
    report.field("device", &device.to_string());
    report.field("because", device.reason());
    match measured {
        Some(measured) => {
            speed::report(
                &mut report,
                options,
                &device,
                &[("these tensors", measured)],
            );
        }
        None => report.field("speed", "nothing to measure: there are no elements"),
    }
    if let Some(path) = &options.output {
        let bytes = rotated.to_file()?;
        output::write(path, &bytes)?;
        output::report(&mut report, path, &bytes);
    }
    Ok(report.finish())
}

/// Frequencies take time and memory even where no token needs them, and an empty tensor may have
/// any shape.
const MAX_HEAD_DIM: usize = 1 << 16;

/// The rotation, and a description that says what was assumed.
fn rope<T: Stored>(
    options: &Options,
    config: Option<Config>,
    tensors: &QueriesKeys<T>,
) -> Result<(Rope, String)> {
    let has_config = config.is_some();
    let config = config.unwrap_or_default();
    let mut head_dims = tensors.named().map(|(_, t)| t.layout().shape()[3]);
    let head_dim = head_dims.next().unwrap_or(0);
    if head_dims.any(|other| other != head_dim) {
        return fail(format!("{}: the heads differ in size", tensors.shapes()));
    }
    if head_dim > MAX_HEAD_DIM {
        return fail(format!(
            "{}: heads have more than {MAX_HEAD_DIM} dims",
            tensors.shapes()
        ));
    }
    if let Some(expected) = config.head_dim
        && expected != head_dim
    {
        return fail(format!(
            "{}: the config has heads of {expected}",
            tensors.shapes()
        ));
    }
    let (theta, theta_from) = match config.theta {
        Some(theta) => (theta, ""),
        None if has_config => (10_000.0, " (the default; the config has no rope_theta)"),
        None => (10_000.0, " (the default; there is no --config)"),
    };
    let rotary_dim = match config.rotary_factor {
        // Rounded down, as transformers does.
        Some(factor) => (head_dim as f64 * factor) as usize,
        None => head_dim,
    };
    let frequencies = Frequencies::from_theta(theta, rotary_dim)?;
    let dims = if rotary_dim == head_dim {
        format!("all {head_dim} dims of a head")
    } else {
        format!("the first {rotary_dim} of {head_dim} dims of a head")
    };
    let pairing = options.pairing();
    let rotation = format!(
        "{}, {dims}, theta {theta:?}{theta_from}",
        pairing.name().replace('_', "-")
    );
    Ok((Rope::new(frequencies, pairing), rotation))
}

/// Positions as the file or the command line gives them.
enum FilePositions {
    Start(i64),
    I32(Vec<i32>),
    I64(Vec<i64>),
    U32(Vec<u32>),
}

impl FilePositions {
    fn read<T: Stored>(
        options: &Options,
        file: &SafeTensors<'_>,
        tensors: &QueriesKeys<T>,
    ) -> Result<Self> {
        let Ok(view) = file.tensor("position_ids") else {
            return Ok(Self::Start(options.start_position.unwrap_or(0)));
        };
        if options.start_position.is_some() {
            return fail("it has position_ids, so --start-position has no meaning");
        }
        let Some((_, tensor)) = tensors.named().next() else {
            return Ok(Self::Start(0));
        };
        let [batch, sequence, ..] = tensor.layout().shape();
        let rows = match *view.shape() {
            [n] if n == sequence => 1,
            [rows, n] if n == sequence && (rows == batch || rows == 1) => rows,
            _ => {
                return fail(format!(
                    "position_ids has shape {:?}, which does not go with {}: it must be \
                     [{sequence}] or [{batch}, {sequence}]",
                    view.shape(),
                    tensors.shapes()
                ));
            }
        };
        if tensors.is_empty() {
            // Nothing has a position; the shape alone may ask for more copies than memory holds.
            return Ok(Self::Start(0));
        }
        let copies = batch / rows;
        Ok(match view.dtype() {
            FileDtype::I32 => Self::I32(ids(&view, i32::from_le_bytes).repeat(copies)),
            FileDtype::I64 => Self::I64(ids(&view, i64::from_le_bytes).repeat(copies)),
            FileDtype::U32 => Self::U32(ids(&view, u32::from_le_bytes).repeat(copies)),
            other => {
                return fail(format!(
                    "position_ids is {other}: it must be I32, I64 or U32"
                ));
            }
        })
    }

    fn get(&self) -> Positions<'_> {
        match self {
            Self::Start(start) => Positions::start(*start),
            Self::I32(ids) => Positions::per_token(&ids[..]),
            Self::I64(ids) => Positions::per_token(&ids[..]),
            Self::U32(ids) => Positions::per_token(&ids[..]),
        }
    }

    fn describe(&self) -> String {
        let (dtype, range) = match self {
            Self::Start(start) => return format!("from {} on", thousands(*start)),
            Self::I32(ids) => ("i32", range(ids)),
            Self::I64(ids) => ("i64", range(ids)),
            Self::U32(ids) => ("u32", range(ids)),
        };
        format!("position_ids of the file, {dtype}, {range}")
    }
}

fn ids<T, const N: usize>(view: &TensorView<'_>, from_le: fn([u8; N]) -> T) -> Vec<T> {
    let (ids, _) = view.data().as_chunks::<N>();
    ids.iter().map(|&bytes| from_le(bytes)).collect()
}

fn range<T: Copy + Ord + Into<i128>>(ids: &[T]) -> String {
    match (ids.iter().min(), ids.iter().max()) {
        (Some(&low), Some(&high)) => format!("{} to {}", thousands(low), thousands(high)),
        _ => "none".to_string(),
    }
}
