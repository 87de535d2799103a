//! From the text of an instruction to [`Inst`]: names become slots, modifiers are checked against
//! what each opcode accepts, operands against the instruction's types.

use crate::inst::*;
use crate::machine::window;
use crate::parse::immediate;
use crate::regular::{CONVERTIBLE, DATA, INTEGERS, MEMORY, regular, round};
use std::collections::HashMap;

#[derive(Debug)]
pub enum Operand<'a> {
    Word(&'a str),
    Int(u64, bool),
    F32(u32),
    F64(u64),
    NotPred(&'a str),
    /// `d|p`
    Pair(&'a str, &'a str),
    Vector(Vec<Operand<'a>>),
    Address(Box<Operand<'a>>, i64),
}

pub struct Statement<'a> {
    pub line: u32,
    pub guard: Option<(&'a str, bool)>,
    pub opcode: &'a str,
    pub operands: Vec<Operand<'a>>,
}

type Parsed<T> = Result<T, String>;

const L1_HINTS: &[&str] = &[
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
];
const L2_HINTS: &[&str] = &["L2::evict_normal", "L2::evict_first", "L2::evict_last"];
const PREFETCH: &[&str] = &["L2::64B", "L2::128B", "L2::256B"];

/// The modifiers of an opcode, taken in the order of its grammar.
struct Mods<'a> {
    rest: std::iter::Peekable<std::str::Split<'a, char>>,
}

impl<'a> Mods<'a> {
    fn take(&mut self, allowed: &[&str]) -> Option<&'a str> {
        self.rest.next_if(|m| allowed.contains(m))
    }

    fn flag(&mut self, name: &str) -> bool {
        self.take(&[name]).is_some()
    }

    fn one_of(&mut self, allowed: &[&str]) -> Parsed<&'a str> {
        self.take(allowed).ok_or_else(|| match self.rest.peek() {
            Some(found) => format!("modifier .{found} is not implemented here"),
            None => format!("a modifier is missing: one of {allowed:?}"),
        })
    }

    fn ty_if(&mut self, allowed: &[Ty]) -> Option<Ty> {
        let ty = self
            .rest
            .peek()
            .and_then(|m| Ty::parse(m))
            .filter(|ty| allowed.contains(ty))?;
        self.rest.next();
        Some(ty)
    }

    /// The type, which ends most opcodes.
    fn last_ty(&mut self, allowed: &[Ty]) -> Parsed<Ty> {
        let ty = self.ty(allowed)?;
        self.end()?;
        Ok(ty)
    }

    fn ty(&mut self, allowed: &[Ty]) -> Parsed<Ty> {
        self.ty_if(allowed).ok_or_else(|| match self.rest.peek() {
            Some(found) => format!("modifier or type .{found} is not implemented here"),
            None => "the type is missing".into(),
        })
    }

    fn end(&mut self) -> Parsed<()> {
        match self.rest.next() {
            Some(extra) => Err(format!("modifier .{extra} is not implemented here")),
            None => Ok(()),
        }
    }
}

fn special(name: &str) -> Option<Special> {
    let (base, axis) = match name.split_once('.') {
        Some((base, "x")) => (base, 0),
        Some((base, "y")) => (base, 1),
        Some((base, "z")) => (base, 2),
        Some(_) => return None,
        None if name == "%laneid" => return Some(Special::LaneId),
        None if name == "%warpid" => return Some(Special::WarpId),
        None => return None,
    };
    match base {
        "%tid" => Some(Special::Tid(axis)),
        "%ntid" => Some(Special::Ntid(axis)),
        "%ctaid" => Some(Special::Ctaid(axis)),
        "%nctaid" => Some(Special::Nctaid(axis)),
        _ => None,
    }
}

#[derive(Clone, Copy)]
struct Registers {
    first: Slot,
    /// `None` for a single register, else the count of a numbered family.
    count: Option<u32>,
    ty: Ty,
}

#[derive(Default)]
struct Scope<'a> {
    parent: Option<usize>,
    registers: HashMap<&'a str, Registers>,
    labels: HashMap<&'a str, u32>,
}

/// Whether a register may be wider than the instruction's type, as in loads, stores and `cvt`.
#[derive(Clone, Copy, PartialEq)]
enum Fit {
    Exact,
    OrWider,
}

struct Jump<'a> {
    at: usize,
    scope: usize,
    label: &'a str,
}

/// The body of one kernel while it is read.
pub struct Body<'a, 'm> {
    module: &'m [Variable],
    module_names: &'m HashMap<String, usize>,
    params: &'m [Param],
    /// The architecture, as `sm_XY`.
    target: u32,
    scopes: Vec<Scope<'a>>,
    scope: usize,
    jumps: Vec<Jump<'a>>,
    code: Vec<Inst>,
    slots: Slot,
    preds: Slot,
    fixed: HashMap<Fixed, Slot>,
    shared: Vec<Variable>,
    local: Vec<Variable>,
    names: Vec<(Slot, u32, String)>,
    pred_names: Vec<(Slot, u32, String)>,
}

impl<'a, 'm> Body<'a, 'm> {
    pub fn new(
        module: &'m [Variable],
        module_names: &'m HashMap<String, usize>,
        params: &'m [Param],
        target: u32,
    ) -> Self {
        Body {
            module,
            module_names,
            params,
            target,
            scopes: vec![Scope::default()],
            scope: 0,
            jumps: Vec::new(),
            code: Vec::new(),
            slots: SINK + 1,
            preds: PRED_SINK + 1,
            fixed: HashMap::new(),
            shared: Vec::new(),
            local: Vec::new(),
            names: Vec::new(),
            pred_names: Vec::new(),
        }
    }

    pub fn open_scope(&mut self) {
        let parent = Some(self.scope);
        self.scope = self.scopes.len();
        self.scopes.push(Scope {
            parent,
            ..Scope::default()
        });
    }

    pub fn close_scope(&mut self) {
        self.scope = self.scopes[self.scope].parent.unwrap_or(0);
    }

    pub fn label(&mut self, name: &'a str) -> Parsed<()> {
        let here = self.code.len() as u32;
        match self.scopes[self.scope].labels.insert(name, here) {
            Some(_) => Err(format!("label {name} is declared twice")),
            None => Ok(()),
        }
    }

    pub fn register(&mut self, name: &'a str, count: Option<u32>, ty: Ty) -> Parsed<()> {
        let (next, names) = match ty {
            Ty::Pred => (&mut self.preds, &mut self.pred_names),
            _ => (&mut self.slots, &mut self.names),
        };
        let first = *next;
        *next = match first.checked_add(count.unwrap_or(1)) {
            Some(end) if end < 1 << 20 => end,
            _ => return Err("too many registers".into()),
        };
        names.push((first, count.unwrap_or(0), name.to_owned()));
        let registers = Registers { first, count, ty };
        match self.scopes[self.scope].registers.insert(name, registers) {
            Some(_) => Err(format!("register {name} is declared twice")),
            None => Ok(()),
        }
    }

    pub fn variable(&mut self, variable: Variable) -> Parsed<()> {
        let list = if variable.space == Space::Shared {
            &mut self.shared
        } else {
            &mut self.local
        };
        if list.iter().any(|v| v.name == variable.name) {
            return Err(format!("{} is declared twice", variable.name));
        }
        list.push(variable);
        Ok(())
    }

    pub fn instruction(&mut self, statement: &Statement<'a>) -> Parsed<()> {
        let mut inst = self.decode(statement)?;
        inst.line = statement.line;
        if let Some((name, negated)) = statement.guard {
            inst.guard = PredRef::new(self.pred(name)?, negated);
        }
        self.code.push(inst);
        Ok(())
    }

    /// Resolves the branches. An error comes with its line.
    pub fn finish(mut self, name: String) -> Result<Function, (u32, String)> {
        for jump in &self.jumps {
            let mut scope = Some(jump.scope);
            let target = loop {
                let Some(at) = scope else {
                    return Err((
                        self.code[jump.at].line,
                        format!("label {} is not declared", jump.label),
                    ));
                };
                if let Some(&target) = self.scopes[at].labels.get(jump.label) {
                    break target;
                }
                scope = self.scopes[at].parent;
            };
            if let Op::Bra { target: place, .. } = &mut self.code[jump.at].op {
                *place = target;
            }
        }
        let last_line = self.code.last().map_or(1, |i| i.line);
        let ends = self.code.last().is_some_and(|i| {
            i.guard == PredRef::TRUE && matches!(i.op, Op::Ret | Op::Trap | Op::Bra { .. })
        });
        let past_end =
            |i: &Inst| matches!(i.op, Op::Bra { target, .. } if target as usize >= self.code.len());
        if !ends || self.code.iter().any(past_end) {
            return Err((last_line, "control runs past the end of the kernel".into()));
        }
        Ok(Function {
            name,
            param_size: 0,
            code: self.code,
            slots: self.slots as usize,
            preds: self.preds as usize,
            fixed: self
                .fixed
                .into_iter()
                .map(|(fixed, slot)| (slot, fixed))
                .collect(),
            shared: self.shared,
            local: self.local,
            max_threads: None,
            required_block: None,
            names: self.names,
            pred_names: self.pred_names,
        })
    }

    // Names

    fn find(&self, name: &str) -> Option<(Slot, Ty)> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let digits = &name[stem.len()..];
        let number = match digits {
            "" => None,
            _ if digits.len() > 1 && digits.starts_with('0') => None,
            _ => digits.parse::<u32>().ok(),
        };
        let mut scope = Some(self.scope);
        while let Some(at) = scope {
            let registers = &self.scopes[at].registers;
            if let Some(r) = registers.get(name).filter(|r| r.count.is_none()) {
                return Some((r.first, r.ty));
            }
            if let (Some(number), Some(r)) = (number, registers.get(stem))
                && r.count.is_some_and(|count| number < count)
            {
                return Some((r.first + number, r.ty));
            }
            scope = self.scopes[at].parent;
        }
        None
    }

    fn fixed(&mut self, value: Fixed) -> Slot {
        *self.fixed.entry(value).or_insert_with(|| {
            self.slots += 1;
            self.slots - 1
        })
    }

    /// A variable or parameter by name: its space and the register with its address.
    fn symbol(&mut self, name: &str) -> Option<(Space, Slot)> {
        if let Some(param) = self.params.iter().find(|p| p.name == name) {
            let offset = param.offset as u64;
            return Some((Space::Param, self.fixed(Fixed::Value(offset))));
        }
        if let Some(index) = self.local.iter().position(|v| v.name == name) {
            return Some((Space::Local, self.fixed(Fixed::Local(index))));
        }
        if let Some(index) = self.shared.iter().position(|v| v.name == name) {
            return Some((Space::Shared, self.fixed(Fixed::Shared(index))));
        }
        let &index = self.module_names.get(name)?;
        let variable = &self.module[index];
        if variable.space == Space::Shared {
            // Only what a kernel names takes room in its blocks.
            self.shared.push(variable.clone());
            return Some((
                Space::Shared,
                self.fixed(Fixed::Shared(self.shared.len() - 1)),
            ));
        }
        Some((variable.space, self.fixed(Fixed::Module(index))))
    }

    fn known_symbol(&mut self, name: &str) -> Parsed<(Space, Slot)> {
        self.symbol(name)
            .ok_or_else(|| format!("{name} is not declared"))
    }

    // Operands

    fn check(name: &str, register: Ty, wanted: Ty, fit: Fit) -> Parsed<()> {
        let (have, want) = (register.class(), wanted.class());
        let class_fits = have == want || have == Class::Bits || want == Class::Bits;
        let wider = fit == Fit::OrWider && want != Class::Float && register.bits() > wanted.bits();
        if register != Ty::Pred && class_fits && (wider || register.bits() == wanted.bits()) {
            Ok(())
        } else {
            Err(format!(
                "register {name} of type {register:?} does not fit an operand of type {wanted:?}"
            ))
        }
    }

    fn source(&mut self, operand: &Operand<'a>, ty: Ty, fit: Fit) -> Parsed<Slot> {
        let Operand::Word(name) = operand else {
            return Ok(self.fixed(Fixed::Value(immediate(operand, ty)?)));
        };
        if let Some((slot, register)) = self.find(name) {
            Self::check(name, register, ty, fit)?;
            return Ok(slot);
        }
        if let Some(special) = special(name) {
            Self::check(name, Ty::U32, ty, fit)?;
            return Ok(self.fixed(Fixed::Special(special)));
        }
        Err(format!("{name} is not a register"))
    }

    /// The slot and the register's width.
    fn destination(&self, operand: &Operand<'a>, ty: Ty, fit: Fit) -> Parsed<(Slot, u8)> {
        match operand {
            Operand::Word("_") => Ok((SINK, ty.bits() as u8)),
            Operand::Word(name) => {
                let (slot, register) = self
                    .find(name)
                    .ok_or_else(|| format!("{name} is not a register"))?;
                Self::check(name, register, ty, fit)?;
                Ok((slot, register.bits() as u8))
            }
            _ => Err(format!("{operand:?} is not a destination")),
        }
    }

    fn pred(&self, name: &str) -> Parsed<Slot> {
        match self.find(name) {
            Some((slot, Ty::Pred)) => Ok(slot),
            _ => Err(format!("{name} is not a predicate register")),
        }
    }

    fn pred_register(&self, operand: &Operand<'a>) -> Parsed<Slot> {
        match operand {
            Operand::Word(name) => self.pred(name),
            _ => Err(format!("{operand:?} is not a predicate register")),
        }
    }

    fn pred_source(&self, operand: &Operand<'a>) -> Parsed<PredRef> {
        match operand {
            Operand::Word(name) => Ok(PredRef::new(self.pred(name)?, false)),
            Operand::NotPred(name) => Ok(PredRef::new(self.pred(name)?, true)),
            Operand::Int(0, _) => Ok(PredRef::new(PRED_FALSE, false)),
            Operand::Int(1, _) => Ok(PredRef::TRUE),
            _ => Err(format!("{operand:?} is not a predicate")),
        }
    }

    fn address(&mut self, operand: &Operand<'a>, space: Space) -> Parsed<(Slot, i64)> {
        let Operand::Address(base, offset) = operand else {
            return Err(format!("{operand:?} is not an address"));
        };
        if let Operand::Word(name) = **base
            && self.find(name).is_none()
        {
            let (home, slot) = self.known_symbol(name)?;
            if home != space {
                return Err(format!(
                    "{name} is a {home:?} variable, the access is to {space:?}"
                ));
            }
            return Ok((slot, *offset));
        }
        let narrow = matches!(base.as_ref(), Operand::Word(name)
            if self.find(name).is_some_and(|(_, ty)| ty.bits() == 32));
        let short = matches!(
            space,
            Space::Shared | Space::Local | Space::Const | Space::Param
        );
        let ty = if narrow && short { Ty::B32 } else { Ty::B64 };
        Ok((self.source(base, ty, Fit::Exact)?, *offset))
    }

    // Instructions

    /// An instruction with operands of exactly the types given.
    fn build(
        &mut self,
        op: Op,
        destinations: &[(&Operand<'a>, Ty)],
        sources: &[(&Operand<'a>, Ty)],
    ) -> Parsed<Inst> {
        let mut inst = Inst::new(op);
        inst.dst_count = destinations.len() as u8;
        for (slot, (operand, ty)) in inst.dst.iter_mut().zip(destinations) {
            *slot = self.destination(operand, *ty, Fit::Exact)?.0;
        }
        inst.src_count = sources.len() as u8;
        for (slot, (operand, ty)) in inst.src.iter_mut().zip(sources) {
            *slot = self.source(operand, *ty, Fit::Exact)?;
        }
        Ok(inst)
    }

    /// The common case: one destination, then the sources.
    fn alu(&mut self, st: &Statement<'a>, op: Op, dst: Ty, sources: &[Ty]) -> Parsed<Inst> {
        let [d, operands @ ..] = st.operands.as_slice() else {
            return Err("the operands are missing".into());
        };
        if operands.len() != sources.len() {
            let (want, have) = (sources.len() + 1, st.operands.len());
            return Err(format!("expected {want} operands, found {have}"));
        }
        let typed: Vec<_> = operands.iter().zip(sources.iter().copied()).collect();
        self.build(op, &[(d, dst)], &typed)
    }

    fn decode(&mut self, st: &Statement<'a>) -> Parsed<Inst> {
        if let Some((op, dst, sources)) = regular(st.opcode) {
            return self.alu(st, op, dst, &sources);
        }
        let mut parts = st.opcode.split('.').peekable();
        let name = parts.next().unwrap_or("");
        let mut mods = Mods { rest: parts };
        let m = &mut mods;
        match name {
            "mov" => self.mov(st, m),
            "lop3" => {
                let ty = m.last_ty(&[Ty::B32])?;
                let [d, a, b, c, Operand::Int(table, false)] = st.operands.as_slice() else {
                    return Err("expected d, a, b, c and a table".into());
                };
                let table = u8::try_from(*table).map_err(|_| "the table is wider than 8 bits")?;
                self.build(Op::Lop3(table), &[(d, ty)], &[(a, ty), (b, ty), (c, ty)])
            }
            "setp" => self.setp(st, m),
            "selp" => {
                let ty = m.last_ty(DATA)?;
                let [d, a, b, p] = exactly(&st.operands)?;
                let mut inst = self.build(Op::Selp, &[(d, ty)], &[(a, ty), (b, ty)])?;
                inst.pred_src[0].slot = self.pred_register(p)?;
                Ok(inst)
            }
            "and" | "or" | "xor" => {
                m.last_ty(&[Ty::Pred])?;
                self.pred_op(st, Op::PredLogic(logic(name)), 2)
            }
            "not" => {
                m.last_ty(&[Ty::Pred])?;
                let mut inst = self.pred_op(st, Op::PredMov, 1)?;
                inst.pred_src[0].negated ^= true;
                Ok(inst)
            }
            "cvt" => self.cvt(st, m),
            "cvta" => self.cvta(st, m),
            "ld" => self.load(st, m),
            "st" => self.store(st, m),
            "prefetch" => {
                m.one_of(&["global"])?;
                m.one_of(&["L1", "L2"])?;
                m.end()?;
                let [address] = exactly(&st.operands)?;
                let (slot, offset) = self.address(address, Space::Global)?;
                let mut inst = Inst::new(Op::Prefetch(Access {
                    space: Space::Global,
                    ty: Ty::B8,
                    elements: 1,
                    offset,
                    non_coherent: false,
                    relaxed: false,
                    register: 8,
                }));
                inst.src_count = 1;
                inst.src[0] = slot;
                Ok(inst)
            }
            "bra" => {
                let uniform = m.flag("uni");
                m.end()?;
                let [Operand::Word(label)] = exactly(&st.operands)? else {
                    return Err("expected a label".into());
                };
                self.jumps.push(Jump {
                    at: self.code.len(),
                    scope: self.scope,
                    label,
                });
                Ok(Inst::new(Op::Bra { target: 0, uniform }))
            }
            "ret" | "exit" | "trap" => {
                if name == "ret" {
                    m.flag("uni");
                }
                m.end()?;
                let [] = exactly(&st.operands)?;
                Ok(Inst::new(if name == "trap" { Op::Trap } else { Op::Ret }))
            }
            "bar" | "barrier" => {
                m.one_of(&["sync"])?;
                if name == "barrier" {
                    m.flag("aligned");
                }
                m.end()?;
                match exactly(&st.operands)? {
                    [Operand::Int(id @ 0..16, false)] => Ok(Inst::new(Op::Barrier(*id as u32))),
                    [other] => Err(format!("barrier {other:?} is not implemented")),
                }
            }
            "griddepcontrol" => {
                let what = m.one_of(&["wait", "launch_dependents"])?;
                m.end()?;
                let [] = exactly(&st.operands)?;
                if self.target < 90 {
                    return Err(format!("sm_{} has no griddepcontrol", self.target));
                }
                Ok(Inst::new(match what {
                    "wait" => Op::WaitForEarlier,
                    _ => Op::LaunchDependents,
                }))
            }
            "membar" => {
                m.one_of(&["cta", "gl", "sys"])?;
                m.end()?;
                let [] = exactly(&st.operands)?;
                Ok(Inst::new(Op::Fence))
            }
            "fence" => {
                m.one_of(&["sc", "acq_rel"])?;
                m.one_of(&["cta", "gpu", "sys"])?;
                m.end()?;
                let [] = exactly(&st.operands)?;
                Ok(Inst::new(Op::Fence))
            }
            "shfl" => {
                m.one_of(&["sync"])?;
                let mode = match m.one_of(&["up", "down", "bfly", "idx"])? {
                    "up" => Shuffle::Up,
                    "down" => Shuffle::Down,
                    "bfly" => Shuffle::Bfly,
                    _ => Shuffle::Idx,
                };
                let ty = m.last_ty(&[Ty::B32])?;
                let [d, a, b, c, mask] = exactly(&st.operands)?;
                let sources = [(a, ty), (b, ty), (c, ty), (mask, ty)];
                let Operand::Pair(d, p) = d else {
                    return self.build(Op::Shfl(mode), &[(d, ty)], &sources);
                };
                let d = Operand::Word(d);
                let mut inst = self.build(Op::Shfl(mode), &[(&d, ty)], &sources)?;
                inst.pred_dst[0] = self.pred(p)?;
                Ok(inst)
            }
            "vote" => {
                m.one_of(&["sync"])?;
                let vote = match m.one_of(&["all", "any", "uni", "ballot"])? {
                    "all" => Vote::All,
                    "any" => Vote::Any,
                    "uni" => Vote::Uni,
                    _ => Vote::Ballot,
                };
                let ballot = vote == Vote::Ballot;
                m.last_ty(&[if ballot { Ty::B32 } else { Ty::Pred }])?;
                let [d, p, mask] = exactly(&st.operands)?;
                let (op, mask) = (Op::Vote(vote), (mask, Ty::B32));
                let mut inst = if ballot {
                    self.build(op, &[(d, Ty::B32)], &[mask])?
                } else {
                    let mut inst = self.build(op, &[], &[mask])?;
                    inst.pred_dst[0] = self.pred_register(d)?;
                    inst
                };
                inst.pred_src[0] = self.pred_source(p)?;
                Ok(inst)
            }
            _ => Err(format!("opcode {} is not implemented", st.opcode)),
        }
    }

    fn mov(&mut self, st: &Statement<'a>, m: &mut Mods) -> Parsed<Inst> {
        if m.flag("pred") {
            m.end()?;
            return self.pred_op(st, Op::PredMov, 1);
        }
        let ty = m.last_ty(DATA)?;
        let [d, a] = exactly(&st.operands)?;
        let element = |n: usize| match (ty, n) {
            (Ty::B32, 2) | (Ty::B64, 4) => Ok(Ty::B16),
            (Ty::B64, 2) => Ok(Ty::B32),
            (Ty::B32, 4) => Ok(Ty::B8),
            _ => Err(format!(
                "mov between {ty:?} and {n} elements is not implemented"
            )),
        };
        match (d, a) {
            (Operand::Vector(elements), a) => {
                let part = element(elements.len())?;
                let element_bits = part.bits() as u8;
                let op = Op::Unpack { element_bits };
                let elements: Vec<_> = elements.iter().map(|e| (e, part)).collect();
                self.build(op, &elements, &[(a, ty)])
            }
            (d, Operand::Vector(elements)) => {
                let part = element(elements.len())?;
                let element_bits = part.bits() as u8;
                let op = Op::Pack { element_bits };
                let elements: Vec<_> = elements.iter().map(|e| (e, part)).collect();
                self.build(op, &[(d, ty)], &elements)
            }
            (d, Operand::Word(name)) if self.find(name).is_none() && special(name).is_none() => {
                let (space, slot) = self.known_symbol(name)?;
                let wide = matches!(space, Space::Global | Space::Const);
                let fits = ty.bits() == 64 || (ty.bits() == 32 && !wide);
                if !fits || ty.class() == Class::Float {
                    return Err(format!("an address of space {space:?} does not fit {ty:?}"));
                }
                let mut inst = self.build(Op::Mov, &[(d, ty)], &[])?;
                inst.src_count = 1;
                inst.src[0] = slot;
                Ok(inst)
            }
            _ => self.alu(st, Op::Mov, ty, &[ty]),
        }
    }

    fn pred_op(&mut self, st: &Statement<'a>, op: Op, sources: usize) -> Parsed<Inst> {
        if st.operands.len() != sources + 1 {
            return Err(format!("expected {} operands", sources + 1));
        }
        let mut inst = Inst::new(op);
        inst.pred_dst[0] = self.pred_register(&st.operands[0])?;
        for (i, operand) in st.operands[1..].iter().enumerate() {
            if matches!(operand, Operand::NotPred(_)) {
                return Err("this operand takes no negation".into());
            }
            inst.pred_src[i] = self.pred_source(operand)?;
        }
        Ok(inst)
    }

    fn setp(&mut self, st: &Statement<'a>, m: &mut Mods) -> Parsed<Inst> {
        let name = m.one_of(&[
            "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu",
            "gtu", "geu", "num", "nan",
        ])?;
        let combine = m.take(&["and", "or", "xor"]).map(logic);
        let mut types = vec![Ty::B16, Ty::B32, Ty::B64, Ty::F32];
        types.extend(INTEGERS);
        let ty = m.last_ty(&types)?;
        let cmp = match name {
            "eq" => Cmp::Eq,
            "ne" => Cmp::Ne,
            "lt" | "lo" => Cmp::Lt,
            "le" | "ls" => Cmp::Le,
            "gt" | "hi" => Cmp::Gt,
            "ge" | "hs" => Cmp::Ge,
            "equ" => Cmp::Equ,
            "neu" => Cmp::Neu,
            "ltu" => Cmp::Ltu,
            "leu" => Cmp::Leu,
            "gtu" => Cmp::Gtu,
            "geu" => Cmp::Geu,
            "num" => Cmp::Num,
            _ => Cmp::Nan,
        };
        let fits = match (name, ty.class()) {
            ("eq" | "ne", _) => true,
            ("lo" | "ls" | "hi" | "hs", class) => class == Class::Integer && !ty.signed(),
            ("lt" | "le" | "gt" | "ge", class) => class != Class::Bits,
            (_, class) => class == Class::Float,
        };
        if !fits {
            return Err(format!("comparison .{name} does not take type {ty:?}"));
        }
        let (d, a, b) = match (st.operands.as_slice(), combine) {
            ([d, a, b], None) | ([d, a, b, _], Some(_)) => (d, a, b),
            _ => return Err("wrong number of operands".into()),
        };
        let mut inst = self.build(Op::Setp { cmp, ty, combine }, &[], &[(a, ty), (b, ty)])?;
        match d {
            Operand::Pair(p, q) => inst.pred_dst = [self.pred(p)?, self.pred(q)?],
            _ => inst.pred_dst[0] = self.pred_register(d)?,
        }
        if let [_, _, _, c] = st.operands.as_slice() {
            inst.pred_src[0] = self.pred_source(c)?;
        }
        Ok(inst)
    }

    fn cvt(&mut self, st: &Statement<'a>, m: &mut Mods) -> Parsed<Inst> {
        let rounding = m.take(&["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"]);
        if m.flag("satfinite") {
            m.one_of(&["e4m3x2"])?;
            m.last_ty(&[Ty::F32])?;
            return match (rounding, self.target) {
                (_, ..89) => Err(format!("sm_{} does not convert to e4m3", self.target)),
                (Some("rn"), _) => self.alu(st, Op::ConvertPairE4m3, Ty::B16, &[Ty::F32; 2]),
                _ => Err("this cvt takes .rn".into()),
            };
        }
        let saturate = m.flag("sat");
        if let Some(to) = m.ty_if(&[Ty::F16x2, Ty::Bf16x2]) {
            m.last_ty(&[Ty::F32])?;
            let (Some(name @ ("rn" | "rz")), false) = (rounding, saturate) else {
                return Err("this cvt takes .rn or .rz".into());
            };
            let round = round(name);
            return self.alu(st, Op::ConvertPair { to, round }, to, &[Ty::F32; 2]);
        }
        let to = m.ty(CONVERTIBLE)?;
        let from = m.last_ty(CONVERTIBLE)?;
        let integral = matches!(rounding, Some("rni" | "rzi" | "rmi" | "rpi"));
        let fits = match (to, from, rounding) {
            (Ty::F32, Ty::F32, None) => saturate,
            (Ty::F32, Ty::F32, Some(_)) => integral,
            (Ty::F16, Ty::F32, Some(_)) => !integral && !saturate,
            (Ty::Bf16, Ty::F32, Some("rn" | "rz")) => !saturate,
            (Ty::F32, Ty::F16 | Ty::Bf16, None) => !saturate,
            _ => match (to.class(), from.class()) {
                (Class::Integer, Class::Integer) => rounding.is_none(),
                (Class::Integer, Class::Float) => integral,
                (Class::Float, Class::Integer) => {
                    to != Ty::Bf16 && rounding.is_some() && !integral && !saturate
                }
                _ => false,
            },
        };
        if !fits {
            return Err(format!("{} is not implemented", st.opcode));
        }
        let [d, a] = exactly(&st.operands)?;
        let (dst, register) = self.destination(d, to, Fit::OrWider)?;
        let round = rounding.map_or(Round::Nearest, round);
        let mut inst = Inst::new(Op::Convert(Convert {
            to,
            from,
            round,
            integral,
            saturate,
            register,
        }));
        inst.dst_count = 1;
        inst.dst[0] = dst;
        inst.src_count = 1;
        inst.src[0] = self.source(a, from, Fit::OrWider)?;
        Ok(inst)
    }

    fn cvta(&mut self, st: &Statement<'a>, m: &mut Mods) -> Parsed<Inst> {
        let to_space = m.flag("to");
        let space = space(m.one_of(&["global", "shared", "local", "const", "param"])?);
        let ty = m.last_ty(&[Ty::U64])?;
        let shift = if to_space {
            window(space).wrapping_neg()
        } else {
            window(space)
        };
        let [d, a] = exactly(&st.operands)?;
        let mut inst = Inst::new(Op::Cvta(shift));
        inst.dst_count = 1;
        inst.dst[0] = self.destination(d, ty, Fit::Exact)?.0;
        inst.src_count = 1;
        inst.src[0] = match a {
            Operand::Word(name) if self.find(name).is_none() => match self.symbol(name) {
                Some((home, slot)) if home == space && !to_space => slot,
                _ => return Err(format!("{name} is not a variable of space {space:?}")),
            },
            _ => self.source(a, ty, Fit::Exact)?,
        };
        Ok(inst)
    }

    fn load(&mut self, st: &Statement<'a>, m: &mut Mods) -> Parsed<Inst> {
        m.flag("weak");
        let space = m
            .take(&["global", "shared", "local", "param", "const"])
            .map_or(Space::Generic, space);
        let mut non_coherent = false;
        if matches!(space, Space::Global | Space::Generic) {
            m.take(&["ca", "cg", "cs", "lu", "cv"]);
            non_coherent = space == Space::Global && m.flag("nc");
            m.take(L1_HINTS);
            m.take(L2_HINTS);
            m.take(PREFETCH);
        }
        let (mut access, list, address) = self.access(st, m, space, true)?;
        access.non_coherent = non_coherent;
        let mut inst = Inst::new(Op::Ld(access));
        inst.dst_count = access.elements;
        let mut width = None;
        for (i, operand) in list.iter().enumerate() {
            let (slot, register) = self.destination(operand, access.ty, Fit::OrWider)?;
            inst.dst[i] = slot;
            if slot != SINK && *width.get_or_insert(register) != register {
                return Err("the destinations differ in width".into());
            }
        }
        access.register = width.unwrap_or(access.register);
        inst.op = Op::Ld(access);
        inst.src_count = 1;
        inst.src[0] = address;
        Ok(inst)
    }

    fn store(&mut self, st: &Statement<'a>, m: &mut Mods) -> Parsed<Inst> {
        let relaxed = !m.flag("weak") && m.flag("relaxed");
        if relaxed {
            m.one_of(&["cta", "gpu", "sys"])?;
        }
        let space = m
            .take(&["global", "shared", "local"])
            .map_or(Space::Generic, space);
        if matches!(space, Space::Global | Space::Generic) && !relaxed {
            m.take(&["wb", "cg", "cs", "wt"]);
            m.take(L1_HINTS);
            m.take(L2_HINTS);
        }
        let (mut access, list, address) = self.access(st, m, space, false)?;
        access.relaxed = relaxed;
        let mut inst = Inst::new(Op::St(access));
        inst.src_count = access.elements + 1;
        inst.src[0] = address;
        for (i, operand) in list.iter().enumerate() {
            inst.src[i + 1] = self.source(operand, access.ty, Fit::OrWider)?;
        }
        Ok(inst)
    }

    /// Vector width, type and operands of a load or store.
    fn access<'s>(
        &mut self,
        st: &'s Statement<'a>,
        m: &mut Mods,
        space: Space,
        load: bool,
    ) -> Parsed<(Access, &'s [Operand<'a>], Slot)> {
        let elements = match m.take(&["v2", "v4"]) {
            Some("v2") => 2,
            Some(_) => 4,
            None => 1,
        };
        let ty = m.last_ty(MEMORY)?;
        if elements * ty.bytes() > 16 {
            return Err("accesses wider than 16 bytes are not implemented".into());
        }
        let [first, second] = exactly(&st.operands)?;
        let (data, address) = if load {
            (first, second)
        } else {
            (second, first)
        };
        let list = match data {
            Operand::Vector(list) if elements > 1 => list.as_slice(),
            Operand::Vector(_) => return Err("a scalar access takes one register".into()),
            single => std::slice::from_ref(single),
        };
        if list.len() != elements {
            return Err(format!(
                "expected {elements} registers, found {}",
                list.len()
            ));
        }
        let (slot, offset) = self.address(address, space)?;
        let access = Access {
            space,
            ty,
            elements: elements as u8,
            offset,
            non_coherent: false,
            relaxed: false,
            register: ty.bits() as u8,
        };
        Ok((access, list, slot))
    }
}

fn exactly<'s, 'a, const N: usize>(operands: &'s [Operand<'a>]) -> Parsed<&'s [Operand<'a>; N]> {
    operands
        .try_into()
        .map_err(|_| format!("expected {N} operands, found {}", operands.len()))
}

fn logic(name: &str) -> Logic {
    match name {
        "and" => Logic::And,
        "or" => Logic::Or,
        _ => Logic::Xor,
    }
}

fn space(name: &str) -> Space {
    match name {
        "global" => Space::Global,
        "shared" => Space::Shared,
        "local" => Space::Local,
        "param" => Space::Param,
        _ => Space::Const,
    }
}
