//! Caches of keys and values: where their elements are, and which slot a token is stored in.

use crate::Error;
use crate::codes::{ScaleLayout, StoredCodes};
use crate::element::Dtype;
use crate::error::TensorName;
use crate::ids::Ids;
use crate::layout::Region;
use crate::quantize::Codes;

/// Shape and strides of a cache of keys or of values, `[pages, slots of a page, heads, head_dim]`, in
/// elements. A token is stored in one slot of one page.
///
/// Strides are free, so that any order of the dimensions is a layout, and so are windows of a buffer that
/// holds more: both keys and values, or all layers. The dims of a head lie in blocks of contiguous ones;
/// usually that is one block.
///
/// ```
/// use phasor::CacheLayout;
///
/// // Keys and values of each page side by side: [pages, 2, page_size, kv_heads, head_dim].
/// let (k, v) = CacheLayout::paged_nhd(1024, 16, 8, 128).in_pairs_of_pages();
/// assert_eq!(k.strides(), [2 * 16 * 8 * 128, 8 * 128, 128]);
/// assert_eq!(v.offset(), 16 * 8 * 128);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheLayout {
    pub(crate) pages: usize,
    pub(crate) page_size: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) page_stride: usize,
    pub(crate) slot_stride: usize,
    pub(crate) head_stride: usize,
    pub(crate) block_dims: usize,
    pub(crate) block_stride: usize,
    pub(crate) offset: usize,
}

impl CacheLayout {
    /// Contiguous `[pages, page_size, heads, head_dim]` (NHD; vLLM's and FlashInfer's usual one).
    #[inline]
    pub const fn paged_nhd(pages: usize, page_size: usize, heads: usize, head_dim: usize) -> Self {
        let slot = heads.saturating_mul(head_dim);
        Self {
            pages,
            page_size,
            heads,
            head_dim,
            page_stride: page_size.saturating_mul(slot),
            slot_stride: slot,
            head_stride: head_dim,
            block_dims: head_dim,
            block_stride: 0,
            offset: 0,
        }
    }

    /// Contiguous `[pages, heads, page_size, head_dim]` (HND). The arguments keep the order pages,
    /// page_size, heads, head_dim.
    #[inline]
    pub const fn paged_hnd(pages: usize, page_size: usize, heads: usize, head_dim: usize) -> Self {
        let mut layout = Self::paged_nhd(pages, page_size, heads, head_dim);
        layout.slot_stride = head_dim;
        layout.head_stride = page_size.saturating_mul(head_dim);
        layout
    }

    /// Contiguous `[slots, heads, head_dim]` (SGLang's pool): one page.
    pub const fn flat(slots: usize, heads: usize, head_dim: usize) -> Self {
        Self::paged_nhd(1, slots, heads, head_dim)
    }

    /// Contiguous `[batch, tokens, heads, head_dim]`, for up to so many tokens of each sequence: each
    /// sequence is a page.
    pub const fn bshd(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> Self {
        Self::paged_nhd(batch, tokens, heads, head_dim)
    }

    /// Contiguous `[batch, heads, tokens, head_dim]`. The arguments keep the order batch, tokens, heads,
    /// head_dim.
    pub const fn bhsd(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> Self {
        Self::paged_hnd(batch, tokens, heads, head_dim)
    }

    /// Contiguous `[pages, heads, head_dim / x, page_size, x]`: the keys of older vLLM and of mistral.rs,
    /// where `x` is what 16 bytes hold. `x` divides `head_dim`.
    pub const fn paged_packed(
        pages: usize,
        page_size: usize,
        heads: usize,
        head_dim: usize,
        x: usize,
    ) -> Self {
        let mut layout = Self::paged_hnd(pages, page_size, heads, head_dim);
        layout.slot_stride = x;
        layout.block_dims = x;
        layout.block_stride = page_size.saturating_mul(x);
        layout
    }

    /// Contiguous `[pages, heads, head_dim, page_size]`: the values beside
    /// [`paged_packed`](Self::paged_packed) keys.
    pub const fn paged_transposed(
        pages: usize,
        page_size: usize,
        heads: usize,
        head_dim: usize,
    ) -> Self {
        Self::paged_packed(pages, page_size, heads, head_dim, 1)
    }

    /// Keys and values as two such caches, one after the other in one buffer: `[2, pages, ...]`.
    pub const fn in_turn(self) -> (Self, Self) {
        self.apart(self.pages.saturating_mul(self.page_stride))
    }

    /// Keys and values in turn page by page: `[pages, 2, ...]`.
    pub const fn in_pairs_of_pages(mut self) -> (Self, Self) {
        let page = self.page_stride;
        self.page_stride = page.saturating_mul(2);
        self.apart(page)
    }

    /// Keys and values side by side in each head: `[..., 2 * head_dim]`.
    pub const fn side_by_side(mut self) -> (Self, Self) {
        self.page_stride = self.page_stride.saturating_mul(2);
        self.slot_stride = self.slot_stride.saturating_mul(2);
        self.head_stride = self.head_stride.saturating_mul(2);
        self.apart(self.head_dim)
    }

    /// This cache at the layer's place in pages that hold that of all layers: `[pages, layers, ...]`.
    /// Followed by [`in_pairs_of_pages`](Self::in_pairs_of_pages), that is MAX's
    /// `[pages, 2, layers, page_size, heads, head_dim]`.
    pub const fn of_layer(mut self, layers: usize, layer: usize) -> Self {
        self.offset = self
            .offset
            .saturating_add(layer.saturating_mul(self.page_stride));
        self.page_stride = self.page_stride.saturating_mul(layers);
        self
    }

    /// A part of the dims of each head, such as the rotated part of a latent cache (MLA):
    /// `CacheLayout::paged_nhd(pages, page_size, 1, 576).dims(512..576)`. A backward range has no dims.
    pub const fn dims(mut self, range: std::ops::Range<usize>) -> Self {
        self.offset = self.offset.saturating_add(range.start);
        self.head_dim = range.end.saturating_sub(range.start);
        self.block_dims = self.head_dim;
        self
    }

    const fn apart(self, distance: usize) -> (Self, Self) {
        let mut v = self;
        v.offset = v.offset.saturating_add(distance);
        (self, v)
    }

    /// Replaces the strides, in elements, over pages, slots and heads.
    #[inline]
    pub const fn with_strides(mut self, page: usize, slot: usize, head: usize) -> Self {
        self.page_stride = page;
        self.slot_stride = slot;
        self.head_stride = head;
        self
    }

    /// Splits the dims of a head in blocks of `dims` contiguous ones, `stride` elements apart. `dims`
    /// divides head_dim.
    pub const fn with_blocks(mut self, dims: usize, stride: usize) -> Self {
        self.block_dims = dims;
        self.block_stride = stride;
        self
    }

    /// Element of the buffer at which `[0, 0, 0, 0]` lies.
    #[inline]
    pub const fn with_offset(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }

    /// `[pages, page_size, heads, head_dim]`.
    pub const fn shape(&self) -> [usize; 4] {
        [self.pages, self.page_size, self.heads, self.head_dim]
    }

    /// Strides over pages, slots and heads, in elements.
    pub const fn strides(&self) -> [usize; 3] {
        [self.page_stride, self.slot_stride, self.head_stride]
    }

    /// Element of the buffer at which `[0, 0, 0, 0]` lies.
    pub const fn offset(&self) -> usize {
        self.offset
    }

    /// `(dims, stride)`: so many dims of a head follow each other, and their blocks are as many elements
    /// apart. Heads that are one block have a stride of no meaning.
    pub const fn block(&self) -> (usize, usize) {
        (self.block_dims, self.block_stride)
    }

    /// Whether it has no elements.
    pub const fn is_empty(&self) -> bool {
        self.pages == 0 || self.page_size == 0 || self.heads == 0 || self.head_dim == 0
    }

    /// Whether each head is one block.
    pub(crate) const fn is_dense(&self) -> bool {
        self.block_dims >= self.head_dim
    }

    fn blocks(&self) -> usize {
        self.head_dim / self.block_dims.max(1)
    }

    fn extents(&self) -> [(usize, usize); 4] {
        [
            (self.pages, self.page_stride),
            (self.page_size, self.slot_stride),
            (self.heads, self.head_stride),
            (self.blocks(), self.block_stride),
        ]
    }

    /// Elements a buffer must have; 0 for an empty layout, `None` past `usize`.
    pub fn required_len(&self) -> Option<usize> {
        if self.is_empty() {
            return Some(0);
        }
        let mut len = self
            .offset
            .checked_add(self.block_dims.min(self.head_dim))?;
        for (count, stride) in self.extents() {
            len = len.checked_add((count.max(1) - 1).checked_mul(stride)?)?;
        }
        Some(len)
    }

    /// In units of which an element has so many.
    pub(crate) fn region(&self, units: usize) -> Region {
        Region::new(
            self.offset * units,
            self.block_dims.min(self.head_dim) * units,
            // The stride of a dimension of size 1 may be anything.
            self.extents()
                .map(|(count, stride)| (count, stride.saturating_mul(units))),
        )
    }

    /// Counts that kernels hold, and blocks that divide a head.
    pub(crate) fn check(&self, tensor: TensorName, element: usize) -> Result<(), Error> {
        if self.block_dims == 0 || !self.head_dim.is_multiple_of(self.block_dims) {
            return Err(Error::CacheBlocks {
                tensor,
                head_dim: self.head_dim,
                block_dims: self.block_dims,
            });
        }
        let bytes = self.required_len().and_then(|len| len.checked_mul(element));
        let slots = self.pages.checked_mul(self.page_size);
        let fits = |n: Option<usize>| n.is_some_and(|n| i64::try_from(n).is_ok());
        if !fits(bytes)
            || !fits(slots)
            || self.pages > u32::MAX as usize
            || self.page_size > u32::MAX as usize
        {
            return Err(Error::CacheTooLarge { tensor });
        }
        Ok(())
    }
}

/// The caches that keys and values are stored in. Both have the same pages and slots.
///
/// ```
/// use phasor::{CacheLayout, KvCacheLayout};
///
/// // Two buffers, each [pages, page_size, heads, head_dim] of 1024 pages of 16 tokens.
/// let pages = CacheLayout::paged_nhd(1024, 16, 8, 128);
/// let two = KvCacheLayout::separate(pages, pages);
/// // One buffer, [2, pages, page_size, heads, head_dim].
/// let one = KvCacheLayout::one_buffer(pages.in_turn());
/// # let _ = (two, one);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvCacheLayout {
    pub(crate) k: Option<CacheLayout>,
    pub(crate) v: Option<CacheLayout>,
    pub(crate) one_buffer: bool,
    pub(crate) codes: [Option<StoredCodes>; 2],
}

impl KvCacheLayout {
    const fn new(k: Option<CacheLayout>, v: Option<CacheLayout>, one_buffer: bool) -> Self {
        Self {
            k,
            v,
            one_buffer,
            codes: [None; 2],
        }
    }

    /// Keys and values in buffers of their own.
    pub const fn separate(k: CacheLayout, v: CacheLayout) -> Self {
        Self::new(Some(k), Some(v), false)
    }

    /// Keys and values as windows of one buffer, such as those of
    /// [`in_pairs_of_pages`](CacheLayout::in_pairs_of_pages).
    pub const fn one_buffer((k, v): (CacheLayout, CacheLayout)) -> Self {
        Self::new(Some(k), Some(v), true)
    }

    /// Keys only.
    pub const fn k(k: CacheLayout) -> Self {
        Self::new(Some(k), None, false)
    }

    /// Values only.
    pub const fn v(v: CacheLayout) -> Self {
        Self::new(None, Some(v), false)
    }

    /// The latent cache of MLA (DeepSeek-V2 and later), `[pages, page_size, latent_dim + rotary_dim]`: the
    /// latent is stored as values of one head (of layout `[tokens, 1, latent_dim]`), its rotated companion
    /// `k_pe` as keys of one head.
    ///
    /// ```
    /// use phasor::{Dtype, KvCacheLayout, Layout, Problem};
    ///
    /// let problem = Problem::new(Dtype::Bf16)
    ///     .q(Layout::tokens(64, 128, 192).with_rotary_offset(128)) // q_pe, inside the heads of q
    ///     .k_to_cache(Layout::tokens(64, 1, 64))
    ///     .v_to_cache(Layout::tokens(64, 1, 512))
    ///     .cache(KvCacheLayout::latent(1024, 64, 512, 64));
    /// # let _ = problem;
    /// ```
    pub const fn latent(
        pages: usize,
        page_size: usize,
        latent_dim: usize,
        rotary_dim: usize,
    ) -> Self {
        let dims = latent_dim.saturating_add(rotary_dim);
        let all = CacheLayout::paged_nhd(pages, page_size, 1, dims);
        Self::one_buffer((all.dims(latent_dim..dims), all.dims(0..latent_dim)))
    }

    /// The latent cache of DeepSeek-V3.2 in 656 bytes a token: 512 codes of e4m3 in groups of 128, their
    /// four scales in f32, and 64 elements of 16 bits that rotate. Values over a group's scale, which is
    /// at least `floor`.
    pub const fn latent_e4m3(pages: usize, page_size: usize, floor: f32) -> Self {
        const BYTES: usize = 512 + 4 * 4 + 64 * 2;
        const fn slots(
            [pages, page_size]: [usize; 2],
            [size, offset, dims]: [usize; 3],
        ) -> CacheLayout {
            let slot = BYTES / size;
            CacheLayout::paged_nhd(pages, page_size, 1, dims)
                .with_strides(page_size.saturating_mul(slot), slot, dims)
                .with_offset(offset / size)
        }
        let slot = BYTES / 4;
        let scales = ScaleLayout::strided(page_size.saturating_mul(slot), slot, 4, 1)
            .with_offset(512 / 4)
            .inline();
        let codes = StoredCodes::dynamic(Codes::E4m3, floor, scales).groups_of(128);
        let k = slots([pages, page_size], [2, 512 + 4 * 4, 64]);
        let v = slots([pages, page_size], [1, 0, 512]);
        Self::one_buffer((k, v)).with_v_codes(codes)
    }

    /// Stores both as codes: layouts count these, which are bytes.
    pub const fn with_codes(self, codes: StoredCodes) -> Self {
        self.with_k_codes(codes).with_v_codes(codes)
    }

    /// Stores keys as codes.
    pub const fn with_k_codes(mut self, codes: StoredCodes) -> Self {
        self.codes[0] = Some(codes);
        self
    }

    /// Stores values as codes.
    pub const fn with_v_codes(mut self, codes: StoredCodes) -> Self {
        self.codes[1] = Some(codes);
        self
    }

    /// Bytes of an element of the keys' and of the values' cache.
    pub(crate) fn element_sizes(&self, dtype: Dtype) -> [usize; 2] {
        self.codes.map(|codes| match codes {
            Some(_) => 1,
            None => dtype.size(),
        })
    }

    /// Pages, and slots of a page: those of both.
    pub(crate) fn counts(&self) -> [usize; 2] {
        let any = self.k.or(self.v);
        any.map_or([0, 0], |layout| [layout.pages, layout.page_size])
    }

    pub(crate) fn parts(&self) -> [(TensorName, Option<&CacheLayout>); 2] {
        [
            (TensorName::K, self.k.as_ref()),
            (TensorName::V, self.v.as_ref()),
        ]
    }
}

/// Which slot of the caches each token is stored in. `M` is where the [`Ids`] are.
///
/// No slot can make a call write outside of the caches: what lies outside is not stored, and the call
/// says so ([`Stored`]).
///
/// ```
/// use phasor::Slots;
///
/// // Three tokens, of which the second is not stored.
/// let by_slot = Slots::mapping(&[17, -1, 96]);
/// // Two sequences that hold 20 and 5 tokens, in pages of 16: the second has one page so far.
/// let by_page = Slots::page_table(&[3, 8, 5, -1], &[20, 5]);
/// # let _ = (by_slot, by_page);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotsIn<M> {
    pub(crate) choice: SlotChoice<M>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotChoice<M> {
    Mapping(Ids<M>),
    PageTable {
        pages: Ids<M>,
        lengths: Ids<M>,
    },
    PageIndices {
        indptr: Ids<M>,
        indices: Ids<M>,
        lengths: Ids<M>,
    },
    /// Without lengths caches hold nothing.
    Sequences {
        lengths: Option<Ids<M>>,
    },
}

/// The slots of one call, in host memory.
pub type Slots<'a> = SlotsIn<&'a [u8]>;

impl<M> SlotsIn<M> {
    /// A slot for each token, `[batch, tokens]`; all slots are numbered through: slot `n` is slot
    /// `n % page_size` of page `n / page_size` (vLLM's slot_mapping, SGLang's cache_loc). A token whose
    /// slot is negative is not stored; its q is rotated all the same.
    pub fn mapping(slots: impl Into<Ids<M>>) -> Self {
        Self {
            choice: SlotChoice::Mapping(slots.into()),
        }
    }

    /// The pages of each sequence, `[sequences, pages of a sequence]` (block_table), and how many tokens
    /// its cache holds before this call, `[sequences]`: the new ones follow.
    pub fn page_table(pages: impl Into<Ids<M>>, lengths: impl Into<Ids<M>>) -> Self {
        Self {
            choice: SlotChoice::PageTable {
                pages: pages.into(),
                lengths: lengths.into(),
            },
        }
    }

    /// The same with the pages of all sequences one after the other (FlashInfer's CSR): those of sequence
    /// `s` are `indices[indptr[s]..indptr[s + 1]]`; `indptr` has `sequences + 1` values.
    pub fn page_indices(
        indptr: impl Into<Ids<M>>,
        indices: impl Into<Ids<M>>,
        lengths: impl Into<Ids<M>>,
    ) -> Self {
        Self {
            choice: SlotChoice::PageIndices {
                indptr: indptr.into(),
                indices: indices.into(),
                lengths: lengths.into(),
            },
        }
    }

    /// Each sequence has a page of its own, that of its number, and holds so many tokens before this call,
    /// `[sequences]`: contiguous caches.
    pub fn sequences(lengths: impl Into<Ids<M>>) -> Self {
        Self {
            choice: SlotChoice::Sequences {
                lengths: Some(lengths.into()),
            },
        }
    }

    /// Each sequence has a page of its own, from the first slot on.
    pub(crate) fn sequences_from_the_first() -> Self {
        Self {
            choice: SlotChoice::Sequences { lengths: None },
        }
    }

    /// The same in other memory, to where it is wanted: as positions are.
    #[inline(always)]
    pub(crate) fn try_map_to<'a, M2, E>(
        &'a self,
        to: &mut SlotsIn<M2>,
        mut memory: impl FnMut(&'a M) -> Result<M2, E>,
    ) -> Result<(), E> {
        to.choice = match &self.choice {
            SlotChoice::Mapping(slots) => SlotChoice::Mapping(slots.try_map(&mut memory)?),
            SlotChoice::PageTable { pages, lengths } => SlotChoice::PageTable {
                pages: pages.try_map(&mut memory)?,
                lengths: lengths.try_map(&mut memory)?,
            },
            SlotChoice::PageIndices {
                indptr,
                indices,
                lengths,
            } => SlotChoice::PageIndices {
                indptr: indptr.try_map(&mut memory)?,
                indices: indices.try_map(&mut memory)?,
                lengths: lengths.try_map(&mut memory)?,
            },
            SlotChoice::Sequences { lengths } => SlotChoice::Sequences {
                lengths: match lengths {
                    None => None,
                    Some(lengths) => Some(lengths.try_map(&mut memory)?),
                },
            },
        };
        Ok(())
    }
}

/// Whether a call stored all that it was to store.
///
/// ```
/// # fn main() -> Result<(), phasor::Error> {
/// use phasor::{
///     CacheLayout, Dtype, Frequencies, Host, HostStep, KvCacheLayout, Layout, Pairing, Positions, Problem, Rope,
///     Slots, Stored,
/// };
///
/// let rope = Rope::new(Frequencies::from_theta(10_000.0, 8)?, Pairing::HalfSplit);
/// let rotator = Host::new().rotator(&rope);
/// let problem = Problem::new(Dtype::F32)
///     .k_to_cache(Layout::tokens(1, 1, 8))
///     .cache(KvCacheLayout::k(CacheLayout::flat(4, 1, 8)));
/// let plan = rotator.plan(&problem)?;
/// let mut cache = [0.0f32; 4 * 8];
/// let mut store = |slot: i32| {
///     let step = HostStep::new(Positions::start(0)).k(&[1.0f32; 8][..]).k_cache(&mut cache[..]);
///     rotator.step(&plan, step.slots(Slots::mapping(&[slot])))
/// };
/// assert_eq!(store(3)?, Stored::All);
/// assert_eq!(store(-1)?, Stored::All); // it is not to be stored
/// assert_eq!(store(4)?, Stored::NotAll); // there is no such slot, and nothing is written
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "slots that are not in the caches are not stored"]
pub enum Stored {
    /// Every token that has a slot.
    All,
    /// Not those whose slot, or page, or place in the page table, is outside of what was planned.
    NotAll,
}
