//! Rotates the tensors of a user's file.

use std::path::Path;

use phasor::config::{RopeConfig, row_for_call};
use phasor::half::{bf16, f16};
use phasor::{Angles, Device, Dtype, Frequencies, FrequencyRows, Positions, Rope};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as FileDtype, SafeTensors};

use super::config;
use super::options::{Options, RowsBy};
use super::plot::{self, Subject};
use super::progress::Progress;
use super::report::{Report, thousands};
use super::tensors::{QueriesKeys, Rotation, Stored, Tensor};
use super::{Failure, Result, fail, output, speed};

pub fn rotate(options: &Options, path: &Path, progress: &mut Progress<'_>) -> Result<String> {
    progress.begin("reading", 1);
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
    let config = options
        .config
        .as_deref()
        .map(|path| config::read(path, options.layer_type.as_deref()))
        .transpose()?;
    rotate(options, config, &file, progress).map_err(|Failure(reason)| in_file(&reason))
}

fn rotate_as<T: Stored>(
    options: &Options,
    config: Option<RopeConfig>,
    file: &SafeTensors<'_>,
    progress: &mut Progress<'_>,
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
    let head_dim = head_dim(&tensors)?;
    let (config, text) = settle(options, config, head_dim, &tensors)?;
    let axes = config.axes().map_or(1, |axes| axes.axes());
    let positions = FilePositions::read(options, file, &tensors, axes)?;
    let lengths = positions.lengths(&tensors);
    let (rope, rows) = rope_and_rows(options, &config, &lengths)?;
    let dtypes = match options.plot {
        Some(_) => &[T::DTYPE, Dtype::F32][..],
        None => &[T::DTYPE],
    };
    let device = Device::from_name(options.device(), dtypes)?;

    let rotation = Rotation {
        rope: &rope,
        rotary_offset: config.rotary_offset(),
        positions: rows.choose(positions.get()),
    };
    progress.begin("rotating", 1);
    let rotated = tensors.rotated(&device, &rotation)?;
    let measured = if tensors.is_empty() {
        None
    } else {
        Some(speed::measure(
            options, &device, &tensors, &rotation, progress,
        )?)
    };

    let drawn = match &options.plot {
        Some(path) => {
            let subject = Subject {
                device: &device,
                frequencies: &rows.of_first_sequence(&rope)?,
                pairing: rope.pairing(),
                rotary_offset: config.rotary_offset(),
            };
            Some((path, plot::draw(&subject, &tensors, progress)?))
        }
        None => None,
    };

    let mut report = Report::default();
    report.heading("Rotary position embedding of the tensors in a file");
    report.field("tensors", &format!("{}, {}", tensors.shapes(), T::DTYPE));
    report.field("rotation", &text);
    if options.config.is_some() {
        report.field("score scale", &config.score_scale().to_string());
    }
    report.field("positions", &positions.describe());
    if let Some(text) = rows.describe(&lengths) {
        report.field("frequencies", &text);
    }
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
    if let Some((_, drawn)) = &drawn {
        drawn.report(&mut report);
    }
    if let Some(path) = &options.output {
        progress.begin("writing", 1);
        let bytes = rotated.to_file()?;
        output::write(path, &bytes)?;
        output::report(&mut report, path, &bytes);
    }
    if let Some((path, drawn)) = drawn {
        output::write(path, drawn.svg.as_bytes())?;
        output::report(&mut report, path, drawn.svg.as_bytes());
    }
    Ok(report.finish())
}

/// Dims of a head, of q and k alike.
fn head_dim<T: Stored>(tensors: &QueriesKeys<T>) -> Result<usize> {
    let mut head_dims = tensors.named().map(|(_, t)| t.layout().shape()[3]);
    let head_dim = head_dims.next().unwrap_or(0);
    if head_dims.any(|other| other != head_dim) {
        return fail(format!("{}: the heads differ in size", tensors.shapes()));
    }
    Ok(head_dim)
}

/// The rotation in full, and in words that say what was assumed.
fn settle<T: Stored>(
    options: &Options,
    config: Option<RopeConfig>,
    head_dim: usize,
    tensors: &QueriesKeys<T>,
) -> Result<(RopeConfig, String)> {
    let Some(config) = config else {
        let pairing = options.pairing();
        let config = RopeConfig::new(10_000.0, head_dim)
            .map_err(|error| Failure(format!("{}: {error}", tensors.shapes())))?;
        let text = format!(
            "{}, all {head_dim} dims of a head, theta 10000.0 (the default; there is no --config)",
            pairing.name().replace('_', "-")
        );
        // An odd head_dim is refused here.
        let config = config.with_rotary_dim(head_dim)?;
        return Ok((config.with_pairing(pairing), text));
    };
    if config.head_dim() != head_dim {
        return fail(format!(
            "{}: the config has heads of {}",
            tensors.shapes(),
            config.head_dim()
        ));
    }
    let pairing = options.chosen_pairing().unwrap_or(config.pairing());
    let text = config::describe(&config, pairing);
    Ok((config.with_pairing(pairing), text))
}

/// The rotation, and which of its rows of frequencies each sequence uses. `lengths` are those of
/// the sequences of the batch.
fn rope_and_rows(options: &Options, config: &RopeConfig, lengths: &[u64]) -> Result<(Rope, Rows)> {
    if !config.depends_on_length() {
        return Ok((config.rope()?, Rows::One));
    }
    if options.rows_by() == RowsBy::Position {
        return Ok((config.rope_by_position()?, Rows::ByPosition));
    }
    let rope = config.rope_for_lengths(lengths)?;
    let Angles::Rows(rows) = rope.angles() else {
        return Ok((rope, Rows::One));
    };
    let chosen = Rows::of_lengths(options.rows_by(), rows, lengths)?;
    Ok((rope, chosen))
}

/// Which rows of frequencies a call uses.
enum Rows {
    One,
    ByPosition,
    Call(u32),
    PerSequence(Vec<u32>),
}

impl Rows {
    fn of_lengths(by: RowsBy, rows: &FrequencyRows, lengths: &[u64]) -> Result<Self> {
        if by == RowsBy::Call || lengths.is_empty() {
            let longest = lengths.iter().copied().max().unwrap_or(0);
            let largest = i64::try_from(longest).unwrap_or(i64::MAX) - 1;
            return Ok(Rows::Call(row_for_call(rows, largest)?));
        }
        let of_length = |&length: &u64| rows.row_for_length(length);
        let chosen = lengths.iter().map(of_length).collect::<Result<_, _>>()?;
        Ok(Rows::PerSequence(chosen))
    }

    /// The frequencies of the first sequence, for positions that go beyond its length.
    fn of_first_sequence(&self, rope: &Rope) -> Result<Frequencies> {
        let row = match self {
            Rows::One => 0,
            Rows::Call(row) => *row,
            Rows::PerSequence(rows) => rows.first().copied().unwrap_or(0),
            Rows::ByPosition => {
                return fail(
                    "--plot needs frequencies that do not change with the position: use --rows-by \
                     sequence or call",
                );
            }
        };
        match rope.angles() {
            Angles::Exact(frequencies) => Ok(frequencies.clone()),
            Angles::Rows(rows) => Ok(rows.row(row)?),
            _ => fail("--plot needs frequencies, which this rotation does not have"),
        }
    }

    fn choose<'a>(&'a self, positions: Positions<'a>) -> Positions<'a> {
        match self {
            Rows::One | Rows::ByPosition => positions,
            Rows::Call(row) => positions.frequency_row(*row),
            Rows::PerSequence(rows) => positions.frequency_rows_per_sequence(rows),
        }
    }

    fn describe(&self, lengths: &[u64]) -> Option<String> {
        let range = || range(&lengths.iter().map(|&n| i128::from(n)).collect::<Vec<_>>());
        match self {
            Rows::One => None,
            Rows::ByPosition => Some("by the position of each token".to_string()),
            Rows::Call(_) => Some(format!(
                "by the longest sequence of the call, for all; lengths {}",
                range()
            )),
            Rows::PerSequence(_) => Some(format!(
                "by the length of each sequence; lengths {}",
                range()
            )),
        }
    }
}

/// Positions as the file or the command line gives them.
enum FilePositions {
    Start(i64),
    Ids { ids: Ids, axes: usize },
}

enum Ids {
    I32(Vec<i32>),
    I64(Vec<i64>),
    U32(Vec<u32>),
}

impl FilePositions {
    fn read<T: Stored>(
        options: &Options,
        file: &SafeTensors<'_>,
        tensors: &QueriesKeys<T>,
        axes: usize,
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
        // How many values there are beside those of a sequence, and whether one per axis.
        let (given, per_axis) = match *view.shape() {
            [n] if n == sequence => (1, false),
            [a, n] if axes > 1 && a == axes && a == batch && n == sequence => {
                return fail(format!(
                    "position_ids has shape {:?}, whose rows could be axes or sequences: give \
                     [{axes}, {batch}, {sequence}]",
                    view.shape()
                ));
            }
            [a, n] if axes > 1 && a == axes && n == sequence => (a, true),
            [a, rows, n] if axes > 1 && a == axes && n == sequence && rows == batch => {
                (a * rows, true)
            }
            [rows, n] if n == sequence && (rows == batch || rows == 1) => (rows, false),
            _ => {
                let per_axis = if axes > 1 {
                    format!(", [{axes}, {sequence}] or [{axes}, {batch}, {sequence}]")
                } else {
                    String::new()
                };
                return fail(format!(
                    "position_ids has shape {:?}, which does not go with {}: it must be \
                     [{sequence}] or [{batch}, {sequence}]{per_axis}",
                    view.shape(),
                    tensors.shapes()
                ));
            }
        };
        if tensors.is_empty() {
            // Nothing has a position; the shape alone may ask for more copies than memory holds.
            return Ok(Self::Start(0));
        }
        let axes = if per_axis { axes } else { 1 };
        // Positions of one sequence are those of all of them.
        let copies = axes * batch / given;
        let ids = match view.dtype() {
            FileDtype::I32 => Ids::I32(spread(&ids(&view, i32::from_le_bytes), sequence, copies)),
            FileDtype::I64 => Ids::I64(spread(&ids(&view, i64::from_le_bytes), sequence, copies)),
            FileDtype::U32 => Ids::U32(spread(&ids(&view, u32::from_le_bytes), sequence, copies)),
            other => {
                return fail(format!(
                    "position_ids is {other}: it must be I32, I64 or U32"
                ));
            }
        };
        Ok(Self::Ids { ids, axes })
    }

    fn get(&self) -> Positions<'_> {
        let Self::Ids { ids, axes } = self else {
            return Positions::start(self.first());
        };
        let ids: phasor::Ids<&[u8]> = match ids {
            Ids::I32(ids) => ids.into(),
            Ids::I64(ids) => ids.into(),
            Ids::U32(ids) => ids.into(),
        };
        if *axes == 1 {
            Positions::per_token(ids)
        } else {
            Positions::per_axis(ids)
        }
    }

    fn first(&self) -> i64 {
        match self {
            Self::Start(start) => *start,
            Self::Ids { .. } => 0,
        }
    }

    /// Tokens of each sequence, those before its first one here included: one past its largest
    /// position. None where nothing rotates.
    fn lengths<T: Stored>(&self, tensors: &QueriesKeys<T>) -> Vec<u64> {
        let shape = tensors.named().next().map(|(_, t)| t.layout().shape());
        let [batch, sequence, ..] = shape.unwrap_or_default();
        if tensors.is_empty() {
            return Vec::new();
        }
        let length = |largest: i128| u64::try_from(largest + 1).unwrap_or(0);
        let Self::Ids { ids, axes } = self else {
            return vec![length(i128::from(self.first()) + sequence as i128 - 1); batch];
        };
        let of_row = |row: usize| {
            let sequences = (0..*axes).map(|axis| (axis * batch + row) * sequence);
            let largest = sequences.filter_map(|start| ids.largest(start..start + sequence));
            length(largest.max().unwrap_or(-1))
        };
        (0..batch).map(of_row).collect()
    }

    fn describe(&self) -> String {
        let (ids, axes) = match self {
            Self::Start(start) => return format!("from {} on", thousands(*start)),
            Self::Ids { ids, axes } => (ids, axes),
        };
        let (dtype, range) = match ids {
            Ids::I32(ids) => ("i32", range(ids)),
            Ids::I64(ids) => ("i64", range(ids)),
            Ids::U32(ids) => ("u32", range(ids)),
        };
        let on_axes = match axes {
            1 => String::new(),
            axes => format!(" on {axes} axes"),
        };
        format!("position_ids of the file{on_axes}, {dtype}, {range}")
    }
}

impl Ids {
    fn largest(&self, range: std::ops::Range<usize>) -> Option<i128> {
        match self {
            Ids::I32(ids) => ids[range].iter().max().map(|&id| id.into()),
            Ids::I64(ids) => ids[range].iter().max().map(|&id| id.into()),
            Ids::U32(ids) => ids[range].iter().max().map(|&id| id.into()),
        }
    }
}

/// Each run of `sequence` values, `copies` times.
fn spread<T: Copy>(ids: &[T], sequence: usize, copies: usize) -> Vec<T> {
    let runs = ids.chunks(sequence.max(1));
    runs.flat_map(|run| run.repeat(copies)).collect()
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
