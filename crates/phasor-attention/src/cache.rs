//! Caches of keys and values, and which part of them a batch of sequences has.

use crate::AttentionError;
use crate::error::agree;
use phasor::{CacheLayout, Element, Ids, KvCacheLayout};

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
        for (what, value) in [
            ("pages", pages),
            ("layers", layers),
            ("page_size", page_size),
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
        ] {
            if value == 0 {
                return Err(AttentionError::Value {
                    what,
                    value,
                    remedy: "it must be above 0",
                });
            }
        }
        let too_large = AttentionError::Value {
            what: "the number of pages",
            value: pages,
            remedy: "there is no memory for so many of this size",
        };
        let len = [2, layers, page_size, kv_heads, head_dim]
            .into_iter()
            .try_fold(pages, |len, count| len.checked_mul(count));
        let mut elements = Vec::new();
        match len {
            Some(len) if elements.try_reserve_exact(len).is_ok() => {
                elements.resize(len, T::default());
            }
            _ => return Err(too_large),
        }
        Ok(Self {
            elements,
            layers,
            layout: CacheLayout::paged_nhd(pages, page_size, kv_heads, head_dim),
        })
    }

    /// The cache of one layer.
    ///
    /// # Errors
    /// [`AttentionError::Value`] if there is no such layer.
    pub fn layer(&mut self, layer: usize) -> Result<KvCacheMut<'_, T>, AttentionError> {
        if layer >= self.layers {
            return Err(AttentionError::Value {
                what: "layer",
                value: layer,
                remedy: "it must be below the number of layers of the cache",
            });
        }
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

enum Buffers<'a, T> {
    Separate { k: &'a mut [T], v: &'a mut [T] },
    OneBuffer(&'a mut [T]),
}

/// The cache of one layer, in memory of the caller's.
pub struct KvCacheMut<'a, T> {
    k: CacheLayout,
    v: CacheLayout,
    buffers: Buffers<'a, T>,
}

impl<'a, T: Element> KvCacheMut<'a, T> {
    /// Keys and values in buffers of their own.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] if the layouts differ in shape or a buffer is too short for its layout,
    /// [`AttentionError::Value`] if there are no slots.
    pub fn separate(
        (k_layout, k): (CacheLayout, &'a mut [T]),
        (v_layout, v): (CacheLayout, &'a mut [T]),
    ) -> Result<Self, AttentionError> {
        check_layouts([(k_layout, k.len()), (v_layout, v.len())])?;
        Ok(Self {
            k: k_layout,
            v: v_layout,
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
            k,
            v,
            buffers: Buffers::OneBuffer(buffer),
        })
    }

    /// `[pages, page_size, kv_heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.k.shape()
    }

    /// The layouts, as the fused step takes them.
    pub(crate) fn layout(&self) -> KvCacheLayout {
        match self.buffers {
            Buffers::Separate { .. } => KvCacheLayout::separate(self.k, self.v),
            Buffers::OneBuffer(_) => KvCacheLayout::one_buffer((self.k, self.v)),
        }
    }

    /// The buffers, given to a step.
    pub(crate) fn give_to<'b>(
        &'b mut self,
        step: phasor::HostStep<'b, T>,
    ) -> phasor::HostStep<'b, T> {
        match &mut self.buffers {
            Buffers::Separate { k, v } => step.k_cache(&mut **k).v_cache(&mut **v),
            Buffers::OneBuffer(both) => step.kv_cache(&mut **both),
        }
    }

    /// What attention reads.
    pub fn view(&self) -> KvCacheView<'_, T> {
        let (k, v): (&[T], &[T]) = match &self.buffers {
            Buffers::Separate { k, v } => (k, v),
            Buffers::OneBuffer(both) => (both, both),
        };
        KvCacheView {
            k: CachePart {
                layout: self.k,
                elements: k,
            },
            v: CachePart {
                layout: self.v,
                elements: v,
            },
        }
    }
}

/// The cache of one layer, to be read.
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
        Ok(Self {
            k: CachePart {
                layout: k_layout,
                elements: k,
            },
            v: CachePart {
                layout: v_layout,
                elements: v,
            },
        })
    }

    /// `[pages, page_size, kv_heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.k.layout.shape()
    }
}

/// Layouts of one shape, with slots, and blocks that heads are made of.
pub(crate) fn check_shapes(k: &CacheLayout, v: &CacheLayout) -> Result<(), AttentionError> {
    let what = [
        "pages of the values' cache",
        "page_size of the values' cache",
        "heads of the values' cache",
        "head_dim of the values' cache",
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
    elements: &'a [T],
}

impl<T: Element> CachePart<'_, T> {
    /// The dims of a head of one slot, which is in the cache.
    #[inline(always)]
    pub(crate) fn read(&self, page: usize, slot: usize, head: usize, row: &mut [f32]) {
        let [page_stride, slot_stride, head_stride] = self.layout.strides();
        let first =
            self.layout.offset() + page * page_stride + slot * slot_stride + head * head_stride;
        let (dims, stride) = self.layout.block();
        for (block, row) in row.chunks_mut(dims).enumerate() {
            let from = &self.elements[first + block * stride..][..row.len()];
            for (to, from) in row.iter_mut().zip(from) {
                *to = from.widen();
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
