//! Cached keys that move to other positions, against doing it by hand: codes made values by
//! `Quantization::dequantize`, a plain rotation of one head, and codes again by `Quantization::quantize`.
//! Where the elements and scales of a cache are is worked out here.

mod support;

use phasor::call::{AngleAddresses, VectorAddress};
use phasor::half::{bf16, f16};
use phasor::launch::Target;
use phasor::quantize::{
    Codes, Quantization, Scale, ScaleForm, ScaleRounding, e8m0_from_scale, e8m0_to_scale,
};
use phasor::{
    Angles, CacheLayout, CosSinTable, Dtype, Element, Error, Frequencies, FrequencyRows, Host,
    HostStep, HostWeights, Isa, KeyScales, KvCacheLayout, Layout, Pairing, Positions, Problem,
    Rope, ScaleLayout, ShiftPlan, SlotRange, Slots, Stored, StoredCodes, TensorName, Threads,
};
use proptest::prelude::*;
use ptx_interpreter::{Launch, Memory, Module};
use std::sync::OnceLock;
use support::cases::{Random, config, host, variants};
use support::oracle::{self, Oracle};

/// Order of a cache in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Nhd,
    Hnd,
    /// Keys and values page by page, in one buffer.
    Pairs,
    /// A gap behind each head, slot and page.
    Gaps,
    /// `[pages, heads, head_dim / x, page_size, x]`.
    Blocks(usize),
}

const FORMS: [Form; 7] = [
    Form::Nhd,
    Form::Hnd,
    Form::Pairs,
    Form::Gaps,
    Form::Blocks(1),
    Form::Blocks(2),
    Form::Blocks(8),
];

/// Where scales that are written are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ScalesAt {
    TokensHeads,
    HeadsTokens,
    /// In the gap behind each head.
    Inline,
}

#[derive(Clone, Copy, Debug)]
enum CodeCase {
    None,
    Given {
        codes: Codes,
        form: ScaleForm,
        each: bool,
    },
    Dynamic {
        codes: Codes,
        form: ScaleForm,
        rounding: ScaleRounding,
        e8m0: bool,
        groups: usize,
        at: ScalesAt,
    },
}

#[derive(Clone, Debug)]
struct Case {
    dtype: Dtype,
    form: Form,
    /// `[pages, page_size, heads, head_dim]`
    shape: [usize; 4],
    rope: Rope,
    rotary_offset: usize,
    codes: CodeCase,
    round_first: bool,
    seed: u64,
}

const FLOOR: f32 = 1e-6;
/// Bytes behind a head with inline scales, and elements of other gaps.
const GAP: usize = 32;

impl Case {
    fn element(&self) -> usize {
        match self.codes {
            CodeCase::None => self.dtype.size(),
            _ => 1,
        }
    }

    fn groups(&self) -> usize {
        match self.codes {
            CodeCase::Dynamic { groups, .. } => groups,
            _ => 1,
        }
    }

    fn layout(&self) -> CacheLayout {
        let [pages, page_size, heads, head_dim] = self.shape;
        let nhd = CacheLayout::paged_nhd(pages, page_size, heads, head_dim);
        match self.form {
            Form::Nhd => nhd,
            Form::Hnd => CacheLayout::paged_hnd(pages, page_size, heads, head_dim),
            Form::Pairs => nhd.in_pairs_of_pages().0,
            Form::Gaps => {
                let [page, slot, head] = self.gaps();
                nhd.with_strides(page, slot, head).with_offset(GAP)
            }
            Form::Blocks(x) => CacheLayout::paged_packed(pages, page_size, heads, head_dim, x),
        }
    }

    fn gaps(&self) -> [usize; 3] {
        let [_, page_size, heads, head_dim] = self.shape;
        let head = head_dim.next_multiple_of(4) + GAP;
        let slot = heads * head + GAP;
        [page_size * slot + GAP, slot, head]
    }

    /// The place of an element in the buffer.
    fn element_at(&self, slot: usize, head: usize, dim: usize) -> usize {
        let [_, page_size, heads, head_dim] = self.shape;
        let (page, slot) = (slot / page_size, slot % page_size);
        match self.form {
            Form::Nhd => ((page * page_size + slot) * heads + head) * head_dim + dim,
            Form::Pairs => ((2 * page * page_size + slot) * heads + head) * head_dim + dim,
            Form::Hnd => ((page * heads + head) * page_size + slot) * head_dim + dim,
            Form::Gaps => {
                let [by_page, by_slot, by_head] = self.gaps();
                GAP + page * by_page + slot * by_slot + head * by_head + dim
            }
            Form::Blocks(x) => {
                let block = (page * heads + head) * (head_dim / x) + dim / x;
                (block * page_size + slot) * x + dim % x
            }
        }
    }

    fn scale_layout(&self, at: ScalesAt, e8m0: bool) -> ScaleLayout {
        let [_, page_size, heads, head_dim] = self.shape;
        let groups = self.groups();
        match at {
            ScalesAt::TokensHeads => ScaleLayout::tokens_heads(page_size, heads, groups),
            ScalesAt::HeadsTokens => ScaleLayout::heads_tokens(page_size, heads, groups),
            ScalesAt::Inline => {
                let size = if e8m0 { 1 } else { 4 };
                let [page, slot, head] = self.gaps().map(|stride| stride / size);
                ScaleLayout::strided(page, slot, head, 1)
                    .with_offset((GAP + head_dim.next_multiple_of(4)) / size)
                    .inline()
            }
        }
    }

    /// The place of a scale in its buffer, or in that of the codes, in bytes.
    fn scale_at(&self, at: ScalesAt, size: usize, slot: usize, head: usize, group: usize) -> usize {
        let [_, page_size, heads, head_dim] = self.shape;
        let groups = self.groups();
        let (page, in_page) = (slot / page_size, slot % page_size);
        size * match at {
            ScalesAt::TokensHeads => (slot * heads + head) * groups + group,
            ScalesAt::HeadsTokens => ((page * heads + head) * page_size + in_page) * groups + group,
            ScalesAt::Inline => {
                let behind = self.element_at(slot, head, 0) + head_dim.next_multiple_of(4);
                return behind + size * group;
            }
        }
    }

    fn cache(&self) -> KvCacheLayout {
        let layout = self.layout();
        let cache = match self.form {
            Form::Pairs => {
                let [pages, page_size, heads, head_dim] = self.shape;
                let nhd = CacheLayout::paged_nhd(pages, page_size, heads, head_dim);
                KvCacheLayout::one_buffer(nhd.in_pairs_of_pages())
            }
            _ => KvCacheLayout::k(layout),
        };
        let codes = match self.codes {
            CodeCase::None => return cache,
            CodeCase::Given { codes, form, .. } => StoredCodes::given(codes, form),
            CodeCase::Dynamic {
                codes,
                form,
                rounding,
                e8m0,
                groups,
                at,
            } => {
                let mut stored = StoredCodes::dynamic(codes, FLOOR, self.scale_layout(at, e8m0))
                    .groups_of(self.shape[3] / groups)
                    .rounded(rounding);
                if form == ScaleForm::Multiply {
                    stored = stored.by_inverse();
                }
                if e8m0 {
                    stored = stored.e8m0();
                }
                stored
            }
        };
        cache.with_k_codes(match self.round_first {
            true => codes.round_first(),
            false => codes,
        })
    }

    /// Bytes of the cache, of its scales, and of given scales: any values, ordinary ones more often.
    fn buffers(&self) -> (Vec<u8>, Vec<u8>, Vec<f32>) {
        let mut random = Random(self.seed);
        let [pages, page_size, heads, _] = self.shape;
        let elements = self.layout().required_len().unwrap() + 2 * GAP;
        let element = |random: &mut Random| -> Vec<u8> {
            let x = match random.below(60) {
                0 => f32::from_bits(random.bits() as u32),
                1 => 0.0,
                _ => random.unit() as f32 * 6.0 - 3.0,
            };
            match self.dtype {
                Dtype::F32 => x.to_le_bytes().into(),
                Dtype::F16 => f16::from_f32(x).to_le_bytes().into(),
                _ => bf16::from_f32(x).to_le_bytes().into(),
            }
        };
        let mut cache: Vec<u8> = match self.codes {
            CodeCase::None => (0..elements).flat_map(|_| element(&mut random)).collect(),
            _ => (0..elements).map(|_| random.bits() as u8).collect(),
        };
        let mut scales = Vec::new();
        let mut given = Vec::new();
        let scale = |random: &mut Random| 2f32.powf(random.unit() as f32 * 20.0 - 15.0);
        match self.codes {
            CodeCase::None => {}
            CodeCase::Given { each, .. } => {
                let count = if each { heads } else { 1 };
                given = (0..count).map(|_| scale(&mut random)).collect();
            }
            CodeCase::Dynamic { e8m0, at, .. } => {
                let size = if e8m0 { 1 } else { 4 };
                if at != ScalesAt::Inline {
                    scales.resize(pages * page_size * heads * self.groups() * size, 0);
                }
                for slot in 0..pages * page_size {
                    for head in 0..heads {
                        for group in 0..self.groups() {
                            let to = self.scale_at(at, size, slot, head, group);
                            let buffer = match at {
                                ScalesAt::Inline => &mut cache,
                                _ => &mut scales,
                            };
                            let scale = scale(&mut random);
                            match e8m0 {
                                true => buffer[to] = (scale.to_bits() >> 23) as u8,
                                false => buffer[to..to + 4].copy_from_slice(&scale.to_le_bytes()),
                            }
                        }
                    }
                }
            }
        }
        (cache, scales, given)
    }

    /// A head rotated by a plain plan, in the element type `T`.
    fn rotated<T: Element>(&self, x: &mut [T], motion: &Motion) {
        let rope = self.rope.shift().unwrap();
        let rotator = host(Isa::Scalar, Threads::One).rotator(&rope);
        let layout = Layout::tokens(1, 1, x.len()).with_rotary_offset(self.rotary_offset);
        let plan = rotator.plan(&Problem::new(T::DTYPE).k(layout)).unwrap();
        let mut at = Positions::per_axis(&motion.distances);
        if let Some(row) = motion.row {
            at = at.frequency_row(row);
        }
        rotator.rotate(&plan, None, Some(x.into()), at).unwrap();
    }

    fn head_by_hand<T: Element>(&self, head: &[u8], motion: &Motion) -> Vec<u8> {
        let mut x: Vec<T> = head.chunks(size_of::<T>()).map(from_bytes).collect();
        self.rotated(&mut x, motion);
        x.iter().flat_map(|x| to_bytes(*x)).collect()
    }

    /// All by hand.
    fn shift_by_hand(&self, cache: &mut [u8], scales: &mut [u8], given: &[f32], moved: &[Moved]) {
        let [_, _, heads, head_dim] = self.shape;
        let size = self.element();
        let window = self.rotary_offset..self.rotary_offset + self.rope.rotary_dim();
        for (slot, motion) in moved {
            for head in 0..heads {
                let places: Vec<usize> = (0..head_dim)
                    .map(|dim| size * self.element_at(*slot, head, dim))
                    .collect();
                let mut read = Vec::new();
                for &at in &places {
                    read.extend_from_slice(&cache[at..at + size]);
                }
                let (after, written) = match self.codes {
                    CodeCase::None => {
                        let after = match self.dtype {
                            Dtype::F32 => self.head_by_hand::<f32>(&read, motion),
                            Dtype::F16 => self.head_by_hand::<f16>(&read, motion),
                            _ => self.head_by_hand::<bf16>(&read, motion),
                        };
                        (after, window.clone())
                    }
                    CodeCase::Given { codes, form, each } => {
                        let scale = given[if each { head } else { 0 }];
                        let rule = Quantization::new(codes, Scale::Static { scale, form });
                        let mut x = vec![0f32; head_dim];
                        rule.dequantize(&read, scale, &mut x).unwrap();
                        self.rotated(&mut x, motion);
                        self.round(&mut x);
                        let mut after = vec![0; head_dim];
                        rule.quantize(&x, &mut after).unwrap();
                        (after, window.clone())
                    }
                    CodeCase::Dynamic {
                        codes,
                        form,
                        rounding,
                        e8m0,
                        groups,
                        at,
                    } => {
                        let floor = FLOOR;
                        let rule = Quantization::new(
                            codes,
                            Scale::Dynamic {
                                floor,
                                form,
                                rounding,
                            },
                        );
                        let dims = head_dim / groups;
                        let scale_size = if e8m0 { 1 } else { 4 };
                        let scale_at = |group| self.scale_at(at, scale_size, *slot, head, group);
                        let mut x = vec![0f32; head_dim];
                        for group in 0..groups {
                            let buffer = if at == ScalesAt::Inline {
                                &*cache
                            } else {
                                &*scales
                            };
                            let from = scale_at(group);
                            let scale = match e8m0 {
                                true => e8m0_to_scale(buffer[from]),
                                false => from_bytes(&buffer[from..from + 4]),
                            };
                            let range = group * dims..(group + 1) * dims;
                            let x = &mut x[range.clone()];
                            rule.dequantize(&read[range], scale, x).unwrap();
                        }
                        self.rotated(&mut x, motion);
                        self.round(&mut x);
                        let mut after = read.clone();
                        let first = window.start / dims;
                        let last = (window.end - 1) / dims;
                        for group in first..=last {
                            let range = group * dims..(group + 1) * dims;
                            let scale =
                                rule.quantize(&x[range.clone()], &mut after[range]).unwrap();
                            let to = scale_at(group);
                            let buffer = match at {
                                ScalesAt::Inline => &mut *cache,
                                _ => &mut *scales,
                            };
                            match e8m0 {
                                true => buffer[to] = e8m0_from_scale(scale).unwrap(),
                                false => buffer[to..to + 4].copy_from_slice(&scale.to_le_bytes()),
                            }
                        }
                        (after, first * dims..(last + 1) * dims)
                    }
                };
                for dim in written {
                    let to = places[dim];
                    cache[to..to + size].copy_from_slice(&after[dim * size..(dim + 1) * size]);
                }
            }
        }
    }

    fn round(&self, x: &mut [f32]) {
        if self.round_first {
            for x in x {
                *x = match self.dtype {
                    Dtype::F32 => *x,
                    Dtype::F16 => f16::narrow(*x).widen(),
                    _ => bf16::narrow(*x).widen(),
                };
            }
        }
    }

    fn shift_on(
        &self,
        host: Host,
        (cache, scales, given): (&mut [u8], &mut [u8], &[f32]),
        ranges: &[SlotRange<'_>],
    ) -> Result<(), Error> {
        let rotator = host.rotator(&self.rope.shift()?);
        let plan = rotator.shift_plan(self.dtype, &self.cache(), self.rotary_offset)?;
        let scales = match self.codes {
            CodeCase::Given { .. } => KeyScales::Given(given),
            CodeCase::Dynamic { at, .. } if at != ScalesAt::Inline => {
                KeyScales::Written(scales.into())
            }
            _ => KeyScales::None,
        };
        rotator.shift_cached(&plan, cache, scales, ranges)
    }
}

fn from_bytes<T: Element>(bytes: &[u8]) -> T {
    let bits = bytes
        .iter()
        .rev()
        .fold(0u32, |bits, &byte| bits << 8 | u32::from(byte));
    // Not by values, which would change what a NaN looks like.
    assert_eq!(size_of::<T>(), bytes.len());
    let mut x = T::default();
    // SAFETY: any bits are an element.
    unsafe {
        let from = (&raw const bits).cast::<u8>();
        (&raw mut x)
            .cast::<u8>()
            .copy_from_nonoverlapping(from, bytes.len());
    }
    x
}

fn to_bytes<T: Element>(x: T) -> Vec<u8> {
    // SAFETY: an element has no padding.
    unsafe { std::slice::from_raw_parts((&raw const x).cast::<u8>(), size_of::<T>()) }.to_vec()
}

#[derive(Clone, Debug, PartialEq)]
struct Motion {
    distances: Vec<i64>,
    row: Option<u32>,
}

type Moved = (usize, Motion);

impl Motion {
    fn range(&self, slots: std::ops::Range<usize>, random: &mut Random) -> SlotRange<'_> {
        let first = self.distances[0];
        let alike = self.distances.iter().all(|&distance| distance == first);
        let range = match alike && random.below(2) == 0 {
            true => SlotRange::new(slots, first),
            false => SlotRange::per_axis(slots, &self.distances),
        };
        match self.row {
            Some(row) => range.frequency_row(row),
            None => range,
        }
    }
}

/// Ranges that cover each slot of `motions` that has one, some of them several times.
fn ranges<'a>(motions: &'a [Option<&Motion>], random: &mut Random) -> Vec<SlotRange<'a>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < motions.len() {
        let alike = motions[at..]
            .iter()
            .take_while(|&other| *other == motions[at])
            .count();
        if let Some(motion) = motions[at] {
            let mut cut = 0;
            while cut < alike {
                let begin = random.below(cut + 1);
                cut += 1 + random.below(alike - cut);
                ranges.push(motion.range(at + begin..at + cut, random));
            }
            ranges.push(motion.range(at..at, random));
        }
        at += alike;
    }
    for i in (1..ranges.len()).rev() {
        ranges.swap(i, random.below(i + 1));
    }
    ranges
}

fn codes() -> impl Strategy<Value = CodeCase> {
    let kind = prop_oneof![Just(Codes::E4m3), Just(Codes::Int8), Just(Codes::Int8Full)];
    let form = prop_oneof![Just(ScaleForm::Divide), Just(ScaleForm::Multiply)];
    let rounding = prop_oneof![
        Just((ScaleRounding::None, false)),
        (
            prop_oneof![
                Just(ScaleRounding::PowerOfTwoUp),
                Just(ScaleRounding::PowerOfTwoDown)
            ],
            any::<bool>()
        ),
    ];
    let at = prop_oneof![
        Just(ScalesAt::TokensHeads),
        Just(ScalesAt::HeadsTokens),
        Just(ScalesAt::Inline),
    ];
    prop_oneof![
        1 => Just(CodeCase::None),
        1 => (kind.clone(), form.clone(), any::<bool>())
            .prop_map(|(codes, form, each)| CodeCase::Given { codes, form, each }),
        2 => (kind, form, rounding, prop_oneof![Just(1usize), Just(2), Just(4)], at).prop_map(
            |(codes, form, (rounding, e8m0), groups, at)| CodeCase::Dynamic {
                codes, form, rounding, e8m0, groups, at,
            }
        ),
    ]
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Plain,
    Inverse,
    Factor,
    Axes,
    Rows,
}

fn rope(source: Source, pairs: usize, pairing: Pairing) -> Rope {
    let frequencies = Frequencies::from_theta(10_000.0, 2 * pairs).unwrap();
    let angles: Angles = match source {
        Source::Plain | Source::Inverse => frequencies.into(),
        Source::Factor => frequencies.with_attention_factor(1.3).unwrap().into(),
        Source::Axes => {
            let of_pair: Vec<usize> = (0..pairs).map(|pair| pair % 3).collect();
            frequencies.with_axes(3, &of_pair).unwrap().into()
        }
        Source::Rows => {
            let long = Frequencies::from_theta(90_000.0, 2 * pairs).unwrap();
            let long = long.with_attention_factor(1.2).unwrap();
            FrequencyRows::new(&[frequencies, long]).unwrap().into()
        }
    };
    let rope = Rope::new(angles, pairing);
    match source {
        Source::Inverse => rope.backward(),
        _ => rope,
    }
}

fn motion(source: Source) -> impl Strategy<Value = Motion> {
    let distance = || prop_oneof![-5000i64..5000, any::<i64>(), Just(-1)];
    let axes = if matches!(source, Source::Axes) { 3 } else { 1 };
    (
        prop::collection::vec(distance(), axes),
        any::<bool>(),
        0u32..2,
    )
        .prop_map(move |(mut distances, alike, row)| {
            if alike {
                let first = distances[0];
                distances.fill(first);
            }
            // By 0 nothing is done, which is tested elsewhere.
            if distances[0] == 0 {
                distances[0] = 1;
            }
            Motion {
                distances,
                row: matches!(source, Source::Rows).then_some(row),
            }
        })
}

fn case() -> impl Strategy<Value = (Case, Vec<Motion>)> {
    let source = prop_oneof![
        4 => Just(Source::Plain),
        1 => Just(Source::Inverse),
        1 => Just(Source::Factor),
        1 => Just(Source::Axes),
        1 => Just(Source::Rows),
    ];
    let pairs = prop_oneof![1usize..24, Just(64), Just(130)];
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
    let pairing = prop_oneof![Just(Pairing::HalfSplit), Just(Pairing::Interleaved)];
    let shape = (
        [1usize..5, 1usize..6, 1usize..4],
        pairs,
        [0usize..12, 0usize..24],
    );
    (
        source,
        shape,
        dtype,
        pairing,
        codes(),
        0..FORMS.len(),
        any::<[bool; 2]>(),
        any::<u64>(),
    )
        .prop_flat_map(
            |(source, shape, dtype, pairing, codes, form, [round_first, whole], seed)| {
                let ([pages, page_size, heads], pairs, [before, after]) = shape;
                let (before, after) = if whole { (0, 0) } else { (2 * before, after) };
                let mut head_dim = before + 2 * pairs + after;
                let mut form = FORMS[form];
                if let CodeCase::Dynamic { groups, at, .. } = codes {
                    head_dim = head_dim.next_multiple_of(groups);
                    if at == ScalesAt::Inline {
                        form = Form::Gaps;
                    }
                }
                if let Form::Blocks(x) = form {
                    head_dim = head_dim.next_multiple_of(8.max(x));
                }
                let case = Case {
                    dtype,
                    form,
                    shape: [pages, page_size, heads, head_dim],
                    rope: rope(source, pairs, pairing),
                    rotary_offset: before,
                    codes,
                    round_first,
                    seed,
                };
                (Just(case), prop::collection::vec(motion(source), 1..4))
            },
        )
}

proptest! {
    #![proptest_config(config(1500))]

    #[test]
    fn moved_keys_are_those_moved_by_hand((case, motions) in case(), seed in any::<u64>()) {
        let mut random = Random(seed);
        let [pages, page_size, ..] = case.shape;
        let mut chosen = None;
        let of_slot: Vec<Option<&Motion>> = (0..pages * page_size)
            .map(|_| {
                if random.below(3) == 0 {
                    chosen = motions.get(random.below(motions.len() + 1));
                }
                chosen
            })
            .collect();
        let moved: Vec<Moved> = of_slot
            .iter()
            .enumerate()
            .filter_map(|(slot, motion)| Some((slot, (*motion)?.clone())))
            .collect();
        let ranges = ranges(&of_slot, &mut random);
        let (cache, scales, given) = case.buffers();
        let (mut expected, mut expected_scales) = (cache.clone(), scales.clone());
        case.shift_by_hand(&mut expected, &mut expected_scales, &given, &moved);
        for isa in variants() {
            // Where an element may begin.
            let mut room = vec![0u32; cache.len().div_ceil(4)];
            // SAFETY: any bytes are words.
            let got = unsafe {
                std::slice::from_raw_parts_mut(room.as_mut_ptr().cast::<u8>(), cache.len())
            };
            got.copy_from_slice(&cache);
            let mut scale_room = vec![0u32; scales.len().div_ceil(4)];
            // SAFETY: as above.
            let got_scales = unsafe {
                std::slice::from_raw_parts_mut(scale_room.as_mut_ptr().cast::<u8>(), scales.len())
            };
            got_scales.copy_from_slice(&scales);
            let buffers = (&mut *got, &mut *got_scales, &given[..]);
            case.shift_on(host(isa, Threads::Pool), buffers, &ranges)?;
            prop_assert!(got == expected, "{} of {moved:?}", isa.name());
            prop_assert!(got_scales == expected_scales, "{}, scales of {moved:?}", isa.name());
        }
    }
}

fn plain(pairs: usize) -> Rope {
    rope(Source::Plain, pairs, Pairing::HalfSplit)
}

/// Large enough to be shared by threads.
#[test]
fn threads_share_slots() {
    let case = |codes| Case {
        dtype: Dtype::Bf16,
        form: Form::Hnd,
        shape: [64, 64, 4, 128],
        rope: plain(64),
        rotary_offset: 0,
        codes,
        round_first: false,
        seed: 5,
    };
    let dynamic = CodeCase::Dynamic {
        codes: Codes::E4m3,
        form: ScaleForm::Divide,
        rounding: ScaleRounding::None,
        e8m0: false,
        groups: 1,
        at: ScalesAt::TokensHeads,
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(3)
        .build()
        .unwrap();
    for case in [case(CodeCase::None), case(dynamic)] {
        let ranges: Vec<_> = (0..60)
            .map(|n| SlotRange::new(70 * n..70 * n + 60, 1 + n as i64 % 7))
            .filter(|range| *range != SlotRange::new(0..60, 0))
            .take(57)
            .collect();
        let run = |threads| {
            let (cache, scales, given) = case.buffers();
            let mut words: Vec<u32> = cache.chunks(4).map(from_word).collect();
            let mut scale_words: Vec<u32> = scales.chunks(4).map(from_word).collect();
            let buffers = (as_bytes(&mut words), as_bytes(&mut scale_words), &given[..]);
            case.shift_on(host(Isa::best(), threads), buffers, &ranges)
                .unwrap();
            (words, scale_words)
        };
        let alone = run(Threads::One);
        assert!(pool.install(|| run(Threads::Pool)) == alone);
        let untouched: Vec<u32> = case.buffers().0.chunks(4).map(from_word).collect();
        assert!(alone.0 != untouched);
    }
}

fn from_word(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, &byte| word << 8 | u32::from(byte))
}

fn as_bytes(words: &mut [u32]) -> &mut [u8] {
    let len = size_of_val(words);
    // SAFETY: any bytes are words.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), len) }
}

/// Keys stored at `p` and moved by `d` are those stored at `p + d`, up to one more rounding of each pair.
fn moved_is_stored_there<T: Element>(
    codes: Option<(Codes, StoredCodes, Option<&[f32]>)>,
    bound: impl Fn(f32, [f32; 3]) -> f32,
) where
    for<'a> phasor::HostBytes<'a>: From<&'a mut [T]>,
{
    let (tokens, heads, dims) = (23usize, 2usize, 64usize);
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, dims).unwrap(),
        Pairing::Interleaved,
    );
    let layout = CacheLayout::paged_nhd(4, 8, heads, dims);
    let mut cache = KvCacheLayout::k(layout);
    if let Some((_, codes, _)) = codes {
        cache = cache.with_k_codes(codes);
    }
    let rotator = Host::new().rotator(&rope);
    let problem = Problem::new(T::DTYPE)
        .k_to_cache(Layout::tokens(tokens, heads, dims))
        .cache(cache);
    let plan = rotator.plan(&problem).unwrap();
    let mut random = Random(11);
    let keys: Vec<T> = (0..tokens * heads * dims)
        .map(|_| T::narrow(random.unit() as f32 * 2.0 - 1.0))
        .collect();
    let slots: Vec<i64> = (0..tokens as i64).map(|n| n + 3).collect();
    let given = codes.and_then(|(.., given)| given);
    let at = |start: i64, shift: i64| {
        let mut scales = vec![0f32; 32 * heads];
        let mut elements = vec![T::default(); layout.required_len().unwrap()];
        let mut bytes = vec![0u8; elements.len()];
        let mut step = HostStep::new(Positions::start(start))
            .k(&keys[..])
            .slots(Slots::mapping(&slots));
        match codes {
            None => step = step.k_cache(&mut elements[..]),
            Some(_) => step = step.k_cache(&mut bytes),
        }
        match (codes, given) {
            (None, _) => {}
            (_, Some(given)) => step = step.k_weights(HostWeights::new().scales(given)),
            (_, None) => step = step.k_scales(&mut scales),
        }
        assert_eq!(rotator.step(&plan, step).unwrap(), Stored::All);
        let ranges = [SlotRange::new(3..3 + tokens, shift)];
        let moving = Host::new().rotator(&rope.shift().unwrap());
        let plan = moving.shift_plan(T::DTYPE, &cache, 0).unwrap();
        let with = match (codes, given) {
            (None, _) => KeyScales::None,
            (_, Some(given)) => KeyScales::Given(given),
            (_, None) => KeyScales::Written((&mut scales).into()),
        };
        match codes {
            None => moving
                .shift_cached(&plan, &mut elements[..], with, &ranges)
                .unwrap(),
            Some(_) => moving
                .shift_cached(&plan, &mut bytes, with, &ranges)
                .unwrap(),
        }
        let mut values = Vec::new();
        let mut used = Vec::new();
        let all = 3 * heads..(3 + tokens) * heads;
        let of_heads = scales.iter().enumerate();
        for (head, &written) in of_heads.filter(|(head, _)| all.contains(head)) {
            let range = head * dims..(head + 1) * dims;
            let scale = given.map_or(written, |given| given[0]);
            used.push(scale);
            match codes {
                None => values.extend(elements[range].iter().map(|x| x.widen())),
                Some((kind, ..)) => {
                    let mut x = vec![0f32; dims];
                    let rule = Quantization::new(kind, Scale::fixed(scale));
                    rule.dequantize(&bytes[range], scale, &mut x).unwrap();
                    values.extend(x);
                }
            }
        }
        (values, used)
    };
    let (stored, first_scales) = at(700, 0);
    let (moved, second_scales) = at(700, -650);
    let (there, third_scales) = at(50, 0);
    assert!(stored != moved);
    for (n, (moved, there)) in moved.chunks(2).zip(there.chunks(2)).enumerate() {
        let head = 2 * n / dims;
        let scales = [&first_scales, &second_scales, &third_scales].map(|scales| scales[head]);
        let norm = there[0].hypot(there[1]);
        for (moved, there) in moved.iter().zip(there) {
            let (error, bound) = ((moved - there).abs(), bound(norm, scales));
            assert!(
                error <= bound,
                "pair {n}: {moved} and {there}, {error} > {bound}"
            );
        }
    }
}

#[test]
fn keys_that_moved_are_those_stored_elsewhere() {
    // One rounding of both members before, one after, and one of what is compared with: of a pair's norm
    // the unit roundoff each, and what f32 adds. What is stored differs from what is compared with by that
    // too, so the norm is one of several.
    let relative = |unit: f32| move |norm: f32, _: [f32; 3]| norm * (3.1 * unit + 1e-6);
    moved_is_stored_there::<f32>(None, relative(2f32.powi(-24)));
    moved_is_stored_there::<f16>(None, relative(2f32.powi(-11)));
    moved_is_stored_there::<bf16>(None, relative(2f32.powi(-8)));
    // Half a step of each scale; both members of a pair before, one after.
    let steps =
        |_: f32, [first, second, third]: [f32; 3]| 0.5 * (1.415 * first + second + third) + 1e-6;
    let scales = ScaleLayout::tokens_heads(8, 2, 1);
    let int8 = StoredCodes::dynamic(Codes::Int8, 1e-6, scales);
    moved_is_stored_there::<bf16>(Some((Codes::Int8, int8, None)), steps);
    let given = StoredCodes::given(Codes::Int8, ScaleForm::Divide);
    moved_is_stored_there::<f32>(Some((Codes::Int8, given, Some(&[0.012]))), steps);
    // Three significant bits and one implied: 2^-4 of a value, or half of the smallest code.
    let eighths = |norm: f32, [first, second, third]: [f32; 3]| {
        0.0625 * 3.2 * norm + 2f32.powi(-10) * (1.415 * first + second + third)
    };
    let e4m3 = StoredCodes::dynamic(Codes::E4m3, 1e-6, scales);
    moved_is_stored_there::<f16>(Some((Codes::E4m3, e4m3, None)), eighths);
}

/// Relative error of heads of 128 dims, root of the mean of squares, against f64 at the exact angles: as
/// stored, after a shift and after a hundred.
fn errors(codes: Codes, scale: Option<f32>) -> [f64; 3] {
    let (slots, dims) = (200, 128);
    let frequencies = Frequencies::from_theta(10_000.0, dims).unwrap();
    let rope = Rope::new(frequencies, Pairing::HalfSplit);
    let oracle = Oracle::from_theta(10_000.0, dims);
    let stored = match scale {
        Some(_) => StoredCodes::given(codes, ScaleForm::Divide),
        None => StoredCodes::dynamic(codes, 1e-6, ScaleLayout::tokens_heads(slots, 1, 1)),
    };
    let layout = KvCacheLayout::k(CacheLayout::flat(slots, 1, dims)).with_k_codes(stored);
    let rotator = Host::new().rotator(&rope);
    let plan = rotator.shift_plan(Dtype::F32, &layout, 0).unwrap();
    let mut random = Random(3);
    let mut heads = Vec::new();
    for _ in 0..slots {
        let x: Vec<f64> = (0..dims)
            .map(|_| (0..12).map(|_| random.unit()).sum::<f64>() - 6.0)
            .collect();
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
        heads.push(x.iter().map(|x| (x / norm) as f32).collect::<Vec<f32>>());
    }
    let rule = |scale| Quantization::new(codes, scale);
    let mut keys = vec![0u8; slots * dims];
    let mut scales = vec![scale.unwrap_or(0.0); if scale.is_some() { 1 } else { slots }];
    for (slot, head) in heads.iter().enumerate() {
        let codes = &mut keys[slot * dims..(slot + 1) * dims];
        match scale {
            Some(scale) => {
                rule(Scale::fixed(scale)).quantize(head, codes).unwrap();
            }
            None => scales[slot] = rule(Scale::dynamic(1e-6)).quantize(head, codes).unwrap(),
        }
    }
    let error = |keys: &[u8], scales: &[f32], position: i64| {
        let mut sum = 0.0;
        for (slot, head) in heads.iter().enumerate() {
            let scale = scales[slot.min(scales.len() - 1)];
            let mut got = vec![0f32; dims];
            rule(Scale::fixed(scale))
                .dequantize(&keys[slot * dims..(slot + 1) * dims], scale, &mut got)
                .unwrap();
            for pair in 0..dims / 2 {
                let (a, b) = oracle::half_split(pair, dims / 2);
                let (sin, cos) = oracle.radians(pair, position).sin_cos();
                let (x, y) = oracle::rotate(f64::from(head[a]), f64::from(head[b]), cos, sin);
                sum += (f64::from(got[a]) - x).powi(2) + (f64::from(got[b]) - y).powi(2);
            }
        }
        (sum / slots as f64).sqrt()
    };
    let mut found = [error(&keys, &scales, 0); 3];
    let mut position = 0;
    for n in 1..=100 {
        let distance = random.below(2000) as i64 - 1000;
        position += distance;
        let ranges = [SlotRange::new(0..slots, distance)];
        let given = match scale {
            Some(_) => KeyScales::Given(&scales),
            None => KeyScales::Written((&mut scales).into()),
        };
        rotator
            .shift_cached(&plan, &mut keys, given, &ranges)
            .unwrap();
        match n {
            1 => found[1] = error(&keys, &scales, position),
            100 => found[2] = error(&keys, &scales, position),
            _ => {}
        }
    }
    found
}

/// What the documentation of `shift_cached` says of it.
#[test]
fn errors_grow_like_the_root_of_the_number_of_shifts() {
    // Given scales such that 4.5 deviations of a dim have a code.
    let reach = 4.5 / 128f32.sqrt();
    for (codes, scale, expected) in [
        (Codes::E4m3, None, [0.0259, 0.0369, 0.258]),
        (Codes::E4m3, Some(reach / 448.0), [0.0262, 0.0369, 0.233]),
        (Codes::Int8, None, [0.0064, 0.0091, 0.0648]),
        (Codes::Int8, Some(reach / 127.0), [0.0102, 0.0145, 0.101]),
    ] {
        let found = errors(codes, scale);
        println!("{codes:?} {scale:?} {found:?}");
        for (found, expected) in found.into_iter().zip(expected) {
            assert!(
                (found / expected - 1.0).abs() < 0.1,
                "{codes:?} {scale:?}: {found}"
            );
        }
    }
}

/// One error for what is wrong, and nothing is written.
#[test]
fn what_is_wrong_is_refused_before_anything_is_written() {
    let rope = plain(8);
    let rotator = Host::new().rotator(&rope);
    let layout = CacheLayout::paged_nhd(4, 8, 2, 20);
    let cache = KvCacheLayout::k(layout);
    let plan = rotator.shift_plan(Dtype::F32, &cache, 2).unwrap();
    assert_eq!(plan.slots(), 32);
    let good = SlotRange::new(0..8, 5);
    let mut keys = vec![1.5f32; layout.required_len().unwrap()];
    let mut refused = |ranges: &[SlotRange<'_>]| {
        let scales = KeyScales::None;
        let error = rotator
            .shift_cached(&plan, &mut keys, scales, ranges)
            .unwrap_err();
        assert!(keys.iter().all(|&x| x == 1.5), "{error}");
        error
    };
    let no_range = |first, end| Error::SlotRange {
        first,
        end,
        slots: 32,
    };
    let reversed = std::ops::Range { start: 7, end: 3 };
    for (slots, expected) in [
        (30..33, no_range(30, 33)),
        (33..33, no_range(33, 33)),
        (0..usize::MAX, no_range(0, usize::MAX)),
        (usize::MAX..usize::MAX, no_range(usize::MAX, usize::MAX)),
        (reversed, no_range(7, 3)),
    ] {
        assert_eq!(refused(&[good, SlotRange::new(slots, 5)]), expected);
    }
    for (other, slot) in [
        (SlotRange::new(7..9, 4), 7),
        (SlotRange::new(0..32, 0), 0),
        (SlotRange::new(3..4, -5), 3),
    ] {
        let differ = Error::SlotRangesDiffer { slot };
        assert_eq!(refused(&[good, other]), differ);
        assert_eq!(
            refused(&[other, SlotRange::new(20..32, 1), good]),
            Error::SlotRangesDiffer { slot }
        );
    }
    let two = [1, 2];
    let axes = Error::ShiftAxes { axes: 1, got: 2 };
    assert_eq!(refused(&[SlotRange::per_axis(0..4, &two)]), axes);
    assert!(matches!(
        refused(&[good.frequency_row(0)]),
        Error::FrequencyRows { .. }
    ));

    let with_rows = self::rope(Source::Rows, 8, Pairing::HalfSplit)
        .shift()
        .unwrap();
    let of_rows = Host::new().rotator(&with_rows);
    let row_plan = of_rows.shift_plan(Dtype::F32, &cache, 2).unwrap();
    for (range, expected) in [
        (
            good.frequency_row(2),
            Error::FrequencyRowOutOfRange { row: 2, rows: 2 },
        ),
        (
            good,
            of_rows
                .shift_cached(&row_plan, &mut keys, KeyScales::None, &[good])
                .unwrap_err(),
        ),
    ] {
        let ranges = [SlotRange::new(8..9, 1).frequency_row(1), range];
        let got = of_rows.shift_cached(&row_plan, &mut keys, KeyScales::None, &ranges);
        assert_eq!(got, Err(expected));
    }
    let rows = [
        good.frequency_row(0),
        SlotRange::new(2..4, 5).frequency_row(1),
    ];
    let got = of_rows.shift_cached(&row_plan, &mut keys, KeyScales::None, &rows);
    assert_eq!(got, Err(Error::SlotRangesDiffer { slot: 2 }));
    let got = rotator.shift_cached(&row_plan, &mut keys, KeyScales::None, &[good]);
    assert_eq!(got, Err(Error::PlanMismatch));
    assert!(keys.iter().all(|&x| x == 1.5));

    // Of no distance, of no slots, or of none at all: nothing is done.
    for ranges in [
        &[][..],
        &[SlotRange::new(0..32, 0)],
        &[SlotRange::new(32..32, 9)],
    ] {
        rotator
            .shift_cached(&plan, &mut keys, KeyScales::None, ranges)
            .unwrap();
        assert!(keys.iter().all(|&x| x == 1.5));
    }
    rotator
        .shift_cached(&plan, &mut keys, KeyScales::None, &[good])
        .unwrap();
    assert!(keys[..8 * 40].iter().any(|&x| x != 1.5) && keys[8 * 40..].iter().all(|&x| x == 1.5));
}

#[test]
fn what_does_not_fit_is_refused() {
    let rotator = Host::new().rotator(&plain(8));
    let layout = CacheLayout::paged_nhd(4, 8, 2, 20);
    let keys = KvCacheLayout::k(layout);
    let planned = |cache, offset| rotator.shift_plan(Dtype::F16, &cache, offset).unwrap_err();
    let values = KvCacheLayout::v(layout);
    assert!(matches!(
        planned(values, 0),
        Error::CacheMissing {
            tensor: TensorName::K,
            ..
        }
    ));
    assert!(matches!(planned(keys, 6), Error::RotaryWindow { .. }));
    assert!(matches!(planned(keys, 3), Error::RotaryWindow { .. }));
    let blocks = KvCacheLayout::k(layout.with_blocks(3, 7));
    assert!(matches!(planned(blocks, 0), Error::CacheBlocks { .. }));
    let twice = KvCacheLayout::k(layout.with_strides(320, 40, 19));
    assert!(matches!(planned(twice, 0), Error::SelfOverlap { .. }));
    let scales = ScaleLayout::strided(1 << 20, 1 << 10, 0, 1);
    let shared = keys.with_k_codes(StoredCodes::dynamic(Codes::Int8, 0.0, scales));
    assert!(matches!(planned(shared, 0), Error::SelfOverlap { .. }));
    let inside = ScaleLayout::strided(80, 10, 5, 1).inline();
    let inside = keys.with_k_codes(StoredCodes::dynamic(Codes::Int8, 0.0, inside));
    assert!(matches!(planned(inside, 0), Error::Overlap { .. }));

    // What keys have of their rotation already, and what has no shift.
    let table = CosSinTable::new(vec![1.0; 8], vec![0.0; 8], 8).unwrap();
    let by_position =
        FrequencyRows::new(&[1e4, 1e5].map(|theta| Frequencies::from_theta(theta, 16).unwrap()));
    let by_position = by_position.unwrap().by_position(9).unwrap();
    let other_pairing = plain(8).with_output_pairing(Pairing::Interleaved);
    for (rope, moves) in [
        (rope(Source::Factor, 8, Pairing::HalfSplit), true),
        (rope(Source::Rows, 8, Pairing::HalfSplit), true),
        (other_pairing, true),
        (Rope::new(table, Pairing::HalfSplit), false),
        (Rope::new(by_position, Pairing::HalfSplit), false),
    ] {
        let got = ShiftPlan::new(&rope, Dtype::F16, &keys, 0).unwrap_err();
        match moves {
            true => {
                assert_eq!(got, Error::NotAShift);
                ShiftPlan::new(&rope.shift().unwrap(), Dtype::F16, &keys, 0).unwrap();
            }
            false => assert_eq!(Err(got), rope.shift().map(|_| ())),
        }
    }

    let (mut elements, mut bytes) = (vec![f16::ONE; 1280], vec![7u8; 1536]);
    let range = [SlotRange::new(0..32, 1)];
    let plan = |cache| rotator.shift_plan(Dtype::F16, &cache, 0).unwrap();
    let of_elements = plan(keys);
    let dynamic = StoredCodes::dynamic(Codes::E4m3, 0.0, ScaleLayout::tokens_heads(8, 2, 1));
    let of_dynamic = plan(keys.with_k_codes(dynamic));
    let of_given = plan(keys.with_k_codes(StoredCodes::given(Codes::E4m3, ScaleForm::Divide)));
    let gaps = layout.with_strides(384, 48, 24);
    let inline = ScaleLayout::strided(96, 12, 6, 1).with_offset(5).inline();
    let inline = StoredCodes::dynamic(Codes::E4m3, 0.0, inline);
    let of_inline = plan(KvCacheLayout::k(gaps).with_k_codes(inline));
    let mut scales = vec![1f32; 64];
    let mut wrong = |plan: &ShiftPlan, len: usize, given: Option<usize>, written: Option<usize>| {
        let with = match (given, written) {
            (Some(len), _) => KeyScales::Given(&[0.5; 9][..len]),
            (_, Some(len)) => KeyScales::Written((&mut scales[..len]).into()),
            _ => KeyScales::None,
        };
        let got = rotator.shift_cached(plan, &mut bytes[..len], with, &range);
        if got.is_err() {
            assert!(bytes.iter().all(|&byte| byte == 7) && scales.iter().all(|&x| x == 1.0));
        }
        got.err()
    };
    let short = |needed, got| {
        Some(Error::BufferTooShort {
            what: "k's cache",
            needed,
            got,
        })
    };
    let lengths = |what, expected, or, got| {
        let tensor = TensorName::K;
        Some(Error::StageLength {
            tensor,
            what,
            expected,
            or,
            got,
        })
    };
    let is_stages = |error| {
        matches!(
            error,
            Some(Error::Stages {
                tensor: TensorName::K,
                ..
            })
        )
    };
    assert_eq!(wrong(&of_dynamic, 1279, None, Some(64)), short(1280, 1279));
    assert_eq!(
        wrong(&of_dynamic, 1280, None, Some(63)),
        lengths("buffer of scales", 64, None, 63)
    );
    assert!(is_stages(wrong(&of_dynamic, 1280, None, None)));
    assert!(is_stages(wrong(&of_dynamic, 1280, Some(1), None)));
    assert!(is_stages(wrong(&of_given, 1280, None, None)));
    assert!(is_stages(wrong(&of_given, 1280, None, Some(1))));
    assert_eq!(
        wrong(&of_given, 1280, Some(3), None),
        lengths("scales", 2, Some(1), 3)
    );
    assert_eq!(
        wrong(&of_given, 1280, Some(0), None),
        lengths("scales", 2, Some(1), 0)
    );
    assert!(is_stages(wrong(&of_inline, 1536, None, Some(64))));
    let with = KeyScales::Given(&[1.0]);
    let got = rotator.shift_cached(&of_elements, &mut elements, with, &range);
    assert!(is_stages(got.err()));
    let got = rotator.shift_cached(&of_elements, &mut elements[1..], KeyScales::None, &range);
    assert_eq!(got.err(), short(1280, 1279));
    let got = rotator.shift_cached(&of_elements, &mut [0f32; 1280][..], KeyScales::None, &range);
    assert!(matches!(got, Err(Error::BufferType { .. })));
    let got = rotator.shift_cached(
        &of_elements,
        &mut vec![bf16::ONE; 1280],
        KeyScales::None,
        &range,
    );
    assert!(matches!(got, Err(Error::BufferType { .. })));

    // Scales behind the last codes count.
    let needed = 3 * 384 + 7 * 48 + 24 + 24;
    let mut inline_bytes = vec![7u8; needed];
    let got = rotator.shift_cached(&of_inline, &mut inline_bytes[1..], KeyScales::None, &range);
    assert_eq!(got.err(), short(needed, needed - 1));
    rotator
        .shift_cached(&of_inline, &mut inline_bytes, KeyScales::None, &range)
        .unwrap();
    let problem = Problem::new(Dtype::F16)
        .k_to_cache(Layout::tokens(1, 2, 20))
        .cache(KvCacheLayout::k(gaps).with_k_codes(inline));
    let append = rotator.plan(&problem).unwrap();
    let (k, slots) = (vec![f16::ONE; 40], [31]);
    let step = HostStep::new(Positions::start(0))
        .k(&k)
        .k_cache(&mut inline_bytes[1..])
        .slots(Slots::mapping(&slots));
    assert_eq!(
        rotator.step(&append, step),
        Err(short(needed, needed - 1).unwrap())
    );
}

/// The module of a kernel, parsed once.
fn module(kernel: &str) -> &'static Module {
    macro_rules! modules {
        ($($name:literal),*) => {
            [$(($name, include_str!(concat!("../cuda/prebuilt/", $name, ".compute_80.ptx")))),*]
        };
    }
    const TEXTS: [(&str, &str); 6] = modules!(
        "rope_f32",
        "rope_f16",
        "rope_bf16",
        "fused_f32",
        "fused_f16",
        "fused_bf16"
    );
    static PARSED: [OnceLock<Module>; TEXTS.len()] = [const { OnceLock::new() }; TEXTS.len()];
    let at = TEXTS.iter().position(|(name, _)| kernel.starts_with(name));
    let at = at.unwrap_or_else(|| panic!("{kernel} is of no module"));
    PARSED[at].get_or_init(|| Module::parse(TEXTS[at].1).unwrap())
}

proptest! {
    #![proptest_config(config(250))]

    /// The launches of a plan, in the interpreter, leave what the host does.
    #[test]
    fn kernels_move_what_the_host_moves((case, mut motions) in case(), seed in any::<u64>()) {
        for motion in &mut motions {
            let distance = motion.distances[0];
            motion.distances.fill(distance);
        }
        let mut random = Random(seed);
        let slots = case.shape[0] * case.shape[1];
        let mut chosen = motions.first();
        let of_slot: Vec<_> = (0..slots)
            .map(|_| {
                if random.below(4) == 0 {
                    chosen = motions.get(random.below(motions.len() + 1));
                }
                chosen
            })
            .collect();
        let ranges = ranges(&of_slot, &mut random);

        let (cache, scales, given) = case.buffers();
        let (mut expected, mut expected_scales): (Vec<u32>, Vec<u32>) = (
            cache.chunks(4).map(from_word).collect(),
            scales.chunks(4).map(from_word).collect(),
        );
        let on_host = (
            &mut as_bytes(&mut expected)[..cache.len()],
            &mut as_bytes(&mut expected_scales)[..scales.len()],
            &given[..],
        );
        case.shift_on(Host::new(), on_host, &ranges).unwrap();

        let rope = case.rope.shift().unwrap();
        let plan = ShiftPlan::new(&rope, case.dtype, &case.cache(), case.rotary_offset).unwrap();
        let mut memory = Memory::new();
        let address = memory.add("keys", cache.clone(), 0);
        let words = |x: &[u64]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let floats = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (steps, factors) = match rope.angles() {
            Angles::Exact(frequencies) => (words(frequencies.steps()), Vec::new()),
            Angles::Rows(rows) => (words(rows.steps()), floats(rows.attention_factors())),
            other => panic!("{other:?} is not one of these"),
        };
        let angles = AngleAddresses::Steps {
            steps: memory.add("steps", steps, 0),
            factors: memory.add("factors", factors, 0),
        };
        let scale_buffer = match case.codes {
            CodeCase::Given { .. } => {
                let address = memory.add("given scales", floats(&given), 0);
                Some(VectorAddress { address, len: given.len() })
            }
            CodeCase::Dynamic { at, e8m0, .. } if at != ScalesAt::Inline => {
                let address = memory.add("scales", scales.clone(), 0);
                let size = if e8m0 { 1 } else { 4 };
                Some(VectorAddress { address, len: scales.len() / size })
            }
            _ => None,
        };
        let calls = plan.calls(address, scale_buffer, angles, &ranges).unwrap();
        prop_assert!(calls.len() <= 3 * slots);
        for call in calls {
            let launch = call.launch(&Target::new(132));
            let name = launch.kernel.name();
            let mut parameters = launch.params.as_bytes().to_vec();
            if let Some(fusion) = &launch.fusion {
                parameters.extend_from_slice(fusion.as_bytes());
            }
            let mut run = Launch::new(&name, launch.grid, launch.block, &parameters);
            run.dynamic_shared = launch.shared_bytes as usize;
            ptx_interpreter::run(module(&name), &mut memory, &run).unwrap();
        }
        prop_assert!(memory.bytes(address) == &as_bytes(&mut expected)[..cache.len()]);
        if let (Some(buffer), CodeCase::Dynamic { .. }) = (scale_buffer, case.codes) {
            let expected = &as_bytes(&mut expected_scales)[..scales.len()];
            prop_assert!(memory.bytes(buffer.address) == expected, "scales");
        }
    }
}

#[test]
fn what_kernels_do_not_move_is_refused() {
    let angles = AngleAddresses::Steps {
        steps: 4096,
        factors: 4096,
    };
    let rope = rope(Source::Axes, 32, Pairing::HalfSplit);
    let layout = CacheLayout::paged_hnd(5, 16, 2, 64);
    let cache = KvCacheLayout::k(layout);
    let calls = |cache: &KvCacheLayout, ranges: &[SlotRange<'_>]| {
        let plan = ShiftPlan::new(&rope, Dtype::Bf16, cache, 0).unwrap();
        plan.calls(1 << 20, None, angles, ranges)
            .map(|calls| calls.len())
    };
    let on_host = |what| Err(Error::ShiftOnHost { what });
    let range = SlotRange::new(3..70, 2);
    // Part of a page, whole pages, part of a page; the first two are one where pages are like slots.
    assert_eq!(calls(&cache, &[range]), Ok(3));
    let flat = KvCacheLayout::k(CacheLayout::paged_nhd(5, 16, 2, 64));
    assert_eq!(calls(&flat, &[range]), Ok(1));
    assert_eq!(
        calls(
            &flat,
            &[range, SlotRange::new(70..80, 2), SlotRange::new(0..3, 1)]
        ),
        Ok(2)
    );
    assert_eq!(calls(&cache, &[SlotRange::new(0..80, 2)]), Ok(1));
    assert_eq!(calls(&cache, &[SlotRange::new(17..20, 2)]), Ok(1));
    assert_eq!(calls(&cache, &[SlotRange::new(0..80, 0)]), Ok(0));
    let (alike, unlike) = ([2, 2, 2], [2, 2, 1]);
    assert_eq!(calls(&cache, &[SlotRange::per_axis(3..70, &alike)]), Ok(3));
    let what = "distances that differ by axis";
    assert_eq!(
        calls(&cache, &[SlotRange::per_axis(3..70, &unlike)]),
        on_host(what)
    );
    let past = SlotRange::new(3..81, 2);
    let expected = Error::SlotRange {
        first: 3,
        end: 81,
        slots: 80,
    };
    assert_eq!(calls(&cache, &[past]), Err(expected));

    // Scales have to follow each other like slots, too.
    let coded = |cache: KvCacheLayout, codes: StoredCodes, scales: Option<VectorAddress>| {
        let cache = cache.with_k_codes(codes);
        let plan = ShiftPlan::new(&rope, Dtype::Bf16, &cache, 0).unwrap();
        plan.calls(1 << 20, scales, angles, &[range])
            .map(|calls| calls.len())
    };
    let scales = |address, len| Some(VectorAddress { address, len });
    let tokens_heads =
        StoredCodes::dynamic(Codes::Int8, FLOOR, ScaleLayout::tokens_heads(16, 2, 1));
    let heads_tokens =
        StoredCodes::dynamic(Codes::Int8, FLOOR, ScaleLayout::heads_tokens(16, 2, 1));
    assert_eq!(coded(flat, tokens_heads, scales(4096, 160)), Ok(1));
    assert_eq!(coded(flat, heads_tokens, scales(4096, 160)), Ok(3));
    assert_eq!(coded(cache, tokens_heads, scales(4096, 160)), Ok(3));
    let blocks = KvCacheLayout::k(CacheLayout::paged_packed(5, 16, 2, 64, 8));
    assert_eq!(calls(&blocks, &[range]), Ok(3));
    let unaligned = Error::BufferUnaligned {
        what: "a scale",
        align: 4,
    };
    assert_eq!(coded(flat, tokens_heads, scales(4098, 160)), Err(unaligned));
    let short = Error::StageLength {
        tensor: TensorName::K,
        what: "buffer of scales",
        expected: 160,
        or: None,
        got: 159,
    };
    assert_eq!(coded(flat, tokens_heads, scales(4096, 159)), Err(short));
    let without = Error::Stages {
        tensor: TensorName::K,
        what: "codes are planned: give the buffer of their scales, KeyScales::Written",
    };
    assert_eq!(coded(flat, tokens_heads, None), Err(without));
    let given = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
    assert_eq!(coded(flat, given, scales(4096, 2)), Ok(1));
    let three = Error::StageLength {
        tensor: TensorName::K,
        what: "scales",
        expected: 2,
        or: Some(1),
        got: 3,
    };
    assert_eq!(coded(flat, given, scales(4096, 3)), Err(three));
    // A head lies in the shared memory of a block.
    let wide = KvCacheLayout::k(CacheLayout::paged_packed(5, 16, 2, 8192, 8));
    let too_large = calls(&wide, &[range]);
    assert!(
        matches!(too_large, Err(Error::StagesTooLarge { .. })),
        "{too_large:?}"
    );
}
