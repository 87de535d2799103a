//! Memory checks, divergence, barriers, counts.

use ptx_interpreter::{AccessError, Fault, FaultKind, Launch, Memory, Module, Stats, Touches, run};

/// A kernel `k` with a pointer parameter `a`, in `%a`, and `b`, in `%b`. `%t` is the thread, `%g`
/// the thread in the grid, `%at` the address of the thread's 4 bytes in `a`.
fn kernel(declarations: &str, body: &str) -> Module {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n{declarations}\n
        .visible .entry k(.param .u64 a, .param .u64 b)\n{{
        .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %d<16>;
        .reg .b32 %t, %g, %n; .reg .b64 %a, %b, %at;
        ld.param.u64 %a, [a]; ld.param.u64 %b, [b];
        mov.u32 %t, %tid.x; mov.u32 %g, %ctaid.x; mov.u32 %n, %ntid.x; mad.lo.u32 %g, %g, %n, %t;
        mad.wide.u32 %at, %g, 4, %a;
        {body}
        ret;\n}}\n"
    );
    Module::parse(&text).unwrap_or_else(|e| panic!("{e}"))
}

fn pointers(a: u64, b: u64) -> Vec<u8> {
    [a, b].iter().flat_map(|p| p.to_le_bytes()).collect()
}

/// Runs with `a` a buffer of `threads` words, none written, and gives the words.
fn words(declarations: &str, body: &str, threads: u32) -> Result<Vec<u32>, Fault> {
    let module = kernel(declarations, body);
    let mut memory = Memory::new();
    let a = memory.add_uninit("a", 4 * threads as usize, 0);
    let params = pointers(a, 0);
    run(
        &module,
        &mut memory,
        &Launch::new("k", [1; 3], [threads, 1, 1], &params),
    )?;
    let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("4 bytes"));
    Ok(memory.bytes(a).chunks(4).map(word).collect())
}

/// Runs on `a` of 64 written bytes and `b` of 64 unwritten ones.
fn on_64(body: &str, grid: u32, block: u32) -> Result<(Stats, Memory, u64, u64), Fault> {
    let module = kernel("", body);
    let mut memory = Memory::new();
    let a = memory.add("a", (0..64).collect(), 0);
    let b = memory.add_uninit("b", 64, 0);
    let params = pointers(a, b);
    let stats = run(
        &module,
        &mut memory,
        &Launch::new("k", [grid, 1, 1], [block, 1, 1], &params),
    )?;
    Ok((stats, memory, a, b))
}

#[track_caller]
fn access_error(result: Result<(Stats, Memory, u64, u64), Fault>) -> AccessError {
    match result.map(|_| ()) {
        Err(Fault {
            kind: FaultKind::Access { error, .. },
            ..
        }) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn bounds() {
    let one = |body| access_error(on_64(body, 1, 1));
    assert_eq!(one("ld.global.u32 %r0, [%a+64];"), AccessError::OutOfBounds);
    assert_eq!(one("ld.global.u8 %r0, [%a+-1];"), AccessError::OutOfBounds);
    assert_eq!(one("ld.global.u8 %r0, [%a-1];"), AccessError::OutOfBounds);
    assert_eq!(
        one("mov.u64 %d0, 0; ld.global.u8 %r0, [%d0];"),
        AccessError::OutOfBounds
    );
    assert_eq!(one("st.global.u8 [%b+64], 0;"), AccessError::OutOfBounds);
    // Addresses cut to 32 bits hit nothing.
    let cut = "and.b64 %d0, %a, 0xffffffff; ld.global.u32 %r0, [%d0];";
    assert_eq!(one(cut), AccessError::OutOfBounds);
    assert!(on_64("ld.global.u32 %r0, [%a+60];", 1, 1).is_ok());
}

#[test]
fn a_fault_names_its_place() {
    let body = "setp.ne.u32 %p0, %g, 37; @%p0 ret;\nld.global.u32 %r0, [%a+68];";
    let fault = on_64(body, 2, 32).err().expect("out of bounds");
    let place = fault.place.as_ref().expect("a thread");
    assert_eq!((place.block, place.thread), ([1, 0, 0], [5, 0, 0]));
    assert_eq!(place.text, "ld.global.u32 %r0, [%a+68];");
    let message = fault.to_string();
    assert!(
        message.contains("kernel k, block [1, 0, 0], thread [5, 0, 0], line "),
        "{message}"
    );
    assert!(
        message.contains("offset 68 in buffer a of 64 bytes"),
        "{message}"
    );
}

#[test]
fn alignment_is_that_of_the_whole_access() {
    let one = |body| access_error(on_64(body, 1, 1));
    assert_eq!(one("ld.global.u32 %r0, [%a+2];"), AccessError::Misaligned);
    assert_eq!(
        one("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a+8];"),
        AccessError::Misaligned
    );
    assert_eq!(
        one("ld.global.v2.u64 {%d0, %d1}, [%a+8];"),
        AccessError::Misaligned
    );
    assert_eq!(
        one("mov.b64 %d0, 0; st.global.u64 [%b+4], %d0;"),
        AccessError::Misaligned
    );
    assert!(on_64("ld.global.v2.u32 {%r0, %r1}, [%a+8];", 1, 1).is_ok());
    // The buffer's own misalignment counts.
    let module = kernel("", "ld.global.u32 %r0, [%a];");
    for (misalign, fits) in [(0, true), (2, false), (4, true), (17, false)] {
        let mut memory = Memory::new();
        let a = memory.add("a", vec![1; 8], misalign);
        assert_eq!((a % 256, a >> 32 > 0), (misalign as u64, true));
        let params = pointers(a, 0);
        assert_eq!(
            run(
                &module,
                &mut memory,
                &Launch::new("k", [1; 3], [1; 3], &params)
            )
            .is_ok(),
            fits
        );
    }
}

#[test]
fn accesses_cross_no_end_and_no_storage_border() {
    let module = kernel("", "ld.global.u32 %r0, [%a+4];");
    for (length, fits) in [(8, true), (7, false), (4, false)] {
        let mut memory = Memory::new();
        let params = pointers(memory.add("a", vec![1; length], 0), 0);
        let result = run(
            &module,
            &mut memory,
            &Launch::new("k", [1; 3], [1; 3], &params),
        );
        let message = result
            .map_err(|fault| fault.to_string())
            .err()
            .unwrap_or_default();
        assert_eq!(
            message.contains("out of bounds"),
            !fits,
            "{length}: {message}"
        );
    }
    // 16 bytes at an address that is aligned only thanks to the buffer's misalignment.
    let body = "mov.u32 %r0, 7; st.global.v4.u32 [%a+56], {%r0, %r0, %r0, %r0};
                ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%a+56];";
    let mut memory = Memory::new();
    let a = memory.add_uninit("a", 128, 8);
    let params = pointers(a, 0);
    run(
        &kernel("", body),
        &mut memory,
        &Launch::new("k", [1; 3], [1; 3], &params),
    )
    .expect("runs");
    assert_eq!(
        memory.read(a + 56, 16),
        Some([7u32; 4].iter().flat_map(|v| v.to_le_bytes()).collect())
    );
    assert_eq!(
        (memory.read(a + 55, 1), memory.read(a + 72, 1)),
        (None, None)
    );
}

#[test]
fn bytes_never_written_cannot_be_read() {
    let (_, memory, _, b) =
        on_64("mov.u32 %r0, 7; st.global.u16 [%b+2], %r0;", 1, 1).expect("runs");
    assert_eq!(
        memory.written(b, 6),
        [false, false, true, true, false, false]
    );
    assert_eq!(memory.read(b + 2, 2), Some(vec![7, 0]));
    assert_eq!(memory.read(b, 4), None);
    let error = access_error(on_64(
        "mov.u32 %r0, 7; st.global.u16 [%b], %r0; ld.global.u32 %r1, [%b];",
        1,
        1,
    ));
    assert!(matches!(error, AccessError::Unwritten { at } if at % 256 == 2));
    assert!(
        on_64(
            "mov.u32 %r0, 7; st.global.u16 [%b], %r0; ld.global.u16 %r1, [%b];",
            1,
            1
        )
        .is_ok()
    );
}

#[test]
fn read_only_buffers() {
    let module = kernel("", "mov.u32 %r0, 1; st.global.u32 [%a], %r0;");
    let mut memory = Memory::new();
    let a = memory.add("a", vec![0; 4], 0);
    memory.set_read_only(a);
    let params = pointers(a, 0);
    let fault = run(
        &module,
        &mut memory,
        &Launch::new("k", [1; 3], [1; 3], &params),
    )
    .expect_err("stores");
    assert!(matches!(
        fault.kind,
        FaultKind::Access {
            error: AccessError::ReadOnly,
            ..
        }
    ));
    assert_eq!(memory.bytes(a), [0; 4]);
}

fn race(body: &str, grid: u32, block: u32) -> Option<(Option<u32>, bool)> {
    match on_64(body, grid, block).map(|_| ()) {
        Ok(()) => None,
        Err(Fault {
            kind:
                FaultKind::Access {
                    error:
                        AccessError::Race {
                            other_thread,
                            other_wrote,
                            ..
                        },
                    ..
                },
            ..
        }) => Some((other_thread, other_wrote)),
        Err(fault) => panic!("{fault}"),
    }
}

#[test]
fn stores_that_may_meet_are_no_race() {
    // Every thread of two blocks stores the same word.
    let relaxed = "st.relaxed.gpu.global.u32 [%a], 1;";
    for (body, races) in [
        ("st.global.u32 [%a], 1;", true),
        (relaxed, false),
        (
            "@%p0 st.global.u32 [%a], 1; @!%p0 st.relaxed.gpu.global.u32 [%a], 1;",
            true,
        ),
        (
            "@%p0 st.relaxed.gpu.global.u32 [%a], 1; @!%p0 st.global.u32 [%a], 1;",
            true,
        ),
    ] {
        let body = format!("setp.eq.u32 %p0, %g, 0; {body}");
        for (grid, block) in [(1, 40), (2, 1)] {
            let result = on_64(&body, grid, block);
            match races {
                true => assert!(matches!(access_error(result), AccessError::Race { .. })),
                false => assert_eq!(
                    {
                        let (_, memory, a, _) = result.unwrap();
                        memory.bytes(a)[..4].to_vec()
                    },
                    [1, 0, 0, 0]
                ),
            }
        }
    }
    // What reads it meanwhile races all the same.
    let body = format!("{relaxed} ld.global.u32 %r0, [%a];");
    assert!(matches!(
        access_error(on_64(&body, 1, 2)),
        AccessError::Race { .. }
    ));

    // A buffer whose bytes several threads may write.
    let module = kernel("", "st.global.u32 [%a], %g;");
    let mut memory = Memory::new();
    let a = memory.add_uninit("a", 4, 0);
    memory.set_contended(a);
    let params = pointers(a, 0);
    run(
        &module,
        &mut memory,
        &Launch::new("k", [3, 1, 1], [40, 1, 1], &params),
    )
    .unwrap();
    assert_eq!(memory.bytes(a), 119u32.to_le_bytes());
}

#[test]
fn races_in_global_memory() {
    // Two threads write one byte, in a warp, in a block, in a grid.
    let write = "st.global.u32 [%b], %t;";
    assert_eq!(race(write, 1, 2), Some((Some(0), true)));
    assert_eq!(race(write, 2, 1), Some((Some(0), true)));
    assert_eq!(
        race(
            "setp.ne.u32 %p0, %t, 40; @%p0 setp.ne.u32 %p0, %t, 3; @%p0 ret; st.global.u32 [%b], %t;",
            1,
            64
        ),
        Some((Some(3), true))
    );
    // One reads what another writes, before or after, in one block or two.
    let write_then_read =
        "setp.eq.u32 %p0, %g, 0; @%p0 st.global.u32 [%b], %g; @!%p0 ld.global.u32 %r0, [%b];";
    assert_eq!(race(write_then_read, 1, 2), Some((Some(0), true)));
    assert_eq!(race(write_then_read, 2, 1), Some((Some(0), true)));
    let read_then_write =
        "setp.eq.u32 %p0, %g, 0; @%p0 ld.global.u32 %r0, [%a]; @!%p0 st.global.u32 [%a], %g;";
    assert_eq!(race(read_then_write, 1, 2), Some((Some(0), false)));
    assert_eq!(race(read_then_write, 2, 1), Some((Some(0), false)));
    // Many readers, then one of them writes.
    let read_all = "ld.global.u32 %r0, [%a]; setp.eq.u32 %p0, %g, 1; @%p0 st.global.u32 [%a], %g;";
    assert_eq!(race(read_all, 1, 2), Some((Some(0), false)));
    assert_eq!(
        race(&read_all.replace("%g, 1", "%g, 0"), 1, 2),
        Some((None, false))
    );
    // A reader of an earlier block is not forgotten when the writer's own block reads.
    assert_eq!(race(read_all, 2, 1), Some((None, false)));
    // The other thread's number counts all blocks.
    let later = format!("setp.eq.u32 %p0, %g, 0; @%p0 ret; {write}");
    assert_eq!(race(&later, 3, 1), Some((Some(1), true)));
    // One byte of overlap is enough.
    assert_eq!(
        race(
            "setp.eq.u32 %p0, %g, 0; @%p0 st.global.u32 [%b], %g; @!%p0 st.global.u8 [%b+3], %g;",
            1,
            2
        ),
        Some((Some(0), true))
    );
    // One thread may do as it likes; neighbours do not disturb each other.
    assert_eq!(
        race(
            "ld.global.u32 %r0, [%at]; st.global.u32 [%at], %r0; ld.global.u32 %r0, [%at];",
            2,
            8
        ),
        None
    );
    assert_eq!(
        race("ld.global.u32 %r0, [%a]; ld.global.u32 %r0, [%a];", 2, 40),
        None
    );
}

#[test]
fn barriers_order_a_block_only() {
    let body =
        "setp.eq.u32 %p0, %g, 0; @%p0 st.global.u32 [%b], %g; bar.sync 0; ld.global.u32 %r0, [%b];
                bar.sync 0; setp.eq.u32 %p0, %g, 33; @%p0 st.global.u32 [%b], %g;";
    assert_eq!(race(body, 1, 64), None);
    assert_eq!(
        race(&body.replace("bar.sync 0", "membar.gl"), 1, 64),
        Some((Some(0), true))
    );
    assert_eq!(race(body, 2, 16), Some((Some(0), true)));
}

#[test]
fn readers_before_a_barrier_do_not_count() {
    let body = "ld.global.u32 %r0, [%a]; bar.sync 0; setp.ne.u32 %p0, %g, 1; @%p0 ret;
                ld.global.u32 %r0, [%a]; st.global.u32 [%a], %r0;";
    assert_eq!(race(body, 1, 4), None);
}

#[test]
fn non_coherent_loads_promise_no_writes() {
    let error = access_error(on_64(
        "ld.global.nc.u32 %r0, [%a]; st.global.u32 [%a], %r0;",
        1,
        1,
    ));
    assert!(matches!(error, AccessError::NonCoherent { .. }));
    let error = access_error(on_64(
        "st.global.u32 [%a], %t; ld.global.nc.u32 %r0, [%a];",
        1,
        1,
    ));
    assert!(matches!(error, AccessError::NonCoherent { .. }));
    // Also across a barrier, but not across launches.
    let error = access_error(on_64(
        "ld.global.nc.u32 %r0, [%a]; bar.sync 0; st.global.u32 [%a], %r0;",
        1,
        1,
    ));
    assert!(matches!(error, AccessError::NonCoherent { .. }));
    let module = kernel("", "ld.global.nc.u32 %r0, [%a]; st.global.u32 [%b], %r0;");
    let mut memory = Memory::new();
    let (a, b) = (memory.add("a", vec![1; 4], 0), memory.add_uninit("b", 4, 0));
    for params in [pointers(a, b), pointers(b, a)] {
        run(
            &module,
            &mut memory,
            &Launch::new("k", [1; 3], [1; 3], &params),
        )
        .expect("no conflict");
    }
}

const SHARED: &str = ".shared .align 4 .b8 s[128];";

#[test]
fn shared_memory() {
    // Each thread writes its word and reads its neighbour's.
    let body = "mov.u32 %r0, s; shl.b32 %r1, %t, 2; add.u32 %r2, %r0, %r1; xor.b32 %r3, %r1, 4;
                add.u32 %r3, %r0, %r3; mul.lo.u32 %r4, %t, 10; st.shared.u32 [%r2], %r4; bar.sync 0;
                ld.shared.u32 %r5, [%r3]; st.global.u32 [%at], %r5;";
    assert_eq!(words(SHARED, body, 4).expect("ordered"), [10, 0, 30, 20]);
    let unordered = body.replace("bar.sync 0;", "");
    let fault = words(SHARED, &unordered, 4).expect_err("a race");
    assert!(matches!(
        fault.kind,
        FaultKind::Access {
            error: AccessError::Race {
                other_thread: Some(1),
                other_wrote: true,
                ..
            },
            ..
        }
    ));
    // Contents do not last from block to block, nor is memory born with values.
    let fault = words(SHARED, "ld.shared.u32 %r0, [s+4];", 1).expect_err("unwritten");
    assert!(matches!(
        fault.kind,
        FaultKind::Access {
            error: AccessError::Unwritten { .. },
            ..
        }
    ));
    let once = "mov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, 0; @%p0 st.shared.u32 [s], %r0; ld.shared.u32 %r1, [s];";
    let module = kernel(SHARED, once);
    let params = pointers(0, 0);
    assert!(
        run(
            &module,
            &mut Memory::new(),
            &Launch::new("k", [1; 3], [1; 3], &params)
        )
        .is_ok()
    );
    assert!(
        run(
            &module,
            &mut Memory::new(),
            &Launch::new("k", [2, 1, 1], [1; 3], &params)
        )
        .is_err()
    );
    // Out of the array, and more alignment than the array declares.
    for body in [
        "mov.u32 %r0, 0; st.shared.u32 [s+128], %r0;",
        "mov.u64 %d0, 0; st.shared.u64 [s], %d0;",
    ] {
        assert!(words(SHARED, body, 1).is_err(), "{body}");
    }
}

#[test]
fn dynamic_shared_memory() {
    let module = kernel(
        ".extern .shared .align 16 .b8 s[];",
        "mov.u32 %r0, s; mad.lo.u32 %r0, %t, 4, %r0; st.shared.u32 [%r0], %t;",
    );
    let params = pointers(0, 0);
    let mut launch = Launch::new("k", [1; 3], [8, 1, 1], &params);
    assert!(run(&module, &mut Memory::new(), &launch).is_err());
    launch.dynamic_shared = 32;
    let stats = run(&module, &mut Memory::new(), &launch).expect("fits");
    assert_eq!(stats.shared.stores_of(4), 8);
}

#[test]
fn local_memory_is_each_threads_own() {
    let body = ".local .align 8 .b8 l[16]; mov.u64 %d0, l; st.local.u32 [%d0+4], %t; cvta.local.u64 %d1, %d0;
                ld.u32 %r0, [%d1+4]; cvta.to.local.u64 %d2, %d1; ld.local.u32 %r1, [%d2+4];
                add.u32 %r0, %r0, %r1; st.global.u32 [%at], %r0;";
    assert_eq!(words("", body, 3).expect("runs"), [0, 2, 4]);
    assert!(words("", &body.replace("+4", "+16"), 1).is_err());
    assert!(words("", &body.replace("st.local.u32 [%d0+4], %t;", ""), 1).is_err());
}

#[test]
fn generic_addresses() {
    let body = "cvta.shared.u64 %d0, s; st.u32 [%d0+8], %t; cvta.to.shared.u64 %d1, %d0;
                ld.shared.u32 %r0, [%d1+8]; cvta.to.global.u64 %d2, %at; cvta.global.u64 %d3, %d2;
                st.u32 [%d3], %r0; mov.b64 %d4, a; cvta.param.u64 %d5, %d4; ld.u64 %d6, [%d5];
                ld.param.u64 %d7, [%d4]; setp.ne.u64 %p0, %d6, %d7; @%p0 trap;";
    assert_eq!(words(SHARED, body, 1).expect("runs"), [0]);
}

#[test]
fn parameters_are_checked() {
    assert!(words("", "mov.b64 %d0, a; ld.param.u64 %d1, [%d0+16];", 1).is_err());
    assert!(words("", "mov.b64 %d0, a; ld.param.u64 %d1, [%d0+4];", 1).is_err());
    assert!(
        words(
            "",
            "mov.b64 %d0, b; ld.param.v2.u32 {%r0, %r1}, [%d0+-8];",
            1
        )
        .is_ok()
    );
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n
        .entry k(.param .u8 a, .param .align 16 .b8 b[20], .param .u64 .ptr .align 1 c, .param .f32 d) { ret; }";
    let module = Module::parse(text).expect("parses");
    assert_eq!(
        (module.param_size("k"), module.param_size("x")),
        (Some(52), None)
    );
    assert_eq!(module.entries().collect::<Vec<_>>(), ["k"]);
}

#[test]
fn module_variables() {
    let declarations = ".global .align 4 .b8 bytes[8] = {1, 0, 0, 0, 2};
                        .const .align 4 .u32 table[3] = {10, -1, 0x20}; .global .u32 one = 5;";
    let body = "mov.u64 %d0, bytes; ld.global.nc.u32 %r0, [%d0+4]; ld.const.u32 %r1, [table+8];
                ld.global.u32 %r2, [one]; add.u32 %r0, %r0, %r1; add.u32 %r0, %r0, %r2;
                cvta.const.u64 %d1, table; ld.u32 %r3, [%d1]; add.u32 %r0, %r0, %r3; st.global.u32 [%at], %r0;";
    assert_eq!(
        words(declarations, body, 1).expect("runs"),
        [2 + 32 + 5 + 10]
    );
    assert_eq!(
        kernel(declarations, body).variable("table"),
        Some([10, 0, 0, 0, 255, 255, 255, 255, 32, 0, 0, 0].as_slice())
    );
    // Constants are constant, and in a space of their own.
    assert!(
        words(
            declarations,
            "cvta.const.u64 %d0, table; st.u32 [%d0], %t;",
            1
        )
        .is_err()
    );
    assert!(
        words(
            declarations,
            "cvta.const.u64 %d0, table; ld.global.u32 %r0, [%d0];",
            1
        )
        .is_err()
    );
    assert!(words(declarations, "ld.const.u32 %r0, [table+12];", 1).is_err());
    // A global address takes 64 bits.
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.global .u32 g;
                .entry k() { .reg .b32 r; mov.u32 r, g; ret; }";
    assert!(Module::parse(text).is_err());
    assert!(Module::parse(&text.replace("b32 r; mov.u32", "b64 r; mov.u64")).is_ok());
    // A store lasts for the launch.
    let store = "st.global.u32 [one], 7; ld.global.u32 %r0, [one]; st.global.u32 [%at], %r0;";
    assert_eq!(words(declarations, store, 1).expect("runs"), [7]);
}

#[test]
fn special_registers() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 out) {
        .reg .b32 %r<32>; .reg .b64 %d<4>; .reg .pred %p;
        mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ntid.x;
        mov.u32 %r4, %ntid.y; mov.u32 %r5, %ntid.z; mov.u32 %r6, %ctaid.x; mov.u32 %r7, %ctaid.y;
        mov.u32 %r8, %ctaid.z; mov.u32 %r9, %nctaid.x; mov.u32 %r10, %nctaid.y; mov.u32 %r11, %nctaid.z;
        mov.u32 %r12, %laneid; mov.u32 %r13, %warpid;
        setp.ne.u32 %p, %r8, 1; @%p ret; setp.ne.u32 %p, %r6, 2; @%p ret; setp.ne.u32 %p, %r7, 1; @%p ret;
        setp.ne.u32 %p, %r0, 3; @%p ret; setp.ne.u32 %p, %r1, 2; @%p ret; setp.ne.u32 %p, %r2, 1; @%p ret;
        ld.param.u64 %d0, [out];
        st.global.v4.u32 [%d0], {%r0, %r1, %r2, %r3}; st.global.v4.u32 [%d0+16], {%r4, %r5, %r6, %r7};
        st.global.v4.u32 [%d0+32], {%r8, %r9, %r10, %r11}; st.global.v2.u32 [%d0+48], {%r12, %r13};
        ret; }";
    let module = Module::parse(text).expect("parses");
    let mut memory = Memory::new();
    let out = memory.add_uninit("out", 56, 0);
    let params = out.to_le_bytes();
    run(
        &module,
        &mut memory,
        &Launch::new("k", [4, 2, 2], [5, 4, 2], &params),
    )
    .expect("runs");
    // Thread (3, 2, 1) of blocks of 5 x 4 x 2 is number 33: lane 1 of warp 1.
    let expected: [u32; 14] = [3, 2, 1, 5, 4, 2, 2, 1, 1, 4, 2, 2, 1, 1];
    let found: Vec<u32> = memory
        .bytes(out)
        .chunks(4)
        .map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes")))
        .collect();
    assert_eq!(found, expected);
}

// Control flow

#[test]
fn lanes_part_and_join() {
    // if (t & 1) r = 100 else r = 200; then all 8 lanes must shuffle together.
    let body = "and.b32 %r0, %t, 1; setp.eq.u32 %p0, %r0, 0; @%p0 bra ELSE; mov.u32 %r1, 100; bra.uni JOIN;
                ELSE: mov.u32 %r1, 200; JOIN: shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xff;
                st.global.u32 [%at], %r2;";
    assert_eq!(
        words("", body, 8).expect("joined"),
        [100, 200, 100, 200, 100, 200, 100, 200]
    );
    // A loop of a different length in each lane, which joins behind it.
    let body = "mov.u32 %r0, 0; mov.u32 %r1, 0; LOOP: setp.ge.u32 %p0, %r0, %t; @%p0 bra DONE;
                add.u32 %r0, %r0, 1; add.u32 %r1, %r1, %r0; bra LOOP; DONE: activemask.b32 %r2;
                setp.ne.u32 %p1, %r2, 31; @%p1 trap; st.global.u32 [%at], %r1;";
    assert_eq!(words("", body, 5).expect("joined"), [0, 1, 3, 6, 10]);
    // Lanes that exit do not come back.
    let body = "setp.lt.u32 %p0, %t, 2; @%p0 exit; activemask.b32 %r0; st.global.u32 [%at], %r0;";
    assert_eq!(words("", body, 4).expect("runs"), [0, 0, 12, 12]);
}

#[test]
fn predicates_guard_single_instructions() {
    let body =
        "mov.u32 %r0, 1; setp.eq.u32 %p0, %t, 1; @%p0 mov.u32 %r0, 2; @!%p0 add.u32 %r0, %r0, 10;
                st.global.u32 [%at], %r0;";
    assert_eq!(words("", body, 3).expect("runs"), [11, 2, 11]);
}

#[test]
fn guarded_lanes_alone_change() {
    // Lanes the guard leaves out keep their carry.
    let body = "mov.u32 %r0, -1; mov.u32 %r1, 0; setp.eq.u32 %p0, %t, 1; add.cc.u32 %r2, %r0, 1;
                @%p0 add.cc.u32 %r2, %r1, %r1; addc.u32 %r3, %r1, %r1; st.global.u32 [%at], %r3;";
    assert_eq!(words("", body, 3).expect("runs"), [1, 0, 1]);
    // A register is defined only where it was written.
    let body = "setp.eq.u32 %p0, %t, 1; @%p0 mov.u32 %r0, 5; add.u32 %r1, %r0, 1;";
    let fault = words("", body, 2).expect_err("undefined in thread 0");
    assert!(matches!(fault.kind, FaultKind::UndefinedRegister(_)));
    assert_eq!(
        fault.place.map(|p| (p.thread, p.register)),
        Some(([0, 0, 0], Some("%r0".to_owned())))
    );
    let body = body.replace("add.u32", "@%p0 add.u32");
    assert!(words("", &body, 2).is_ok());
    let carry = "setp.eq.u32 %p0, %t, 1; @%p0 add.cc.u32 %r0, %t, %t; addc.u32 %r1, %t, %t;";
    assert_eq!(
        words("", carry, 2).expect_err("no carry").kind,
        FaultKind::UndefinedCarry
    );
}

#[test]
fn registers_do_not_last_from_block_to_block() {
    for (define, take) in [
        ("mov.u32 %r0, 1;", "mov.u32 %r1, %r0;"),
        ("setp.eq.u32 %p1, %t, 0;", "selp.u32 %r1, 1, 0, %p1;"),
        ("add.cc.u32 %r1, %t, %t;", "addc.u32 %r1, %t, %t;"),
    ] {
        let body = format!("setp.ne.u32 %p0, %g, 0; @%p0 bra L; {define} L: {take}");
        assert!(on_64(&body, 1, 1).is_ok(), "{define}");
        let fault = on_64(&body, 2, 1).err().expect("block 1 defines nothing");
        assert!(
            fault.to_string().contains("is read before it is written"),
            "{fault}"
        );
    }
}

#[test]
fn scopes_hide_registers_and_labels() {
    let body = "{ .reg .b32 x; mov.u32 x, 5; bra L; trap; L: st.global.u32 [%at], x; }
                { .reg .b32 x, %r0; mov.u32 %r0, 7; mov.u32 x, %r0; bra L; trap; L: }
                ld.global.u32 %r0, [%at];";
    assert_eq!(words("", body, 1).expect("runs"), [5]);
}

#[test]
fn uniform_branches_must_be() {
    let body = "setp.eq.u32 %p0, %t, 0; @%p0 bra.uni L; L:";
    assert!(words("", body, 1).is_ok());
    assert_eq!(
        words("", body, 2).expect_err("diverges").kind,
        FaultKind::DivergentUniform
    );
}

#[test]
fn shuffles() {
    let shuffle = |text: &str| {
        let body = format!(
            "add.u32 %r0, %t, 100; {text} selp.u32 %r2, 1000, 0, %p0; add.u32 %r1, %r1, %r2;
             st.global.u32 [%at], %r1;"
        );
        words("", &body, 32)
    };
    // 1000 marks lanes whose source was in range.
    let up = shuffle("shfl.sync.up.b32 %r1|%p0, %r0, 2, 0, -1;").expect("runs");
    assert_eq!((up[0], up[1], up[2], up[31]), (100, 101, 1100, 1129));
    let down = shuffle("shfl.sync.down.b32 %r1|%p0, %r0, 3, 31, -1;").expect("runs");
    assert_eq!(
        (down[0], down[28], down[29], down[31]),
        (1103, 1131, 129, 131)
    );
    let bfly = shuffle("shfl.sync.bfly.b32 %r1|%p0, %r0, 16, 31, -1;").expect("runs");
    assert_eq!((bfly[0], bfly[20]), (1116, 1104));
    let idx = shuffle("shfl.sync.idx.b32 %r1|%p0, %r0, 5, 31, -1;").expect("runs");
    assert!(idx.iter().all(|&v| v == 1105));
    // Segments of 8 lanes: mask bits 0x18 in c's second byte.
    let idx = shuffle("shfl.sync.idx.b32 %r1|%p0, %r0, 5, 0x181f, -1;").expect("runs");
    assert_eq!((idx[0], idx[9], idx[31]), (1105, 1113, 1129));
    let down = shuffle("shfl.sync.down.b32 %r1|%p0, %r0, 3, 0x181f, -1;").expect("runs");
    assert_eq!((down[4], down[5], down[8]), (1107, 105, 1111));
    let up = shuffle("shfl.sync.up.b32 %r1|%p0, %r0, 1, 0x1800, -1;").expect("runs");
    assert_eq!((up[8], up[9]), (108, 1108));
    // The second destination may be missing.
    let one = "mov.u32 %r0, 9; shfl.sync.idx.b32 %r1, %r0, 0, 31, 3; st.global.u32 [%at], %r1;";
    assert_eq!(words("", one, 2).expect("runs"), [9, 9]);
}

#[test]
fn shuffles_need_their_lanes() {
    // Named, but exited; reading a lane outside the mask; running without being named.
    let exited = "setp.eq.u32 %p0, %t, 3; @%p0 ret; shfl.sync.idx.b32 %r0, %t, 0, 31, 15;";
    let fault = words("", exited, 4).expect_err("lane 3 is gone");
    assert_eq!(
        fault.kind,
        FaultKind::Members {
            named: 15,
            running: 7
        }
    );
    let inactive = "setp.ge.u32 %p0, %t, 2; @%p0 ret; shfl.sync.idx.b32 %r0, %t, 2, 31, 3;";
    assert_eq!(
        words("", inactive, 4).expect_err("reads lane 2").kind,
        FaultKind::InactiveSource(2)
    );
    let unnamed =
        words("", "shfl.sync.idx.b32 %r0, %t, 0, 31, 1;", 2).expect_err("lane 1 is not named");
    assert_eq!(
        unnamed.kind,
        FaultKind::Members {
            named: 1,
            running: 3
        }
    );
    let parted = "setp.eq.u32 %p0, %t, 0; @%p0 bra L; shfl.sync.idx.b32 %r0, %t, 1, 31, 3; L:";
    assert!(matches!(
        words("", parted, 2).expect_err("lane 0 is elsewhere").kind,
        FaultKind::Members { .. }
    ));
}

#[test]
fn votes() {
    let vote = |text: &str| {
        let body = format!(
            "setp.gt.u32 %p0, %t, 1; setp.lt.u32 %p1, %t, 9; {text} st.global.u32 [%at], %r0;"
        );
        words("", &body, 4).expect("runs")[0]
    };
    assert_eq!(vote("vote.sync.ballot.b32 %r0, %p0, 15;"), 0b1100);
    assert_eq!(vote("vote.sync.ballot.b32 %r0, !%p0, 15;"), 0b0011);
    for (text, expected) in [
        ("any.pred %p2, %p0", 1),
        ("any.pred %p2, !%p1", 0),
        ("all.pred %p2, %p0", 0),
        ("all.pred %p2, %p1", 1),
        ("uni.pred %p2, %p0", 0),
        ("uni.pred %p2, !%p1", 1),
    ] {
        assert_eq!(
            vote(&format!("vote.sync.{text}, 15; selp.u32 %r0, 1, 0, %p2;")),
            expected,
            "{text}"
        );
    }
    let fault = words(
        "",
        "setp.eq.u32 %p0, %t, 0; vote.sync.any.pred %p1, %p0, 7;",
        2,
    )
    .expect_err("lane 2");
    assert_eq!(
        fault.kind,
        FaultKind::Members {
            named: 7,
            running: 3
        }
    );
}

#[test]
fn barriers() {
    // Warps that have exited count as arrived.
    let body =
        "setp.ge.u32 %p0, %t, 32; @%p0 ret; bar.sync 1; barrier.sync 2; st.global.u32 [%at], %t;";
    assert!(words("", body, 64).is_ok());
    // So do exited lanes of the same warp.
    assert!(words("", "setp.ge.u32 %p0, %t, 3; @%p0 ret; bar.sync 0;", 8).is_ok());
    let parted = "setp.eq.u32 %p0, %t, 0; @%p0 bra L; bar.sync 0; L: bar.sync 0;";
    assert!(matches!(
        words("", parted, 2).expect_err("parted").kind,
        FaultKind::DivergentBarrier { .. }
    ));
    // Code may lead back to a barrier that lies before it.
    let around = "setp.eq.u32 %p0, %t, 0; @%p0 bra L; M: bar.sync 0; st.global.u32 [%at], %t; ret; L: bra M;";
    assert_eq!(words("", around, 40).unwrap(), (0..40).collect::<Vec<_>>());
    let exits = "setp.eq.u32 %p0, %t, 0; @%p0 bra L; bar.sync 0; L: st.global.u32 [%at], %t;";
    assert_eq!(words("", exits, 40).unwrap(), (0..40).collect::<Vec<_>>());
    for (body, lanes) in [
        ("@!%p0 bar.sync 0; st.global.u32 [%at], %t;", 4),
        ("@%p0 bra L; bar.sync 0; ret; L: bar.sync 0;", 4),
    ] {
        let body = format!("setp.eq.u32 %p0, %t, 0; {body}");
        let kind = words("", &body, lanes).expect_err("parted").kind;
        assert!(
            matches!(kind, FaultKind::DivergentBarrier { .. }),
            "{kind:?}"
        );
    }
    let crossed = "setp.lt.u32 %p0, %t, 32; @%p0 bra L; bar.sync 0; ret; L: bar.sync 1;";
    assert_eq!(
        words("", crossed, 64).expect_err("crossed").kind,
        FaultKind::Deadlock
    );
}

#[test]
fn fences_and_hints_are_accepted() {
    let hints = "membar.cta; membar.sys; fence.sc.gpu; fence.acq_rel.cta; .pragma \"nounroll\"; .loc 1 2 3
        ld.global.nc.L1::no_allocate.L2::128B.u32 %r0, [%a]; ld.global.cg.u32 %r0, [%a];
        ld.weak.global.L1::evict_last.u32 %r0, [%a]; ld.global.L2::evict_first.v2.b32 {%r0, _}, [%a];
        st.global.L1::no_allocate.v4.b32 [%b], {%r0, %r0, %r0, %r0}; st.global.cs.v2.u64 [%b+16], {%a, %b};
        st.weak.global.wt.u8 [%b+40], %r0;";
    let (stats, memory, _, b) = on_64(hints, 1, 1).expect("runs");
    assert_eq!(memory.read(b + 12, 4), Some(vec![0, 1, 2, 3]));
    assert_eq!(stats.global.stores, [1, 0, 0, 0, 2]);
    assert_eq!(stats.global.loads, [0, 0, 3, 1, 0]);
}

#[test]
fn loads_and_stores_of_every_type() {
    let body = "st.global.b8 [%b], -2; ld.global.s8 %h0, [%b]; ld.global.u8 %h1, [%b]; ld.global.s8 %r0, [%b];
        mov.b32 %r1, {%h0, %h1}; st.global.b32 [%b+4], %r1; st.global.b32 [%b+8], %r0;
        ld.global.s32 %d0, [%b+8]; st.global.b64 [%b+16], %d0; ld.global.u16 %r2, [%b+6];
        ld.global.s16 %d1, [%b+4]; st.global.u16 [%b+12], %d1; st.global.f32 [%b+24], 0f3F800000;
        ld.global.v4.u8 {%r3, %r4, %r5, %r6}, [%b+24]; st.global.v2.b16 [%b+28], {%h1, %h0};
        ld.global.f64 %d2, [%b+16]; st.global.s64 [%b+32], %d2; st.global.v4.s8 [%b+40], {%r6, %r5, %r4, %r3};
        mov.u32 %r7, 0x102; st.global.v2.u8 [%b+44], {%r7, %r7};";
    let (_, memory, _, b) = on_64(body, 1, 1).expect("runs");
    let read = |at, len| memory.read(b + at, len).expect("written");
    assert_eq!(read(0, 1), [0xfe]);
    assert_eq!(
        read(4, 10),
        [0xfe, 0xff, 0xfe, 0x00, 0xfe, 0xff, 0xff, 0xff, 0xfe, 0xff]
    );
    assert_eq!(
        read(16, 8),
        [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
    );
    assert_eq!(read(24, 8), [0, 0, 0x80, 0x3f, 0xfe, 0x00, 0xfe, 0xff]);
    assert_eq!(
        read(32, 8),
        [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
    );
    assert_eq!(read(40, 6), [0x3f, 0x80, 0, 0, 2, 2]);
}

#[test]
fn endless_loops_run_out_of_budget() {
    let module = kernel("", "L: bra L;");
    let params = pointers(0, 0);
    let mut launch = Launch::new("k", [1; 3], [1; 3], &params);
    launch.budget = 1000;
    let fault = run(&module, &mut Memory::new(), &launch).expect_err("endless");
    assert_eq!(fault.kind, FaultKind::BudgetSpent);
}

#[test]
fn launches_are_checked() {
    let text = |bounds: &str| {
        format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 a)\n{bounds}\n{{ ret; }}"
        )
    };
    let attempt = |bounds: &str, grid, block, params: &[u8]| {
        let module = Module::parse(&text(bounds)).expect("parses");
        run(
            &module,
            &mut Memory::new(),
            &Launch::new("k", grid, block, params),
        )
        .map_err(|f| f.kind)
    };
    assert!(attempt("", [1; 3], [32, 32, 1], &[0; 8]).is_ok());
    assert!(
        attempt(
            ".maxntid 64, 1, 1\n.minnctapersm 2",
            [1; 3],
            [8, 8, 1],
            &[0; 8]
        )
        .is_ok()
    );
    assert!(attempt(".reqntid 64", [1; 3], [64, 1, 1], &[0; 8]).is_ok());
    for (bounds, grid, block, params) in [
        ("", [1; 3], [32, 33, 1], 8),
        ("", [0, 1, 1], [1; 3], 8),
        ("", [1; 3], [1, 0, 1], 8),
        ("", [1, 65536, 1], [1; 3], 8),
        ("", [1; 3], [1, 1, 65], 8),
        ("", [1; 3], [1; 3], 7),
        (".maxntid 64", [1; 3], [65, 1, 1], 8),
        (".reqntid 64", [1; 3], [32, 1, 1], 8),
    ] {
        let result = attempt(bounds, grid, block, &vec![0; params]);
        assert!(
            matches!(result, Err(FaultKind::BadLaunch(_))),
            "{bounds} {grid:?} {block:?}"
        );
    }
    let module = Module::parse(&text("")).expect("parses");
    assert!(
        run(
            &module,
            &mut Memory::new(),
            &Launch::new("l", [1; 3], [1; 3], &[0; 8])
        )
        .is_err()
    );
}

#[test]
fn control_must_not_run_off_the_end() {
    for body in ["", "mov.u32 %r0, 1;", "@%p ret;", "bra L; L:"] {
        let text = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.entry k() {{ .reg .pred %p; .reg .b32 %r0; {body} }}"
        );
        assert!(Module::parse(&text).is_err(), "{body}");
    }
}

// Counts

/// A loop of which the lanes leave one after the other: each line as often as any of them comes to it.
#[test]
fn lines_are_counted_where_that_is_asked_for() {
    let text = ".version 8.0
.target sm_80
.address_size 64
.entry k()
{
.reg .pred %p; .reg .b32 %r<2>;
mov.u32 %r0, %tid.x; mov.u32 %r1, 0;
L:
add.u32 %r1, %r1, 1;
setp.le.u32 %p, %r1, %r0;
@%p bra L;
ret;
}";
    let module = Module::parse(text).expect("reads");
    let mut launch = Launch::new("k", [2, 1, 1], [3, 1, 1], &[]);
    let stats = run(&module, &mut Memory::new(), &launch).expect("runs");
    assert!(stats.lines.is_empty());
    launch.counts_lines = true;
    let stats = run(&module, &mut Memory::new(), &launch).expect("runs");
    // Two blocks of one warp each.
    let expected = [(7, 2 * 2), (9, 2 * 3), (10, 2 * 3), (11, 2 * 3), (12, 2)];
    assert!(stats.lines.into_iter().eq(expected));
    assert!(stats.lines_after_wait.is_empty());
    assert_eq!(stats.warp_instructions, 4 + 3 * 6 + 2);
}

#[test]
fn lines_behind_a_wait_are_counted_apart_wherever_they_stand() {
    let text = ".version 8.0
.target sm_90
.address_size 64
.entry k()
{
.reg .pred %p; .reg .b32 %r<2>;
mov.u32 %r0, %ctaid.x; setp.eq.u32 %p, %r0, 0;
@%p bra EARLY;
BACK:
griddepcontrol.wait;
mov.u32 %r1, 1;
ret;
EARLY:
mov.u32 %r1, 2;
bra BACK;
}";
    let module = Module::parse(text).expect("reads");
    let mut launch = Launch::new("k", [2, 1, 1], [32, 1, 1], &[]);
    launch.dependent = true;
    launch.counts_lines = true;
    let stats = run(&module, &mut Memory::new(), &launch).expect("runs");
    let all = [(7, 4), (8, 2), (10, 2), (11, 2), (12, 2), (14, 1), (15, 1)];
    assert!(stats.lines.into_iter().eq(all));
    assert!(stats.lines_after_wait.into_iter().eq([(11, 2), (12, 2)]));
}

#[test]
fn counts() {
    let body =
        "setp.ge.u32 %p0, %g, 12; @%p0 ret; ld.global.u32 %r0, [%at]; ld.global.u8 %r1, [%a];
                mul.wide.u32 %d0, %g, 4; add.u64 %d0, %d0, %b; st.global.u32 [%d0], %r0;";
    let (stats, memory, a, b) = on_64(body, 2, 8).expect("runs");
    let traffic = |name| *stats.buffer(name).expect("known");
    assert_eq!(
        (traffic("a").loads, traffic("a").stores),
        ([12, 0, 12, 0, 0], [0; 5])
    );
    assert_eq!(
        (traffic("b").loads, traffic("b").stores),
        ([0; 5], [0, 0, 12, 0, 0])
    );
    assert_eq!(
        (stats.global.loaded_bytes(), stats.global.stored_bytes()),
        (60, 48)
    );
    assert_eq!(
        (traffic("a").loads_of(4), traffic("b").stores_of(4)),
        (12, 12)
    );
    // 7 instructions in the prologue; `@%p0 ret` counts where it is taken.
    assert_eq!(stats.warp_instructions, 2 * (7 + 2 + 6));
    assert_eq!(stats.thread_instructions, 16 * 8 + 4 + 12 * 6);
    assert_eq!(
        memory.touches(a, 1),
        Touches {
            reads: (13, 13),
            writes: (0, 0)
        }
    );
    assert_eq!(
        memory.touches(a, 48),
        Touches {
            reads: (1, 13),
            writes: (0, 0)
        }
    );
    assert_eq!(
        memory.touches(b, 48),
        Touches {
            reads: (0, 0),
            writes: (1, 1)
        }
    );
    assert_eq!(
        memory.touches(b, 64),
        Touches {
            reads: (0, 0),
            writes: (0, 1)
        }
    );
    assert_eq!(memory.counts(b + 47, 2), [(0, 1), (0, 0)]);
}

#[test]
fn counts_are_of_the_last_launch() {
    let module = kernel("", "ld.global.u32 %r0, [%a]; st.global.u32 [%b], %r0;");
    let mut memory = Memory::new();
    let (a, b) = (memory.add("a", vec![1; 4], 0), memory.add_uninit("b", 4, 0));
    let params = pointers(a, b);
    let launch = Launch::new("k", [1; 3], [1; 3], &params);
    let first = run(&module, &mut memory, &launch).expect("runs");
    assert_eq!(run(&module, &mut memory, &launch).expect("runs"), first);
    assert_eq!(memory.touches(a, 4).reads, (1, 1));
    assert_eq!(memory.touches(b, 4).writes, (1, 1));
    let (c, d) = (memory.add("c", vec![1; 4], 0), memory.add_uninit("d", 4, 0));
    let params = pointers(c, d);
    run(
        &module,
        &mut memory,
        &Launch::new("k", [1; 3], [1; 3], &params),
    )
    .expect("runs");
    assert_eq!(memory.counts(a, 4), [(0, 0); 4]);
    assert_eq!(memory.counts(c, 4), [(1, 0); 4]);
}

#[test]
fn buffers_lie_apart() {
    let mut memory = Memory::new();
    let far = memory.add_at("far", 0x7fff_0000_0000, &[0; 16]);
    let mut ends = vec![far + 16];
    for (name, misalign) in [("a", 0), ("b", 4), ("c", 255)] {
        let address = memory.add_uninit(name, 1000, misalign);
        assert_eq!(address % 256, misalign as u64);
        assert!(ends.iter().all(|end| address >= end + (1 << 20)), "{name}");
        ends.push(address + 1000);
    }
}

#[test]
fn buffers_of_any_length_and_place() {
    // Element 2^33 + 5 of a buffer of 2^36 bytes.
    let body = "mov.u64 %d0, 0x200000005; shl.b64 %d0, %d0, 2; add.u64 %d0, %d0, %a; ld.global.u32 %r0, [%d0];
                add.u32 %r0, %r0, 1; st.global.u32 [%d0+4], %r0; st.global.u32 [%b], %r0;";
    let module = kernel("", body);
    let mut memory = Memory::new();
    let a = memory.add_sparse("a", 1 << 36, 4);
    let b = memory.add_at("b", 0x7fff_0000_0100, &[0; 4]);
    let at = a + 4 * 0x2_0000_0005;
    memory.write(at, &41u32.to_le_bytes());
    let params = pointers(a, b);
    let stats = run(
        &module,
        &mut memory,
        &Launch::new("k", [1; 3], [1; 3], &params),
    )
    .expect("runs");
    assert_eq!(memory.read(at + 4, 4), Some(vec![42, 0, 0, 0]));
    assert_eq!((memory.read(at + 8, 1), memory.read(a, 1)), (None, None));
    assert_eq!(memory.written(at + 7, 2), [true, false]);
    assert_eq!(memory.bytes(b), [42, 0, 0, 0]);
    assert_eq!(
        memory.touches(at, 4),
        Touches {
            reads: (1, 1),
            writes: (0, 0)
        }
    );
    assert_eq!(stats.buffer("a").map(|t| t.stored_bytes()), Some(4));
    // Host writes across a page border.
    memory.write(a + (1 << 16) - 6, &[1, 2, 3, 4]);
    assert_eq!(memory.read(a + (1 << 16) - 6, 4), Some(vec![1, 2, 3, 4]));
    // A page nobody wrote, and the end of the buffer.
    for offset in [1 << 30, 1 << 36] {
        let params = pointers(a + offset - 4 * 0x2_0000_0005, b);
        assert!(
            run(
                &module,
                &mut memory,
                &Launch::new("k", [1; 3], [1; 3], &params)
            )
            .is_err()
        );
    }
}

#[test]
fn source_lines_make_mutants() {
    let module = kernel("", "mov.u32 %r0, 3;\nst.global.u32 [%at], %r0;");
    let at = *module
        .code_lines("k")
        .iter()
        .find(|&&line| module.lines()[line as usize - 1].contains("mov.u32 %r0, 3"))
        .expect("the line");
    let mut lines = module.lines().to_vec();
    lines[at as usize - 1] = lines[at as usize - 1].replace("%r0, 3", "%r0, 4");
    let mutant = Module::parse(&lines.join("\n")).expect("parses");
    let mut memory = Memory::new();
    let a = memory.add_uninit("a", 4, 0);
    let params = pointers(a, 0);
    run(
        &mutant,
        &mut memory,
        &Launch::new("k", [1; 3], [1; 3], &params),
    )
    .expect("runs");
    assert_eq!(memory.bytes(a), [4, 0, 0, 0]);
}

/// Runs a kernel of 40 threads as a dependent launch: `a` of written bytes, `b` of unwritten ones.
fn dependent(body: &str, prepare: impl Fn(&mut Memory, u64)) -> Result<(Stats, Vec<u8>), Fault> {
    let text = format!(
        ".version 8.0\n.target sm_90\n.address_size 64\n
        .visible .entry k(.param .u64 a, .param .u64 b)\n{{
        .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %a, %b, %from, %to;
        .shared .align 4 .b8 s[160];
        ld.param.u64 %a, [a]; ld.param.u64 %b, [b]; mov.u32 %r0, %tid.x;
        mad.wide.u32 %from, %r0, 4, %a; mad.wide.u32 %to, %r0, 4, %b;
        {body}
        ret;\n}}\n"
    );
    let module = Module::parse(&text).unwrap_or_else(|e| panic!("{e}"));
    let mut memory = Memory::new();
    let a = memory.add("a", (0..160).collect(), 0);
    let b = memory.add_uninit("b", 160, 0);
    prepare(&mut memory, a);
    let params = pointers(a, b);
    let mut launch = Launch::new("k", [1; 3], [40, 1, 1], &params);
    launch.dependent = true;
    let stats = run(&module, &mut memory, &launch)?;
    Ok((stats, memory.bytes(b).to_vec()))
}

fn earlier_writes(_: &mut Memory, _: u64) {}

const WAIT: &str = "griddepcontrol.wait;";
const LOAD: &str = "ld.global.u32 %r1, [%from];";
const LOAD_NC: &str = "ld.global.nc.u32 %r1, [%from];";
const STORE: &str = "st.global.u32 [%to], %r1;";

#[track_caller]
fn refused(result: Result<(Stats, Vec<u8>), Fault>) -> AccessError {
    match result.map(|_| ()) {
        Err(Fault {
            kind: FaultKind::Access { error, .. },
            ..
        }) => error,
        other => panic!("expected a refused access, got {other:?}"),
    }
}

#[test]
fn a_dependent_launch_reads_and_writes_after_its_wait() {
    let shared = "st.shared.u32 [s], %r0;";
    let body = format!("griddepcontrol.launch_dependents; {WAIT} {LOAD} {STORE}");
    let (stats, copied) = dependent(&body, earlier_writes).expect("all is behind the wait");
    assert_eq!(stats.launched_dependents, 40);
    assert_eq!(stats.loads_before_wait, 0);
    assert_eq!(copied, (0..160).collect::<Vec<u8>>());
    // Shared memory has nothing to do with earlier work, nor has a load that is promised or constant.
    let one = format!("setp.ne.u32 %p0, %r0, 0; @%p0 bra next; {shared} next: {WAIT}");
    assert!(dependent(&one, earlier_writes).is_ok());
    for (load, prepare) in [
        (LOAD, Memory::set_promised as fn(&mut Memory, u64)),
        (LOAD, Memory::set_constant),
        (LOAD_NC, Memory::set_constant),
    ] {
        let body = format!("{load} {WAIT} {STORE}");
        let (stats, _) = dependent(&body, prepare).expect(load);
        assert_eq!(stats.loads_before_wait, 40);
    }
}

#[test]
fn what_a_dependent_launch_does_before_its_wait_is_a_fault() {
    let load_early = format!("{LOAD} {WAIT} {STORE}");
    assert_eq!(
        refused(dependent(&load_early, earlier_writes)),
        AccessError::BeforeWait
    );
    let store_early = format!("mov.u32 %r1, 7; {STORE} {WAIT}");
    for prepare in [earlier_writes, Memory::set_constant] {
        let store_early = dependent(&store_early, prepare);
        assert_eq!(refused(store_early), AccessError::BeforeWait);
    }
    // One thread of the second warp takes another way, past the wait.
    let padding = format!("setp.eq.u32 %p0, %r0, 39; @%p0 bra end; {WAIT} end:");
    let fault = dependent(&padding, earlier_writes).unwrap_err();
    assert_eq!(fault.kind, FaultKind::EndsBeforeWait);
    assert_eq!(fault.place.map(|place| place.thread), Some([39, 0, 0]));
    let never = dependent("", earlier_writes).unwrap_err();
    assert_eq!(never.kind, FaultKind::EndsBeforeWait);
    // What earlier work may write, or only this caller promises, is not read past the caches' order.
    let non_coherent = format!("{WAIT} {LOAD_NC} {STORE}");
    for prepare in [earlier_writes, Memory::set_promised] {
        assert_eq!(
            refused(dependent(&non_coherent, prepare)),
            AccessError::NonCoherentWithEarlier
        );
    }
}

#[test]
fn an_ordinary_launch_need_not_wait() {
    let (stats, ..) = on_64("ld.global.nc.u32 %r0, [%at];", 1, 4).expect("no rule applies");
    assert_eq!(stats.launched_dependents, 0);
}

#[test]
fn a_prefetch_reads_nothing() {
    // Not even what earlier work may write.
    let prefetch = "prefetch.global.L2 [%from];";
    let body = format!("{prefetch} {WAIT} {prefetch} prefetch.global.L1 [%a+159]; {LOAD} {STORE}");
    let (stats, copied) = dependent(&body, earlier_writes).expect("all is behind the wait");
    let a = stats.buffer("a").copied().unwrap_or_default();
    assert_eq!((a.prefetches, a.prefetches_before_wait), (120, 40));
    assert_eq!((a.loads_of(4), a.loads_before_wait), (40, 0));
    assert_eq!(copied, (0..160).collect::<Vec<u8>>());
    // A byte that holds no value yet can be asked for, one that is nowhere cannot.
    let (stats, ..) = on_64("prefetch.global.L2 [%b+63];", 1, 1).expect("it is there");
    assert_eq!(stats.buffer("b").map(|b| b.prefetches), Some(1));
    let outside = on_64("prefetch.global.L2 [%b+64];", 1, 1);
    assert_eq!(access_error(outside), AccessError::OutOfBounds);
}

#[test]
fn loads_before_the_wait_are_counted_by_buffer() {
    let body = format!("{LOAD} {WAIT} {LOAD} {STORE}");
    let (stats, _) = dependent(&body, Memory::set_promised).expect("promised");
    let early = |name| stats.buffer(name).map(|traffic| traffic.loads_before_wait);
    assert_eq!((early("a"), early("b")), (Some(40), Some(0)));
}

#[test]
fn older_targets_cannot_convert_to_e4m3() {
    let text = ".version 8.0\n.target sm_86\n.address_size 64\n.visible .entry k()\n{
        .reg .b16 %h0; .reg .b32 %r0; cvt.rn.satfinite.e4m3x2.f32 %h0, %r0, %r0; ret; }";
    let error = Module::parse(text).expect_err("refused").to_string();
    assert!(error.contains("sm_86 does not convert to e4m3"), "{error}");
}

#[test]
fn older_targets_have_no_griddepcontrol() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{ griddepcontrol.wait; ret; }";
    let error = Module::parse(text).expect_err("refused").to_string();
    assert!(error.contains("sm_80 has no griddepcontrol"), "{error}");
}
