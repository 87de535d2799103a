//! The fixed part of the suite for kernels that append: what `suite.rs` has for rotations, with values and
//! caches beside them; and sequences and slots of every kind.

use crate::append_cases::{
    AppendCase, AppendOutcome, AppendRun, AppendWish, Buffer, Goes, Placed, TestSlots,
    random_append,
};
use crate::kernel_cases::{
    AngleKind, Case, FACTOR, MODES, PHASES, PHASES_WITH_FACTOR, Rng, TestPositions, Values, bytes,
    edge_phases, random_elements, random_rope, sharp_case, ties_case,
};
use crate::ptx_backend::{Image, settle_ids, triggers};
use crate::suite::{
    Counts, FAR, Failure, ROW_SPREAD, ROWS, Shape, Subject, by_position, far_case, far_types,
    floats, kinds_cases, spread_position, spread_rows,
};
use phasor::call::{
    PHASOR_CODES_NONE, PHASOR_IDS_I32, PHASOR_IDS_I64, PHASOR_IDS_NONE, PHASOR_SLOT_IDS,
    PHASOR_SLOT_PAGE_TABLE, PhasorCache, PhasorCall, PhasorCodes, PhasorFusion, PhasorIds,
    PhasorStages, PhasorView,
};
use phasor::launch::{Family, Kernel, Launch, LaunchMode};
use phasor::{
    Angles, CacheLayout, CosSinTable, Frequencies, FrequencyRowKind, IdType, InOut, Isa,
    KvCacheLayout, Layout, OutOfRange, Pairing, PositionKind, Problem, Rope,
};
use ptx_interpreter::{Fault, Memory, Stats};

/// How a case is launched.
enum How {
    /// As the driver would get it. Every byte is also counted, where angles are formed after the loads and
    /// where before.
    Planned([Counts; 2]),
    /// In another shape than the plan's; the kernels accept any. Bytes are counted too.
    Shaped(Shape, [Counts; 2]),
    /// The same, if there is one, where bytes are not counted. `far`: with all strides past 2^32.
    Elsewhere { far: bool, shape: Option<Shape> },
}

/// A call that appends, and what it must do.
pub struct AppendCheck {
    kernel: Kernel,
    case: AppendCase,
    expected: AppendOutcome,
    lookups: Lookups,
    how: How,
}

/// What a launch must look up, and report.
struct Lookups {
    /// Tokens that are no padding.
    tokens: u64,
    /// Of those, the ones whose slot is not in the caches.
    outside: u64,
}

impl AppendCheck {
    fn new(kernel: Kernel, case: AppendCase, how: How) -> AppendCheck {
        let expected = case.on_host(Isa::Scalar).unwrap();
        let tokens = real_tokens(&case);
        let outside = tokens - stored_tokens(&case) - unwanted_tokens(&case);
        assert_eq!(expected.reported, outside > 0);
        let lookups = Lookups { tokens, outside };
        AppendCheck {
            kernel,
            case,
            expected,
            lookups,
            how,
        }
    }

    fn counted(kernel: Kernel, case: AppendCase) -> AppendCheck {
        let counts = [false, true].map(|early| once(&case, early));
        AppendCheck::new(kernel, case, How::Planned(counts))
    }

    pub fn run(&self, subject: &Subject) -> Result<(), Failure> {
        let fault = |fault: Fault| Failure::Fault(fault.to_string());
        let (outcome, traffic) = match &self.how {
            How::Planned(counts) => {
                let run = self.case.on_image(subject.image(), false).map_err(fault)?;
                assert_eq!(run.kernel, Some(self.kernel));
                let early = usize::from(run.stats.loads_before_wait > 0);
                let traffic = run.counts == counts[early]
                    && self.accesses_are_of_one_width(&run)
                    && self.looks_up_once(&run.stats, run.grid)
                    && run.triggers;
                (run.outcome, traffic)
            }
            How::Shaped(shape, counts) => {
                let (outcome, stats, launch, counted) =
                    elsewhere(subject, &self.case, false, Some(*shape)).map_err(fault)?;
                let early = stats.loads_before_wait > 0;
                let [late_counts, early_counts] = counts;
                // What a token's first heads are loaded for in vain, later ones are not: by then it is known.
                let as_wanted = |(name, found): (&&'static str, &Vec<(u32, u32)>)| {
                    let wanted = late_counts[name].iter().zip(&early_counts[name]);
                    let mut both = found.iter().zip(wanted);
                    both.all(|(n, (late, known))| n == known || !early && n == late)
                };
                let traffic =
                    counted.iter().all(as_wanted) && self.does_as_told(subject, &stats, &launch);
                (outcome, traffic)
            }
            How::Elsewhere { far, shape } => {
                let (outcome, stats, launch, _) =
                    elsewhere(subject, &self.case, *far, *shape).map_err(fault)?;
                (outcome, self.does_as_told(subject, &stats, &launch))
            }
        };
        if outcome != self.expected {
            return Err(Failure::Bits);
        }
        if !traffic {
            return Err(Failure::Traffic);
        }
        Ok(())
    }

    fn does_as_told(&self, subject: &Subject, stats: &Stats, launch: &Launch) -> bool {
        assert_eq!(launch.kernel, self.kernel);
        self.looks_up_once(stats, launch.grid)
            && triggers(launch, stats, subject.image().dependent())
    }

    fn accesses_are_of_one_width(&self, run: &AppendRun) -> bool {
        let width = self.kernel.vector() * self.kernel.dtype.size();
        run.counts.keys().all(|name| {
            run.stats.buffer(name).is_some_and(|traffic| {
                traffic.loads_of(width) * width as u64 == traffic.loaded_bytes()
                    && traffic.stores_of(width) * width as u64 == traffic.stored_bytes()
            })
        })
    }

    /// Each of the blocks that share a token's heads forms its angles once, and finds its slot once; what is
    /// not in the caches is reported once.
    fn looks_up_once(&self, stats: &Stats, grid: [u32; 3]) -> bool {
        let [_, heads, chunks] = grid.map(u64::from);
        let angles = self.case.rope.angles();
        // A step takes as many bytes as a cosine and a sine.
        let of_token = (angles.axes() * angles.pairs() * 8) as u64;
        let loaded = ["steps", "cos", "sin"].map(|name| stats.buffer(name));
        let loaded: u64 = loaded.into_iter().flatten().map(|t| t.loaded_bytes()).sum();
        let by = match &self.case.slots {
            None => None,
            Some(TestSlots::Mapping(_)) => Some("slots"),
            Some(_) => Some("lengths"),
        };
        let found = by.is_none_or(|name| {
            let loads = stats.buffer(name).map_or(0, |t| t.loads.iter().sum());
            loads == heads * chunks * self.lookups.tokens
        });
        let reports = stats.buffer("report").map_or(0, |t| t.stores.iter().sum());
        loaded == heads * self.lookups.tokens * of_token && found && reports == self.lookups.outside
    }
}

/// Names of the checks, and the checks of a kernel.
pub fn append_checks(kernel: Kernel) -> Vec<(&'static str, AppendCheck)> {
    let mut checks = Vec::new();
    for check in random_checks(kernel) {
        checks.push(("random", check));
    }
    // One row of threads, which go from one stream to the next, by each number of heads at once.
    let one_row = [1, 2, 3].map(|blocks| ([1, 1, 3], [blocks, 1]));
    for (case, _) in flow_cases(kernel) {
        for shape in one_row {
            let counts = [false, true].map(|early| once(&case, early));
            let how = How::Shaped(shape, counts);
            checks.push(("flows", AppendCheck::new(kernel, case.clone(), how)));
        }
        checks.push(("flows", AppendCheck::counted(kernel, case)));
    }
    for (case, _) in slot_cases(kernel) {
        // In the last, rows of threads go on to heads behind the first of keys and of values.
        let two_rows = ([1, 1, 1], [2, 5]);
        for (far, shape) in [
            (false, None),
            (true, None),
            (true, FAR[8].1),
            (true, Some(two_rows)),
        ] {
            let how = match far {
                false => How::Planned([false, true].map(|early| once(&case, early))),
                true => How::Elsewhere { far, shape },
            };
            checks.push(("slots", AppendCheck::new(kernel, case.clone(), how)));
        }
    }
    for (case, tokens, expected) in odd_sequences(kernel, |case| case) {
        let check = AppendCheck {
            kernel,
            case,
            expected,
            lookups: Lookups { tokens, outside: 0 },
            how: How::Elsewhere {
                far: false,
                shape: None,
            },
        };
        checks.push(("slots", check));
    }
    for angles in AngleKind::ALL {
        for (n, case) in kinds_cases(kernel, angles).into_iter().enumerate() {
            let (case, _) = carrying(kernel, in_mode(case, n));
            checks.push(("kinds", AppendCheck::counted(kernel, case)));
        }
        for in_place in [true, false] {
            for (n, (heads, shape)) in FAR.into_iter().enumerate() {
                // With angles after the wait, and before it.
                for mode in [n % 2, 2] {
                    let case = in_mode(far_case(kernel, angles, in_place, heads), mode);
                    let how = How::Elsewhere { far: true, shape };
                    let (case, _) = carrying(kernel, case);
                    let check = AppendCheck::new(kernel, case, how);
                    checks.push(("far", check));
                }
            }
        }
        let rows = ([4, 4, 8], [1, 1]);
        for (n, (name, case)) in [
            ("sharp", sharp_case(kernel, angles, &PHASES, 1.0)),
            (
                "sharp",
                sharp_case(kernel, angles, &PHASES_WITH_FACTOR, FACTOR),
            ),
            ("edges", sharp_case(kernel, angles, &edge_phases(), 1.0)),
            ("ties", ties_case(kernel, angles)),
        ]
        .into_iter()
        .enumerate()
        {
            let how = How::Elsewhere {
                far: false,
                shape: Some(rows),
            };
            let (case, _) = carrying(kernel, in_mode(case, n));
            checks.push((name, AppendCheck::new(kernel, case, how)));
        }
    }
    let by_position = by_position(far_case(kernel, AngleKind::Rows, true, [5, 5]));
    for case in far_types(kernel).into_iter().chain([by_position]) {
        let how = How::Elsewhere {
            far: true,
            shape: None,
        };
        let (case, _) = carrying(kernel, case);
        checks.push(("far", AppendCheck::new(kernel, case, how)));
    }
    checks
}

pub fn in_mode(case: Case, n: usize) -> Case {
    Case {
        mode: MODES[n % MODES.len()],
        ..case
    }
}

/// Every angle source with every kind of position, and slots of each kind in turn.
fn random_checks(kernel: Kernel) -> Vec<AppendCheck> {
    const EACH: usize = 4;
    let image = &Image::all()[0];
    let mut rng = Rng(kernel.index() as u64);
    let mut checks = Vec::new();
    for angles in AngleKind::ALL {
        for &kind in angles.position_kinds() {
            let mut found = 0;
            while found < EACH {
                let wish = AppendWish {
                    dtype: Some(kernel.dtype),
                    pairing: kernel.pairing,
                    angles: Some(angles),
                    kind: Some(kind),
                    aligned: Some(kernel.pairing.is_some()),
                    slots: Some(found),
                    ..AppendWish::default()
                };
                let case = random_append(&mut rng, wish);
                // Others have nothing to do, or happen to suit vectors, or to need none of this family.
                let run = case.on_image(image, false).unwrap();
                if run.kernel == Some(kernel) && case.slots.is_some() {
                    checks.push(AppendCheck::counted(kernel, case));
                    found += 1;
                }
            }
        }
    }
    checks
}

/// A rotation whose keys are stored too, in blocks of dims, and beside it values that are written in two
/// places. The layout of the caches, of pages of [`PAGE_SIZE`], comes with it.
pub fn carrying(kernel: Kernel, case: Case) -> (AppendCase, Option<KvCacheLayout>) {
    let mut rng = Rng(13);
    let layout_of = |layout: InOut<Layout>| match layout {
        InOut::InPlace(layout) => (layout, layout),
        InOut::OutOfPlace {
            source,
            destination,
        } => (source, destination),
    };
    let first = case.tensors().next().expect("q or k").layout;
    let [batch, tokens, ..] = layout_of(first).0.shape();
    let v_heads = 3;
    let (v_dim, block) = match (kernel.family, kernel.pairing) {
        (Family::Fused, Some(_)) => (64, 16),
        (Family::Fused, None) => (10, 2),
        (_, Some(_)) => (20, 4),
        (_, None) => (9, 3),
    };
    let v = Layout::bshd(batch, tokens, v_heads, v_dim);
    let mut problem = case.problem();
    let mut streams = [None; 3];
    let mut tensors = [[0; 2]; 3];
    let mut buffers = Vec::new();
    let names = [["q", "q_out"], ["k", "k_out"]];
    for (which, tensor) in [&case.q, &case.k].into_iter().enumerate() {
        let Some(tensor) = tensor else { continue };
        let (source, _) = layout_of(tensor.layout);
        let out = tensor.destination.as_ref();
        let goes = match (which, out) {
            (0, None) => Goes::InPlace,
            (0, Some(_)) => Goes::Out,
            (_, None) => Goes::InPlaceAndCache,
            (_, Some(_)) => Goes::OutAndCache,
        };
        streams[which] = Some((source, goes));
        tensors[which] = [buffers.len(); 2];
        for (n, elements) in std::iter::once(&tensor.source).chain(out).enumerate() {
            tensors[which][n] = buffers.len();
            tensors[which][1] = buffers.len();
            buffers.push(Buffer {
                name: names[which][n],
                bytes: bytes(case.dtype, elements),
                misalign: tensor.misalign * case.dtype.size(),
                written: n == 1 || out.is_none(),
            });
        }
    }
    let mut buffer = |name, len: usize, written| {
        buffers.push(Buffer {
            name,
            bytes: bytes(case.dtype, &random_elements(&mut rng, case.dtype, len)),
            misalign: 0,
            written,
        });
        buffers.len() - 1
    };
    let len = v.required_len().unwrap();
    tensors[2] = [buffer("v", len, false), buffer("v_out", len, true)];
    streams[2] = Some((v, Goes::OutAndCache));
    problem = problem.v((v, v));

    // Every seventh token is stored nowhere, and the one after it, if there is one, outside.
    let page_size = PAGE_SIZE;
    let pages = (batch * tokens).div_ceil(page_size) + 1;
    let slots: Vec<i64> = (0..(batch * tokens) as i64)
        .map(|token| match token % 7 {
            3 => -1,
            4 => (pages * page_size) as i64,
            _ => (pages * page_size) as i64 - 1 - token,
        })
        .collect();
    let v_cache = CacheLayout::paged_hnd(pages, page_size, v_heads, v_dim);
    let (cache, k_index) = match streams[1] {
        None => (KvCacheLayout::v(v_cache), None),
        Some((source, _)) => {
            let [_, _, heads, head_dim] = source.shape();
            let k = CacheLayout::paged_packed(pages, page_size, heads, head_dim, block);
            let index = buffer("k_cache", k.required_len().unwrap(), true);
            (KvCacheLayout::separate(k, v_cache), Some(index))
        }
    };
    let v_index = buffer("v_cache", v_cache.required_len().unwrap(), true);
    let case = AppendCase {
        problem: problem.cache(cache),
        rope: case.rope,
        streams,
        buffers,
        tensors,
        caches: Some([k_index.unwrap_or(v_index), v_index]),
        positions: case.positions,
        cu_seqlens: None,
        slots: Some(TestSlots::Mapping(Values::new(IdType::I64, &slots))),
        operands: Default::default(),
        multiprocessors: case.multiprocessors,
        mode: case.mode,
    };
    (case, Some(cache))
}

/// Tokens of each sequence of the cases below, and how many it has before: among them sequences of no
/// token, and as many as a search takes four steps for.
const SEQUENCES: [(usize, i64); 9] = [
    (2, 3),
    (0, 1),
    (1, 7),
    (3, 2),
    (0, 0),
    (0, 5),
    (1, 11),
    (1, 4),
    (2, 0),
];
const PADDING: usize = 2;
const PAGES: usize = 20;
pub const PAGE_SIZE: usize = 4;

/// Those sequences, with slots if there is a cache. By turns of `n`, streams go elsewhere and the launch is
/// another.
fn ragged(
    kernel: Kernel,
    id_type: IdType,
    slots: Option<TestSlots>,
    n: usize,
) -> (AppendCase, Option<KvCacheLayout>) {
    let goes = match n % 3 {
        _ if slots.is_none() => [Goes::InPlace, Goes::Out, Goes::InPlace],
        0 => [Goes::InPlace, Goes::ToCache, Goes::ToCache],
        1 => [Goes::Out, Goes::InPlaceAndCache, Goes::ToCache],
        _ => [Goes::InPlace, Goes::OutAndCache, Goes::InPlaceAndCache],
    };
    flowing(
        kernel,
        id_type,
        slots,
        goes.map(Some),
        cached_dims(kernel),
        n,
    )
}

/// Dims of keys and of values, and those of a block of their caches, for [`flowing`].
fn cached_dims(kernel: Kernel) -> [(usize, usize); 2] {
    match kernel.family {
        Family::Fused if kernel.pairing.is_some() => [(4, 4), (4, 1)],
        _ => [(4, 4), (5, 1)],
    }
}

/// `cached` has the dims of keys and of values, and how many of them a cache has in a block, in units of a vector.
/// (Of kernels with stages, vectors serve heads of 64 dims that rotate as a whole, and norms want even heads.)
fn flowing(
    kernel: Kernel,
    id_type: IdType,
    slots: Option<TestSlots>,
    goes: [Option<Goes>; 3],
    cached: [(usize, usize); 2],
    n: usize,
) -> (AppendCase, Option<KvCacheLayout>) {
    let mut rng = Rng(17);
    let is_whole = kernel.family == Family::Fused && kernel.pairing.is_some();
    let unit = match (kernel.family, kernel.pairing) {
        (Family::Fused, Some(_)) => 16,
        (Family::Fused, None) => 2,
        (_, Some(_)) => 4,
        (_, None) => 1,
    };
    let tokens = SEQUENCES.iter().map(|(n, _)| n).sum::<usize>() + PADDING;
    let mut ends = vec![0];
    for (n, _) in SEQUENCES {
        ends.push(ends[ends.len() - 1] + n as i64);
    }
    let rotary_dim = if is_whole { 4 } else { 2 } * unit;
    let [(k_dims, k_block), (v_dims, v_block)] = cached;
    let q_dims = if is_whole { 4 } else { 3 };
    let dims = [q_dims, k_dims, v_dims].map(|dims| dims * unit);
    let heads = [5, 2, 3];
    let layouts = [0, 1, 2].map(|n| Layout::tokens(tokens, heads[n], dims[n]));
    let [q, k, v] = layouts;
    let k = k.with_rotary_offset(if is_whole { 0 } else { unit.max(2) });
    let mut problem = Problem::new(kernel.dtype);
    let mut buffers = Vec::new();
    let mut tensors = [[0; 2]; 3];
    let mut buffer = |name, len: usize, written| {
        buffers.push(Buffer {
            name,
            bytes: bytes(kernel.dtype, &random_elements(&mut rng, kernel.dtype, len)),
            misalign: 0,
            written,
        });
        buffers.len() - 1
    };
    for (which, (layout, goes)) in [q, k, v].into_iter().zip(goes).enumerate() {
        let Some(goes) = goes else { continue };
        let (name, out) = [("q", "q_out"), ("k", "k_out"), ("v", "v_out")][which];
        let len = layout.required_len().unwrap();
        tensors[which] = [buffer(name, len, goes.in_place()); 2];
        let in_out = match goes {
            Goes::Out | Goes::OutAndCache => {
                tensors[which][1] = buffer(out, len, true);
                (layout, layout).into()
            }
            _ => InOut::from(layout),
        };
        problem = match (which, goes) {
            (1, Goes::ToCache) => problem.k_to_cache(layout),
            (2, Goes::ToCache) => problem.v_to_cache(layout),
            (0, _) => problem.q(in_out),
            (1, _) => problem.k(in_out),
            _ => problem.v(in_out),
        };
    }
    let [k_cached, v_cached] = [1, 2].map(|which| goes[which].is_some_and(Goes::cached));
    let cache_of = |which: usize, block: usize| {
        let (heads, dims) = (heads[which], dims[which]);
        match block * unit {
            block if block == dims => CacheLayout::paged_nhd(PAGES, PAGE_SIZE, heads, dims),
            block => CacheLayout::paged_packed(PAGES, PAGE_SIZE, heads, dims, block),
        }
    };
    let (k_cache, v_cache) = (cache_of(1, k_block), cache_of(2, v_block));
    let cache = match (k_cached, v_cached) {
        (true, true) => Some(KvCacheLayout::separate(k_cache, v_cache)),
        (true, false) => Some(KvCacheLayout::k(k_cache)),
        (false, true) => Some(KvCacheLayout::v(v_cache)),
        (false, false) => None,
    };
    if let Some(cache) = cache {
        problem = problem.cache(cache);
    }
    // What is not there is at the first buffer.
    let mut cache_of = |name, layout: CacheLayout, is_there| match is_there {
        true => buffer(name, layout.required_len().unwrap(), true),
        false => 0,
    };
    let k_index = cache_of("k_cache", k_cache, k_cached);
    let v_index = cache_of("v_cache", v_cache, v_cached);
    let caches = cache.map(|_| [k_index, v_index]);
    let before: Vec<_> = SEQUENCES.iter().map(|&(_, before)| before).collect();
    let steps = (0..rotary_dim / 2).map(|_| Rng(23).next()).collect();
    let case = AppendCase {
        rope: Rope::new(
            Frequencies::from_steps(steps).unwrap(),
            kernel.pairing.unwrap_or(Pairing::HalfSplit),
        ),
        problem,
        streams: [0, 1, 2].map(|n| Some(([q, k, v][n], goes[n]?))),
        buffers,
        tensors,
        caches,
        positions: TestPositions::of(PositionKind::StartPerSequence, id_type, &before),
        cu_seqlens: Some(Values::new(id_type, &ends)),
        slots,
        operands: Default::default(),
        multiprocessors: [1, 132][n % 2],
        mode: MODES[n % MODES.len()],
    };
    (case, cache)
}

/// Every way for keys and values to go, with angles after the loads and before them.
pub fn flow_cases(kernel: Kernel) -> Vec<(AppendCase, Option<KvCacheLayout>)> {
    let all = [
        Goes::InPlace,
        Goes::Out,
        Goes::ToCache,
        Goes::InPlaceAndCache,
        Goes::OutAndCache,
    ];
    let tokens = SEQUENCES.iter().map(|(n, _)| n).sum::<usize>() + PADDING;
    let slots: Vec<i64> = (0..tokens as i64).map(|token| 3 * token).collect();
    let mut cases = Vec::new();
    for k in all {
        for v in all {
            for n in [0, 5] {
                let q = [Goes::InPlace, Goes::Out][cases.len() / 2 % 2];
                let slots = (k.cached() || v.cached())
                    .then(|| TestSlots::Mapping(Values::new(IdType::I64, &slots)));
                let cached = cached_dims(kernel);
                let goes = [q, k, v].map(Some);
                cases.push(flowing(kernel, IdType::I32, slots, goes, cached, n));
            }
        }
    }
    // Blocks of the one as wide as heads of the other.
    for mut cached in [[(8, 4), (4, 4)], [(4, 4), (8, 4)]] {
        if kernel.family == Family::Fused && kernel.pairing.is_some() {
            // Heads have the same dims.
            cached = cached.map(|(dims, block)| (4, 4 * block / dims));
        }
        let slots = TestSlots::Mapping(Values::new(IdType::I64, &slots));
        let goes = [Goes::InPlace, Goes::ToCache, Goes::ToCache].map(Some);
        cases.push(flowing(kernel, IdType::I32, Some(slots), goes, cached, 0));
    }
    // Keys alone, which are one group of heads, by a table: no thread knows its pair beforehand.
    for n in [0, 5] {
        let slots = TestSlots::Mapping(Values::new(IdType::I64, &slots));
        let goes = [None, Some(Goes::ToCache), None];
        let (mut case, cache) = flowing(
            kernel,
            IdType::I32,
            Some(slots),
            goes,
            cached_dims(kernel),
            n,
        );
        let (pairing, rotary_dim) = (case.rope.pairing(), case.rope.rotary_dim());
        case.rope = random_rope(&mut Rng(29), AngleKind::Table, pairing, rotary_dim);
        cases.push((case, cache));
    }
    // By a table that some tokens are outside of: they pass as they are, and are not written where they are.
    for n in [0, 5] {
        let slots = TestSlots::Mapping(Values::new(IdType::I64, &slots));
        let goes = [Goes::InPlace, Goes::InPlaceAndCache, Goes::InPlace].map(Some);
        let cached = cached_dims(kernel);
        let (mut case, cache) = flowing(kernel, IdType::I32, Some(slots), goes, cached, n);
        let pairs = case.rope.rotary_dim() / 2;
        let turns: Vec<f32> = (0..4 * pairs).map(|n| (n as f32).sin()).collect();
        let table = CosSinTable::new(turns.clone(), turns, pairs).unwrap();
        let table = table.with_out_of_range(OutOfRange::PassThrough);
        case.rope = Rope::new(table, case.rope.pairing());
        cases.push((case, cache));
    }
    cases
}

/// Ids of every type, and at both sides of every bound: of the pages, of a sequence's row of them, of the
/// indices, of a page.
pub fn slot_cases(kernel: Kernel) -> Vec<(AppendCase, Option<KvCacheLayout>)> {
    let mut cases = Vec::new();
    let sequences = SEQUENCES.len();
    let before: Vec<i64> = SEQUENCES.iter().map(|&(_, before)| before).collect();
    let slots = (PAGES * PAGE_SIZE) as i64;
    let pages = PAGES as i64;
    for id_type in [IdType::I32, IdType::U32, IdType::I64] {
        let values = |ids: &[i64]| Values::new(id_type, ids);
        let (far, negative) = match id_type {
            IdType::I64 => ([1 << 32, (1 << 32) + 1, i64::MAX], i64::MIN),
            IdType::I32 => ([i64::from(i32::MAX); 3], i64::from(i32::MIN)),
            _ => ([1 << 31, i64::from(u32::MAX), i64::from(u32::MAX) - 1], -1),
        };
        let mapping = [
            slots - 1,
            0,
            slots,
            PAGE_SIZE as i64,
            -1,
            far[0],
            far[1],
            far[2],
            negative,
            17,
            3,
            9,
        ];
        // Columns of a row; what is written of each is its own.
        let mut table: Vec<i64> = (0..sequences as i64 * 3).map(|n| n % pages).collect();
        // Of sequence 0 slot 4, of 2 slot 7, of 3 slots 2 to 4, of 6 slot 11, of 7 slot 4, of 8 slots 0, 1.
        for (sequence, column, page) in [
            (0, 1, pages - 1),
            (2, 1, pages),
            (3, 0, 0),
            (3, 1, negative),
            (6, 2, far[1]),
            (7, 1, 5),
            (8, 0, 6),
        ] {
            table[sequence * 3 + column] = page;
        }
        table[1] = pages - 1;
        table[0] = 2;
        let lengths = |changed: &[(usize, i64)]| {
            let mut lengths = before.clone();
            for &(sequence, length) in changed {
                lengths[sequence] = length;
            }
            values(&lengths)
        };
        let offsets: Vec<i64> = (0..=sequences as i64).map(|n| n * 3).collect();
        let short: Vec<i64> = offsets.iter().map(|&n| n.min(25)).collect();
        let odd = {
            let mut odd = offsets.clone();
            // The end of 2 comes before its beginning; that of 6 is past the last index; the beginning of
            // 7 then too; 3 begins far away.
            odd[3] = match id_type {
                IdType::I64 => i64::MAX,
                _ => i64::from(i32::MAX),
            };
            odd[7] = 1 << 20;
            odd[1] = -1;
            odd
        };
        // Sequence 2 begins at index -1, and its slot is in the page after that. Sequence 8 has its second page
        // behind the last index, where it ends far behind that.
        let mut behind = offsets.clone();
        behind[2] = -1;
        behind[8] = 26;
        behind[9] = far[0];
        // What is not in 32 bits is in the next ones: 7 begins far behind, and ends so.
        let mut wide = offsets.clone();
        if id_type == IdType::I64 {
            wide[3] = (1 << 32) + 9;
            wide[8] = 1 << 32;
        }
        let all = [
            TestSlots::PageIndices(values(&behind), values(&table), lengths(&[(8, 3)])),
            TestSlots::PageIndices(values(&wide), values(&table), lengths(&[])),
            TestSlots::Mapping(values(&mapping)),
            TestSlots::PageTable(values(&table), lengths(&[])),
            TestSlots::PageTable(
                values(&table),
                lengths(&[(0, far[2]), (3, negative), (6, 12), (7, -1), (8, far[0])]),
            ),
            TestSlots::PageIndices(values(&offsets), values(&table), lengths(&[])),
            TestSlots::PageIndices(values(&short), values(&table), lengths(&[(7, 12)])),
            TestSlots::PageIndices(values(&odd), values(&table), lengths(&[])),
            TestSlots::Sequences(lengths(&[(6, 3), (7, 4)])),
            TestSlots::Sequences(lengths(&[(0, far[2]), (3, negative), (8, 2)])),
            // With the second token of 0 and of 8 they come to 0, where they are signed.
            TestSlots::Sequences(lengths(&[(0, -1), (3, 1), (8, -1)])),
            TestSlots::PageTable(values(&table), lengths(&[(0, -1), (8, -1)])),
        ];
        for slots in all {
            let n = cases.len();
            cases.push(ragged(kernel, id_type, Some(slots), n));
        }
        cases.push(ragged(kernel, id_type, None, cases.len()));
        // Positions of tokens count by places in their sequences where strides are far.
        let ids: Vec<i64> = (0..mapping.len() as i64).map(|token| 7 * token).collect();
        let slots = TestSlots::Mapping(values(&mapping));
        let (mut case, cache) = ragged(kernel, id_type, Some(slots), cases.len());
        case.positions = TestPositions::of(PositionKind::PerToken, id_type, &ids);
        cases.push((case, cache));
    }
    cases
}

/// Sequences that the host refuses and a device cannot: the first begins behind the first tokens, or before
/// all of them; the only one has no end, or ends before all tokens. What belongs to no sequence, or to one that begins nowhere, is nothing.
/// `dressed` gives the cases what else they have.
pub fn odd_sequences(
    kernel: Kernel,
    mut dressed: impl FnMut(AppendCase) -> AppendCase,
) -> Vec<(AppendCase, u64, AppendOutcome)> {
    let tokens = SEQUENCES.iter().map(|(n, _)| n).sum::<usize>() + PADDING;
    let positions: Vec<i64> = (0..tokens as i64).collect();
    let slots: Vec<i64> = (0..tokens as i64).map(|token| 2 * token).collect();
    let mut all = Vec::new();
    for (n, id_type) in [IdType::I32, IdType::I64, IdType::U32]
        .into_iter()
        .enumerate()
    {
        // Of q in place, keys and values to the cache.
        let with = |ends: &[i64], none: usize| {
            let slots = [&vec![-1; none], &slots[none..]].concat();
            let slots = TestSlots::Mapping(Values::new(IdType::I32, &slots));
            let (case, _) = ragged(kernel, id_type, Some(slots), 0);
            AppendCase {
                positions: TestPositions::of(PositionKind::PerToken, id_type, &positions),
                cu_seqlens: Some(Values::new(id_type, ends)),
                mode: MODES[n],
                ..case
            }
        };
        // Where the first `none` tokens are nothing; else as if sequences were `sane`.
        let mut add = |odd: &[i64], sane: &[i64], none: usize| {
            let sane = dressed(with(sane, none));
            let mut expected = sane.on_host(Isa::Scalar).unwrap();
            let [q, _] = sane.tensors[0];
            let row = expected.buffers[q].len() / tokens;
            let before = &sane.buffers[q].bytes[..none * row];
            expected.buffers[q][..none * row].copy_from_slice(before);
            let real = real_tokens(&sane) - none as u64;
            let odd = AppendCase {
                operands: sane.operands.clone(),
                problem: sane.problem,
                ..with(odd, 0)
            };
            all.push((odd, real, expected));
        };
        let mut ends = vec![0];
        for (n, _) in SEQUENCES {
            ends.push(ends[ends.len() - 1] + n as i64);
        }
        // The first sequence has two tokens.
        let mut begins = vec![(1, 1), (2, 2), (-1, 2), (i64::from(i32::MIN), 2)];
        if id_type == IdType::I64 {
            begins.push((1 << 32, 2));
        }
        for (first, none) in begins {
            let odd = [&[first], &ends[1..]].concat();
            add(&odd, &ends, none);
        }
        let whole = [0, tokens as i64];
        let endless = match id_type {
            IdType::I64 => i64::MAX,
            IdType::I32 => i32::MAX.into(),
            _ => u32::MAX.into(),
        };
        add(&[0, endless], &whole, 0);
        if id_type != IdType::U32 {
            add(&[0, -1], &whole, tokens);
        }
    }
    all
}

/// Each token's sequence, and its place there: `None` for padding.
fn token_sequences(case: &AppendCase) -> Vec<Option<(usize, usize)>> {
    let (layout, _) = case.streams.iter().flatten().next().unwrap();
    let [batch, tokens, ..] = layout.shape();
    let Some(offsets) = &case.cu_seqlens else {
        let place = |token| Some((token / tokens, token % tokens));
        return (0..batch * tokens).map(place).collect();
    };
    let ends = offsets.values();
    let mut all = vec![None; tokens];
    for (sequence, bounds) in ends.windows(2).enumerate() {
        for token in bounds[0]..bounds[1] {
            all[token as usize] = Some((sequence, (token - bounds[0]) as usize));
        }
    }
    all
}

fn real_tokens(case: &AppendCase) -> u64 {
    token_sequences(case).iter().flatten().count() as u64
}

/// Tokens whose slot is negative, and so is none.
fn unwanted_tokens(case: &AppendCase) -> u64 {
    match &case.slots {
        // Without caches no token has a slot.
        None => real_tokens(case),
        Some(TestSlots::Mapping(slots)) => {
            let real = token_sequences(case);
            let slots = slots.values().into_iter().zip(real);
            slots
                .filter(|&(slot, real)| slot < 0 && real.is_some())
                .count() as u64
        }
        Some(_) => 0,
    }
}

/// Of the buffers that are only written, which bytes a call writes: those that do not depend on what was
/// there before.
fn written(case: &AppendCase) -> Vec<Option<Vec<bool>>> {
    let of_tensor = |n| {
        let mut present = (0..3).filter(|&which| case.streams[which].is_some());
        present.any(|which| case.tensors[which][0] != n && case.tensors[which][1] == n)
    };
    let of_cache = |n| case.caches.is_some_and(|caches| caches.contains(&n));
    let is_read =
        |n| (0..3).any(|which| case.streams[which].is_some() && case.tensors[which][0] == n);
    let only: Vec<bool> = (0..case.buffers.len())
        .map(|n| !is_read(n) && (of_tensor(n) || of_cache(n)))
        .collect();
    let filled = |fill: u8| {
        let mut case = case.clone();
        for (buffer, _) in case
            .buffers
            .iter_mut()
            .zip(&only)
            .filter(|(_, only)| **only)
        {
            buffer.bytes.fill(fill);
        }
        case.on_host(Isa::Scalar).unwrap().buffers
    };
    let both = filled(0).into_iter().zip(filled(0xff));
    let same = |(a, b): (Vec<u8>, Vec<u8>)| a.iter().zip(&b).map(|(a, b)| a == b).collect();
    let masks = both.zip(only).map(|(both, only)| only.then(|| same(both)));
    masks.collect()
}

/// Tokens that the caches have room for, and that have a slot.
fn stored_tokens(case: &AppendCase) -> u64 {
    let masks = written(case);
    let stored = |which: usize| {
        let (layout, goes) = case.streams[which]?;
        let mask = masks[case.caches?[which - 1]].as_ref()?;
        // A cache that both share has the bytes of both.
        let of = |(layout, goes): (Layout, Goes)| match goes.cached() {
            true => layout.shape()[2] * layout.shape()[3],
            false => 0,
        };
        let shared = case.caches?[0] == case.caches?[1];
        let token = match shared {
            true => case.streams[1..].iter().flatten().map(|&s| of(s)).sum(),
            false => of((layout, goes)),
        };
        let bytes = mask.iter().filter(|&&written| written).count();
        let size = case.plan().dtype().size();
        goes.cached().then(|| (bytes / (token * size)) as u64)
    };
    stored(1).or(stored(2)).unwrap_or(0)
}

/// Whether the position of a token is one that the case's angles have.
fn rotates(case: &AppendCase, token: usize, [sequence, place]: [usize; 2]) -> bool {
    let Angles::Table(table) = case.rope.angles() else {
        return true;
    };
    if table.out_of_range() != OutOfRange::PassThrough {
        return true;
    }
    let ids = case.positions.ids.values();
    let place_id = place as i64;
    let position = match case.positions.kind {
        PositionKind::Start => case.positions.start.wrapping_add(place_id),
        PositionKind::StartPerSequence => ids[sequence].wrapping_add(place_id),
        PositionKind::PerSequence => ids[sequence],
        PositionKind::PerTokenShared => {
            let (layout, _) = case.streams.iter().flatten().next().unwrap();
            ids[token % layout.shape()[1]]
        }
        PositionKind::PerToken | PositionKind::PerAxis => ids[token],
        other => panic!("{other:?} is not covered"),
    };
    (0..table.rows() as i64).contains(&position)
}

/// How often each byte is read and written: once where it goes somewhere, else never. In place, what a
/// token does not rotate is not written; and where angles are formed after the loads, what does not go
/// anywhere has been loaded for nothing.
fn once(case: &AppendCase, early: bool) -> Counts {
    let size = case.plan().dtype().size();
    let rotary_dim = case.rope.rotary_dim();
    let mut counts: Vec<Vec<(u32, u32)>> = written(case)
        .into_iter()
        .zip(&case.buffers)
        .map(|(mask, buffer)| match mask {
            Some(mask) => mask.into_iter().map(|w| (0, u32::from(w))).collect(),
            None => vec![(0, 0); buffer.bytes.len()],
        })
        .collect();
    let sequences = token_sequences(case);
    for (which, stream) in case.streams.iter().enumerate() {
        let Some((layout, goes)) = *stream else {
            continue;
        };
        let bytes = &mut counts[case.tensors[which][0]];
        let [_, tokens, heads, head_dim] = layout.shape();
        let [batch_stride, token_stride, head_stride] = layout.strides();
        let offset = layout.rotary_offset();
        for (token, &sequence) in sequences.iter().enumerate() {
            let turns = sequence.is_some_and(|(s, place)| rotates(case, token, [s, place]));
            for head in 0..heads {
                for dim in 0..head_dim {
                    let in_window = which < 2 && (offset..offset + rotary_dim).contains(&dim);
                    let goes_out = match goes.in_place() || goes == Goes::ToCache {
                        true => goes.in_place() && in_window,
                        false => true,
                    };
                    let needed = sequence.is_some() || !early;
                    let read = needed && (goes_out || goes.cached());
                    let write = goes.in_place() && in_window && turns;
                    let at = layout.offset()
                        + token / tokens * batch_stride
                        + token % tokens * token_stride
                        + head * head_stride
                        + dim;
                    bytes[at * size..(at + 1) * size].fill((u32::from(read), u32::from(write)));
                }
            }
        }
    }
    let named = case.buffers.iter().zip(counts);
    let named = named.filter(|(buffer, _)| !buffer.bytes.is_empty());
    named
        .map(|(buffer, counts)| (buffer.name, counts))
        .collect()
}

/// Runs a case in another shape or with other strides than it has, as the driver could be told to. Tells also how
/// often each byte was read and written, if it lies where it is in the case.
pub fn elsewhere(
    subject: &Subject,
    case: &AppendCase,
    far: bool,
    shape: Option<Shape>,
) -> Result<(AppendOutcome, Stats, Launch, Counts), Fault> {
    let image = subject.image();
    let mut near = Memory::new();
    let Placed { at, report, call } = case.placed(&mut near, false);
    let call = call.expect("something to do");
    let mut launch = call.launch(&image.target(case.multiprocessors, case.mode));
    if let (Some(shape), Some(_)) = (shape, &launch.fusion) {
        shape_of_stages(&mut launch, shape);
    } else if let Some((block, [heads, chunks])) = shape {
        let params = &mut launch.params;
        params.token_groups = params.tokens.div_ceil(block[2]);
        // Unlike pairs, which are what the shape is for, dims that do not rotate take lanes too.
        let lanes = launch.block[0] * launch.grid[2];
        let chunks = chunks.max(lanes.div_ceil(block[0]));
        launch.block = block;
        launch.grid = [params.batch * params.token_groups, heads, chunks];
        let pairs = launch.kernel.vector() as u32;
        launch.shared_bytes = (8 * block[0] * pairs + 16) * block[2];
        // Every number of heads at once in turn.
        params.number_groups((block[0] + heads) % 3, 1);
    }
    let mut outcome = AppendOutcome {
        buffers: case.buffers.iter().map(|b| b.bytes.clone()).collect(),
        reported: false,
    };
    let mut counts = Counts::new();
    let stats = if far {
        let mut moved = Moved {
            near: &near,
            far: Memory::new(),
            size: case.plan().dtype().size() as i64,
            written: Vec::new(),
        };
        let report = moved.far.add("report", vec![0; 4], 0);
        let mut fusion = launch.fusion.unwrap_or_default();
        moved.stages(&launch.params, &mut fusion, case.mode);
        moved.call(case, &mut launch.params, &fusion, report);
        launch.fusion = launch.fusion.map(|_| fusion);
        let Moved {
            mut far, written, ..
        } = moved;
        let stats = image.run_launch(&mut far, &launch)?;
        for (from, to, len) in written {
            let buffer = (0..at.len())
                .find(|&n| (at[n]..at[n] + case.buffers[n].bytes.len() as u64).contains(&from));
            let n = buffer.expect("a buffer of the case");
            let begin = (from - at[n]) as usize;
            let bytes = far.read(to, len).expect("written before");
            outcome.buffers[n][begin..begin + len].copy_from_slice(&bytes);
        }
        outcome.reported = far.bytes(report)[0] == 1;
        stats
    } else {
        let stats = image.run_launch(&mut near, &launch)?;
        outcome.buffers = at.iter().map(|&at| near.bytes(at).to_vec()).collect();
        outcome.reported = near.bytes(report)[0] == 1;
        let buffers = case.buffers.iter().zip(&at);
        let buffers = buffers.filter(|(buffer, _)| !buffer.bytes.is_empty());
        counts.extend(
            buffers.map(|(buffer, &at)| (buffer.name, near.counts(at, buffer.bytes.len()))),
        );
        stats
    };
    Ok((outcome, stats, launch, counts))
}

/// Moves keys that rotate in their cache, and what the launch needs for it, to where all strides are far. Tells
/// also where what is written came from and is now, and its bytes.
pub fn far_keys(
    near: &Memory,
    launch: &mut Launch,
    steps: &[u64],
    mode: LaunchMode,
) -> (Memory, Vec<(u64, u64, usize)>) {
    let mut moved = Moved {
        near,
        far: Memory::new(),
        size: launch.kernel.dtype.size() as i64,
        written: Vec::new(),
    };
    let params = &mut launch.params;
    let mut fusion = launch
        .fusion
        .expect("keys in a cache are served by kernels with stages");
    moved.stages(params, &mut fusion, mode);
    let size = match fusion.k.codes.type_ {
        PHASOR_CODES_NONE => moved.size,
        _ => 1,
    };
    let (slots, k) = (&params.slots, &params.k);
    let shape = [
        slots.pages,
        slots.page_size,
        k.heads,
        params.k_output.head_dim,
    ];
    params.k_cache = moved.cache("keys", params.k_cache, shape.map(i64::from), size);
    let steps: Vec<u8> = steps.iter().flat_map(|step| step.to_le_bytes()).collect();
    params.angles.steps = spread_rows(&mut moved.far, "steps", 0, steps.len(), &steps);
    launch.fusion = Some(fusion);
    (moved.far, moved.written)
}

/// Of a kernel with stages: rows of a block in units of those of a warp, or of heads, and tokens; blocks over
/// heads, and the logarithm of how many heads are visited at once.
fn shape_of_stages(launch: &mut Launch, ([_, rows, tokens], [blocks, heads_log2]): Shape) {
    let params = &mut launch.params;
    let lanes = launch.block[0];
    if launch.kernel.pairing.is_none() {
        // Fewer rows take less of shared memory. A norm of all heads is one block's.
        launch.block[1] = rows.min(launch.block[1]);
        launch.grid[1] = blocks.min(launch.grid[1]);
        return;
    }
    let warp_rows = 32 / lanes;
    let most = (8 / launch.kernel.dtype.size()).ilog2();
    params.token_groups = params.tokens.div_ceil(tokens);
    launch.block = [lanes, rows * warp_rows, tokens];
    launch.grid = [params.batch * params.token_groups, blocks, 1];
    launch.shared_bytes = (8 * params.angles.pairs + 32) * tokens;
    params.number_groups(heads_log2.min(most), warp_rows);
}

/// Bytes from one head, token, page, block of dims or id to the next: no 32 bits hold them, nor their
/// product with an index.
const FAR_STRIDE: i64 = (1 << 33) + 64;
const FAR_IDS: i64 = 1 << 33;

/// A call's memory, moved to where its strides are far.
struct Moved<'a> {
    near: &'a Memory,
    far: Memory,
    /// Bytes of an element.
    size: i64,
    /// What is written: address before and after, bytes.
    written: Vec<(u64, u64, usize)>,
}

impl Moved<'_> {
    /// What stages need beside the streams.
    fn stages(&mut self, params: &PhasorCall, fusion: &mut PhasorFusion, mode: LaunchMode) {
        let streams = [
            (&params.q, &params.q_output, &mut fusion.q),
            (&params.k, &params.k_output, &mut fusion.k),
            (&params.v, &params.v_output, &mut fusion.v),
        ];
        let slots = [params.slots.pages, params.slots.page_size].map(i64::from);
        for (stream, output, stages) in streams {
            if stream.heads == 0 || stages.present == 0 {
                continue;
            }
            let PhasorStages {
                bias,
                bias_head,
                norm,
                codes,
                ..
            } = stages;
            let head = i64::from(output.head_dim);
            let heads = i64::from(stream.heads);
            let size = self.size;
            for (name, address, stride, len) in [
                ("bias", bias, bias_head, head * size),
                (
                    "norm weight",
                    &mut norm.weight,
                    &mut norm.weight_head,
                    head * size,
                ),
                (
                    "norm bias",
                    &mut norm.bias,
                    &mut norm.bias_head,
                    head * size,
                ),
            ] {
                self.operand(name, (address, stride), [heads, len], mode);
            }
            match (codes.type_, codes.dynamic) {
                (PHASOR_CODES_NONE, _) => {}
                (_, 0) => {
                    let at = (&mut codes.scales, &mut codes.head);
                    self.operand("given scales", at, [heads, 4], mode);
                }
                _ => {
                    let groups = head / i64::from(codes.group_dims);
                    *codes = self.scales(*codes, [slots[0], slots[1], heads, groups]);
                }
            }
        }
    }

    /// One of a head's own, or that of all heads.
    fn operand(
        &mut self,
        name: &'static str,
        (address, stride): (&mut u64, &mut i64),
        [heads, len]: [i64; 2],
        mode: LaunchMode,
    ) {
        if *address == 0 {
            return;
        }
        let (rows, apart) = match *stride {
            0 => (1, 0),
            _ => (heads, FAR_STRIDE),
        };
        let to = self.far.add_sparse(name, (rows * FAR_STRIDE) as u64, 0);
        for row in 0..rows {
            let from = address.wrapping_add_signed(row * *stride);
            let bytes = self.near.read(from, len as usize).expect("an operand");
            self.far.write(to.wrapping_add_signed(row * apart), &bytes);
        }
        settle_ids(&mut self.far, to, mode);
        (*address, *stride) = (to, apart);
    }

    /// Scales that are written.
    fn scales(
        &mut self,
        near: PhasorCodes,
        [pages, page_size, heads, groups]: [i64; 4],
    ) -> PhasorCodes {
        let group = FAR_STRIDE;
        let head = groups * group + 64;
        let slot = heads * head + 64;
        let page = page_size * slot + 64;
        let scales = self.far.add_sparse("scales", (pages * page) as u64, 0);
        let far = PhasorCodes {
            scales,
            page,
            slot,
            head,
            group,
            ..near
        };
        let len = if near.e8m0 == 1 { 1 } else { 4 };
        for p in 0..pages {
            for s in 0..page_size {
                for h in 0..heads {
                    for g in 0..groups {
                        let at = |codes: &PhasorCodes| {
                            let further =
                                p * codes.page + s * codes.slot + h * codes.head + g * codes.group;
                            codes.scales.wrapping_add_signed(further)
                        };
                        self.copy(at(&near), at(&far), len, true);
                    }
                }
            }
        }
        far
    }

    fn call(
        &mut self,
        case: &AppendCase,
        params: &mut PhasorCall,
        fusion: &PhasorFusion,
        report: u64,
    ) {
        let size = self.size;
        let counts = [params.batch, params.tokens].map(i64::from);
        for which in 0..3 {
            let (stream, output) = match which {
                0 => (&mut params.q, &mut params.q_output),
                1 => (&mut params.k, &mut params.k_output),
                _ => (&mut params.v, &mut params.v_output),
            };
            if stream.heads == 0 {
                continue;
            }
            let shape = [counts[0], counts[1], stream.heads.into()];
            let head = i64::from(output.head_dim) * size;
            // Codes are bytes.
            let out = match which {
                0 if fusion.q.codes.type_ != PHASOR_CODES_NONE => i64::from(output.head_dim),
                _ => head,
            };
            let in_place = output.in_place == 1 && output.nowhere == 0;
            let source = self.view(["q", "k", "v"][which], stream.source, shape, head, in_place);
            stream.source = source;
            if in_place {
                output.destination = source;
            } else if output.nowhere == 0 {
                let name = ["q_out", "k_out", "v_out"][which];
                output.destination = self.view(name, output.destination, shape, out, true);
            }
        }
        let slots = [params.slots.pages, params.slots.page_size].map(i64::from);
        for which in 0..2 {
            let (cache, heads, head_dim, name, stages) = match which {
                0 => (
                    &mut params.k_cache,
                    params.k.heads,
                    params.k_output.head_dim,
                    "k_cache",
                    &fusion.k,
                ),
                _ => (
                    &mut params.v_cache,
                    params.v.heads,
                    params.v_output.head_dim,
                    "v_cache",
                    &fusion.v,
                ),
            };
            let size = match stages.codes.type_ {
                PHASOR_CODES_NONE => size,
                _ => 1,
            };
            if cache.present == 1 {
                let shape = [slots[0], slots[1], heads.into(), head_dim.into()];
                *cache = self.cache(name, *cache, shape, size);
            }
        }
        params.slots.report = report;
        self.ids(case, params);
        self.angles(case, params);
    }

    /// Copies so many bytes from near to far, and remembers them if they are written.
    fn copy(&mut self, from: u64, to: u64, len: usize, is_written: bool) {
        let bytes = self.near.read(from, len).expect("a buffer of the case");
        self.far.write(to, &bytes);
        if is_written {
            self.written.push((from, to, len));
        }
    }

    fn view(
        &mut self,
        name: &'static str,
        near: PhasorView,
        [batch, tokens, heads]: [i64; 3],
        bytes: i64,
        is_written: bool,
    ) -> PhasorView {
        let head = FAR_STRIDE;
        let token = heads * head + 64;
        let batches = tokens * token + 64;
        let address = self.far.add_sparse(name, (batch * batches) as u64, 0);
        let far = PhasorView {
            address,
            token,
            head,
            batch: batches,
        };
        for b in 0..batch {
            for t in 0..tokens {
                for h in 0..heads {
                    let at = |view: &PhasorView| {
                        let further = b * view.batch + t * view.token + h * view.head;
                        view.address.wrapping_add_signed(further)
                    };
                    self.copy(at(&near), at(&far), bytes as usize, is_written);
                }
            }
        }
        if !is_written {
            self.far.set_read_only(address);
        }
        far
    }

    fn cache(
        &mut self,
        name: &'static str,
        near: PhasorCache,
        [pages, page_size, heads, head_dim]: [i64; 4],
        size: i64,
    ) -> PhasorCache {
        let blocks = head_dim / i64::from(near.block_dims);
        let block = FAR_STRIDE;
        let head = blocks * block + 64;
        let slot = heads * head + 64;
        let page = page_size * slot + 64;
        let address = self.far.add_sparse(name, (pages * page) as u64, 0);
        let far = PhasorCache {
            address,
            page,
            slot,
            head,
            block,
            ..near
        };
        let len = (i64::from(near.block_dims) * size) as usize;
        for p in 0..pages {
            for s in 0..page_size {
                for h in 0..heads {
                    for b in 0..blocks {
                        let at = |cache: &PhasorCache| {
                            let further =
                                p * cache.page + s * cache.slot + h * cache.head + b * cache.block;
                            cache.address.wrapping_add_signed(further)
                        };
                        self.copy(at(&near), at(&far), len, true);
                    }
                }
            }
        }
        far
    }

    /// Ids by axis, batch and token: so many of each. Each becomes what `value` makes of it, and they come
    /// to lie far from each other.
    fn ids_of(
        &mut self,
        name: &'static str,
        near: PhasorIds,
        near_axis: i64,
        [axes, batch, tokens]: [i64; 3],
        mode: LaunchMode,
        value: impl Fn([i64; 3], i64) -> i64,
    ) -> (PhasorIds, i64) {
        let size = match near.type_ {
            PHASOR_IDS_I64 => 8,
            _ => 4,
        };
        // What ids do not count by stays so.
        let strides = |token: i64, batch: i64, axis: i64| {
            let far = |near: i64, far: i64| if near == 0 { 0 } else { far };
            (
                far(near.token, token),
                far(near.batch, batch),
                far(near_axis, axis),
            )
        };
        let (token, batch_stride, axis) = strides(
            FAR_IDS,
            FAR_IDS * tokens + 64,
            (FAR_IDS * tokens + 64) * batch + 64,
        );
        let len = (FAR_IDS * tokens + 64) * batch * axes + 64 * axes + 64;
        let address = self.far.add_sparse(name, len as u64, 0);
        for a in 0..axes {
            for b in 0..batch {
                for t in 0..tokens {
                    let from = a * near_axis + b * near.batch + t * near.token;
                    let from = near.address.wrapping_add_signed(from);
                    let to = address.wrapping_add_signed(a * axis + b * batch_stride + t * token);
                    let mut word = [0; 8];
                    let bytes = self.near.read(from, size).expect("ids of the case");
                    word[..size].copy_from_slice(&bytes);
                    let id = match near.type_ {
                        PHASOR_IDS_I64 => i64::from_le_bytes(word),
                        PHASOR_IDS_I32 => i64::from(i64::from_le_bytes(word) as i32),
                        _ => i64::from_le_bytes(word),
                    };
                    let id = value([a, b, t], id);
                    self.far.write(to, &id.to_le_bytes()[..size]);
                }
            }
        }
        settle_ids(&mut self.far, address, mode);
        let far = PhasorIds {
            address,
            token,
            batch: batch_stride,
            ..near
        };
        (far, axis)
    }

    fn ids(&mut self, case: &AppendCase, params: &mut PhasorCall) {
        let same = |_: [i64; 3], id: i64| id;
        let mode = case.mode;
        let sequences = match params.sequences.offsets.type_ {
            PHASOR_IDS_NONE if params.sequences.each_token == 1 => i64::from(params.tokens),
            PHASOR_IDS_NONE => i64::from(params.batch),
            _ => i64::from(params.sequences.count),
        };
        let tokens = i64::from(params.tokens);
        let batch = i64::from(params.batch);
        let is_ragged = params.sequences.offsets.type_ != PHASOR_IDS_NONE;
        let mut place = |ids: &mut PhasorIds, name, counts: [i64; 2]| {
            if ids.type_ != PHASOR_IDS_NONE {
                let counts = [1, counts[0], counts[1]];
                *ids = self.ids_of(name, *ids, 0, counts, mode, same).0;
            }
        };
        let slots = &mut params.slots;
        let table = i64::from(slots.table_pages);
        let by_slot = match slots.choice {
            PHASOR_SLOT_IDS => ("slots", [batch, tokens]),
            PHASOR_SLOT_PAGE_TABLE => ("pages", [sequences, table]),
            _ => ("indices", [1, table]),
        };
        place(&mut slots.ids, by_slot.0, by_slot.1);
        place(&mut slots.lengths, "lengths", [sequences, 1]);
        place(&mut slots.offsets, "indptr", [sequences + 1, 1]);
        place(
            &mut params.sequences.offsets,
            "cu_seqlens",
            [sequences + 1, 1],
        );

        // A position is start + n * advance + id: each takes its share.
        let ids = params.positions.ids;
        let by_token = ids.token != 0;
        let places: Vec<i64> = token_sequences(case)
            .into_iter()
            .map(|of| of.map_or(0, |(_, place)| place as i64))
            .collect();
        let row_spread = match case.rope.angles() {
            Angles::Table(_) if by_token => ROW_SPREAD,
            _ => 0,
        };
        if ids.type_ != PHASOR_IDS_NONE {
            let (start, advance) = match (ids.type_, by_token) {
                (PHASOR_IDS_I64, true) => (-77 << 40, (3 << 33) + 1),
                _ => (0, 0),
            };
            let axes = i64::from(params.angles.axes);
            let counts = match (is_ragged, ids.token) {
                // Ids by sequence, or by token.
                (true, 0) => [axes, sequences, 1],
                (true, _) => [axes, 1, tokens],
                (false, 0) => [axes, batch, 1],
                (false, _) => [axes, if ids.batch == 0 { 1 } else { batch }, tokens],
            };
            let axis = params.positions.axis_stride;
            let share = |[_, _, t]: [i64; 3], id: i64| {
                spread_position(id, row_spread)
                    .wrapping_sub(start)
                    .wrapping_sub(places[t as usize] * advance)
            };
            let (ids, axis) = self.ids_of("ids", ids, axis, counts, mode, share);
            params.positions.ids = ids;
            params.positions.axis_stride = axis;
            params.positions.start = params.positions.start.wrapping_add(start);
            params.positions.advance += advance;
        }
        let rows = params.rows.ids;
        if rows.type_ != PHASOR_IDS_NONE {
            let last = [batch - 1, tokens - 1];
            let spread = |[_, b, t]: [i64; 3], row: i64| match ([b, t] == last, rows.type_) {
                // The last token's is past the last row, which it stands for.
                (true, PHASOR_IDS_I64) => (1 << 32) + 1,
                (true, PHASOR_IDS_I32) => i32::MIN.into(),
                (true, _) => (row << ROW_SPREAD) + 1,
                (false, _) => row << ROW_SPREAD,
            };
            let counts = [1, batch, tokens];
            params.rows.ids = self.ids_of("rows", rows, 0, counts, mode, spread).0;
        }
    }

    /// Rows of a table, or of steps that ids choose from, come to lie far from each other too.
    fn angles(&mut self, case: &AppendCase, params: &mut PhasorCall) {
        let far_rows = |spread| (((ROWS as u64 - 1) << spread) + 1) as u32;
        let by_token = params.positions.ids.token != 0;
        let words =
            |steps: &[u64]| -> Vec<u8> { steps.iter().flat_map(|s| s.to_le_bytes()).collect() };
        match case.rope.angles() {
            Angles::Table(table) => {
                let spread = if by_token { ROW_SPREAD } else { 0 };
                let row = table.pairs() * 4;
                let memory = &mut self.far;
                params.table.cos = spread_rows(memory, "cos", spread, row, &floats(table.cos()));
                params.table.sin = spread_rows(memory, "sin", spread, row, &floats(table.sin()));
                if by_token {
                    params.rows.count = far_rows(ROW_SPREAD);
                }
            }
            Angles::Rows(rows) => {
                let by_id = case.positions.row_kind == FrequencyRowKind::PerToken;
                let spread = if by_id { ROW_SPREAD } else { 0 };
                let row = rows.axes() * rows.pairs() * 8;
                let memory = &mut self.far;
                params.angles.steps =
                    spread_rows(memory, "steps", spread, row, &words(rows.steps()));
                let factors = floats(rows.attention_factors());
                params.rows.factors = spread_rows(memory, "factors", spread, 4, &factors);
                if by_id {
                    params.rows.count = far_rows(ROW_SPREAD);
                }
            }
            Angles::Exact(frequencies) => {
                let bytes = words(frequencies.steps());
                params.angles.steps = spread_rows(&mut self.far, "steps", 0, bytes.len(), &bytes);
            }
            other => panic!("{other:?} is not covered"),
        }
    }
}
