//! Calls over memory that ends at pages that nobody may touch: layouts of many forms, in place and out
//! of place, on every instruction set that is there. Unlike a sanitizer, the processor sees every
//! instruction's loads and stores. (Heads written past the caches: `src/host/guard_pages.rs`.)
#![cfg(unix)]

#[path = "support/guarded.rs"]
mod guarded;

use guarded::{EDGES, Edge, Guarded};
use phasor::half::{bf16, f16};
use phasor::{
    Dtype, Element, Frequencies, FrequencyRows, Host, HostRotator, InOut, Isa, Layout, OutOfRange,
    Pairing, Positions, Problem, Rope, Threads,
};

const BATCH: usize = 2;
const TOKENS: usize = 3;

/// Heads and dims, of which so many rotate from an offset on.
struct Shape {
    heads: usize,
    head_dim: usize,
    rotary_dim: usize,
    rotary_offset: usize,
}

const fn shape(heads: usize, head_dim: usize, rotary_dim: usize, rotary_offset: usize) -> Shape {
    Shape {
        heads,
        head_dim,
        rotary_dim,
        rotary_offset,
    }
}

/// Sizes with code of their own, those around them, and windows inside of heads.
const SHAPES: [Shape; 15] = [
    shape(1, 2, 2, 0),
    shape(3, 6, 4, 2),
    shape(2, 14, 14, 0),
    shape(1, 18, 16, 0),
    shape(5, 34, 34, 0),
    shape(3, 64, 64, 0),
    shape(2, 80, 80, 0),
    shape(2, 80, 32, 0),
    shape(1, 96, 96, 0),
    shape(3, 128, 128, 0),
    shape(2, 128, 64, 64),
    shape(1, 192, 64, 128),
    shape(2, 250, 250, 0),
    shape(1, 256, 256, 0),
    shape(1, 520, 514, 4),
];

impl Shape {
    /// Contiguous layouts, one that begins in the middle of a vector, and one with gaps.
    fn layouts(&self) -> [Layout; 4] {
        let &Shape {
            heads, head_dim, ..
        } = self;
        let bshd = Layout::bshd(BATCH, TOKENS, heads, head_dim);
        let token = heads * head_dim + 3;
        [
            bshd,
            Layout::bhsd(BATCH, TOKENS, heads, head_dim),
            bshd.with_offset(1),
            bshd.with_strides(TOKENS * token + 5, token, head_dim)
                .with_offset(2),
        ]
        .map(|layout| layout.with_rotary_offset(self.rotary_offset))
    }
}

fn values<T: Element>(len: usize) -> Vec<T> {
    let value = |i: usize| T::narrow((i % 61) as f32 / 16.0 - 2.03);
    (0..len).map(value).collect()
}

fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.widen().to_bits()).collect()
}

fn rotators(rope: &Rope) -> impl Iterator<Item = HostRotator> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    let host = |isa| Host::new().with_isa(isa).unwrap();
    available.map(move |isa| host(isa).with_threads(Threads::One).rotator(rope))
}

fn check<T: Element>(shape: &Shape, rope: &Rope, maps: &mut [Guarded; 3]) {
    let ids: Vec<i32> = (0..(BATCH * TOKENS) as i32).map(|i| 1000 * i - 7).collect();
    let [from, to, memory_of_ids] = maps;
    let ids = &*memory_of_ids.filled(Edge::Last(0), &ids);
    let positions = Positions::per_token(ids);
    for layout in shape.layouts() {
        let len = layout.required_len().unwrap();
        let given = values::<T>(len);
        let alike = rope.pairing() == rope.output_pairing();
        for in_place in [false, true] {
            if in_place && !alike {
                continue;
            }
            let operand: InOut<Layout> = match in_place {
                true => layout.into(),
                false => (layout, layout).into(),
            };
            let problem = Problem::new(T::DTYPE).k(operand);
            let mut expected: Option<Vec<u32>> = None;
            for (variant, rotator) in rotators(rope).enumerate() {
                let plan = rotator.plan(&problem).unwrap();
                for edge in EDGES {
                    let name = || format!("variant {variant}, {}, {layout:?}, {edge:?}", T::DTYPE);
                    // Gaps between tokens are not written.
                    let destination = to.filled(edge, &given);
                    if in_place {
                        let k = InOut::InPlace(&mut *destination);
                        rotator.rotate(&plan, None, Some(k), positions).unwrap();
                    } else {
                        let source = from.filled(Edge::Last(0), &given);
                        let k = InOut::from((&*source, &mut *destination));
                        rotator.rotate(&plan, None, Some(k), positions).unwrap();
                        assert!(bits(source) == bits(&given), "{} wrote its source", name());
                    }
                    let got = bits(destination);
                    to.check_rest::<T>(edge, len);
                    let expected = expected.get_or_insert_with(|| {
                        assert!(got != bits(&given), "{} did nothing", name());
                        got.clone()
                    });
                    assert!(got == *expected, "{}", name());
                }
            }
            from.check_rest::<T>(Edge::Last(0), len);
        }
    }
}

fn check_all(dtype: Dtype) {
    let room = || Guarded::new(1 << 16);
    let mut maps = [room(), room(), room()];
    let pairings = [Pairing::HalfSplit, Pairing::Interleaved];
    for shape in &SHAPES {
        let frequencies = Frequencies::from_theta(1e4, shape.rotary_dim).unwrap();
        for pairing in pairings {
            for output in pairings {
                let rope = Rope::new(frequencies.clone(), pairing).with_output_pairing(output);
                match dtype {
                    Dtype::F32 => check::<f32>(shape, &rope, &mut maps),
                    Dtype::F16 => check::<f16>(shape, &rope, &mut maps),
                    _ => check::<bf16>(shape, &rope, &mut maps),
                }
            }
        }
    }
}

#[test]
fn f32_calls_stay_in_their_memory() {
    check_all(Dtype::F32);
}

#[test]
fn f16_calls_stay_in_their_memory() {
    check_all(Dtype::F16);
}

#[test]
fn bf16_calls_stay_in_their_memory() {
    check_all(Dtype::Bf16);
}

/// Ids of every type are read as far as there are tokens, and tokens outside of a table are copied.
#[test]
fn ids_and_tables_stay_in_their_memory() {
    let shape = shape(3, 64, 64, 0);
    let layout = Layout::bshd(BATCH, TOKENS, shape.heads, shape.head_dim);
    let one = Frequencies::from_theta(1e4, 64).unwrap();
    let table = one.table(0..4).unwrap();
    let table = table.with_out_of_range(OutOfRange::PassThrough);
    let rows = FrequencyRows::new(&[one.clone(), one.clone()]).unwrap();
    let axes = one.with_axes(3, &[0; 32]).unwrap();
    let mut maps = [Guarded::new(1 << 13), Guarded::new(256), Guarded::new(256)];
    let [memory, of_ids, of_rows] = &mut maps;
    let len = layout.required_len().unwrap();
    let given = values::<f32>(len);
    for edge in [Edge::First(0), Edge::Last(0)] {
        let mut run = |rope: &Rope, positions: Positions<'_>| {
            for rotator in rotators(rope) {
                let plan = rotator.plan(&Problem::new(Dtype::F32).q(layout)).unwrap();
                let q = memory.filled(edge, &given);
                let operand = Some(InOut::InPlace(&mut *q));
                rotator.rotate(&plan, operand, None, positions).unwrap();
                assert!(bits(q) != bits(&given));
                memory.check_rest::<f32>(edge, len);
            }
        };
        let table = Rope::new(table.clone(), Pairing::HalfSplit);
        let ids = of_ids.filled(edge, &[0i32, 3, 4, -1, i32::MAX, 1]);
        run(&table, Positions::per_token(&*ids));
        let ids = of_ids.filled(edge, &[2u32, 3, 4, 5, u32::MAX, 1]);
        run(&table, Positions::per_token(&*ids));
        let axes = Rope::new(axes.clone(), Pairing::Interleaved);
        let ids: Vec<i64> = (5..5 + 18).collect();
        run(&axes, Positions::per_axis(&*of_ids.filled(edge, &ids)));
        let rows = Rope::new(rows.clone(), Pairing::HalfSplit);
        let starts = &*of_ids.filled(edge, &[7i64, 9]);
        let chosen = &*of_rows.filled(edge, &[0u32, 1]);
        let positions = Positions::start_per_sequence(starts);
        run(&rows, positions.frequency_rows_per_sequence(chosen));
        let chosen = &*of_rows.filled(edge, &[0i32, 1, 1, 0, 1, 0]);
        run(&rows, positions.frequency_rows_per_token(chosen));
    }
}
