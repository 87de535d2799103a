//! Decoded instructions: what the parser produces and the machine executes.

/// Index of a register in a warp's register file.
pub type Slot = u32;

/// Register that takes results nobody wants (`_`, a missing second destination).
pub const SINK: Slot = 0;

/// Predicate registers with a fixed meaning.
pub const PRED_FALSE: Slot = 0;
pub const PRED_TRUE: Slot = 1;
pub const PRED_SINK: Slot = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    Pred,
    Bits,
    Integer,
    Float,
}

impl Ty {
    pub fn parse(name: &str) -> Option<Ty> {
        Some(match name {
            "pred" => Ty::Pred,
            "b8" => Ty::B8,
            "b16" => Ty::B16,
            "b32" => Ty::B32,
            "b64" => Ty::B64,
            "u8" => Ty::U8,
            "u16" => Ty::U16,
            "u32" => Ty::U32,
            "u64" => Ty::U64,
            "s8" => Ty::S8,
            "s16" => Ty::S16,
            "s32" => Ty::S32,
            "s64" => Ty::S64,
            "f16" => Ty::F16,
            "f16x2" => Ty::F16x2,
            "bf16" => Ty::Bf16,
            "bf16x2" => Ty::Bf16x2,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            _ => return None,
        })
    }

    pub fn class(self) -> Class {
        match self {
            Ty::Pred => Class::Pred,
            Ty::B8 | Ty::B16 | Ty::B32 | Ty::B64 => Class::Bits,
            Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2 | Ty::F32 | Ty::F64 => Class::Float,
            _ => Class::Integer,
        }
    }

    pub fn bits(self) -> u32 {
        match self {
            Ty::Pred => 1,
            Ty::B8 | Ty::U8 | Ty::S8 => 8,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 => 16,
            Ty::B32 | Ty::U32 | Ty::S32 | Ty::F16x2 | Ty::Bf16x2 | Ty::F32 => 32,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 64,
        }
    }

    pub fn bytes(self) -> usize {
        self.bits() as usize / 8
    }

    pub fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    pub fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// The type with twice the width, as `mul.wide` gives it.
    pub fn doubled(self) -> Ty {
        match self {
            Ty::U16 => Ty::U32,
            Ty::S16 => Ty::S32,
            Ty::U32 => Ty::U64,
            _ => Ty::S64,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Param,
    Const,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Round {
    Nearest,
    Zero,
    Down,
    Up,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// The unordered forms are true when an operand is NaN.
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Logic {
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Int1 {
    Not,
    Neg,
    Abs,
    Popc,
    Clz,
    Brev,
    /// Position of the leading significant bit, or, with `shift`, the shift that brings it to the top.
    Bfind {
        shift: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Int2 {
    Add,
    Sub,
    MulLo,
    MulHi,
    MulWide,
    Div,
    Rem,
    Min,
    Max,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Lo,
    Hi,
    Wide,
}

/// Instructions that read or write the carry flag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chain {
    Add,
    Sub,
    MadLo,
    MadHi,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Float1 {
    Neg,
    Abs,
    Sqrt,
    Rcp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Float2 {
    Add(Round),
    Sub(Round),
    Mul(Round),
    Div,
    /// `nan`: a NaN operand wins instead of losing.
    Min {
        nan: bool,
    },
    Max {
        nan: bool,
    },
    CopySign,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shuffle {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    pub space: Space,
    pub ty: Ty,
    /// Elements: 1, 2 or 4.
    pub elements: u8,
    pub offset: i64,
    /// `ld.global.nc`: promises that nobody writes the bytes during the launch.
    pub non_coherent: bool,
    /// `st.relaxed`: races with no other one.
    pub relaxed: bool,
    /// Width of the destination register; a narrower loaded value is extended to it.
    pub register: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Convert {
    pub to: Ty,
    pub from: Ty,
    pub round: Round,
    /// Round a float to an integral float.
    pub integral: bool,
    pub saturate: bool,
    pub register: u8,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Op {
    Mov,
    Pack {
        element_bits: u8,
    },
    Unpack {
        element_bits: u8,
    },
    Int1(Int1, Ty),
    Int2(Int2, Ty),
    Mad(Part, Ty),
    Chain {
        op: Chain,
        ty: Ty,
        carry_in: bool,
        carry_out: bool,
    },
    Bfe(Ty),
    Bfi(Ty),
    Prmt,
    Shf {
        left: bool,
        wrap: bool,
    },
    Lop3(u8),
    Float1(Float1),
    Float2(Float2),
    Fma(Round),
    Convert(Convert),
    /// Two `f32` into the halves of one register, the first operand on top.
    ConvertPair {
        to: Ty,
        round: Round,
    },
    /// Two `f32` into the bytes of a 16-bit register as e4m3, the first operand on top.
    ConvertPairE4m3,
    Setp {
        cmp: Cmp,
        ty: Ty,
        combine: Option<Logic>,
    },
    Selp,
    Slct {
        float: bool,
    },
    PredMov,
    PredLogic(Logic),
    /// Between a window of the generic address space and the space itself: adds the constant.
    Cvta(u64),
    Ld(Access),
    St(Access),
    /// Of the line that has one byte.
    Prefetch(Access),
    Bra {
        target: u32,
        uniform: bool,
    },
    Ret,
    Trap,
    Barrier(u32),
    Shfl(Shuffle),
    Vote(Vote),
    ActiveMask,
    /// Orders nothing that the race check looks at.
    Fence,
    /// `griddepcontrol.wait`
    WaitForEarlier,
    /// `griddepcontrol.launch_dependents`
    LaunchDependents,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PredRef {
    pub slot: Slot,
    pub negated: bool,
}

impl PredRef {
    pub fn new(slot: Slot, negated: bool) -> PredRef {
        PredRef { slot, negated }
    }

    pub const TRUE: PredRef = PredRef {
        slot: PRED_TRUE,
        negated: false,
    };
}

#[derive(Clone, Copy, Debug)]
pub struct Inst {
    pub op: Op,
    pub guard: PredRef,
    pub line: u32,
    pub dst_count: u8,
    pub src_count: u8,
    pub dst: [Slot; 4],
    pub src: [Slot; 5],
    pub pred_dst: [Slot; 2],
    pub pred_src: [PredRef; 2],
}

impl Inst {
    pub fn new(op: Op) -> Inst {
        Inst {
            op,
            guard: PredRef::TRUE,
            line: 0,
            dst_count: 0,
            src_count: 0,
            dst: [SINK; 4],
            src: [SINK; 5],
            pred_dst: [PRED_SINK; 2],
            pred_src: [PredRef::TRUE; 2],
        }
    }

    pub fn sources(&self) -> &[Slot] {
        &self.src[..self.src_count as usize]
    }

    pub fn destinations(&self) -> &[Slot] {
        &self.dst[..self.dst_count as usize]
    }
}

/// Registers the program reads but cannot write.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
}

/// A register that holds the same value all through a launch.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fixed {
    Value(u64),
    /// Address of a module variable.
    Module(usize),
    /// Address of one of the function's shared or local variables.
    Shared(usize),
    Local(usize),
    Special(Special),
}

#[derive(Clone, PartialEq, Debug)]
pub struct Variable {
    pub name: String,
    pub space: Space,
    pub align: usize,
    pub size: usize,
    /// Initial bytes; empty for shared and local variables.
    pub bytes: Vec<u8>,
    /// `.extern .shared name[]`: the launch gives the size.
    pub dynamic: bool,
}

#[derive(Clone, Debug)]
pub struct Param {
    pub name: String,
    pub offset: usize,
}

#[derive(Debug)]
pub struct Function {
    pub name: String,
    pub param_size: usize,
    pub code: Vec<Inst>,
    pub slots: usize,
    pub preds: usize,
    pub fixed: Vec<(Slot, Fixed)>,
    pub shared: Vec<Variable>,
    pub local: Vec<Variable>,
    /// `.maxntid`: the most threads a block may have.
    pub max_threads: Option<u64>,
    pub required_block: Option<[u32; 3]>,
    /// First slot, count and name prefix of each register declaration, for messages.
    pub names: Vec<(Slot, u32, String)>,
    pub pred_names: Vec<(Slot, u32, String)>,
}
