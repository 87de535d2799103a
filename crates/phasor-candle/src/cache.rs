use crate::positions::Ids;
use crate::storages::{Held, Request, Slot};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use phasor::{CacheLayout, SlotsIn};
use std::convert::Infallible;

/// The order of the dims of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheOrder {
    /// `[pages, page_size, heads, head_dim]` (NHD), of any strides; contiguous caches `[batch, tokens,
    /// heads, head_dim]` too, where each sequence is a page.
    Nhd,
    /// `[pages, heads, page_size, head_dim]` (HND), of any strides; contiguous caches `[batch, heads,
    /// tokens, head_dim]` too, as candle-nn's `KvCache` has them.
    Hnd,
    /// Keys `[pages, heads, head_dim / x, page_size, x]` and values `[pages, heads, head_dim,
    /// page_size]`, both contiguous (mistral.rs, older vLLM).
    Packed,
}

/// Caches of keys and values, which are written.
#[derive(Clone, Copy, Debug)]
pub struct KvCache<'a> {
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    pub(crate) order: CacheOrder,
}

impl<'a> KvCache<'a> {
    /// Two caches: tensors of their own, or windows of one.
    pub fn new(k: &'a Tensor, v: &'a Tensor, order: CacheOrder) -> Self {
        Self { k, v, order }
    }

    pub(crate) fn layouts(&self) -> Result<[CacheLayout; 2]> {
        match self.order {
            CacheOrder::Nhd | CacheOrder::Hnd => {
                let (k, v) = (("k's cache", self.k), ("v's cache", self.v));
                Ok([strided(k, self.order)?, strided(v, self.order)?])
            }
            CacheOrder::Packed => {
                let &[pages, heads, blocks, page_size, x] = self.k.dims() else {
                    let expected = "[pages, heads, head_dim / x, page_size, x]";
                    return Err(shape("k's cache", expected, self.k));
                };
                let &[v_pages, v_heads, dim, v_page_size] = self.v.dims() else {
                    let expected = "[pages, heads, head_dim, page_size]";
                    return Err(shape("v's cache", expected, self.v));
                };
                for (name, tensor) in [("k's cache", self.k), ("v's cache", self.v)] {
                    if !tensor.is_contiguous() {
                        return Err(shape(name, "contiguous in this order", tensor));
                    }
                }
                Ok([
                    CacheLayout::paged_packed(pages, page_size, heads, blocks * x, x),
                    CacheLayout::paged_transposed(v_pages, v_page_size, v_heads, dim),
                ])
            }
        }
    }
}

fn shape(tensor: &'static str, expected: &'static str, got: &Tensor) -> Error {
    Error::Shape {
        tensor,
        expected,
        got: got.dims().to_vec(),
    }
}

fn strided((name, tensor): (&'static str, &Tensor), order: CacheOrder) -> Result<CacheLayout> {
    let (&[pages, second, third, dim], &[page, a, b, last]) = (tensor.dims(), tensor.stride())
    else {
        let expected = match order {
            CacheOrder::Nhd => "[pages, page_size, heads, head_dim]",
            _ => "[pages, heads, page_size, head_dim]",
        };
        return Err(shape(name, expected, tensor));
    };
    if last != 1 && dim > 1 {
        return Err(Error::Strided {
            tensor: name,
            stride: last,
        });
    }
    Ok(match order {
        CacheOrder::Nhd => {
            CacheLayout::paged_nhd(pages, second, third, dim).with_strides(page, a, b)
        }
        _ => CacheLayout::paged_hnd(pages, third, second, dim).with_strides(page, b, a),
    })
}

/// Which slot of the caches each token is stored in. No slot can make a call write outside of the caches:
/// what lies outside is not stored, and the call says so ([`Stored`](crate::Stored)).
#[derive(Clone, Debug)]
pub struct Slots<'a>(Choice<'a>);

#[derive(Clone, Debug)]
enum Choice<'a> {
    Mapping(Ids<'a>),
    PageTable(Ids<'a>, Ids<'a>),
    PageIndices(Ids<'a>, Ids<'a>, Ids<'a>),
    Sequences(Ids<'a>),
}

impl Choice<'_> {
    fn placed_on(self, device: &Device) -> Result<Self> {
        Ok(match self {
            Choice::Mapping(slots) => Choice::Mapping(slots.on(device, "slots")?),
            Choice::PageTable(pages, lengths) => Choice::PageTable(
                pages.on(device, "pages")?,
                lengths.on(device, "cache lengths")?,
            ),
            Choice::PageIndices(indptr, indices, lengths) => Choice::PageIndices(
                indptr.on(device, "indptr")?,
                indices.on(device, "page indices")?,
                lengths.on(device, "cache lengths")?,
            ),
            Choice::Sequences(lengths) => Choice::Sequences(lengths.on(device, "cache lengths")?),
        })
    }
}

impl<'a> Slots<'a> {
    /// A slot for each token, `[batch, tokens]` (slot_mapping): slot `n` is slot `n % page_size` of page
    /// `n / page_size`. A token whose slot is negative is not stored; its q is rotated all the same.
    pub fn mapping(slots: impl Into<Ids<'a>>) -> Self {
        Self(Choice::Mapping(slots.into()))
    }

    /// The pages of each sequence, `[sequences, pages of a sequence]` (block_table), and how many tokens
    /// its cache holds before this call, `[sequences]`: the new ones follow.
    pub fn page_table(pages: impl Into<Ids<'a>>, lengths: impl Into<Ids<'a>>) -> Self {
        Self(Choice::PageTable(pages.into(), lengths.into()))
    }

    /// The same with the pages of all sequences one after the other: those of sequence `s` are
    /// `indices[indptr[s]..indptr[s + 1]]`; `indptr` has `sequences + 1` values.
    pub fn page_indices(
        indptr: impl Into<Ids<'a>>,
        indices: impl Into<Ids<'a>>,
        lengths: impl Into<Ids<'a>>,
    ) -> Self {
        Self(Choice::PageIndices(
            indptr.into(),
            indices.into(),
            lengths.into(),
        ))
    }

    /// Each sequence has a page of its own, that of its number, and holds so many tokens before this call,
    /// `[sequences]`: contiguous caches.
    pub fn sequences(lengths: impl Into<Ids<'a>>) -> Self {
        Self(Choice::Sequences(lengths.into()))
    }

    /// As `Positions::place_on`.
    #[inline]
    pub(crate) fn place_on(&mut self, device: &Device) -> Result<()> {
        if device.is_cpu() && !self.ids().into_iter().flatten().any(Ids::is_tensor) {
            return Ok(());
        }
        self.0 = self.0.clone().placed_on(device)?;
        Ok(())
    }

    fn ids(&self) -> [Option<&Ids<'a>>; 3] {
        match &self.0 {
            Choice::Mapping(ids) | Choice::Sequences(ids) => [Some(ids), None, None],
            Choice::PageTable(pages, lengths) => [Some(pages), Some(lengths), None],
            Choice::PageIndices(indptr, indices, lengths) => {
                [Some(indptr), Some(indices), Some(lengths)]
            }
        }
    }

    pub(crate) fn request<'t, const N: usize>(
        &'t self,
        request: &mut Request<'t, N>,
    ) -> [Option<Slot>; 3] {
        self.ids()
            .map(|ids| ids.and_then(|ids| ids.request(request)))
    }

    /// As phasor takes them; `memory` has ids, whose storage is in the given slot.
    #[inline(always)]
    pub(crate) fn given<'s, M, E>(
        &'s self,
        [first, second, third]: [Option<Slot>; 3],
        mut memory: impl FnMut(&'s Ids<'a>, Option<Slot>) -> std::result::Result<phasor::Ids<M>, E>,
    ) -> std::result::Result<SlotsIn<M>, E> {
        Ok(match &self.0 {
            Choice::Mapping(ids) => SlotsIn::mapping(memory(ids, first)?),
            Choice::PageTable(pages, lengths) => {
                SlotsIn::page_table(memory(pages, first)?, memory(lengths, second)?)
            }
            Choice::PageIndices(indptr, indices, lengths) => SlotsIn::page_indices(
                memory(indptr, first)?,
                memory(indices, second)?,
                memory(lengths, third)?,
            ),
            Choice::Sequences(lengths) => SlotsIn::sequences(memory(lengths, first)?),
        })
    }

    /// In host memory.
    // As positions are.
    #[inline(never)]
    pub(crate) fn on_host<'s, const N: usize>(
        &'s self,
        slots: [Option<Slot>; 3],
        held: &Held<'s, N>,
    ) -> phasor::Slots<'s> {
        let Ok(given) = self.given(slots, |ids, slot| {
            Ok::<_, Infallible>(ids.on_host(slot, held))
        });
        given
    }
}
