//! Each opcode against values worked out by hand.

use ptx_interpreter::{Launch, Memory, Module, run};

/// Runs `op` in one thread. `signature` gives the register kinds, result first: `h`, `r` and `d`
/// are 16, 32 and 64 bits, `p` a predicate. Arguments past the signature are appended as text.
fn try_one(op: &str, signature: &str, inputs: &[u64]) -> Result<u64, String> {
    let (op, literal) = op.split_once('|').unwrap_or((op, ""));
    let kinds: Vec<char> = signature.chars().collect();
    let mut body = String::new();
    let mut operands = format!("%{}20", kinds[0]);
    for (i, kind) in kinds[1..].iter().enumerate() {
        body += &format!("ld.param.u64 %d{i}, [p+{}];\n", 8 + 8 * i);
        body += &match kind {
            'h' => format!("cvt.u16.u64 %h{i}, %d{i};\n"),
            'r' => format!("cvt.u32.u64 %r{i}, %d{i};\n"),
            'p' => format!("setp.ne.u64 %p{i}, %d{i}, 0;\n"),
            _ => String::new(),
        };
        operands += &format!(", %{kind}{i}");
    }
    if !literal.is_empty() {
        operands += &format!(", {literal}");
    }
    body += &format!("{op} {operands};\n");
    body += match kinds[0] {
        'h' => "cvt.u64.u16 %d20, %h20;\n",
        'r' => "cvt.u64.u32 %d20, %r20;\n",
        'p' => "selp.u64 %d20, 1, 0, %p20;\n",
        _ => "",
    };
    one_thread(&body, inputs)
}

/// Runs statements in one thread; inputs are at `[p+8]` on, the result is `%d20`.
fn one_thread(body: &str, inputs: &[u64]) -> Result<u64, String> {
    let text = format!(
        ".version 8.0\n.target sm_90\n.address_size 64\n
        .visible .entry k(.param .align 8 .b8 p[{}])\n{{
        .reg .pred %p<32>;\n.reg .b16 %h<32>;\n.reg .b32 %r<32>;\n.reg .b64 %d<32>;\n
        {body}
        ld.param.u64 %d31, [p];\nst.global.u64 [%d31], %d20;\nret;\n}}\n",
        8 + 8 * inputs.len()
    );
    let module = Module::parse(&text).map_err(|e| e.to_string())?;
    let mut memory = Memory::new();
    let out = memory.add_uninit("out", 8, 0);
    let params: Vec<u8> = std::iter::once(&out)
        .chain(inputs)
        .flat_map(|value| value.to_le_bytes())
        .collect();
    run(
        &module,
        &mut memory,
        &Launch::new("k", [1; 3], [1; 3], &params),
    )
    .map_err(|e| e.to_string())?;
    let bytes = memory.bytes(out).try_into().expect("8 bytes");
    Ok(u64::from_le_bytes(bytes))
}

/// The bits of a value as the tables below write it.
fn bits(text: &str, kind: char) -> u64 {
    let number = |digits: &str| digits.parse::<i64>().map(|n| n as u64).expect("a number");
    let value = match text {
        "quiet" => 0x7fc0_0000,
        "payload" => 0xffc1_2345,
        // The canonical NaN.
        "nan" => 0x7fff_ffff,
        "max" => u64::from(f32::MAX.to_bits()),
        // 2^-30, far below half an ulp of one.
        "tiny" => 0x3080_0000,
        "-tiny" => 0xb080_0000,
        _ if text.contains('.') || text.ends_with("inf") => {
            u64::from(text.parse::<f32>().expect("an f32").to_bits())
        }
        _ => match (text.strip_prefix("0x"), text.split_once("<<")) {
            (Some(digits), _) => u64::from_str_radix(digits, 16).expect("hexadecimal digits"),
            (None, Some((one, shift))) => number(one) << number(shift),
            (None, None) => number(text),
        },
    };
    match kind {
        'h' => value & 0xffff,
        'r' => value & 0xffff_ffff,
        _ => value,
    }
}

/// Checks opcodes against a table with rows `opcode signature: cases`, cases apart by commas, each
/// of them `inputs = result`.
#[track_caller]
fn check(table: &str) {
    let rows = table
        .lines()
        .map(str::trim)
        .filter(|row| !row.is_empty() && !row.starts_with("//"));
    for row in rows {
        let (head, cases) = row.split_once(": ").expect("a row has a head");
        let (op, signature) = head.split_once(' ').expect("a head has a signature");
        for case in cases.split(", ") {
            let (inputs, expected) = case.split_once('=').expect("a case has a result");
            let inputs = inputs.split_whitespace().zip(signature[1..].chars());
            let inputs: Vec<u64> = inputs.map(|(text, kind)| bits(text, kind)).collect();
            let expected = bits(
                expected.trim(),
                signature.chars().next().expect("a result kind"),
            );
            match try_one(op, signature, &inputs) {
                Ok(found) => assert!(found == expected, "{op}: {case}: found {found:#x}"),
                Err(e) => panic!("{op}: {case}: {e}"),
            }
        }
    }
}

// Integers

#[test]
fn add_integer() {
    check(
        "
        add.s32 rrr: 7 -1 = 6, 1<<31 1<<31 = 0
        add.u32 rrr: -1 1 = 0
        add.s64 ddd: -1 1 = 0, 1<<40 5 = 0x10000000005
        add.u64 ddd: -1 3 = 2
        add.s16 hhh: 0xffff 2 = 1
        add.u16 hhh: 0x8000 0x8000 = 0
        add.s32|-5 rr: 3 = 0xfffffffe
        ",
    );
}

#[test]
fn sub_integer() {
    check(
        "
        sub.s32 rrr: 3 5 = 0xfffffffe
        sub.s64 ddd: 0 1 = -1
        sub.u16 hhh: 0 1 = 0xffff
        ",
    );
}

#[test]
fn carries() {
    // 128-bit sum and difference out of four 32-bit or two 64-bit steps.
    let add = "ld.param.u64 %d0, [p+8]; ld.param.u64 %d1, [p+16]; ld.param.u64 %d2, [p+24];
               ld.param.u64 %d3, [p+32]; add.cc.u64 %d4, %d0, %d2; addc.u64 %d20, %d1, %d3;";
    assert_eq!(one_thread(add, &[u64::MAX, 4, 1, 5]), Ok(10));
    assert_eq!(one_thread(add, &[u64::MAX - 1, 4, 1, 5]), Ok(9));
    let sub = add.replace("add.cc", "sub.cc").replace("addc", "subc");
    assert_eq!(one_thread(&sub, &[0, 9, 1, 5]), Ok(3));
    assert_eq!(one_thread(&sub, &[1, 9, 1, 5]), Ok(4));
    // A carry goes through an addc.cc whose own sum is all ones.
    let three = "mov.u32 %r0, -1; mov.u32 %r1, 1; mov.u32 %r2, 0; add.cc.u32 %r3, %r0, %r1;
                 addc.cc.u32 %r4, %r0, %r2; addc.u32 %r5, %r2, %r2; cvt.u64.u32 %d20, %r5;";
    assert_eq!(one_thread(three, &[]), Ok(1));
    let borrow = "mov.u32 %r0, 0; mov.u32 %r1, 1; sub.cc.u32 %r3, %r0, %r1;
                  subc.cc.u32 %r4, %r0, %r0; subc.u32 %r5, %r0, %r0; cvt.u64.u32 %d20, %r5;";
    assert_eq!(one_thread(borrow, &[]), Ok(0xffff_ffff));
    // (2^32 - 1)^2 = 0xfffffffe_00000001; plus (1, 2^32 - 1) carries into the high word.
    let mad = "mov.u32 %r0, -1; mov.u32 %r1, 1; mad.lo.cc.u32 %r2, %r0, %r0, %r0;
               madc.hi.u32 %r3, %r0, %r0, %r1; mov.b64 %d20, {%r2, %r3};";
    assert_eq!(one_thread(mad, &[]), Ok(0));
    let madc = "mov.u32 %r0, -1; mov.u32 %r1, 1; add.cc.u32 %r2, %r0, %r1;
                madc.lo.cc.u32 %r3, %r1, %r0, %r1; madc.hi.cc.u32 %r4, %r0, %r0, %r1;
                addc.u32 %r5, %r1, %r1; mad.hi.cc.u32 %r6, %r1, %r1, %r1; mov.b64 %d20, {%r3, %r4};";
    // 1 * 0xffffffff + 1 + carry = 2^32 + 1; then 0xfffffffe + 1 + carry = 2^32.
    assert_eq!(one_thread(madc, &[]), Ok(1));
    let unset = one_thread(
        "mov.u32 %r0, 1; addc.u32 %r1, %r0, %r0; mov.b64 %d20, {%r1, %r1};",
        &[],
    );
    assert!(unset.unwrap_err().contains("carry"));
}

#[test]
fn mul_integer() {
    check(
        "
        mul.lo.s32 rrr: 0x10001 0x10001 = 0x20001, -1 5 = 0xfffffffb
        mul.lo.u32 rrr: 0xffffffff 2 = 0xfffffffe
        mul.lo.s16 hhh: 0x100 0x101 = 0x100
        mul.lo.s64 ddd: -1 7 = 0xfffffffffffffff9, 1<<33 1<<31 = 0
        mul.lo.u64 ddd: 0x9e3779b97f4a7c15 2 = 0x3c6ef372fe94f82a
        mul.hi.u32 rrr: -1 -1 = 0xfffffffe
        mul.hi.s32 rrr: -1 -1 = 0, 1<<31 2 = -1, 1<<31 1<<31 = 1<<30
        mul.hi.u64 ddd: -1 -1 = 0xfffffffffffffffe, 1<<63 6 = 3
        mul.hi.s64 ddd: -1 -1 = 0, 1<<63 1<<63 = 1<<62, 1<<63 1 = -1
        mul.hi.u16 hhh: 0xffff 0xffff = 0xfffe
        mul.wide.u32 drr: -1 -1 = 0xfffffffe00000001
        mul.wide.s32 drr: -1 3 = 0xfffffffffffffffd, 1<<31 1<<31 = 1<<62
        mul.wide.u16 rhh: 0xffff 0xffff = 0xfffe0001
        mul.wide.s16 rhh: 0xffff 2 = 0xfffffffe
        mul.wide.u32|-1431655765 dr: 3 = 0x200000001
        ",
    );
}

#[test]
fn mad_integer() {
    check(
        "
        mad.lo.s32 rrrr: -1 5 3 = 0xfffffffe
        mad.lo.u64 dddd: 1<<63 2 9 = 9
        mad.lo.s16 hhhh: 0x100 0x100 7 = 7
        mad.hi.u32 rrrr: -1 -1 3 = 1
        mad.hi.s64 dddd: -1 1 0 = -1
        mad.wide.u32 drrd: -1 2 1<<40 = 0x101fffffffe
        mad.wide.s32 drrd: -1 2 1 = -1
        mad.wide.u16 rhhr: 0xffff 0xffff 1 = 0xfffe0002
        ",
    );
}

#[test]
fn div_rem() {
    check(
        "
        div.u32 rrr: -1 10 = 0x19999999
        rem.u32 rrr: -1 10 = 5
        div.u64 ddd: -1 1<<32 = 0xffffffff
        rem.u64 ddd: -1 1<<32 = 0xffffffff
        // Towards zero; the remainder has the sign of the dividend.
        div.s32 rrr: 0xfffffff9 2 = 0xfffffffd, 7 0xfffffffe = 0xfffffffd
        rem.s32 rrr: 0xfffffff9 2 = -1, 7 0xfffffffe = 1
        div.s64 ddd: 0xfffffffffffffff9 2 = 0xfffffffffffffffd
        rem.s64 ddd: 0xfffffffffffffff9 2 = -1
        div.u16 hhh: 0xffff 0x10 = 0xfff
        rem.s16 hhh: 0xfff9 2 = 0xffff
        ",
    );
    for op in ["div.u32", "rem.s64"] {
        let signature = if op == "div.u32" { "rrr" } else { "ddd" };
        assert!(
            try_one(op, signature, &[1, 0])
                .unwrap_err()
                .contains("division by zero")
        );
    }
}

#[test]
fn min_max_integer() {
    check(
        "
        min.s32 rrr: -1 1 = -1
        max.s32 rrr: -1 1 = 1
        min.u32 rrr: -1 1 = 1
        max.u32 rrr: -1 1 = -1
        min.s64 ddd: 1<<63 0 = 1<<63
        max.u64 ddd: 1<<63 0 = 1<<63
        max.s16 hhh: 0x8000 3 = 3
        min.u16 hhh: 0x8000 3 = 3
        ",
    );
}

#[test]
fn neg_abs_integer() {
    check(
        "
        neg.s32 rr: 5 = 0xfffffffb, 1<<31 = 1<<31
        neg.s64 dd: 1 = -1
        neg.s16 hh: 1 = 0xffff
        abs.s32 rr: 0xfffffffb = 5, 1<<31 = 1<<31
        abs.s64 dd: -1 = 1, 1<<63 = 1<<63
        abs.s16 hh: 0xfffe = 2
        ",
    );
}

#[test]
fn and_or_xor_not() {
    check(
        "
        and.b32 rrr: 0xc 0xa = 0x8
        or.b32 rrr: 0xc 0xa = 0xe
        xor.b32 rrr: 0xc 0xa = 0x6
        and.b64|-4294967296 dd: -1 = 0xffffffff00000000
        or.b64 ddd: 1<<63 1 = 0x8000000000000001
        xor.b64 ddd: -1 1 = 0xfffffffffffffffe
        and.b16 hhh: 0xff0f 0xff0 = 0xf00
        or.b16 hhh: 0xf000 0xf = 0xf00f
        xor.b16 hhh: 0xffff 1 = 0xfffe
        not.b16 hh: 1 = 0xfffe
        not.b32 rr: 1 = 0xfffffffe
        not.b64 dd: 0 = -1
        ",
    );
}

#[test]
fn predicate_logic() {
    check(
        "
        and.pred ppp: 1 1 = 1, 1 0 = 0
        or.pred ppp: 0 1 = 1, 0 0 = 0
        xor.pred ppp: 1 1 = 0, 1 0 = 1
        not.pred pp: 1 = 0, 0 = 1
        mov.pred pp: 1 = 1, 0 = 0
        mov.pred|1 p: = 1
        mov.pred|0 p: = 0
        ",
    );
}

#[test]
fn shifts_clamp_at_the_width() {
    check(
        "
        shl.b32 rrr: 1 31 = 1<<31, 1 32 = 0, 1 1000 = 0, 3 31 = 1<<31
        shl.b64 ddr: 1 63 = 1<<63, 1 64 = 0, 1 -1 = 0
        shl.b16 hhr: 1 15 = 0x8000, 1 16 = 0
        shr.u32 rrr: 1<<31 31 = 1, -1 32 = 0
        shr.b32 rrr: 1<<31 30 = 2
        shr.s32 rrr: 1<<31 31 = -1, 1<<31 32 = -1, 1<<30 99 = 0
        shr.u64 ddr: 1<<63 63 = 1, -1 64 = 0
        shr.b64 ddr: -1 60 = 15
        shr.s64 ddr: 1<<63 200 = -1, 1<<63 1 = 0xc000000000000000
        shr.s16 hhr: 0x8000 20 = 0xffff
        shr.u16 hhr: 0x8000 15 = 1, 0x8000 16 = 0
        ",
    );
}

#[test]
fn shf() {
    check(
        "
        shf.l.wrap.b32 rrrr: 0x11223344 0x55667788 8 = 0x66778811
        shf.l.wrap.b32 rrrr: 0x11223344 0x55667788 40 = 0x66778811
        shf.l.wrap.b32 rrrr: 0x11223344 0x55667788 32 = 0x55667788
        shf.l.clamp.b32 rrrr: 0x11223344 0x55667788 8 = 0x66778811
        shf.l.clamp.b32 rrrr: 0x11223344 0x55667788 40 = 0x11223344
        shf.r.wrap.b32 rrrr: 0x11223344 0x55667788 8 = 0x88112233
        shf.r.wrap.b32 rrrr: 0x11223344 0x55667788 32 = 0x11223344
        shf.r.clamp.b32 rrrr: 0x11223344 0x55667788 8 = 0x88112233
        shf.r.clamp.b32 rrrr: 0x11223344 0x55667788 99 = 0x55667788
        ",
    );
}

#[test]
fn prmt() {
    check(
        "
        // Bytes 0 to 3 are a's, 4 to 7 b's; a selector's top bit replicates the byte's sign.
        prmt.b32 rrrr: 0x83221100 0x77665584 0x3210 = 0x83221100
        prmt.b32 rrrr: 0x83221100 0x77665584 0x7654 = 0x77665584
        prmt.b32 rrrr: 0x83221100 0x77665584 0x437 = 0x848377
        prmt.b32 rrrr: 0x83221100 0x77665584 0xbc8f = 0xffff0000
        ",
    );
}

#[test]
fn bfe() {
    check(
        "
        bfe.u32 rrrr: 0xabcd1234 4 8 = 0x23, -1 28 8 = 0xf, -1 5 0 = 0
        bfe.u32 rrrr: -1 40 4 = 0, 0x12345678 0 255 = 0x12345678
        // The sign bit is that of the field, or the register's where the field runs past it.
        bfe.s32 rrrr: 0x80 4 4 = 0xfffffff8, 0x70 4 4 = 7, 1<<31 28 8 = 0xfffffff8
        bfe.s32 rrrr: 1<<31 40 4 = -1, -1 3 0 = 0
        bfe.u64 ddrr: 0x8000000000000005 60 4 = 8, -1 0 64 = -1
        bfe.s64 ddrr: 1<<63 60 4 = 0xfffffffffffffff8
        ",
    );
}

#[test]
fn bfi() {
    check(
        "
        bfi.b32 rrrrr: 0xab 0x11111111 8 8 = 0x1111ab11, -1 0 28 8 = 0xf0000000
        bfi.b32 rrrrr: -1 5 32 4 = 5, -1 5 3 0 = 5
        bfi.b64 dddrr: 0xf 0 60 4 = 0xf000000000000000, -1 0 0 64 = -1
        ",
    );
}

#[test]
fn lop3() {
    check(
        "
        // With these inputs the low byte of the result is the table itself.
        lop3.b32|0x80 rrrr: 0xf0 0xcc 0xaa = 0x80
        lop3.b32|0x96 rrrr: 0xf0 0xcc 0xaa = 0x96
        lop3.b32|0xe8 rrrr: 0xf0 0xcc 0xaa = 0xe8
        // Rows not named by the inputs: all bits above are row 0.
        lop3.b32|0x01 rrrr: 0xf0 0xcc 0xaa = 0xffffff01
        ",
    );
}

#[test]
fn bit_counts() {
    check(
        "
        popc.b32 rr: 0xf00f = 8
        popc.b64 rd: -1 = 64
        clz.b32 rr: 1 = 31, 0 = 32
        clz.b64 rd: 1 = 63, 0 = 64
        brev.b32 rr: 1 = 1<<31, 6 = 0x60000000
        brev.b64 dd: 1 = 1<<63
        bfind.u32 rr: 0x100 = 8, 0 = -1
        bfind.s32 rr: 0xfffffeff = 8, -1 = -1
        bfind.shiftamt.u32 rr: 0x100 = 23, 0 = -1
        bfind.u64 rd: 1<<63 = 63
        bfind.s64 rd: 1<<63 = 62
        ",
    );
}

// Floating point

#[test]
fn add_sub_f32() {
    check(
        "
        add.f32 rrr: 1.0 1.0 = 2.0, 1.0 tiny = 1.0, inf -inf = nan
        add.rn.f32 rrr: -0.0 0 = 0, -0.0 -0.0 = -0.0
        add.f32 rrr: payload 1.0 = nan, 1.0 quiet = nan, max max = inf
        // Subnormals are kept.
        add.f32 rrr: 1 1 = 2, 0x800000 0x80000001 = 0x7fffff
        add.rz.f32 rrr: 1.0 tiny = 1.0, 1.0 -tiny = 0x3f7fffff, max max = max
        add.rp.f32 rrr: 1.0 tiny = 0x3f800001, 1.0 -tiny = 1.0, max max = inf
        add.rm.f32 rrr: 1.0 tiny = 1.0, 1.0 -tiny = 0x3f7fffff, max max = max
        add.rm.f32 rrr: 1.0 -1.0 = -0.0, 0 0 = 0, inf 1.0 = inf
        add.rz.f32 rrr: quiet 1.0 = nan, inf -inf = nan
        sub.f32 rrr: 1.0 1.0 = 0, 1.0 2.0 = -1.0, inf inf = nan, 0 0 = 0
        sub.rp.f32 rrr: 1.0 -tiny = 0x3f800001
        ",
    );
}

#[test]
fn mul_f32() {
    check(
        "
        mul.f32 rrr: 2.0 2.0 = 0x40800000, 0 inf = nan, -1.0 0 = -0.0
        mul.rn.f32 rrr: max 2.0 = inf, payload 1.0 = nan
        // (1 + 2^-23)^2 = 1 + 2^-22 + 2^-46
        mul.rn.f32 rrr: 0x3f800001 0x3f800001 = 0x3f800002
        mul.rz.f32 rrr: 0x3f800001 0x3f800001 = 0x3f800002, max 2.0 = max
        mul.rp.f32 rrr: 0x3f800001 0x3f800001 = 0x3f800003
        mul.rm.f32 rrr: 0x3f800001 0xbf800001 = 0xbf800003, max 2.0 = max
        // Half the least subnormal: a tie, to even; upwards it is the least subnormal.
        mul.rn.f32 rrr: 1 0x3f000000 = 0, 3 0x3f000000 = 2
        mul.rp.f32 rrr: 1 0x3f000000 = 1
        ",
    );
}

#[test]
fn fma_f32_rounds_once() {
    check(
        "
        // (1 + 2^-23)^2 - (1 + 2^-22) = 2^-46; in two roundings it would be 0.
        fma.rn.f32 rrrr: 0x3f800001 0x3f800001 0xbf800002 = 0x28800000
        fma.rn.f32 rrrr: inf 0 1.0 = nan, inf 1.0 -inf = nan, payload 1.0 1.0 = nan
        fma.rn.f32 rrrr: max 2.0 -inf = -inf, max 2.0 0xff7fffff = max
        fma.rz.f32 rrrr: 1.0 1.0 tiny = 1.0, 1.0 1.0 -tiny = 0x3f7fffff
        fma.rp.f32 rrrr: 1.0 1.0 tiny = 0x3f800001, 1.0 1.0 -tiny = 1.0
        fma.rm.f32 rrrr: 1.0 1.0 -tiny = 0x3f7fffff, 1.0 1.0 -1.0 = -0.0
        // 1 - 3 * 2^-55: the nearest f64 is odd already.
        fma.rz.f32 rrrr: 0xa4c00000 1.0 1.0 = 0x3f7fffff
        // The least subnormal squared is far below every f32.
        fma.rp.f32 rrrr: 1 1 1.0 = 0x3f800001, 1 1 0 = 1, 1 1 -1.0 = 0xbf7fffff
        fma.rz.f32 rrrr: 1 1 0 = 0, 1 1 -1.0 = 0xbf7fffff
        ",
    );
}

#[test]
fn min_max_f32() {
    check(
        "
        min.f32 rrr: 1.0 2.0 = 1.0, 0 -0.0 = -0.0, -0.0 0 = -0.0
        max.f32 rrr: 1.0 2.0 = 2.0, 0 -0.0 = 0, -0.0 0 = 0
        min.f32 rrr: quiet 2.0 = 2.0, 2.0 quiet = 2.0, quiet payload = nan
        max.f32 rrr: quiet -inf = -inf, payload payload = nan
        min.NaN.f32 rrr: quiet 2.0 = nan, 1.0 2.0 = 1.0
        max.NaN.f32 rrr: 2.0 payload = nan
        ",
    );
}

#[test]
fn neg_abs_copysign_f32() {
    check(
        "
        neg.f32 rr: 1.0 = -1.0, 0 = -0.0, -inf = inf
        abs.f32 rr: -1.0 = 1.0, -0.0 = 0
        copysign.f32 rrr: -0.0 1.0 = -1.0, 1.0 -inf = inf
        ",
    );
}

#[test]
fn div_sqrt_rcp_f32() {
    check(
        "
        div.rn.f32 rrr: 1.0 0x40400000 = 0x3eaaaaab, 0 0 = nan, 1.0 -0.0 = -inf
        sqrt.rn.f32 rr: 2.0 = 0x3fb504f3, -1.0 = nan, -0.0 = -0.0
        rcp.rn.f32 rr: 0x40400000 = 0x3eaaaaab, 0 = inf, quiet = nan
        ",
    );
}

// Comparison and selection

#[test]
fn setp_integer() {
    for (op, expected) in [
        ("eq", [0, 1, 0]),
        ("ne", [1, 0, 1]),
        ("lt", [1, 0, 0]),
        ("le", [1, 1, 0]),
        ("gt", [0, 0, 1]),
        ("ge", [0, 1, 1]),
    ] {
        let [less, same, more] = expected;
        for (ty, kind) in [("16", 'h'), ("32", 'r'), ("64", 'd')] {
            check(&format!(
                "setp.{op}.s{ty} p{kind}{kind}: -1 1 = {less}, 1 1 = {same}, 1 -1 = {more}
                 setp.{op}.u{ty} p{kind}{kind}: 1 -1 = {less}, -1 -1 = {same}, -1 1 = {more}"
            ));
        }
    }
    check(
        "
        setp.lo.u32 prr: 1 -1 = 1, 1 1 = 0
        setp.ls.u32 prr: 1 1 = 1, 2 1 = 0
        setp.hi.u32 prr: -1 1 = 1, 1 1 = 0
        setp.hs.u64 pdd: 1 1 = 1, 0 1 = 0
        setp.eq.b32|1 pr: 1 = 1, 0 = 0
        setp.ne.b64 pdd: 1 1 = 0, 1<<63 0 = 1
        setp.eq.b16 phh: 5 5 = 1
        ",
    );
}

#[test]
fn setp_f32() {
    // Columns: less, equal (of two signs), greater, NaN.
    for (op, expected) in [
        ("eq", [0, 1, 0, 0]),
        ("ne", [1, 0, 1, 0]),
        ("lt", [1, 0, 0, 0]),
        ("le", [1, 1, 0, 0]),
        ("gt", [0, 0, 1, 0]),
        ("ge", [0, 1, 1, 0]),
        ("equ", [0, 1, 0, 1]),
        ("neu", [1, 0, 1, 1]),
        ("ltu", [1, 0, 0, 1]),
        ("leu", [1, 1, 0, 1]),
        ("gtu", [0, 0, 1, 1]),
        ("geu", [0, 1, 1, 1]),
        ("num", [1, 1, 1, 0]),
        ("nan", [0, 0, 0, 1]),
    ] {
        let [less, same, more, unordered] = expected;
        check(&format!(
            "setp.{op}.f32 prr: 1.0 2.0 = {less}, 0 -0.0 = {same}, 1.0 -inf = {more}
             setp.{op}.f32 prr: 1.0 quiet = {unordered}, payload payload = {unordered}"
        ));
    }
}

#[test]
fn setp_combines() {
    check(
        "
        setp.lt.and.s32 prrp: 1 2 1 = 1, 1 2 0 = 0, 2 1 1 = 0
        setp.lt.or.s32 prrp: 1 2 0 = 1, 2 1 0 = 0, 2 1 1 = 1
        setp.lt.xor.s32 prrp: 1 2 1 = 0, 1 2 0 = 1
        // The second destination gets the negated comparison, combined the same way; `!` negates c.
        ",
    );
    let both = "ld.param.u64 %d0, [p+8]; setp.ne.u64 %p0, %d0, 0; setp.eq.and.u64 %p1|%p2, %d0, 7, !%p0;
                setp.eq.and.u64 %p3|%p4, %d0, 7, %p0; selp.u64 %d1, 1, 0, %p1; selp.u64 %d2, 2, 0, %p2;
                selp.u64 %d3, 4, 0, %p3; selp.u64 %d4, 8, 0, %p4; or.b64 %d20, %d1, %d2;
                or.b64 %d20, %d20, %d3; or.b64 %d20, %d20, %d4;";
    assert_eq!(one_thread(both, &[7]), Ok(4));
    assert_eq!(one_thread(both, &[5]), Ok(8));
    assert_eq!(one_thread(both, &[0]), Ok(2));
}

#[test]
fn selp_slct() {
    check(
        "
        selp.b32 rrrp: 5 6 1 = 5, 5 6 0 = 6
        selp.u64 dddp: 5 -1 0 = -1
        selp.b16 hhhp: 5 6 1 = 5
        selp.f32 rrrp: 1.0 2.0 0 = 2.0
        slct.u32.s32 rrrr: 5 6 0 = 5, 5 6 -1 = 6
        slct.b64.s32 dddr: 5 6 1 = 5
        slct.f32.f32 rrrr: 1.0 2.0 -0.0 = 1.0, 1.0 2.0 quiet = 2.0, 1.0 2.0 -1.0 = 2.0
        ",
    );
}

// Moves and conversions

#[test]
fn mov() {
    check(
        "
        mov.b16 hh: 0xabcd = 0xabcd
        mov.u32 rr: 1<<31 = 1<<31
        mov.b64 dd: -1 = -1
        mov.f32|0f3F800000 r: = 1.0
        mov.u64|-2 d: = 0xfffffffffffffffe
        mov.b32|0xFFFFFFFF r: = -1
        mov.f64|0d3FF0000000000000 d: = 0x3ff0000000000000
        ",
    );
}

#[test]
fn mov_packs_and_unpacks() {
    let load = "ld.param.u64 %d0, [p+8]; cvt.u32.u64 %r0, %d0;";
    let pack = |rest: &str| one_thread(&format!("{load} {rest}"), &[0x1122_3344_5566_7788]);
    assert_eq!(
        pack("mov.b32 {%h0, %h1}, %r0; mov.b32 %r1, {%h1, %h0}; cvt.u64.u32 %d20, %r1;"),
        Ok(0x7788_5566)
    );
    assert_eq!(
        pack("mov.b64 {%r1, %r2}, %d0; mov.b64 %d20, {%r2, %r1};"),
        Ok(0x5566_7788_1122_3344)
    );
    assert_eq!(
        pack("mov.b64 {%h0, %h1, %h2, %h3}, %d0; mov.b64 %d20, {%h3, %h2, %h1, %h0};"),
        Ok(0x7788_5566_3344_1122)
    );
    assert_eq!(
        pack("mov.b32 {_, %h1}, %r0; mov.b32 %r1, {0, %h1}; cvt.u64.u32 %d20, %r1;"),
        Ok(0x5566_0000)
    );
}

#[test]
fn cvt_integer() {
    check(
        "
        cvt.u64.u32 dr: -1 = 0xffffffff
        cvt.s64.s32 dr: -1 = -1
        cvt.u64.s32 dr: -1 = -1
        cvt.u32.u64 rd: 0x123456789 = 0x23456789
        cvt.s32.s16 rh: 0x8000 = 0xffff8000
        // The source may be wider than its type, and the destination: it is extended.
        cvt.s32.s16 rr: 0x18000 = 0xffff8000
        cvt.u32.u8 rr: 0x1ff = 0xff
        cvt.s32.s8 rr: 0x80 = 0xffffff80
        cvt.s8.s32 rr: 0x180 = 0xffffff80
        cvt.u8.u32 hr: 0x180 = 0x80
        cvt.u16.u32 hr: 0x12345 = 0x2345
        cvt.sat.u8.s32 rr: 300 = 255, -1 = 0, 77 = 77
        cvt.sat.s8.s32 rr: 300 = 127, 0xffffff00 = 0xffffff80
        cvt.sat.s32.u32 rr: -1 = 0x7fffffff
        cvt.sat.u32.s64 rd: -1 = 0, 1<<40 = -1
        ",
    );
}

#[test]
fn cvt_integer_to_float() {
    check(
        "
        cvt.rn.f32.s32 rr: -1 = -1.0, 0x1000001 = 0x4b800000, 0x1000003 = 0x4b800002
        cvt.rz.f32.s32 rr: 0x1000003 = 0x4b800001, 0xfefffffd = 0xcb800001
        cvt.rp.f32.u32 rr: 0x1000001 = 0x4b800001, -1 = 0x4f800000
        cvt.rm.f32.s32 rr: 0xfeffffff = 0xcb800001, 0x1000001 = 0x4b800000
        cvt.rn.f32.u64 rd: -1 = 0x5f800000, 0 = 0
        cvt.rz.f32.u64 rd: -1 = 0x5f7fffff
        // 2^63 + 2^39 is halfway between two f32; one more decides it.
        cvt.rn.f32.u64 rd: 0x8000008000000000 = 0x5f000000, 0x8000008000000001 = 0x5f000001
        cvt.rn.f32.s64 rd: 1<<63 = 0xdf000000
        cvt.rn.f32.u8 rr: 0x1ff = 0x437f0000
        cvt.rn.f32.s16 rh: 0xffff = -1.0
        cvt.rn.f16.s32 hr: 65519 = 0x7bff, 65520 = 0x7c00, 2049 = 0x6800
        cvt.rz.f16.u32 hr: 70000 = 0x7bff
        ",
    );
}

#[test]
fn cvt_float_to_integer() {
    check(
        "
        cvt.rni.s32.f32 rr: 0.5 = 0, 1.5 = 2, 2.5 = 2, -1.5 = 0xfffffffe
        cvt.rzi.s32.f32 rr: 1.5 = 1, -1.5 = -1
        cvt.rmi.s32.f32 rr: 1.5 = 1, -1.5 = 0xfffffffe
        cvt.rpi.s32.f32 rr: 1.5 = 2, -1.5 = -1
        // Out of range clamps; NaN is 0, or the top bit where the result has 64.
        cvt.rzi.s32.f32 rr: inf = 0x7fffffff, -inf = 1<<31, quiet = 0, 0x4f000000 = 0x7fffffff
        cvt.rzi.u32.f32 rr: -1.0 = 0, 0x4f800000 = -1, 0x4f7fffff = 0xffffff00
        cvt.rzi.s64.f32 dr: quiet = 1<<63, inf = 0x7fffffffffffffff, -1.0 = -1
        cvt.rzi.u64.f32 dr: quiet = 1<<63, inf = -1, 0x5f800000 = -1
        cvt.rzi.s8.f32 rr: 0x43480000 = 127, 0xc3480000 = 0xffffff80
        cvt.rzi.sat.u8.f32 rr: 0x43960000 = 255
        cvt.rni.s32.f16 rh: 0x3e00 = 2, 0x7e00 = 0, 0x7c00 = 0x7fffffff
        ",
    );
}

#[test]
fn cvt_to_integral_f32() {
    check(
        "
        cvt.rni.f32.f32 rr: 0.5 = 0, 1.5 = 2.0, 0xbf000000 = -0.0, payload = nan
        cvt.rzi.f32.f32 rr: -1.5 = -1.0, inf = inf
        cvt.rmi.f32.f32 rr: -1.5 = 0xc0000000, 0.5 = 0
        cvt.rpi.f32.f32 rr: 1.5 = 2.0, 0xbf000000 = -0.0
        cvt.sat.f32.f32 rr: 2.0 = 1.0, -1.0 = 0, quiet = 0, 0.5 = 0.5, -0.0 = 0
        cvt.rni.sat.f32.f32 rr: 0x3f400000 = 1.0
        ",
    );
}

#[test]
fn cvt_f16() {
    check(
        "
        // 1 + 2^-11 is halfway between 1 and the next f16.
        cvt.rn.f16.f32 hr: 1.0 = 0x3c00, 0x3f801000 = 0x3c00, 0x3f801001 = 0x3c01
        cvt.rn.f16.f32 hr: 0x3f803000 = 0x3c02
        cvt.rz.f16.f32 hr: 0x3f801fff = 0x3c00, 0xbf801fff = 0xbc00, max = 0x7bff
        cvt.rp.f16.f32 hr: 0x3f800001 = 0x3c01, 0xbf801fff = 0xbc00, max = 0x7c00
        cvt.rm.f16.f32 hr: 0xbf800001 = 0xbc01, 0x3f801fff = 0x3c00, max = 0x7bff
        // 65520 is the first value that rounds to infinity.
        cvt.rn.f16.f32 hr: 0x477fefff = 0x7bff, 0x477ff000 = 0x7c00, -inf = 0xfc00
        // 2^-24 is the least subnormal, half of it a tie to zero.
        cvt.rn.f16.f32 hr: 0x33800000 = 1, 0x33000000 = 0, 0x33000001 = 1, 0xb3000000 = 0x8000
        cvt.rn.f16.f32 hr: quiet = 0x7fff, payload = 0x7fff, 0x387fffff = 0x400
        cvt.f32.f16 rh: 0x3c00 = 1.0, 0xfc00 = -inf, 1 = 0x33800000, 0x8000 = -0.0, 0xfe01 = nan
        cvt.rn.f16x2.f32 rrr: 1.0 2.0 = 0x3c004000, quiet -1.0 = 0x7fffbc00
        cvt.rz.f16x2.f32 rrr: 0x3f801fff max = 0x3c007bff
        ",
    );
}

#[test]
fn cvt_bf16() {
    check(
        "
        cvt.rn.bf16.f32 hr: 1.0 = 0x3f80, 0x3f808000 = 0x3f80, 0x3f808001 = 0x3f81
        cvt.rn.bf16.f32 hr: 0x3f818000 = 0x3f82
        cvt.rn.bf16.f32 hr: max = 0x7f80, 0xff7f7fff = 0xff7f, quiet = 0x7fff, payload = 0x7fff
        cvt.rn.bf16.f32 hr: 0x8000 = 0, 0x8001 = 1, 0x80018000 = 0x8002
        cvt.rz.bf16.f32 hr: 0x3f80ffff = 0x3f80, max = 0x7f7f, quiet = 0x7fff
        cvt.f32.bf16 rh: 0x3f80 = 1.0, 0x8000 = -0.0, 1 = 0x10000, 0x7f81 = nan
        cvt.rn.bf16x2.f32 rrr: 1.0 2.0 = 0x3f804000, quiet -inf = 0x7fffff80
        cvt.rz.bf16x2.f32 rrr: 0x3f80ffff max = 0x3f807f7f
        ",
    );
}

#[test]
fn cvt_e4m3() {
    check(
        "
        // The first operand becomes the upper byte.
        cvt.rn.satfinite.e4m3x2.f32 hrr: 1.0 2.0 = 0x3840, -1.0 0.5 = 0xb830
        // 1.0625 is halfway between 1 and 1.125, and 1.1875 between that and 1.25.
        cvt.rn.satfinite.e4m3x2.f32 hrr: 1.0625 1.1875 = 0x383a, 0x3f880001 0x3f97ffff = 0x3939
        cvt.rn.satfinite.e4m3x2.f32 hrr: 1.9375 1.9374 = 0x403f
        // 448 is the largest number.
        cvt.rn.satfinite.e4m3x2.f32 hrr: 432.0 431.9 = 0x7e7d, 464.0 -480.0 = 0x7efe
        cvt.rn.satfinite.e4m3x2.f32 hrr: max -inf = 0x7efe, inf 449.0 = 0x7e7e
        // Below 2^-6 numbers are multiples of 2^-9, and half of one is a tie to zero.
        cvt.rn.satfinite.e4m3x2.f32 hrr: 0x3c800000 0x3c700000 = 0x0808, 0x3c6fffff 0x3b000000 = 0x0701
        cvt.rn.satfinite.e4m3x2.f32 hrr: 0x3a800000 0x3a800001 = 0x0001, 0x3b400000 0xbac00000 = 0x0281
        cvt.rn.satfinite.e4m3x2.f32 hrr: 0.0 -0.0 = 0x0080, 1 0x80000001 = 0x0080
        // A NaN has the sign of its operand.
        cvt.rn.satfinite.e4m3x2.f32 hrr: quiet payload = 0x7fff, nan 0xff800001 = 0x7fff
        ",
    );
}

// What must be refused

#[track_caller]
fn refused(body: &str) {
    let error = one_thread(body, &[1]).expect_err(body);
    assert!(error.starts_with("PTX line "), "{body}: {error}");
}

#[test]
fn whatever_is_not_listed_is_refused() {
    for body in [
        // Modifiers
        "add.ftz.f32 %r0, %r1, %r2;",
        "add.sat.f32 %r0, %r1, %r2;",
        "add.sat.s32 %r0, %r1, %r2;",
        "add.s32.wide %r0, %r1, %r2;",
        "add.rni.f32 %r0, %r1, %r2;",
        "sub.cc.s16 %h0, %h1, %h2;",
        "mul.s32 %r0, %r1, %r2;",
        "mul.rn.ftz.f32 %r0, %r1, %r2;",
        "mul.wide.u64 %d0, %d1, %d2;",
        "mad.wide.cc.u32 %d0, %r1, %r2, %d3;",
        "mad.hi.sat.s32 %r0, %r1, %r2, %r3;",
        "fma.f32 %r0, %r1, %r2, %r3;",
        "fma.rn.relu.f32 %r0, %r1, %r2, %r3;",
        "div.f32 %r0, %r1, %r2;",
        "div.approx.f32 %r0, %r1, %r2;",
        "div.full.f32 %r0, %r1, %r2;",
        "sqrt.approx.f32 %r0, %r1;",
        "rcp.approx.ftz.f32 %r0, %r1;",
        "min.ftz.f32 %r0, %r1, %r2;",
        "min.xorsign.abs.f32 %r0, %r1, %r2;",
        "neg.u32 %r0, %r1;",
        "abs.ftz.f32 %r0, %r1;",
        "and.s32 %r0, %r1, %r2;",
        "shl.u32 %r0, %r1, %r2;",
        "shf.l.b32 %r0, %r1, %r2, %r3;",
        "prmt.b32.f4e %r0, %r1, %r2, %r3;",
        "lop3.or.b32 %r0|%p0, %r1, %r2, %r3, 5, %p1;",
        "setp.lt.b32 %p0, %r1, %r2;",
        "setp.lo.s32 %p0, %r1, %r2;",
        "setp.ltu.s32 %p0, %r1, %r2;",
        "setp.eq.ftz.f32 %p0, %r1, %r2;",
        "setp.eq.f16 %p0, %h1, %h2;",
        "cvt.f16.f32 %h0, %r1;",
        "cvt.rn.satfinite.f16.f32 %h0, %r1;",
        "cvt.rn.satfinite.e5m2x2.f32 %h0, %r1, %r2;",
        "cvt.rz.satfinite.e4m3x2.f32 %h0, %r1, %r2;",
        "cvt.rn.e4m3x2.f32 %h0, %r1, %r2;",
        "cvt.rn.satfinite.relu.e4m3x2.f32 %h0, %r1, %r2;",
        "cvt.rn.satfinite.e4m3x2.f16x2 %h0, %r1;",
        "cvt.rn.satfinite.e4m3x2.f32 %r0, %r1, %r2;",
        "prefetch.L2 [%d1];",
        "prefetch.local.L2 [%d1];",
        "prefetch.global.L2::evict_last [%d1];",
        "prefetch.global.L2 [%r1];",
        "cvt.rn.relu.f16.f32 %h0, %r1;",
        "cvt.rp.bf16.f32 %h0, %r1;",
        "cvt.rna.tf32.f32 %r0, %r1;",
        "cvt.rn.ftz.f16.f32 %h0, %r1;",
        "cvt.rn.f32.f16 %r0, %h1;",
        "cvt.rn.s32.f32 %r0, %r1;",
        "cvt.f32.s32 %r0, %r1;",
        "cvt.rni.s32.s64 %r0, %d1;",
        "cvt.f32.f32 %r0, %r1;",
        "cvt.rn.f64.s32 %d0, %r1;",
        "ld.volatile.global.u32 %r0, [%d0];",
        "ld.relaxed.gpu.global.u32 %r0, [%d0];",
        "ld.global.L2::cache_hint.u32 %r0, [%d0], %d1;",
        "ld.shared.nc.u32 %r0, [%r1];",
        "ld.global.v8.b32 {%r0,%r1,%r2,%r3,%r4,%r5,%r6,%r7}, [%d0];",
        "ld.global.v4.u64 {%d0,%d1,%d2,%d3}, [%d4];",
        "ld.global.v2.u32 %r0, [%d0];",
        "ld.global.f16 %h0, [%d0];",
        "st.global.nc.u32 [%d0], %r0;",
        "st.param.u32 [p], %r0;",
        "st.release.gpu.global.u32 [%d0], %r0;",
        "bar.sync %r0;",
        "bar.sync 0, 64;",
        "bar.arrive 0, 64;",
        "bar.warp.sync -1;",
        "shfl.idx.b32 %r0, %r1, %r2, %r3;",
        "vote.all.pred %p0, %p1;",
        "fence.proxy.async;",
        // Opcodes
        "atom.global.add.u32 %r0, [%d0], %r1;",
        "red.global.add.u32 [%d0], %r1;",
        "add.f64 %d0, %d1, %d2;",
        "add.f16 %h0, %h1, %h2;",
        "ex2.approx.f32 %r0, %r1;",
        "sin.approx.f32 %r0, %r1;",
        "call.uni foo, ();",
        "brx.idx %r0, table;",
        "nonsense %r0;",
        // Operands
        "add.s32 %r0, %r1;",
        "add.s32 %r0, %r1, %r2, %r3;",
        "add.s32 %r0, %r1, %r32;",
        "add.s32 %r0, %r1, %r01;",
        "add.s32 %r0, %r1, %d2;",
        "add.s32 %r0, %r1, 4294967296;",
        "add.s32 %r0, %r1, -2147483649;",
        "add.s32 %r0, %r1, 0f3F800000;",
        "add.f32 %r0, %r1, 1;",
        "add.f32 %r0, %r1, 1.0;",
        "add.s32 %r0, %r1, %p2;",
        "add.s32 5, %r1, %r2;",
        "mov.u32 %r0, %clock;",
        "mov.u32 %r0, %tid;",
        "mov.u32 %r0, %tid.w;",
        "mov.u64 %d0, %tid.x;",
        "mov.u64 %d0, nowhere;",
        "mov.b32 %r0, {%h0, %h1, %h2};",
        "selp.b32 %r0, %r1, %r2, !%p0;",
        "@%r0 bra L; L:",
        "ld.global.u32 %r0, [%r1];",
        "ld.global.u32 %r0, [p];",
        "ld.param.u32 %r0, [q];",
        "ld.global.u32 %h0, [%d0];",
        "cvta.to.global.u32 %r0, %r1;",
        // Structure
        "bra nowhere;",
        "L: L:",
        ".reg .b32 %r<4>;",
        ".reg .b128 %q;",
        ".pragma \"frequency 3\";",
        ".branchtargets a, b;",
        "{ .reg .b32 inner; } mov.b32 inner, 0;",
        "{ L: } bra L;",
        "add.s32 %r0, %r1, %r2",
    ] {
        refused(body);
    }
    refused(".reg .b32 family<4>; mov.u32 family, 1;");
    // A register type that cannot hold the operand's.
    refused(".reg .f32 f; add.s32 f, %r1, %r2;");
    refused(".reg .u32 u; add.f32 u, %r1, %r2;");
}

#[test]
fn an_error_names_its_line() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.entry k()\n{\n.reg .b32 %r<2>;\n\
                mov.u32 %r0, 1;\nfrob.u32 %r1, %r0;\nret;\n}\n";
    let error = Module::parse(text).expect_err("frob is no opcode");
    assert_eq!((error.line, error.text.as_str()), (8, "frob.u32 %r1, %r0;"));
    assert!(error.to_string().contains("frob.u32 is not implemented"));
}

#[test]
fn undefined_registers_are_faults() {
    let error = one_thread("add.s32 %r1, %r2, 1; cvt.u64.u32 %d20, %r1;", &[]).unwrap_err();
    assert!(error.contains("register %r2 is read before"), "{error}");
    let error = one_thread("@%p7 mov.u64 %d20, 1;", &[]).unwrap_err();
    assert!(error.contains("register %p7 is read before"), "{error}");
}
