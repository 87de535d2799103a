//! Views, positions and angles from raw bytes: whatever they say, there is no panic and no access
//! out of bounds, only an error or a right result.
//!
//! `PROPTEST_CASES` sets how many; CI runs many more than a plain test run.

#[path = "support/kernel_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod kernel_cases;
#[path = "support/ptx_backend.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod ptx_backend;

use kernel_cases::{Case, TensorCase, TestPositions, TypedIds, Values};
use phasor::half::{bf16, f16};
use phasor::{
    Angles, CosSinTable, Direction, Dtype, Element, Error, Frequencies, FrequencyRowKind,
    FrequencyRows, Host, HostInOut, HostRotator, IdType, InOut, Isa, Layout, OutOfRange, Pairing,
    Plan, PositionKind, Positions, Problem, Rope,
};
use proptest::prelude::*;
use ptx_backend::Image;

/// Reads values off raw bytes; past the end there are zeros.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Mostly small, sometimes at the edges of what fits.
    fn size(&mut self, usual: u64) -> usize {
        match self.byte() {
            0..=243 => (u64::from(self.byte()) % (usual + 1)) as usize,
            244..=247 => 1 << (self.byte() % 64),
            248..=251 => usize::MAX - self.byte() as usize,
            _ => self.word() as usize,
        }
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.byte() as usize % choices.len()]
    }

    fn float(&mut self) -> f64 {
        match self.byte() {
            0..=199 => self.pick(&[1e2, 1e4, 5e5, 1e6, 1e9, 2.0]),
            _ => f64::from_bits(self.word()),
        }
    }
}

fn layout(source: &mut Source<'_>, shape: [usize; 4]) -> Layout {
    let [batch, sequence, heads, head_dim] = shape;
    let layout = match source.byte() % 4 {
        0 => Layout::bshd(batch, sequence, heads, head_dim),
        1 => Layout::bhsd(batch, sequence, heads, head_dim),
        2 => {
            let start = source.size(6);
            let range = start..start.saturating_add(heads);
            Layout::packed_heads(batch, sequence, source.size(12), head_dim, range)
        }
        _ => Layout::bshd(batch, sequence, heads, head_dim).with_strides(
            source.size(200),
            source.size(100),
            source.size(50),
        ),
    };
    let layout = match source.byte() % 4 {
        0 => layout.with_offset(source.size(40)),
        _ => layout,
    };
    match source.byte() % 4 {
        0 => layout.with_rotary_offset(source.size(8)),
        _ => layout,
    }
}

fn angles(source: &mut Source<'_>) -> Option<Angles> {
    let rotary_dim = source.size(40);
    match source.byte() % 6 {
        // Sizes at the edges would be honest requests for gigabytes.
        _ if rotary_dim > 1 << 12 => None,
        0 => {
            let pairs = rotary_dim / 2;
            let length =
                pairs.saturating_mul(source.size(5)).min(1 << 12) + source.byte() as usize % 2;
            let mut values = |n| -> Vec<f32> {
                (0..n)
                    .map(|_| f32::from_bits(source.word() as u32))
                    .collect()
            };
            let (cos, sin) = (values(length), values(length));
            let table = CosSinTable::new(cos, sin, pairs).ok()?;
            let choice = source.pick(&[
                OutOfRange::Clamp,
                OutOfRange::PassThrough,
                OutOfRange::Error,
            ]);
            Some(table.with_out_of_range(choice).into())
        }
        1 => {
            let values: Vec<_> = (0..rotary_dim / 2).map(|_| source.float()).collect();
            Some(Frequencies::from_inv_freq(&values).ok()?.into())
        }
        2 => Some(on_axes(source, rotary_dim)?.into()),
        3 => {
            let rows: Vec<_> = (0..source.byte() % 4)
                .map(|_| on_axes(source, rotary_dim))
                .collect::<Option<_>>()?;
            let rows = FrequencyRows::new(&rows).ok()?;
            match source.byte() % 3 {
                0 => Some(rows.by_position(source.word() as i64).ok()?.into()),
                _ => Some(rows.into()),
            }
        }
        _ => {
            let frequencies = Frequencies::from_theta(source.float(), rotary_dim).ok()?;
            let factor = match source.byte() {
                0..=200 => 1.0,
                _ => f32::from_bits(source.word() as u32),
            };
            Some(frequencies.with_attention_factor(factor).ok()?.into())
        }
    }
}

fn on_axes(source: &mut Source<'_>, rotary_dim: usize) -> Option<Frequencies> {
    let axes = source.size(3).saturating_add(1);
    let pairs = rotary_dim / 2;
    if axes > 8 || source.byte().is_multiple_of(2) {
        let axis_of_pair: Vec<_> = (0..pairs).map(|_| source.size(3)).collect();
        let frequencies = Frequencies::from_theta(source.float(), rotary_dim).ok()?;
        return frequencies.with_axes(axes, &axis_of_pair).ok();
    }
    let steps = (0..axes * pairs).map(|_| source.word()).collect();
    Frequencies::from_axis_steps(steps, axes).ok()
}

fn operand(source: &mut Source<'_>, shape: [usize; 4]) -> InOut<Layout> {
    let first = layout(source, shape);
    match source.byte() % 3 {
        0 => (first, layout(source, shape)).into(),
        _ => first.into(),
    }
}

/// A case that planning accepts and that is small enough to run; anything else has ended in an
/// error by then.
fn case(bytes: &[u8]) -> Option<Case> {
    let source = &mut Source(bytes);
    let pairing = source.pick(&[Pairing::HalfSplit, Pairing::Interleaved]);
    let direction = source.pick(&[Direction::Forward, Direction::Inverse]);
    let output_pairing = source.pick(&[pairing, pairing, Pairing::HalfSplit]);
    let rope = Rope::new(angles(source)?, pairing)
        .with_output_pairing(output_pairing)
        .with_direction(direction);
    let dtype = source.pick(&Dtype::ALL);
    let kind = source.pick(&[
        PositionKind::Start,
        PositionKind::StartPerSequence,
        PositionKind::PerToken,
        PositionKind::PerTokenShared,
        PositionKind::PerAxis,
        PositionKind::PerSequence,
    ]);
    let row_kind = match rope.angles() {
        Angles::Rows(_) if rope.row_for_length(0) != Ok(None) => source.pick(&[
            FrequencyRowKind::Call,
            FrequencyRowKind::PerSequence,
            FrequencyRowKind::PerToken,
        ]),
        _ => FrequencyRowKind::None,
    };
    let (batch, sequence, head_dim) = (source.size(3), source.size(5), source.size(40));
    let mut tensor = |heads: u64| {
        let shape = [batch, sequence, source.size(heads), head_dim];
        (source.byte() % 8 != 0).then(|| operand(source, shape))
    };
    let (q, k) = (tensor(6), tensor(3));
    let one_buffer = source.byte() % 3 == 0;

    let mut problem = Problem::new(dtype);
    for (layout, is_q) in [(q, true), (k, false)] {
        problem = match layout {
            Some(layout) if is_q => problem.q(layout),
            Some(layout) => problem.k(layout),
            None => problem,
        };
    }
    if one_buffer {
        problem = problem.one_buffer();
    }
    let rotator = Host::new().rotator(&rope);
    rotator.plan(&problem).ok()?;

    let length = |layout: &Layout| layout.required_len().filter(|&len| len <= 1 << 14);
    let mut elements = |len: usize| -> Vec<u32> {
        let mask = if dtype == Dtype::F32 {
            u32::MAX
        } else {
            0xffff
        };
        (0..len).map(|_| source.word() as u32 & mask).collect()
    };
    let mut reach = 0;
    let mut fill = |operand: Option<InOut<Layout>>| -> Option<Option<TensorCase>> {
        let Some(operand) = operand else {
            return Some(None);
        };
        let (from, to) = match operand {
            InOut::InPlace(layout) => (layout, None),
            InOut::OutOfPlace {
                source,
                destination,
            } => (source, Some(destination)),
        };
        let from = length(&from)?;
        let to = match to {
            Some(to) => Some(length(&to)?),
            None => None,
        };
        reach = reach.max(from).max(to.unwrap_or(0));
        Some(Some(TensorCase {
            layout: operand,
            source: elements(from),
            destination: to.map(&mut elements),
            misalign: 0,
        }))
    };
    let (q, k) = (fill(q)?, fill(k)?);
    if batch.saturating_mul(sequence).max(batch).max(sequence) > 1 << 12 {
        return None;
    }
    let one_buffer = one_buffer.then(|| elements(reach));
    let mut positions = TestPositions::from(kind, source.word() as i64);
    positions.ids = ids(source, position_count(&rope, kind, [batch, sequence]), 64);
    (positions.row_kind, positions.row) = (row_kind, u32::from(source.byte() % 4));
    positions.rows = ids(source, row_count(row_kind, [batch, sequence]), 2);
    Some(Case {
        dtype,
        rope,
        q,
        k,
        one_buffer,
        positions,
        multiprocessors: 1 + u32::from(source.byte()),
        mode: source.pick(&kernel_cases::MODES),
    })
}

/// Ids of any type, mostly below 2 to the power `bits`.
fn ids(source: &mut Source<'_>, count: usize, bits: u32) -> Values {
    let id_type = source.pick(&[IdType::I32, IdType::I64, IdType::U32]);
    let wild = source.byte().is_multiple_of(8);
    let mut id = || match wild {
        true => source.word() as i64,
        false => (source.word() >> (64 - bits)) as i64,
    };
    Values::new(id_type, &(0..count).map(|_| id()).collect::<Vec<_>>())
}

fn position_count(rope: &Rope, kind: PositionKind, [batch, tokens]: [usize; 2]) -> usize {
    match kind {
        PositionKind::Start => 0,
        PositionKind::StartPerSequence | PositionKind::PerSequence => batch,
        PositionKind::PerTokenShared => tokens,
        PositionKind::PerAxis => rope.angles().axes() * batch * tokens,
        _ => batch * tokens,
    }
}

fn row_count(kind: FrequencyRowKind, [batch, tokens]: [usize; 2]) -> usize {
    match kind {
        FrequencyRowKind::None | FrequencyRowKind::Call => 0,
        FrequencyRowKind::PerSequence => batch,
        _ => batch * tokens,
    }
}

/// A decoder that ended in errors only would test nothing.
#[test]
fn raw_bytes_reach_every_kind_of_call() {
    let mut rng = kernel_cases::Rng(1);
    let cases: Vec<Case> = (0..60_000)
        .filter_map(|_| {
            let bytes: Vec<u8> = (0..rng.below(600)).map(|_| rng.next() as u8).collect();
            case(&bytes)
        })
        .collect();
    let count = |what: &dyn Fn(&Case) -> bool| cases.iter().filter(|case| what(case)).count();
    let rotates = |case: &Case| case.tensors().any(|tensor| tensor.source.len() > 4);
    assert!(cases.len() > 1000, "{}", cases.len());
    assert!(count(&rotates) > 300, "{}", count(&rotates));
    for dtype in Dtype::ALL {
        assert!(count(&|case| case.dtype == dtype) > 200);
    }
    assert!(count(&|case| case.one_buffer.is_some()) > 50);
    assert!(count(&|case| case.tensors().any(|t| t.destination.is_some())) > 50);
    assert!(count(&|case| matches!(case.rope.angles(), Angles::Table(_))) > 50);
    assert!(count(&|case| matches!(case.rope.angles(), Angles::Rows(_)) && !refuses(case)) > 50);
    assert!(count(&|case| case.rope.angles().axes() > 1) > 50);
    assert!(count(&|case| case.rope.pairing() != case.rope.output_pairing()) > 50);
}

/// A table that refuses positions, and rows that an index is past, do so before anything is written;
/// every other case runs.
fn refuses(case: &Case) -> bool {
    match case.rope.angles() {
        Angles::Table(table) => table.out_of_range() == OutOfRange::Error,
        Angles::Rows(rows) => {
            let row = i64::from(case.positions.row);
            let ids = case.positions.rows.values().into_iter().chain([row]);
            ids.into_iter()
                .any(|row| row < 0 || row >= rows.rows() as i64)
        }
        _ => false,
    }
}

/// A call on a part of a case's plan, whose buffers, positions and rows may be of any length.
struct PartOfCase {
    /// Sequences and tokens.
    counts: [usize; 2],
    /// Of q's source and destination, and k's.
    lengths: [[usize; 2]; 2],
    positions: TestPositions,
}

impl PartOfCase {
    fn new(case: &Case, source: &mut Source<'_>) -> Self {
        let first = case.tensors().next().expect("a tensor");
        let [batch, tokens, ..] = sides(first.layout)[0].shape();
        let mut count = |whole: usize| match source.byte() % 8 {
            0 => source.size(9),
            _ => source.byte() as usize % (whole + 1),
        };
        let counts = [count(batch), count(tokens)];
        let mut lengths = [&case.q, &case.k].map(|tensor| match tensor {
            Some(tensor) => sides(tensor.layout).map(|side| side.required_len().unwrap()),
            None => [0; 2],
        });
        for length in lengths.as_flattened_mut() {
            match source.byte() % 16 {
                0 => *length = length.saturating_sub(source.byte().into()),
                1 => *length += source.byte() as usize,
                _ => {}
            }
        }
        let few = |n: usize| n.min(64);
        let mut some = |right: usize| match source.byte() % 8 {
            0 => source.byte() as usize,
            _ => right,
        };
        let kind = case.positions.kind;
        let counted = counts.map(few);
        let position_count = some(position_count(&case.rope, kind, counted));
        let row_count = some(row_count(case.positions.row_kind, counted));
        let mut positions = case.positions.clone();
        positions.ids = ids(source, position_count, 5);
        positions.rows = ids(source, row_count, 2);
        Self {
            counts,
            lengths,
            positions,
        }
    }

    /// What is in the buffers after the call.
    fn rotate<T: Element>(
        &self,
        case: &Case,
        rotator: &HostRotator,
        plan: &Plan,
    ) -> (Result<(), Error>, Vec<u32>) {
        let typed = [&self.positions.ids, &self.positions.rows].map(TypedIds::new);
        let positions: Positions<'_> =
            self.positions
                .placed(|name, _| match &typed[usize::from(name == "rows")] {
                    TypedIds::I32(ids) => ids.into(),
                    TypedIds::I64(ids) => ids.into(),
                    TypedIds::U32(ids) => ids.into(),
                });
        let buffer = |len: usize| -> Vec<T> { (0..len).map(|i| T::narrow(i as f32)).collect() };
        let mut buffers = self.lengths.map(|lengths| lengths.map(buffer));
        let result = if case.one_buffer.is_some() {
            let longest = buffers
                .as_flattened_mut()
                .iter_mut()
                .max_by_key(|b| b.len());
            rotator.rotate_one_buffer(plan, longest.expect("there are four"), positions)
        } else {
            fn operand<'a, T: Element>(
                tensor: &Option<TensorCase>,
                [source, destination]: &'a mut [Vec<T>; 2],
            ) -> Option<HostInOut<'a, T>> {
                Some(match tensor.as_ref()?.layout {
                    InOut::InPlace(_) => destination.into(),
                    InOut::OutOfPlace { .. } => (&source[..], destination).into(),
                })
            }
            let [q, k] = &mut buffers;
            rotator.rotate(plan, operand(&case.q, q), operand(&case.k, k), positions)
        };
        let values = buffers.as_flattened().iter().flatten();
        (result, values.map(|x| x.widen().to_bits()).collect())
    }
}

fn sides(operand: InOut<Layout>) -> [Layout; 2] {
    match operand {
        InOut::InPlace(layout) => [layout; 2],
        InOut::OutOfPlace {
            source,
            destination,
        } => [source, destination],
    }
}

/// A part of a plan does what a plan that was made for the part does.
fn part_is_a_plan<T: Element>(case: &Case, part: &PartOfCase) -> Result<(), TestCaseError> {
    let rotator = Host::new().rotator(&case.rope);
    let whole = rotator.plan(&case.problem())?;
    let [batch, tokens] = part.counts;
    let plan = whole
        .first_tokens(tokens)
        .and_then(|plan| plan.first_sequences(batch));
    let too_many = tokens > whole.tokens() || batch > whole.batch();
    prop_assert_eq!(plan.is_err(), too_many);
    let Ok(plan) = plan else { return Ok(()) };

    let fewer = |layout: Layout| {
        let [.., heads, head_dim] = layout.shape();
        let [b, t, h] = layout.strides();
        Layout::bshd(batch, tokens, heads, head_dim)
            .with_strides(b, t, h)
            .with_offset(layout.offset())
            .with_rotary_offset(layout.rotary_offset())
    };
    let mut of_part = case.clone();
    for tensor in of_part.q.iter_mut().chain(&mut of_part.k) {
        tensor.layout = match tensor.layout {
            InOut::InPlace(layout) => fewer(layout).into(),
            InOut::OutOfPlace {
                source,
                destination,
            } => (fewer(source), fewer(destination)).into(),
        };
    }
    let made_for_it = rotator.plan(&of_part.problem())?;
    prop_assert_eq!(plan.q_shape(), made_for_it.q_shape());
    prop_assert_eq!(plan.k_shape(), made_for_it.k_shape());
    prop_assert_eq!(plan.is_empty(), made_for_it.is_empty());
    let (result, after) = part.rotate::<T>(case, &rotator, &plan);
    let (expected_result, expected) = part.rotate::<T>(case, &rotator, &made_for_it);
    prop_assert_eq!(&result, &expected_result);
    prop_assert_eq!(&after, &expected);
    if result.is_err() {
        let untouched = part.lengths.as_flattened().iter();
        let untouched = untouched.flat_map(|&len| (0..len).map(|i| T::narrow(i as f32)));
        prop_assert!(untouched.map(|x| x.widen().to_bits()).eq(after));
    }
    Ok(())
}

fn budget() -> ProptestConfig {
    ProptestConfig {
        max_global_rejects: u32::MAX,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(budget())]

    #[test]
    fn raw_bytes_never_break_a_backend(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let Some(case) = case(&bytes) else { return Ok(()) };
        if refuses(&case) {
            return Ok(());
        }
        let expected = case.on_host(Isa::Scalar);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            prop_assert_eq!(&case.on_host(isa), &expected);
        }
        for image in Image::all() {
            let run = image.run(&case).map_err(|fault| TestCaseError::fail(fault.to_string()))?;
            prop_assert_eq!(&run.outcome, &expected);
        }
    }

    #[test]
    fn parts_of_plans_take_nothing_amiss(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        wild in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let Some(case) = case(&bytes) else { return Ok(()) };
        let part = PartOfCase::new(&case, &mut Source(&wild));
        match case.dtype {
            Dtype::F32 => part_is_a_plan::<f32>(&case, &part)?,
            Dtype::F16 => part_is_a_plan::<f16>(&case, &part)?,
            _ => part_is_a_plan::<bf16>(&case, &part)?,
        }
    }

    #[test]
    fn a_refused_position_writes_nothing(
        position in any::<i64>(),
        rows in 1usize..20,
        tokens in 1usize..9,
    ) {
        let table = CosSinTable::new(vec![0.5; rows * 4], vec![0.5; rows * 4], 4).unwrap();
        let rotator = Host::new().rotator(&Rope::new(table, Pairing::HalfSplit));
        let plan = rotator
            .plan(&Problem::new(Dtype::F32).q(Layout::tokens(tokens, 2, 8)))
            .unwrap();
        let before = vec![1.0f32; tokens * 16];
        let mut q = before.clone();
        let operand = Some(InOut::InPlace(&mut q[..]));
        let result = rotator.rotate(&plan, operand, None, Positions::start(position));
        let last = i128::from(position) + tokens as i128 - 1;
        if position >= 0 && last < rows as i128 {
            prop_assert!(result.is_ok());
        } else {
            prop_assert!(result.is_err());
            prop_assert_eq!(q, before);
        }
    }
}
