//! What the projections of latent attention need beside products, as launches.

use super::{KernelLaunch, PhasorLatentKeys, PhasorLatentNorm, count};
use crate::AttentionError;
use crate::error::usable;
use phasor::Dtype;

/// Of f32, f16 and bf16, and of any.
pub(crate) const KERNELS: [&str; 4] = [
    "norm_latent_f32",
    "norm_latent_f16",
    "norm_latent_bf16",
    "spread_latent",
];
/// Of a block of the norm: lanes of a token, and tokens.
const NORM_BLOCK: [u32; 2] = [32, 8];
const THREADS: u32 = 256;
const CHUNK: usize = 16;

/// Blocks for so many items.
fn grid(what: &'static str, items: usize, of_block: u32) -> Result<u32, AttentionError> {
    let grid = items.div_ceil(of_block as usize);
    match i32::try_from(grid) {
        Ok(grid) => Ok(grid as u32),
        Err(_) => Err(AttentionError::Value {
            what,
            value: items,
            remedy: "a launch has no room for so many: give fewer tokens to a call",
        }),
    }
}

/// The launch that norms `[tokens, dims]` at `x` where they are, each by the mean of its squares, as
/// [`LowRank`](crate::LowRank) does between its maps: bit for bit. `weight` has `[dims]` of f32. None if there
/// are no tokens.
///
/// # Errors
/// [`AttentionError::Value`] for a number that kernels cannot take, [`AttentionError::Factor`] for an eps that
/// is not positive.
pub fn norm_latent(
    dtype: Dtype,
    [tokens, dims]: [usize; 2],
    x: u64,
    weight: u64,
    eps: f32,
) -> Result<Option<KernelLaunch<PhasorLatentNorm>>, AttentionError> {
    usable("eps", f64::from(eps))?;
    let kernel = match dtype {
        Dtype::F32 => KERNELS[0],
        Dtype::F16 => KERNELS[1],
        Dtype::Bf16 => KERNELS[2],
        _ => {
            return Err(AttentionError::Dtype {
                dtype,
                remedy: "latents are normed in f32, f16 or bf16",
            });
        }
    };
    if dims == 0 || dims > i32::MAX as usize {
        return Err(AttentionError::Value {
            what: "dims of a latent",
            value: dims,
            remedy: "it must be above 0 and below 2^31",
        });
    }
    let grid = grid("tokens of a latent", tokens, NORM_BLOCK[1])?;
    let launch = KernelLaunch {
        kernel,
        grid: [grid, 1, 1],
        block: [NORM_BLOCK[0], NORM_BLOCK[1], 1],
        shared_bytes: 0,
        params: PhasorLatentNorm {
            x,
            weight,
            tokens: tokens as u64,
            dims: count("dims of a latent", dims)?,
            eps,
        },
    };
    Ok((grid > 0).then_some(launch))
}

/// The launch that makes keys `[tokens, heads, own + shared]` at `out` of those of each head,
/// `[tokens, heads, own]` at `of_heads`, and of those that all heads of a token share, `[tokens, shared]` at
/// `of_all`, as [`LatentKeys`](crate::LatentKeys) does. None if there are no tokens.
///
/// # Errors
/// [`AttentionError::Value`] unless dims of either kind are whole 16 bytes and addresses are multiples of
/// these, and for a number that kernels cannot take.
pub fn spread_latent(
    dtype: Dtype,
    [tokens, heads]: [usize; 2],
    [own, shared]: [usize; 2],
    [of_heads, of_all]: [u64; 2],
    out: u64,
) -> Result<Option<KernelLaunch<PhasorLatentKeys>>, AttentionError> {
    let in_chunk = CHUNK / dtype.size();
    for (what, value, of) in [
        ("dims of a head's own keys", own, in_chunk),
        ("dims of keys that heads share", shared, in_chunk),
        ("the address of keys of heads", of_heads as usize, CHUNK),
        ("the address of shared keys", of_all as usize, CHUNK),
        ("the address of keys", out as usize, CHUNK),
    ] {
        if !value.is_multiple_of(of) {
            return Err(AttentionError::Value {
                what,
                value,
                remedy: "kernels copy 16 bytes at a time: it must be a multiple of these",
            });
        }
    }
    let [own, shared] = [own, shared].map(|dims| dims / in_chunk);
    let chunks = own.saturating_add(shared);
    let all = tokens.saturating_mul(heads).saturating_mul(chunks);
    let grid = grid("keys", all, THREADS)?;
    let launch = KernelLaunch {
        kernel: KERNELS[3],
        grid: [grid, 1, 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
        params: PhasorLatentKeys {
            of_heads,
            of_all,
            out,
            count: all as u64,
            heads: count("heads", heads)?,
            own: count("dims of keys", own)?,
            shared: count("dims of keys", shared)?,
            chunks: count("dims of keys", chunks)?,
        },
    };
    Ok((grid > 0).then_some(launch))
}
