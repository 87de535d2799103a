//! Batches of attention in any memory, and what the host makes of them.
#![allow(dead_code)] // Each test uses a part of it.

use super::support::{Random, narrowed};
use phasor_attention::kernels::{AttendPlan, AttendShape};
use phasor_attention::phasor::half::{bf16, f16};
use phasor_attention::phasor::{CacheLayout, Element, Host, Layout};
use phasor_attention::{Attend, AttentionError, AttentionMask, KvCacheView, RaggedBatch};

/// The bytes of elements.
pub trait Bytes: Element {
    fn bytes(values: &[Self]) -> Vec<u8>;
    fn of_bytes(bytes: &[u8]) -> Vec<Self>;
}

macro_rules! bytes {
    ($($type:ty),*) => {$(
        impl Bytes for $type {
            fn bytes(values: &[Self]) -> Vec<u8> {
                values.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            fn of_bytes(bytes: &[u8]) -> Vec<Self> {
                let size = size_of::<Self>();
                bytes
                    .chunks_exact(size)
                    .map(|x| Self::from_le_bytes(x.try_into().unwrap()))
                    .collect()
            }
        }
    )*};
}
bytes!(f32, f16, bf16);

/// A batch, and where everything lies.
#[derive(Clone)]
pub struct Case<T> {
    pub heads: usize,
    pub scale: f32,
    pub mask: AttentionMask,
    pub soft_cap: Option<f32>,
    pub sinks: Option<Vec<f32>>,
    pub q_layout: Layout,
    pub out_layout: Layout,
    pub k_layout: CacheLayout,
    pub v_layout: CacheLayout,
    pub most_keys: Option<usize>,
    /// Without them, each token is a sequence.
    pub cu_seqlens: Option<Vec<i64>>,
    pub lengths: Vec<i64>,
    pub table: Vec<i64>,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    /// Elements from a multiple of 16 bytes.
    pub misalign: usize,
}

pub const UNTOUCHED: f32 = -77.5;

/// Sequences of `(cached, new)`, in a cache of a few pages more, NaN where nothing is stored.
#[derive(Clone)]
pub struct Wish {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub page_size: usize,
    pub sequences: Vec<(usize, usize)>,
    pub layouts: Layouts,
}

pub type Layouts = fn(usize, usize, usize, usize) -> (CacheLayout, CacheLayout);

pub fn nhd(
    pages: usize,
    page_size: usize,
    heads: usize,
    dims: usize,
) -> (CacheLayout, CacheLayout) {
    let layout = CacheLayout::paged_nhd(pages, page_size, heads, dims);
    (layout, layout)
}

impl Wish {
    pub fn new(
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        sequences: &[(usize, usize)],
    ) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            page_size: 16,
            sequences: sequences.to_vec(),
            layouts: nhd,
        }
    }

    pub fn case<T: Element>(&self, seed: u64) -> Case<T> {
        let mut random = Random::new(seed);
        let tokens = self.sequences.iter().map(|s| s.1).sum();
        let longest = self.sequences.iter().map(|s| s.0 + s.1).max().unwrap();
        let of_each = longest.div_ceil(self.page_size);
        let pages = of_each * self.sequences.len() + 2;
        let order = random.permutation(pages);
        let (k_layout, v_layout) =
            (self.layouts)(pages, self.page_size, self.kv_heads, self.head_dim);
        let mut cu_seqlens = vec![0];
        let mut table = vec![-1; of_each * self.sequences.len()];
        let mut filled = |layout: CacheLayout, table: &mut [i64]| {
            let mut cache = vec![T::narrow(f32::NAN); layout.required_len().unwrap()];
            let [page_stride, slot_stride, head_stride] = layout.strides();
            let (dims, block) = layout.block();
            for (s, &(cached, new)) in self.sequences.iter().enumerate() {
                for place in 0..cached + new {
                    let index = s * of_each + place / self.page_size;
                    table[index] = order[index] as i64;
                    for h in 0..self.kv_heads {
                        for d in 0..self.head_dim {
                            let at = layout.offset()
                                + order[index] * page_stride
                                + place % self.page_size * slot_stride
                                + h * head_stride
                                + d / dims * block
                                + d % dims;
                            cache[at] = T::narrow(random.values(1, 1.0)[0]);
                        }
                    }
                }
            }
            cache
        };
        let k = filled(k_layout, &mut table);
        let v = filled(v_layout, &mut table);
        for &(_, new) in &self.sequences {
            cu_seqlens.push(cu_seqlens.last().unwrap() + new as i64);
        }
        let layout = Layout::tokens(tokens, self.heads, self.head_dim);
        Case {
            heads: self.heads,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            mask: AttentionMask::Causal,
            soft_cap: None,
            sinks: None,
            q_layout: layout,
            out_layout: layout,
            k_layout,
            v_layout,
            most_keys: None,
            cu_seqlens: Some(cu_seqlens),
            lengths: self.sequences.iter().map(|s| s.0 as i64).collect(),
            table,
            q: narrowed(&random.values(tokens * self.heads * self.head_dim, 2.0)),
            k,
            v,
            misalign: 0,
        }
    }
}

/// Where each token's heads are.
pub fn rows(layout: &Layout) -> Vec<usize> {
    let [batch, tokens, heads, _] = layout.shape();
    let [batch_stride, token_stride, head_stride] = layout.strides();
    let mut rows = Vec::new();
    for b in 0..batch {
        for t in 0..tokens {
            for h in 0..heads {
                rows.push(layout.offset() + b * batch_stride + t * token_stride + h * head_stride);
            }
        }
    }
    rows
}

impl<T: Bytes> Case<T> {
    pub fn attend(&self) -> Attend<'_> {
        Attend {
            heads: self.heads,
            scale: self.scale,
            mask: self.mask,
            logits_soft_cap: self.soft_cap,
            sinks: self.sinks.as_deref(),
        }
    }

    pub fn shape(&self) -> AttendShape {
        AttendShape {
            q: self.q_layout,
            out: self.out_layout,
            k: self.k_layout,
            v: self.v_layout,
            sequences: self.lengths.len(),
            table_pages: self.table.len() / self.lengths.len(),
            most_keys: self.most_keys,
        }
    }

    pub fn plan(&self) -> Result<AttendPlan, AttentionError> {
        AttendPlan::new(T::DTYPE, &self.attend(), &self.shape())
    }

    /// In its output's layout.
    pub fn on_host(&self) -> Vec<T> {
        let dims = self.q_layout.shape()[3];
        let q: Vec<T> = rows(&self.q_layout)
            .into_iter()
            .flat_map(|at| self.q[at..at + dims].to_vec())
            .collect();
        let mut out = vec![T::narrow(UNTOUCHED); q.len()];
        let each: Vec<i64> = (0..=self.lengths.len() as i64).collect();
        let cu_seqlens = self.cu_seqlens.as_ref().unwrap_or(&each);
        let batch = RaggedBatch::new(cu_seqlens, &self.lengths, &self.table);
        let cache = KvCacheView::new((self.k_layout, &self.k), (self.v_layout, &self.v)).unwrap();
        self.attend()
            .run(&Host::new(), &q, cache, &batch, &mut out)
            .unwrap();
        let mut placed = self.untouched();
        for (row, at) in out.chunks_exact(dims).zip(rows(&self.out_layout)) {
            placed[at..at + dims].copy_from_slice(row);
        }
        placed
    }

    pub fn untouched(&self) -> Vec<T> {
        vec![T::narrow(UNTOUCHED); self.out_layout.required_len().unwrap()]
    }
}

pub fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.widen().to_bits()).collect()
}
