//! The fixed part of the suite for kernels with stages: random cases of every angle source and kind of
//! position, each with stages of its own; what `append_checks.rs` has, with stages too; and values made for
//! what the stages compute.

use crate::append_cases::{
    AppendCase, AppendOutcome, AppendWish, Buffer, Goes, HostBuffer, TestSlots, dynamic_codes,
    given_codes, random_append, random_stages,
};
use crate::append_checks::{
    PAGE_SIZE, carrying, elsewhere, far_keys, flow_cases, in_mode, odd_sequences, slot_cases,
};
use crate::kernel_cases::{
    AngleKind, Case, FACTOR, MODES, PHASES, PHASES_WITH_FACTOR, Rng, TestPositions, Values, bytes,
    edge_phases, narrow, random_elements, sharp_case, ties_case,
};
use crate::ptx_backend::{Image, constant, constant_angles, triggers};
use crate::suite::{
    Counts, Failure, Shape, Subject, by_position, far_case, far_types, kinds_cases,
};
use phasor::call::VectorAddress;
use phasor::launch::{Kernel, LaunchMode};
use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, ScaleForm, ScaleRounding};
use phasor::{
    Angles, CacheLayout, Direction, Dtype, Frequencies, Host, IdType, Isa, KvCacheLayout, Layout,
    Pairing, PositionKind, Problem, Rope, ScaleLayout, ShiftPlan, SlotRange, Stages, StoredCodes,
    Threads,
};
use ptx_interpreter::{Fault, Memory, Stats};
use std::ops::Range;

/// A call with stages, and what it must do.
pub enum FusedCheck {
    Step(Box<StepCheck>),
    /// Keys that rotate in their cache.
    Shift(Box<ShiftCheck>),
}

impl FusedCheck {
    pub fn run(&self, subject: &Subject) -> Result<(), Failure> {
        match self {
            FusedCheck::Step(step) => step.run(subject),
            FusedCheck::Shift(shift) => shift.run(subject),
        }
    }
}

pub struct StepCheck {
    kernel: Kernel,
    case: AppendCase,
    expected: AppendOutcome,
    how: How,
}

enum How {
    /// As the driver would get it. Every byte is counted, and every read of what stages need beside values, where
    /// angles are formed after the loads and where before: by the prebuilt kernels, which
    /// tests/fused_kernels.rs counts in cases of which that is known.
    Planned(Box<[(Counts, Reads); 2]>),
    /// Bytes are not counted. `far`: with all strides past 2^32.
    Elsewhere { far: bool, shape: Option<Shape> },
}

/// Loads and prefetches of biases, weights and given scales.
type Reads = [[u64; 2]; 4];

fn reads_of(stats: &Stats) -> Reads {
    ["bias", "norm weight", "norm bias", "given scales"].map(|name| {
        let of_name = stats.buffers.iter().filter(|(of, _)| of == name);
        of_name.fold([0; 2], |[loads, prefetches], (_, traffic)| {
            let more = traffic.loads.iter().sum::<u64>();
            [loads + more, prefetches + traffic.prefetches]
        })
    })
}

impl StepCheck {
    fn run(&self, subject: &Subject) -> Result<(), Failure> {
        let fault = |fault: Fault| Failure::Fault(fault.to_string());
        let image = subject.image();
        let (outcome, traffic) = match &self.how {
            How::Planned(wanted) => {
                let run = self.case.on_image(image, false).map_err(fault)?;
                assert_eq!(run.kernel, Some(self.kernel));
                let (counts, reads) = &wanted[usize::from(run.stats.loads_before_wait > 0)];
                let as_wanted = run.counts == *counts && reads_of(&run.stats) == *reads;
                (run.outcome, run.triggers && as_wanted)
            }
            How::Elsewhere { far, shape } => {
                let (outcome, stats, launch, _) =
                    elsewhere(subject, &self.case, *far, *shape).map_err(fault)?;
                assert_eq!(launch.kernel, self.kernel);
                (outcome, triggers(&launch, &stats, image.dependent()))
            }
        };
        if outcome != self.expected {
            return Err(Failure::Bits);
        }
        match traffic {
            true => Ok(()),
            false => Err(Failure::Traffic),
        }
    }
}

/// Keys in a cache, and how far some of them move.
struct ShiftCase {
    /// [`Rope::shift`]
    rope: Rope,
    dtype: Dtype,
    cache: KvCacheLayout,
    rotary_offset: usize,
    keys: Vec<u8>,
    /// And how many they are.
    scales: Option<(Vec<u8>, usize)>,
    slots: Range<usize>,
    by: i64,
    mode: LaunchMode,
}

/// The bytes of keys and of scales.
type Shifted = [Vec<u8>; 2];

/// How often each byte of both is read and written by each launch.
type ShiftCounts = Vec<[Vec<(u32, u32)>; 2]>;

impl ShiftCase {
    fn plan(&self) -> ShiftPlan {
        ShiftPlan::new(&self.rope, self.dtype, &self.cache, self.rotary_offset).unwrap()
    }

    fn range(&self) -> SlotRange<'static> {
        SlotRange::new(self.slots.clone(), self.by)
    }

    fn scales_at(&self, address: u64) -> Option<VectorAddress> {
        let &(_, len) = self.scales.as_ref()?;
        Some(VectorAddress { address, len })
    }

    fn scale_bytes(&self) -> &[u8] {
        self.scales.as_ref().map_or(&[], |(bytes, _)| bytes)
    }

    fn on_host(&self) -> Shifted {
        let mut keys = HostBuffer::new(&self.keys, 0);
        let mut scales = HostBuffer::new(self.scale_bytes(), 0);
        let host = Host::new().with_isa(Isa::Scalar).unwrap();
        let rotator = host.with_threads(Threads::One).rotator(&self.rope);
        let (plan, scales_at) = (self.plan(), self.scales_at(scales.address()));
        // SAFETY: both buffers live, reach as far as their layouts, and are apart.
        unsafe {
            let moved = rotator.shift_cached_raw(&plan, keys.address(), scales_at, &[self.range()]);
            moved.unwrap();
        }
        [keys, scales].map(|mut buffer| buffer.bytes_mut().to_vec())
    }

    /// `far`: with all strides past 2^32, of which nothing is counted. Tells also whether launches do as they are
    /// told.
    fn on_image(
        &self,
        kernel: Kernel,
        image: &Image,
        far: bool,
    ) -> Result<(Shifted, ShiftCounts, bool), Fault> {
        let mut near = Memory::new();
        let keys = near.add("keys", self.keys.clone(), 0);
        let scales = near.add("scales", self.scale_bytes().to_vec(), 0);
        let mut placed = |name, bytes: Vec<u8>| constant(&mut near, name, bytes);
        let angles = constant_angles(self.rope.angles(), &mut placed);
        let Angles::Exact(frequencies) = self.rope.angles() else {
            panic!("one row")
        };
        let calls = self
            .plan()
            .calls(keys, self.scales_at(scales), angles, &[self.range()])
            .unwrap();
        let (mut counts, mut as_told) = (ShiftCounts::new(), true);
        for call in calls {
            let mut launch = call.launch(&image.target(1, self.mode));
            assert_eq!(launch.kernel, kernel);
            let stats = if far {
                let steps = frequencies.steps();
                let (mut far, written) = far_keys(&near, &mut launch, steps, self.mode);
                let stats = image.run_launch(&mut far, &launch)?;
                for (from, to, len) in written {
                    near.write(from, &far.read(to, len).expect("written before"));
                }
                stats
            } else {
                let stats = image.run_launch(&mut near, &launch)?;
                let of = |at, bytes: &[u8]| match bytes {
                    [] => Vec::new(),
                    _ => near.counts(at, bytes.len()),
                };
                counts.push([of(keys, &self.keys), of(scales, self.scale_bytes())]);
                stats
            };
            as_told &= triggers(&launch, &stats, image.dependent());
        }
        let outcome = [keys, scales].map(|at| near.bytes(at).to_vec());
        Ok((outcome, counts, as_told))
    }
}

pub struct ShiftCheck {
    kernel: Kernel,
    case: ShiftCase,
    far: bool,
    expected: Shifted,
    /// What the prebuilt kernels do.
    counts: ShiftCounts,
}

impl ShiftCheck {
    fn run(&self, subject: &Subject) -> Result<(), Failure> {
        let run = self.case.on_image(self.kernel, subject.image(), self.far);
        let (outcome, counts, as_told) = run.map_err(|fault| Failure::Fault(fault.to_string()))?;
        if outcome != self.expected {
            return Err(Failure::Bits);
        }
        match as_told && counts == self.counts {
            true => Ok(()),
            false => Err(Failure::Traffic),
        }
    }
}

/// Names of the checks, and the checks of a kernel.
pub fn fused_checks(kernel: Kernel) -> Vec<(&'static str, FusedCheck)> {
    let mut checks = Checks {
        kernel,
        rng: Rng(1 + kernel.index() as u64),
        all: Vec::new(),
    };
    checks.random();
    checks.directed();
    checks.of_values();
    checks.all
}

/// Launches of one warp for a token's heads, which visits one stream after the other, and of several; tokens
/// that share a block.
const SHAPES: [Shape; 5] = [
    ([32, 1, 3], [1, 0]),
    ([32, 1, 1], [1, 2]),
    ([32, 2, 2], [2, 2]),
    ([32, 3, 1], [1, 0]),
    ([32, 1, 1], [1, 1]),
];

/// Positions found by search: by a temperature of slope 1000.3 and interval 1, and a factor of 1.5, each bit of the
/// constants of a logarithm and each of its roundings shows at one of them in a 127th of a value of 1, but for the
/// last bit of ln 2's second word and two roundings, which show at none of 4 * 10^8.
const LOGARITHMS: [i64; 17] = [
    1,
    3,
    177,
    713,
    111_735_602_523,
    8_335_142_734,
    36_614,
    26_023,
    12_979_937,
    11_543,
    86_609,
    5_737,
    179_590_600,
    387_316_798_512,
    371_628_783,
    25_595_766_384,
    10_981_438,
];

/// Dims of heads of values that show what codes are.
const DIMS: usize = 64;

struct Checks {
    kernel: Kernel,
    rng: Rng,
    all: Vec<(&'static str, FusedCheck)>,
}

impl Checks {
    fn push(&mut self, name: &'static str, check: StepCheck) {
        self.all.push((name, FusedCheck::Step(Box::new(check))));
    }

    fn add(&mut self, name: &'static str, case: AppendCase, far: bool, shape: Option<Shape>) {
        let check = StepCheck {
            kernel: self.kernel,
            expected: case.on_host(Isa::Scalar).unwrap(),
            case,
            how: How::Elsewhere { far, shape },
        };
        self.push(name, check);
    }

    fn random(&mut self) {
        const EACH: usize = 6;
        let [late, .., early] = Image::all() else {
            panic!("there are three targets")
        };
        let kernel = self.kernel;
        let mut rng = Rng(kernel.index() as u64);
        for angles in AngleKind::ALL {
            for (n, &kind) in angles.position_kinds().iter().enumerate() {
                let mut found = 0;
                while found < EACH {
                    let whole = match kernel.pairing {
                        Some(_) => Some([64, 64, 128, 256][found % 4]),
                        // Sums of more groups than a warp has lanes, and than it has twice.
                        None if n == 0 => [None, Some(6), Some(160), Some(514)][found % 4],
                        None => None,
                    };
                    let wish = AppendWish {
                        dtype: Some(kernel.dtype),
                        pairing: kernel.pairing,
                        angles: Some(angles),
                        kind: Some(kind),
                        aligned: Some(kernel.pairing.is_some()),
                        slots: Some(found),
                        staged: true,
                        whole,
                    };
                    let case = random_append(&mut rng, wish);
                    // Others have nothing to do, or no stages.
                    let first = case.on_image(late, false).unwrap();
                    if first.kernel != Some(kernel) {
                        continue;
                    }
                    let second = case.on_image(early, false).unwrap();
                    let both = [first, second].map(|run| (run.counts, reads_of(&run.stats)));
                    let check = StepCheck {
                        kernel,
                        expected: case.on_host(Isa::Scalar).unwrap(),
                        how: How::Planned(Box::new(both)),
                        case,
                    };
                    self.push("stages", check);
                    found += 1;
                }
            }
        }
    }

    /// Random stages for all streams of a case, and codes for its caches, if their layout is told, whose pages
    /// are of [`PAGE_SIZE`].
    fn dressed(&mut self, plain: &AppendCase, cache: Option<KvCacheLayout>) -> AppendCase {
        loop {
            let mut case = plain.clone();
            let mut cache = cache;
            let mut is_of_positions = false;
            for which in 0..3 {
                let Some((layout, goes)) = case.streams[which] else {
                    continue;
                };
                let [.., heads, dims] = layout.shape();
                let dtype = self.kernel.dtype;
                // What does not rotate has no pairing to change.
                let rope = &case.rope;
                let may_stay = which < 2 && rope.pairing() == rope.output_pairing();
                let back = which < 2 && rope.direction() == Direction::Inverse;
                let choices = [may_stay, back];
                let (stages, needed) = random_stages(&mut self.rng, dtype, choices, [heads, dims]);
                is_of_positions |= stages.factor_at(i64::MAX - 1) != stages.factor_at(-2);
                case.operands[which] = needed;
                case.problem = with_stages(case.problem, which, stages);
                match (goes.cached(), cache) {
                    (true, Some(layout)) if self.rng.chance(70) => {
                        let at = case.caches.expect("a cache")[which - 1];
                        let size = dtype.size();
                        let slots = case.buffers[at].bytes.len() / size / (heads * dims);
                        let shape = [slots / PAGE_SIZE, PAGE_SIZE, heads, dims];
                        let codes = self.codes_of(&mut case, which, shape);
                        cache = Some(match which {
                            1 => layout.with_k_codes(codes),
                            _ => layout.with_v_codes(codes),
                        });
                    }
                    _ if which == 0 && goes == Goes::Out && self.rng.chance(50) => {
                        let (codes, scales) = given_codes(&mut self.rng, heads);
                        case.operands[0].given_scales = Some(scales);
                        case.problem = case.problem.q_codes(codes);
                    }
                    _ => {}
                }
            }
            if let Some(cache) = cache {
                case.problem = case.problem.cache(cache);
            }
            // Rows of a table come to lie at other positions where they are far.
            let fits = !(is_of_positions && matches!(case.rope.angles(), Angles::Table(_)));
            if fits && kernel_of(&case) == Some(self.kernel) {
                return case;
            }
        }
    }

    fn codes_of(&mut self, case: &mut AppendCase, which: usize, shape: [usize; 4]) -> StoredCodes {
        if self.rng.chance(40) {
            let (codes, scales) = given_codes(&mut self.rng, shape[2]);
            case.operands[which].given_scales = Some(scales);
            return codes;
        }
        let whole = self.kernel.pairing.map(|_| shape[3]);
        let (codes, scales) = dynamic_codes(&mut self.rng, shape, whole);
        write_scales(case, which, scales);
        codes
    }

    /// What `append_checks.rs` has.
    fn directed(&mut self) {
        let kernel = self.kernel;
        for (n, (case, cache)) in flow_cases(kernel).into_iter().enumerate() {
            let case = self.dressed(&case, cache);
            self.add(
                "flows",
                case,
                n % 3 == 2,
                [None, Some(SHAPES[n / 2 % SHAPES.len()])][n % 2],
            );
        }
        for (n, (case, cache)) in slot_cases(kernel).into_iter().enumerate() {
            let case = self.dressed(&case, cache);
            self.add("slots", case.clone(), false, None);
            // Positions of tokens count by places where strides are far.
            if n % 2 == 0 || case.positions.kind == PositionKind::PerToken {
                self.add("slots", case, true, Some(SHAPES[n / 2 % SHAPES.len()]));
            }
        }
        let odd = odd_sequences(kernel, |case| self.dressed(&case, None));
        for (case, _, expected) in odd {
            let how = How::Elsewhere {
                far: false,
                shape: None,
            };
            let check = StepCheck {
                kernel,
                case,
                expected,
                how,
            };
            self.push("slots", check);
        }
        for angles in AngleKind::ALL {
            for (n, case) in kinds_cases(kernel, angles).into_iter().enumerate() {
                let (case, cache) = carrying(kernel, in_mode(case, n));
                let case = self.dressed(&case, cache);
                self.add("kinds", case, false, None);
            }
            for in_place in [true, false] {
                for (n, heads) in [[5, 5], [2, 7], [9, 3], [1, 4]].into_iter().enumerate() {
                    let case = in_mode(far_case(kernel, angles, in_place, heads), n);
                    let (case, cache) = carrying(kernel, case);
                    let case = self.dressed(&case, cache);
                    self.add("far", case, true, [None, Some(SHAPES[n])][n % 2]);
                }
            }
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
                let case = in_mode(case, n);
                // Products with a power of two show the same bits.
                self.add(name, alone(&case, Stages::new().scale(0.5)), false, None);
                if n != 0 {
                    continue;
                }
                let late = Stages::new().norm_after_rotation(HeadNorm::rms(1e-6));
                self.add(name, alone(&case, late), false, None);
                if kernel.pairing.is_none() {
                    // A stream without stages is served by code of its own.
                    let (mut beside, _) = carrying(kernel, case);
                    beside.problem = beside.problem.v_stages(Stages::new().scale(2.0));
                    self.add(name, beside, false, None);
                }
            }
        }
        let by_position = by_position(far_case(kernel, AngleKind::Rows, true, [5, 5]));
        for case in far_types(kernel).into_iter().chain([by_position]) {
            let (case, cache) = carrying(kernel, case);
            let case = self.dressed(&case, cache);
            self.add("far", case, true, None);
        }
    }

    /// Values that show what stages compute.
    fn of_values(&mut self) {
        let kernel = self.kernel;
        self.logarithms();
        self.codes();
        self.norms();
        self.next_to_one();
        self.late_weights();
        if kernel.pairing.is_none() {
            self.many_heads();
            self.wide_heads();
            self.shifts();
        }
    }

    /// Heads of more dims than a lane takes four of.
    fn wide_heads(&mut self) {
        let kernel = self.kernel;
        let all = [98, 162, 290, 514, 162].into_iter().enumerate();
        for (n, dims) in all {
            let heads = 2;
            let elements = random_elements(&mut self.rng, kernel.dtype, 2 * heads * dims);
            let mut case = plain(kernel, heads, dims, elements);
            let mut norm = HeadNorm::layer(1e-5);
            if n == 4 {
                norm = norm.across_heads();
            }
            let stages = match n % 2 {
                0 => Stages::new().bias().norm(norm),
                _ => Stages::new().bias().norm_after_rotation(norm),
            };
            case.problem = case.problem.q_stages(stages.scale(0.7));
            let mut vector = |len: usize| {
                let elements = random_elements(&mut self.rng, kernel.dtype, len);
                Some((bytes(kernel.dtype, &elements), len))
            };
            let operands = &mut case.operands[0];
            operands.bias = vector(heads * dims);
            operands.norm_weight = vector(dims);
            operands.norm_bias = vector(heads * dims);
            self.add("heads", case, false, None);
        }
    }

    /// Keys that rotate in their cache: elements in blocks, and codes of each kind by each kind of scales.
    fn shifts(&mut self) {
        let kernel = self.kernel;
        let [pages, page_size, heads] = [3, 4, 3];
        let given = |codes, form| StoredCodes::given(codes, form);
        let dynamic = |codes, groups: usize, group: usize| {
            let layout = ScaleLayout::heads_tokens(page_size, heads, groups);
            StoredCodes::dynamic(codes, 1e-6, layout).groups_of(group)
        };
        use ScaleForm::{Divide, Multiply};
        use ScaleRounding::{PowerOfTwoDown, PowerOfTwoUp};
        // Dims of a head, of a block, the first rotated one, how many rotate, and codes.
        let all = [
            (16, 4, 2, 12, None),
            (74, 2, 4, 66, None),
            (16, 4, 2, 12, Some(given(Codes::E4m3, Multiply))),
            (16, 16, 0, 12, Some(given(Codes::Int8, Divide))),
            (
                74,
                74,
                4,
                66,
                Some(given(Codes::Int8Full, Multiply).round_first()),
            ),
            (72, 4, 10, 40, Some(dynamic(Codes::E4m3, 9, 8))),
            (
                72,
                72,
                6,
                40,
                Some(dynamic(Codes::Int8, 6, 12).by_inverse()),
            ),
            (
                72,
                8,
                0,
                72,
                Some(dynamic(Codes::Int8Full, 1, 72).round_first()),
            ),
            (
                72,
                72,
                8,
                40,
                Some(dynamic(Codes::E4m3, 9, 8).rounded(PowerOfTwoUp).e8m0()),
            ),
            (
                72,
                4,
                6,
                50,
                Some(dynamic(Codes::Int8, 24, 3).rounded(PowerOfTwoDown).e8m0()),
            ),
        ];
        for (n, (dims, block, rotary_offset, rotary_dim, codes)) in all.into_iter().enumerate() {
            let layout = match block == dims {
                true => CacheLayout::paged_nhd(pages, page_size, heads, dims),
                false => CacheLayout::paged_packed(pages, page_size, heads, dims, block),
            };
            let mut cache = KvCacheLayout::k(layout);
            let rng = &mut self.rng;
            let len = layout.required_len().unwrap();
            let (mut keys, mut scales) = (random_elements(rng, kernel.dtype, len), None);
            let keys = match codes {
                None => bytes(kernel.dtype, &keys),
                Some(_) => keys.iter_mut().map(|_| rng.next() as u8).collect(),
            };
            if let Some(codes) = codes {
                cache = cache.with_k_codes(codes);
                let count = match codes.scale_layout() {
                    Some(_) => pages * page_size * heads * (dims / codes.group_dims(dims)),
                    None => [1, heads][n % 2],
                };
                let values: Vec<u8> = match codes.scales_are_e8m0() {
                    true => (0..count)
                        .map(|n| [0, 255, 1, 120, 130, 127][n % 6])
                        .collect(),
                    false => (0..count)
                        .flat_map(|_| rng.pick(&[0.01f32, 0.037, 1.0, 3.5, 1e-30]).to_le_bytes())
                        .collect(),
                };
                scales = Some((values, count));
            }
            let steps = (0..rotary_dim / 2).map(|_| rng.next()).collect();
            let pairing = [Pairing::HalfSplit, Pairing::Interleaved][n % 2];
            let rope = Rope::new(Frequencies::from_steps(steps).unwrap(), pairing);
            let case = |slots, mode| ShiftCase {
                rope: rope.shift().unwrap(),
                dtype: kernel.dtype,
                cache,
                rotary_offset,
                keys: keys.clone(),
                scales: scales.clone(),
                slots,
                by: -19,
                mode,
            };
            // Parts of pages, and all.
            for (slots, far) in [(1..10, false), (0..pages * page_size, true)] {
                let case = case(slots, MODES[n % MODES.len()]);
                let whole = case.on_image(kernel, &Image::all()[0], far);
                let (_, counts, _) = whole.unwrap();
                let check = ShiftCheck {
                    kernel,
                    expected: case.on_host(),
                    counts,
                    far,
                    case,
                };
                self.all
                    .push(("shifts", FusedCheck::Shift(Box::new(check))));
            }
        }
    }

    /// Positions at which each rounding of a logarithm, and each bit of its constants, shows in the scale of
    /// codes, which is an f32 whatever the elements are.
    fn logarithms(&mut self) {
        let kernel = self.kernel;
        let positions = [
            &LOGARITHMS[..],
            &[0, -1, -2, 2, i64::MAX, i64::MAX - 1, i64::MIN],
        ]
        .concat();
        for interval in [1, 3, 8192, u32::MAX] {
            let positions = match interval {
                1 => positions.clone(),
                _ => {
                    let at = |n: i64| n.saturating_mul(interval.into());
                    let near = |n: i64| [at(n) - 2, at(n) - 1, at(n)];
                    let few = [1, 2, 5, 1 << 20].into_iter().flat_map(near);
                    few.chain([0, -1, -2, i64::MAX, i64::MIN, i64::from(u32::MAX)])
                        .collect()
                }
            };
            let stages = Stages::new().scale(1.5).temperature(1000.3, interval);
            let dims = if kernel.pairing.is_some() { 64 } else { 2 };
            let ones = vec![narrow(kernel.dtype, 1.0); positions.len() * dims];
            let mut step = ValuesCase::new(kernel, positions.len(), [1, dims], ones);
            step.positions = positions;
            step.stages = stages;
            let codes = |layout| StoredCodes::dynamic(Codes::Int8, 0.0, layout);
            let case = step.case(codes(step.scales()));
            self.add("values", case, false, None);
        }
    }

    /// Values halfway between two codes and next to that; and heads whose largest magnitude is special to a scale.
    fn codes(&mut self) {
        let kernel = self.kernel;
        let dtype = kernel.dtype;
        for kind in [Codes::E4m3, Codes::Int8, Codes::Int8Full] {
            let mut values: Vec<u32> = Vec::new();
            let halves: Vec<f32> = match kind {
                Codes::E4m3 => (0..0x7e)
                    .map(|code| {
                        let [a, b] = [code, code + 1].map(phasor::quantize::e4m3_to_f32);
                        (a + b) / 2.0
                    })
                    .chain([448.0, 464.0, 480.0, 1e4])
                    .collect(),
                _ => (0..130)
                    .map(|n| n as f32 + 0.5)
                    .chain([127.0, 128.0])
                    .collect(),
            };
            for (n, half) in halves.into_iter().enumerate() {
                let bits = narrow(dtype, half);
                let sign = if n % 2 == 0 {
                    0
                } else {
                    1 << (8 * dtype.size() - 1)
                };
                values.extend([bits, bits + 1, bits.saturating_sub(1)].map(|x| x | sign));
                values.push(bits ^ (1 << (8 * dtype.size() - 1)) ^ sign);
            }
            values
                .extend([f32::INFINITY, -f32::INFINITY, f32::NAN, -0.0].map(|x| narrow(dtype, x)));
            let heads = values.len().div_ceil(DIMS);
            values.resize(heads * DIMS, 0);
            let step = ValuesCase::new(kernel, 1, [heads, DIMS], values);
            for form in [ScaleForm::Divide, ScaleForm::Multiply] {
                let codes = StoredCodes::given(kind, form);
                self.add("values", step.case(codes), false, None);
            }
        }
        // One group of a head each, with the largest last; nothing else; others that are not finite.
        let mut largest: Vec<f32> = vec![0.0, 1.0, 448.0, 127.0, 256.0, 64.0, 3.0e38, f32::MAX];
        for power in [
            -149, -140, -127, -126, -125, -119, -118, -117, -100, -24, -14, 0, 5, 100, 120, 127,
        ] {
            let x = f64::exp2(f64::from(power));
            for times in [
                1.0,
                1.75,
                127.0 / 64.0,
                1.0 + 2f64.powi(-7),
                1.0 - 2f64.powi(-9),
            ] {
                largest.push((x * times) as f32);
            }
        }
        let mut values: Vec<u32> = Vec::new();
        for (n, &x) in largest.iter().enumerate() {
            let mut head = vec![narrow(dtype, x / 3.0); DIMS];
            head[n % DIMS] = narrow(dtype, -x);
            if n % 5 == 4 {
                head[(n + 7) % DIMS] = narrow(dtype, [f32::INFINITY, f32::NAN][n % 2]);
            }
            values.extend(head);
        }
        for (n, rounding) in [
            ScaleRounding::None,
            ScaleRounding::PowerOfTwoUp,
            ScaleRounding::PowerOfTwoDown,
        ]
        .into_iter()
        .enumerate()
        {
            for kind in [Codes::E4m3, Codes::Int8] {
                for (factor, floor) in [
                    (1.0, 0.0),
                    (0.75, 1e-6),
                    (f32::exp2(-100.0), f32::MIN_POSITIVE),
                ] {
                    for e8m0 in [false, true] {
                        if e8m0 && rounding == ScaleRounding::None {
                            continue;
                        }
                        let mut step =
                            ValuesCase::new(kernel, 1, [largest.len(), DIMS], values.clone());
                        step.stages = Stages::new().scale(factor);
                        let mut codes =
                            StoredCodes::dynamic(kind, floor, step.scales()).rounded(rounding);
                        if (n + usize::from(e8m0)) % 2 == 1 {
                            codes = codes.by_inverse();
                        }
                        if e8m0 {
                            codes = codes.e8m0();
                        }
                        self.add("values", step.case(codes), false, None);
                    }
                }
            }
        }
    }

    /// What norms compute shows in the scales of codes, which are f32 whatever the elements are.
    fn norms(&mut self) {
        let kernel = self.kernel;
        let all_dims = match kernel.pairing {
            Some(_) => [64, 128, 256],
            None => [6, 70, 132],
        };
        for (n, dims) in all_dims.into_iter().enumerate() {
            let mut norms = vec![HeadNorm::rms(1e-6), HeadNorm::layer(1e-5)];
            if kernel.pairing.is_none() {
                norms.extend(norms.clone().into_iter().map(HeadNorm::across_heads));
            }
            for norm in norms {
                let (tokens, heads) = (4, 5);
                let mut vector = |len: usize| {
                    // Of one magnitude, so that all count in a sum.
                    let values = (0..len).map(|_| {
                        let x = 1.0 + (self.rng.next() >> 40) as f32 * f32::exp2(-24.0);
                        narrow(kernel.dtype, if self.rng.chance(50) { x } else { -x })
                    });
                    values.collect::<Vec<_>>()
                };
                let values = vector(tokens * heads * dims);
                let mut operand = |len: usize| Some((bytes(kernel.dtype, &vector(len)), len));
                let (bias, weight) = (operand(heads * dims), operand(dims));
                let norm_bias = operand(heads * dims);
                let mut step = ValuesCase::new(kernel, tokens, [heads, dims], values);
                let norm = norm.with_weight_offset([0.0, 0.3][n % 2]);
                step.stages = Stages::new().bias().norm(norm).scale(0.7);
                let codes = StoredCodes::dynamic(Codes::Int8, 0.0, step.scales());
                let mut case = step.case(codes);
                case.operands[2].bias = bias;
                let weight = weight.map(|(mut bytes, len)| {
                    // Dims that become infinite or no number are not what a scale is made for.
                    if n == 1 {
                        let size = kernel.dtype.size();
                        for (dim, x) in [(3, f32::INFINITY), (40, f32::NAN)] {
                            let bits = narrow(kernel.dtype, x).to_le_bytes();
                            bytes[dim * size..(dim + 1) * size].copy_from_slice(&bits[..size]);
                        }
                    }
                    (bytes, len)
                });
                case.operands[2].norm_weight = weight;
                case.operands[2].norm_bias = norm_bias;
                self.add("values", case, false, None);
            }
        }
    }

    /// A scale next to 1: values halfway between two elements are not halfway any more.
    fn next_to_one(&mut self) {
        let kernel = self.kernel;
        let dims = if kernel.pairing.is_some() { 64 } else { 6 };
        let half = f32::exp2(match kernel.dtype {
            Dtype::F32 => -24.0,
            Dtype::F16 => -11.0,
            _ => -8.0,
        });
        let vector = |x: f32, len: usize| bytes(kernel.dtype, &vec![narrow(kernel.dtype, x); len]);
        for scale in [1.0f32.next_up(), 1.0f32.next_down()] {
            let values = vec![narrow(kernel.dtype, 1.0); 2 * dims];
            let mut step = ValuesCase::new(kernel, 2, [1, dims], values);
            step.stages = Stages::new().bias().scale(scale);
            let mut case = step.case_of_elements();
            case.operands[2].bias = Some((vector(half, dims), dims));
            self.add("values", case, false, None);
        }
    }

    /// Angles before the wait, by positions from a start, and what stages need behind it: each head has its own.
    fn late_weights(&mut self) {
        let kernel = self.kernel;
        let (heads, dims) = (7, if kernel.pairing.is_some() { 64 } else { 6 });
        let q = Layout::tokens(2, heads, dims);
        let rng = &mut self.rng;
        let mut operand = |len: usize| {
            let elements = random_elements(rng, kernel.dtype, len);
            Some((bytes(kernel.dtype, &elements), len))
        };
        let mut case = plain(kernel, heads, dims, vec![0; 2 * heads * dims]);
        let frequencies = Frequencies::from_theta(1e4, dims).unwrap();
        case.rope = Rope::new(frequencies, kernel.pairing.unwrap_or(Pairing::Interleaved));
        let stages = Stages::new().bias().norm(HeadNorm::layer(1e-5));
        let (codes, _) = given_codes(&mut Rng(5), heads);
        case.problem = Problem::new(kernel.dtype)
            .q((q, q))
            .q_stages(stages)
            .q_codes(codes)
            .longer_buffers();
        case.streams[0] = Some((q, Goes::Out));
        case.tensors[0] = [0, 1];
        case.buffers[0].bytes = operand(2 * heads * dims).expect("values").0;
        case.buffers[0].written = false;
        case.buffers.push(Buffer {
            name: "q_out",
            bytes: vec![0xee; 2 * heads * dims * kernel.dtype.size()],
            misalign: 0,
            written: true,
        });
        case.operands[0].bias = operand(heads * dims);
        case.operands[0].norm_weight = operand(heads * dims);
        case.operands[0].norm_bias = operand(heads * dims);
        let scales = (1..=heads).flat_map(|n| (n as f32 / 8.0).to_le_bytes());
        case.operands[0].given_scales = Some((scales.collect(), heads));
        case.positions = TestPositions {
            start: 7,
            ..TestPositions::of(PositionKind::Start, IdType::I64, &[])
        };
        case.mode = LaunchMode::Dependent;
        for shape in [None, Some(SHAPES[1]), Some(SHAPES[2])] {
            self.add("values", case.clone(), false, shape);
        }
    }

    /// Norms of all heads together, whose sums are folded in several rounds.
    fn many_heads(&mut self) {
        let kernel = self.kernel;
        for (n, heads) in [3, 31, 33, 70].into_iter().enumerate() {
            for late in [false, true] {
                let norm = match (n + usize::from(late)) % 2 {
                    0 => HeadNorm::layer(1e-5),
                    _ => HeadNorm::rms(1e-6),
                };
                let norm = norm.across_heads();
                let dims = 6;
                let elements = random_elements(&mut self.rng, kernel.dtype, 2 * heads * dims);
                let mut case = plain(kernel, heads, dims, elements);
                let stages = match late {
                    true => Stages::new().norm_after_rotation(norm),
                    false => Stages::new().norm(norm),
                };
                case.problem = case.problem.q_stages(stages);
                let len = heads * dims;
                let weight = random_elements(&mut self.rng, kernel.dtype, len);
                case.operands[0].norm_weight = Some((bytes(kernel.dtype, &weight), len));
                self.add("heads", case, late, [None, Some(SHAPES[n])][n % 2]);
            }
        }
    }
}

/// The kernel that serves a case.
fn kernel_of(case: &AppendCase) -> Option<Kernel> {
    let call = case.placed(&mut Memory::new(), false).call?;
    let target = Image::all()[0].target(case.multiprocessors, case.mode);
    Some(call.launch(&target).kernel)
}

fn with_stages(problem: Problem, which: usize, stages: Stages) -> Problem {
    match which {
        0 => problem.q_stages(stages),
        1 => problem.k_stages(stages),
        _ => problem.v_stages(stages),
    }
}

/// Gives a stream a buffer for so many scales.
fn write_scales(case: &mut AppendCase, which: usize, scales: usize) {
    case.operands[which].written_scales = Some((case.buffers.len(), scales));
    case.buffers.push(Buffer {
        name: ["", "k_scales", "v_scales"][which],
        bytes: vec![0xdd; 4 * scales],
        misalign: 0,
        written: true,
    });
}

/// A rotation of queries alone, with stages.
fn alone(case: &Case, stages: Stages) -> AppendCase {
    let q = case.q.as_ref().expect("queries");
    let phasor::InOut::InPlace(layout) = q.layout else {
        panic!("in place")
    };
    AppendCase {
        rope: case.rope.clone(),
        problem: Problem::new(case.dtype).q(layout).q_stages(stages),
        streams: [Some((layout, Goes::InPlace)), None, None],
        buffers: vec![Buffer {
            name: "q",
            bytes: bytes(case.dtype, &q.source),
            misalign: 0,
            written: true,
        }],
        tensors: [[0; 2]; 3],
        caches: None,
        positions: case.positions.clone(),
        cu_seqlens: None,
        slots: None,
        operands: Default::default(),
        multiprocessors: case.multiprocessors,
        mode: case.mode,
    }
}

/// Two tokens' queries in place, some of whose dims rotate.
fn plain(kernel: Kernel, heads: usize, dims: usize, elements: Vec<u32>) -> AppendCase {
    let layout = Layout::tokens(2, heads, dims).with_rotary_offset(2);
    let frequencies = Frequencies::from_theta(1e4, dims - 2).unwrap();
    AppendCase {
        rope: Rope::new(frequencies, Pairing::HalfSplit),
        problem: Problem::new(kernel.dtype).q(layout),
        streams: [Some((layout, Goes::InPlace)), None, None],
        buffers: vec![Buffer {
            name: "q",
            bytes: bytes(kernel.dtype, &elements),
            misalign: 0,
            written: true,
        }],
        tensors: [[0; 2]; 3],
        caches: None,
        positions: TestPositions::of(PositionKind::PerToken, IdType::I64, &[7, -3]),
        cu_seqlens: None,
        slots: None,
        operands: Default::default(),
        multiprocessors: 1,
        mode: LaunchMode::Ordinary,
    }
}

/// Values that go to a cache as codes, beside a query a token.
struct ValuesCase {
    kernel: Kernel,
    tokens: usize,
    heads: usize,
    dims: usize,
    /// `[tokens, heads, dims]`
    values: Vec<u32>,
    positions: Vec<i64>,
    stages: Stages,
}

impl ValuesCase {
    fn new(kernel: Kernel, tokens: usize, [heads, dims]: [usize; 2], values: Vec<u32>) -> Self {
        Self {
            kernel,
            tokens,
            heads,
            dims,
            values,
            positions: vec![0; tokens],
            stages: Stages::new(),
        }
    }

    fn pages(&self) -> usize {
        self.tokens.div_ceil(PAGE_SIZE)
    }

    /// Of one group a head.
    fn scales(&self) -> ScaleLayout {
        ScaleLayout::heads_tokens(PAGE_SIZE, self.heads, 1)
    }

    fn case(&self, codes: StoredCodes) -> AppendCase {
        self.stored(Some(codes))
    }

    /// The same, where they stay elements.
    fn case_of_elements(&self) -> AppendCase {
        self.stored(None)
    }

    fn stored(&self, codes: Option<StoredCodes>) -> AppendCase {
        let dtype = self.kernel.dtype;
        let q = Layout::tokens(self.tokens, 1, self.dims);
        let v = Layout::tokens(self.tokens, self.heads, self.dims);
        let cache = CacheLayout::paged_nhd(self.pages(), PAGE_SIZE, self.heads, self.dims);
        // What is not where vectors are is the other kernel's.
        let misalign = match self.kernel.pairing {
            Some(_) => 0,
            None => dtype.size(),
        };
        let buffer = |name, bytes: Vec<u8>, written| Buffer {
            name,
            bytes,
            misalign,
            written,
        };
        let queries = vec![0; q.required_len().unwrap() * dtype.size()];
        let slots: Vec<i64> = (0..self.tokens as i64).rev().collect();
        let layout = KvCacheLayout::v(cache);
        let (layout, size) = match codes {
            Some(codes) => (layout.with_v_codes(codes), 1),
            None => (layout, dtype.size()),
        };
        let mut case = AppendCase {
            rope: Rope::new(
                Frequencies::from_theta(1e4, self.dims).unwrap(),
                self.kernel.pairing.unwrap_or(Pairing::Interleaved),
            ),
            problem: Problem::new(dtype)
                .q(q)
                .v_to_cache(v)
                .v_stages(self.stages)
                .cache(layout),
            streams: [Some((q, Goes::InPlace)), None, Some((v, Goes::ToCache))],
            buffers: vec![
                buffer("q", queries, true),
                buffer("v", bytes(dtype, &self.values), false),
                buffer(
                    "v_cache",
                    vec![0xee; size * cache.required_len().unwrap()],
                    true,
                ),
            ],
            tensors: [[0, 0], [0, 0], [1, 1]],
            caches: Some([2, 2]),
            positions: TestPositions::of(PositionKind::PerToken, IdType::I64, &self.positions),
            cu_seqlens: None,
            slots: Some(TestSlots::Mapping(Values::new(IdType::I32, &slots))),
            operands: Default::default(),
            multiprocessors: 1,
            mode: LaunchMode::DependentPositionsSettled,
        };
        match codes.map(|codes| codes.scale_layout()) {
            None => {}
            Some(Some(_)) => write_scales(&mut case, 2, self.pages() * PAGE_SIZE * self.heads),
            Some(None) => {
                let one = 1f32.to_le_bytes().to_vec();
                case.operands[2].given_scales = Some((one, 1));
            }
        }
        case
    }
}
