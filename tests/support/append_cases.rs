//! Whole calls that append, as data: made by hand or at random, and run on the host or in the interpreter.
//! Both must leave the same bits in every buffer, gaps included.

use crate::kernel_cases::{
    AngleKind, ID_TYPES, MODES, Rng, TestPositions, Values, bytes, random_elements, random_layout,
    random_positions, random_rope,
};
use crate::ptx_backend::{Image, constant, constant_angles, ids, settle_ids, triggers};
use phasor::call::{
    Addresses, AngleAddresses, CacheAddresses, Call, RawPositions, StageAddresses, TensorAddresses,
    VectorAddress,
};
use phasor::launch::{Kernel, LaunchMode};
use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, ScaleForm, ScaleRounding};
use phasor::{
    Angles, CacheLayout, Direction, Dtype, Host, IdType, Ids, Isa, KvCacheLayout, Layout,
    OutOfRange, Pairing, Plan, PositionKind, Problem, Rope, ScaleLayout, SlotsIn, Stages,
    StoredCodes, Threads,
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

/// What the stages of a stream need.
#[derive(Clone, Debug, Default)]
pub struct Operands {
    /// Bytes, and how many values they are: the bias, the norm's weight and its bias, scales.
    pub bias: Option<(Vec<u8>, usize)>,
    pub norm_weight: Option<(Vec<u8>, usize)>,
    pub norm_bias: Option<(Vec<u8>, usize)>,
    pub given_scales: Option<(Vec<u8>, usize)>,
    /// The buffer of scales that are written, and how many it has.
    pub written_scales: Option<(usize, usize)>,
}

impl Operands {
    fn placed(
        &self,
        at: &[u64],
        place: &mut impl FnMut(&'static str, &[u8]) -> u64,
    ) -> StageAddresses {
        let mut vector = |name, operand: &Option<(Vec<u8>, usize)>| {
            let (bytes, len) = operand.as_ref()?;
            let address = place(name, bytes);
            Some(VectorAddress { address, len: *len })
        };
        StageAddresses {
            bias: vector("bias", &self.bias),
            norm_weight: vector("norm weight", &self.norm_weight),
            norm_bias: vector("norm bias", &self.norm_bias),
            scales: vector("given scales", &self.given_scales).or_else(|| {
                let (buffer, len) = self.written_scales?;
                let address = at[buffer];
                Some(VectorAddress { address, len })
            }),
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
    /// Of q, k and v.
    pub operands: [Operands; 3],
    pub multiprocessors: u32,
    pub mode: LaunchMode,
}

/// What every buffer holds after a call, and whether a slot was reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendOutcome {
    pub buffers: Vec<Vec<u8>>,
    pub reported: bool,
}

/// What a step is given by addresses.
pub type RawOperands = (
    [TensorAddresses; 3],
    Option<CacheAddresses>,
    [StageAddresses; 3],
    RawPositions,
);

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
pub struct HostBuffer {
    words: Vec<u64>,
    begin: usize,
    len: usize,
}

impl HostBuffer {
    pub fn new(bytes: &[u8], misalign: usize) -> HostBuffer {
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

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let first = self.words.as_mut_ptr().cast::<u8>();
        // SAFETY: the words reach as far, and any bytes are words.
        unsafe { std::slice::from_raw_parts_mut(first.add(self.begin), self.len) }
    }

    pub fn address(&mut self) -> u64 {
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

    /// The same and what stages need, where `hold` puts what is only read.
    pub fn operands_at(
        &self,
        at: &[u64],
        report: u64,
        mut hold: impl FnMut(&[u8]) -> u64,
    ) -> RawOperands {
        let (tensors, cache, positions) = self.addresses(at, report, |_, values| {
            Ids::at(hold(&values.bytes), values.id_type, values.len())
        });
        let stages = (self.operands.each_ref())
            .map(|operands| operands.placed(at, &mut |_, bytes| hold(bytes)));
        (tensors, cache, stages, positions)
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
        let (tensors, cache, stages, positions) =
            self.operands_at(&at, report.address(), |bytes| {
                let mut buffer = HostBuffer::new(bytes, 0);
                let address = buffer.address();
                held.push(buffer);
                address
            });
        let host = Host::new()
            .with_isa(isa)
            .unwrap()
            .with_threads(Threads::One);
        let rotator = host.rotator(&self.rope);
        // SAFETY: all buffers live, reach as far as their layouts, and no two are one.
        unsafe { rotator.step_raw(&self.plan(), tensors, cache, stages, positions)? };
        Ok(AppendOutcome {
            buffers: buffers
                .iter_mut()
                .map(|buffer| buffer.bytes_mut().to_vec())
                .collect(),
            reported: report.bytes_mut()[0] == 1,
        })
    }

    /// The call for buffers at these addresses, and operands anywhere.
    pub fn call_at(&self, at: &[u64]) -> Result<Option<Call>, phasor::Error> {
        let anywhere = 1 << 20;
        let (tensors, cache, positions) = self.addresses(at, anywhere, |_, values| {
            Ids::at(anywhere, values.id_type, values.len())
        });
        let stages =
            (self.operands.each_ref()).map(|operands| operands.placed(at, &mut |_, _| anywhere));
        let [q, k, v] = tensors;
        let mut placed = |_, _| anywhere;
        self.plan().call(&Addresses {
            q,
            k,
            v,
            angles: constant_angles(self.rope.angles(), &mut placed),
            positions,
            cache,
            stages: Some(stages),
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
            let scales = self.operands.iter().filter_map(|o| o.written_scales);
            for buffer in caches.into_iter().chain(scales.map(|(buffer, _)| buffer)) {
                memory.set_contended(at[buffer]);
            }
        }
        let report = memory.add("report", vec![0; 4], 0);
        let (tensors, cache, positions) = self.addresses(&at, report, |name, values| {
            let address = ids(memory, name, values.bytes.clone(), self.mode);
            Ids::at(address, values.id_type, values.len())
        });
        let stages = self.operands.each_ref().map(|operands| {
            operands.placed(&at, &mut |name, bytes| {
                let address = memory.add(name, bytes.to_vec(), 0);
                settle_ids(memory, address, self.mode);
                address
            })
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
            stages: Some(stages),
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
            stats = image.run_launch(&mut memory, &launch)?;
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
    /// Whether streams have stages.
    pub staged: bool,
    /// Dims of all heads, all of which rotate.
    pub whole: Option<usize>,
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
    let rotary_dim = match (wish.whole, aligned) {
        (Some(dims), _) => dims,
        (None, true) => 8 * (1 + rng.below(4)),
        (None, false) => 2 * (1 + rng.below(20)),
    };
    // Norms want even heads.
    let more = if wish.staged { unit.max(2) } else { unit };
    let head_dim_of = |rng: &mut Rng| match wish.whole {
        Some(dims) => dims,
        None => rotary_dim + more * rng.pick(&[0, 0, 0, 1, 2, 3, 5]),
    };
    let (q_dim, k_dim) = (head_dim_of(rng), head_dim_of(rng));
    // As values do not rotate, they may have fewer dims than rotate.
    let v_dim = match rng.chance(60) {
        true => k_dim,
        false if wish.whole.is_some() => k_dim,
        false if wish.staged => rotary_dim + more * rng.below(5),
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
    let kind = wish
        .kind
        .unwrap_or_else(|| rng.pick(AngleKind::Rows.position_kinds()));
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

    let mut operands: [Operands; 3] = Default::default();
    if wish.staged {
        for (which, operands) in operands.iter_mut().enumerate() {
            if !present[which] {
                continue;
            }
            let (heads, dim) = shapes[which];
            // What does not rotate has no pairing to change.
            let may_stay = which < 2 && rope.pairing() == rope.output_pairing();
            let back = which < 2 && rope.direction() == Direction::Inverse;
            let (stages, needed) =
                random_stages(buffers.rng, dtype, [may_stay, back], [heads, dim]);
            *operands = needed;
            problem = match which {
                0 => problem.q_stages(stages),
                1 => problem.k_stages(stages),
                _ => problem.v_stages(stages),
            };
        }
        if has_q && !q_goes.in_place() && buffers.rng.chance(40) {
            let (codes, scales) = given_codes(buffers.rng, q_heads);
            operands[0].given_scales = Some(scales);
            problem = problem.q_codes(codes);
        }
    }
    let (mut caches, mut slots) = (None, None);
    if k_cached || v_cached {
        let rng = &mut *buffers.rng;
        let (pages, page_size) = rng.pick(&[(1, 32), (3, 4), (8, 2), (12, 1), (5, 3), (40, 1)]);
        let mut written = Vec::new();
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
        let mut layout = layout;
        // In one buffer both are codes or neither.
        let k_coded = rng.chance(60);
        let v_coded = if both { k_coded } else { rng.chance(60) };
        for (which, coded) in [(1, k_cached && k_coded), (2, v_cached && v_coded)] {
            if !(wish.staged && coded) {
                continue;
            }
            let (heads, dim) = shapes[which];
            let codes = if rng.chance(30) {
                let (codes, scales) = given_codes(rng, heads);
                operands[which].given_scales = Some(scales);
                codes
            } else {
                let (codes, len) = dynamic_codes(rng, [pages, page_size, heads, dim], wish.whole);
                written.push((which, len));
                codes
            };
            layout = match which {
                1 => layout.with_k_codes(codes),
                _ => layout.with_v_codes(codes),
            };
        }
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
        for (which, scales) in written {
            // Words, so that scales are where they can be.
            let words = scales.div_ceil(dtype.size()) * 4;
            let aligned = std::mem::replace(&mut buffers.aligned, true);
            let n = buffers.add(["", "k_scales", "v_scales"][which], words, true);
            buffers.aligned = aligned;
            operands[which].written_scales = Some((n, scales));
        }
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
        operands,
        multiprocessors: rng.pick(&[1, 1, 8, 132]),
        mode: rng.pick(&MODES),
    }
}

/// A bias, a norm and a scale, as it comes, and what they need.
pub fn random_stages(
    rng: &mut Rng,
    dtype: Dtype,
    [may_stay, back]: [bool; 2],
    [heads, dim]: [usize; 2],
) -> (Stages, Operands) {
    let mut stages = Stages::new();
    let mut operands = Operands::default();
    let vector = |rng: &mut Rng, len: usize| {
        let elements = random_elements(rng, dtype, len);
        Some((bytes(dtype, &elements), len))
    };
    // There is no way back through these.
    if rng.chance(30) && !back {
        stages = stages.bias();
        operands.bias = vector(rng, heads * dim);
    }
    if rng.chance(65) && !back {
        let mut norm = match rng.chance(40) {
            true => HeadNorm::layer(rng.pick(&[0.0, 1e-5])),
            false => HeadNorm::rms(1e-6),
        };
        norm = norm.with_weight_offset(rng.pick(&[0.0, 1.0]));
        let after = rng.chance(30);
        if rng.chance(40) {
            norm = norm.round_before_weight();
        }
        if rng.chance(40) && !after {
            norm = norm.round_after();
        }
        if rng.chance(25) {
            norm = norm.across_heads();
        }
        stages = match after {
            true => stages.norm_after_rotation(norm),
            false => stages.norm(norm),
        };
        let one_or_all = |rng: &mut Rng| if rng.chance(50) { dim } else { heads * dim };
        if rng.chance(70) {
            let len = one_or_all(rng);
            operands.norm_weight = vector(rng, len);
        }
        if rng.chance(40) {
            let len = one_or_all(rng);
            operands.norm_bias = vector(rng, len);
        }
    }
    if rng.chance(30) {
        stages = stages.scale(0.088_388);
    }
    if rng.chance(20) {
        stages = stages.temperature(0.1, rng.pick(&[1, 3, 8192, u32::MAX]));
    }
    if may_stay && rng.chance(15) {
        stages = stages.without_rotation();
    }
    (stages, operands)
}

fn random_codes(rng: &mut Rng) -> Codes {
    rng.pick(&[Codes::E4m3, Codes::E4m3, Codes::Int8, Codes::Int8Full])
}

/// Codes by scales that are given, and these.
pub fn given_codes(rng: &mut Rng, heads: usize) -> (StoredCodes, (Vec<u8>, usize)) {
    let form = rng.pick(&[ScaleForm::Divide, ScaleForm::Multiply]);
    let mut codes = StoredCodes::given(random_codes(rng), form);
    if rng.chance(40) {
        codes = codes.round_first();
    }
    let len = rng.pick(&[1, heads]);
    let scales = (0..len).flat_map(|_| {
        let scale = rng.pick(&[0.01f32, 0.037, 1.0, 3.5, 1e-30]);
        scale.to_le_bytes()
    });
    (codes, (scales.collect(), len))
}

/// Codes by scales that are written, and how many there are.
pub fn dynamic_codes(
    rng: &mut Rng,
    [pages, page_size, heads, dim]: [usize; 4],
    whole: Option<usize>,
) -> (StoredCodes, usize) {
    let group_dims = match whole {
        Some(dims) if rng.chance(70) => dims,
        _ => {
            let divides: Vec<_> = (1..=dim).filter(|n| dim % n == 0).collect();
            rng.pick(&divides)
        }
    };
    let groups = dim / group_dims;
    let layout = match rng.chance(50) {
        true => ScaleLayout::tokens_heads(page_size, heads, groups),
        false => ScaleLayout::heads_tokens(page_size, heads, groups),
    };
    let offset = rng.below(4);
    let floor = rng.pick(&[1e-6, f32::MIN_POSITIVE, 0.0]);
    let rounding = rng.pick(&[
        ScaleRounding::None,
        ScaleRounding::PowerOfTwoUp,
        ScaleRounding::PowerOfTwoDown,
    ]);
    let mut codes = StoredCodes::dynamic(random_codes(rng), floor, layout.with_offset(offset))
        .groups_of(group_dims)
        .rounded(rounding);
    if rng.chance(50) {
        codes = codes.by_inverse();
    }
    if rng.chance(40) {
        codes = codes.round_first();
    }
    if rounding != ScaleRounding::None && rng.chance(60) {
        codes = codes.e8m0();
    }
    (codes, offset + pages * page_size * heads * groups)
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
    if choice.is_multiple_of(4) {
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
