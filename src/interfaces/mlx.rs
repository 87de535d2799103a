//! MLX: `mx.fast.rope` and `mlx.nn.RoPE`.
//!
//! ```text
//! mlx.core.fast.rope(a, dims, *, traditional, base, scale, offset, freqs=None)
//! mlx.nn.RoPE(dims, traditional=False, base=10000, scale=1.0)
//! ```
//!
//! [`Rope`] keeps what does not change between calls, on any [`Device`]; [`fast::rope`] is one call.
//!
//! | MLX | here |
//! |---|---|
//! | `traditional=True` | [`Pairing::Interleaved`](crate::Pairing::Interleaved): dims `(2i, 2i + 1)` |
//! | `traditional=False` | [`Pairing::HalfSplit`](crate::Pairing::HalfSplit): dims `(i, i + dims / 2)` |
//! | `base=10000.0` | [`Spectrum::Base`] |
//! | `freqs=periods` | [`Spectrum::Freqs`]: positions per radian, not radians per position |
//! | `scale` | multiplies the position, the offset included; it is folded into the frequencies |
//! | `offset` | [`Offset`]: an integer, an array of one, or one per sequence of the batch |
//!
//! MLX forms frequency and angle in f32 (1.4e-4 off at position 4,095, 5.2e-3 at 100,000 with base
//! 10,000 and 128 dims), takes positions to 32 bits and rounds every operation in 16-bit types. Here
//! angles are exact at every `i64` position and results are rounded once. For MLX's own angles see
//! [`tables::mlx`](super::tables::mlx).

use super::tensor::{Engine, check_rotary_dim, pairing};
use super::{InterfaceError, Tensor};
use crate::{Device, DeviceElement, Frequencies, Ids, Layout, Positions};

/// What gives the frequencies: MLX's `base` or `freqs`, of which it takes just one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spectrum<'a> {
    /// Pair `i` turns by `base^(-2i / dims)` radians per position.
    Base(f64),
    /// Pair `i` turns by `1 / freqs[i]` radians per position: these are periods, `dims / 2` of them.
    /// Infinity stops a pair; a negative period turns it the other way.
    Freqs(&'a [f32]),
}

/// The position of the first token, before `scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offset<'a> {
    /// The same for all sequences of the batch.
    Int(i64),
    /// An array of one element, for all sequences of the batch, or of one element per sequence.
    Array(Ids<&'a [u8]>),
}

impl From<i64> for Offset<'_> {
    fn from(offset: i64) -> Self {
        Offset::Int(offset)
    }
}

impl From<i32> for Offset<'_> {
    fn from(offset: i32) -> Self {
        Offset::Int(offset.into())
    }
}

impl<'a> From<Ids<&'a [u8]>> for Offset<'a> {
    fn from(offsets: Ids<&'a [u8]>) -> Self {
        Offset::Array(offsets)
    }
}

impl<'a> From<&'a [i32]> for Offset<'a> {
    fn from(offsets: &'a [i32]) -> Self {
        Offset::Array(offsets.into())
    }
}

impl<'a> From<&'a [i64]> for Offset<'a> {
    fn from(offsets: &'a [i64]) -> Self {
        Offset::Array(offsets.into())
    }
}

impl<'a> From<&'a [u32]> for Offset<'a> {
    fn from(offsets: &'a [u32]) -> Self {
        Offset::Array(offsets.into())
    }
}

/// A prepared `mx.fast.rope`, and `mlx.nn.RoPE`.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::Tensor;
/// use phasor::interfaces::mlx::{Rope, Spectrum};
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// // rope = nn.RoPE(64, traditional=True, base=10000, scale=1.0)
/// let rope = Rope::new(&Device::host(), 64, true, Spectrum::Base(10_000.0), 1.0)?;
///
/// // x = rope(x, offset=cache.offset)
/// let mut x = vec![0.5f32; 2 * 8 * 16 * 64]; // [B, heads, T, D]
/// rope.call(Tensor::new(&mut x, &[2, 8, 16, 64]), 128)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Rope {
    engine: Engine,
    dims: usize,
}

impl Rope {
    /// The rotation of the first `dims` dims of each head, at positions `(offset + t) * scale`.
    /// `scale` may be zero or negative.
    ///
    /// # Errors
    /// [`InterfaceError::Value`] unless `dims` is even and from 2 to 65,536, `scale` finite, the base
    /// finite and at least 2^-32, and no period NaN or zero; [`InterfaceError::Shape`] unless there
    /// are `dims / 2` periods; [`InterfaceError::Rope`] if a pair turns by more than 2^32 radians per
    /// position, base and dims look exchanged, or the device has no room.
    pub fn new(
        device: &Device,
        dims: usize,
        traditional: bool,
        spectrum: Spectrum<'_>,
        scale: f64,
    ) -> Result<Self, InterfaceError> {
        check_rotary_dim("dims", dims)?;
        let frequencies = frequencies(dims, spectrum, scale)?;
        Ok(Self {
            engine: Engine::new(device, crate::Rope::new(frequencies, pairing(traditional)))?,
            dims,
        })
    }

    /// Rotates `a` of shape `[B, ..., T, D]`, of rank 3 or more: axis 0 is the batch, the last but
    /// one the sequence, and those between them are heads. Dims from `dims` on keep their bits.
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for fewer axes, a last one shorter than `dims`, or an offset array
    /// that is neither of one element nor of `B`; [`InterfaceError::Length`] if the memory of `a`
    /// holds another number of elements.
    pub fn call<'a, T: DeviceElement>(
        &self,
        a: Tensor<'_, T>,
        offset: impl Into<Offset<'a>>,
    ) -> Result<(), InterfaceError> {
        let &[batch, ref heads @ .., sequence, width] = a.shape() else {
            return Err(InterfaceError::shape(
                "a",
                a.shape(),
                "of rank 3 or more, [B, ..., T, D]",
            ));
        };
        if width < self.dims {
            return Err(InterfaceError::shape(
                "a",
                a.shape(),
                format!("at least dims, which is {}, along the last axis", self.dims),
            ));
        }
        let heads = heads.iter().fold(1usize, |n, &axis| n.saturating_mul(axis));
        let positions = positions(offset.into(), batch)?;
        let layout = Layout::bhsd(batch, sequence, heads, width);
        self.engine.rotate(a.operand("a", layout)?, None, positions)
    }

    /// The gradient: turns cotangents back by the same angles
    /// ([`Direction::Inverse`](crate::Direction::Inverse)), and passes those of the tail through.
    /// Call it with the offset of the forward call.
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
}

/// MLX's namespace of fast operations.
pub mod fast {
    use super::{Offset, Rope, Spectrum};
    use crate::interfaces::{InterfaceError, Tensor};
    use crate::{Device, DeviceElement};

    /// One rotation of `a`. A model that rotates again and again keeps a [`Rope`] instead.
    ///
    /// ```
    /// use phasor::Device;
    /// use phasor::interfaces::Tensor;
    /// use phasor::interfaces::mlx::{Spectrum::*, fast};
    ///
    /// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
    /// let cpu = Device::host();
    /// let mut x = vec![0.5f32; 2 * 8 * 4 * 64];
    ///
    /// // mx.fast.rope(x, 64, traditional=False, base=10000.0, scale=1.0, offset=7)
    /// fast::rope(&cpu, Tensor::new(&mut x, &[2, 8, 4, 64]), 64, false, Base(10_000.0), 1.0, 7)?;
    ///
    /// // mx.fast.rope(x, 4, traditional=True, base=None, scale=1.0,
    /// //              offset=mx.array([7, 40]), freqs=mx.array([1.0, mx.inf]))
    /// let periods = [1.0, f32::INFINITY];
    /// let offset = &[7i32, 40][..];
    /// let a = Tensor::new(&mut x, &[2, 8, 4, 64]);
    /// fast::rope(&cpu, a, 4, true, Freqs(&periods), 1.0, offset)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`Rope::new`] and [`Rope::call`].
    pub fn rope<'a, T: DeviceElement>(
        device: &Device,
        a: Tensor<'_, T>,
        dims: usize,
        traditional: bool,
        spectrum: Spectrum<'_>,
        scale: f64,
        offset: impl Into<Offset<'a>>,
    ) -> Result<(), InterfaceError> {
        Rope::new(device, dims, traditional, spectrum, scale)?.call(a, offset)
    }
}

/// Radians per position, `scale` included, without an intermediate rounding.
fn frequencies(
    dims: usize,
    spectrum: Spectrum<'_>,
    scale: f64,
) -> Result<Frequencies, InterfaceError> {
    if !scale.is_finite() {
        return Err(InterfaceError::value("scale", scale, "a finite number"));
    }
    Ok(match spectrum {
        Spectrum::Base(base) => {
            let smallest = 1.0 / 4294967296.0;
            if !(base.is_finite() && base >= smallest) {
                return Err(InterfaceError::value(
                    "base",
                    base,
                    "a finite number of at least 2^-32 (10000 is usual)",
                ));
            }
            Frequencies::from_theta_scaled(base, dims, scale)?
        }
        Spectrum::Freqs(periods) => {
            let pairs = dims / 2;
            if periods.len() != pairs {
                return Err(InterfaceError::shape(
                    "freqs",
                    &[periods.len()],
                    format!("[{pairs}], a period for each pair of dims"),
                ));
            }
            let without_meaning = |period: &f32| period.is_nan() || *period == 0.0;
            if let Some(pair) = periods.iter().position(without_meaning) {
                return Err(InterfaceError::value(
                    format!("freqs[{pair}]"),
                    periods[pair],
                    "a period, in positions per radian: neither NaN nor 0 (infinity stops a pair)",
                ));
            }
            let periods: Vec<_> = periods.iter().copied().map(f64::from).collect();
            Frequencies::from_periods(&periods, scale)?
        }
    })
}

fn positions(offset: Offset<'_>, batch: usize) -> Result<Positions<'_>, InterfaceError> {
    let ids = match offset {
        Offset::Int(start) => return Ok(Positions::start(start)),
        Offset::Array(ids) if ids.len() == 1 => return Ok(Positions::start(ids.get(0))),
        Offset::Array(ids) => ids,
    };
    if ids.len() != batch {
        return Err(InterfaceError::shape(
            "offset",
            &[ids.len()],
            format!("[1], or [{batch}] as the batch"),
        ));
    }
    Ok(Positions::start_per_sequence(ids))
}
