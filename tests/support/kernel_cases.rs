//! Whole calls as data: made by hand or at random, and run on any backend. Every backend must
//! leave the same bits in every buffer, gaps between heads and tokens included.

use phasor::half::{bf16, f16};
use phasor::launch::{Family, Kernel, LaunchMode};
use phasor::{
    Angles, CosSinTable, Direction, Dtype, Element, Frequencies, FrequencyRowKind, FrequencyRows,
    Host, HostInOut, IdType, Ids, InOut, Isa, Layout, OutOfRange, Pairing, PositionKind, Positions,
    PositionsIn, Problem, Rope, Threads,
};
use std::sync::atomic::{AtomicU64, Ordering};

/// Calls `check` with so many seeds, on two threads: from a new one on in each run, or from the one asked
/// for with `PHASOR_TEST_SEED`.
pub fn for_each_seed(count: u64, check: impl Fn(u64) + Sync) {
    let first = match std::env::var("PHASOR_TEST_SEED") {
        Ok(seed) => {
            let digits = seed.trim_start_matches("0x");
            u64::from_str_radix(digits, 16).expect("PHASOR_TEST_SEED is hexadecimal")
        }
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as u64,
    };
    println!("PHASOR_TEST_SEED={first:#x}");
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    match next.fetch_add(1, Ordering::Relaxed) {
                        n if n < count => check(first.wrapping_add(n)),
                        _ => break,
                    }
                }
            });
        }
    });
}

/// A small generator (splitmix64), so that a seed is all that a failing case needs.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// An element type that a case can hold as bits.
pub trait Bits: Element {
    fn from_raw(bits: u32) -> Self;
    fn raw(self) -> u32;
}

impl Bits for f32 {
    fn from_raw(bits: u32) -> Self {
        f32::from_bits(bits)
    }
    fn raw(self) -> u32 {
        self.to_bits()
    }
}

impl Bits for f16 {
    fn from_raw(bits: u32) -> Self {
        f16::from_bits(bits as u16)
    }
    fn raw(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Bits for bf16 {
    fn from_raw(bits: u32) -> Self {
        bf16::from_bits(bits as u16)
    }
    fn raw(self) -> u32 {
        u32::from(self.to_bits())
    }
}

/// Elements as bits.
pub type Elements = Vec<u32>;

pub fn typed<T: Bits>(elements: &[u32]) -> Vec<T> {
    elements.iter().map(|&bits| T::from_raw(bits)).collect()
}

pub fn raw<T: Bits>(elements: &[T]) -> Elements {
    elements.iter().map(|x| x.raw()).collect()
}

/// Little-endian bytes, as they lie in memory.
pub fn bytes(dtype: Dtype, elements: &[u32]) -> Vec<u8> {
    elements
        .iter()
        .flat_map(|bits| bits.to_le_bytes()[..dtype.size()].to_vec())
        .collect()
}

pub fn from_bytes(dtype: Dtype, bytes: &[u8]) -> Elements {
    bytes
        .chunks(dtype.size())
        .map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        })
        .collect()
}

/// Random bits: mostly ordinary numbers, with zeros, subnormals, infinities and NaNs among them.
pub fn random_elements(rng: &mut Rng, dtype: Dtype, count: usize) -> Elements {
    let special = rng.chance(50);
    (0..count)
        .map(|_| {
            if special && rng.chance(10) {
                return rng.next() as u32
                    & if dtype == Dtype::F32 {
                        u32::MAX
                    } else {
                        0xffff
                    };
            }
            let x = (rng.next() as i64 as f64 / (1u64 << 61) as f64) as f32;
            match dtype {
                Dtype::F32 => x.raw(),
                Dtype::F16 => f16::narrow(x).raw(),
                Dtype::Bf16 => bf16::narrow(x).raw(),
                other => panic!("{other} is not covered"),
            }
        })
        .collect()
}

/// What a rotation forms its angles from. The kernels are told by data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AngleKind {
    /// One step per pair.
    Exact,
    /// Steps of several rows or axes, and a factor per row.
    Rows,
    /// A table of cos and sin.
    Table,
}

impl AngleKind {
    pub const ALL: [AngleKind; 3] = [AngleKind::Exact, AngleKind::Rows, AngleKind::Table];

    /// The kinds of positions that differ for it. On one axis, a position per axis is one per token.
    pub fn position_kinds(self) -> &'static [PositionKind] {
        const ALL: [PositionKind; 6] = [
            PositionKind::Start,
            PositionKind::StartPerSequence,
            PositionKind::PerSequence,
            PositionKind::PerToken,
            PositionKind::PerTokenShared,
            PositionKind::PerAxis,
        ];
        match self {
            AngleKind::Rows => &ALL,
            AngleKind::Exact | AngleKind::Table => &ALL[..5],
        }
    }
}

pub const MODES: [LaunchMode; 3] = [
    LaunchMode::Ordinary,
    LaunchMode::Dependent,
    LaunchMode::DependentPositionsSettled,
];

/// Values of a type, as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Values {
    pub id_type: IdType,
    pub bytes: Vec<u8>,
}

impl Values {
    /// Those that the type does not hold lose their upper bits.
    pub fn new(id_type: IdType, values: &[i64]) -> Values {
        let bytes = values
            .iter()
            .flat_map(|v| v.to_le_bytes()[..id_type.size()].to_vec())
            .collect();
        Values { id_type, bytes }
    }

    pub fn len(&self) -> usize {
        self.bytes.len() / self.id_type.size()
    }

    pub fn values(&self) -> Vec<i64> {
        match TypedIds::new(self) {
            TypedIds::I32(ids) => ids.into_iter().map(i64::from).collect(),
            TypedIds::I64(ids) => ids,
            TypedIds::U32(ids) => ids.into_iter().map(i64::from).collect(),
        }
    }
}

/// Positions that a case owns.
#[derive(Clone, Debug)]
pub struct TestPositions {
    pub kind: PositionKind,
    /// Of [`PositionKind::Start`].
    pub start: i64,
    /// Of the other kinds.
    pub ids: Values,
    pub row_kind: FrequencyRowKind,
    /// Of [`FrequencyRowKind::Call`].
    pub row: u32,
    /// Of the kinds per sequence and per token.
    pub rows: Values,
}

impl TestPositions {
    pub fn of(kind: PositionKind, id_type: IdType, ids: &[i64]) -> TestPositions {
        TestPositions {
            ids: Values::new(id_type, ids),
            ..TestPositions::from(kind, 0)
        }
    }

    pub fn from(kind: PositionKind, start: i64) -> TestPositions {
        TestPositions {
            kind,
            start,
            ids: Values::new(IdType::I64, &[]),
            row_kind: FrequencyRowKind::None,
            row: 0,
            rows: Values::new(IdType::U32, &[]),
        }
    }

    pub fn with_rows(mut self, kind: FrequencyRowKind, rows: Values) -> TestPositions {
        (self.row_kind, self.rows) = (kind, rows);
        self
    }

    pub fn with_row(mut self, row: u32) -> TestPositions {
        (self.row_kind, self.row) = (FrequencyRowKind::Call, row);
        self
    }

    /// The positions of a call where `place` puts the ids.
    pub fn placed<M>(
        &self,
        mut place: impl FnMut(&'static str, &Values) -> Ids<M>,
    ) -> PositionsIn<M> {
        let mut ids = || place("ids", &self.ids);
        let positions = match self.kind {
            PositionKind::Start => PositionsIn::start(self.start),
            PositionKind::StartPerSequence => PositionsIn::start_per_sequence(ids()),
            PositionKind::PerSequence => PositionsIn::per_sequence(ids()),
            PositionKind::PerToken => PositionsIn::per_token(ids()),
            PositionKind::PerTokenShared => PositionsIn::per_token_shared(ids()),
            PositionKind::PerAxis => PositionsIn::per_axis(ids()),
            other => panic!("{other:?} is not covered"),
        };
        let mut rows = || place("rows", &self.rows);
        match self.row_kind {
            FrequencyRowKind::None => positions,
            FrequencyRowKind::Call => positions.frequency_row(self.row),
            FrequencyRowKind::PerSequence => positions.frequency_rows_per_sequence(rows()),
            FrequencyRowKind::PerToken => positions.frequency_rows_per_token(rows()),
            other => panic!("{other:?} is not covered"),
        }
    }
}

#[derive(Clone, Debug)]
pub struct TensorCase {
    pub layout: InOut<Layout>,
    /// Empty where the case has one buffer for all.
    pub source: Elements,
    /// Only out of place.
    pub destination: Option<Elements>,
    /// Elements by which the buffers miss the alignment of a vector.
    pub misalign: usize,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub dtype: Dtype,
    pub rope: Rope,
    pub q: Option<TensorCase>,
    pub k: Option<TensorCase>,
    pub one_buffer: Option<Elements>,
    pub positions: TestPositions,
    /// Shapes the grid.
    pub multiprocessors: u32,
    /// Where the image can be launched so.
    pub mode: LaunchMode,
}

/// The buffers that were written, after a call: q's, k's, or the one for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome(pub Vec<Elements>);

impl Case {
    pub fn problem(&self) -> Problem {
        // The buffers have room to spare.
        let mut problem = Problem::new(self.dtype).longer_buffers();
        if let Some(q) = &self.q {
            problem = problem.q(q.layout);
        }
        if let Some(k) = &self.k {
            problem = problem.k(k.layout);
        }
        if self.one_buffer.is_some() {
            problem = problem.one_buffer();
        }
        problem
    }

    pub fn tensors(&self) -> impl Iterator<Item = &TensorCase> {
        self.q.iter().chain(&self.k)
    }

    /// Runs the call on a variant of the host backend.
    pub fn on_host(&self, isa: Isa) -> Outcome {
        match self.dtype {
            Dtype::F32 => self.on_host_typed::<f32>(isa),
            Dtype::F16 => self.on_host_typed::<f16>(isa),
            Dtype::Bf16 => self.on_host_typed::<bf16>(isa),
            other => panic!("{other} is not covered"),
        }
    }

    fn on_host_typed<T: Bits>(&self, isa: Isa) -> Outcome {
        let ids = [&self.positions.ids, &self.positions.rows].map(TypedIds::new);
        let positions: Positions<'_> = self
            .positions
            .placed(|name, _| ids[usize::from(name == "rows")].ids());
        let host = Host::new()
            .with_isa(isa)
            .unwrap()
            .with_threads(Threads::One);
        let rotator = host.rotator(&self.rope);
        let plan = rotator.plan(&self.problem()).unwrap();
        if let Some(buffer) = &self.one_buffer {
            let mut buffer: Vec<T> = typed(buffer);
            rotator
                .rotate_one_buffer(&plan, &mut buffer, positions)
                .unwrap();
            return Outcome(vec![raw(&buffer)]);
        }
        let buffers = |tensor: &TensorCase| {
            let source: Vec<T> = typed(&tensor.source);
            (source, tensor.destination.as_deref().map(typed::<T>))
        };
        let mut q = self.q.as_ref().map(buffers);
        let mut k = self.k.as_ref().map(buffers);
        rotator
            .rotate(
                &plan,
                q.as_mut().map(operand),
                k.as_mut().map(operand),
                positions,
            )
            .unwrap();
        Outcome(
            q.into_iter()
                .chain(k)
                .map(|(source, destination)| raw(&destination.unwrap_or(source)))
                .collect(),
        )
    }
}

fn operand<T: Element>(buffers: &mut (Vec<T>, Option<Vec<T>>)) -> HostInOut<'_, T> {
    match buffers {
        (source, None) => InOut::InPlace(source),
        (source, Some(destination)) => (&source[..], &mut destination[..]).into(),
    }
}

/// Values as the integers that they are.
pub enum TypedIds {
    I32(Vec<i32>),
    I64(Vec<i64>),
    U32(Vec<u32>),
}

impl TypedIds {
    pub fn new(values: &Values) -> TypedIds {
        let words = values.bytes.chunks_exact(values.id_type.size());
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let long = |bytes: &[u8]| i64::from_le_bytes(bytes.try_into().unwrap());
        match values.id_type {
            IdType::I32 => TypedIds::I32(words.map(|w| word(w) as i32).collect()),
            IdType::I64 => TypedIds::I64(words.map(long).collect()),
            IdType::U32 => TypedIds::U32(words.map(word).collect()),
            other => panic!("{other:?} is not covered"),
        }
    }

    fn ids(&self) -> Ids<&[u8]> {
        match self {
            TypedIds::I32(ids) => ids.into(),
            TypedIds::I64(ids) => ids.into(),
            TypedIds::U32(ids) => ids.into(),
        }
    }
}

/// What a random case is made of, where it is not left to chance.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish {
    pub dtype: Option<Dtype>,
    pub pairing: Option<Pairing>,
    pub angles: Option<AngleKind>,
    pub kind: Option<PositionKind>,
    pub form: Option<Form>,
    /// Shapes, strides and bases that allow vectors.
    pub aligned: Option<bool>,
    pub head_dim: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    InPlace,
    OutOfPlace,
    /// q or k in place, and the other one elsewhere.
    Mixed,
    Packed,
}

impl Form {
    pub const ALL: [Form; 4] = [Form::InPlace, Form::OutOfPlace, Form::Mixed, Form::Packed];
}

/// A random call that is small enough to be interpreted.
pub fn random_case(rng: &mut Rng, wish: Wish) -> Case {
    let dtype = wish.dtype.unwrap_or_else(|| rng.pick(&Dtype::ALL));
    let pairing = wish
        .pairing
        .unwrap_or_else(|| rng.pick(&[Pairing::HalfSplit, Pairing::Interleaved]));
    let aligned = wish.aligned.unwrap_or_else(|| rng.chance(50));
    let form = wish.form.unwrap_or_else(|| rng.pick(&Form::ALL));

    // Elements of a vector; a chunk of pairs takes two of them.
    let vector = 4;
    let head_dim = wish.head_dim.unwrap_or_else(|| {
        if aligned {
            2 * vector * (1 + rng.below(4))
        } else {
            2 * (1 + rng.below(70))
        }
    });
    let (rotary_dim, rotary_offset) = if rng.chance(50) {
        (head_dim, 0)
    } else if aligned {
        let rotary_dim = 2 * vector * (1 + rng.below((head_dim / (2 * vector)).max(1)));
        let rotary_dim = rotary_dim.min(head_dim);
        let offset = vector * rng.below((head_dim - rotary_dim) / vector + 1);
        (rotary_dim, offset)
    } else {
        let rotary_dim = 2 * (1 + rng.below(head_dim / 2));
        (rotary_dim, 2 * rng.below((head_dim - rotary_dim) / 2 + 1))
    };

    let batch = rng.pick(&[1, 1, 1, 2, 3, 0]);
    let sequence = rng.pick(&[1, 1, 2, 3, 5, 9, 0]);
    let (q_heads, k_heads) = rng.pick(&[(1, 1), (4, 1), (6, 2), (3, 3), (9, 1), (0, 2), (11, 0)]);

    let angles = wish.angles.unwrap_or_else(|| {
        rng.pick(&[
            AngleKind::Exact,
            AngleKind::Exact,
            AngleKind::Rows,
            AngleKind::Table,
        ])
    });
    let mut rope = random_rope(rng, angles, pairing, rotary_dim);
    // Only one element at a time can another pairing be written than is read.
    let table = match rope.angles() {
        Angles::Table(table) => Some(table.out_of_range()),
        _ => None,
    };
    if form == Form::OutOfPlace
        && wish.aligned != Some(true)
        && table != Some(OutOfRange::PassThrough)
    {
        let other = rng.pick(&[Pairing::HalfSplit, Pairing::Interleaved]);
        rope = rope.with_output_pairing(other);
    }
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
    let counts = [batch, sequence, batch * sequence];
    let positions = random_positions(rng, kind, counts, rope.angles());

    // The rotated dims of k may lie elsewhere than those of q.
    let unit = if aligned { vector } else { 2 };
    let k_rotary_offset = unit * rng.below((head_dim - rotary_dim) / unit + 1);

    let layout = |rng: &mut Rng, heads: usize, rotary_offset: usize| {
        random_layout(rng, [batch, sequence, heads, head_dim], aligned, vector)
            .with_rotary_offset(rotary_offset)
    };
    let k_is_in_place = rng.chance(50);
    let elsewhere = |is_k: bool| match form {
        Form::InPlace | Form::Packed => false,
        Form::OutOfPlace => true,
        Form::Mixed => is_k != k_is_in_place,
    };
    let tensor = |rng: &mut Rng, is_k: bool, heads: usize, rotary_offset: usize| {
        let misalign = if aligned { 0 } else { rng.below(vector) };
        let source = layout(rng, heads, rotary_offset);
        let destination = layout(rng, heads, rotary_offset);
        let mut elements = |layout: &Layout| {
            let len = layout.required_len().unwrap() + rng.below(3);
            random_elements(rng, dtype, len)
        };
        if elsewhere(is_k) {
            TensorCase {
                layout: (source, destination).into(),
                source: elements(&source),
                destination: Some(elements(&destination)),
                misalign,
            }
        } else {
            TensorCase {
                layout: source.into(),
                source: elements(&source),
                destination: None,
                misalign,
            }
        }
    };
    let absent = rng.below(8);
    let mut case = Case {
        dtype,
        rope,
        q: (absent != 0).then(|| tensor(rng, false, q_heads, rotary_offset)),
        k: (absent != 1).then(|| tensor(rng, true, k_heads, k_rotary_offset)),
        one_buffer: None,
        positions,
        multiprocessors: rng.pick(&[1, 1, 8, 132]),
        mode: rng.pick(&MODES),
    };
    if form == Form::Packed {
        let total = q_heads + 2 * k_heads;
        let gap = if aligned { vector } else { 1 } * rng.below(3);
        let window = |range, rotary_offset| {
            let layout = Layout::packed_heads(batch, sequence, total, head_dim, range);
            let token = total * head_dim + gap;
            layout
                .with_strides(sequence * token, token, head_dim)
                .with_rotary_offset(rotary_offset)
        };
        let packed = |layout: Layout| TensorCase {
            layout: layout.into(),
            source: Vec::new(),
            destination: None,
            misalign: if aligned { 0 } else { gap % vector },
        };
        case.q = Some(packed(window(0..q_heads, rotary_offset)));
        let k = window(q_heads..q_heads + k_heads, k_rotary_offset);
        case.k = Some(packed(k));
        let len = batch * sequence * (total * head_dim + gap);
        case.one_buffer = Some(random_elements(rng, dtype, len));
    }
    case
}

pub fn random_rope(rng: &mut Rng, angles: AngleKind, pairing: Pairing, rotary_dim: usize) -> Rope {
    let pairs = rotary_dim / 2;
    let rope = match angles {
        AngleKind::Exact => Rope::new(random_frequencies(rng, rotary_dim), pairing),
        AngleKind::Rows => Rope::new(random_frequency_rows(rng, rotary_dim), pairing),
        AngleKind::Table => {
            let rows = 1 + rng.below(12);
            let values = |rng: &mut Rng| random_elements(rng, Dtype::F32, rows * pairs);
            let (cos, sin) = (typed(&values(rng)), typed(&values(rng)));
            let choice = rng.pick(&[OutOfRange::Clamp, OutOfRange::PassThrough]);
            let table = CosSinTable::new(cos, sin, pairs).unwrap();
            Rope::new(table.with_out_of_range(choice), pairing)
        }
    };
    rope.with_direction(rng.pick(&[Direction::Forward, Direction::Forward, Direction::Inverse]))
}

fn random_frequencies(rng: &mut Rng, rotary_dim: usize) -> Frequencies {
    let frequencies = if rng.chance(50) {
        let theta = match rng.pick(&[1e2, 1e4, 5e5, 1e9]) {
            // It would be taken for the dims.
            theta if theta <= 512.0 && rotary_dim > 512 => 1e4,
            theta => theta,
        };
        Frequencies::from_theta(theta, rotary_dim).unwrap()
    } else {
        // Steps that no theta gives: every bit of the product matters.
        Frequencies::from_steps((0..rotary_dim / 2).map(|_| rng.next()).collect()).unwrap()
    };
    let factor = rng.pick(&[1.0, 1.0, 1.0, 0.737, 1.4]);
    frequencies.with_attention_factor(factor).unwrap()
}

/// One row on several axes, rows that the call chooses from, or two that positions choose from.
fn random_frequency_rows(rng: &mut Rng, rotary_dim: usize) -> Angles {
    let pairs = rotary_dim / 2;
    let on_axes = |rng: &mut Rng, axes: usize| {
        let frequencies = random_frequencies(rng, rotary_dim);
        if rng.chance(50) {
            let axis_of_pair: Vec<_> = (0..pairs).map(|_| rng.below(axes)).collect();
            frequencies.with_axes(axes, &axis_of_pair).unwrap()
        } else {
            // Every axis turns every pair.
            let steps = (0..axes * pairs).map(|_| rng.next()).collect();
            let factor = frequencies.attention_factor();
            let frequencies = Frequencies::from_axis_steps(steps, axes).unwrap();
            frequencies.with_attention_factor(factor).unwrap()
        }
    };
    match rng.below(4) {
        0 => {
            let axes = 2 + rng.below(3);
            on_axes(rng, axes).into()
        }
        1 => {
            let rows = [on_axes(rng, 1), on_axes(rng, 1)];
            let boundary = random_position(rng, &Angles::Exact(rows[0].clone()));
            let rows = FrequencyRows::new(&rows).unwrap();
            rows.by_position(boundary).unwrap().into()
        }
        _ => {
            let axes = 1 + rng.below(3);
            let rows: Vec<_> = (0..1 + rng.below(4)).map(|_| on_axes(rng, axes)).collect();
            FrequencyRows::new(&rows).unwrap().into()
        }
    }
}

fn random_position(rng: &mut Rng, angles: &Angles) -> i64 {
    if let Angles::Table(table) = angles
        && rng.chance(70)
    {
        return rng.below(table.rows() + 2) as i64 - 1;
    }
    if let Angles::Rows(rows) = angles
        && let Some(boundary) = rows.boundary()
        && rng.chance(70)
    {
        return boundary.wrapping_add(rng.below(5) as i64 - 2);
    }
    match rng.below(6) {
        0 => rng.below(5000) as i64,
        1 => -(rng.below(5000) as i64),
        2 => i64::MAX - rng.below(3) as i64,
        3 => i64::MIN + rng.below(3) as i64,
        4 => (1 << 31) - 2 + rng.below(5) as i64,
        _ => rng.next() as i64,
    }
}

pub const ID_TYPES: [IdType; 3] = [IdType::I32, IdType::U32, IdType::I64];

/// `counts`: of sequences, of tokens where all sequences have the same positions, and of all tokens.
pub fn random_positions(
    rng: &mut Rng,
    kind: PositionKind,
    counts: [usize; 3],
    angles: &Angles,
) -> TestPositions {
    let [sequences, shared, all] = counts;
    let count = match kind {
        PositionKind::Start => 0,
        PositionKind::StartPerSequence | PositionKind::PerSequence => sequences,
        PositionKind::PerTokenShared => shared,
        PositionKind::PerAxis => angles.axes() * all,
        _ => all,
    };
    let ids: Vec<i64> = (0..count).map(|_| random_position(rng, angles)).collect();
    let mut positions = TestPositions::of(kind, rng.pick(&ID_TYPES), &ids);
    if kind == PositionKind::Start {
        positions.start = random_position(rng, angles);
    }
    let Angles::Rows(rows) = angles else {
        return positions;
    };
    if rows.boundary().is_some() {
        return positions;
    }
    let (kind, count) = rng.pick(&[
        (FrequencyRowKind::Call, 1),
        (FrequencyRowKind::PerSequence, sequences),
        (FrequencyRowKind::PerToken, all),
    ]);
    if kind == FrequencyRowKind::Call {
        return positions.with_row(rng.below(rows.rows()) as u32);
    }
    let ids: Vec<i64> = (0..count).map(|_| rng.below(rows.rows()) as i64).collect();
    positions.with_rows(kind, Values::new(rng.pick(&ID_TYPES), &ids))
}

/// Strides of a random order of dims, with gaps.
pub fn random_layout(rng: &mut Rng, shape: [usize; 4], aligned: bool, vector: usize) -> Layout {
    let [batch, sequence, heads, head_dim] = shape;
    let unit = if aligned { vector } else { 1 };
    let mut order = [0, 1, 2];
    for i in (1..3).rev() {
        order.swap(i, rng.below(i + 1));
    }
    let counts = [batch, sequence, heads];
    let mut strides = [0; 3];
    let mut extent = head_dim + unit * rng.pick(&[0, 0, 1, 2]);
    for dim in order {
        strides[dim] = extent;
        extent = extent * counts[dim].max(1) + unit * rng.pick(&[0, 0, 1, 3]);
    }
    Layout::bshd(batch, sequence, heads, head_dim)
        .with_strides(strides[0], strides[1], strides[2])
        .with_offset(unit * rng.pick(&[0, 0, 1, 4]))
}

/// Phases at which the last bits matter, found by search. For each constant of the two polynomials
/// there are three where flipping its last bit changes cos or sin, for each fused operation three
/// where rounding its product apart does, and three where the low part of the reduced argument
/// must be rounded to nearest. Random phases come by some of these once in 60 million.
pub const PHASES: [u64; 60] = [
    0x0000_2066_5cdf_bd20,
    0x3a6e_2124_0000_1d8d,
    0xffff_fc16_2b4e_2cf8,
    0x1e5f_9efc_d1b9_c1f0,
    0xa0ba_c27b_945f_16a3,
    0xe0f1_352d_2439_8156,
    0x6625_4e7c_b656_6489,
    0x8a72_b2db_50c6_d30e,
    0x21de_4221_d45a_04ce,
    0xdccf_59c6_bbc3_1c4a,
    0x2416_4271_4a5f_601d,
    0x1f0c_09b3_cf40_85c8,
    0x2cd5_9be9_358c_7ba1,
    0x132a_6423_d676_ac8e,
    0x6cd5_9bd9_bb0c_0486,
    0x4fca_309c_5fa2_e9c6,
    0x0ba4_010c_ccc6_7128,
    0xf1bb_78aa_5ea5_130f,
    0x9cd9_4cc4_61b8_8552,
    0x5d97_7fa0_d136_7856,
    0x63d7_0a92_a4e8_7eb7,
    0x9ede_eb8e_a81e_1ff4,
    0x5c38_a239_1a6e_f780,
    0xa323_147a_e633_2a35,
    0x1e55_a4e5_a05d_071a,
    0x24fa_47d8_f8e6_8311,
    0xa6de_a7c1_d07a_f0b7,
    0xdc63_ca8c_6c31_9b2d,
    0x19bb_5f5f_7cb3_9877,
    0xa75d_f659_aca9_3c48,
    0x3cc0_410c_c52e_fcef,
    0x5f67_fe63_ed0b_7c51,
    0x04bb_6663_8866_fa76,
    0x9d50_cbee_ea86_ea58,
    0x668b_00ee_816c_eed9,
    0xdf80_f728_7b4b_03c8,
    0x1e44_b7c6_032f_4f67,
    0x1603_e92b_2e77_a7a5,
    0x1ed1_c4ed_b2aa_3823,
    0xe00d_cd63_88b6_af5f,
    0xdd0c_b10b_4e42_5d2f,
    0x16d3_5ea8_287a_d533,
    0x4c99_6af4_1936_2365,
    0x290b_7289_0b6d_7310,
    0xf269_c988_b42c_ac67,
    0xe268_8066_28f7_aa70,
    0x201a_1146_37df_a3e8,
    0x6268_8063_7f16_2b71,
    0x645e_1a37_ccb6_d406,
    0xdd8c_f176_dc9c_863f,
    0x1d39_0a66_1f1b_a6de,
    0x95c0_a973_f892_8a1a,
    0x9294_93d4_dce8_c67d,
    0xa33b_627e_1d54_8f6d,
    0x4fbd_9393_92c5_7991,
    0xdd16_c1df_64c1_4897,
    0x5ed9_b14b_a08e_0c9d,
    0x4000_0007_97a3_4eb3,
    0x8000_002b_bf83_7638,
    0x0000_0013_e37e_ba4f,
];

/// An attention factor, that of YaRN for contexts ten times as long to its nearest `f32`.
pub const FACTOR: f32 = 1.0 + 0.230_258_51;

/// The same where cos and sin take [`FACTOR`]: three for each constant and each fused operation of
/// that way. Random phases come by some of these once in 500 million.
pub const PHASES_WITH_FACTOR: [u64; 51] = [
    0x910a_2dec_8902_5cc1,
    0xbeeb_8da1_658e_ec67,
    0xf893_a2ee_fb32_555e,
    0x71c1_8690_ee42_c90b,
    0xe099_ec6c_d736_3ca5,
    0x9afc_d44d_14cf_8bfe,
    0x5ec8_c3fd_97dd_76ef,
    0xf0c6_a803_6cb3_3108,
    0x6048_2547_88b4_9ee3,
    0xb44b_56b9_d8ed_1fe8,
    0x2d6f_c919_ecb0_6d91,
    0x941e_0590_d454_faca,
    0xcab1_d022_95e2_94fb,
    0x4eb6_5292_e7b1_1d93,
    0xc7ad_6f16_ac54_1c3a,
    0xa152_5543_d5bf_fbe7,
    0x20cc_7db9_3a10_7c2f,
    0xd961_7292_fdf9_f6af,
    0x475a_896a_aac0_3524,
    0xcf83_12b0_f1a8_7cb7,
    0x1f8d_d8e6_789e_126a,
    0xdf95_e337_ae29_a9de,
    0x5dce_1b58_3d13_4c0b,
    0x192f_219f_5653_2393,
    0xe29b_ddb9_a5fc_d469,
    0xce70_d49f_9f58_2ac1,
    0xdb58_38bb_9e06_e4ce,
    0x61b5_54ae_bd3b_cf8b,
    0x9df2_6ec4_5c98_f561,
    0xe0ae_368b_993c_8c57,
    0x202b_73ec_7870_980a,
    0x6030_5f71_face_15c9,
    0x1b68_2cca_846e_bc3c,
    0xb995_9300_50db_96f2,
    0x34d1_4a4b_c379_e82f,
    0x4f8a_9781_33ac_a7f1,
    0xa237_b596_822b_83f5,
    0x9e7b_e398_94fd_c77c,
    0x1de4_e884_5655_e098,
    0xa9eb_5742_818a_2056,
    0x634e_b10a_2c83_497b,
    0xb279_6e33_d006_7cca,
    0x8248_3c7b_c469_7902,
    0x6eff_7226_4cba_324e,
    0xd87d_99c4_c8f8_2fba,
    0x1f84_1063_3ef3_06ac,
    0x64c7_0b0b_0c5b_4a8f,
    0xe433_fbfd_6486_d6ee,
    0x2523_ce18_407c_d501,
    0xd170_47e5_c45e_eeab,
    0x6a2f_5f48_99da_50aa,
];

/// Phases around the bounds of the reduction: single bits, eighths of a turn, and their neighbours.
pub fn edge_phases() -> Vec<u64> {
    let mut phases = Vec::new();
    for bit in 0..64 {
        phases.extend([1u64 << bit, (1u64 << bit).wrapping_neg()]);
    }
    for eighth in 0..8u64 {
        for near in [1 << 32, 1 << 31, 1 << 9, 1] {
            phases.extend([
                (eighth << 61).wrapping_add(near),
                (eighth << 61).wrapping_sub(near),
            ]);
        }
    }
    phases
}

/// A token per phase, and elements that show the last bit of its cos and sin in any type.
pub fn sharp_case(kernel: Kernel, kind: AngleKind, phases: &[u64], factor: f32) -> Case {
    let dtype = kernel.dtype;
    phases_case(kernel, kind, phases, factor, |_, cos, sin| {
        let kinds = [
            cancelling(dtype, cos, sin),
            cancelling(dtype, sin, -cos),
            [unit(dtype), 0.0],
            largest(dtype),
        ];
        kinds.map(|[a, b]| [narrow(dtype, a), narrow(dtype, b)])
    })
}

/// No rotation but a factor that puts results of 16 bits halfway between two neighbours, up and
/// down to the even one; and results that are infinite or not a number, in each element of a pair.
pub fn ties_case(kernel: Kernel, kind: AngleKind) -> Case {
    let dtype = kernel.dtype;
    let infinity = narrow(dtype, f32::INFINITY);
    let one = narrow(dtype, 1.0);
    let special = [
        [infinity, one],
        [one, infinity],
        [narrow(dtype, f32::NAN), one],
        [one, narrow(dtype, -f32::NAN)],
    ];
    phases_case(kernel, kind, &[0; 12], 1.5, |token, _, _| match token {
        0..4 => std::array::from_fn(|head| special[(token + head) % 4]),
        // Odd mantissas: three times one is odd and takes a bit more.
        _ => std::array::from_fn(|head| {
            let bits = one + 2 * (token + 8 * head) as u32 + 1;
            [bits, bits + 2]
        }),
    })
}

/// A token per phase, all of one sequence; every head holds one of four kinds of elements, in all its pairs.
/// The four heads that a thread holds at once are each fourth head where kernels rotate, and follow each
/// other where they append: each of the four comes to hold each kind.
fn phases_case(
    kernel: Kernel,
    kind: AngleKind,
    phases: &[u64],
    factor: f32,
    elements: impl Fn(usize, f32, f32) -> [[u32; 2]; 4],
) -> Case {
    const HEADS: usize = 16;
    let pairs = match (kernel.family, kernel.pairing) {
        (Family::Fused, Some(_)) => 32,
        (_, Some(_)) => 8,
        (_, None) => 3,
    };
    // A step of 1: the position is the phase.
    let frequencies = Frequencies::from_steps(vec![1; pairs]).unwrap();
    let frequencies = frequencies.with_attention_factor(factor).unwrap();
    let angles: Vec<_> = phases
        .iter()
        .map(|&phase| frequencies.cos_sin(0, phase as i64))
        .collect();
    let mut ids: Vec<_> = phases.iter().map(|&phase| phase as i64).collect();
    let source: Angles = match kind {
        AngleKind::Exact => frequencies.into(),
        AngleKind::Rows => {
            // A phase in two parts, one per axis.
            let part = |phase: &u64| (phase >> 7) as i64;
            let rest = phases
                .iter()
                .map(|phase| (*phase as i64).wrapping_sub(part(phase)));
            ids = phases.iter().map(part).chain(rest).collect();
            let both = Frequencies::from_axis_steps(vec![1; 2 * pairs], 2).unwrap();
            both.with_attention_factor(factor).unwrap().into()
        }
        AngleKind::Table => {
            let rows = |pick: fn(&(f32, f32)) -> f32| {
                let values = angles.iter().map(pick);
                values.flat_map(|x| vec![x; pairs]).collect()
            };
            ids = (0..phases.len() as i64).collect();
            let table = CosSinTable::new(rows(|a| a.0), rows(|a| a.1), pairs).unwrap();
            table.with_out_of_range(OutOfRange::Clamp).into()
        }
    };
    let pairing = kernel.pairing.unwrap_or(Pairing::HalfSplit);
    let rope = Rope::new(source, pairing);
    let layout = Layout::tokens(phases.len(), HEADS, 2 * pairs);
    let mut source = Vec::new();
    for (token, &(cos, sin)) in angles.iter().enumerate() {
        let kinds = elements(token, cos, sin);
        for head in 0..HEADS {
            let turn = match kernel.family {
                Family::Append => head / 4,
                _ => 0,
            };
            let [a, b] = kinds[(head + turn) % 4];
            match pairing {
                Pairing::HalfSplit => {
                    source.extend(std::iter::repeat_n(a, pairs));
                    source.extend(std::iter::repeat_n(b, pairs));
                }
                Pairing::Interleaved => source.extend([a, b].repeat(pairs)),
            }
        }
    }
    let tensor = TensorCase {
        layout: layout.into(),
        source,
        destination: None,
        misalign: 0,
    };
    Case {
        dtype: kernel.dtype,
        rope,
        q: Some(tensor),
        k: None,
        one_buffer: None,
        positions: TestPositions::of(PositionKind::PerAxis, IdType::I64, &ids),
        multiprocessors: 1,
        mode: LaunchMode::Ordinary,
    }
}

/// A large power of two whose products with ordinary angles no type loses.
fn unit(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => 16384.0,
        _ => 1e30f32.log2().floor().exp2(),
    }
}

/// Elements whose rotation overflows to an infinity at some angles.
fn largest(dtype: Dtype) -> [f32; 2] {
    match dtype {
        Dtype::F32 => [f32::MAX, f32::MAX],
        Dtype::F16 => [f16::MAX.to_f32(), f16::MAX.to_f32()],
        Dtype::Bf16 => [bf16::MAX.to_f32(), bf16::MAX.to_f32()],
        other => panic!("{other} is not covered"),
    }
}

pub fn narrow(dtype: Dtype, x: f32) -> u32 {
    match dtype {
        Dtype::F32 => x.raw(),
        Dtype::F16 => f16::narrow(x).raw(),
        Dtype::Bf16 => bf16::narrow(x).raw(),
        other => panic!("{other} is not covered"),
    }
}

fn rounded(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16::narrow(x).to_f32(),
        Dtype::Bf16 => bf16::narrow(x).to_f32(),
        other => panic!("{other} is not covered"),
    }
}

/// `a` and `b` for which `a * cos - b * sin` all but cancels, so that what is left shows one unit
/// in the last place of cos and of sin, and a product that was rounded apart.
fn cancelling(dtype: Dtype, cos: f32, sin: f32) -> [f32; 2] {
    let rotate = |a: f32, b: f32, cos: f32, sin: f32| a.mul_add(cos, -(b * sin));
    let next = |x: f32| f32::from_bits(x.to_bits() ^ 1);
    let shown = |a: f32, b: f32| {
        let base = narrow(dtype, rotate(a, b, cos, sin));
        let others = [
            rotate(a, b, next(cos), sin),
            rotate(a, b, cos, next(sin)),
            a * cos - b * sin,
        ];
        others.iter().filter(|&&x| narrow(dtype, x) != base).count()
    };
    // The larger of the two takes one mantissa after the other, and the other follows, until
    // all three show.
    let mut best = (0, [0.0; 2]);
    for n in 0..1024 {
        let large = rounded(dtype, 16384.0 + 16.0 * n as f32);
        let candidate = if cos.abs() < sin.abs() {
            [large, rounded(dtype, large * cos / sin)]
        } else {
            [rounded(dtype, large * sin / cos), large]
        };
        let shown = shown(candidate[0], candidate[1]);
        if shown > best.0 {
            best = (shown, candidate);
        }
        if shown == 3 {
            break;
        }
    }
    best.1
}
