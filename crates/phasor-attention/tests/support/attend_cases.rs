//! Batches of attention in any memory, and what the host makes of them.
#![allow(dead_code)] // Each test uses a part of it.

use super::support::{Random, narrowed};
use phasor_attention::kernels::{AttendPlan, AttendShape, CacheCodes};
use phasor_attention::phasor::half::{bf16, f16};
use phasor_attention::phasor::quantize::Codes;
use phasor_attention::phasor::{CacheLayout, Element, Host, Layout, StoredCodes};
use phasor_attention::{
    Attend, AttentionError, AttentionMask, CodeScales, CodedCache, KvCacheMut, KvCacheView,
    RaggedBatch,
};

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

/// Keys or values that are kept as codes.
#[derive(Clone)]
pub struct Coded {
    pub codes: StoredCodes,
    pub bytes: Vec<u8>,
    pub scales: Scales,
}

#[derive(Clone)]
pub enum Scales {
    Given(Vec<f32>),
    F32(Vec<f32>),
    E8m0(Vec<u8>),
    Inline,
}

impl Coded {
    pub fn of_cache(&self) -> CacheCodes {
        CacheCodes {
            codes: self.codes,
            given: match &self.scales {
                Scales::Given(scales) => scales.len(),
                _ => 0,
            },
        }
    }

    fn on_host(&mut self, layout: CacheLayout) -> (CodedCache<'_>, &mut [u8]) {
        let scales = match &mut self.scales {
            Scales::Given(scales) => CodeScales::Given(scales),
            Scales::F32(scales) => CodeScales::F32(scales),
            Scales::E8m0(scales) => CodeScales::E8m0(scales),
            Scales::Inline => CodeScales::Inline,
        };
        let codes = self.codes;
        let cache = CodedCache {
            layout,
            codes,
            scales,
        };
        (cache, &mut self.bytes)
    }

    /// The codes of a head of a slot, and their scales.
    fn fill(&mut self, layout: &CacheLayout, [page, slot, head]: [usize; 3], random: &mut Random) {
        let [page_stride, slot_stride, head_stride] = layout.strides();
        let (dims, block) = layout.block();
        let [.., head_dim] = layout.shape();
        let first = layout.offset() + page * page_stride + slot * slot_stride + head * head_stride;
        for d in 0..head_dim {
            let code = random.bits() as u8;
            // But for e4m3's NaN.
            let is_nan = self.codes.codes() == Codes::E4m3 && code & 0x7f == 0x7f;
            let at = first + d / dims * block + d % dims;
            self.bytes[at] = if is_nan { 0x35 } else { code };
        }
        let Some(at) = self.codes.scale_layout() else {
            return;
        };
        let [pages, slots, heads, groups] = at.strides();
        for group in 0..head_dim / self.codes.group_dims(head_dim) {
            let at = at.offset() + page * pages + slot * slots + head * heads + group * groups;
            let scale = random.values(1, 0.01)[0].abs() + 1e-4;
            match &mut self.scales {
                Scales::Given(_) => {}
                Scales::F32(scales) => scales[at] = scale,
                Scales::E8m0(scales) => scales[at] = 117 + (random.bits() % 6) as u8,
                Scales::Inline if self.codes.scales_are_e8m0() => self.bytes[at] = 119,
                Scales::Inline => {
                    self.bytes[4 * at..4 * at + 4].copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
    }
}

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
    /// What caches have in place of `k` and `v`.
    pub codes: Option<[Coded; 2]>,
    /// Elements (or codes) from a multiple of 16 bytes.
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
            let [.., head_dim] = layout.shape();
            for (s, &(cached, new)) in self.sequences.iter().enumerate() {
                for place in 0..cached + new {
                    let index = s * of_each + place / self.page_size;
                    table[index] = order[index] as i64;
                    for h in 0..self.kv_heads {
                        for d in 0..head_dim {
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
        let layout = |dims| Layout::tokens(tokens, self.heads, dims);
        Case {
            heads: self.heads,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            mask: AttentionMask::Causal,
            soft_cap: None,
            sinks: None,
            q_layout: layout(self.head_dim),
            out_layout: layout(v_layout.shape()[3]),
            k_layout,
            v_layout,
            most_keys: None,
            cu_seqlens: Some(cu_seqlens),
            lengths: self.sequences.iter().map(|s| s.0 as i64).collect(),
            table,
            q: narrowed(&random.values(tokens * self.heads * self.head_dim, 2.0)),
            k,
            v,
            codes: None,
            misalign: 0,
        }
    }
}

impl Wish {
    /// With codes of keys and of values, and so many scales that are given; NaN where nothing is stored, as
    /// far as codes or scales have one.
    pub fn coded<T: Element>(&self, seed: u64, codes: [(StoredCodes, usize); 2]) -> Case<T> {
        let mut case = self.case::<T>(seed);
        let mut random = Random::new(seed + 100);
        let layouts = [case.k_layout, case.v_layout];
        let mut at = 0;
        case.codes = Some(codes.map(|(codes, given)| {
            let layout = layouts[at];
            at += 1;
            let bytes = codes.scale_bytes(&layout).unwrap();
            let inline = codes.scale_layout().is_some_and(|at| at.is_inline());
            let len = layout.required_len().unwrap();
            let mut coded = Coded {
                codes,
                bytes: vec![0x7f; if inline { len.max(bytes) } else { len }],
                scales: match codes.scale_layout() {
                    None => Scales::Given(
                        random
                            .values(given, 0.01)
                            .iter()
                            .map(|x| x.abs() + 1e-3)
                            .collect(),
                    ),
                    Some(_) if inline => Scales::Inline,
                    Some(_) if codes.scales_are_e8m0() => Scales::E8m0(vec![255; bytes]),
                    Some(_) => Scales::F32(vec![f32::NAN; bytes / 4]),
                },
            };
            let of_each = case.table.len() / self.sequences.len();
            for (s, &(cached, new)) in self.sequences.iter().enumerate() {
                for place in 0..cached + new {
                    let page = case.table[s * of_each + place / self.page_size] as usize;
                    for head in 0..self.kv_heads {
                        let slot = place % self.page_size;
                        coded.fill(&layout, [page, slot, head], &mut random);
                    }
                }
            }
            coded
        }));
        // Nothing may look at these.
        (case.k, case.v) = (Vec::new(), Vec::new());
        case
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
            codes: self
                .codes
                .as_ref()
                .map(|codes| codes.each_ref().map(Coded::of_cache)),
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
        let [dims, of_values] = [&self.q_layout, &self.out_layout].map(|layout| layout.shape()[3]);
        let places = rows(&self.q_layout);
        let mut out = vec![T::narrow(UNTOUCHED); places.len() * of_values];
        let q: Vec<T> = places
            .into_iter()
            .flat_map(|at| self.q[at..at + dims].to_vec())
            .collect();
        let each: Vec<i64> = (0..=self.lengths.len() as i64).collect();
        let cu_seqlens = self.cu_seqlens.as_ref().unwrap_or(&each);
        let batch = RaggedBatch::new(cu_seqlens, &self.lengths, &self.table);
        let mut run = |cache: KvCacheView<'_, T>| {
            let attend = self.attend();
            attend
                .run(&Host::new(), &q, cache, &batch, &mut out)
                .unwrap();
        };
        match self.codes.clone() {
            None => {
                let (k, v) = ((self.k_layout, &self.k[..]), (self.v_layout, &self.v[..]));
                run(KvCacheView::new(k, v).unwrap());
            }
            Some([mut k, mut v]) => {
                let (k, v) = (k.on_host(self.k_layout), v.on_host(self.v_layout));
                run(KvCacheMut::separate_codes(k, v).unwrap().view());
            }
        }
        let mut placed = self.untouched();
        for (row, at) in out.chunks_exact(of_values).zip(rows(&self.out_layout)) {
            placed[at..at + of_values].copy_from_slice(row);
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
