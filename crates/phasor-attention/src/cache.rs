//! Caches of keys and values, and which part of them a batch of sequences has.

use crate::AttentionError;
use crate::codes::{CodeScales, CodedValues, StepScales};
use crate::error::agree;
use crate::scalar::widen;
use phasor::quantize::Codes;
use phasor::{
    CacheLayout, Element, HostStep, HostWeights, Ids, KvCacheLayout, ScaleLayout, StoredCodes,
};

/// A paged cache of all layers, `[pages, 2, layers, page_size, kv_heads, head_dim]` (as MAX has it): keys
/// are first of the two. Which pages a sequence has is the caller's to say.
#[derive(Clone, Debug)]
pub struct PagedKvCache<T> {
    elements: Vec<T>,
    layers: usize,
    /// Of one layer's keys, without its place.
    layout: CacheLayout,
}

impl<T: Element> PagedKvCache<T> {
    /// A cache of zeros.
    ///
    /// # Errors
    /// [`AttentionError::Value`] if a number is 0, or there is no memory for so many elements.
    pub fn new(
        pages: usize,
        layers: usize,
        page_size: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self, AttentionError> {
        Ok(Self {
            elements: room([pages, layers, page_size, kv_heads, head_dim], 2)?,
            layers,
            layout: CacheLayout::paged_nhd(pages, page_size, kv_heads, head_dim),
        })
    }

    /// The cache of one layer.
    ///
    /// # Errors
    /// [`AttentionError::Value`] if there is no such layer.
    pub fn layer(&mut self, layer: usize) -> Result<KvCacheMut<'_, T>, AttentionError> {
        check_layer(layer, self.layers)?;
        let layouts = self.layout.of_layer(self.layers, layer).in_pairs_of_pages();
        KvCacheMut::one_buffer(layouts, &mut self.elements)
    }

    /// `[pages, 2, layers, page_size, kv_heads, head_dim]`.
    pub fn shape(&self) -> [usize; 6] {
        let [pages, page_size, heads, head_dim] = self.layout.shape();
        [pages, 2, self.layers, page_size, heads, head_dim]
    }

    /// All elements.
    pub fn elements(&self) -> &[T] {
        &self.elements
    }

    /// All elements.
    pub fn elements_mut(&mut self) -> &mut [T] {
        &mut self.elements
    }
}

/// Memory for so many pages, layers, slots, heads and dims, and so many of each.
fn room<T: Clone + Default>(shape: [usize; 5], of_each: usize) -> Result<Vec<T>, AttentionError> {
    let what = ["pages", "layers", "page_size", "kv_heads", "head_dim"];
    for (what, value) in what.into_iter().zip(shape) {
        if value == 0 {
            return Err(AttentionError::Value {
                what,
                value,
                remedy: "it must be above 0",
            });
        }
    }
    let len = shape
        .into_iter()
        .try_fold(of_each, |len, count| len.checked_mul(count));
    let mut elements = Vec::new();
    match len {
        Some(len) if elements.try_reserve_exact(len).is_ok() => elements.resize(len, T::default()),
        _ => {
            return Err(AttentionError::Value {
                what: "the number of pages",
                value: shape[0],
                remedy: "there is no memory for so many of this size",
            });
        }
    }
    Ok(elements)
}

fn check_layer(layer: usize, layers: usize) -> Result<(), AttentionError> {
    match layer < layers {
        true => Ok(()),
        false => Err(AttentionError::Value {
            what: "layer",
            value: layer,
            remedy: "it must be below the number of layers of the cache",
        }),
    }
}

/// A paged cache of all layers as 8-bit codes, `[pages, 2, layers, page_size, kv_heads, head_dim]`, with a
/// scale for each token and head, `[pages, layers, page_size, kv_heads]` in f32 for keys and likewise for
/// values: less than a third of the bytes of f32, and little more than half of those of bf16.
///
/// ```
/// use phasor_attention::PagedCodeCache;
/// use phasor_attention::phasor::quantize::Codes;
///
/// # fn main() -> Result<(), phasor_attention::AttentionError> {
/// // 64 pages of 16 slots, 2 layers of 8 heads of 128 dims, for layers of f32 here.
/// let mut cache = PagedCodeCache::new(Codes::Int8, 64, 2, 16, 8, 128)?;
/// let of_layer = cache.layer::<f32>(1)?;
/// assert_eq!(of_layer.shape(), [64, 16, 8, 128]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PagedCodeCache {
    kind: Codes,
    codes: Vec<u8>,
    k_scales: Vec<f32>,
    v_scales: Vec<f32>,
    layers: usize,
    /// Of one layer's keys, without its place.
    layout: CacheLayout,
}

impl PagedCodeCache {
    /// The least scale of a token and head.
    const FLOOR: f32 = 1e-6;

    /// A cache of zeros.
    ///
    /// # Errors
    /// [`AttentionError::Value`] if a number is 0, or there is no memory for so many codes.
    pub fn new(
        codes: Codes,
        pages: usize,
        layers: usize,
        page_size: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self, AttentionError> {
        let scales = [pages, layers, page_size, kv_heads, 1];
        Ok(Self {
            kind: codes,
            codes: room([pages, layers, page_size, kv_heads, head_dim], 2)?,
            k_scales: room(scales, 1)?,
            v_scales: room(scales, 1)?,
            layers,
            layout: CacheLayout::paged_nhd(pages, page_size, kv_heads, head_dim),
        })
    }

    /// The cache of one layer, whose elements are `T`.
    ///
    /// # Errors
    /// [`AttentionError::Value`] if there is no such layer.
    pub fn layer<T: Element>(&mut self, layer: usize) -> Result<KvCacheMut<'_, T>, AttentionError> {
        check_layer(layer, self.layers)?;
        let [_, page_size, heads, _] = self.layout.shape();
        let of_layer = page_size * heads;
        let scales = ScaleLayout::strided(self.layers * of_layer, heads, 1, 1);
        let codes =
            StoredCodes::dynamic(self.kind, Self::FLOOR, scales.with_offset(layer * of_layer));
        let (k, v) = self.layout.of_layer(self.layers, layer).in_pairs_of_pages();
        let part = |layout, scales| CodedCache {
            layout,
            codes,
            scales: CodeScales::F32(scales),
        };
        KvCacheMut::codes_in_one_buffer(
            (part(k, &mut self.k_scales), part(v, &mut self.v_scales)),
            &mut self.codes,
        )
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + size_of::<f32>() * (self.k_scales.len() + self.v_scales.len())
    }
}

enum Buffers<'a, T> {
    Separate { k: &'a mut [T], v: &'a mut [T] },
    OneBuffer(&'a mut [T]),
    SeparateCodes { k: &'a mut [u8], v: &'a mut [u8] },
    CodesInOneBuffer(&'a mut [u8]),
}

/// Keys or values that are kept as 8-bit codes: where these lie in their buffer, what they are, and their
/// scales. The fused step makes codes of them; attention takes them back.
///
/// ```
/// use phasor_attention::phasor::quantize::{Codes, ScaleForm};
/// use phasor_attention::phasor::{CacheLayout, ScaleLayout, StoredCodes};
/// use phasor_attention::{CodeScales, CodedCache, KvCacheMut};
///
/// # fn main() -> Result<(), phasor_attention::AttentionError> {
/// // 10 pages of 16 slots, 2 heads of 64 dims: e4m3 keys by a scale of each head that is given, int8
/// // values with a scale for each token and head.
/// let layout = CacheLayout::paged_nhd(10, 16, 2, 64);
/// let (mut k, mut v) = (vec![0; 10 * 16 * 2 * 64], vec![0; 10 * 16 * 2 * 64]);
/// let mut v_scales = vec![0.0; 10 * 16 * 2];
/// let keys = CodedCache {
///     layout,
///     codes: StoredCodes::given(Codes::E4m3, ScaleForm::Divide),
///     scales: CodeScales::Given(&[0.02, 0.05]),
/// };
/// let values = CodedCache {
///     layout,
///     codes: StoredCodes::dynamic(Codes::Int8, 1e-6, ScaleLayout::tokens_heads(16, 2, 1)),
///     scales: CodeScales::F32(&mut v_scales),
/// };
/// let cache = KvCacheMut::<f32>::separate_codes((keys, &mut k), (values, &mut v))?;
/// # let _ = cache;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct CodedCache<'a> {
    /// Where codes are, counted in codes.
    pub layout: CacheLayout,
    /// What they are.
    pub codes: StoredCodes,
    /// Their scales.
    pub scales: CodeScales<'a>,
}

/// Where keys or values are, but for the buffer.
struct Part<'a> {
    layout: CacheLayout,
    codes: Option<(StoredCodes, CodeScales<'a>)>,
}

impl<'a> Part<'a> {
    fn elements(layout: CacheLayout) -> Self {
        Self {
            layout,
            codes: None,
        }
    }

    fn codes(cache: CodedCache<'a>, buffer: usize) -> Result<Self, AttentionError> {
        let CodedCache {
            layout,
            codes,
            scales,
        } = cache;
        scales.check(&codes, &layout, buffer)?;
        Ok(Self {
            layout,
            codes: Some((codes, scales)),
        })
    }

    fn view<'b, T>(&'b self, elements: &'b [T], codes: &'b [u8]) -> CachePart<'b, T> {
        CachePart {
            layout: self.layout,
            values: match &self.codes {
                None => Values::Elements(elements),
                Some((of, scales)) => {
                    Values::Codes(CodedValues::new(*of, codes, scales.view(codes)))
                }
            },
        }
    }
}

/// The cache of one layer, in memory of the caller's.
pub struct KvCacheMut<'a, T> {
    k: Part<'a>,
    v: Part<'a>,
    buffers: Buffers<'a, T>,
}

impl<'a, T: Element> KvCacheMut<'a, T> {
    /// Keys and values in buffers of their own.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] if the layouts differ in pages, slots or heads, or a buffer is too short
    /// for its layout; [`AttentionError::Value`] if there are no slots.
    pub fn separate(
        (k_layout, k): (CacheLayout, &'a mut [T]),
        (v_layout, v): (CacheLayout, &'a mut [T]),
    ) -> Result<Self, AttentionError> {
        check_layouts([(k_layout, k.len()), (v_layout, v.len())])?;
        Ok(Self {
            k: Part::elements(k_layout),
            v: Part::elements(v_layout),
            buffers: Buffers::Separate { k, v },
        })
    }

    /// Keys and values as windows of one buffer, such as those of
    /// [`CacheLayout::in_pairs_of_pages`].
    ///
    /// # Errors
    /// Those of [`separate`](Self::separate).
    pub fn one_buffer(
        (k, v): (CacheLayout, CacheLayout),
        buffer: &'a mut [T],
    ) -> Result<Self, AttentionError> {
        check_layouts([(k, buffer.len()), (v, buffer.len())])?;
        Ok(Self {
            k: Part::elements(k),
            v: Part::elements(v),
            buffers: Buffers::OneBuffer(buffer),
        })
    }

    /// Codes of keys and of values in buffers of their own.
    ///
    /// # Errors
    /// Those of [`separate`](Self::separate), and for scales that do not fit their codes:
    /// [`AttentionError::Weights`] for those of another kind, [`AttentionError::Mismatch`] for their number,
    /// [`AttentionError::Factor`] for one that is given and not usable.
    pub fn separate_codes(
        (k, k_buffer): (CodedCache<'a>, &'a mut [u8]),
        (v, v_buffer): (CodedCache<'a>, &'a mut [u8]),
    ) -> Result<Self, AttentionError> {
        check_layouts([(k.layout, k_buffer.len()), (v.layout, v_buffer.len())])?;
        Ok(Self {
            k: Part::codes(k, k_buffer.len())?,
            v: Part::codes(v, v_buffer.len())?,
            buffers: Buffers::SeparateCodes {
                k: k_buffer,
                v: v_buffer,
            },
        })
    }

    /// Codes of keys and of values as windows of one buffer.
    ///
    /// # Errors
    /// Those of [`separate_codes`](Self::separate_codes).
    pub fn codes_in_one_buffer(
        (k, v): (CodedCache<'a>, CodedCache<'a>),
        buffer: &'a mut [u8],
    ) -> Result<Self, AttentionError> {
        check_layouts([(k.layout, buffer.len()), (v.layout, buffer.len())])?;
        Ok(Self {
            k: Part::codes(k, buffer.len())?,
            v: Part::codes(v, buffer.len())?,
            buffers: Buffers::CodesInOneBuffer(buffer),
        })
    }

    /// `[pages, page_size, kv_heads, head_dim]` of the keys.
    pub fn shape(&self) -> [usize; 4] {
        self.k.layout.shape()
    }

    /// Dims of a head of the values.
    pub fn v_head_dim(&self) -> usize {
        let [.., dims] = self.v.layout.shape();
        dims
    }

    /// The layouts, as the fused step takes them.
    pub(crate) fn layout(&self) -> KvCacheLayout {
        let (k, v) = (self.k.layout, self.v.layout);
        let mut layout = match self.buffers {
            Buffers::Separate { .. } | Buffers::SeparateCodes { .. } => {
                KvCacheLayout::separate(k, v)
            }
            Buffers::OneBuffer(_) | Buffers::CodesInOneBuffer(_) => {
                KvCacheLayout::one_buffer((k, v))
            }
        };
        if let Some((codes, _)) = &self.k.codes {
            layout = layout.with_k_codes(*codes);
        }
        if let Some((codes, _)) = &self.v.codes {
            layout = layout.with_v_codes(*codes);
        }
        layout
    }

    /// A step with the buffers, the scales and what the stages of keys and values need.
    pub(crate) fn give_to<'b>(
        &'b mut self,
        step: HostStep<'b, T>,
        [mut k_weights, mut v_weights]: [HostWeights<'b, T>; 2],
    ) -> HostStep<'b, T> {
        let mut step = match &mut self.buffers {
            Buffers::Separate { k, v } => step.k_cache(&mut **k).v_cache(&mut **v),
            Buffers::OneBuffer(both) => step.kv_cache(&mut **both),
            Buffers::SeparateCodes { k, v } => step.k_cache(&mut **k).v_cache(&mut **v),
            Buffers::CodesInOneBuffer(both) => step.kv_cache(&mut **both),
        };
        if let Some((_, scales)) = &mut self.k.codes {
            match scales.of_step() {
                StepScales::Given(scales) => k_weights = k_weights.scales(scales),
                StepScales::Written(scales) => step = step.k_scales(scales),
                StepScales::Inline => {}
            }
        }
        if let Some((_, scales)) = &mut self.v.codes {
            match scales.of_step() {
                StepScales::Given(scales) => v_weights = v_weights.scales(scales),
                StepScales::Written(scales) => step = step.v_scales(scales),
                StepScales::Inline => {}
            }
        }
        step.k_weights(k_weights).v_weights(v_weights)
    }

    /// What attention reads.
    pub fn view(&self) -> KvCacheView<'_, T> {
        let (elements, codes): ([&[T]; 2], [&[u8]; 2]) = match &self.buffers {
            Buffers::Separate { k, v } => ([k, v], [&[], &[]]),
            Buffers::OneBuffer(both) => ([both, both], [&[], &[]]),
            Buffers::SeparateCodes { k, v } => ([&[], &[]], [k, v]),
            Buffers::CodesInOneBuffer(both) => ([&[], &[]], [both, both]),
        };
        KvCacheView {
            k: self.k.view(elements[0], codes[0]),
            v: self.v.view(elements[1], codes[1]),
        }
    }
}

/// The cache of one layer, to be read. That of codes is a [`KvCacheMut::view`].
#[derive(Clone, Copy)]
pub struct KvCacheView<'a, T> {
    pub(crate) k: CachePart<'a, T>,
    pub(crate) v: CachePart<'a, T>,
}

impl<'a, T: Element> KvCacheView<'a, T> {
    /// Keys and values with their layouts; the two may be one buffer.
    ///
    /// # Errors
    /// Those of [`KvCacheMut::separate`].
    pub fn new(
        (k_layout, k): (CacheLayout, &'a [T]),
        (v_layout, v): (CacheLayout, &'a [T]),
    ) -> Result<Self, AttentionError> {
        check_layouts([(k_layout, k.len()), (v_layout, v.len())])?;
        let part = |layout, elements| CachePart {
            layout,
            values: Values::Elements(elements),
        };
        Ok(Self {
            k: part(k_layout, k),
            v: part(v_layout, v),
        })
    }

    /// `[pages, page_size, kv_heads, head_dim]` of the keys.
    pub fn shape(&self) -> [usize; 4] {
        self.k.layout.shape()
    }

    /// Dims of a head of the values.
    pub fn v_head_dim(&self) -> usize {
        let [.., dims] = self.v.layout.shape();
        dims
    }
}

/// As many pages, slots and heads, and blocks that heads are made of; dims may differ (MLA).
pub(crate) fn check_shapes(k: &CacheLayout, v: &CacheLayout) -> Result<(), AttentionError> {
    let what = [
        "pages of the values' cache",
        "page_size of the values' cache",
        "heads of the values' cache",
    ];
    for ((what, k), v) in what.into_iter().zip(k.shape()).zip(v.shape()) {
        agree(what, k, v)?;
    }
    let [_, page_size, ..] = k.shape();
    if page_size == 0 {
        return Err(AttentionError::Value {
            what: "page_size",
            value: 0,
            remedy: "a page must have slots",
        });
    }
    for layout in [k, v] {
        let (block_dims, _) = layout.block();
        let [.., head_dim] = layout.shape();
        if block_dims == 0 || !head_dim.is_multiple_of(block_dims) {
            return Err(AttentionError::Mismatch {
                what: "dims of a block of the cache, which must divide head_dim",
                expected: head_dim,
                got: block_dims,
            });
        }
    }
    Ok(())
}

fn check_layouts([k, v]: [(CacheLayout, usize); 2]) -> Result<(), AttentionError> {
    check_shapes(&k.0, &v.0)?;
    for (what, (layout, len)) in [
        ("elements of the keys' cache", k),
        ("elements of the values' cache", v),
    ] {
        let needed = layout.required_len().unwrap_or(usize::MAX);
        if len < needed {
            return Err(AttentionError::Mismatch {
                what,
                expected: needed,
                got: len,
            });
        }
    }
    Ok(())
}

/// Keys or values.
#[derive(Clone, Copy)]
pub(crate) struct CachePart<'a, T> {
    layout: CacheLayout,
    values: Values<'a, T>,
}

#[derive(Clone, Copy)]
enum Values<'a, T> {
    Elements(&'a [T]),
    Codes(CodedValues<'a>),
}

impl<T: Element> CachePart<'_, T> {
    /// The dims of a head of one slot, which is in the cache.
    #[inline(always)]
    pub(crate) fn read(&self, page: usize, slot: usize, head: usize, row: &mut [f32]) {
        let [page_stride, slot_stride, head_stride] = self.layout.strides();
        let first =
            self.layout.offset() + page * page_stride + slot * slot_stride + head * head_stride;
        let (dims, stride) = self.layout.block();
        match &self.values {
            Values::Elements(elements) => {
                for (block, row) in row.chunks_mut(dims).enumerate() {
                    widen(&elements[first + block * stride..][..row.len()], row);
                }
            }
            Values::Codes(codes) => {
                for (block, row) in row.chunks_mut(dims).enumerate() {
                    codes.read(first + block * stride, row);
                }
                codes.scale([page, slot, head], row);
            }
        }
    }
}

/// Sequences of differing lengths, one after the other, and where their caches are. It borrows what the
/// caller keeps; a call does not change it, so that lengths grow when the caller says so.
#[derive(Clone, Copy, Debug)]
pub struct RaggedBatch<'a> {
    pub(crate) cu_seqlens: Ids<&'a [u8]>,
    pub(crate) cache_lengths: Ids<&'a [u8]>,
    pub(crate) page_table: Ids<&'a [u8]>,
    pub(crate) position_ids: Option<Ids<&'a [u8]>>,
}

impl<'a> RaggedBatch<'a> {
    /// * `cu_seqlens`, `[sequences + 1]`: sequence `s` has the tokens from `cu_seqlens[s]` to
    ///   `cu_seqlens[s + 1]` (MAX's input_row_offsets). Tokens past the last are padding, and not touched.
    /// * `cache_lengths`, `[sequences]`: tokens in the cache before this call; the new ones follow.
    /// * `page_table`, `[sequences, pages of a sequence]` (block_table, lookup_table). What lies past a
    ///   sequence's last token is not looked at.
    pub fn new(
        cu_seqlens: impl Into<Ids<&'a [u8]>>,
        cache_lengths: impl Into<Ids<&'a [u8]>>,
        page_table: impl Into<Ids<&'a [u8]>>,
    ) -> Self {
        Self {
            cu_seqlens: cu_seqlens.into(),
            cache_lengths: cache_lengths.into(),
            page_table: page_table.into(),
            position_ids: None,
        }
    }

    /// Rotary positions other than the place in the cache: one for each token, or `[axes, tokens]` where
    /// the rotation has axes. Masks count places in the cache all the same.
    pub fn position_ids(mut self, ids: impl Into<Ids<&'a [u8]>>) -> Self {
        self.position_ids = Some(ids.into());
        self
    }

    /// Tokens that are not padding, of a batch that was checked.
    pub(crate) fn tokens(&self) -> usize {
        self.cu_seqlens.get(self.cache_lengths.len()) as usize
    }

    /// What each sequence has, once it is certain that all of it is in the cache.
    pub(crate) fn check(
        &self,
        tokens: usize,
        [pages, page_size]: [usize; 2],
    ) -> Result<Vec<Sequence>, AttentionError> {
        let sequences = self.cache_lengths.len();
        agree(
            "cu_seqlens, one more than sequences",
            sequences + 1,
            self.cu_seqlens.len(),
        )?;
        if sequences > 0 && !self.page_table.len().is_multiple_of(sequences) {
            return Err(AttentionError::Mismatch {
                what: "entries of the page table, as many for each sequence",
                expected: self.page_table.len().next_multiple_of(sequences),
                got: self.page_table.len(),
            });
        }
        let of_each = self.page_table.len() / sequences.max(1);
        let room = of_each.saturating_mul(page_size);
        let mut all = Vec::with_capacity(sequences);
        let mut first = 0;
        for index in 0..=sequences {
            let value = self.cu_seqlens.get(index);
            let refuse = |remedy| {
                Err(AttentionError::CuSeqlens {
                    index,
                    value,
                    remedy,
                })
            };
            let end = match usize::try_from(value) {
                Ok(end) if end <= tokens => end,
                _ => return refuse("it must be from 0 on, and at most the number of tokens"),
            };
            let Some(sequence) = index.checked_sub(1) else {
                if end != 0 {
                    return refuse("the first must be 0");
                }
                continue;
            };
            if end < first {
                return refuse("it must not be below the one before");
            }
            let (new, cached) = (end - first, self.cache_lengths.get(sequence));
            let fits = usize::try_from(cached)
                .ok()
                .and_then(|cached| Some((cached, cached.checked_add(new)?)))
                .filter(|&(_, length)| length <= room);
            let Some((cached, length)) = fits else {
                return Err(AttentionError::PastCache {
                    sequence,
                    cached: self.cache_lengths.get(sequence),
                    new,
                    room,
                });
            };
            // Nothing is read for a sequence without new tokens.
            let used = match new {
                0 => 0,
                _ => length.div_ceil(page_size),
            };
            for index in 0..used {
                let page = self.page_table.get(sequence * of_each + index);
                if usize::try_from(page).is_ok_and(|page| page < pages) {
                    continue;
                }
                return Err(AttentionError::Page {
                    sequence,
                    index,
                    page,
                    pages,
                });
            }
            all.push(Sequence {
                first,
                new,
                cached,
                pages: sequence * of_each,
            });
            first = end;
        }
        Ok(all)
    }
}

/// A checked sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    /// Its first token of the batch.
    pub(crate) first: usize,
    pub(crate) new: usize,
    pub(crate) cached: usize,
    /// Where its pages are in the page table.
    pub(crate) pages: usize,
}
