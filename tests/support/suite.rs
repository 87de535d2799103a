//! The fixed part of the kernel suite, as data: for each kernel the same checks in every run.
//! `kernels.rs` holds every image to them; `kernel_mutants.rs` shows that they catch seeded faults.

use crate::kernel_cases::{
    Case, Elements, Form, Ids, Outcome, PHASES, Rng, TensorCase, Wish, bytes, edge_phases,
    from_bytes, random_case, random_elements, sharp_case, ties_case,
};
use crate::ptx::{Error, Fault, Launch, Memory, Module, run};
use crate::ptx_backend::{COMPUTE_80, Image, Run};
use phasor::launch::{
    Addresses, AngleAddresses, Kernel, PositionAddresses, PositionDtype, TensorAddresses,
};
use phasor::{
    Angles, CosSinTable, Dtype, Frequencies, InOut, Isa, Layout, OutOfRange, Plan, PositionKind,
    PositionMemory, Problem, Rope,
};
use std::collections::HashMap;

/// PTX that is held to the checks: the kernels of one element type, or one of them.
pub struct Subject {
    image: Image,
    module: Module,
}

impl Subject {
    pub fn new(name: &str, dtype: Dtype, text: &str) -> Result<Subject, Error> {
        let module = Module::parse(text)?;
        let image = Image::parse(name, Dtype::ALL.map(|d| if d == dtype { text } else { "" }));
        Ok(Subject { image, module })
    }
}

/// Blocks and threads of a launch.
type Shape = ([u32; 3], [u32; 3]);

enum How {
    /// As the driver would get it. Every byte is also counted.
    Planned(HashMap<&'static str, Vec<(u32, u32)>>),
    /// In another shape than the plan's; the kernels accept any.
    Shaped(Shape),
    /// Every address of q, k, positions and table past 2^32.
    Far(Option<Shape>),
}

pub struct Check {
    pub name: &'static str,
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
    /// A byte is read or written more or less often than once, or angles are loaded again.
    Traffic,
}

impl Check {
    fn new(name: &'static str, kernel: Kernel, case: Case, how: How) -> Check {
        assert!(CHECKS.iter().any(|&(listed, _)| listed == name));
        let expected = case.on_host(Isa::Scalar);
        Check {
            name,
            kernel,
            case,
            expected,
            how,
        }
    }

    pub fn run(&self, subject: &Subject) -> Result<(), Failure> {
        let fault = |fault: Fault| Failure::Fault(fault.to_string());
        let (outcome, traffic) = match &self.how {
            How::Planned(counts) => {
                let run = subject.image.run(&self.case).map_err(fault)?;
                assert_eq!(run.kernel, Some(self.kernel.name()));
                let traffic = run.counts == *counts && self.accesses_are_of_one_width(&run);
                (run.outcome, traffic)
            }
            How::Shaped(shape) => {
                by_hand(&subject.module, self, false, Some(*shape)).map_err(fault)?
            }
            How::Far(shape) => by_hand(&subject.module, self, true, *shape).map_err(fault)?,
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
        let width = if self.kernel.wide {
            16
        } else {
            self.kernel.dtype.size()
        };
        run.counts.keys().all(|name| {
            run.stats.buffer(name).is_some_and(|traffic| {
                traffic.loads_of(width) * width as u64 == traffic.loaded_bytes()
                    && traffic.stores_of(width) * width as u64 == traffic.stored_bytes()
            })
        })
    }
}

/// Names of the checks, and what they are.
pub const CHECKS: [(&str, &str); 5] = [
    (
        "random",
        "every kind of position with every form of call, four random cases of each",
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
    let mut checks = random_checks(kernel);
    for in_place in [true, false] {
        for (heads, shape) in FAR {
            let case = far_case(kernel, in_place, heads);
            checks.push(Check::new("far", kernel, case, How::Far(shape)));
        }
    }
    // Four rows of threads, so that each of the four heads a thread holds at once sees each kind
    // of elements.
    let rows = ([3, 1, 1], [4, 4, 8]);
    for (name, case) in [
        ("sharp", sharp_case(kernel, &PHASES)),
        ("edges", sharp_case(kernel, &edge_phases())),
        ("ties", ties_case(kernel)),
    ] {
        checks.push(Check::new(name, kernel, case, How::Shaped(rows)));
    }
    checks
}

/// Every kind of position with every form of call, some of each.
fn random_checks(kernel: Kernel) -> Vec<Check> {
    const EACH: usize = 4;
    let image = Image::parse("compute_80", COMPUTE_80);
    let mut rng = Rng(kernel.index() as u64);
    let mut checks = Vec::new();
    for form in [Form::InPlace, Form::OutOfPlace, Form::Packed] {
        for kind in [
            PositionKind::Start,
            PositionKind::StartPerRow,
            PositionKind::PerToken,
        ] {
            let wish = Wish {
                dtype: Some(kernel.dtype),
                pairing: Some(kernel.pairing),
                table: Some(kernel.table),
                kind: Some(kind),
                form: Some(form),
                aligned: Some(kernel.wide),
                head_dim: None,
            };
            let mut found = 0;
            // Other cases have nothing to rotate, or happen to suit the other width.
            while found < EACH {
                let case = random_case(&mut rng, wish);
                let run = image.run(&case).unwrap();
                if run.kernel == Some(kernel.name()) {
                    let how = How::Planned(once(&case));
                    checks.push(Check::new("random", kernel, case, how));
                    found += 1;
                }
            }
        }
    }
    checks
}

/// How often each byte is read and written: once where it rotates or is copied, else never.
fn once(case: &Case) -> HashMap<&'static str, Vec<(u32, u32)>> {
    let size = case.dtype.size();
    let mut counts: HashMap<&'static str, Vec<(u32, u32)>> = HashMap::new();
    for (tensor, names) in [(&case.q, ["q", "q_out"]), (&case.k, ["k", "k_out"])] {
        let Some(tensor) = tensor else { continue };
        let rotary_dim = case.rope.rotary_dim();
        let mut touch = |name, layout: Layout, whole: bool, len: usize, count: (u32, u32)| {
            let bytes = counts
                .entry(name)
                .or_insert_with(|| vec![(0, 0); len * size]);
            let dims = if whole {
                0..layout.shape()[3]
            } else {
                layout.rotary_offset()..layout.rotary_offset() + rotary_dim
            };
            for head in heads(layout) {
                bytes[(head + dims.start) * size..(head + dims.end) * size].fill(count);
            }
        };
        match (tensor.layout, &case.one_buffer, &tensor.destination) {
            (InOut::InPlace(layout), Some(buffer), _) => {
                touch("packed", layout, false, buffer.len(), (1, 1));
            }
            (InOut::InPlace(layout), None, _) => {
                touch(names[0], layout, false, tensor.source.len(), (1, 1));
            }
            (
                InOut::OutOfPlace {
                    source,
                    destination,
                },
                _,
                written,
            ) => {
                touch(names[0], source, true, tensor.source.len(), (1, 0));
                let len = written.as_ref().map_or(0, Vec::len);
                touch(names[1], destination, true, len, (0, 1));
            }
        }
    }
    counts.retain(|_, bytes| !bytes.is_empty());
    counts
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

/// Heads of q and of k, and shapes: the plan's own, one thread for everything, and threads to spare
/// on each axis in turn. A thread holds four heads at once; where it visits all heads, the last of
/// q and the last of k fall on each of the four in turn.
const FAR: [([usize; 2], Option<Shape>); 8] = [
    ([5, 5], None),
    ([5, 5], Some(([1, 1, 1], [1, 1, 1]))),
    ([2, 5], Some(([1, 1, 1], [1, 1, 1]))),
    ([3, 5], Some(([1, 1, 1], [1, 1, 1]))),
    ([4, 5], Some(([1, 1, 1], [1, 1, 1]))),
    ([5, 5], Some(([2, 2, 3], [3, 2, 2]))),
    ([5, 5], Some(([4, 6, 1], [2, 2, 1]))),
    ([5, 5], Some(([1, 3, 1], [16, 3, 5]))),
];

const BATCH: usize = 2;
const SEQUENCE: usize = 3;

/// Two chunks of pairs a head, and dims to copy on both sides: not as many for q as for k.
fn far_case(kernel: Kernel, in_place: bool, heads: [usize; 2]) -> Case {
    let vector = 16 / kernel.dtype.size();
    let (unit, head_dims, offsets, pairs) = if kernel.wide {
        (vector, [7, 8], [1, 2], 2 * vector)
    } else {
        (1, [18, 21], [4, 6], 5)
    };
    let mut rng = Rng(9);
    let rope = if kernel.table {
        // Ordinary numbers: scaling them by powers of two loses nothing.
        let mut values = || {
            let value = |_| (rng.next() as i64 as f64 / (1u64 << 62) as f64) as f32;
            (0..ROWS as usize * pairs).map(value).collect()
        };
        let table = CosSinTable::new(values(), values(), pairs).unwrap();
        // A clamped row is read where a passed-through one is not: each in one of the two cases.
        let choice = if in_place {
            OutOfRange::Clamp
        } else {
            OutOfRange::PassThrough
        };
        Rope::new(table.with_out_of_range(choice), kernel.pairing)
    } else {
        let steps = (0..pairs).map(|_| rng.next()).collect();
        Rope::new(Frequencies::from_steps(steps).unwrap(), kernel.pairing)
    };
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
        kind: PositionKind::PerToken,
        // All rows of a table and one on each side.
        ids: Ids::I64(vec![-1, 0, 1, 2, 3, 4]),
        multiprocessors: 1,
    }
}

/// Rows of the tables of [`far_case`].
const ROWS: i64 = 4;
/// Rows between two rows of a table, where it is spread.
const ROW_SPREAD: u32 = 31;

/// The same heads, each far from the next.
fn far(layout: Layout, which: usize) -> Layout {
    let unit = (1usize << 32) + 64 * which;
    layout
        .with_strides(1024 * unit, 128 * unit, 8 * unit)
        .with_offset(unit)
}

/// Runs a case whose tensors are separate buffers, in a shape of one's own. `spread` puts heads,
/// positions and table rows further apart than 32 bits can tell, in buffers of which only the
/// touched pages exist, and moves a factor from the table's values to the scales. Tells also whether
/// each thread loaded its angles once for all its heads.
fn by_hand(
    module: &Module,
    check: &Check,
    spread: bool,
    shape: Option<Shape>,
) -> Result<(Outcome, bool), Fault> {
    let case = &check.case;
    let size = case.dtype.size();
    let mut memory = Memory::new();
    let place = |memory: &mut Memory, name, near: Layout, which, elements: Option<&Elements>| {
        let layout = if spread { far(near, which) } else { near };
        let length = (layout.required_len().unwrap() * size) as u64;
        let misalign = if check.kernel.wide { 0 } else { size };
        let address = memory.add_sparse(name, length, misalign);
        if let Some(elements) = elements {
            for (from, to) in heads(near).into_iter().zip(heads(layout)) {
                let head = bytes(case.dtype, &elements[from..from + near.shape()[3]]);
                memory.write(address + (to * size) as u64, &head);
            }
        }
        (layout, address)
    };
    let mut problem = Problem::new(case.dtype).positions(case.kind);
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

    let plan = Plan::new(&case.rope, &problem, PositionMemory::Device).unwrap();
    let scales = if spread { [0.5, 0.25] } else { [1.0; 2] };
    let (angles, row_spread) = match case.rope.angles() {
        Angles::Exact(frequencies) => {
            let steps = frequencies.steps().iter().flat_map(|s| s.to_le_bytes());
            let steps = memory.add("steps", steps.collect(), 0);
            memory.set_read_only(steps);
            (AngleAddresses::Exact { steps }, 0)
        }
        Angles::Table(table) => {
            let row_spread = if spread { ROW_SPREAD } else { 0 };
            let row = table.pairs() * 4;
            let mut values = |name, values: &[f32], factor: f32| {
                let length = ((table.rows() as u64 - 1) << row_spread) * row as u64 + row as u64;
                let address = memory.add_sparse(name, length, 0);
                for (n, values) in values.chunks(table.pairs()).enumerate() {
                    let values = values.iter().flat_map(|x| (x / factor).to_le_bytes());
                    let values: Vec<u8> = values.collect();
                    memory.write(address + (((n * row) as u64) << row_spread), &values);
                }
                memory.set_read_only(address);
                address
            };
            let cos = values("cos", table.cos(), scales[0]);
            let sin = values("sin", table.sin(), scales[1]);
            (AngleAddresses::Table { cos, sin }, row_spread)
        }
        other => panic!("{other:?} is not covered"),
    };

    let Ids::I64(positions) = &case.ids else {
        panic!("64-bit positions only")
    };
    let sequence = positions.len() / if spread { BATCH } else { 1 };
    // A position is start + s * advance + id: each of the three takes its share.
    let (id_stride, start, advance) = if spread {
        (1 << 33, -77 << 40, (3 << 33) + 1)
    } else {
        (8, 0, 0)
    };
    let length = id_stride * positions.len() as u64;
    let ids = memory.add_sparse("ids", length, 0);
    for (n, position) in positions.iter().enumerate() {
        let s = (n % sequence) as i64;
        let id = spread_position(*position, row_spread) - start - s * advance;
        memory.write(ids + n as u64 * id_stride, &id.to_le_bytes());
    }
    memory.set_read_only(ids);

    let mut launch = plan
        .launch(
            &Addresses {
                q: addresses[0],
                k: addresses[1],
                angles,
                positions: PositionAddresses::Ids {
                    address: ids,
                    dtype: PositionDtype::I64,
                },
            },
            case.multiprocessors,
        )
        .unwrap()
        .expect("something to rotate");
    assert_eq!(launch.kernel, check.kernel);
    if spread {
        let params = &mut launch.params;
        params.positions.start = start;
        params.positions.advance = advance;
        params.positions.sequence_stride = id_stride as i64;
        params.positions.batch_stride = (id_stride * sequence as u64) as i64;
        if check.kernel.table {
            params.angles.rows = (spread_position(ROWS - 1, row_spread) + 1) as u64;
            params.angles.cos_scale *= scales[0];
            params.angles.sin_scale *= scales[1];
        }
    }
    let (grid, block) = shape.unwrap_or((launch.grid, launch.block));
    let name = launch.kernel.name();
    let launch = Launch::new(&name, grid, block, launch.params.as_bytes());
    let stats = run(module, &mut memory, &launch)?;
    let once = angle_bytes(case, positions, u64::from(grid[1] * block[1]));
    let loaded = ["steps", "cos", "sin"].map(|name| stats.buffer(name));
    let loaded = loaded.into_iter().flatten().map(|t| t.loaded_bytes()).sum();

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
    Ok((Outcome(outcome), once == loaded))
}

/// Where a position lies once the table's rows are apart: in range or next to it, as before.
fn spread_position(position: i64, row_spread: u32) -> i64 {
    match position {
        ..0 => position,
        0..ROWS => position << row_spread,
        ROWS.. if row_spread > 0 => ((ROWS - 1) << row_spread) + position - (ROWS - 1),
        ROWS.. => position,
    }
}

/// Bytes of angles that a launch loads: for each token that rotates, each row of threads that has
/// a head loads them once.
fn angle_bytes(case: &Case, positions: &[i64], rows: u64) -> u64 {
    let heads = |tensor: &TensorCase| match tensor.layout {
        InOut::InPlace(layout) => layout.shape()[2],
        InOut::OutOfPlace { source, .. } => source.shape()[2],
    };
    let heads: usize = case.tensors().map(heads).sum();
    let tokens = match case.rope.angles() {
        Angles::Table(table) if table.out_of_range() == OutOfRange::PassThrough => {
            let inside = |p: &&i64| (0..table.rows() as i64).contains(*p);
            positions.iter().filter(inside).count()
        }
        _ => positions.len(),
    };
    // A step takes as many bytes as a cosine and a sine.
    let bytes = case.rope.angles().pairs() * 8;
    rows.min(heads as u64) * (tokens * bytes) as u64
}
