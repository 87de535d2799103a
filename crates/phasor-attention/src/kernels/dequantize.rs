//! Weights to elements, and activations to those of their codes, as launches.

use super::{KernelLaunch, PhasorDequantize, count};
use crate::error::{agree, usable};
use crate::{AttentionError, Fp8Activation, GgmlType, GptqFormat};
use phasor::Dtype;
use std::ops::Range;

/// Values that a thread makes.
const VALUES: usize = 8;
const THREADS: u32 = 256;
/// Of a block of GPTQ's kernel: rows, and words of eight inputs.
const GPTQ_BLOCK: [u32; 2] = [32, 8];

/// Of a block of e4m3's kernel: eights of columns, and rows.
const FP8_BLOCK: [u32; 2] = [32, 8];

macro_rules! kernels {
    ($($dtype:literal),*) => {
        [$([
            concat!("dequantize_ggml_", $dtype),
            concat!("dequantize_gptq_", $dtype),
            concat!("dequantize_fp8_", $dtype),
            concat!("round_fp8_", $dtype),
        ]),*]
    };
}

/// Of f32, f16 and bf16: `[ggml, gptq, fp8, round]`.
pub(crate) const KERNELS: [[&str; 4]; 3] = kernels!("f32", "f16", "bf16");

fn kernels(dtype: Dtype) -> Result<[&'static str; 4], AttentionError> {
    match dtype {
        Dtype::F32 => Ok(KERNELS[0]),
        Dtype::F16 => Ok(KERNELS[1]),
        Dtype::Bf16 => Ok(KERNELS[2]),
        _ => Err(AttentionError::Dtype {
            dtype,
            remedy: "weights are dequantised to f32, f16 or bf16",
        }),
    }
}

/// `remedy` unless `address` is a multiple of `of`.
fn aligned(what: &'static str, address: u64, of: u64) -> Result<(), AttentionError> {
    match address.is_multiple_of(of) {
        true => Ok(()),
        false => Err(AttentionError::Value {
            what,
            value: address as usize,
            remedy: "kernels need it at a multiple of 16 bytes for elements, of 8 for codes of e4m3, of 4 for \
                     their scales, of 2 for blocks of GGUF",
        }),
    }
}

/// How many rows there are.
fn check_rows(rows: &Range<usize>, out_features: usize) -> Result<u32, AttentionError> {
    if rows.end > out_features {
        return Err(AttentionError::Value {
            what: "the last row to be dequantised",
            value: rows.end,
            remedy: "it must be inside the weights",
        });
    }
    count("rows of weights", rows.len())
}

/// The launch that makes elements of `rows` rows of blocks at `blocks`, `[rows, in_features]` at `out`: the
/// values of [`GgmlType::dequantize`], each rounded to the element type once. None if there are no rows.
///
/// # Errors
/// [`AttentionError::Mismatch`] unless rows are whole blocks, [`AttentionError::Value`] for an address that
/// is not aligned or too many blocks.
pub fn dequantize_ggml(
    ggml_type: GgmlType,
    dtype: Dtype,
    [rows, in_features]: [usize; 2],
    blocks: u64,
    out: u64,
) -> Result<Option<KernelLaunch<PhasorDequantize>>, AttentionError> {
    let [kernel, ..] = kernels(dtype)?;
    let (elements, _) = ggml_type.block();
    agree(
        "in_features, whole blocks",
        in_features / elements * elements,
        in_features,
    )?;
    aligned("the address of blocks", blocks, 2)?;
    aligned("the address of their elements", out, 16)?;
    let blocks_of_all = rows.saturating_mul(in_features / elements);
    let items = blocks_of_all.saturating_mul(elements / VALUES);
    let grid = items.div_ceil(THREADS as usize);
    if grid > i32::MAX as usize {
        return Err(AttentionError::Value {
            what: "rows of GGUF weights",
            value: rows,
            remedy: "a launch has room for fewer: dequantise some rows at a time",
        });
    }
    let launch = KernelLaunch {
        kernel,
        grid: [grid as u32, 1, 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
        params: PhasorDequantize {
            blocks,
            out,
            count: blocks_of_all as u64,
            type_: match ggml_type {
                GgmlType::Q4_0 => 0,
                GgmlType::Q8_0 => 1,
                GgmlType::Q4_K => 2,
                GgmlType::Q5_K => 3,
                GgmlType::Q6_K => 4,
            },
            ..PhasorDequantize::default()
        },
    };
    Ok((grid > 0).then_some(launch))
}

/// What a GPTQ matrix in device memory is.
#[derive(Clone, Copy, Debug)]
pub struct GptqShape {
    /// Outputs, a multiple of 8.
    pub out_features: usize,
    /// Inputs, a multiple of 8.
    pub in_features: usize,
    /// Inputs of a group, where there is no `g_idx`.
    pub group_size: usize,
    /// What zero points are.
    pub format: GptqFormat,
}

/// Where the tensors of a GPTQ matrix are, each as in [`GptqTensors`](crate::GptqTensors).
#[derive(Clone, Copy, Debug)]
pub struct GptqAddresses {
    /// `qweight`.
    pub qweight: u64,
    /// `scales`.
    pub scales: u64,
    /// `qzeros`.
    pub qzeros: u64,
    /// `g_idx`, whose groups are taken for the last one where they are past it; 0: runs of `group_size`.
    pub g_idx: u64,
}

/// The launch that makes elements of some rows (outputs) of a GPTQ matrix, `[rows, in_features]` at `out`:
/// the values of [`GptqWeights`](crate::GptqWeights), each rounded to the element type once. None if there
/// are no rows.
///
/// # Errors
/// [`AttentionError::Value`] for a number or an address that cannot be used.
pub fn dequantize_gptq(
    shape: &GptqShape,
    dtype: Dtype,
    rows: Range<usize>,
    addresses: &GptqAddresses,
    out: u64,
) -> Result<Option<KernelLaunch<PhasorDequantize>>, AttentionError> {
    let [_, kernel, ..] = kernels(dtype)?;
    for (what, value) in [
        ("out_features of GPTQ weights", shape.out_features),
        ("in_features of GPTQ weights", shape.in_features),
    ] {
        if value == 0 || !value.is_multiple_of(VALUES) {
            return Err(AttentionError::Value {
                what,
                value,
                remedy: "it must be a multiple of 8, as words have eight of them",
            });
        }
    }
    if shape.group_size == 0 {
        return Err(AttentionError::Value {
            what: "group_size",
            value: 0,
            remedy: "it must be above 0",
        });
    }
    let row_count = check_rows(&rows, shape.out_features)?;
    aligned("the address of elements", out, 16)?;
    let words = count("words of GPTQ weights", shape.in_features / VALUES)?.div_ceil(GPTQ_BLOCK[1]);
    if words > 65_535 {
        return Err(AttentionError::Value {
            what: "in_features of GPTQ weights",
            value: shape.in_features,
            remedy: "a launch has room for fewer than 4 million",
        });
    }
    let launch = KernelLaunch {
        kernel,
        grid: [row_count.div_ceil(GPTQ_BLOCK[0]), words, 1],
        block: [GPTQ_BLOCK[0], GPTQ_BLOCK[1], 1],
        shared_bytes: 0,
        params: PhasorDequantize {
            blocks: addresses.qweight,
            scales: addresses.scales,
            zeros: addresses.qzeros,
            groups_of_inputs: addresses.g_idx,
            out,
            first_row: count("rows of weights", rows.start)?,
            rows: row_count,
            in_features: count("in_features of GPTQ weights", shape.in_features)?,
            out_features: count("out_features of GPTQ weights", shape.out_features)?,
            groups: count(
                "groups of GPTQ weights",
                shape.in_features.div_ceil(shape.group_size),
            )?,
            group_size: count("group_size", shape.group_size.min(shape.in_features))?,
            zero_offset: shape.format.zero_offset() as u32,
            ..PhasorDequantize::default()
        },
    };
    Ok((row_count > 0).then_some(launch))
}

/// What a matrix of e4m3 in device memory is.
#[derive(Clone, Copy, Debug)]
pub struct Fp8Shape {
    /// Outputs.
    pub out_features: usize,
    /// Inputs, a multiple of 8.
    pub in_features: usize,
    /// Outputs and inputs that share a scale; inputs are a multiple of 8, or all. `[1, in_features]` are scales
    /// of rows, `[out_features, in_features]` is that of a tensor.
    pub block: [usize; 2],
}

impl Fp8Shape {
    /// Scales of it: `ceil(out_features / block[0])` rows of `ceil(in_features / block[1])`. 0 if it has no
    /// blocks.
    pub fn scales(&self) -> usize {
        let of = |features: usize, block: usize| match block {
            0 => 0,
            block => features.div_ceil(block),
        };
        of(self.out_features, self.block[0]).saturating_mul(of(self.in_features, self.block[1]))
    }
}

/// How many groups of so many columns a row has, and the columns of one; both kernels of e4m3 take them.
fn groups_of(in_features: usize, group: usize) -> Result<[u32; 2], AttentionError> {
    /// What a grid has room for in its second dimension.
    const MOST_COLUMNS: usize = 65_535 * FP8_BLOCK[0] as usize * VALUES;
    let group = group.min(in_features);
    for (what, value) in [
        ("in_features of e4m3", in_features),
        ("inputs that share a scale of e4m3", group),
    ] {
        if value == 0 || !value.is_multiple_of(VALUES) || value > MOST_COLUMNS {
            return Err(AttentionError::Value {
                what,
                value,
                remedy: "kernels take eight values at a time: it must be a multiple of 8, from 8 to 16 million; \
                         dense weights are there for others",
            });
        }
    }
    Ok([in_features.div_ceil(group) as u32, group as u32])
}

/// The launch that makes elements of some rows (outputs) of a matrix of e4m3, `[rows, in_features]` at `out`:
/// the values of [`Fp8Weights`](crate::Fp8Weights), each rounded to the element type once. `codes` has
/// `[out_features, in_features]` bytes, `scales` has [`Fp8Shape::scales`] of f32. None if there are no rows.
///
/// # Errors
/// [`AttentionError::Value`] for a number or an address that cannot be used.
pub fn dequantize_fp8(
    shape: &Fp8Shape,
    dtype: Dtype,
    rows: Range<usize>,
    [codes, scales]: [u64; 2],
    out: u64,
) -> Result<Option<KernelLaunch<PhasorDequantize>>, AttentionError> {
    let [_, _, kernel, _] = kernels(dtype)?;
    let [groups, group_size] = groups_of(shape.in_features, shape.block[1])?;
    let group_rows = shape.block[0].min(shape.out_features);
    if group_rows == 0 {
        return Err(AttentionError::Value {
            what: "outputs that share a scale of e4m3",
            value: 0,
            remedy: "a matrix has outputs, and a block of it too",
        });
    }
    let row_count = check_rows(&rows, shape.out_features)?;
    aligned("the address of codes", codes, 8)?;
    aligned("the address of their scales", scales, 4)?;
    aligned("the address of their elements", out, 16)?;
    let eights = (shape.in_features / VALUES) as u32; // Compared with what a grid has room for.
    let launch = KernelLaunch {
        kernel,
        grid: [
            row_count.div_ceil(FP8_BLOCK[1]),
            eights.div_ceil(FP8_BLOCK[0]),
            1,
        ],
        block: [FP8_BLOCK[0], FP8_BLOCK[1], 1],
        shared_bytes: 0,
        params: PhasorDequantize {
            blocks: codes,
            scales,
            out,
            first_row: count("rows of weights", rows.start)?,
            rows: row_count,
            in_features: count("in_features of e4m3", shape.in_features)?,
            groups,
            group_size,
            group_rows: count("outputs that share a scale of e4m3", group_rows)?,
            ..PhasorDequantize::default()
        },
    };
    Ok((row_count > 0).then_some(launch))
}

/// The launch that rounds activations `[tokens, in_features]` at `x` to codes of e4m3, and writes what these
/// stand for to `out`, of the same shape: the values of [`Fp8Activation::round`], each rounded to the element
/// type once. None if there are no tokens.
///
/// # Errors
/// [`AttentionError::Value`] for a number or an address that cannot be used, [`AttentionError::Factor`] for a
/// scale or a `most_amax` that cannot.
pub fn round_fp8(
    activation: Fp8Activation,
    dtype: Dtype,
    [tokens, in_features]: [usize; 2],
    x: u64,
    out: u64,
) -> Result<Option<KernelLaunch<PhasorDequantize>>, AttentionError> {
    let [.., kernel] = kernels(dtype)?;
    let (group, scale, most_amax, scale_dtype) = match activation {
        Fp8Activation::Static(scale) => {
            usable("the scale of activations", f64::from(scale))?;
            (in_features, scale, f32::INFINITY, Dtype::F32)
        }
        Fp8Activation::PerToken {
            most_amax,
            scale_dtype,
        } => {
            if most_amax != f32::INFINITY {
                usable("most_amax", f64::from(most_amax))?;
            }
            (in_features, 0.0, most_amax, scale_dtype)
        }
        Fp8Activation::Blocks(dims) => (dims, 0.0, f32::INFINITY, Dtype::F32),
    };
    let [groups, group_size] = groups_of(in_features, group)?;
    aligned("the address of activations", x, 16)?;
    aligned("the address of their values", out, 16)?;
    // Threads of a group, as many as it has eights of values.
    let threads = (group_size / VALUES as u32)
        .next_power_of_two()
        .min(THREADS);
    let teams = THREADS / threads;
    let all = tokens.saturating_mul(groups as usize);
    if all > i32::MAX as usize {
        return Err(AttentionError::Value {
            what: "groups of activations",
            value: all,
            remedy: "a launch has room for 2^31 - 1: give fewer tokens to a call",
        });
    }
    let launch = KernelLaunch {
        kernel,
        grid: [(all as u32).div_ceil(teams), 1, 1],
        block: [threads, teams, 1],
        shared_bytes: 0,
        params: PhasorDequantize {
            blocks: x,
            out,
            count: all as u64,
            in_features: count("in_features of e4m3", in_features)?,
            groups,
            group_size,
            scale_type: match scale_dtype {
                Dtype::F16 => 1,
                Dtype::Bf16 => 2,
                _ => 0,
            },
            scale,
            most_amax,
            ..PhasorDequantize::default()
        },
    };
    Ok((all > 0).then_some(launch))
}
