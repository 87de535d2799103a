//! Candle's layouts as phasor's.

use crate::plans::Work;
use crate::positions::same_device;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use phasor::{Dtype, Layout};

/// The order of the dims of a tensor of queries or keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DimOrder {
    /// `[batch, heads, tokens, head_dim]`, as most of candle's models have them after a transposition.
    #[default]
    Bhtd,
    /// `[batch, tokens, heads, head_dim]`, as a projection leaves them.
    Bthd,
}

/// A tensor that is read or written, checked as far as one by itself can be.
#[derive(Clone, Copy)]
pub(crate) struct View<'t> {
    pub(crate) name: &'static str,
    pub(crate) tensor: &'t Tensor,
    /// From the tensor's first element on.
    pub(crate) layout: Layout,
    /// Where that is in its storage.
    pub(crate) start: usize,
    pub(crate) dtype: Dtype,
}

/// Which ranks a call takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    /// Four dims.
    Batched,
    /// `[tokens, heads, head_dim]`.
    Packed,
    Either,
}

impl<'t> View<'t> {
    // A view that is handed on in a result is copied as other words than it was written in, which processors
    // wait for.
    #[inline(always)]
    pub(crate) fn new(
        name: &'static str,
        tensor: &'t Tensor,
        order: DimOrder,
        rank: Rank,
        rotary_offset: usize,
    ) -> Result<Self> {
        let dtype = dtype_of(name, tensor)?;
        let (dims, strides) = (tensor.dims(), tensor.stride());
        let ([batch, tokens, heads, dim], [b, t, h, last]) = match (dims, strides, rank, order) {
            (&[b, h, t, d], &[bs, hs, ts, ds], Rank::Batched | Rank::Either, DimOrder::Bhtd) => {
                ([b, t, h, d], [bs, ts, hs, ds])
            }
            (&[b, t, h, d], &[bs, ts, hs, ds], Rank::Batched | Rank::Either, DimOrder::Bthd) => {
                ([b, t, h, d], [bs, ts, hs, ds])
            }
            (&[t, h, d], &[ts, hs, ds], Rank::Packed | Rank::Either, _) => {
                ([1, t, h, d], [0, ts, hs, ds])
            }
            _ => {
                let expected = match (rank, order) {
                    (Rank::Packed, _) => "[tokens, heads, head_dim]",
                    (Rank::Batched, DimOrder::Bhtd) => "[batch, heads, tokens, head_dim]",
                    (Rank::Batched, DimOrder::Bthd) => "[batch, tokens, heads, head_dim]",
                    (Rank::Either, DimOrder::Bhtd) => {
                        "[batch, heads, tokens, head_dim] or [tokens, heads, head_dim]"
                    }
                    (Rank::Either, DimOrder::Bthd) => {
                        "[batch, tokens, heads, head_dim] or [tokens, heads, head_dim]"
                    }
                };
                return Err(Error::Shape {
                    tensor: name,
                    expected,
                    got: dims.to_vec(),
                });
            }
        };
        if last != 1 && dim > 1 {
            return Err(Error::Strided {
                tensor: name,
                stride: last,
            });
        }
        Ok(Self {
            name,
            tensor,
            layout: Layout::bshd(batch, tokens, heads, dim)
                .with_strides(b, t, h)
                .with_rotary_offset(rotary_offset),
            start: tensor.layout().start_offset(),
            dtype,
        })
    }

    /// `[batch, tokens]`.
    pub(crate) fn counts(&self) -> [usize; 2] {
        let [batch, tokens, ..] = self.layout.shape();
        [batch, tokens]
    }

    /// To a new tensor.
    pub(crate) fn anew(&self, order: DimOrder) -> Work {
        Work::New {
            from: self.layout,
            heads_first: order == DimOrder::Bhtd && self.tensor.rank() == 4,
        }
    }

    /// The layout in a buffer that begins at `base` of the storage.
    pub(crate) fn from(&self, base: usize) -> Layout {
        self.layout.with_offset(self.start - base)
    }

    /// It may be written: no gradient is to flow through it.
    // Views are not handed on: moving one takes longer than a check.
    pub(crate) fn check_untracked(&self) -> Result<()> {
        match self.tensor.track_op() {
            true => Err(Error::Tracked { tensor: self.name }),
            false => Ok(()),
        }
    }

    /// Of one element type and device with another tensor.
    pub(crate) fn check_beside(&self, first: &View<'_>) -> Result<()> {
        same_device(
            first.name,
            first.tensor.device(),
            self.name,
            self.tensor.device(),
        )?;
        if self.dtype != first.dtype {
            return Err(phasor::Error::DtypeMismatch {
                planned: first.dtype,
                given: self.dtype,
            }
            .into());
        }
        Ok(())
    }
}

/// The element type of a tensor on a device that is served.
pub(crate) fn dtype_of(name: &'static str, tensor: &Tensor) -> Result<Dtype> {
    if let Device::Metal(_) = tensor.device() {
        return Err(Error::Metal { tensor: name });
    }
    match tensor.dtype() {
        DType::F32 => Ok(Dtype::F32),
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::Bf16),
        got => Err(Error::DType {
            tensor: name,
            expected: "f32, f16 or bf16",
            got,
        }),
    }
}
