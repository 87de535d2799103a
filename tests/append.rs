//! Rotating into caches: every layout, every way to say which slot a token has, ragged batches, and what
//! slots outside of the caches do. What is rotated is compared with a plain rotation of the same tokens;
//! where it is to be is worked out here by hand.

use phasor::half::{bf16, f16};
use phasor::{
    Appended, CacheLayout, Dtype, Element, Error, Frequencies, FrequencyRows, Host, HostKvCache,
    HostRotator, InOut, Isa, KvCacheLayout, Layout, Pairing, Positions, Problem, Rope, Slots,
    Stored, Threads,
};
use proptest::prelude::*;

/// What a cache holds where nothing was stored.
const UNTOUCHED: f32 = -77.0;

fn rope(dims: usize, pairing: Pairing) -> Rope {
    Rope::new(Frequencies::from_theta(10_000.0, dims).unwrap(), pairing)
}

/// An element type of these tests.
trait Value: Element + PartialEq + std::fmt::Debug {
    fn of(x: f32) -> Self;
}

impl Value for f32 {
    fn of(x: f32) -> Self {
        x
    }
}

impl Value for f16 {
    fn of(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Value for bf16 {
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

fn values<T: Value>(len: usize, seed: u32) -> Vec<T> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| T::of(next())).collect()
}

/// Heads of each token that were rotated by themselves, in one step, at their own positions.
fn rotated<T: Value>(
    rotator: &HostRotator,
    tokens: &[T],
    layout: Layout,
    positions: &[i64],
) -> Vec<T> {
    let [_, count, heads, head_dim] = layout.shape();
    let mut all = tokens.to_vec();
    let one = Layout::tokens(1, heads, head_dim).with_rotary_offset(layout.rotary_offset());
    let plan = rotator.plan(&Problem::new(T::DTYPE).q(one)).unwrap();
    for t in 0..count {
        let token = &mut all[t * heads * head_dim..(t + 1) * heads * head_dim];
        rotator
            .rotate(
                &plan,
                Some(token.into()),
                None,
                Positions::start(positions[t]),
            )
            .unwrap();
    }
    all
}

/// Element of a cache, by the documentation of the constructors.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Nhd,
    Hnd,
    Packed(usize),
    Transposed,
}

#[derive(Clone, Copy, Debug)]
enum Pair {
    Separate,
    InTurn,
    InPairs,
    SideBySide,
    /// MAX's, layer 1 of 3.
    Layers,
}

const PAGES: usize = 5;
const PAGE_SIZE: usize = 4;

#[derive(Clone, Copy, Debug)]
struct CacheCase {
    kind: Kind,
    pair: Pair,
    heads: usize,
    head_dim: usize,
}

impl CacheCase {
    fn layout(&self) -> CacheLayout {
        let (p, s, h, d) = (PAGES, PAGE_SIZE, self.heads, self.head_dim);
        match self.kind {
            Kind::Nhd => CacheLayout::paged_nhd(p, s, h, d),
            Kind::Hnd => CacheLayout::paged_hnd(p, s, h, d),
            Kind::Packed(x) => CacheLayout::paged_packed(p, s, h, d, x),
            Kind::Transposed => CacheLayout::paged_transposed(p, s, h, d),
        }
    }

    fn planned(&self) -> KvCacheLayout {
        let layout = self.layout();
        match self.pair {
            Pair::Separate => KvCacheLayout::separate(layout, layout),
            Pair::InTurn => KvCacheLayout::one_buffer(layout.in_turn()),
            Pair::InPairs => KvCacheLayout::one_buffer(layout.in_pairs_of_pages()),
            Pair::SideBySide => KvCacheLayout::one_buffer(layout.side_by_side()),
            Pair::Layers => KvCacheLayout::one_buffer(layout.of_layer(3, 1).in_pairs_of_pages()),
        }
    }

    fn len(&self) -> usize {
        let one = PAGES * PAGE_SIZE * self.heads * self.head_dim;
        match self.pair {
            Pair::Separate => one,
            Pair::Layers => 6 * one,
            _ => 2 * one,
        }
    }

    /// Where a dim is in the buffer: that of the keys (`which` 0) or values.
    fn at(&self, which: usize, page: usize, slot: usize, head: usize, dim: usize) -> usize {
        let (s, h, d) = (PAGE_SIZE, self.heads, self.head_dim);
        let page_len = s * h * d;
        let width = match self.pair {
            Pair::SideBySide => 2 * d,
            _ => d,
        };
        let dim = match self.pair {
            Pair::SideBySide => which * d + dim,
            _ => dim,
        };
        let page_at = match self.pair {
            Pair::Separate => page * page_len,
            Pair::InTurn => (which * PAGES + page) * page_len,
            Pair::InPairs => (2 * page + which) * page_len,
            Pair::SideBySide => 2 * page * page_len,
            Pair::Layers => ((2 * page + which) * 3 + 1) * page_len,
        };
        page_at
            + match self.kind {
                Kind::Nhd => (slot * h + head) * width + dim,
                Kind::Hnd => (head * s + slot) * width + dim,
                Kind::Packed(x) => ((head * (d / x) + dim / x) * s + slot) * x + dim % x,
                Kind::Transposed => (head * d + dim) * s + slot,
            }
    }
}

/// A call, and what its caches are to hold.
#[derive(Clone, Debug)]
struct Case {
    cache: CacheCase,
    q_heads: usize,
    rotary_dim: usize,
    rotary_offset: usize,
    pairing: Pairing,
    /// Tokens of each sequence, and padding behind them.
    sequences: Vec<usize>,
    padding: usize,
    /// What each cache holds before.
    lengths: Vec<i64>,
    how: How,
    packed: bool,
    /// Whether keys are written back too.
    back: bool,
    seed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Mapping,
    Table,
    Indices,
}

impl Case {
    fn tokens(&self) -> usize {
        self.sequences.iter().sum::<usize>() + self.padding
    }

    /// The pages of a sequence: a permutation of all, from another place for each.
    fn page(&self, sequence: usize, column: usize) -> i64 {
        ((column * 3 + sequence * 2 + self.seed as usize) % PAGES) as i64
    }

    /// The sequence of each token and its place in it, of all but padding.
    fn places(&self) -> Vec<(usize, usize)> {
        let each = |(s, &count): (usize, &usize)| (0..count).map(move |place| (s, place));
        self.sequences.iter().enumerate().flat_map(each).collect()
    }

    /// The page and slot of a token, if it is inside.
    fn slot(&self, sequence: usize, place: usize) -> Option<(usize, usize)> {
        let n = self.lengths[sequence] + place as i64;
        if n < 0 || n as usize / PAGE_SIZE >= PAGES {
            return None;
        }
        let page = self.page(sequence, n as usize / PAGE_SIZE) as usize;
        Some((page, n as usize % PAGE_SIZE))
    }

    fn check<T: Value>(&self, host: Host) {
        let cache = self.cache;
        let (tokens, head_dim) = (self.tokens(), cache.head_dim);
        let rope = rope(self.rotary_dim, self.pairing);
        let rotator = host.rotator(&rope);
        let heads = [self.q_heads, cache.heads, cache.heads];
        let dense = heads
            .map(|n| Layout::tokens(tokens, n, head_dim).with_rotary_offset(self.rotary_offset));
        let [q, k, v] = [0, 1, 2].map(|n| {
            values::<T>(
                tokens * heads[n] * head_dim,
                self.seed.wrapping_add(n as u32),
            )
        });
        let places = self.places();
        let positions: Vec<i64> = places
            .iter()
            .map(|&(s, place)| self.lengths[s].wrapping_add(place as i64))
            .chain((0..self.padding).map(|_| 0))
            .collect();
        let expected_q = {
            let mut all = rotated(&rotator, &q, dense[0], &positions);
            // Padding is not touched.
            let row = self.q_heads * head_dim;
            all[places.len() * row..].copy_from_slice(&q[places.len() * row..]);
            all
        };
        let rotated_k = rotated(&rotator, &k, dense[1], &positions);

        // What the caches are to hold.
        let untouched = T::of(UNTOUCHED);
        let buffers = match cache.pair {
            Pair::Separate => 2,
            _ => 1,
        };
        let mut expected = vec![vec![untouched; cache.len()]; buffers];
        let mut all_stored = true;
        for (t, &(s, place)) in places.iter().enumerate() {
            let Some((page, slot)) = self.slot(s, place) else {
                all_stored = false;
                continue;
            };
            for (which, from) in [&rotated_k, &v].into_iter().enumerate() {
                for head in 0..cache.heads {
                    for dim in 0..head_dim {
                        let buffer = which.min(buffers - 1);
                        expected[buffer][cache.at(which, page, slot, head, dim)] =
                            from[(t * cache.heads + head) * head_dim + dim];
                    }
                }
            }
        }

        // The call.
        let total: usize = heads.iter().sum();
        let layouts = match self.packed {
            false => dense,
            true => {
                let starts = [0, heads[0], heads[0] + heads[1]];
                [0, 1, 2].map(|n| {
                    let range = starts[n]..starts[n] + heads[n];
                    Layout::packed_heads(1, tokens, total, head_dim, range)
                        .with_rotary_offset(self.rotary_offset)
                })
            }
        };
        let mut problem = Problem::new(T::DTYPE)
            .q(layouts[0])
            .v_to_cache(layouts[2])
            .cache(cache.planned());
        problem = match self.back {
            true => problem.k(layouts[1]),
            false => problem.k_to_cache(layouts[1]),
        };
        if self.packed {
            problem = problem.one_buffer();
        }
        let plan = rotator.plan(&problem).unwrap();
        let mut caches = vec![vec![untouched; cache.len()]; buffers];
        let operand = match &mut caches[..] {
            [k, v] => HostKvCache::Separate {
                k: Some(k),
                v: Some(v),
            },
            [both] => HostKvCache::OneBuffer(both),
            _ => unreachable!(),
        };
        let mut ends = vec![0i32];
        ends.extend(self.sequences.iter().scan(0, |sum, &n| {
            *sum += n as i32;
            Some(*sum)
        }));
        let per_token: Vec<i64> = positions.clone();
        let call_positions = match self.seed % 2 {
            0 => Positions::start_per_sequence(&self.lengths).cu_seqlens(&ends),
            _ => Positions::per_token(&per_token).cu_seqlens(&ends),
        };
        let mapping: Vec<i64> = places
            .iter()
            .map(|&(s, place)| match self.slot(s, place) {
                Some((page, slot)) => (page * PAGE_SIZE + slot) as i64,
                None => (PAGES * PAGE_SIZE) as i64,
            })
            .chain((0..self.padding).map(|_| 0))
            .collect();
        let table: Vec<i32> = (0..self.sequences.len())
            .flat_map(|s| (0..PAGES).map(move |column| (s, column)))
            .map(|(s, column)| self.page(s, column) as i32)
            .collect();
        let table_u32: Vec<u32> = table.iter().map(|&page| page as u32).collect();
        let indptr: Vec<i32> = (0..=self.sequences.len())
            .map(|s| (s * PAGES) as i32)
            .collect();
        let slots = match self.how {
            How::Mapping => Slots::mapping(&mapping),
            How::Table => Slots::page_table(&table, &self.lengths),
            How::Indices => Slots::page_indices(&indptr, &table_u32, &self.lengths),
        };
        let stored = if self.packed {
            let mut buffer = vec![untouched; tokens * total * head_dim];
            let row = total * head_dim;
            for t in 0..tokens {
                let parts = [(&q, heads[0]), (&k, heads[1]), (&v, heads[2])];
                let mut at = t * row;
                for (from, n) in parts {
                    let len = n * head_dim;
                    buffer[at..at + len].copy_from_slice(&from[t * len..(t + 1) * len]);
                    at += len;
                }
            }
            let before = buffer.clone();
            let stored = rotator
                .append_one_buffer(&plan, &mut buffer, operand, call_positions, slots)
                .unwrap();
            for t in 0..tokens {
                let len = heads[0] * head_dim;
                assert_eq!(
                    buffer[t * row..][..len],
                    expected_q[t * len..][..len],
                    "q of {t}"
                );
                let k_len = heads[1] * head_dim;
                let k_now = &buffer[t * row + len..][..k_len];
                let expected = match self.back && t < places.len() {
                    true => &rotated_k[t * k_len..][..k_len],
                    false => &before[t * row + len..][..k_len],
                };
                assert_eq!(k_now, expected, "k of {t}");
                assert_eq!(
                    buffer[t * row + len + k_len..][..k_len],
                    v[t * k_len..][..k_len]
                );
            }
            stored
        } else {
            let (mut q_now, mut k_now) = (q.clone(), k.clone());
            let k_operand = match self.back {
                true => Appended::InOut(InOut::InPlace(&mut k_now[..])),
                false => Appended::ToCache(&k[..]),
            };
            let stored = rotator
                .append(
                    &plan,
                    Some((&mut q_now).into()),
                    Some(k_operand),
                    Some((&v).into()),
                    operand,
                    call_positions,
                    slots,
                )
                .unwrap();
            assert_eq!(q_now, expected_q);
            if self.back {
                let len = places.len() * heads[1] * head_dim;
                assert_eq!(k_now[..len], rotated_k[..len]);
                assert_eq!(k_now[len..], k[len..]);
            }
            stored
        };
        assert_eq!(stored == Stored::All, all_stored, "{stored:?}");
        assert_eq!(caches, expected);
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let cache = (
        prop::sample::select(vec![
            Kind::Nhd,
            Kind::Hnd,
            Kind::Packed(4),
            Kind::Transposed,
        ]),
        prop::sample::select(vec![
            Pair::Separate,
            Pair::InTurn,
            Pair::InPairs,
            Pair::SideBySide,
            Pair::Layers,
        ]),
        1usize..4,
        prop::sample::select(vec![8usize, 20, 64]),
    )
        .prop_map(|(kind, pair, heads, head_dim)| {
            // Pieces of heads do not lie side by side.
            let pair = match (kind, pair) {
                (Kind::Packed(_) | Kind::Transposed, Pair::SideBySide) => Pair::InPairs,
                _ => pair,
            };
            CacheCase {
                kind,
                pair,
                heads,
                head_dim,
            }
        });
    let sequences = prop::collection::vec((0usize..7, -2i64..18), 1..5);
    (
        cache,
        1usize..5,
        any::<bool>(),
        any::<bool>(),
        sequences,
        0usize..3,
        prop::sample::select(vec![How::Mapping, How::Table, How::Indices]),
        any::<bool>(),
        any::<bool>(),
        any::<u32>(),
    )
        .prop_map(
            |(cache, q_heads, partial, half_split, sequences, padding, how, packed, back, seed)| {
                let head_dim = cache.head_dim;
                let (rotary_dim, rotary_offset) = match partial {
                    true => (head_dim / 2, head_dim / 4 / 2 * 2),
                    false => (head_dim, 0),
                };
                let (sequences, lengths) = sequences.into_iter().unzip();
                Case {
                    cache,
                    q_heads,
                    rotary_dim,
                    rotary_offset,
                    pairing: match half_split {
                        true => Pairing::HalfSplit,
                        false => Pairing::Interleaved,
                    },
                    sequences,
                    padding,
                    lengths,
                    how,
                    packed,
                    back,
                    seed,
                }
            },
        )
        .prop_filter("some token", |case| case.tokens() > 0)
        // Where two tokens of one call have the same slot, order counts: that is another test.
        .prop_filter("slots of their own", |case| {
            let slots: Vec<_> = case
                .places()
                .into_iter()
                .filter_map(|(s, place)| case.slot(s, place))
                .collect();
            let distinct: std::collections::HashSet<_> = slots.iter().collect();
            distinct.len() == slots.len()
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn caches_hold_what_is_worked_out_by_hand(case in cases(), dtype in 0..3) {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let host = Host::new().with_isa(isa).unwrap();
            for threads in [Threads::One, Threads::Pool] {
                let host = host.with_threads(threads);
                match dtype {
                    0 => case.check::<f32>(host),
                    1 => case.check::<f16>(host),
                    _ => case.check::<bf16>(host),
                }
            }
        }
    }
}

/// One sequence of ten tokens, which all have one slot: the last stays, whatever the threads do.
#[test]
fn the_last_token_of_a_slot_stays() {
    let heads = Layout::tokens(4096, 8, 128);
    let cache = CacheLayout::flat(16, 8, 128);
    let problem = Problem::new(Dtype::F32)
        .q(Layout::tokens(4096, 8, 128))
        .k_to_cache(heads)
        .v_to_cache(heads)
        .cache(KvCacheLayout::separate(cache, cache));
    let rotator = Host::new().rotator(&rope(128, Pairing::HalfSplit));
    let plan = rotator.plan(&problem).unwrap();
    let v: Vec<f32> = (0..4096 * 8 * 128)
        .map(|i| (i / (8 * 128)) as f32)
        .collect();
    let k = vec![1.0f32; v.len()];
    let slots: Vec<i64> = (0..4096).map(|t| t % 3).collect();
    for _ in 0..20 {
        let mut q = k.clone();
        let (mut k_cache, mut v_cache) = (vec![0.0; 16 * 1024], vec![0.0f32; 16 * 1024]);
        let stored = rotator
            .append(
                &plan,
                Some((&mut q).into()),
                Some((&k).into()),
                Some((&v).into()),
                HostKvCache::Separate {
                    k: Some(&mut k_cache),
                    v: Some(&mut v_cache),
                },
                Positions::start(0),
                Slots::mapping(&slots),
            )
            .unwrap();
        assert_eq!(stored, Stored::All);
        for (slot, last) in [(0, 4095.0), (1, 4093.0), (2, 4094.0)] {
            assert!(
                v_cache[slot * 1024..(slot + 1) * 1024]
                    .iter()
                    .all(|&x| x == last)
            );
        }
        assert!(v_cache[3 * 1024..].iter().all(|&x| x == 0.0));
    }
}

/// Ids that point anywhere store nothing outside, and say so.
#[test]
fn hostile_slots_stay_inside() {
    let heads = Layout::tokens(3, 1, 8);
    let cache = CacheLayout::paged_nhd(4, 2, 1, 8);
    let problem = Problem::new(Dtype::F32)
        .k_to_cache(heads)
        .cache(KvCacheLayout::k(cache));
    let rotator = Host::new().rotator(&rope(8, Pairing::HalfSplit));
    let plan = rotator.plan(&problem).unwrap();
    let k = vec![1.0f32; 24];
    let hostile = [
        i64::MIN,
        -1,
        8,
        9,
        i64::from(u32::MAX) + 1,
        i64::MAX,
        1 << 40,
    ];
    let run = |slots: Slots<'_>, positions: Positions<'_>| {
        // A cache with room behind it would hide a write.
        let mut cache = vec![0.0f32; 4 * 2 * 8];
        let operand = HostKvCache::Separate {
            k: Some(&mut cache),
            v: None,
        };
        let stored = rotator
            .append(
                &plan,
                None,
                Some((&k).into()),
                None,
                operand,
                positions,
                slots,
            )
            .unwrap();
        (stored, cache.iter().filter(|&&x| x != 0.0).count() / 8)
    };
    for a in hostile {
        for b in hostile {
            let (stored, count) = run(Slots::mapping(&[a, b, 5]), Positions::start(0));
            let outside = [a, b].iter().any(|&slot| slot >= 0);
            assert_eq!((stored == Stored::NotAll, count), (outside, 1), "{a} {b}");
        }
        // Three tokens of one sequence, in pages that are no pages, or past the table.
        let (stored, count) = run(Slots::page_table(&[a, a], &[0i64]), Positions::start(0));
        assert_eq!((stored, count), (Stored::NotAll, 0), "{a}");
        let (stored, count) = run(Slots::page_table(&[3i64, 1], &[a]), Positions::start(0));
        // At -1 the second and third are inside.
        let inside = if a == -1 { 2 } else { 0 };
        assert_eq!((stored, count), (Stored::NotAll, inside), "{a}");
        let (stored, count) = run(
            Slots::page_indices(&[a, a], &[3i64, 1], &[0i64]),
            Positions::start(0),
        );
        assert_eq!((stored, count), (Stored::NotAll, 0), "{a}");
        let (stored, _) = run(
            Slots::page_indices(&[0, a], &[3i64, a], &[1i64]),
            Positions::start(0),
        );
        assert_eq!(stored, Stored::NotAll, "{a}");
    }
}

/// What is behind the ids that are given, and would be in the cache, is not looked at.
#[test]
fn slots_end_where_their_ids_end() {
    let cache = KvCacheLayout::k(CacheLayout::paged_nhd(4, 2, 1, 8));
    let problem = Problem::new(Dtype::F32).cache(cache);
    let rotator = Host::new().rotator(&rope(8, Pairing::HalfSplit));
    let k = vec![1.0f32; 24];
    // The slots that are written, of all pages: two of each.
    let run = |tokens: Layout, positions: Positions<'_>, slots: Slots<'_>| {
        let plan = rotator.plan(&problem.k_to_cache(tokens)).unwrap();
        let mut cache = vec![0.0f32; 4 * 2 * 8];
        let operand = HostKvCache::Separate {
            k: Some(&mut cache),
            v: None,
        };
        let keys = Some((&k).into());
        let stored = rotator
            .append(&plan, None, keys, None, operand, positions, slots)
            .unwrap();
        let written = cache.chunks(8).map(|slot| slot.iter().any(|&x| x != 0.0));
        let written = written.enumerate().filter(|&(_, written)| written);
        (stored, written.map(|(slot, _)| slot).collect::<Vec<_>>())
    };
    let (three, start) = (Layout::tokens(3, 1, 8), Positions::start(0));
    let pages = [3i64, 1, 0];
    let table = |pages, length: &[i64; 1]| run(three, start, Slots::page_table(pages, length));
    assert_eq!(table(&pages[..2], &[0]), (Stored::All, vec![2, 6, 7]));
    assert_eq!(table(&pages[..2], &[1]), (Stored::All, vec![2, 3, 7]));
    assert_eq!(table(&pages[..2], &[3]), (Stored::NotAll, vec![3]));
    assert_eq!(table(&pages[..2], &[4]), (Stored::NotAll, vec![]));
    assert_eq!(table(&pages[..0], &[0]), (Stored::NotAll, vec![]));
    let list = |indptr: &[i64; 2]| run(three, start, Slots::page_indices(indptr, &pages[..], &[0]));
    assert_eq!(list(&[0, 3]), (Stored::All, vec![2, 6, 7]));
    assert_eq!(list(&[1, 3]), (Stored::All, vec![0, 2, 3]));
    assert_eq!(list(&[1, 2]), (Stored::NotAll, vec![2, 3]));
    assert_eq!(list(&[0, 0]), (Stored::NotAll, vec![]));
    // Offsets past the indices end with them.
    let two = Slots::page_indices(&[1, 3], &pages[..2], &[0]);
    assert_eq!(run(three, start, two), (Stored::NotAll, vec![2, 3]));
    // A second sequence, of two tokens behind one that it holds.
    let ragged = start.cu_seqlens(&[0, 1, 3]);
    let both = Slots::page_indices(&[0, 1, 3], &pages[..], &[0, 1]);
    assert_eq!(run(three, ragged, both), (Stored::All, vec![0, 3, 6]));
    let sequence = |length| run(three, start, Slots::sequences(&[length]));
    assert_eq!(sequence(0i64), (Stored::NotAll, vec![0, 1]));
    assert_eq!(sequence(1), (Stored::NotAll, vec![1]));
    assert_eq!(sequence(2), (Stored::NotAll, vec![]));
    // A token of each of three sequences.
    let batch = run(
        Layout::bshd(3, 1, 1, 8),
        start,
        Slots::sequences(&[0, 1, 0]),
    );
    assert_eq!(batch, (Stored::All, vec![0, 3, 4]));
}

#[test]
fn nothing_is_stored_in_a_cache_without_slots() {
    let heads = Layout::tokens(2, 1, 8);
    let rotator = Host::new().rotator(&rope(8, Pairing::HalfSplit));
    let k = vec![1.0f32; 16];
    for [pages, page_size] in [[3, 0], [0, 4], [0, 0]] {
        let problem = Problem::new(Dtype::F32)
            .k_to_cache(heads)
            .cache(KvCacheLayout::k(CacheLayout::paged_nhd(
                pages, page_size, 1, 8,
            )));
        let plan = rotator.plan(&problem).unwrap();
        for (slots, expected) in [
            (Slots::mapping(&[0i64, -1]), Stored::NotAll),
            (Slots::mapping(&[-1i64, -1]), Stored::All),
            (Slots::page_table(&[0i64], &[0i64]), Stored::NotAll),
            (Slots::sequences(&[0i64]), Stored::NotAll),
        ] {
            let operand = HostKvCache::Separate {
                k: Some(&mut []),
                v: None,
            };
            let stored = rotator.append(
                &plan,
                None,
                Some((&k).into()),
                None,
                operand,
                Positions::start(0),
                slots,
            );
            assert_eq!(stored, Ok(expected), "{pages} {page_size}");
        }
    }
}

/// Frequency rows of ragged sequences, and their starts, are those of each sequence.
#[test]
fn what_is_given_per_sequence_follows_the_offsets() {
    let rows = [1.0, 4.0].map(|factor| {
        Frequencies::from_theta(10_000.0 * factor, 8)
            .unwrap()
            .with_attention_factor(factor as f32)
            .unwrap()
    });
    let rope = Rope::new(FrequencyRows::new(&rows).unwrap(), Pairing::HalfSplit);
    let rotator = Host::new().rotator(&rope);
    let plan = rotator
        .plan(&Problem::new(Dtype::F32).q(Layout::tokens(6, 2, 8)))
        .unwrap();
    let x = values::<f32>(6 * 16, 5);
    let mut ragged = x.clone();
    rotator
        .rotate(
            &plan,
            Some((&mut ragged).into()),
            None,
            Positions::start_per_sequence(&[100i64, -3, 7])
                .frequency_rows_per_sequence(&[1, 0, 1])
                .cu_seqlens(&[0u32, 2, 2, 5]),
        )
        .unwrap();
    let mut by_token = x.clone();
    rotator
        .rotate(
            &plan,
            Some((&mut by_token).into()),
            None,
            Positions::per_token(&[100i64, 101, 7, 8, 9, 0])
                .frequency_rows_per_token(&[1, 1, 1, 1, 1, 0]),
        )
        .unwrap();
    assert_eq!(ragged[..5 * 16], by_token[..5 * 16]);
    assert_eq!(ragged[5 * 16..], x[5 * 16..], "padding is not touched");

    // One token, which is the second sequence.
    let problem = Problem::new(Dtype::F32).q(Layout::tokens(1, 2, 8));
    let plan = rotator.plan(&problem).unwrap();
    let rotated = |positions: Positions<'_>| {
        let mut q = x[..16].to_vec();
        rotator
            .rotate(&plan, Some((&mut q).into()), None, positions)
            .unwrap();
        q
    };
    let second = Positions::start_per_sequence(&[100i64, -3])
        .frequency_rows_per_sequence(&[0, 1])
        .cu_seqlens(&[0u32, 0, 1]);
    assert_eq!(
        rotated(second),
        rotated(Positions::start(-3).frequency_row(1))
    );
}

#[test]
fn errors_say_what_to_change() {
    let rotator = Host::new().rotator(&rope(8, Pairing::HalfSplit));
    let heads = Layout::tokens(4, 2, 8);
    let cache = CacheLayout::paged_nhd(3, 2, 2, 8);
    let problem = Problem::new(Dtype::F32).q(heads);
    let fails = |problem: &Problem, phrase: &str| {
        let error = rotator.plan(problem).unwrap_err();
        assert!(error.to_string().contains(phrase), "{error}");
    };
    fails(&problem.k_to_cache(heads), "use Problem::cache");
    fails(
        &problem.cache(KvCacheLayout::k(cache)),
        "no layout to be read from",
    );
    let with_k = problem.k_to_cache(heads);
    let other_heads = CacheLayout::paged_nhd(3, 2, 3, 8);
    fails(
        &with_k.cache(KvCacheLayout::k(other_heads)),
        "heads must be those",
    );
    let other_dim = CacheLayout::paged_nhd(3, 2, 2, 16);
    fails(
        &with_k.cache(KvCacheLayout::k(other_dim)),
        "head_dim must be that",
    );
    fails(
        &with_k.cache(KvCacheLayout::k(cache.with_blocks(3, 8))),
        "blocks must divide",
    );
    fails(
        &with_k.cache(KvCacheLayout::k(cache.with_strides(32, 8, 8))),
        "writes some elements twice",
    );
    let fewer = CacheLayout::paged_nhd(2, 2, 2, 8);
    let both = with_k.v_to_cache(heads);
    fails(
        &both.cache(KvCacheLayout::separate(cache, fewer)),
        "agree in pages",
    );
    fails(
        &both.cache(KvCacheLayout::one_buffer((cache, cache))),
        "k's cache",
    );
    let huge = CacheLayout::paged_nhd(1 << 40, 1 << 40, 2, 8);
    fails(&with_k.cache(KvCacheLayout::k(huge)), "too large");

    let plan = rotator
        .plan(&with_k.cache(KvCacheLayout::k(cache)))
        .unwrap();
    let (mut q, k) = (vec![0.0f32; 64], vec![0.0f32; 64]);
    let mut buffer = vec![0.0f32; 96];
    let mut run = |positions: Positions<'_>, slots: Slots<'_>, len: usize| {
        rotator
            .append(
                &plan,
                Some((&mut q).into()),
                Some((&k).into()),
                None,
                HostKvCache::Separate {
                    k: Some(&mut buffer[..len]),
                    v: None,
                },
                positions,
                slots,
            )
            .map(|_| ())
    };
    let start = Positions::start(0);
    assert_eq!(run(start, Slots::mapping(&[0i64, 1, 2, 3]), 96), Ok(()));
    assert!(matches!(
        run(start, Slots::mapping(&[0i64, 1]), 96),
        Err(Error::SlotsLength {
            expected: 4,
            got: 2,
            ..
        })
    ));
    assert!(matches!(
        run(start, Slots::page_table(&[0i64], &[0i64, 1]), 96),
        Err(Error::SlotsLength {
            expected: 1,
            got: 2,
            ..
        })
    ));
    assert!(matches!(
        run(start, Slots::mapping(&[0i64, 1, 2, 3]), 95),
        Err(Error::BufferTooShort {
            needed: 96,
            got: 95,
            ..
        })
    ));
    let slots = || Slots::mapping(&[0i64, 1, 2, 3]);
    for offsets in [&[0i64][..], &[0, 4], &[0, 3, 3, 4]] {
        assert_eq!(run(start.cu_seqlens(offsets), slots(), 96), Ok(()));
    }
    for (offsets, phrase) in [
        (vec![], "at least one"),
        (vec![1i64, 4], "first must be 0"),
        (vec![0, 3, 2], "at least the one before"),
        (vec![0, 5], "past the planned tokens"),
        (vec![0, -1], "at least the one before"),
    ] {
        let error = run(
            start.cu_seqlens(&offsets),
            Slots::mapping(&[0i64, 1, 2, 3]),
            96,
        )
        .unwrap_err();
        assert!(error.to_string().contains(phrase), "{offsets:?}: {error}");
    }
    // A ragged batch is one sequence of tokens.
    let batch = Problem::new(Dtype::F32).q(Layout::bshd(2, 2, 2, 8));
    let two = rotator.plan(&batch).unwrap();
    let ragged = start.cu_seqlens(&[0, 4]);
    let error = rotator
        .rotate(&two, Some((&mut vec![0.0f32; 64]).into()), None, ragged)
        .unwrap_err();
    assert!(error.to_string().contains("planned as one sequence"));
    // What is planned to append is not rotated, and the other way round.
    let error = rotator
        .rotate(&plan, Some((&mut q).into()), None, Positions::start(0))
        .unwrap_err();
    assert!(matches!(error, Error::AppendMismatch { .. }), "{error}");
}
