//! vLLM: `get_rope`, `RotaryEmbedding` and the operation `rotary_embedding` behind it.
//!
//! ```text
//! get_rope(head_size, max_position, is_neox_style, rope_parameters)
//! RotaryEmbedding(head_size, rotary_dim, max_position_embeddings, base, is_neox_style, dtype)
//!     .forward(positions, query, key=None)
//! torch.ops._C.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)
//! ```
//!
//! Positions are flat, one per token, or `[3, tokens]` for models of images and video; query and key
//! are `[tokens, heads * head_size]` and rotated in place. [`get_rope`] reads a model's dictionary of
//! parameters and [`RotaryEmbedding::new`] the plain case; both form exact angles.
//! [`RotaryEmbedding::from_cache`] takes vLLM's own table, `[max_position, rotary_dim]`, each row `cos`
//! and then `sin`.
//!
//! vLLM's table is in the model's dtype unless told otherwise, which costs up to 2e-3 in cos and sin
//! in bf16 beside the angle's own rounding; its native code then rounds every operation, its CUDA
//! kernels do not check positions. Here a result is rounded once, and a position outside is refused.

mod get_rope;

pub use get_rope::{Parameter, get_rope};

use super::tensor::{Engine, Operand, check_in_table, check_rotary_dim, pairing, table};
use super::{Array, InterfaceError, Tensor};
use crate::{Angles, Device, DeviceElement, Element, Frequencies, Layout, Positions};

/// vLLM's `RotaryEmbedding`.
///
/// ```
/// use phasor::Device;
/// use phasor::half::bf16;
/// use phasor::interfaces::Tensor;
/// use phasor::interfaces::vllm::RotaryEmbedding;
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// // rotary_emb = RotaryEmbedding(128, 128, 131072, 500000.0, True, torch.bfloat16)
/// let rotary_emb = RotaryEmbedding::new(&Device::host(), 128, 128, 131_072, 500_000.0, true)?;
///
/// // query, key = rotary_emb(positions, query, key)
/// let positions = [0, 1, 2, 7, 131_071];
/// let (mut query, mut key) = (vec![bf16::ONE; 5 * 32 * 128], vec![bf16::ONE; 5 * 8 * 128]);
/// rotary_emb.forward(
///     &positions,
///     Tensor::new(&mut query, &[5, 32 * 128]),
///     Some(Tensor::new(&mut key, &[5, 8 * 128])),
/// )?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    engine: Engine,
    head_size: usize,
    rotary_offset: usize,
    axes: usize,
    max_position: usize,
}

impl RotaryEmbedding {
    /// Exact angles for theta `base`: no table is formed. Positions are those below `max_position`.
    ///
    /// # Errors
    /// [`InterfaceError::Value`] unless `rotary_dim` is even, from 2 to 65,536 and at most
    /// `head_size`; [`InterfaceError::Rope`] for a base that is not finite, below 2^-32 or looks
    /// exchanged with `rotary_dim`, or if the device has no room.
    pub fn new(
        device: &Device,
        head_size: usize,
        rotary_dim: usize,
        max_position: usize,
        base: f64,
        is_neox_style: bool,
    ) -> Result<Self, InterfaceError> {
        check_rotary_dim("rotary_dim", rotary_dim)?;
        check_fits(rotary_dim, head_size)?;
        let rope = crate::Rope::new(
            Frequencies::from_theta(base, rotary_dim)?,
            pairing(!is_neox_style),
        );
        Self::of_rope(device, rope, head_size, 0, max_position)
    }

    /// vLLM's table of f32, f16 or bf16, `[max_position, rotary_dim]`: in each row the cosines of all
    /// pairs, then their sines.
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] unless it has two axes, the second even; [`InterfaceError::Value`]
    /// if that is above `head_size` or 65,536; [`InterfaceError::Length`] if its memory holds another number of
    /// elements; [`InterfaceError::Rope`] if the device has no room.
    pub fn from_cache<C: Element>(
        device: &Device,
        head_size: usize,
        cos_sin_cache: Array<'_, C>,
        is_neox_style: bool,
    ) -> Result<Self, InterfaceError> {
        let &[max_position, rotary_dim] = cos_sin_cache.shape() else {
            return Err(cache_shape(cos_sin_cache.shape()));
        };
        if rotary_dim == 0 || rotary_dim % 2 == 1 {
            return Err(cache_shape(cos_sin_cache.shape()));
        }
        check_fits(rotary_dim, head_size)?;
        let rows = cos_sin_cache.checked("cos_sin_cache")?;
        let pairs = rotary_dim / 2;
        let half = |first: usize| -> Vec<C> {
            let of_row = |row: &[C]| row[first..first + pairs].to_vec();
            rows.chunks_exact(rotary_dim).flat_map(of_row).collect()
        };
        let table = table(&half(0), &half(pairs), pairs)?;
        let rope = crate::Rope::new(table, pairing(!is_neox_style));
        Self::of_rope(device, rope, head_size, 0, max_position)
    }

    fn of_rope(
        device: &Device,
        rope: crate::Rope,
        head_size: usize,
        rotary_offset: usize,
        max_position: usize,
    ) -> Result<Self, InterfaceError> {
        let axes = match rope.angles() {
            Angles::Exact(frequencies) => frequencies.axes(),
            Angles::Rows(_) | Angles::Table(_) => 1,
        };
        Ok(Self {
            engine: Engine::new(device, rope)?,
            head_size,
            rotary_offset,
            axes,
            max_position,
        })
    }

    /// Positions of vLLM's cache: those from 0 up to and without this one are taken.
    pub fn max_position(&self) -> usize {
        self.max_position
    }

    /// Rotates query and key, each `[tokens, heads * head_size]` or `[tokens, heads, head_size]`, in
    /// one launch. Dims that do not rotate keep their bits. There is a position for each token; with an
    /// `mrope_section` there may also be one for each axis and token, `[3, tokens]`.
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for a tensor of another shape or number of tokens than positions;
    /// [`InterfaceError::OutOfTable`] for a position outside `0..max_position`;
    /// [`InterfaceError::MixedMemory`] for one tensor in host memory and one on a device;
    /// [`InterfaceError::Length`] if memory holds another number of elements.
    pub fn forward<T: DeviceElement>(
        &self,
        positions: &[i64],
        query: Tensor<'_, T>,
        key: Option<Tensor<'_, T>>,
    ) -> Result<(), InterfaceError> {
        check_in_table("positions", positions, self.max_position)?;
        let tokens = match query.shape().first() {
            // Of text alone all axes are at one position.
            Some(&tokens) if tokens.checked_mul(self.axes) == Some(positions.len()) => tokens,
            _ => positions.len(),
        };
        let per_axis = tokens != positions.len();
        let query = self.operand("query", query, tokens)?;
        let key = key
            .map(|key| self.operand("key", key, tokens))
            .transpose()?;
        let positions = if per_axis {
            Positions::per_axis(positions)
        } else {
            Positions::per_token(positions)
        };
        self.engine.rotate(query, key, positions)
    }

    /// The gradient: turns back by the same angles
    /// ([`Direction::Inverse`](crate::Direction::Inverse)).
    ///
    /// # Errors
    /// [`InterfaceError::Rope`] if the device has no room.
    pub fn backward(&self) -> Result<Self, InterfaceError> {
        Ok(Self {
            engine: self.engine.backward()?,
            ..*self
        })
    }

    /// The rotation, for a plan of one's own.
    pub fn rope(&self) -> &crate::Rope {
        self.engine.rope()
    }

    fn operand<'a, T: DeviceElement>(
        &self,
        argument: &'static str,
        tensor: Tensor<'a, T>,
        tokens: usize,
    ) -> Result<Operand<'a, T>, InterfaceError> {
        let head_size = self.head_size;
        let shape = tensor.shape();
        let heads = match *shape {
            [first, width] if first == tokens && width % head_size == 0 => width / head_size,
            [first, heads, width] if first == tokens && width == head_size => heads,
            [..] => {
                let of_axes = match self.axes {
                    1 => "",
                    _ => " (or one for each axis and token)",
                };
                let expected = format!(
                    "[{tokens}, heads * {head_size}] or [{tokens}, heads, {head_size}], as there \
                     are {tokens} positions{of_axes} and head_size is {head_size}"
                );
                return Err(InterfaceError::shape(argument, shape, expected));
            }
        };
        let layout = Layout::tokens(tokens, heads, head_size);
        tensor.operand(argument, layout.with_rotary_offset(self.rotary_offset))
    }
}

/// The operation `rotary_embedding`: one call with vLLM's table, the arguments in its order. A model
/// that rotates again and again keeps a [`RotaryEmbedding`] instead.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::{Array, Tensor};
/// use phasor::interfaces::vllm::rotary_embedding;
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// let cos_sin_cache = [1.0f32, 0.0, 0.6, 0.8]; // two positions, one pair
/// let mut query = [1.0f32, 2.0, 3.0, 4.0]; // one token, two heads of two dims
///
/// // ops.rotary_embedding(positions, query, None, 2, cos_sin_cache, True)
/// rotary_embedding(
///     &Device::host(),
///     &[1],
///     Tensor::new(&mut query, &[1, 4]),
///     None,
///     2,
///     Array::new(&cos_sin_cache, &[2, 2]),
///     true,
/// )?;
/// assert!((query[0] - (0.6 - 2.0 * 0.8)).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`RotaryEmbedding::from_cache`] and [`RotaryEmbedding::forward`].
pub fn rotary_embedding<T: DeviceElement, C: Element>(
    device: &Device,
    positions: &[i64],
    query: Tensor<'_, T>,
    key: Option<Tensor<'_, T>>,
    head_size: usize,
    cos_sin_cache: Array<'_, C>,
    is_neox: bool,
) -> Result<(), InterfaceError> {
    RotaryEmbedding::from_cache(device, head_size, cos_sin_cache, is_neox)?
        .forward(positions, query, key)
}

fn check_fits(rotary_dim: usize, head_size: usize) -> Result<(), InterfaceError> {
    if rotary_dim > head_size {
        return Err(InterfaceError::value(
            "rotary_dim",
            rotary_dim,
            format!("at most head_size, which is {head_size}"),
        ));
    }
    Ok(())
}

fn cache_shape(shape: &[usize]) -> InterfaceError {
    InterfaceError::shape(
        "cos_sin_cache",
        shape,
        "[max_position, rotary_dim], rotary_dim even and at least 2",
    )
}
