//! The opcodes that need no decoding of their own, and the type lists of all.

use crate::inst::*;

pub const INTEGERS: &[Ty] = &[Ty::U16, Ty::U32, Ty::U64, Ty::S16, Ty::S32, Ty::S64];
pub const NARROW: &[Ty] = &[Ty::U16, Ty::U32, Ty::S16, Ty::S32];
pub const WIDE: &[Ty] = &[Ty::U32, Ty::U64, Ty::S32, Ty::S64];
pub const SIGNED: &[Ty] = &[Ty::S16, Ty::S32, Ty::S64];
pub const BITS: &[Ty] = &[Ty::B16, Ty::B32, Ty::B64];
pub const DATA: &[Ty] = &[
    Ty::B16,
    Ty::B32,
    Ty::B64,
    Ty::U16,
    Ty::U32,
    Ty::U64,
    Ty::S16,
    Ty::S32,
    Ty::S64,
    Ty::F32,
    Ty::F64,
];
pub const MEMORY: &[Ty] = &[
    Ty::B8,
    Ty::B16,
    Ty::B32,
    Ty::B64,
    Ty::U8,
    Ty::U16,
    Ty::U32,
    Ty::U64,
    Ty::S8,
    Ty::S16,
    Ty::S32,
    Ty::S64,
    Ty::F32,
    Ty::F64,
];
pub const CONVERTIBLE: &[Ty] = &[
    Ty::U8,
    Ty::U16,
    Ty::U32,
    Ty::U64,
    Ty::S8,
    Ty::S16,
    Ty::S32,
    Ty::S64,
    Ty::F16,
    Ty::Bf16,
    Ty::F32,
];

pub fn round(name: &str) -> Round {
    match name {
        "rz" | "rzi" => Round::Zero,
        "rm" | "rmi" => Round::Down,
        "rp" | "rpi" => Round::Up,
        _ => Round::Nearest,
    }
}

/// Opcodes with one destination and sources whose types all follow from the last modifier. What
/// stands before that modifier is compared as a whole.
pub fn regular(opcode: &str) -> Option<(Op, Ty, Vec<Ty>)> {
    let (stem, ty) = opcode.rsplit_once('.')?;
    let ty = Ty::parse(ty)?;
    if ty == Ty::F32 {
        let float = regular_f32(stem).map(|(op, sources)| (op, ty, vec![ty; sources]));
        return float.or_else(|| slct(stem, ty));
    }
    let integer = INTEGERS.contains(&ty);
    let (narrow, wide) = (NARROW.contains(&ty), WIDE.contains(&ty));
    let signed = SIGNED.contains(&ty);
    let bits = BITS.contains(&ty);
    let wide_bits = matches!(ty, Ty::B32 | Ty::B64);
    let one = |op| Some((Op::Int1(op, ty), ty, vec![ty]));
    let count = |op| Some((Op::Int1(op, ty), Ty::U32, vec![ty]));
    let two = |op| Some((Op::Int2(op, ty), ty, vec![ty; 2]));
    let shift = |op| Some((Op::Int2(op, ty), ty, vec![ty, Ty::U32]));
    let mad = |part| Some((Op::Mad(part, ty), ty, vec![ty; 3]));
    let shf = |left, wrap| Some((Op::Shf { left, wrap }, ty, vec![ty, ty, Ty::U32]));
    let chain = |op, sources, carry_in, carry_out| {
        let op = Op::Chain {
            op,
            ty,
            carry_in,
            carry_out,
        };
        Some((op, ty, vec![ty; sources]))
    };
    match stem {
        "add" if integer => two(Int2::Add),
        "sub" if integer => two(Int2::Sub),
        "mul.lo" if integer => two(Int2::MulLo),
        "mul.hi" if integer => two(Int2::MulHi),
        "mul.wide" if narrow => Some((Op::Int2(Int2::MulWide, ty), ty.doubled(), vec![ty; 2])),
        "mad.lo" if integer => mad(Part::Lo),
        "mad.hi" if integer => mad(Part::Hi),
        "mad.wide" if narrow => {
            let sources = vec![ty, ty, ty.doubled()];
            Some((Op::Mad(Part::Wide, ty), ty.doubled(), sources))
        }
        "add.cc" if wide => chain(Chain::Add, 2, false, true),
        "addc" if wide => chain(Chain::Add, 2, true, false),
        "addc.cc" if wide => chain(Chain::Add, 2, true, true),
        "sub.cc" if wide => chain(Chain::Sub, 2, false, true),
        "subc" if wide => chain(Chain::Sub, 2, true, false),
        "subc.cc" if wide => chain(Chain::Sub, 2, true, true),
        "mad.lo.cc" if wide => chain(Chain::MadLo, 3, false, true),
        "madc.lo" if wide => chain(Chain::MadLo, 3, true, false),
        "madc.lo.cc" if wide => chain(Chain::MadLo, 3, true, true),
        "mad.hi.cc" if wide => chain(Chain::MadHi, 3, false, true),
        "madc.hi" if wide => chain(Chain::MadHi, 3, true, false),
        "madc.hi.cc" if wide => chain(Chain::MadHi, 3, true, true),
        "div" if integer => two(Int2::Div),
        "rem" if integer => two(Int2::Rem),
        "min" if integer => two(Int2::Min),
        "max" if integer => two(Int2::Max),
        "neg" if signed => one(Int1::Neg),
        "abs" if signed => one(Int1::Abs),
        "and" if bits => two(Int2::And),
        "or" if bits => two(Int2::Or),
        "xor" if bits => two(Int2::Xor),
        "not" if bits => one(Int1::Not),
        "shl" if bits => shift(Int2::Shl),
        "shr" if bits || integer => shift(Int2::Shr),
        "shf.l.wrap" if ty == Ty::B32 => shf(true, true),
        "shf.l.clamp" if ty == Ty::B32 => shf(true, false),
        "shf.r.wrap" if ty == Ty::B32 => shf(false, true),
        "shf.r.clamp" if ty == Ty::B32 => shf(false, false),
        "prmt" if ty == Ty::B32 => Some((Op::Prmt, ty, vec![ty; 3])),
        "bfe" if wide => Some((Op::Bfe(ty), ty, vec![ty, Ty::U32, Ty::U32])),
        "bfi" if wide_bits => Some((Op::Bfi(ty), ty, vec![ty, ty, Ty::U32, Ty::U32])),
        "popc" if wide_bits => count(Int1::Popc),
        "clz" if wide_bits => count(Int1::Clz),
        "brev" if wide_bits => one(Int1::Brev),
        "bfind" if wide => count(Int1::Bfind { shift: false }),
        "bfind.shiftamt" if wide => count(Int1::Bfind { shift: true }),
        "activemask" if ty == Ty::B32 => Some((Op::ActiveMask, ty, vec![])),
        _ if ty == Ty::S32 => slct(stem, ty),
        _ => None,
    }
}

/// The same for a last modifier of `.f32`: the operation and the number of its sources.
fn regular_f32(stem: &str) -> Option<(Op, usize)> {
    let one = |op| Some((Op::Float1(op), 1));
    let two = |op| Some((Op::Float2(op), 2));
    let (name, rounding) = match stem.split_once('.') {
        Some((name, r @ ("rn" | "rz" | "rm" | "rp"))) => (name, Some(round(r))),
        _ => (stem, None),
    };
    let nearest = rounding.unwrap_or(Round::Nearest);
    match (name, rounding) {
        ("add", _) => two(Float2::Add(nearest)),
        ("sub", _) => two(Float2::Sub(nearest)),
        ("mul", _) => two(Float2::Mul(nearest)),
        ("fma", Some(round)) => Some((Op::Fma(round), 3)),
        ("div", Some(Round::Nearest)) => two(Float2::Div),
        ("sqrt", Some(Round::Nearest)) => one(Float1::Sqrt),
        ("rcp", Some(Round::Nearest)) => one(Float1::Rcp),
        ("min", None) => two(Float2::Min { nan: false }),
        ("max", None) => two(Float2::Max { nan: false }),
        ("min.NaN", None) => two(Float2::Min { nan: true }),
        ("max.NaN", None) => two(Float2::Max { nan: true }),
        ("neg", None) => one(Float1::Neg),
        ("abs", None) => one(Float1::Abs),
        ("copysign", None) => two(Float2::CopySign),
        _ => None,
    }
}

/// `slct.type.s32` and `slct.type.f32`, by their selector type.
fn slct(stem: &str, selector: Ty) -> Option<(Op, Ty, Vec<Ty>)> {
    let ty = Ty::parse(stem.strip_prefix("slct.")?).filter(|ty| DATA.contains(ty))?;
    let float = selector == Ty::F32;
    Some((Op::Slct { float }, ty, vec![ty, ty, selector]))
}
