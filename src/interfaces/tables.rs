//! Tables as other systems form them, rounding by rounding, for comparing with a reference run or for
//! a model that was trained through such a table.
//!
//! Everything else in this crate forms angles exactly, and better serves a model of any origin: the
//! errors of these tables grow with the position, and two systems' do so differently. Here, and only
//! here, cos, sin and powers are the f32 functions of the platform, as they are there; so the last bit
//! may differ from machine to machine.
//!
//! Each returns a [`CosSinTable`] for the positions `0..rows`, for
//! [`Rope::new`](crate::Rope::new). How near they come to the real thing was measured on an x86-64
//! CPU with glibc, against tables that the systems made:
//!
//! | function | compared with, up to position | f32 | 16-bit types |
//! |---|---|---|---|
//! | [`inv_freq`] | transformers 5.23 | the same bits | |
//! | [`hugging_face`] | transformers 5.23, 100,000 | 6.0e-8, 1 ulp in a quarter of a row | the same bits |
//! | [`vllm`] | vLLM 0.33's formula in torch, 131,071 | 6.0e-8, 1 ulp in a third of a row | the same bits |
//! | [`max`] | MAX 26.7, 8,191 | the same bits | not recorded |
//! | [`mlx`] | MLX 0.32.4, 100,000 | 1.9e-3 (exact angles: 5.2e-3) | up to 6% of a row differ, bf16 by 3.9e-3, f16 by 2.0e-3 |
//! | [`mlx_freqs`] | MLX 0.32.4, 100,000 | 6.0e-8, 1 ulp in a fifth of a row | the same bits |
//! | [`ggml`] | ggml 0.13.1, 100,000 | the same bits, YaRN and all axes | (f32 there, too) |
//! | [`llama_cpp`] | ggml 0.13.1, 100,000 | the same bits | (f32 there, too) |
//!
//! MLX's exponential has roundings of its own, which `mlx` follows in part. What remains of 1 ulp is
//! torch's and MLX's cos and sin, which are not the platform's.
//!
//! ```
//! use phasor::interfaces::tables;
//! use phasor::{Dtype, Pairing, Rope};
//!
//! # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
//! // What Llama 2 rotates with in transformers, in bf16.
//! let inv_freq = tables::inv_freq(10_000.0, 128)?;
//! let table = tables::hugging_face(&inv_freq, 1.0, 4096, Dtype::Bf16)?;
//! let rope = Rope::new(table, Pairing::HalfSplit);
//! # let _ = rope;
//! # Ok(())
//! # }
//! ```

pub use super::ggml::table as ggml;

use super::InterfaceError;
use super::tensor::{check_rotary_dim, product};
use crate::{CosSinTable, Dtype, Element};

/// Twice what f32 counts without a gap, for MAX makes two rows for each token of the longest sequence.
pub(super) const MOST_ROWS: usize = 1 << 25;

/// Radians per position as transformers and vLLM form them: `1 / theta^(2i / rotary_dim)`, each
/// operation in f32.
///
/// # Errors
/// [`InterfaceError::Value`] unless `rotary_dim` is even and from 2 to 65,536.
pub fn inv_freq(theta: f32, rotary_dim: usize) -> Result<Vec<f32>, InterfaceError> {
    check_rotary_dim("rotary_dim", rotary_dim)?;
    let dim = rotary_dim as f32;
    let of_pair = |pair: usize| 1.0 / theta.powf((2 * pair) as f32 / dim);
    Ok((0..rotary_dim / 2).map(of_pair).collect())
}

/// Hugging Face transformers: angle `position * inv_freq` in f32, its cos and sin times
/// `attention_scaling` (1 for most models), cast to the model's dtype. [`inv_freq`] gives plain
/// frequencies; a scaled model's are in its `rotary_emb.inv_freq`.
///
/// # Errors
/// [`InterfaceError::Value`] for more than 2^25 rows, or more than there is memory for;
/// [`InterfaceError::Rope`] without frequencies or rows, or with more than 2^21 frequencies.
pub fn hugging_face(
    inv_freq: &[f32],
    attention_scaling: f32,
    rows: usize,
    dtype: Dtype,
) -> Result<CosSinTable, InterfaceError> {
    let factors =
        |angle: f32| [angle.cos(), angle.sin()].map(|x| rounded(x * attention_scaling, dtype));
    from_rows(inv_freq.len(), rows, |position, row| {
        row.extend(inv_freq.iter().map(|f| factors(position * f)));
    })
}

/// vLLM: the `cos_sin_cache` of `RotaryEmbedding(..., rotary_dim, max_position, base, ..., dtype)`.
///
/// # Errors
/// Those of [`inv_freq`] and [`hugging_face`].
pub fn vllm(
    base: f32,
    rotary_dim: usize,
    max_position: usize,
    dtype: Dtype,
) -> Result<CosSinTable, InterfaceError> {
    hugging_face(&inv_freq(base, rotary_dim)?, 1.0, max_position, dtype)
}

/// Modular MAX: frequencies in f64 rounded to f32, angles in f32, the table cast to the type of x.
/// For the plain `RotaryEmbedding`; `rows` is `2 * max_seq_len` there.
///
/// # Errors
/// [`InterfaceError::Value`] unless `head_dim` is even and from 2 to 65,536; as [`hugging_face`].
pub fn max(
    theta: f64,
    head_dim: usize,
    rows: usize,
    dtype: Dtype,
) -> Result<CosSinTable, InterfaceError> {
    check_rotary_dim("head_dim", head_dim)?;
    let of_pair = |pair: usize| theta.powf(-((2 * pair) as f64) / head_dim as f64) as f32;
    let inv_freq: Vec<_> = (0..head_dim / 2).map(of_pair).collect();
    hugging_face(&inv_freq, 1.0, rows, dtype)
}

/// MLX's `fast.rope` with a base, on its CPU backend: frequencies as an exponential in f32, position
/// times `scale` and then the angle in f32, cos and sin cast to the type of `a`.
///
/// # Errors
/// [`InterfaceError::Value`] unless `dims` is even and from 2 to 65,536; as [`hugging_face`].
pub fn mlx(
    base: f32,
    dims: usize,
    scale: f32,
    rows: usize,
    dtype: Dtype,
) -> Result<CosSinTable, InterfaceError> {
    check_rotary_dim("dims", dims)?;
    let pairs = dims / 2;
    let step = base.ln() / pairs as f32;
    // Its exponential takes the logarithm to base 2 in f32 first, where most of the error is made.
    let of_pair = |pair: usize| (-(pair as f32) * step * std::f32::consts::LOG2_E).exp2();
    let inv_freq: Vec<_> = (0..pairs).map(of_pair).collect();
    mlx_of(&inv_freq, scale, rows, dtype)
}

/// MLX's `fast.rope` with `freqs`, which are periods, on its CPU backend.
///
/// # Errors
/// As [`hugging_face`].
pub fn mlx_freqs(
    freqs: &[f32],
    scale: f32,
    rows: usize,
    dtype: Dtype,
) -> Result<CosSinTable, InterfaceError> {
    let inv_freq: Vec<_> = freqs.iter().map(|period| 1.0 / period).collect();
    mlx_of(&inv_freq, scale, rows, dtype)
}

fn mlx_of(
    inv_freq: &[f32],
    scale: f32,
    rows: usize,
    dtype: Dtype,
) -> Result<CosSinTable, InterfaceError> {
    let factors = |angle: f32| [angle.cos(), angle.sin()].map(|x| rounded(x, dtype));
    from_rows(inv_freq.len(), rows, |position, row| {
        row.extend(inv_freq.iter().map(|f| factors(position * scale * f)));
    })
}

/// llama.cpp (ggml's CPU backend, without YaRN): the angle of a pair is that of the pair before it
/// times `freq_base^(-2 / n_dims)`, in f32, so that roundings add up; `freq_factors`, if there are
/// any, divide and `freq_scale` multiplies it. The table stays f32 in every type.
///
/// # Errors
/// [`InterfaceError::Value`] unless `n_dims` is even and from 2 to 65,536; [`InterfaceError::Shape`]
/// unless there are as many `freq_factors` as pairs; as [`hugging_face`].
pub fn llama_cpp(
    freq_base: f32,
    n_dims: usize,
    freq_scale: f32,
    freq_factors: Option<&[f32]>,
    rows: usize,
) -> Result<CosSinTable, InterfaceError> {
    check_rotary_dim("n_dims", n_dims)?;
    let pairs = n_dims / 2;
    if let Some(factors) = freq_factors
        && factors.len() != pairs
    {
        return Err(InterfaceError::shape(
            "freq_factors",
            &[factors.len()],
            format!("[{pairs}], a divisor for each pair of dims"),
        ));
    }
    let theta_scale = freq_base.powf(-2.0 / n_dims as f32);
    from_rows(pairs, rows, |position, row| {
        let mut theta = position;
        row.extend((0..pairs).map(|pair| {
            let angle = freq_scale * (theta / freq_factors.map_or(1.0, |factors| factors[pair]));
            theta *= theta_scale;
            [angle.cos(), angle.sin()]
        }));
    })
}

/// A table of rows that `fill` extends with cos and sin of each pair at a position.
fn from_rows(
    pairs: usize,
    rows: usize,
    fill: impl Fn(f32, &mut Vec<[f32; 2]>),
) -> Result<CosSinTable, InterfaceError> {
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    if rows == 0 || pairs == 0 {
        return Ok(CosSinTable::new(cos, sin, pairs)?);
    }
    let expected = match product(&[rows, pairs]) {
        _ if rows > MOST_ROWS => Some(format!("at most {MOST_ROWS}")),
        Some(n) if cos.try_reserve_exact(n).is_ok() && sin.try_reserve_exact(n).is_ok() => None,
        _ => Some("few enough for the table to fit memory".to_string()),
    };
    if let Some(expected) = expected {
        return Err(InterfaceError::value("rows", rows, expected));
    }
    let mut row = Vec::with_capacity(pairs);
    for position in 0..rows {
        row.clear();
        fill(position as f32, &mut row);
        cos.extend(row.iter().map(|[cos, _]| cos));
        sin.extend(row.iter().map(|[_, sin]| sin));
    }
    Ok(CosSinTable::new(cos, sin, pairs)?)
}

/// To the nearest value of a type.
fn rounded(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::narrow(x).widen(),
        Dtype::Bf16 => half::bf16::narrow(x).widen(),
    }
}
