//! Whole calls that append, as data: made by hand or at random, and run on the host or in the interpreter.
//! Both must leave the same bits in every buffer, gaps included.

use crate::kernel_cases::{
    AngleKind, ID_TYPES, MODES, Rng, TestPositions, Values, bytes, random_elements, random_layout,
    random_positions, random_rope,
};
use crate::ptx_backend::{Image, constant, constant_angles, ids, run_launch, triggers};
use phasor::call::{
    Addresses, AngleAddresses, CacheAddresses, Call, RawPositions, TensorAddresses,
};
use phasor::launch::{Kernel, LaunchMode};
use phasor::{
    Angles, CacheLayout, Dtype, Host, IdType, Ids, Isa, KvCacheLayout, Layout, OutOfRange, Pairing,
    Plan, PositionKind, Problem, Rope, SlotsIn, Threads,
};
use ptx_interpreter::{Fault, Memory, Stats};
use std::collections::{HashMap, HashSet};

/// Memory of a call.
#[derive(Clone, Debug)]
pub struct Buffer {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    /// Bytes by which it misses the alignment of a vector.
    pub misalign: usize,
    /// Whether the call writes it.
    pub written: bool,
}

/// Slots that a case owns.
#[derive(Clone, Debug)]
pub enum TestSlots {
    Mapping(Values),
    PageTable(Values, Values),
    PageIndices(Values, Values, Values),
    Sequences(Values),
}

impl TestSlots {
    fn placed(&self, place: &mut impl FnMut(&'static str, &Values) -> Ids<u64>) -> SlotsIn<u64> {
        match self {
            TestSlots::Mapping(slots) => SlotsIn::mapping(place("slots", slots)),
            TestSlots::PageTable(pages, lengths) => {
                SlotsIn::page_table(place("pages", pages), place("lengths", lengths))
            }
            TestSlots::PageIndices(indptr, indices, lengths) => SlotsIn::page_indices(
                place("indptr", indptr),
                place("indices", indices),
                place("lengths", lengths),
            ),
            TestSlots::Sequences(lengths) => SlotsIn::sequences(place("lengths", lengths)),
        }
    }
}

#[derive(Clone, Debug)]
pub struct AppendCase {
    pub rope: Rope,
    pub problem: Problem,
    /// Where q, k and v are read, and where they go.
    pub streams: [Option<(Layout, Goes)>; 3],
    pub buffers: Vec<Buffer>,
    /// Indices of the buffers: source and destination of q, k and v.
    pub tensors: [[usize; 2]; 3],
    /// Those of k's and of v's cache.
    pub caches: Option<[usize; 2]>,
    pub positions: TestPositions,
    pub cu_seqlens: Option<Values>,
    pub slots: Option<TestSlots>,
    pub multiprocessors: u32,
    pub mode: LaunchMode,
}

/// What every buffer holds after a call, and whether a slot was reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendOutcome {
    pub buffers: Vec<Vec<u8>>,
    pub reported: bool,
}

pub struct AppendRun {
    pub outcome: AppendOutcome,
    pub stats: Stats,
    /// For each buffer, how often each byte was read and written.
    pub counts: HashMap<&'static str, Vec<(u32, u32)>>,
    /// `None` if there was nothing to launch.
    pub kernel: Option<Kernel>,
    pub grid: [u32; 3],
    pub triggers: bool,
}

/// A case in the interpreter's memory.
pub struct Placed {
    /// Address of each buffer.
    pub at: Vec<u64>,
    pub report: u64,
    /// `None` if there is nothing to do.
    pub call: Option<Call>,
}

/// Host memory that begins where it is told.
struct HostBuffer {
    words: Vec<u64>,
    begin: usize,
    len: usize,
}

impl HostBuffer {
    fn new(bytes: &[u8], misalign: usize) -> HostBuffer {
        let mut words = vec![0u64; (bytes.len() + misalign).div_ceil(8) + 2];
        let base = words.as_ptr().addr();
        let begin = base.next_multiple_of(16) - base + misalign;
        let mut buffer = HostBuffer {
            begin,
            len: bytes.len(),
            words: std::mem::take(&mut words),
        };
        buffer.bytes_mut().copy_from_slice(bytes);
        buffer
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let first = self.words.as_mut_ptr().cast::<u8>();
        // SAFETY: the words reach as far, and any bytes are words.
        unsafe { std::slice::from_raw_parts_mut(first.add(self.begin), self.len) }
    }

    fn address(&mut self) -> u64 {
        let first = self
            .words
            .as_mut_ptr()
            .cast::<u8>()
            .wrapping_add(self.begin);
        first.expose_provenance() as u64
    }
}

impl AppendCase {
    pub fn plan(&self) -> Plan {
        Plan::new(&self.rope, &self.problem)
            .unwrap_or_else(|error| panic!("{error}: {:?}", self.problem))
    }

    /// All but the angles, where the buffers are at these addresses.
    fn addresses(
        &self,
        at: &[u64],
        report: u64,
        mut place: impl FnMut(&'static str, &Values) -> Ids<u64>,
    ) -> ([TensorAddresses; 3], Option<CacheAddresses>, RawPositions) {
        let mut positions = self.positions.placed(&mut place);
        if let Some(offsets) = &self.cu_seqlens {
            positions = positions.cu_seqlens(place("cu_seqlens", offsets));
        }
        let tensors = self.tensors.map(|[source, destination]| TensorAddresses {
            source: at[source],
            destination: at[destination],
        });
        let cache = self.caches.map(|[k, v]| CacheAddresses {
            k: at[k],
            v: at[v],
            slots: self
                .slots
                .as_ref()
                .expect("caches have slots")
                .placed(&mut place),
            report,
        });
        (tensors, cache, positions)
    }

    pub fn on_host(&self, isa: Isa) -> Result<AppendOutcome, phasor::Error> {
        let mut buffers: Vec<_> = self
            .buffers
            .iter()
            .map(|buffer| HostBuffer::new(&buffer.bytes, buffer.misalign))
            .collect();
        let at: Vec<_> = buffers.iter_mut().map(HostBuffer::address).collect();
        let mut report = HostBuffer::new(&[0; 4], 0);
        let mut held = Vec::new();
        let (tensors, cache, positions) = self.addresses(&at, report.address(), |_, values| {
            let mut buffer = HostBuffer::new(&values.bytes, 0);
            let ids = Ids::at(buffer.address(), values.id_type, values.len());
            held.push(buffer);
            ids
        });
        let host = Host::new()
            .with_isa(isa)
            .unwrap()
            .with_threads(Threads::One);
        let rotator = host.rotator(&self.rope);
        // SAFETY: all buffers live, reach as far as their layouts, and no two are one.
        unsafe { rotator.step_raw(&self.plan(), tensors, cache, Default::default(), positions)? };
        Ok(AppendOutcome {
            buffers: buffers
                .iter_mut()
                .map(|buffer| buffer.bytes_mut().to_vec())
                .collect(),
            reported: report.bytes_mut()[0] == 1,
        })
    }

    /// Puts it in memory. `contended`: tokens may have the same slot.
    pub fn placed(&self, memory: &mut Memory, contended: bool) -> Placed {
        let at: Vec<_> = self
            .buffers
            .iter()
            .map(|buffer| {
                let address = memory.add(buffer.name, buffer.bytes.clone(), buffer.misalign);
                if !buffer.written {
                    memory.set_read_only(address);
                }
                address
            })
            .collect();
        if let (true, Some(caches)) = (contended, self.caches) {
            for cache in caches {
                memory.set_contended(at[cache]);
            }
        }
        let report = memory.add("report", vec![0; 4], 0);
        let (tensors, cache, positions) = self.addresses(&at, report, |name, values| {
            let address = ids(memory, name, values.bytes.clone(), self.mode);
            Ids::at(address, values.id_type, values.len())
        });
        let mut placed = |name, bytes: Vec<u8>| constant(memory, name, bytes);
        let angles: AngleAddresses = constant_angles(self.rope.angles(), &mut placed);
        let [q, k, v] = tensors;
        let addresses = Addresses {
            q,
            k,
            v,
            angles,
            positions,
            cache,
            stages: Default::default(),
        };
        let call = self.plan().call(&addresses).unwrap();
        Placed { at, report, call }
    }

    /// Runs it as the CUDA backend would. `contended`: tokens may have the same slot.
    pub fn on_image(&self, image: &Image, contended: bool) -> Result<AppendRun, Fault> {
        let mut memory = Memory::new();
        let Placed { at, report, call } = self.placed(&mut memory, contended);
        let (mut kernel, mut stats, mut as_told) = (None, Stats::default(), true);
        let mut grid = [0; 3];
        if let Some(call) = call {
            let launch = call.launch(&image.target(self.multiprocessors, self.mode));
            (kernel, grid) = (Some(launch.kernel), launch.grid);
            let module = image.module(launch.kernel);
            stats = run_launch(module, &mut memory, &launch, image.dependent())?;
            as_told = triggers(&launch, &stats, image.dependent());
        }
        let of_each = || self.buffers.iter().zip(&at);
        Ok(AppendRun {
            outcome: AppendOutcome {
                buffers: at.iter().map(|&at| memory.bytes(at).to_vec()).collect(),
                reported: memory.bytes(report)[0] == 1,
            },
            counts: of_each()
                .filter(|(buffer, _)| !buffer.bytes.is_empty())
                .map(|(buffer, &at)| (buffer.name, memory.counts(at, buffer.bytes.len())))
                .collect(),
            stats,
            kernel,
            grid,
            triggers: as_told,
        })
    }
}

/// What a random case is made of, where it is not left to chance.
#[derive(Clone, Copy, Debug, Default)]
pub struct AppendWish {
    /// One of each kind, by turns.
    pub slots: Option<usize>,
    pub dtype: Option<Dtype>,
    pub pairing: Option<Pairing>,
    pub angles: Option<AngleKind>,
    pub kind: Option<PositionKind>,
    /// Shapes, strides and bases that allow vectors.
    pub aligned: Option<bool>,
}

/// Where a stream is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goes {
    InPlace,
    Out,
    ToCache,
    InPlaceAndCache,
    OutAndCache,
}

impl Goes {
    pub fn in_place(self) -> bool {
        matches!(self, Goes::InPlace | Goes::InPlaceAndCache)
    }

    pub fn cached(self) -> bool {
        !matches!(self, Goes::InPlace | Goes::Out)
    }
}

/// Which tensors of a case are windows of one buffer.
#[derive(Clone, Copy, PartialEq)]
enum Shared {
    Nothing,
    /// All that are read.
    Sources,
    All,
}

/// Collects the buffers of a case.
struct Buffers<'a> {
    rng: &'a mut Rng,
    dtype: Dtype,
    aligned: bool,
    all: Vec<Buffer>,
}

impl Buffers<'_> {
    fn add(&mut self, name: &'static str, len: usize, written: bool) -> usize {
        let elements = random_elements(self.rng, self.dtype, len);
        let misalign = if self.aligned { 0 } else { self.rng.below(4) };
        self.all.push(Buffer {
            name,
            bytes: bytes(self.dtype, &elements),
            misalign: misalign * self.dtype.size(),
            written,
        });
        self.all.len() - 1
    }
}

/// A random call that is small enough to be interpreted. No two tokens have the same slot.
pub fn random_append(rng: &mut Rng, wish: AppendWish) -> AppendCase {
    let dtype = wish.dtype.unwrap_or_else(|| rng.pick(&Dtype::ALL));
    let pairing = wish
        .pairing
        .unwrap_or_else(|| rng.pick(&[Pairing::HalfSplit, Pairing::Interleaved]));
    let aligned = wish.aligned.unwrap_or_else(|| rng.chance(60));
    let unit = if aligned { 4 } else { 1 };

    // Heads and dims.
    let rotary_dim = match aligned {
        true => 8 * (1 + rng.below(4)),
        false => 2 * (1 + rng.below(20)),
    };
    let head_dim_of = |rng: &mut Rng| rotary_dim + unit * rng.pick(&[0, 0, 0, 1, 2, 3, 5]);
    let (q_dim, k_dim) = (head_dim_of(rng), head_dim_of(rng));
    // As values do not rotate, they may have fewer dims than rotate.
    let v_dim = match rng.chance(60) {
        true => k_dim,
        false => unit * (1 + rng.below(rotary_dim / unit + 5)),
    };
    let even = unit.max(2);
    let offset = |rng: &mut Rng, dim: usize| even * rng.below((dim - rotary_dim) / even + 1);
    let (q_heads, k_heads) = rng.pick(&[(1, 1), (4, 1), (6, 2), (3, 3), (9, 1), (2, 5), (11, 4)]);
    let v_heads = match rng.chance(80) {
        true => k_heads,
        false => 1 + rng.below(6),
    };

    // Sequences.
    let ragged = rng.chance(60);
    let (batch, tokens, lengths) = if ragged {
        let lengths: Vec<usize> = (0..1 + rng.below(5))
            .map(|_| rng.pick(&[0, 1, 1, 2, 3, 7]))
            .collect();
        let padding = rng.pick(&[0, 0, 1, 3]);
        let tokens = (lengths.iter().sum::<usize>() + padding).max(1);
        (1, tokens, lengths)
    } else {
        let (batch, tokens) = rng.pick(&[(1, 1), (1, 4), (5, 1), (2, 3), (3, 2), (1, 9)]);
        (batch, tokens, vec![tokens; batch])
    };
    let sequences = lengths.len();
    let id_type = rng.pick(&ID_TYPES);
    let cu_seqlens = ragged.then(|| {
        let mut ends = vec![0];
        for length in &lengths {
            ends.push(ends[ends.len() - 1] + *length as i64);
        }
        Values::new(id_type, &ends)
    });

    // Angles.
    let angles = wish.angles.unwrap_or_else(|| rng.pick(&AngleKind::ALL));
    let mut rope = random_rope(rng, angles, pairing, rotary_dim);
    let kind = wish.kind.unwrap_or_else(|| {
        rng.pick(&[
            PositionKind::Start,
            PositionKind::StartPerSequence,
            PositionKind::PerToken,
            PositionKind::PerTokenShared,
            PositionKind::PerAxis,
            PositionKind::PerSequence,
        ])
    });
    let counts = [sequences, tokens, batch * tokens];
    let positions = random_positions(rng, kind, counts, rope.angles());

    // Where each goes.
    let has_q = rng.chance(85);
    let has_k = !has_q || rng.chance(90);
    let has_v = rng.chance(85);
    let shared = rng.pick(&[
        Shared::Nothing,
        Shared::Nothing,
        Shared::Nothing,
        Shared::Sources,
        Shared::All,
    ]);
    let goes = |rng: &mut Rng| match shared {
        Shared::All => rng.pick(&[Goes::ToCache, Goes::InPlaceAndCache]),
        _ => rng.pick(&[
            Goes::InPlace,
            Goes::Out,
            Goes::ToCache,
            Goes::ToCache,
            Goes::InPlaceAndCache,
            Goes::OutAndCache,
        ]),
    };
    let (k_goes, v_goes) = (goes(rng), goes(rng));
    let q_goes = match shared == Shared::All || rng.chance(60) {
        true => Goes::InPlace,
        false => Goes::Out,
    };
    let in_place = (has_q && q_goes.in_place()) || (has_k && k_goes.in_place());
    let passes = matches!(rope.angles(), Angles::Table(table)
        if table.out_of_range() == OutOfRange::PassThrough);
    // Only one element at a time can another pairing be written than is read.
    if !in_place && !passes && wish.aligned != Some(true) {
        rope = rope.with_output_pairing(rng.pick(&[Pairing::HalfSplit, Pairing::Interleaved]));
    }
    let k_cached = has_k && k_goes.cached();
    let v_cached = has_v && v_goes.cached();

    let mut problem = Problem::new(dtype).longer_buffers();
    let mut buffers = Buffers {
        rng,
        dtype,
        aligned,
        all: Vec::new(),
    };
    // What is not there is at the first buffer.
    let mut tensors = [[0; 2]; 3];
    let mut streams = [None; 3];
    let offsets = [
        offset(buffers.rng, q_dim),
        offset(buffers.rng, k_dim),
        offset(buffers.rng, k_dim),
    ];
    let shapes = [(q_heads, q_dim), (k_heads, k_dim), (v_heads, v_dim)];
    let present = [has_q, has_k, has_v];
    let name = |which: usize, names: [&'static str; 3]| names[which];
    let mut windows = [None; 3];
    if shared != Shared::Nothing {
        let gap = unit * buffers.rng.below(3);
        let row: usize = shapes.iter().map(|(heads, dim)| heads * dim).sum::<usize>() + gap;
        let mut at = 0;
        for (window, (heads, dim)) in windows.iter_mut().zip(shapes) {
            let layout = Layout::bshd(batch, tokens, heads, dim)
                .with_strides(tokens * row, row, dim)
                .with_offset(at);
            *window = Some(layout);
            at += heads * dim;
        }
        let written = (has_q && q_goes.in_place())
            || (has_k && k_goes.in_place())
            || (has_v && v_goes.in_place());
        buffers.add("packed", batch * tokens * row, written);
        problem = match shared {
            Shared::All => problem.one_buffer(),
            _ => problem.packed(),
        };
    }
    for (which, (heads, dim)) in shapes.into_iter().enumerate() {
        if !present[which] {
            continue;
        }
        let goes = [q_goes, k_goes, v_goes][which];
        let shape = [batch, tokens, heads, dim];
        let layout = |rng: &mut Rng| {
            let layout = random_layout(rng, shape, aligned, 4);
            match which {
                2 => layout,
                _ => layout.with_rotary_offset(offsets[which]),
            }
        };
        let source = match windows[which] {
            Some(window) if which == 2 => window,
            Some(window) => window.with_rotary_offset(offsets[which]),
            None => layout(buffers.rng),
        };
        streams[which] = Some((source, goes));
        let from = match shared {
            Shared::All | Shared::Sources => 0,
            Shared::Nothing => {
                let len = source.required_len().unwrap();
                buffers.add(name(which, ["q", "k", "v"]), len, goes.in_place())
            }
        };
        tensors[which] = [from; 2];
        match goes {
            Goes::InPlace | Goes::InPlaceAndCache => {
                problem = match which {
                    0 => problem.q(source),
                    1 => problem.k(source),
                    _ => problem.v(source),
                };
            }
            Goes::ToCache => {
                problem = match which {
                    1 => problem.k_to_cache(source),
                    _ => problem.v_to_cache(source),
                };
            }
            Goes::Out | Goes::OutAndCache => {
                let destination = layout(buffers.rng);
                let len = destination.required_len().unwrap();
                tensors[which][1] =
                    buffers.add(name(which, ["q_out", "k_out", "v_out"]), len, true);
                problem = match which {
                    0 => problem.q((source, destination)),
                    1 => problem.k((source, destination)),
                    _ => problem.v((source, destination)),
                };
            }
        }
    }

    let (mut caches, mut slots) = (None, None);
    if k_cached || v_cached {
        let rng = &mut *buffers.rng;
        let (pages, page_size) = rng.pick(&[(1, 32), (3, 4), (8, 2), (12, 1), (5, 3), (40, 1)]);
        let k = random_cache(rng, [pages, page_size, k_heads, k_dim], unit);
        let v = random_cache(rng, [pages, page_size, v_heads, v_dim], unit);
        let both = k_cached && v_cached && k.shape() == v.shape() && rng.chance(50);
        let layout = if both {
            let blocks = k != CacheLayout::paged_nhd(pages, page_size, k_heads, k_dim)
                && k != CacheLayout::paged_hnd(pages, page_size, k_heads, k_dim);
            KvCacheLayout::one_buffer(match rng.below(4) {
                0 => k.in_turn(),
                1 if !blocks => k.side_by_side(),
                2 => k.of_layer(3, 1).in_pairs_of_pages(),
                _ => k.in_pairs_of_pages(),
            })
        } else {
            match (k_cached, v_cached) {
                (true, true) => KvCacheLayout::separate(k, v),
                (true, false) => KvCacheLayout::k(k),
                _ => KvCacheLayout::v(v),
            }
        };
        problem = problem.cache(layout);
        let choice = wish.slots.unwrap_or_else(|| rng.below(4));
        slots = Some(random_slots(
            rng,
            pages,
            page_size,
            [batch, tokens],
            &lengths,
            choice,
        ));
        let len = |layout: CacheLayout| layout.required_len().unwrap();
        caches = Some(if both {
            // Room for all layouts of both.
            let n = buffers.add("cache", 6 * len(k) + 2 * k_dim, true);
            [n; 2]
        } else {
            let mut cache = |name, layout, is| match is {
                true => buffers.add(name, len(layout), true),
                false => 0,
            };
            [cache("k_cache", k, k_cached), cache("v_cache", v, v_cached)]
        });
    }
    let all = buffers.all;
    AppendCase {
        rope,
        problem,
        streams,
        buffers: all,
        tensors,
        caches,
        positions,
        cu_seqlens,
        slots,
        multiprocessors: rng.pick(&[1, 1, 8, 132]),
        mode: rng.pick(&MODES),
    }
}

fn random_cache(rng: &mut Rng, [pages, size, heads, dim]: [usize; 4], unit: usize) -> CacheLayout {
    let x = [8, 4, 2, 1]
        .into_iter()
        .filter(|x| dim % x == 0 && x % unit == 0)
        .collect::<Vec<_>>();
    let layout = match rng.below(5) {
        0 | 1 => CacheLayout::paged_nhd(pages, size, heads, dim),
        2 | 3 => CacheLayout::paged_hnd(pages, size, heads, dim),
        _ => CacheLayout::paged_packed(pages, size, heads, dim, rng.pick(&x)),
    };
    layout.with_offset(unit * rng.below(3))
}

/// Slots of the tokens of a call, none of which two tokens have: most of them inside.
fn random_slots(
    rng: &mut Rng,
    pages: usize,
    page_size: usize,
    [batch, tokens]: [usize; 2],
    lengths: &[usize],
    choice: usize,
) -> TestSlots {
    let id_type = rng.pick(&ID_TYPES);
    let outside = |rng: &mut Rng, first: usize| match id_type {
        IdType::I64 => rng.pick(&[first as i64, i64::MAX, 1 << 40, (1 << 32) + 1]),
        _ => rng.pick(&[first as i64, i64::from(i32::MAX)]),
    };
    let negative = match id_type {
        IdType::I64 => rng.pick(&[-1, i64::MIN]),
        _ => -1,
    };
    if choice % 4 == 0 {
        let mut free: Vec<i64> = (0..(pages * page_size) as i64).collect();
        let slots: Vec<i64> = (0..batch * tokens)
            .map(|_| match rng.below(8) {
                0 => negative,
                1 => outside(rng, pages * page_size),
                _ if free.is_empty() => negative,
                _ => free.swap_remove(rng.below(free.len())),
            })
            .collect();
        return TestSlots::Mapping(Values::new(id_type, &slots));
    }
    // Tokens that each sequence had before.
    let before: Vec<i64> = lengths
        .iter()
        .map(|_| match rng.below(10) {
            0 => negative,
            1 => outside(rng, pages * page_size),
            _ => rng.below(page_size * 3) as i64,
        })
        .collect();
    let lengths_type = match id_type {
        // What is outside must fit.
        IdType::I64 => IdType::I64,
        _ => rng.pick(&[IdType::I32, IdType::U32]),
    };
    let before_values = Values::new(lengths_type, &before);
    if choice % 4 == 1 {
        return TestSlots::Sequences(before_values);
    }
    let mut free: Vec<i64> = (0..pages as i64).collect();
    let mut page = |rng: &mut Rng, is_written: bool| match rng.below(10) {
        0 => negative,
        1 => outside(rng, pages),
        _ if !is_written => rng.below(pages) as i64,
        _ if free.is_empty() => outside(rng, pages),
        _ => free.swap_remove(rng.below(free.len())),
    };
    let written = |s: usize, column: usize| {
        let columns: HashSet<usize> = (0..lengths[s] as i64)
            .filter_map(|place| usize::try_from(before[s].wrapping_add(place)).ok())
            .map(|n| n / page_size)
            .collect();
        columns.contains(&column)
    };
    let most = 1 + rng.below(5);
    if choice % 4 == 2 {
        let table: Vec<i64> = (0..lengths.len())
            .flat_map(|s| (0..most).map(move |column| (s, column)))
            .map(|(s, column)| page(rng, written(s, column)))
            .collect();
        return TestSlots::PageTable(Values::new(id_type, &table), before_values);
    }
    let mut indptr = vec![0];
    let mut indices = Vec::new();
    for s in 0..lengths.len() {
        for column in 0..rng.below(most + 1) {
            indices.push(page(rng, written(s, column)));
        }
        indptr.push(indices.len() as i64);
    }
    let indices = Values::new(id_type, &indices);
    TestSlots::PageIndices(
        Values::new(rng.pick(&ID_TYPES), &indptr),
        indices,
        before_values,
    )
}
