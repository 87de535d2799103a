//! Attention over pages: held bit for bit to its definition, written here once more in plain Rust, and to
//! f64 within a bound. Whatever is not part of the definition changes no bit.

use phasor_attention::attend::{SPLIT, TILE};
use phasor_attention::phasor::half::{bf16, f16};
use phasor_attention::phasor::{CacheLayout, Dtype, Element, Host, Isa, Threads};
use phasor_attention::{Attend, AttentionError, AttentionMask, KvCacheView, RaggedBatch};
use std::f64::consts::LOG2_E;

mod support;
use support::{Random, narrowed, widened};

/// A whole problem: for each sequence what is cached before and what is new; K and V of all its keys.
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    page_size: usize,
    scale: f32,
    mask: AttentionMask,
    soft_cap: Option<f32>,
    sinks: Option<Vec<f32>>,
    /// `(cached, new)`.
    sequences: Vec<(usize, usize)>,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, sequences: &[(usize, usize)]) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            page_size: 16,
            scale: 1.0 / (head_dim as f32).sqrt(),
            mask: AttentionMask::Causal,
            soft_cap: None,
            sinks: None,
            sequences: sequences.to_vec(),
        }
    }

    fn attend(&self) -> Attend<'_> {
        Attend {
            heads: self.heads,
            scale: self.scale,
            mask: self.mask,
            logits_soft_cap: self.soft_cap,
            sinks: self.sinks.as_deref(),
        }
    }

    fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.1).sum()
    }

    fn pages_of_each(&self) -> usize {
        let most = self
            .sequences
            .iter()
            .map(|&(cached, new)| cached + new)
            .max();
        most.unwrap().div_ceil(self.page_size)
    }

    fn visible(&self, place: usize, context: usize) -> std::ops::Range<usize> {
        let see = |key: usize| match self.mask {
            AttentionMask::Causal => key <= place,
            AttentionMask::SlidingWindow(w) => key <= place && place - key < w,
            AttentionMask::Chunked(c) => key <= place && key / c == place / c,
            AttentionMask::None => true,
        };
        let start = (0..context).find(|&key| see(key)).unwrap();
        let end = (0..context).rfind(|&key| see(key)).unwrap() + 1;
        start..end
    }
}

/// q, and the keys and values of each sequence in the order of their places, `[context, kv_heads, head_dim]`.
struct Data<T> {
    q: Vec<T>,
    kv: Vec<[Vec<T>; 2]>,
}

impl<T: Element> Data<T> {
    fn of(case: &Case, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let token = case.kv_heads * case.head_dim;
        Self {
            q: narrowed(&random.values(case.tokens() * case.heads * case.head_dim, 2.0)),
            kv: case
                .sequences
                .iter()
                .map(|&(cached, new)| {
                    [(); 2].map(|()| narrowed(&random.values((cached + new) * token, 1.0)))
                })
                .collect(),
        }
    }

    /// Caches of a layout, whose pages are in an order of their own, and NaN where nothing is stored.
    fn cache(&self, case: &Case, layout: CacheLayout, seed: u64) -> ([Vec<T>; 2], Vec<i32>) {
        let [pages, page_size, heads, head_dim] = layout.shape();
        let of_each = case.pages_of_each();
        let order = Random::new(seed).permutation(pages);
        let mut table = vec![-1; case.sequences.len() * of_each];
        let len = layout.required_len().unwrap();
        let mut caches = [(); 2].map(|()| vec![T::narrow(f32::NAN); len]);
        let [page_stride, slot_stride, head_stride] = layout.strides();
        let (dims, block_stride) = layout.block();
        for (s, kv) in self.kv.iter().enumerate() {
            let (cached, new) = case.sequences[s];
            for place in 0..cached + new {
                let page = order[s * of_each + place / page_size];
                table[s * of_each + place / page_size] = page as i32;
                for (cache, rows) in caches.iter_mut().zip(kv) {
                    for h in 0..heads {
                        for d in 0..head_dim {
                            let to = layout.offset()
                                + page * page_stride
                                + place % page_size * slot_stride
                                + h * head_stride
                                + d / dims * block_stride
                                + d % dims;
                            cache[to] = rows[(place * heads + h) * head_dim + d];
                        }
                    }
                }
            }
        }
        (caches, table)
    }
}

fn offsets(case: &Case) -> (Vec<i32>, Vec<i32>) {
    let mut cu_seqlens = vec![0];
    for &(_, new) in &case.sequences {
        cu_seqlens.push(cu_seqlens.last().unwrap() + new as i32);
    }
    (
        cu_seqlens,
        case.sequences.iter().map(|s| s.0 as i32).collect(),
    )
}

fn run_in<T: Element>(host: &Host, case: &Case, data: &Data<T>, layout: CacheLayout) -> Vec<T> {
    let ([k, v], table) = data.cache(case, layout, 5);
    let (cu_seqlens, lengths) = offsets(case);
    let mut out = vec![T::default(); data.q.len()];
    let cache = KvCacheView::new((layout, &k), (layout, &v)).unwrap();
    let batch = RaggedBatch::new(&cu_seqlens, &lengths, &table);
    case.attend()
        .run(host, &data.q, cache, &batch, &mut out)
        .unwrap();
    out
}

fn nhd(case: &Case) -> CacheLayout {
    let pages = case.sequences.len() * case.pages_of_each() + 3;
    CacheLayout::paged_nhd(pages, case.page_size, case.kv_heads, case.head_dim)
}

fn run<T: Element>(case: &Case, data: &Data<T>) -> Vec<T> {
    run_in(&Host::new(), case, data, nhd(case))
}

/// The definition's 2^x and tanh.
fn exp2(x: f32) -> f32 {
    const P: [u32; 6] = [
        0x3f317218, 0x3e75fdee, 0x3d635774, 0x3c1d96a6, 0x3aaf9f2a, 0x3920fddd,
    ];
    if x.is_nan() {
        return x;
    }
    if x < -125.0 {
        return 0.0;
    }
    let n = x.round_ties_even();
    let f = x - n;
    let p = P
        .iter()
        .rev()
        .fold(0.0f32, |p, &c| p.mul_add(f, f32::from_bits(c)));
    p.mul_add(f, 1.0) * 2f32.powi(n as i32)
}

fn tanh(x: f32) -> f32 {
    const P: [u32; 5] = [0xbeaaaa99, 0x3e088393, 0xbd5c1e2d, 0x3ca9134f, 0xbbbaf0ee];
    let square = x * x;
    if x.abs() <= 0.625 {
        let p = P
            .iter()
            .rev()
            .fold(0.0f32, |p, &c| p.mul_add(square, f32::from_bits(c)));
        return (x * square).mul_add(p, x);
    }
    let e = exp2(x.abs() * (-2.0 * std::f32::consts::LOG2_E));
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

fn folded(mut terms: Vec<f32>) -> f32 {
    while terms.len() > 1 {
        let half = terms.len() / 2;
        terms = (0..half).map(|i| terms[i] + terms[i + half]).collect();
    }
    terms[0]
}

/// Where a query row is: sequence, head, place, and its q.
fn rows<T: Element>(case: &Case, data: &Data<T>, mut of: impl FnMut(usize, usize, usize, &[f32])) {
    let q = widened(&data.q);
    let mut token = 0;
    for (s, &(cached, new)) in case.sequences.iter().enumerate() {
        for place in cached..cached + new {
            for head in 0..case.heads {
                let at = (token * case.heads + head) * case.head_dim;
                of(s, head, place, &q[at..][..case.head_dim]);
            }
            token += 1;
        }
    }
}

/// What the documentation of `attend` says, a row at a time.
fn defined<T: Element>(case: &Case, data: &Data<T>) -> Vec<T> {
    let kv: Vec<[Vec<f32>; 2]> = data
        .kv
        .iter()
        .map(|kv| kv.each_ref().map(|x| widened(x)))
        .collect();
    let dims = case.head_dim;
    let scale = f64::from(case.scale);
    let score = |dot: f32| match case.soft_cap.map(f64::from) {
        None => dot * (scale * LOG2_E) as f32,
        Some(cap) => tanh(dot * (scale / cap) as f32) * (cap * LOG2_E) as f32,
    };
    let max = |a: f32, b: f32| if b > a { b } else { a };
    let mut out = Vec::new();
    rows(case, data, |s, head, place, q| {
        let (cached, new) = case.sequences[s];
        let seen = case.visible(place, cached + new);
        let kv_head = head / (case.heads / case.kv_heads);
        let row = |part: usize, key: usize| {
            &kv[s][part][(key * case.kv_heads + kv_head) * dims..][..dims]
        };
        let sink = case
            .sinks
            .as_ref()
            .map(|sinks| (f64::from(sinks[head]) * LOG2_E) as f32);
        let (mut all_m, mut all_l) = sink.map_or((f32::NEG_INFINITY, 0.0), |sink| (sink, 1.0));
        let mut all_o = vec![0.0f32; dims];
        let mut split = seen.start / SPLIT * SPLIT;
        while split < seen.end {
            let (mut m, mut l, mut o) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; dims]);
            for tile in (split..split + SPLIT).step_by(TILE) {
                let keys: Vec<usize> = (tile..tile + TILE).filter(|k| seen.contains(k)).collect();
                if keys.is_empty() {
                    continue;
                }
                let t: Vec<f32> = keys
                    .iter()
                    .map(|&key| {
                        let k = row(0, key);
                        score(
                            q.iter()
                                .zip(k)
                                .fold(0.0f32, |dot, (&q, &k)| q.mul_add(k, dot)),
                        )
                    })
                    .collect();
                let next = t.iter().copied().fold(m, max);
                let a = exp2(m - next);
                let mut p = vec![0.0; TILE];
                for (&key, &t) in keys.iter().zip(&t) {
                    p[key - tile] = exp2(t - next);
                }
                l = l.mul_add(a, folded(p.clone()));
                o.iter_mut().for_each(|o| *o *= a);
                for &key in &keys {
                    for (o, &v) in o.iter_mut().zip(row(1, key)) {
                        *o = p[key - tile].mul_add(v, *o);
                    }
                }
                m = next;
            }
            let next = max(all_m, m);
            let (a, b) = (exp2(all_m - next), exp2(m - next));
            all_l = l.mul_add(b, all_l * a);
            for (all, o) in all_o.iter_mut().zip(o) {
                *all = o.mul_add(b, *all * a);
            }
            all_m = next;
            split += SPLIT;
        }
        out.extend(all_o.iter().map(|o| T::narrow(o / all_l)));
    });
    out
}

/// In f64, by the textbook.
fn exact<T: Element>(case: &Case, data: &Data<T>) -> Vec<f64> {
    let dims = case.head_dim;
    let kv: Vec<[Vec<f32>; 2]> = data
        .kv
        .iter()
        .map(|kv| kv.each_ref().map(|x| widened(x)))
        .collect();
    let mut out = Vec::new();
    rows(case, data, |s, head, place, q| {
        let (cached, new) = case.sequences[s];
        let kv_head = head / (case.heads / case.kv_heads);
        let row = |part: usize, key: usize| {
            &kv[s][part][(key * case.kv_heads + kv_head) * dims..][..dims]
        };
        let keys = case.visible(place, cached + new);
        let scores: Vec<f64> = keys
            .clone()
            .map(|key| {
                let dot: f64 = q
                    .iter()
                    .zip(row(0, key))
                    .map(|(&q, &k)| f64::from(q) * f64::from(k))
                    .sum();
                let score = dot * f64::from(case.scale);
                case.soft_cap.map_or(score, |cap| {
                    f64::from(cap) * (score / f64::from(cap)).tanh()
                })
            })
            .collect();
        let sink = case.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
        let most = scores
            .iter()
            .copied()
            .chain(sink)
            .fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let sum: f64 = weights.iter().sum::<f64>() + sink.map_or(0.0, |s| (s - most).exp());
        for d in 0..dims {
            let dot: f64 = keys
                .clone()
                .zip(&weights)
                .map(|(key, w)| w * f64::from(row(1, key)[d]))
                .sum();
            out.push(dot / sum);
        }
    });
    out
}

/// Values that are the first dims of the keys, as a latent cache has them: the same bits as where they are
/// all dims, of which as many are looked at.
#[test]
fn values_may_have_dims_of_their_own() {
    let case = Case::new(6, 1, 40, &[(0, 70), (255, 3), (300, 1)]);
    let data = Data::<f32>::of(&case, 3);
    let layout = nhd(&case);
    let ([k, _], table) = data.cache(&case, layout, 5);
    let (cu_seqlens, lengths) = offsets(&case);
    let batch = RaggedBatch::new(&cu_seqlens, &lengths, &table);
    let attend = |dims: usize| {
        let cache = KvCacheView::new((layout, &k), (layout.dims(0..dims), &k)).unwrap();
        let mut out = vec![0.0f32; case.tokens() * 6 * dims];
        case.attend()
            .run(&Host::new(), &data.q, cache, &batch, &mut out)
            .unwrap();
        let mut more = vec![0.0f32; out.len() + 1];
        let result = case
            .attend()
            .run(&Host::new(), &data.q, cache, &batch, &mut more);
        assert!(matches!(result, Err(AttentionError::Mismatch { .. })));
        out
    };
    let whole = attend(40);
    for dims in [1, 16, 33] {
        let heads = whole.chunks(40).flat_map(|head| head[..dims].to_vec());
        assert_eq!(bits(&attend(dims)), bits(&heads.collect::<Vec<_>>()));
    }
}

fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.widen().to_bits()).collect()
}

/// Contexts around tiles, splits and pages; groups that fill a block of rows and such that do not.
fn cases() -> Vec<Case> {
    let ragged = [
        (0, 70),
        (255, 3),
        (300, 1),
        (0, 1),
        (63, 2),
        (5, 0),
        (511, 1),
    ];
    let plain = Case::new(4, 2, 32, &ragged);
    let mut all = vec![plain];
    for mask in [
        AttentionMask::SlidingWindow(1),
        AttentionMask::SlidingWindow(70),
        AttentionMask::SlidingWindow(400),
        AttentionMask::Chunked(48),
        AttentionMask::Chunked(256),
        AttentionMask::None,
    ] {
        all.push(Case {
            mask,
            ..Case::new(6, 2, 16, &ragged)
        });
    }
    all.push(Case {
        soft_cap: Some(3.0),
        ..Case::new(2, 2, 24, &ragged)
    });
    all.push(Case {
        sinks: Some(vec![0.5, -3.0, 20.0]),
        ..Case::new(3, 1, 80, &ragged)
    });
    all.push(Case {
        soft_cap: Some(50.0),
        sinks: Some(vec![1.0; 7]),
        mask: AttentionMask::SlidingWindow(100),
        scale: 0.7,
        page_size: 5,
        ..Case::new(7, 1, 6, &ragged)
    });
    // Scores far apart: weights that are 0, and a maximum that moves.
    all.push(Case {
        scale: 40.0,
        ..Case::new(2, 1, 64, &[(0, 200), (1000, 2)])
    });
    all.push(Case::new(1, 1, 128, &[(0, 300)]));
    all
}

fn holds_to_its_definition<T: Element>(epsilon: f64) {
    // Only how elements are read and written depends on their type.
    let some = if T::DTYPE == Dtype::F32 {
        usize::MAX
    } else {
        3
    };
    for (at, case) in cases().iter().enumerate().take(some) {
        let data = Data::<T>::of(case, at as u64);
        let defined = defined(case, &data);
        let exact = exact(case, &data);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for threads in [Threads::One, Threads::Pool] {
                let host = Host::new().with_isa(isa).unwrap().with_threads(threads);
                let got = run_in(&host, case, &data, nhd(case));
                assert_eq!(bits(&got), bits(&defined), "case {at}, {isa:?}");
            }
        }
        // Scores of up to 600 have errors of 2^-24 of that.
        let bound = if case.scale > 1.0 { 3e-3 } else { 3e-6 } + epsilon;
        for (got, exact) in defined.iter().zip(&exact) {
            let error = (f64::from(got.widen()) - exact).abs();
            assert!(
                error < bound,
                "case {at}: {got:?} is not {exact}",
                got = got.widen()
            );
        }
    }
}

#[test]
fn f32_holds_to_its_definition() {
    holds_to_its_definition::<f32>(0.0);
}

#[test]
fn f16_holds_to_its_definition() {
    holds_to_its_definition::<f16>(5e-4);
}

#[test]
fn bf16_holds_to_its_definition() {
    holds_to_its_definition::<bf16>(4e-3);
}

#[test]
fn layouts_change_nothing() {
    let mut case = Case::new(4, 2, 32, &[(0, 70), (255, 3), (40, 1)]);
    let data = Data::<bf16>::of(&case, 1);
    let expected = bits(&run(&case, &data));
    case.page_size = 7;
    let (s, h, d) = (case.page_size, case.kv_heads, case.head_dim);
    let pages = 3 * case.pages_of_each();
    for layout in [
        CacheLayout::paged_nhd(pages, s, h, d),
        CacheLayout::paged_hnd(pages, s, h, d),
        CacheLayout::paged_packed(pages, s, h, d, 8),
        CacheLayout::paged_transposed(pages, s, h, d),
        CacheLayout::paged_nhd(pages, s, h, d).of_layer(3, 1),
        CacheLayout::paged_nhd(pages, s, h, d).side_by_side().1,
    ] {
        assert_eq!(
            bits(&run_in(&Host::new(), &case, &data, layout)),
            expected,
            "{layout:?}"
        );
    }
    // Contiguous caches: a page for each sequence.
    case.page_size = 258;
    assert_eq!(bits(&run(&case, &data)), expected);
}

#[test]
fn sequences_are_apart_and_may_be_cut_anywhere() {
    let whole = Case::new(4, 2, 32, &[(0, 300)]);
    let data = Data::<f32>::of(&whole, 2);
    let expected = bits(&run(&whole, &data));
    let token = whole.heads * whole.head_dim;
    let of_key = whole.kv_heads * whole.head_dim;
    for (cached, new) in [(0, 1), (1, 1), (63, 2), (255, 1), (256, 44), (299, 1)] {
        let case = Case {
            sequences: vec![(cached, new)],
            ..Case::new(4, 2, 32, &[])
        };
        let part = Data {
            q: data.q[cached * token..][..new * token].to_vec(),
            kv: vec![
                data.kv[0]
                    .each_ref()
                    .map(|x| x[..(cached + new) * of_key].to_vec()),
            ],
        };
        let got = bits(&run(&case, &part));
        assert_eq!(
            got,
            expected[cached * token..][..new * token],
            "{cached} + {new}"
        );
    }
}

#[test]
fn what_is_not_seen_takes_no_part() {
    // NaN in every slot that a window does not reach: values, where 0 times NaN would show, and keys.
    let case = Case {
        mask: AttentionMask::SlidingWindow(10),
        ..Case::new(2, 1, 16, &[(90, 9)])
    };
    let mut data = Data::<f32>::of(&case, 3);
    let expected = bits(&run(&case, &data));
    for part in &mut data.kv[0] {
        part[..81 * 16].fill(f32::NAN);
    }
    assert_eq!(bits(&run(&case, &data)), expected);
    // And where a token sees one, its result has it.
    data.kv[0][1][85 * 16] = f32::NAN;
    let got = run(&case, &data);
    for token in 0..9 {
        let sees = (90 + token - 9..=90 + token).contains(&85);
        assert_eq!(got[token * 2 * 16].is_nan(), sees, "{token}");
        assert!(!got[token * 2 * 16 + 1].is_nan());
    }
}

#[test]
fn bad_input_is_refused_and_nothing_is_written() {
    let case = Case::new(4, 2, 8, &[(3, 2), (0, 4)]);
    let data = Data::<f32>::of(&case, 4);
    let layout = nhd(&case);
    let ([k, v], table) = data.cache(&case, layout, 5);
    let (cu_seqlens, lengths) = offsets(&case);
    let check = |attend: Attend<'_>, cu: &[i32], lengths: &[i32], table: &[i32], q: &[f32]| {
        let cache = KvCacheView::new((layout, &k), (layout, &v)).unwrap();
        let mut out = vec![-7.5f32; data.q.len()];
        let batch = RaggedBatch::new(cu, lengths, table);
        let result = attend.run(&Host::new(), q, cache, &batch, &mut out);
        assert_eq!(out.iter().all(|&x| x == -7.5), result.is_err());
        result
    };
    let good = case.attend();
    assert_eq!(check(good, &cu_seqlens, &lengths, &table, &data.q), Ok(()));
    let refused = |attend, cu: &[i32], lengths: &[i32], table: &[i32], q: &[f32]| {
        check(attend, cu, lengths, table, q).unwrap_err()
    };
    let with = |change: &dyn Fn(&mut Attend<'_>)| {
        let mut attend = case.attend();
        change(&mut attend);
        refused(attend, &cu_seqlens, &lengths, &table, &data.q)
    };
    use AttentionError::*;
    assert!(matches!(
        with(&|a| a.heads = 3),
        Heads {
            heads: 3,
            kv_heads: 2
        }
    ));
    assert!(matches!(with(&|a| a.heads = 0), Heads { .. }));
    assert!(matches!(
        with(&|a| a.scale = f32::NAN),
        Factor { what: "scale", .. }
    ));
    assert!(matches!(
        with(&|a| a.logits_soft_cap = Some(0.0)),
        Factor { .. }
    ));
    assert!(matches!(
        with(&|a| a.sinks = Some(&[1.0])),
        Mismatch {
            expected: 4,
            got: 1,
            ..
        }
    ));
    assert!(matches!(
        with(&|a| a.mask = AttentionMask::SlidingWindow(0)),
        Value { .. }
    ));
    assert!(matches!(
        with(&|a| a.mask = AttentionMask::Chunked(0)),
        Value { .. }
    ));
    let batch =
        |cu: &[i32], lengths: &[i32], table: &[i32]| refused(good, cu, lengths, table, &data.q);
    assert!(matches!(
        batch(&[1, 2, 6], &lengths, &table),
        CuSeqlens { index: 0, .. }
    ));
    assert!(matches!(
        batch(&[0, 7, 6], &lengths, &table),
        CuSeqlens { index: 1, .. }
    ));
    assert!(matches!(
        batch(&[0, 3, 2], &lengths, &table),
        CuSeqlens { index: 2, .. }
    ));
    assert!(matches!(
        batch(&[0, -1, 6], &lengths, &table),
        CuSeqlens { index: 1, .. }
    ));
    assert!(matches!(batch(&[0, 6], &lengths, &table), Mismatch { .. }));
    assert!(matches!(
        batch(&cu_seqlens, &[15, 0], &table),
        PastCache {
            sequence: 0,
            room: 16,
            ..
        }
    ));
    assert!(matches!(
        batch(&cu_seqlens, &[0, -1], &table),
        PastCache { sequence: 1, .. }
    ));
    assert!(matches!(
        batch(&cu_seqlens, &lengths, &[]),
        PastCache {
            sequence: 0,
            room: 0,
            ..
        }
    ));
    assert!(matches!(
        batch(&cu_seqlens, &lengths, &[0, 5]),
        Page {
            sequence: 1,
            page: 5,
            pages: 5,
            ..
        }
    ));
    assert!(matches!(
        batch(&cu_seqlens, &lengths, &[-1, 0]),
        Page {
            sequence: 0,
            page: -1,
            ..
        }
    ));
    assert!(matches!(
        batch(&cu_seqlens, &lengths, &[0, 1, 2]),
        Mismatch { .. }
    ));
    assert!(matches!(
        refused(good, &cu_seqlens, &lengths, &table, &data.q[1..]),
        Mismatch { .. }
    ));
    let no_slots = CacheLayout::paged_nhd(5, 0, 2, 8);
    assert!(matches!(
        KvCacheView::new((no_slots, &k), (no_slots, &v)).err(),
        Some(Value {
            what: "page_size",
            ..
        })
    ));
    assert!(matches!(
        KvCacheView::new((layout, &k[1..]), (layout, &v)).err(),
        Some(Mismatch { .. })
    ));
}
