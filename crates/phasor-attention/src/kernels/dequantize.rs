//! Weights to elements as launches.

use super::{KernelLaunch, PhasorDequantize, count};
use crate::error::agree;
use crate::{AttentionError, GgmlType, GptqFormat};
use phasor::Dtype;
use std::ops::Range;

/// Values that a thread makes.
const VALUES: usize = 8;
const THREADS: u32 = 256;
/// Of a block of GPTQ's kernel: rows, and words of eight inputs.
const GPTQ_BLOCK: [u32; 2] = [32, 8];

/// `[ggml, gptq]`.
fn kernels(dtype: Dtype) -> Result<[&'static str; 2], AttentionError> {
    match dtype {
        Dtype::F32 => Ok(["dequantize_ggml_f32", "dequantize_gptq_f32"]),
        Dtype::F16 => Ok(["dequantize_ggml_f16", "dequantize_gptq_f16"]),
        Dtype::Bf16 => Ok(["dequantize_ggml_bf16", "dequantize_gptq_bf16"]),
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
            remedy: "kernels need it at a multiple of 16 bytes for results, of 2 for blocks of GGUF",
        }),
    }
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
    let [kernel, _] = kernels(dtype)?;
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
    let [_, kernel] = kernels(dtype)?;
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
    if rows.end > shape.out_features {
        return Err(AttentionError::Value {
            what: "the last row to be dequantised",
            value: rows.end,
            remedy: "it must be inside the weights",
        });
    }
    aligned("the address of elements", out, 16)?;
    let words = count("words of GPTQ weights", shape.in_features / VALUES)?.div_ceil(GPTQ_BLOCK[1]);
    if words > 65_535 {
        return Err(AttentionError::Value {
            what: "in_features of GPTQ weights",
            value: shape.in_features,
            remedy: "a launch has room for fewer than 4 million",
        });
    }
    let row_count = count("rows of GPTQ weights", rows.len())?;
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
            first_row: count("rows of GPTQ weights", rows.start)?,
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
