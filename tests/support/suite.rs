//! The fixed part of the kernel suite, as data: for each kernel the same checks in every run.
//! `kernels.rs` holds every image to them; `kernel_mutants.rs` shows that they catch seeded faults.

use crate::append_checks::{AppendCheck, append_checks};
use crate::fused_checks::{FusedCheck, fused_checks};
use crate::kernel_cases::{
    AngleKind, Case, Elements, FACTOR, Form, MODES, Outcome, PHASES, PHASES_WITH_FACTOR, Rng,
    TensorCase, TestPositions, Values, Wish, bytes, edge_phases, from_bytes, random_case,
    random_elements, sharp_case, ties_case,
};
use crate::ptx_backend::{Image, Run, constant, constant_angles, settle_ids, triggers};
use phasor::call::{Addresses, AngleAddresses, TensorAddresses};
use phasor::launch::{Family, Kernel, LaunchMode};
use phasor::{
    Angles, CosSinTable, Dtype, Frequencies, FrequencyRowKind, FrequencyRows, IdType, Ids, InOut,
    Isa, Layout, OutOfRange, Pairing, Plan, PositionKind, Problem, Rope,
};
use ptx_interpreter::{Error, Fault, Memory};
use std::collections::HashMap;

/// PTX that is held to the checks: the kernels of one element type, or one of them.
pub struct Subject(pub Image);

impl Subject {
    pub fn image(&self) -> &Image {
        &self.0
    }

    pub fn new(name: &str, module: (Family, Dtype), text: &str) -> Result<Subject, Error> {
        Image::of_module(name, module, text).map(Subject)
    }
}

/// How often each byte of a buffer is read and written.
pub type Counts = HashMap<&'static str, Vec<(u32, u32)>>;

/// Threads of a block, and blocks over heads and over chunks of a head. Those over tokens follow.
pub type Shape = ([u32; 3], [u32; 2]);

enum How {
    /// As the driver would get it. Every byte is also counted, where angles are formed after the loads of
    /// q and k, and where before.
    Planned([Counts; 2]),
    /// In another shape than the plan's; the kernels accept any.
    Shaped(Shape),
    /// Every address of q, k, positions and table past 2^32.
    Far(Option<Shape>),
}

pub struct Check {
    pub name: &'static str,
    call: CheckedCall,
}

enum CheckedCall {
    Rotation(Box<Rotation>),
    Append(Box<AppendCheck>),
    Fused(FusedCheck),
}

/// A rotation, and what it must do.
struct Rotation {
    kernel: Kernel,
    case: Case,
    expected: Outcome,
    how: How,
}

/// How a check fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    Fault(String),
    /// Other bits than the host's.
    Bits,
    /// A byte is read or written more or less often than once, angles are loaded again, or dependents
    /// are not launched.
    Traffic,
}

impl Check {
    fn new(name: &'static str, kernel: Kernel, case: Case, how: How) -> Check {
        let expected = case.on_host(Isa::Scalar);
        let rotation = Rotation {
            kernel,
            case,
            expected,
            how,
        };
        Check::of(name, CheckedCall::Rotation(Box::new(rotation)))
    }

    fn of(name: &'static str, call: CheckedCall) -> Check {
        assert!(CHECKS.iter().any(|&(listed, _)| listed == name));
        Check { name, call }
    }

    pub fn run(&self, subject: &Subject) -> Result<(), Failure> {
        match &self.call {
            CheckedCall::Rotation(rotation) => rotation.run(subject),
            CheckedCall::Append(append) => append.run(subject),
            CheckedCall::Fused(fused) => fused.run(subject),
        }
    }
}

impl Rotation {
    fn run(&self, subject: &Subject) -> Result<(), Failure> {
        let fault = |fault: Fault| Failure::Fault(fault.to_string());
        let (outcome, traffic) = match &self.how {
            How::Planned(counts) => {
                let run = subject.image().run(&self.case).map_err(fault)?;
                assert_eq!(run.kernel, Some(self.kernel.name()));
                let early = usize::from(run.stats.loads_before_wait > 0);
                let traffic = run.counts == counts[early]
                    && self.accesses_are_of_one_width(&run)
                    && run.triggers;
                (run.outcome, traffic)
            }
            How::Shaped(shape) => by_hand(subject, self, false, Some(*shape)).map_err(fault)?,
            How::Far(shape) => by_hand(subject, self, true, *shape).map_err(fault)?,
        };
        if outcome != self.expected {
            return Err(Failure::Bits);
        }
        if !traffic {
            return Err(Failure::Traffic);
        }
        Ok(())
    }

    fn accesses_are_of_one_width(&self, run: &Run) -> bool {
        let width = self.kernel.vector() * self.kernel.dtype.size();
        run.counts.keys().all(|name| {
            run.stats.buffer(name).is_some_and(|traffic| {
                traffic.loads_of(width) * width as u64 == traffic.loaded_bytes()
                    && traffic.stores_of(width) * width as u64 == traffic.stored_bytes()
            })
        })
    }
}

/// Names of the checks, and what they are.
pub const CHECKS: [(&str, &str); 12] = [
    (
        "random",
        "every kind of position with every form of call, four random cases of each",
    ),
    (
        "stages",
        "every kind of position with biases, norms, scales and codes, six random cases of each",
    ),
    (
        "values",
        "positions found by search, at which the last bit of a logarithm shows; values between two codes; special scales",
    ),
    (
        "heads",
        "norms over many heads together; heads of more dims than lanes take four of",
    ),
    ("shifts", "keys that rotate in their cache"),
    (
        "flows",
        "every way for keys and values to go; threads that go from one stream to the next",
    ),
    (
        "slots",
        "sequences of every length; slots of every kind, at both sides of every bound",
    ),
    (
        "kinds",
        "positions of each type at both ends of it; each way to choose a row of steps",
    ),
    (
        "far",
        "launch shapes that no plan has; heads, positions and table rows past 2^32 bytes",
    ),
    (
        "sharp",
        "angles found by search, at which the last bit of each constant and rounding shows",
    ),
    (
        "edges",
        "phases that are single bits or next to an eighth of a turn",
    ),
    (
        "ties",
        "results halfway between two elements; infinities and NaNs",
    ),
];

/// All checks of a kernel.
pub fn checks(kernel: Kernel) -> Vec<Check> {
    if kernel.family == Family::Fused {
        let all = fused_checks(kernel).into_iter();
        let checks = all.map(|(name, check)| Check::of(name, CheckedCall::Fused(check)));
        return checks.collect();
    }
    if kernel.family == Family::Append {
        let all = append_checks(kernel).into_iter();
        let checks = all.map(|(name, check)| Check::of(name, CheckedCall::Append(Box::new(check))));
        return checks.collect();
    }
    let mut checks = random_checks(kernel);
    for angles in AngleKind::ALL {
        for (n, case) in kinds_cases(kernel, angles).into_iter().enumerate() {
            let how = How::Planned([false, true].map(|early| once(&case, early)));
            let case = in_mode(case, n);
            checks.push(Check::new("kinds", kernel, case, how));
        }
        for in_place in [true, false] {
            for (n, (heads, shape)) in FAR.into_iter().enumerate() {
                // With angles after the wait, and before it.
                for mode in [n % 2, 2] {
                    let case = in_mode(far_case(kernel, angles, in_place, heads), mode);
                    checks.push(Check::new("far", kernel, case, How::Far(shape)));
                }
            }
        }
        // Four rows of threads, so that each of the four heads a thread holds at once sees each kind
        // of elements.
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
            checks.push(Check::new(
                name,
                kernel,
                in_mode(case, n),
                How::Shaped(rows),
            ));
        }
    }
    for case in far_types(kernel) {
        checks.push(Check::new("far", kernel, case, How::Far(None)));
    }
    let case = by_position(far_case(kernel, AngleKind::Rows, true, [5, 5]));
    checks.push(Check::new("far", kernel, case, How::Far(None)));
    checks
}

/// Each way to launch in turn.
fn in_mode(case: Case, n: usize) -> Case {
    Case {
        mode: MODES[n % MODES.len()],
        ..case
    }
}

/// Every angle source with every kind of position and every form of call, some of each.
fn random_checks(kernel: Kernel) -> Vec<Check> {
    const EACH: usize = 3;
    let image = &Image::all()[0];
    let mut rng = Rng(kernel.index() as u64);
    let mut checks = Vec::new();
    for angles in AngleKind::ALL {
        for form in Form::ALL {
            for &kind in angles.position_kinds() {
                let wish = Wish {
                    dtype: Some(kernel.dtype),
                    pairing: kernel.pairing,
                    angles: Some(angles),
                    kind: Some(kind),
                    form: Some(form),
                    aligned: Some(kernel.pairing.is_some()),
                    head_dim: None,
                };
                let mut found = 0;
                // Other cases have nothing to rotate, or happen to suit vectors.
                while found < EACH {
                    let case = random_case(&mut rng, wish);
                    let run = image.run(&case).unwrap();
                    if run.kernel == Some(kernel.name()) {
                        let how = How::Planned([false, true].map(|early| once(&case, early)));
                        checks.push(Check::new("random", kernel, case, how));
                        found += 1;
                    }
                }
            }
        }
    }
    checks
}

/// How often each byte is read and written: once where it rotates or is copied, else never. What a token
/// does not rotate, as its position is outside the table, is not written in place; out of place it is
/// copied. Where angles are formed after the loads, it was loaded for the rotation too.
fn once(case: &Case, early: bool) -> Counts {
    let size = case.dtype.size();
    let in_vain = u32::from(!early);
    let mut counts = Counts::new();
    for (tensor, names) in [(&case.q, ["q", "q_out"]), (&case.k, ["k", "k_out"])] {
        let Some(tensor) = tensor else { continue };
        let rotary_dim = case.rope.rotary_dim();
        // What is in the rotated window of a token that rotates and of one that does not, and what is
        // outside of it.
        let mut touch = |name, layout: Layout, len: usize, window: [(u32, u32); 2], rest| {
            let bytes = counts
                .entry(name)
                .or_insert_with(|| vec![(0, 0); len * size]);
            let offset = layout.rotary_offset();
            let [_, tokens, heads_of_token, head_dim] = layout.shape();
            for (n, head) in heads(layout).into_iter().enumerate() {
                let token = n / heads_of_token;
                let count = window[usize::from(!rotates(case, tokens, token))];
                for dim in 0..head_dim {
                    let rotated = (offset..offset + rotary_dim).contains(&dim);
                    let at = (head + dim) * size;
                    bytes[at..at + size].fill(if rotated { count } else { rest });
                }
            }
        };
        match (tensor.layout, &case.one_buffer, &tensor.destination) {
            (InOut::InPlace(layout), buffer, _) => {
                let (name, len) = match buffer {
                    Some(buffer) => ("packed", buffer.len()),
                    None => (names[0], tensor.source.len()),
                };
                // Other heads of one buffer are rotated too.
                touch(name, layout, len, [(1, 1), (in_vain, 0)], (0, 0));
            }
            (
                InOut::OutOfPlace {
                    source,
                    destination,
                },
                _,
                written,
            ) => {
                let len = tensor.source.len();
                touch(names[0], source, len, [(1, 0), (1 + in_vain, 0)], (1, 0));
                let len = written.as_ref().map_or(0, Vec::len);
                touch(names[1], destination, len, [(0, 1); 2], (0, 1));
            }
        }
    }
    counts.retain(|_, bytes| !bytes.is_empty());
    counts
}

/// Whether the position of a token, one of so many of each sequence, is one that the case's angles have.
fn rotates(case: &Case, tokens: usize, token: usize) -> bool {
    let Angles::Table(table) = case.rope.angles() else {
        return true;
    };
    if table.out_of_range() != OutOfRange::PassThrough {
        return true;
    }
    let positions = &case.positions;
    let ids = positions.ids.values();
    let (b, t) = (token / tokens, token % tokens);
    let position = match positions.kind {
        PositionKind::Start => positions.start.wrapping_add(t as i64),
        PositionKind::StartPerSequence => ids[b].wrapping_add(t as i64),
        PositionKind::PerSequence => ids[b],
        PositionKind::PerTokenShared => ids[t],
        PositionKind::PerToken | PositionKind::PerAxis => ids[token],
        other => panic!("{other:?} is not covered"),
    };
    (0..table.rows() as i64).contains(&position)
}

/// Where each head starts.
fn heads(layout: Layout) -> Vec<usize> {
    let [batch, sequence, heads, _] = layout.shape();
    let [batch_stride, sequence_stride, head_stride] = layout.strides();
    let mut starts = Vec::new();
    for b in 0..batch {
        for s in 0..sequence {
            for h in 0..heads {
                let start = b * batch_stride + s * sequence_stride + h * head_stride;
                starts.push(layout.offset() + start);
            }
        }
    }
    starts
}

/// Heads of q and of k, and shapes: the plan's own, one thread for all heads, and threads to spare
/// on each axis in turn. A thread holds four heads at once; where it visits all heads, the last of
/// q and the last of k fall on each of the four in turn.
pub const FAR: [([usize; 2], Option<Shape>); 12] = [
    ([5, 5], None),
    ([5, 5], Some(([1, 1, 1], [1, 5]))),
    ([2, 5], Some(([1, 1, 1], [1, 5]))),
    ([3, 5], Some(([1, 1, 1], [1, 5]))),
    ([4, 5], Some(([1, 1, 1], [1, 5]))),
    ([6, 3], Some(([1, 1, 1], [1, 5]))),
    ([7, 3], Some(([1, 1, 1], [1, 5]))),
    ([8, 3], Some(([1, 1, 1], [1, 5]))),
    ([5, 5], Some(([3, 2, 2], [2, 3]))),
    // More threads than a chunk has pairs, and another chunk in the next block.
    ([5, 5], Some(([1, 6, 2], [1, 5]))),
    ([5, 5], Some(([2, 2, 1], [6, 3]))),
    ([5, 5], Some(([16, 3, 5], [3, 1]))),
];

const BATCH: usize = 2;
const SEQUENCE: usize = 3;

/// Two chunks of pairs a head, and dims to copy on both sides: not as many for q as for k.
pub fn far_case(kernel: Kernel, kind: AngleKind, in_place: bool, heads: [usize; 2]) -> Case {
    let vector = 4;
    let (unit, head_dims, offsets, pairs) = match (kernel.family, kernel.pairing) {
        // Heads that rotate as a whole; norms want even ones.
        (Family::Fused, Some(_)) => (vector, [16, 16], [0, 0], 8 * vector),
        (Family::Fused, None) => (1, [18, 22], [4, 6], 5),
        (_, Some(_)) => (vector, [7, 8], [1, 2], 2 * vector),
        (_, None) => (1, [18, 21], [4, 6], 5),
    };
    let mut rng = Rng(9);
    let mut steps = |count| (0..count).map(|_| rng.next()).collect::<Vec<_>>();
    let angles: Angles = match kind {
        AngleKind::Exact => Frequencies::from_steps(steps(pairs)).unwrap().into(),
        AngleKind::Rows => {
            let rows = [1.0, 0.5, 0.75, 1.25].map(|factor| {
                let row = Frequencies::from_axis_steps(steps(AXES * pairs), AXES).unwrap();
                row.with_attention_factor(factor).unwrap()
            });
            FrequencyRows::new(&rows).unwrap().into()
        }
        AngleKind::Table => {
            // Ordinary numbers: scaling them by powers of two loses nothing.
            let mut values = || {
                let value = |_| (rng.next() as i64 as f64 / (1u64 << 62) as f64) as f32;
                (0..ROWS as usize * pairs).map(value).collect()
            };
            let table = CosSinTable::new(values(), values(), pairs).unwrap();
            // A clamped row is read where a passed-through one is not: each in one of the two
            // cases.
            let choice = if in_place {
                OutOfRange::Clamp
            } else {
                OutOfRange::PassThrough
            };
            table.with_out_of_range(choice).into()
        }
    };
    // Any pairing, and out of place any two.
    let pairing = kernel.pairing.unwrap_or(if heads[0].is_multiple_of(2) {
        Pairing::Interleaved
    } else {
        Pairing::HalfSplit
    });
    let mut rope = Rope::new(angles, pairing);
    if kernel.pairing.is_none() && !in_place && kind != AngleKind::Table {
        rope = rope.with_output_pairing(match pairing {
            Pairing::HalfSplit => Pairing::Interleaved,
            Pairing::Interleaved => Pairing::HalfSplit,
        });
    }
    let mut tensor = |n: usize| {
        let layout = Layout::bshd(BATCH, SEQUENCE, heads[n], unit * head_dims[n])
            .with_rotary_offset(unit * offsets[n]);
        let len = layout.required_len().unwrap();
        let mut elements = || random_elements(&mut rng, kernel.dtype, len);
        TensorCase {
            layout: if in_place {
                layout.into()
            } else {
                (layout, layout).into()
            },
            source: elements(),
            destination: (!in_place).then(elements),
            misalign: 0,
        }
    };
    let (q, k) = (tensor(0), tensor(1));
    Case {
        dtype: kernel.dtype,
        rope,
        q: Some(q),
        k: Some(k),
        one_buffer: None,
        positions: match kind {
            // All rows of a table and one on each side; where there are two axes, the other's too.
            AngleKind::Rows => {
                let ids = [-1, 0, 1, 2, 3, 4, 11, 1 << 40, -13, 14, 15, i64::MIN];
                TestPositions::of(PositionKind::PerAxis, IdType::I64, &ids).with_rows(
                    FrequencyRowKind::PerToken,
                    Values::new(IdType::U32, &[3, 1, 0, 2, 3, 3]),
                )
            }
            AngleKind::Exact | AngleKind::Table => {
                let ids = [-1, 0, 1, 2, 3, 4];
                TestPositions::of(PositionKind::PerToken, IdType::I64, &ids)
            }
        },
        multiprocessors: 1,
        mode: LaunchMode::Ordinary,
    }
}

/// Positions of 32 bits; indices of rows of 64, of which the last is past what 32 bits hold; and signed ones,
/// of which the last is the most negative.
pub fn far_types(kernel: Kernel) -> [Case; 3] {
    let near = far_case(kernel, AngleKind::Exact, true, [2, 1]);
    let positions = TestPositions {
        ids: Values::new(IdType::I32, &near.positions.ids.values()),
        ..near.positions.clone()
    };
    let rows = far_case(kernel, AngleKind::Rows, true, [2, 1]);
    let chosen = |id_type, ids: &[i64]| Case {
        positions: TestPositions {
            rows: Values::new(id_type, ids),
            ..rows.positions.clone()
        },
        ..rows.clone()
    };
    [
        Case { positions, ..near },
        chosen(IdType::I64, &rows.positions.rows.values()),
        chosen(IdType::I32, &[1, 0, 1, 1, 0, 3]),
    ]
}

/// The same heads, with two rows on one axis.
fn on_one_axis(case: Case) -> (FrequencyRows, Case) {
    let Angles::Rows(rows) = case.rope.angles() else {
        panic!("rows only")
    };
    let pairs = rows.pairs();
    let rows = [0, 1].map(|row| {
        let row = rows.row(row).unwrap();
        let steps = row.steps()[..pairs].to_vec();
        let factor = row.attention_factor();
        let row = Frequencies::from_steps(steps).unwrap();
        row.with_attention_factor(factor).unwrap()
    });
    let positions = TestPositions::of(
        PositionKind::PerToken,
        IdType::I64,
        &[-1, 0, 1, 2, 3, 1 << 40],
    );
    (
        FrequencyRows::new(&rows).unwrap(),
        Case { positions, ..case },
    )
}

/// The same, where positions choose between them.
pub fn by_position(case: Case) -> Case {
    let (rows, case) = on_one_axis(case);
    Case {
        rope: Rope::new(rows.by_position(2).unwrap(), case.rope.pairing()),
        ..case
    }
}

/// The same, where the call has the second.
fn by_call(case: Case) -> Case {
    let (rows, case) = on_one_axis(case);
    Case {
        rope: Rope::new(rows, case.rope.pairing()),
        positions: case.positions.clone().with_row(1),
        ..case
    }
}

/// Positions of each type at both ends of it, and each way to choose a row of steps.
pub fn kinds_cases(kernel: Kernel, kind: AngleKind) -> Vec<Case> {
    let ends = [
        (IdType::I32, [-1, 1, i32::MIN.into(), 2, i32::MAX.into(), 0]),
        (IdType::U32, [u32::MAX.into(), 1, 1 << 31, 2, 3, 0]),
        (IdType::I64, [-1, 1, i64::MIN, 2, i64::MAX, 0]),
    ];
    let plain = far_case(kernel, kind, true, [2, 1]);
    let mut cases: Vec<_> = ends
        .iter()
        .map(|(id_type, ids)| Case {
            positions: TestPositions {
                kind: PositionKind::PerToken,
                ids: Values::new(*id_type, ids),
                ..plain.positions.clone()
            },
            ..plain.clone()
        })
        .collect();
    if kind == AngleKind::Rows {
        let by_each = cases.clone().into_iter().map(|case| {
            let positions = TestPositions {
                row_kind: FrequencyRowKind::None,
                ..case.positions.clone()
            };
            Case {
                positions,
                ..by_position(case)
            }
        });
        let by_each: Vec<_> = by_each.collect();
        let plain = cases[0].positions.clone();
        let rows = |id_type, ids: &[i64]| Values::new(id_type, ids);
        let choices = [
            plain.clone().with_row(2),
            plain
                .clone()
                .with_rows(FrequencyRowKind::PerSequence, rows(IdType::I32, &[3, 1])),
            plain
                .clone()
                .with_rows(FrequencyRowKind::PerSequence, rows(IdType::I64, &[0, 2])),
            plain.with_rows(
                FrequencyRowKind::PerToken,
                rows(IdType::U32, &[0, 1, 2, 3, 2, 1]),
            ),
        ];
        let case = cases[0].clone();
        cases.extend(choices.map(|positions| Case {
            positions,
            ..case.clone()
        }));
        cases.extend(by_each);
        cases.push(by_call(case));
    }
    cases
}

/// Axes and rows of the rotations of [`far_case`], and rows of its tables.
const AXES: usize = 2;
pub const ROWS: i64 = 4;
/// Rows between two rows, where they are spread; four of these are the most an index holds.
pub const ROW_SPREAD: u32 = 30;

/// The same heads, each far from the next.
fn far(layout: Layout, which: usize) -> Layout {
    let unit = (1usize << 32) + 64 * which;
    layout
        .with_strides(1024 * unit, 128 * unit, 8 * unit)
        .with_offset(unit)
}

/// Runs a case whose tensors are separate buffers, in a shape of one's own. `spread` puts heads,
/// positions and table rows further apart than 32 bits can tell, in buffers of which only the
/// touched pages exist. Tells also whether each block loaded its angles once for all its heads.
fn by_hand(
    subject: &Subject,
    check: &Rotation,
    spread: bool,
    shape: Option<Shape>,
) -> Result<(Outcome, bool), Fault> {
    let case = &check.case;
    let size = case.dtype.size();
    let mut memory = Memory::new();
    let place = |memory: &mut Memory, name, near: Layout, which, elements: Option<&Elements>| {
        let layout = if spread { far(near, which) } else { near };
        let length = (layout.required_len().unwrap() * size) as u64;
        let misalign = if check.kernel.pairing.is_some() {
            0
        } else {
            size
        };
        let address = memory.add_sparse(name, length, misalign);
        if let Some(elements) = elements {
            for (from, to) in heads(near).into_iter().zip(heads(layout)) {
                let head = bytes(case.dtype, &elements[from..from + near.shape()[3]]);
                memory.write(address + (to * size) as u64, &head);
            }
        }
        (layout, address)
    };
    let mut problem = Problem::new(case.dtype);
    let mut addresses = [TensorAddresses::default(); 2];
    let mut written = Vec::new();
    for (n, tensor) in [&case.q, &case.k].into_iter().enumerate() {
        let Some(tensor) = tensor else { continue };
        let (layout, near) = match tensor.layout {
            InOut::InPlace(near) => {
                let (layout, address) = place(&mut memory, "x", near, n, Some(&tensor.source));
                addresses[n].source = address;
                addresses[n].destination = address;
                (layout.into(), near)
            }
            InOut::OutOfPlace {
                source,
                destination,
            } => {
                let (from, address) = place(&mut memory, "x", source, n, Some(&tensor.source));
                memory.set_read_only(address);
                addresses[n].source = address;
                let (to, address) = place(&mut memory, "out", destination, n + 2, None);
                addresses[n].destination = address;
                ((from, to).into(), destination)
            }
        };
        let (InOut::InPlace(to)
        | InOut::OutOfPlace {
            destination: to, ..
        }) = layout;
        written.push((tensor, near, to, addresses[n].destination));
        problem = if n == 0 {
            problem.q(layout)
        } else {
            problem.k(layout)
        };
    }

    let plan = Plan::new(&case.rope, &problem).unwrap();
    let (angles, row_spread) = match case.rope.angles() {
        Angles::Table(table) if spread => {
            let row = table.pairs() * 4;
            let mut values =
                |name, x: &[f32]| spread_rows(&mut memory, name, ROW_SPREAD, row, &floats(x));
            let cos = values("cos", table.cos());
            let sin = values("sin", table.sin());
            (AngleAddresses::Table { cos, sin }, ROW_SPREAD)
        }
        // Positions choose row 0 or 1: these stay next to each other.
        Angles::Rows(rows) if spread && rows.boundary().is_none() => {
            let row = rows.axes() * rows.pairs() * 8;
            let steps: Vec<u8> = rows.steps().iter().flat_map(|s| s.to_le_bytes()).collect();
            let steps = spread_rows(&mut memory, "steps", ROW_SPREAD, row, &steps);
            let factors = floats(rows.attention_factors());
            let factors = spread_rows(&mut memory, "factors", ROW_SPREAD, 4, &factors);
            (AngleAddresses::Steps { steps, factors }, 0)
        }
        angles => {
            let mut constant = |name, bytes| constant(&mut memory, name, bytes);
            (constant_angles(angles, &mut constant), 0)
        }
    };

    let positions = case.positions.ids.values();
    let short = case.positions.ids.id_type != IdType::I64;
    let tokens = positions.len() / case.rope.angles().axes();
    let sequence = tokens / if spread { BATCH } else { 1 };
    // A position is start + t * advance + id: each of the three takes its share.
    let (id_stride, start, advance) = match (spread, short) {
        (true, false) => (1 << 33, -77 << 40, (3 << 33) + 1),
        (true, true) => (1 << 33, 0, 0),
        (false, _) => (8, 0, 0),
    };
    let has_rows = case.positions.row_kind == FrequencyRowKind::PerToken;
    let mut placed = case.positions.placed(|name, values| {
        let value = |n: usize| match (name, spread) {
            ("ids", _) => spread_position(positions[n], row_spread)
                .wrapping_sub(start)
                .wrapping_sub((n % sequence) as i64 * advance),
            // The last token's index is past the last row, which it stands for.
            (_, true) if n == tokens - 1 && values.id_type == IdType::I64 => (1 << 32) + 1,
            (_, true) if n == tokens - 1 && values.id_type == IdType::I32 => i32::MIN.into(),
            (_, true) if n == tokens - 1 => (values.values()[n] << ROW_SPREAD) + 1,
            (_, true) => values.values()[n] << ROW_SPREAD,
            (_, false) if n == tokens - 1 => i64::from(u32::MAX),
            (_, false) => values.values()[n],
        };
        let size = values.id_type.size();
        let stride = if spread { id_stride } else { size as u64 };
        let address = memory.add_sparse(name, stride * values.len() as u64, 0);
        for n in 0..values.len() {
            let bytes = &value(n).to_le_bytes()[..size];
            memory.write(address + n as u64 * stride, bytes);
        }
        settle_ids(&mut memory, address, case.mode);
        Ids::at(address, values.id_type, values.len())
    });
    if !has_rows && case.positions.row_kind != FrequencyRowKind::None {
        placed = placed.frequency_row(case.positions.row);
    }

    let addresses = Addresses {
        q: addresses[0],
        k: addresses[1],
        angles,
        positions: placed,
        v: TensorAddresses::default(),
        cache: None,
        stages: Default::default(),
    };
    let call = plan.call(&addresses).unwrap().expect("something to rotate");
    let mut launch = call.launch(&subject.image().target(case.multiprocessors, case.mode));
    assert_eq!(launch.kernel, check.kernel);
    if spread {
        let params = &mut launch.params;
        params.positions.start = start;
        params.positions.advance = advance;
        params.positions.axis_stride = (id_stride * tokens as u64) as i64;
        for ids in [&mut params.positions.ids, &mut params.rows.ids] {
            ids.token = id_stride as i64;
            ids.batch = (id_stride * sequence as u64) as i64;
        }
        match case.rope.angles() {
            Angles::Table(_) => params.rows.count = (((ROWS as u64 - 1) << ROW_SPREAD) + 1) as u32,
            Angles::Rows(_) if has_rows => {
                params.rows.count = (((ROWS as u64 - 1) << ROW_SPREAD) + 1) as u32;
            }
            _ => {}
        }
    }
    if let Some((block, [heads, chunks])) = shape {
        let params = &mut launch.params;
        params.token_groups = params.tokens.div_ceil(block[2]);
        launch.block = block;
        launch.grid = [params.batch * params.token_groups, heads, chunks];
        launch.shared_bytes =
            8 * block[0] * block[2] * if check.kernel.pairing.is_some() { 4 } else { 1 };
    }
    let stats = subject.image().run_launch(&mut memory, &launch)?;
    let once = angle_bytes(case, tokens, u64::from(launch.grid[1]));
    let loaded = ["steps", "cos", "sin"].map(|name| stats.buffer(name));
    let loaded: u64 = loaded.into_iter().flatten().map(|t| t.loaded_bytes()).sum();

    let mut outcome = Vec::new();
    for (tensor, near, to, address) in written {
        let mut elements = tensor
            .destination
            .as_ref()
            .unwrap_or(&tensor.source)
            .clone();
        let head_dim = near.shape()[3];
        for (near, to) in heads(near).into_iter().zip(heads(to)) {
            let head = memory.read(address + (to * size) as u64, head_dim * size);
            // A head with a byte that nobody wrote is no outcome at all.
            let Some(head) = head else {
                return Ok((Outcome(Vec::new()), true));
            };
            elements[near..near + head_dim].copy_from_slice(&from_bytes(case.dtype, &head));
        }
        outcome.push(elements);
    }
    let triggers = triggers(&launch, &stats, subject.image().dependent());
    Ok((Outcome(outcome), once == loaded && triggers))
}

pub fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Rows of `row` bytes each, `2^spread` rows apart.
pub fn spread_rows(
    memory: &mut Memory,
    name: &'static str,
    spread: u32,
    row: usize,
    bytes: &[u8],
) -> u64 {
    let at = |n: usize| (n * row) as u64;
    let rows = bytes.len() / row;
    let address = memory.add_sparse(name, (at(rows - 1) << spread) + row as u64, 0);
    for (n, bytes) in bytes.chunks(row).enumerate() {
        memory.write(address + (at(n) << spread), bytes);
    }
    memory.set_read_only(address);
    memory.set_constant(address);
    address
}

/// Where a position lies once the table's rows are apart: in range or next to it, as before.
pub fn spread_position(position: i64, row_spread: u32) -> i64 {
    match position {
        ..0 => position,
        0..ROWS => position << row_spread,
        ROWS.. if row_spread > 0 => ((ROWS - 1) << row_spread) + position - (ROWS - 1),
        ROWS.. => position,
    }
}

/// Bytes of angles that a launch loads: for each token, each of the blocks that share its heads loads
/// them once.
fn angle_bytes(case: &Case, tokens: usize, blocks: u64) -> u64 {
    let angles = case.rope.angles();
    // A step takes as many bytes as a cosine and a sine.
    blocks * (tokens * angles.axes() * angles.pairs() * 8) as u64
}
