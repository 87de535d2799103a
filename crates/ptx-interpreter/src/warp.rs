//! One warp: its registers, and the instructions that touch nothing else.

use crate::alu;
use crate::inst::*;
use crate::machine::FaultKind;

pub const LANES: usize = 32;
type Lanes = [u64; LANES];

/// Lanes that run together, from `pc`.
#[derive(Clone, Copy)]
pub struct Group {
    pub pc: u32,
    pub mask: u32,
}

/// A fault and the lane it happened in.
pub struct Raised {
    pub lane: u32,
    pub kind: FaultKind,
}

pub fn raise<T>(mask: u32, kind: FaultKind) -> Result<T, Raised> {
    Err(Raised {
        lane: mask.trailing_zeros().min(31),
        kind,
    })
}

pub struct Warp {
    registers: Vec<Lanes>,
    /// For each register, the lanes in which it holds a value.
    defined: Vec<u32>,
    preds: Vec<u32>,
    preds_defined: Vec<u32>,
    carry: u32,
    carry_defined: u32,
    /// Highest pc first.
    pub groups: Vec<Group>,
    /// Lanes that have not exited.
    pub live: u32,
    /// Lanes that have executed `griddepcontrol.wait`.
    pub waited: u32,
    /// Lanes that are at a barrier while others of the warp are still on their way to it.
    pub arrived: Option<(Group, u32)>,
    /// The barrier the warp waits at.
    pub waiting: Option<u32>,
    pub executed: u64,
}

impl Warp {
    pub fn new(function: &Function) -> Warp {
        Warp {
            registers: vec![[0; LANES]; function.slots],
            defined: vec![0; function.slots],
            preds: vec![0; function.preds],
            preds_defined: vec![0; function.preds],
            carry: 0,
            carry_defined: 0,
            groups: Vec::new(),
            live: 0,
            waited: 0,
            arrived: None,
            waiting: None,
            executed: 0,
        }
    }

    /// Back to the first instruction, with `lanes` threads and no register defined.
    pub fn start(&mut self, lanes: u32) {
        self.defined.fill(0);
        self.preds_defined.fill(0);
        self.preds[PRED_FALSE as usize] = 0;
        self.preds[PRED_TRUE as usize] = u32::MAX;
        self.preds_defined[PRED_FALSE as usize] = u32::MAX;
        self.preds_defined[PRED_TRUE as usize] = u32::MAX;
        self.carry_defined = 0;
        self.live = u32::MAX >> (LANES as u32 - lanes);
        self.groups.clear();
        self.groups.push(Group {
            pc: 0,
            mask: self.live,
        });
        self.waited = 0;
        self.arrived = None;
        self.waiting = None;
        self.executed = 0;
    }

    pub fn set(&mut self, slot: Slot, value: impl Fn(u32) -> u64) {
        self.registers[slot as usize] = std::array::from_fn(|lane| value(lane as u32));
        self.defined[slot as usize] = u32::MAX;
    }

    /// Marks a register set before the launch as still holding its value.
    pub fn keep(&mut self, slot: Slot) {
        self.defined[slot as usize] = u32::MAX;
    }

    pub fn get(&self, slot: Slot) -> &Lanes {
        &self.registers[slot as usize]
    }

    pub fn write(&mut self, slot: Slot, mask: u32, values: &Lanes) {
        let register = &mut self.registers[slot as usize];
        for lane in 0..LANES {
            if mask >> lane & 1 == 1 {
                register[lane] = values[lane];
            }
        }
        self.defined[slot as usize] |= mask;
    }

    /// Waits with the other warps of the block, if all lanes that have not exited are at a barrier.
    pub fn cross(&mut self) -> bool {
        let Some((Group { pc, mask }, id)) = self.arrived.filter(|(g, _)| g.mask == self.live)
        else {
            return false;
        };
        self.arrived = None;
        self.push(pc + 1, mask);
        self.waiting = Some(id);
        true
    }

    /// Queues lanes to run from a pc on.
    pub fn push(&mut self, pc: u32, mask: u32) {
        let at = self.groups.partition_point(|g| g.pc > pc);
        self.groups.insert(at, Group { pc, mask });
    }

    /// The lanes of `mask` in which a predicate is true.
    pub fn pred(&self, pred: PredRef, mask: u32) -> Result<u32, Raised> {
        let missing = mask & !self.preds_defined[pred.slot as usize];
        if missing != 0 {
            return raise(missing, FaultKind::UndefinedPredicate(pred.slot));
        }
        let value = self.preds[pred.slot as usize];
        Ok(if pred.negated { !value } else { value } & mask)
    }

    pub fn set_pred(&mut self, slot: Slot, mask: u32, value: u32) {
        let old = &mut self.preds[slot as usize];
        *old = (*old & !mask) | (value & mask);
        self.preds_defined[slot as usize] |= mask;
    }

    pub fn check_sources(&self, inst: &Inst, mask: u32) -> Result<(), Raised> {
        for &slot in inst.sources() {
            let missing = mask & !self.defined[slot as usize];
            if missing != 0 {
                return raise(missing, FaultKind::UndefinedRegister(slot));
            }
        }
        Ok(())
    }

    fn unary(&mut self, i: &Inst, mask: u32, f: impl Fn(u64) -> u64) {
        let a = self.registers[i.src[0] as usize];
        let mut d = [0; LANES];
        for lane in 0..LANES {
            d[lane] = f(a[lane]);
        }
        self.write(i.dst[0], mask, &d);
    }

    fn binary(&mut self, i: &Inst, mask: u32, f: impl Fn(u64, u64) -> u64) {
        let a = self.registers[i.src[0] as usize];
        let b = &self.registers[i.src[1] as usize];
        let mut d = [0; LANES];
        for lane in 0..LANES {
            d[lane] = f(a[lane], b[lane]);
        }
        self.write(i.dst[0], mask, &d);
    }

    fn ternary(&mut self, i: &Inst, mask: u32, f: impl Fn(u64, u64, u64) -> u64) {
        let a = self.registers[i.src[0] as usize];
        let b = &self.registers[i.src[1] as usize];
        let c = &self.registers[i.src[2] as usize];
        let mut d = [0; LANES];
        for lane in 0..LANES {
            d[lane] = f(a[lane], b[lane], c[lane]);
        }
        self.write(i.dst[0], mask, &d);
    }

    fn compare(&self, i: &Inst, f: impl Fn(u64, u64) -> bool) -> u32 {
        let (a, b) = (self.get(i.src[0]), self.get(i.src[1]));
        (0..LANES).fold(0, |bits, lane| {
            bits | u32::from(f(a[lane], b[lane])) << lane
        })
    }

    /// Runs an instruction that needs registers only, in the lanes of `mask`, whose sources are
    /// defined.
    pub fn execute(&mut self, i: &Inst, mask: u32) -> Result<(), Raised> {
        match i.op {
            Op::Mov => self.unary(i, mask, |a| a),
            Op::Cvta(shift) => self.unary(i, mask, |a| a.wrapping_add(shift)),
            Op::Pack { element_bits } => {
                let mut d = [0; LANES];
                for (n, &slot) in i.sources().iter().enumerate() {
                    let part = self.get(slot);
                    for lane in 0..LANES {
                        d[lane] |= part[lane] << (n as u32 * u32::from(element_bits));
                    }
                }
                self.write(i.dst[0], mask, &d);
            }
            Op::Unpack { element_bits } => {
                let a = *self.get(i.src[0]);
                let bits = u32::from(element_bits);
                for (n, &slot) in i.destinations().iter().enumerate() {
                    let d = a.map(|a| a >> (n as u32 * bits) & (u64::MAX >> (64 - bits)));
                    self.write(slot, mask, &d);
                }
            }
            Op::Int1(op, ty) => self.int1(i, mask, op, ty),
            Op::Int2(op, ty) => self.int2(i, mask, op, ty)?,
            Op::Mad(part, ty) => {
                let m = ty.mask();
                match part {
                    Part::Lo => {
                        self.ternary(i, mask, |a, b, c| a.wrapping_mul(b).wrapping_add(c) & m)
                    }
                    Part::Hi => self.ternary(i, mask, |a, b, c| {
                        ((alu::product(a, b, ty) >> ty.bits()) as u64).wrapping_add(c) & m
                    }),
                    Part::Wide => {
                        let m = ty.doubled().mask();
                        self.ternary(i, mask, |a, b, c| {
                            (alu::product(a, b, ty) as u64).wrapping_add(c) & m
                        });
                    }
                }
            }
            Op::Chain {
                op,
                ty,
                carry_in,
                carry_out,
            } => self.chain(i, mask, op, ty, carry_in, carry_out)?,
            Op::Bfe(ty) => self.ternary(i, mask, |a, b, c| alu::bfe(a, b, c, ty)),
            Op::Bfi(ty) => {
                let length = *self.get(i.src[3]);
                let (a, b, c) = (self.get(i.src[0]), self.get(i.src[1]), self.get(i.src[2]));
                let d = std::array::from_fn(|n| alu::bfi(a[n], b[n], c[n], length[n], ty));
                self.write(i.dst[0], mask, &d);
            }
            Op::Prmt => self.ternary(i, mask, alu::prmt),
            Op::Shf { left, wrap } => {
                self.ternary(i, mask, |a, b, c| alu::shf(a, b, c, left, wrap))
            }
            Op::Lop3(table) => self.ternary(i, mask, |a, b, c| alu::lop3(a, b, c, table)),
            Op::Float1(op) => match op {
                // The sign bit alone, also of a NaN.
                Float1::Neg => self.unary(i, mask, |a| a ^ 0x8000_0000),
                Float1::Abs => self.unary(i, mask, |a| a & 0x7fff_ffff),
                Float1::Sqrt => self.unary(i, mask, |a| alu::bits_of(alu::f32_of(a).sqrt())),
                Float1::Rcp => self.unary(i, mask, |a| alu::bits_of(1.0 / alu::f32_of(a))),
            },
            Op::Float2(op) => self.float2(i, mask, op),
            Op::Fma(round) => self.ternary(i, mask, |a, b, c| {
                alu::fma(alu::f32_of(a), alu::f32_of(b), alu::f32_of(c), round)
            }),
            Op::Convert(c) => self.unary(i, mask, |a| alu::convert(a, &c)),
            Op::ConvertPair { to, round } => {
                let format = alu::format_of(to);
                self.binary(i, mask, |a, b| {
                    let half = |x| alu::narrow(f64::from(alu::f32_of(x)), format, round);
                    half(a) << 16 | half(b)
                });
            }
            Op::ConvertPairE4m3 => self.binary(i, mask, |a, b| {
                let byte = |x| u64::from(alu::e4m3(alu::f32_of(x)));
                byte(a) << 8 | byte(b)
            }),
            Op::Setp { cmp, ty, combine } => {
                let signed = |a| alu::sign_extend(a, ty.bits());
                let bits = if ty == Ty::F32 {
                    self.compare(i, |a, b| alu::compare(cmp, alu::f32_of(a), alu::f32_of(b)))
                } else if ty.signed() {
                    self.compare(i, |a, b| alu::compare(cmp, signed(a), signed(b)))
                } else {
                    self.compare(i, |a, b| alu::compare(cmp, a, b))
                };
                let (mut p, mut q) = (bits, !bits);
                if let Some(logic) = combine {
                    let c = self.pred(i.pred_src[0], mask)?;
                    (p, q) = (apply(logic, p, c), apply(logic, q, c));
                }
                self.set_pred(i.pred_dst[0], mask, p);
                self.set_pred(i.pred_dst[1], mask, q);
            }
            Op::Selp => {
                let p = self.pred(i.pred_src[0], mask)?;
                let (a, b) = (self.get(i.src[0]), self.get(i.src[1]));
                let d = std::array::from_fn(|n| if p >> n & 1 == 1 { a[n] } else { b[n] });
                self.write(i.dst[0], mask, &d);
            }
            Op::Slct { float: true } => {
                self.ternary(i, mask, |a, b, c| if alu::f32_of(c) >= 0.0 { a } else { b });
            }
            Op::Slct { float: false } => {
                self.ternary(i, mask, |a, b, c| if c as u32 as i32 >= 0 { a } else { b });
            }
            Op::PredMov => {
                let a = self.pred(i.pred_src[0], mask)?;
                self.set_pred(i.pred_dst[0], mask, a);
            }
            Op::PredLogic(logic) => {
                let (a, b) = (
                    self.pred(i.pred_src[0], mask)?,
                    self.pred(i.pred_src[1], mask)?,
                );
                self.set_pred(i.pred_dst[0], mask, apply(logic, a, b));
            }
            Op::Shfl(mode) => self.shuffle(i, mask, mode)?,
            Op::Vote(vote) => self.vote(i, mask, vote)?,
            Op::ActiveMask => self.write(i.dst[0], mask, &[u64::from(mask); LANES]),
            Op::Fence => {}
            Op::Trap => return raise(mask, FaultKind::Trap),
            Op::WaitForEarlier => self.waited |= mask,
            Op::Ld(_)
            | Op::St(_)
            | Op::Prefetch(_)
            | Op::Bra { .. }
            | Op::Ret
            | Op::Barrier(_)
            | Op::LaunchDependents => {
                unreachable!("the machine runs these")
            }
        }
        Ok(())
    }

    fn int1(&mut self, i: &Inst, mask: u32, op: Int1, ty: Ty) {
        let m = ty.mask();
        let bits = ty.bits();
        match op {
            Int1::Not => self.unary(i, mask, |a| !a & m),
            Int1::Neg => self.unary(i, mask, |a| a.wrapping_neg() & m),
            Int1::Abs => self.unary(i, mask, |a| alu::sign_extend(a, bits).unsigned_abs() & m),
            Int1::Popc => self.unary(i, mask, |a| u64::from(a.count_ones())),
            Int1::Clz => self.unary(i, mask, |a| u64::from(a.leading_zeros() + bits - 64)),
            Int1::Brev => self.unary(i, mask, |a| a.reverse_bits() >> (64 - bits)),
            Int1::Bfind { shift } => self.unary(i, mask, |a| alu::bfind(a, ty, shift)),
        }
    }

    fn int2(&mut self, i: &Inst, mask: u32, op: Int2, ty: Ty) -> Result<(), Raised> {
        let m = ty.mask();
        let bits = ty.bits();
        let signed = |a| alu::sign_extend(a, bits);
        match op {
            Int2::Add => self.binary(i, mask, |a, b| a.wrapping_add(b) & m),
            Int2::Sub => self.binary(i, mask, |a, b| a.wrapping_sub(b) & m),
            Int2::MulLo => self.binary(i, mask, |a, b| a.wrapping_mul(b) & m),
            Int2::MulHi => {
                self.binary(i, mask, |a, b| (alu::product(a, b, ty) >> bits) as u64 & m);
            }
            Int2::MulWide if ty.signed() => {
                let m = ty.doubled().mask();
                self.binary(i, mask, |a, b| signed(a).wrapping_mul(signed(b)) as u64 & m);
            }
            Int2::MulWide => self.binary(i, mask, |a, b| a.wrapping_mul(b)),
            Int2::Div | Int2::Rem => {
                let b = self.get(i.src[1]);
                let zero = (0..LANES).fold(0, |z, n| z | u32::from(b[n] == 0) << n) & mask;
                if zero != 0 {
                    return raise(zero, FaultKind::DivisionByZero);
                }
                // Lanes outside the mask may hold a zero all the same.
                match (op == Int2::Div, ty.signed()) {
                    (true, false) => self.binary(i, mask, |a, b| a.checked_div(b).unwrap_or(0)),
                    (false, false) => self.binary(i, mask, |a, b| a.checked_rem(b).unwrap_or(0)),
                    (true, true) => self.binary(i, mask, |a, b| {
                        if b == 0 {
                            0
                        } else {
                            signed(a).wrapping_div(signed(b)) as u64 & m
                        }
                    }),
                    (false, true) => self.binary(i, mask, |a, b| {
                        if b == 0 {
                            0
                        } else {
                            signed(a).wrapping_rem(signed(b)) as u64 & m
                        }
                    }),
                }
            }
            Int2::Min if ty.signed() => {
                self.binary(i, mask, |a, b| if signed(a) < signed(b) { a } else { b });
            }
            Int2::Max if ty.signed() => {
                self.binary(i, mask, |a, b| if signed(a) < signed(b) { b } else { a });
            }
            Int2::Min => self.binary(i, mask, u64::min),
            Int2::Max => self.binary(i, mask, u64::max),
            Int2::And => self.binary(i, mask, |a, b| a & b),
            Int2::Or => self.binary(i, mask, |a, b| a | b),
            Int2::Xor => self.binary(i, mask, |a, b| a ^ b),
            Int2::Shl => self.binary(i, mask, |a, b| alu::shl(a, b, ty)),
            Int2::Shr => self.binary(i, mask, |a, b| alu::shr(a, b, ty)),
        }
        Ok(())
    }

    fn float2(&mut self, i: &Inst, mask: u32, op: Float2) {
        use alu::f32_of as f;
        match op {
            Float2::Add(round) => self.binary(i, mask, |a, b| alu::add(f(a), f(b), round)),
            Float2::Sub(round) => self.binary(i, mask, |a, b| alu::add(f(a), -f(b), round)),
            Float2::Mul(round) => self.binary(i, mask, |a, b| alu::mul(f(a), f(b), round)),
            Float2::Div => self.binary(i, mask, |a, b| alu::bits_of(f(a) / f(b))),
            Float2::Min { nan } => self.binary(i, mask, |a, b| alu::pick(f(a), f(b), nan, false)),
            Float2::Max { nan } => self.binary(i, mask, |a, b| alu::pick(f(a), f(b), nan, true)),
            Float2::CopySign => {
                self.binary(i, mask, |a, b| (b & 0x7fff_ffff) | (a & 0x8000_0000));
            }
        }
    }

    fn chain(
        &mut self,
        i: &Inst,
        mask: u32,
        op: Chain,
        ty: Ty,
        carry_in: bool,
        carry_out: bool,
    ) -> Result<(), Raised> {
        if carry_in && mask & !self.carry_defined != 0 {
            return raise(mask & !self.carry_defined, FaultKind::UndefinedCarry);
        }
        let (a, b, c) = (self.get(i.src[0]), self.get(i.src[1]), self.get(i.src[2]));
        let mut d = [0; LANES];
        let mut carry = 0;
        for lane in 0..LANES {
            let flag = u128::from(carry_in) & u128::from(self.carry >> lane & 1);
            let (a, b) = (a[lane], b[lane]);
            let product = || alu::product(a, b, ty);
            let low = |x: i128| u128::from(x as u64 & ty.mask());
            let addend = u128::from(c[lane]);
            // Bit `bits` of the result is the carry, or the borrow.
            let result = match op {
                Chain::Add => u128::from(a) + u128::from(b) + flag,
                Chain::Sub => u128::from(a).wrapping_sub(u128::from(b)).wrapping_sub(flag),
                Chain::MadLo => low(product()) + addend + flag,
                Chain::MadHi => low(product() >> ty.bits()) + addend + flag,
            };
            d[lane] = result as u64 & ty.mask();
            carry |= ((result >> ty.bits() & 1) as u32) << lane;
        }
        self.write(i.dst[0], mask, &d);
        if carry_out {
            self.carry = (self.carry & !mask) | (carry & mask);
            self.carry_defined |= mask;
        }
        Ok(())
    }

    /// Every lane that runs a `.sync` instruction must be named, and every named lane must run it.
    fn check_members(&self, slot: Slot, mask: u32) -> Result<(), Raised> {
        for lane in lanes(mask) {
            let members = self.get(slot)[lane] as u32;
            if members != mask {
                return raise(
                    1 << lane,
                    FaultKind::Members {
                        named: members,
                        running: mask,
                    },
                );
            }
        }
        Ok(())
    }

    fn shuffle(&mut self, i: &Inst, mask: u32, mode: Shuffle) -> Result<(), Raised> {
        self.check_members(i.src[3], mask)?;
        let (a, b, c) = (self.get(i.src[0]), self.get(i.src[1]), self.get(i.src[2]));
        let mut d = [0; LANES];
        let mut inside = 0u32;
        for lane in lanes(mask) {
            let segment = c[lane] as usize >> 8 & 31;
            let clamp = c[lane] as usize & 31;
            let by = b[lane] as usize & 31;
            let last = (lane & segment) | (clamp & !segment);
            let (from, valid) = match mode {
                Shuffle::Up => (lane.wrapping_sub(by), lane >= by && lane - by >= last),
                Shuffle::Down => (lane + by, lane + by <= last),
                Shuffle::Bfly => (lane ^ by, lane ^ by <= last),
                Shuffle::Idx => {
                    let from = (lane & segment) | (by & !segment);
                    (from, from <= last)
                }
            };
            let from = if valid { from } else { lane };
            if mask >> from & 1 == 0 {
                return raise(1 << lane, FaultKind::InactiveSource(from as u32));
            }
            d[lane] = a[from];
            inside |= u32::from(valid) << lane;
        }
        self.write(i.dst[0], mask, &d);
        self.set_pred(i.pred_dst[0], mask, inside);
        Ok(())
    }

    fn vote(&mut self, i: &Inst, mask: u32, vote: Vote) -> Result<(), Raised> {
        self.check_members(i.src[0], mask)?;
        let p = self.pred(i.pred_src[0], mask)?;
        let holds = match vote {
            Vote::All => p == mask,
            Vote::Any => p != 0,
            Vote::Uni => p == mask || p == 0,
            Vote::Ballot => {
                self.write(i.dst[0], mask, &[u64::from(p); LANES]);
                return Ok(());
            }
        };
        self.set_pred(i.pred_dst[0], mask, if holds { u32::MAX } else { 0 });
        Ok(())
    }
}

fn apply(logic: Logic, a: u32, b: u32) -> u32 {
    match logic {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
    }
}

/// The lanes of a mask, lowest first.
pub fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros() as usize;
        mask &= mask.wrapping_sub(1);
        (lane < LANES).then_some(lane)
    })
}
