//! The kernels that the GPU bench holds phasor against, in the interpreter: each does what it is for, moves
//! the bytes that it claims to move, and waits for earlier work first.

use ptx_interpreter::{Launch, Memory, Module, Stats, run};

const THREADS: u32 = 256;
/// Of 16 bytes; no multiple of what a block handles.
const ACCESSES: usize = 1203;
/// Those that are copied whole where others are narrowed.
const WHOLE: usize = 501;

struct Passes {
    module: Module,
    /// Whether earlier work may still run when they start.
    dependent: bool,
}

impl Passes {
    /// Runs a pass whose threads have so many accesses each. Its addresses are of `to` and `from`.
    fn run(
        &self,
        entry: &str,
        per_thread: u32,
        memory: &mut Memory,
        [to, from]: [u64; 2],
    ) -> Stats {
        let params = [to, from, ACCESSES as u64, WHOLE as u64];
        let params = params.map(u64::to_le_bytes).concat();
        let params = &params[..self.module.param_size(entry).expect(entry)];
        let blocks = (ACCESSES as u32).div_ceil(THREADS * per_thread);
        let mut launch = Launch::new(entry, [blocks, 1, 1], [THREADS, 1, 1], params);
        launch.dependent = self.dependent;
        run(&self.module, memory, &launch).unwrap_or_else(|fault| panic!("{entry}: {fault}"))
    }
}

#[test]
fn passes_do_what_they_are_for() {
    let from: Vec<u8> = (0..16 * ACCESSES as u32)
        .map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8)
        .collect();
    let (whole, rest) = from.split_at(16 * WHOLE);
    let halves = rest.chunks_exact(8).flat_map(|pair| {
        let (a, b) = pair.split_at(4);
        a.iter().zip(b).map(|(a, b)| a ^ b)
    });
    let narrowed: Vec<u8> = whole.iter().copied().chain(halves).collect();
    let lowest_bits = from.iter().enumerate();
    let updated: Vec<u8> = lowest_bits.map(|(i, x)| x ^ u8::from(i % 4 == 0)).collect();
    let ones = [0x80, 0x3f].repeat(from.len() / 2);
    for (text, dependent) in [
        (include_str!("../benches/cuda/limits.compute_80.ptx"), false),
        (include_str!("../benches/cuda/limits.compute_90.ptx"), true),
    ] {
        let module = Module::parse(text).unwrap();
        let mut left: Vec<_> = module.entries().map(str::to_owned).collect();
        let passes = Passes { module, dependent };
        for (entry, per_thread, read, expected) in [
            ("copy_1", 1, from.len(), &from),
            ("copy_4", 4, from.len(), &from),
            ("narrow_1", 1, from.len(), &narrowed),
            ("narrow_4", 4, from.len(), &narrowed),
            ("write_only", 1, 0, &ones),
            ("write_and_trigger", 1, 0, &ones),
            ("empty", 1, 0, &Vec::new()),
        ] {
            left.retain(|name| name != entry);
            let mut memory = Memory::new();
            let source = memory.add("from", from.clone(), 0);
            memory.set_read_only(source);
            let to = memory.add_uninit("to", expected.len().max(1), 0);
            let stats = passes.run(entry, per_thread, &mut memory, [to, source]);
            assert_eq!(stats.global.loaded_bytes(), read as u64, "{entry}");
            assert_eq!(
                stats.global.stored_bytes(),
                expected.len() as u64,
                "{entry}"
            );
            if !expected.is_empty() {
                assert!(memory.bytes(to) == *expected, "{entry}");
            }
        }
        for (entry, per_thread) in [("update_1", 1), ("update_4", 4)] {
            left.retain(|name| name != entry);
            let mut memory = Memory::new();
            let both = memory.add("both", from.clone(), 0);
            passes.run(entry, per_thread, &mut memory, [both, both]);
            assert!(memory.bytes(both) == updated, "{entry}");
        }
        assert!(left.is_empty(), "{left:?}");
    }
}
