//! Random problems, the data they run on, and the comparison of what came out.

use super::oracle::{self, Place};
use approx::AbsDiffEq;
use phasor::half::{bf16, f16};
use phasor::{
    Direction, Dtype, Element, Error, Host, HostInOut, Ids, InOut, Isa, Pairing, PositionKind,
    Positions, Problem, Rope, Threads,
};
use proptest::prelude::*;

/// Fewer cases without optimisation, where arbitrary precision is 20 times slower.
pub const fn scaled(cases: u32) -> u32 {
    if cfg!(debug_assertions) {
        cases.div_ceil(16)
    } else {
        cases
    }
}

/// A failing case is printed in full, seed included; nothing is written next to the sources.
pub fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(scaled(cases))
    }
}

/// SplitMix64: data from a seed that a failing case prints.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * 2f64.powi(-53)
    }
}

/// What the tests ask of an element type, without the crate's own conversions.
pub trait TestElement: Element + PartialEq + std::fmt::Debug {
    /// Half the distance between neighbours, relative to a value: 2^-(digits of the significand).
    const HALF_ULP: f64;
    /// Half the smallest subnormal.
    const HALF_SMALLEST: f64;
    /// The NaN that results carry.
    const NAN: u32;
    const INFINITY: u32;
    const SIGN: u32;
    fn from_bits32(bits: u32) -> Self;
    fn bits32(self) -> u32;
    fn exact(self) -> f64;
    /// The conversion of the `half` crate.
    fn nearest(x: f32) -> Self;

    fn is_nan(self) -> bool {
        self.bits32() & !Self::SIGN > Self::INFINITY
    }

    /// Off by at most this after one rounding of a value near `x`.
    fn half_ulp(x: f64) -> f64 {
        (x.abs() * Self::HALF_ULP).max(Self::HALF_SMALLEST)
    }

    /// A finite value of moderate size: no sum of two products of it overflows.
    fn moderate(random: &mut Random) -> Self {
        let sign = if random.bits() & 1 == 0 { 1.0 } else { -1.0 };
        let exponent = random.below(30) as i32 - 20;
        Self::nearest((sign * (1.0 + random.unit()) * 2f64.powi(exponent)) as f32)
    }

    /// Any bits; the values where rounding, signs and infinities matter are frequent.
    fn anything(random: &mut Random) -> Self {
        let sign = if random.bits() & 1 == 0 {
            0
        } else {
            Self::SIGN
        };
        Self::from_bits32(match random.below(24) {
            0 => sign,                         // zero
            1 => sign | 1,                     // the smallest subnormal
            2 => sign | (Self::INFINITY >> 5), // a small number, or a subnormal
            3 => sign | Self::INFINITY,
            4 => sign | (Self::INFINITY - 1), // the largest number
            5 => sign | (Self::INFINITY + 1), // a signalling NaN
            6 => sign | Self::NAN,
            7 => random.bits() as u32 & (Self::SIGN | (Self::SIGN - 1)),
            _ => return Self::moderate(random),
        })
    }
}

impl TestElement for f32 {
    const HALF_ULP: f64 = 1.0 / (1u64 << 24) as f64;
    const HALF_SMALLEST: f64 = f32::MIN_POSITIVE as f64 * Self::HALF_ULP;
    const NAN: u32 = 0x7fff_ffff;
    const INFINITY: u32 = 0x7f80_0000;
    const SIGN: u32 = 0x8000_0000;
    fn from_bits32(bits: u32) -> Self {
        f32::from_bits(bits)
    }
    fn bits32(self) -> u32 {
        self.to_bits()
    }
    fn exact(self) -> f64 {
        f64::from(self)
    }
    fn nearest(x: f32) -> Self {
        x
    }
}

impl TestElement for f16 {
    const HALF_ULP: f64 = 1.0 / (1u64 << 11) as f64;
    const HALF_SMALLEST: f64 = 1.0 / (1u64 << 25) as f64;
    const NAN: u32 = 0x7fff;
    const INFINITY: u32 = 0x7c00;
    const SIGN: u32 = 0x8000;
    fn from_bits32(bits: u32) -> Self {
        f16::from_bits(bits as u16)
    }
    fn bits32(self) -> u32 {
        u32::from(self.to_bits())
    }
    fn exact(self) -> f64 {
        self.to_f64()
    }
    fn nearest(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl TestElement for bf16 {
    const HALF_ULP: f64 = 1.0 / (1u64 << 8) as f64;
    const HALF_SMALLEST: f64 = f32::MIN_POSITIVE as f64 * Self::HALF_ULP;
    const NAN: u32 = 0x7fff;
    const INFINITY: u32 = 0x7f80;
    const SIGN: u32 = 0x8000;
    fn from_bits32(bits: u32) -> Self {
        bf16::from_bits(bits as u16)
    }
    fn bits32(self) -> u32 {
        u32::from(self.to_bits())
    }
    fn exact(self) -> f64 {
        self.to_f64()
    }
    fn nearest(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

/// A strided place, from choices that may be made independently: the dims nest in the given order
/// (innermost first), with gaps between heads and between what they form.
pub fn nested(shape: [usize; 4], order: [usize; 3], gaps: [usize; 3], offset: usize) -> Place {
    let mut strides = [0; 3];
    let mut extent = shape[3];
    for (dim, gap) in order.into_iter().zip(gaps) {
        strides[dim] = extent + gap;
        extent = strides[dim] * shape[dim].max(1);
    }
    Place {
        shape,
        strides,
        offset,
        rotary_offset: 0,
    }
}

const ORDERS: [[usize; 3]; 6] = [
    [2, 1, 0], // [batch, sequence, heads, dim]
    [1, 2, 0], // [batch, heads, sequence, dim]
    [2, 0, 1],
    [0, 2, 1],
    [1, 0, 2],
    [0, 1, 2],
];

/// Nesting orders, with gaps in half of the cases.
fn nesting() -> impl Strategy<Value = ([usize; 3], [usize; 3], usize)> {
    (
        prop::sample::select(ORDERS.to_vec()),
        prop_oneof![Just([0; 3]), prop::array::uniform3(0usize..20)],
        prop_oneof![Just(0), 0usize..40],
    )
}

/// One tensor of a case.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub source: Place,
    /// The source where it is rotated in place.
    pub destination: Place,
    pub in_place: bool,
    /// Elements of the buffers past the last one that the layouts reach.
    pub slack: usize,
}

impl Tensor {
    pub fn in_place(place: Place) -> Self {
        Self {
            source: place.clone(),
            destination: place,
            in_place: true,
            slack: 0,
        }
    }

    pub fn layouts(&self) -> InOut<phasor::Layout> {
        if self.in_place {
            self.destination.layout().into()
        } else {
            (self.source.layout(), self.destination.layout()).into()
        }
    }
}

/// Position values of any kind and type.
#[derive(Clone, Debug)]
pub struct TestPositions {
    pub kind: PositionKind,
    pub values: Values,
    pub sequence: usize,
}

#[derive(Clone, Debug)]
pub enum Values {
    I32(Vec<i32>),
    I64(Vec<i64>),
    U32(Vec<u32>),
}

impl TestPositions {
    /// Those of one start, which is stored as a single value.
    pub fn start(start: i64) -> Self {
        Self {
            kind: PositionKind::Start,
            values: Values::I64(vec![start]),
            sequence: 0,
        }
    }

    pub fn given(&self) -> Positions<'_> {
        let ids: Ids<&[u8]> = match &self.values {
            Values::I32(ids) => ids.into(),
            Values::I64(ids) => ids.into(),
            Values::U32(ids) => ids.into(),
        };
        match self.kind {
            PositionKind::Start => Positions::start(self.value(0) as i64),
            PositionKind::StartPerSequence => Positions::start_per_sequence(ids),
            PositionKind::PerSequence => Positions::per_sequence(ids),
            PositionKind::PerToken => Positions::per_token(ids),
            PositionKind::PerTokenShared => Positions::per_token_shared(ids),
            PositionKind::PerAxis => Positions::per_axis(ids),
            kind => panic!("no case has {kind}"),
        }
    }

    fn value(&self, index: usize) -> i128 {
        match &self.values {
            Values::I32(ids) => i128::from(ids[index]),
            Values::I64(ids) => i128::from(ids[index]),
            Values::U32(ids) => i128::from(ids[index]),
        }
    }

    /// The position of token `s` of sequence `b`; past the ends of an `i64` it wraps.
    pub fn at(&self, b: usize, s: usize) -> i64 {
        (match self.kind {
            PositionKind::Start => self.value(0) + s as i128,
            PositionKind::StartPerSequence => self.value(b) + s as i128,
            PositionKind::PerSequence => self.value(b),
            PositionKind::PerTokenShared => self.value(s),
            // The cases are on one axis.
            PositionKind::PerToken | PositionKind::PerAxis => self.value(b * self.sequence + s),
            kind => panic!("no case has {kind}"),
        }) as i64
    }
}

/// A position: near zero, anywhere in ±2^31, or anywhere at all, the ends being frequent.
fn position() -> impl Strategy<Value = i64> {
    prop_oneof![
        -5i64..4096,
        -(1i64 << 31)..(1i64 << 31),
        any::<i64>(),
        (i64::MAX - 4)..=i64::MAX,
        i64::MIN..(i64::MIN + 4),
    ]
}

/// A whole problem but for the angles.
#[derive(Clone, Debug)]
pub struct Case {
    pub dtype: Dtype,
    pub pairing: Pairing,
    pub direction: Direction,
    pub rotary_dim: usize,
    pub tensors: [Option<Tensor>; 2],
    pub positions: TestPositions,
    pub host: Host,
    /// Of the data.
    pub seed: u64,
}

/// Variants that this processor can run.
pub fn variants() -> Vec<Isa> {
    Isa::ALL
        .into_iter()
        .filter(|isa| isa.is_available())
        .collect()
}

pub fn host(isa: Isa, threads: Threads) -> Host {
    Host::new().with_isa(isa).unwrap().with_threads(threads)
}

fn hosts() -> impl Strategy<Value = Host> {
    (
        prop::sample::select(variants()),
        prop::sample::select(vec![Threads::One, Threads::Pool]),
    )
        .prop_map(|(isa, threads)| host(isa, threads))
}

prop_compose! {
    fn tensors(batch: usize, sequence: usize, rotary_dim: usize)(
        (heads, before, after, slack) in (0usize..6, 0usize..5, 0usize..6, 0usize..4),
        from in nesting(),
        to in nesting(),
        in_place in any::<bool>(),
        repeat in prop::option::weighted(0.1, 0usize..3),
    ) -> Tensor {
        let shape = [batch, sequence, heads, 2 * before + rotary_dim + after];
        let place = |(order, gaps, offset)| Place {
            rotary_offset: 2 * before,
            ..nested(shape, order, gaps, offset)
        };
        let mut source = place(from);
        let mut destination = place(to);
        if in_place {
            source = destination.clone();
        } else if let Some(dim) = repeat {
            // What is only read may be read again: a broadcast source.
            source.strides[dim] = 0;
        }
        destination.rotary_offset = 2 * before;
        Tensor { source, destination, in_place, slack }
    }
}

prop_compose! {
    fn positions(batch: usize, sequence: usize)(
        kind in prop::sample::select(vec![
            PositionKind::Start, PositionKind::StartPerSequence, PositionKind::PerToken,
            PositionKind::PerTokenShared, PositionKind::PerAxis, PositionKind::PerSequence,
        ]),
    )(
        dtype in 0..3,
        values in prop::collection::vec(position(), match kind {
            PositionKind::Start => 1,
            PositionKind::StartPerSequence | PositionKind::PerSequence => batch,
            PositionKind::PerTokenShared => sequence,
            _ => batch * sequence,
        }),
        kind in Just(kind),
    ) -> TestPositions {
        let values = match dtype {
            // The low bits of any position are a position of the smaller type.
            0 if kind != PositionKind::Start => {
                Values::I32(values.iter().map(|&p| p as i32).collect())
            }
            1 if kind != PositionKind::Start => {
                Values::U32(values.iter().map(|&p| p as u32).collect())
            }
            _ => Values::I64(values),
        };
        TestPositions { kind, values, sequence }
    }
}

fn pairs() -> impl Strategy<Value = usize> {
    prop_oneof![
        8 => 1usize..36,
        1 => prop::sample::select(vec![48usize, 64, 80, 128, 256]),
    ]
}

/// q, k or both.
fn operands(
    batch: usize,
    sequence: usize,
    rotary_dim: usize,
) -> impl Strategy<Value = [Option<Tensor>; 2]> {
    let tensor = || tensors(batch, sequence, rotary_dim);
    prop_oneof![
        4 => (tensor(), tensor()).prop_map(|(q, k)| [Some(q), Some(k)]),
        1 => tensor().prop_map(|q| [Some(q), None]),
        1 => tensor().prop_map(|k| [None, Some(k)]),
    ]
}

prop_compose! {
    /// Problems of all shapes, kinds and types, each tensor in buffers of its own.
    pub fn cases()(
        (batch, sequence, pairs) in (0usize..4, prop_oneof![Just(1), 0usize..8], pairs()),
    )(
        pairing in prop::sample::select(vec![Pairing::HalfSplit, Pairing::Interleaved]),
        direction in prop::sample::select(vec![Direction::Forward, Direction::Inverse]),
        dtype in prop::sample::select(Dtype::ALL.to_vec()),
        host in hosts(),
        seed in any::<u64>(),
        tensors in operands(batch, sequence, 2 * pairs),
        positions in positions(batch, sequence),
        pairs in Just(pairs),
    ) -> Case {
        Case { dtype, pairing, direction, host, seed, positions, tensors, rotary_dim: 2 * pairs }
    }
}

prop_compose! {
    /// Problems whose tensors all lie in one buffer: packed in each token, in each head, or one
    /// region after the other.
    pub fn one_buffer_cases()(
        case in cases(),
        packing in 0..3,
        v_heads in 0usize..3,
        k_first in any::<bool>(),
    ) -> Case {
        let mut case = case;
        let mut end = 0;
        let shapes = case.tensors.each_ref().map(|t| t.as_ref().map(|t| t.source.shape));
        if let (1 | 2, [Some(q), Some(k)]) = (packing, shapes) {
            let sequence = q[1];
            let dim = q[3].max(k[3]);
            // Packed in each token: all heads of q, then of k, then of v, or k before q. Packed
            // in each head: q, k and v of head 0, then of head 1.
            let per_token = packing == 1;
            let heads = if per_token { q[2] + k[2] + v_heads } else { 3 * q[2].max(k[2]) };
            let mut offsets = if per_token { [0, q[2] * dim] } else { [0, dim] };
            if k_first {
                offsets = if per_token { [k[2] * dim, 0] } else { [dim, 0] };
            }
            let head_stride = if per_token { dim } else { 3 * dim };
            for (i, shape) in [q, k].into_iter().enumerate() {
                let tensor = case.tensors[i].as_ref().unwrap();
                case.tensors[i] = Some(Tensor::in_place(Place {
                    shape,
                    strides: [sequence * heads * dim, heads * dim, head_stride],
                    offset: offsets[i],
                    rotary_offset: tensor.source.rotary_offset,
                }));
            }
        } else {
            for tensor in case.tensors.iter_mut().flatten() {
                if tensor.in_place {
                    tensor.destination.offset += end;
                    tensor.source = tensor.destination.clone();
                    end = end.max(tensor.destination.len());
                } else {
                    tensor.source.offset += end;
                    end = end.max(tensor.source.len());
                    tensor.destination.offset += end;
                    end = end.max(tensor.destination.len());
                }
            }
        }
        case
    }
}

impl Case {
    pub fn rope(&self, angles: impl Into<phasor::Angles>) -> Rope {
        Rope::new(angles, self.pairing).with_direction(self.direction)
    }

    pub fn problem(&self) -> Problem {
        let mut problem = Problem::new(self.dtype);
        if let Some(q) = &self.tensors[0] {
            problem = problem.q(q.layouts());
        }
        if let Some(k) = &self.tensors[1] {
            problem = problem.k(k.layouts());
        }
        if self.tensors.iter().flatten().any(|tensor| tensor.slack > 0) {
            problem = problem.longer_buffers();
        }
        problem
    }

    pub fn dims(&self, pair: usize) -> (usize, usize) {
        match self.pairing {
            Pairing::HalfSplit => oracle::half_split(pair, self.rotary_dim / 2),
            Pairing::Interleaved => oracle::interleaved(pair),
        }
    }

    /// Buffers of each tensor: what is read, and what is written to. In place both are the same.
    pub fn buffers<T: TestElement>(&self, value: fn(&mut Random) -> T) -> [[Vec<T>; 2]; 2] {
        let mut random = Random(self.seed);
        let mut fill = |len: usize| (0..len).map(|_| value(&mut random)).collect::<Vec<T>>();
        self.tensors.each_ref().map(|tensor| match tensor {
            None => [vec![], vec![]],
            Some(tensor) => {
                let destination = fill(tensor.destination.len() + tensor.slack);
                if tensor.in_place {
                    [destination.clone(), destination]
                } else {
                    [fill(tensor.source.len() + tensor.slack), destination]
                }
            }
        })
    }

    /// Rotates; `buffers` are as [`buffers`](Self::buffers) gives them.
    pub fn run<T: TestElement>(
        &self,
        rope: &Rope,
        host: Host,
        [q, k]: &mut [[Vec<T>; 2]; 2],
    ) -> Result<(), Error> {
        let rotator = host.rotator(rope);
        let plan = rotator.plan(&self.problem())?;
        let [q, k] = [(&self.tensors[0], q), (&self.tensors[1], k)].map(
            |(tensor, [source, destination])| {
                tensor.as_ref().map(|tensor| -> HostInOut<'_, T> {
                    if tensor.in_place {
                        destination.into()
                    } else {
                        (&source[..], destination).into()
                    }
                })
            },
        );
        rotator.rotate(&plan, q, k, self.positions.given())
    }
}

/// cos and sin of one pair at one position, and how far the crate's may be from them.
#[derive(Clone, Copy, Debug)]
pub struct Angle {
    pub cos: f64,
    pub sin: f64,
    pub error: f64,
}

impl Angle {
    /// The definition's: `step * position mod 2^64`. cos and sin are each within 2^-23 times the
    /// attention factor.
    pub fn of_step(step: u64, position: i64, factor: f32) -> Self {
        let radians = oracle::step_radians(step, position);
        let factor = f64::from(factor);
        Self {
            cos: radians.cos() * factor,
            sin: radians.sin() * factor,
            error: factor * 2f64.powi(-23),
        }
    }
}

/// What one element must be.
#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// These bits.
    Bits(u32),
    /// At most this far from a value.
    Near { value: f64, tolerance: f64 },
}

/// What must be in a buffer, `written`, after `tensor` of a case is rotated from `read`. `angle`
/// gives none where a token passes through.
pub fn expect<T: TestElement>(
    case: &Case,
    tensor: &Tensor,
    read: &[T],
    written: &mut [Expected],
    angle: &impl Fn(usize, i64) -> Option<Angle>,
) {
    for (b, s, h) in tensor.source.heads() {
        let from = |d| read[tensor.source.index([b, s, h, d])];
        let to = |d| tensor.destination.index([b, s, h, d]);
        if !tensor.in_place {
            for d in 0..tensor.source.shape[3] {
                written[to(d)] = Expected::Bits(from(d).bits32());
            }
        }
        for pair in 0..case.rotary_dim / 2 {
            let Some(Angle { cos, sin, error }) = angle(pair, case.positions.at(b, s)) else {
                continue;
            };
            let sin = match case.direction {
                Direction::Forward => sin,
                Direction::Inverse => -sin,
            };
            let (i, j) = case.dims(pair);
            let (i, j) = (
                tensor.source.rotary_offset + i,
                tensor.source.rotary_offset + j,
            );
            let (a, b) = (from(i).exact(), from(j).exact());
            let (x, y) = oracle::rotate(a, b, cos, sin);
            // The error of cos and sin, carried by a and b; the rounding of one product, and that
            // of the sum, each 2^-24 relative to at most (|a| + |b|) times the larger of cos and
            // sin; three results may be subnormal. Second-order terms are covered by 2^-20.
            let size = a.abs() + b.abs();
            let largest = cos.abs().max(sin.abs()) + error;
            let in_f32 = size * (error + 2.0 * f32::HALF_ULP * largest) * (1.0 + 2f64.powi(-20))
                + 3.0 * f32::HALF_SMALLEST;
            for (d, value) in [(i, x), (j, y)] {
                // The last rounding of an f32 is that of the sum; the 16-bit types round again.
                let last = match T::DTYPE {
                    Dtype::F32 => 0.0,
                    _ => T::half_ulp(value.abs() + in_f32),
                };
                let tolerance = in_f32 + last;
                written[to(d)] = Expected::Near { value, tolerance };
            }
        }
    }
}

/// Buffers that nothing has touched yet.
pub fn untouched<T: TestElement>(buffer: &[T]) -> Vec<Expected> {
    buffer.iter().map(|x| Expected::Bits(x.bits32())).collect()
}

/// The first element that is not as expected.
pub fn compare<T: TestElement>(got: &[T], expected: &[Expected]) -> Result<(), TestCaseError> {
    prop_assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let ok = match expected {
            Expected::Bits(bits) => got.bits32() == bits,
            Expected::Near { value, tolerance } => got.exact().abs_diff_eq(&value, tolerance),
        };
        prop_assert!(
            ok,
            "element {}: {:?} ({:#x}), expected {:?}",
            i,
            got,
            got.bits32(),
            expected
        );
    }
    Ok(())
}

/// The first element whose bits differ.
pub fn same_bits<T: TestElement>(got: &[T], expected: &[T]) -> Result<(), TestCaseError> {
    prop_assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        prop_assert!(
            got.bits32() == expected.bits32(),
            "element {}: {:?} ({:#x}), expected {:?} ({:#x})",
            i,
            got,
            got.bits32(),
            expected,
            expected.bits32()
        );
    }
    Ok(())
}

/// Calls a generic function with the element type of a [`Dtype`].
#[macro_export]
macro_rules! for_dtype {
    ($dtype:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $dtype {
            phasor::Dtype::F32 => $function::<f32>($($argument),*),
            phasor::Dtype::F16 => $function::<phasor::half::f16>($($argument),*),
            phasor::Dtype::Bf16 => $function::<phasor::half::bf16>($($argument),*),
            dtype => unreachable!("no test of {dtype}"),
        }
    };
}
