//! Reads machine code as nvdisasm prints it, and follows the ways that a thread can take through it,
//! as far as they are open given what is known, such as the parameters of a call.

use phasor::half::f16;
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// What an instruction does besides computing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Loads elements of q or k.
    Load,
    /// Stores elements of q or k.
    Store,
    /// Stores a word that other threads may store too.
    StoreFlag,
    /// Loads an id of positions or rows.
    LoadId,
    /// Loads a step, a factor or a value of a table, which nothing on the device writes.
    LoadConstant,
    LoadShared,
    StoreShared,
    /// Meets the block's other threads.
    Barrier,
    /// Waits for earlier work.
    Wait,
}

/// How a kernel's accesses of q and k look, apart from its other loads.
#[derive(Clone, Copy, Debug)]
pub enum Accesses {
    /// By vectors, which leave nothing in L1; all else is loaded otherwise.
    Vectors,
    /// By elements of so many bytes.
    Elements(usize),
}

/// An instruction that has an effect.
pub struct Access<'a> {
    pub effect: Effect,
    /// What it moves, if it loads or stores.
    pub bytes: usize,
    /// Whether it leaves nothing in L1.
    pub leaves_l1: bool,
    pub text: &'a str,
}

/// The machine code of one kernel.
pub struct Code {
    instructions: Vec<Instruction>,
    blocks: Vec<Block>,
}

/// Instructions of which only the last can branch, end the thread or have an effect.
struct Block {
    instructions: std::ops::Range<usize>,
    /// Where the branch at its end leads, if there is one.
    targets: Vec<usize>,
}

#[derive(Debug)]
struct Instruction {
    text: String,
    guard: Option<Operand>,
    /// Opcode and its modifiers.
    parts: Vec<String>,
    operands: Vec<Operand>,
    effect: Option<Effect>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Register {
    General(u16),
    Uniform(u16),
    Predicate(u16),
    UniformPredicate(u16),
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Register(Register),
    Immediate(u32),
    /// The predicate that always holds.
    True,
    /// In the constant bank that holds the parameters.
    Bank(u32),
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Operand {
    source: Source,
    /// `-`
    negated: bool,
    /// `~`, or `!` of a predicate.
    inverted: bool,
}

/// A value of which some bits may be known. A predicate is its lowest bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bits {
    known: u32,
    value: u32,
}

/// What registers hold; what is missing is not known.
type Values = BTreeMap<Register, Bits>;

/// The constant bank: grid and block, which are not known, and from `base` on the parameters.
pub struct Bank {
    base: u32,
    parameters: Vec<Option<u8>>,
}

/// Before a block, in a state that follows from the effects so far.
type Place = (usize, usize);

struct Node {
    values: Values,
    /// Where it goes on, and whether the block's effect takes place on this way.
    next: Vec<(Place, bool)>,
    exits: bool,
}

impl Node {
    fn new(values: Values) -> Node {
        Node {
            values,
            next: Vec::new(),
            exits: false,
        }
    }
}

impl Bits {
    const UNKNOWN: Bits = Bits { known: 0, value: 0 };

    fn known(value: u32) -> Bits {
        Bits {
            known: u32::MAX,
            value,
        }
    }

    fn get(self) -> Option<u32> {
        (self.known == u32::MAX).then_some(self.value)
    }

    fn truth(self) -> Option<bool> {
        (self.known & 1 == 1).then_some(self.value & 1 == 1)
    }

    fn of_truth(truth: Option<bool>) -> Bits {
        truth.map_or(Bits::UNKNOWN, |truth| Bits::known(u32::from(truth)))
    }

    /// Bit by bit the entry of a table of eight.
    fn look_up(table: u32, inputs: [Bits; 3]) -> Bits {
        let (mut zero, mut one) = (0, 0);
        for index in 0..8 {
            let mut possible = u32::MAX;
            for (place, input) in inputs.into_iter().enumerate() {
                let wanted = if index >> (2 - place) & 1 == 1 {
                    input.value
                } else {
                    !input.value
                };
                possible &= !input.known | wanted;
            }
            match table >> index & 1 {
                1 => one |= possible,
                _ => zero |= possible,
            }
        }
        let known = !(zero & one);
        Bits {
            known,
            value: one & known,
        }
    }

    /// What is known of both.
    fn join(self, other: Bits) -> Bits {
        let known = self.known & other.known & !(self.value ^ other.value);
        Bits {
            known,
            value: self.value & known,
        }
    }
}

impl Bank {
    /// Of which nothing is known.
    pub const UNKNOWN: Bank = Bank {
        base: 0,
        parameters: Vec::new(),
    };

    /// With the parameters where the architecture has them, byte by byte as far as they are known.
    pub fn new(architecture: &str, parameters: Vec<Option<u8>>) -> Bank {
        let base = match architecture.trim_start_matches("sm_").parse::<u32>() {
            Ok(..90) => 0x160,
            Ok(90..100) => 0x210,
            Ok(_) => 0x380,
            Err(_) => panic!("{architecture} is no architecture"),
        };
        Bank { base, parameters }
    }

    fn read(&self, offset: u32, bytes: u32) -> Bits {
        let byte = |index: u32| {
            let at = (offset + index).checked_sub(self.base)?;
            self.parameters.get(at as usize).copied().flatten()
        };
        let mut bits = Bits {
            known: !(u32::MAX >> (32 - 8 * bytes)),
            value: 0,
        };
        for index in 0..bytes {
            if let Some(byte) = byte(index) {
                bits.known |= 0xff << (8 * index);
                bits.value |= u32::from(byte) << (8 * index);
            }
        }
        bits
    }
}

impl Register {
    fn parse(name: &str) -> Option<Register> {
        let make = [
            ("UP", Register::UniformPredicate as fn(u16) -> Register),
            ("UR", Register::Uniform),
            ("P", Register::Predicate),
            ("R", Register::General),
        ];
        make.into_iter().find_map(|(prefix, make)| {
            let number = name.strip_prefix(prefix)?.parse().ok()?;
            Some(make(number))
        })
    }

    fn is_predicate(self) -> bool {
        matches!(self, Register::Predicate(_) | Register::UniformPredicate(_))
    }

    /// The one that holds word `index` of what starts in this.
    fn word(self, index: u16) -> Register {
        match self {
            Register::General(number) => Register::General(number + index),
            Register::Uniform(number) => Register::Uniform(number + index),
            predicate => predicate,
        }
    }
}

impl Operand {
    fn parse(text: &str) -> Operand {
        let text = text.trim();
        let plain = text.trim_start_matches(['-', '~', '!']);
        let plain = plain.strip_suffix(".reuse").unwrap_or(plain);
        let hexadecimal = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        let source = match plain {
            "RZ" | "URZ" | "SRZ" => Source::Immediate(0),
            "PT" | "UPT" => Source::True,
            _ => {
                let bank = plain
                    .strip_prefix("c[0x0][")
                    .and_then(|rest| rest.strip_suffix(']'));
                match (Register::parse(plain), bank, hexadecimal(plain)) {
                    (Some(register), ..) => Source::Register(register),
                    (_, Some("RZ"), _) => Source::Bank(0),
                    (_, Some(offset), _) => hexadecimal(offset).map_or(Source::Other, Source::Bank),
                    (.., Some(value)) => Source::Immediate(value),
                    _ => Source::Other,
                }
            }
        };
        Operand {
            source,
            negated: text.starts_with('-'),
            inverted: text.starts_with(['~', '!']),
        }
    }

    fn register(&self) -> Option<Register> {
        match self.source {
            Source::Register(register) => Some(register),
            _ => None,
        }
    }

    fn value(&self, values: &Values, bank: &Bank) -> Bits {
        let bits = match self.source {
            Source::Register(register) => values.get(&register).copied().unwrap_or(Bits::UNKNOWN),
            Source::Immediate(value) => Bits::known(value),
            Source::True => Bits::known(1),
            Source::Bank(offset) => bank.read(offset, 4),
            Source::Other => Bits::UNKNOWN,
        };
        match (self.negated, bits.get()) {
            (true, Some(value)) => Bits::known(value.wrapping_neg()),
            (true, None) => Bits::UNKNOWN,
            (false, _) => bits,
        }
    }

    /// Of a whole register.
    fn word(&self, values: &Values, bank: &Bank) -> Bits {
        let bits = self.value(values, bank);
        let flip = if self.inverted { bits.known } else { 0 };
        Bits {
            value: bits.value ^ flip,
            ..bits
        }
    }

    /// Of a predicate.
    fn truth(&self, values: &Values, bank: &Bank) -> Option<bool> {
        let truth = self.value(values, bank).truth()?;
        Some(truth ^ self.inverted)
    }
}

impl Instruction {
    fn parse(text: &str, accesses: Accesses) -> Instruction {
        let text = text.trim();
        let (guard, rest) = match text.strip_prefix('@') {
            Some(rest) => rest.split_once(' ').expect("an opcode"),
            None => ("", text),
        };
        let (opcode, operands) = rest.trim().split_once(' ').unwrap_or((rest.trim(), ""));
        let parts: Vec<String> = opcode.split('.').map(str::to_string).collect();
        let operands = operands.split(',').filter(|text| !text.trim().is_empty());
        let mut instruction = Instruction {
            text: text.to_string(),
            guard: (!guard.is_empty()).then(|| Operand::parse(guard)),
            operands: operands.map(Operand::parse).collect(),
            parts,
            effect: None,
        };
        instruction.effect = instruction.effect_of(accesses);
        instruction
    }

    fn name(&self) -> &str {
        &self.parts[0]
    }

    fn has(&self, modifier: &str) -> bool {
        self.parts[1..].iter().any(|part| part == modifier)
    }

    fn is_arithmetic(&self) -> bool {
        matches!(
            self.name(),
            "FADD" | "FMUL" | "FFMA" | "FADD2" | "FMUL2" | "FFMA2"
        )
    }

    /// Bytes that a load or store moves.
    fn bytes(&self) -> usize {
        let size = self.parts[1..].iter().find_map(|part| match part.as_str() {
            "U8" | "S8" => Some(1),
            "U16" | "S16" => Some(2),
            "64" => Some(8),
            "128" => Some(16),
            "256" => Some(32),
            _ => None,
        });
        size.unwrap_or(4)
    }

    fn effect_of(&self, accesses: Accesses) -> Option<Effect> {
        match self.name() {
            "LDG" if self.has("CONSTANT") => Some(Effect::LoadConstant),
            "LDG" => Some(match accesses {
                Accesses::Vectors if self.has("NA") => Effect::Load,
                Accesses::Elements(size) if self.bytes() == size => Effect::Load,
                _ => Effect::LoadId,
            }),
            "STG" if self.has("STRONG") => Some(Effect::StoreFlag),
            "STG" => Some(Effect::Store),
            "LDS" => Some(Effect::LoadShared),
            "STS" => Some(Effect::StoreShared),
            "BAR" => Some(Effect::Barrier),
            "ACQBULK" => Some(Effect::Wait),
            "LDC" | "LDCU" => None,
            name => {
                let accesses = ["LD", "ST", "ATOM", "RED", "UBLK", "UTMA"];
                let other = accesses.iter().any(|start| name.starts_with(start));
                assert!(!other, "not expected: {}", self.text);
                None
            }
        }
    }

    fn is_branch(&self) -> bool {
        // On sm_80 ptxas leaves loops by a call that nothing returns from.
        matches!(self.name(), "BRA" | "BRX" | "CALL" | "RET")
    }

    /// The labels of a table that it chooses from.
    fn table(&self) -> impl Iterator<Item = &str> {
        let (_, table) = self.text.split_once("BRANCH_TARGETS ").expect("a table");
        let (table, _) = table.split_once('"').expect("a table");
        table.split(',').map(str::trim)
    }

    /// The label that it branches to.
    fn label(&self) -> &str {
        let (_, label) = self.text.split_once("`(").expect("a branch to a label");
        label.split_once(')').expect("a branch to a label").0
    }

    /// Whether a branch is taken, a thread ends or an effect takes place.
    fn takes_place(&self, values: &Values, bank: &Bank) -> Option<bool> {
        let guard = match &self.guard {
            Some(guard) => guard.truth(values, bank),
            None => Some(true),
        };
        // A predicate may also be a branch's first operand.
        let operand = match self.operands.first() {
            Some(operand)
                if self.is_branch() && operand.register().is_some_and(Register::is_predicate) =>
            {
                operand.truth(values, bank)
            }
            _ => Some(true),
        };
        match (guard, operand) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (Some(true), Some(true)) => Some(true),
            _ => None,
        }
    }

    /// Puts what it computes into the registers.
    fn execute(&self, values: &mut Values, bank: &Bank) {
        let takes_place = match &self.guard {
            Some(guard) => guard.truth(values, bank),
            None => Some(true),
        };
        if takes_place == Some(false) || self.is_branch() {
            return;
        }
        let written = match self.compute(values, bank) {
            Some(written) => written,
            None => {
                let unknown = self.destinations().into_iter();
                unknown.map(|register| (register, Bits::UNKNOWN)).collect()
            }
        };
        for (register, mut bits) in written {
            if takes_place.is_none() {
                let before = values.get(&register).copied().unwrap_or(Bits::UNKNOWN);
                bits = bits.join(before);
            }
            if bits.known == 0 {
                values.remove(&register);
            } else {
                values.insert(register, bits);
            }
        }
    }

    /// Registers that it may write, whatever it is: no fewer than it does.
    fn destinations(&self) -> Vec<Register> {
        // Of those not named here it is not known how wide their result is.
        let words = match self.name() {
            _ if self.has("128") => 4,
            _ if self.has("64") || self.has("WIDE") => 2,
            "CS2R" => 2,
            "BMOV" | "F2F" | "F2FP" | "F2I" | "FADD" | "FFMA" | "FMUL" | "HADD2" | "HFMA2"
            | "I2F" | "I2FP" | "IADD3" | "IMAD" | "IMNMX" | "ISETP" | "LDC" | "LDCU" | "LDG"
            | "LDS" | "LEA" | "LOP3" | "MOV" | "MUFU" | "PLOP3" | "PRMT" | "R2UR" | "S2R"
            | "S2UR" | "SEL" | "SHF" | "UF2I" | "UI2F" | "UIADD3" | "UIMAD" | "UISETP" | "ULDC"
            | "ULEA" | "ULOP3" | "UMOV" | "UPLOP3" | "UPRMT" | "USEL" | "USHF" | "VIADD"
            | "VIADDMNMX" | "VIMNMX" => 1,
            _ => 4,
        };
        let predicate = |operand: &&Operand| match operand.source {
            Source::Register(register) => register.is_predicate(),
            Source::True => true,
            _ => false,
        };
        // Predicates before and behind the register, if there is one.
        let mut operands = self.operands.iter().peekable();
        let mut written = Vec::new();
        while let Some(operand) = operands.next_if(predicate) {
            written.extend(operand.register());
        }
        if let Some(register) = operands.next().and_then(Operand::register) {
            written.extend((0..words).map(|index| register.word(index)));
            while let Some(operand) = operands.next_if(predicate) {
                written.extend(operand.register());
            }
        }
        written
    }

    /// Registers and what they hold afterwards; `None` if it is not understood.
    fn compute(&self, values: &Values, bank: &Bank) -> Option<Vec<(Register, Bits)>> {
        let operands = &self.operands;
        let word = |index: usize| operands.get(index).map(|o: &Operand| o.word(values, bank));
        let register = |index: usize| operands.get(index).and_then(Operand::register);
        let result = match self.name() {
            "LDC" | "LDCU" | "ULDC" if !self.has("S8") && !self.has("S16") => {
                let Source::Bank(offset) = operands.get(1)?.source else {
                    return None;
                };
                let first = register(0)?;
                let bytes = self.bytes() as u32;
                let word = |index: u32| bank.read(offset + 4 * index, bytes.min(4));
                let words = 0..bytes.div_ceil(4);
                return Some(words.map(|n| (first.word(n as u16), word(n))).collect());
            }
            "CS2R" if !self.has("32") => {
                let (first, zero) = (register(0)?, word(1)?);
                return Some(vec![(first, zero), (first.word(1), zero)]);
            }
            "ISETP" | "UISETP" => {
                let second = register(1).map(|register| (register, Bits::UNKNOWN));
                let truth =
                    self.compare(word(2)?, word(3)?, || operands.get(4)?.truth(values, bank));
                let first = register(0).map(|register| (register, Bits::of_truth(truth)));
                return Some(first.into_iter().chain(second).collect());
            }
            "PLOP3" | "UPLOP3" => {
                let input = |index: usize| Bits::of_truth(operands[index].truth(values, bank));
                let table = |index: usize| operands.get(index)?.value(values, bank).get();
                let inputs = [input(2), input(3), input(4)];
                let outputs = [(0, 5), (1, 6)].into_iter().filter_map(|(output, at)| {
                    let bits = table(at).map_or(Bits::UNKNOWN, |t| Bits::look_up(t, inputs));
                    Some((register(output)?, Bits::of_truth(bits.truth())))
                });
                return Some(outputs.collect());
            }
            "LOP3" | "ULOP3" => {
                // A predicate that comes first says whether the result is not 0.
                let first = usize::from(register(0)?.is_predicate());
                let table = word(first + 4)?.get()?;
                let inputs = [word(first + 1)?, word(first + 2)?, word(first + 3)?];
                let bits = Bits::look_up(table, inputs);
                let alone = operands.get(first + 5)?.truth(values, bank) == Some(false);
                let mut written = Vec::new();
                if first == 1 {
                    let some = bits.value & bits.known != 0;
                    let truth = (some || bits.known == u32::MAX).then_some(some);
                    written.push((register(0)?, Bits::of_truth(truth.filter(|_| alone))));
                }
                written.extend(register(first).map(|register| (register, bits)));
                return Some(written);
            }
            _ if self.has("64") || self.has("X") || self.has("WIDE") => return None,
            "MOV" | "UMOV" => word(1)?,
            "IMAD" | "UIMAD" if !self.has("HI") => {
                let (a, b, c) = (word(1)?, word(2)?, word(3)?);
                match (a.get(), b.get(), c.get()) {
                    (Some(0), ..) | (_, Some(0), _) => c,
                    (Some(a), Some(b), Some(c)) => Bits::known(a.wrapping_mul(b).wrapping_add(c)),
                    _ => return None,
                }
            }
            "VIADD" => Bits::known(word(1)?.get()?.wrapping_add(word(2)?.get()?)),
            // Without carries.
            "IADD3" | "UIADD3" if self.destinations().len() == 1 => {
                let terms = operands[1..].iter();
                let mut terms = terms.skip_while(|term| matches!(term.source, Source::True));
                Bits::known(terms.try_fold(0u32, |sum, term| {
                    Some(sum.wrapping_add(term.word(values, bank).get()?))
                })?)
            }
            "SEL" | "USEL" => match operands.get(3)?.truth(values, bank) {
                Some(true) => word(1)?,
                Some(false) => word(2)?,
                None => word(1)?.join(word(2)?),
            },
            "PRMT" | "UPRMT" => permute(word(1)?, word(3)?, word(2)?.get()?),
            // How a constant is made in the other pipe.
            "HFMA2" if word(1)?.get() == Some(0) && word(2)?.get() == Some(0) => {
                let halves = self.text.rsplit(',').take(2).map(|half| {
                    let half: f32 = half.trim().parse().ok()?;
                    Some(u32::from(f16::from_f32(half).to_bits()))
                });
                let halves: Vec<u32> = halves.collect::<Option<_>>()?;
                Bits::known(halves[1] << 16 | halves[0])
            }
            _ => return None,
        };
        Some(vec![(register(0)?, result)])
    }

    /// A comparison, combined with a predicate.
    fn compare(&self, a: Bits, b: Bits, with: impl Fn() -> Option<bool>) -> Option<bool> {
        let result = match (a.get(), b.get()) {
            _ if self.has("EX") || self.has("U64") || self.has("S64") => None,
            (Some(a), Some(b)) => {
                let order = match self.has("U32") {
                    true => a.cmp(&b),
                    false => (a as i32).cmp(&(b as i32)),
                };
                Some(match self.parts[1].as_str() {
                    "EQ" => order.is_eq(),
                    "NE" => order.is_ne(),
                    "LT" => order.is_lt(),
                    "LE" => order.is_le(),
                    "GT" => order.is_gt(),
                    "GE" => order.is_ge(),
                    _ => panic!("not understood: {}", self.text),
                })
            }
            _ => None,
        };
        match (result, with()) {
            (Some(false), _) | (_, Some(false)) if self.has("AND") => Some(false),
            (Some(true), _) | (_, Some(true)) if self.has("OR") => Some(true),
            (Some(result), Some(with)) => Some(match self.parts.last().unwrap().as_str() {
                "XOR" => result ^ with,
                "AND" => result && with,
                _ => result || with,
            }),
            _ => None,
        }
    }
}

/// Bytes of two words, chosen by a digit each; one of 8 or more repeats a byte's sign.
fn permute(low: Bits, high: Bits, choice: u32) -> Bits {
    (0..4).fold(Bits::UNKNOWN, |bits, place| {
        let digit = choice >> (4 * place) & 15;
        let word = if digit & 4 == 0 { low } else { high };
        let byte = |word: u32| {
            let byte = (word >> (8 * (digit & 3))) as u8;
            match digit & 8 {
                0 => byte,
                _ => ((byte as i8) >> 7) as u8,
            }
        };
        Bits {
            known: bits.known | u32::from(byte(word.known)) << (8 * place),
            value: bits.value | u32::from(byte(word.value)) << (8 * place),
        }
    })
}

impl Code {
    /// From the part of a listing that belongs to one function.
    pub fn parse(listing: &str, accesses: Accesses) -> Code {
        let mut instructions: Vec<Instruction> = Vec::new();
        let mut labels = HashMap::new();
        for line in listing.lines().map(str::trim) {
            if let Some(label) = line.strip_suffix(':')
                && label.starts_with(['.', '$'])
            {
                labels.insert(label.to_string(), instructions.len());
                continue;
            }
            let Some((address, text)) = line.split_once("*/") else {
                continue;
            };
            let Some((text, _)) = text.split_once(';') else {
                continue;
            };
            assert!(address.starts_with("/*"), "not understood: {line}");
            instructions.push(Instruction::parse(text, accesses));
        }
        if let Accesses::Elements(4) = accesses {
            tell_ids_by_their_sign(&mut instructions);
        }
        let mut starts: Vec<usize> = labels.values().copied().collect();
        for (n, instruction) in instructions.iter().enumerate() {
            let ends = match instruction.name() {
                "JMP" | "JMX" => panic!("not understood: {}", instruction.text),
                "EXIT" => true,
                _ => instruction.is_branch() || instruction.effect.is_some(),
            };
            starts.extend(ends.then_some(n + 1));
        }
        starts.extend([0, instructions.len()]);
        starts.sort_unstable();
        starts.dedup();
        // Divisions and roots may be functions, whose names start so. Where one is called from several places, it
        // is taken to return to any of them, which adds ways that no thread goes.
        let functions = labels.iter().filter(|(label, _)| label.starts_with('$'));
        let functions: Vec<(usize, &str)> =
            functions.map(|(label, &at)| (at, &label[..])).collect();
        let returns_to = |at: usize| -> Vec<usize> {
            let before = functions.iter().filter(|(start, _)| *start <= at);
            let of = before.max().map_or("", |(_, label)| label);
            let calls = instructions
                .iter()
                .enumerate()
                .filter(|(_, i)| i.name() == "CALL" && i.label() == of);
            calls.map(|(call, _)| call + 1).collect()
        };
        let blocks = starts.windows(2).map(|bounds| {
            let last = &instructions[bounds[1] - 1];
            let targets: Vec<usize> = match last.name() {
                "RET" => returns_to(bounds[1] - 1),
                "BRX" => last.table().map(|label| labels[label]).collect(),
                _ if last.is_branch() => vec![labels[last.label()]],
                _ => Vec::new(),
            };
            let block = |at: &usize| starts.binary_search(at).expect("a block starts there");
            Block {
                instructions: bounds[0]..bounds[1],
                targets: targets.iter().map(block).collect(),
            }
        });
        let blocks = blocks.collect();
        Code {
            instructions,
            blocks,
        }
    }

    /// Instructions that a thread can reach: all without padding.
    pub fn len(&self) -> usize {
        let everywhere = self.walk(&Bank::UNKNOWN, |_, _| Some(0));
        let blocks = everywhere.keys().map(|&(block, _)| &self.blocks[block]);
        blocks.map(|block| block.instructions.len()).sum()
    }

    /// The instructions that have an effect.
    pub fn accesses(&self) -> impl Iterator<Item = Access<'_>> {
        self.instructions.iter().filter_map(|instruction| {
            Some(Access {
                effect: instruction.effect?,
                bytes: instruction.bytes(),
                leaves_l1: instruction.has("NA"),
                text: &instruction.text,
            })
        })
    }

    /// Whether an instruction is among them.
    pub fn has(&self, name: &str) -> bool {
        self.instructions.iter().any(|i| i.name() == name)
    }

    /// All ways that are open, given the parameters. `after` says in which state one is that was in
    /// another, and then has an effect; none where it must not go that way.
    fn walk(
        &self,
        bank: &Bank,
        after: impl Fn(usize, Effect) -> Option<usize>,
    ) -> BTreeMap<Place, Node> {
        let mut nodes = BTreeMap::from([((0, 0), Node::new(Values::new()))]);
        let mut todo = VecDeque::from([(0, 0)]);
        while let Some(place) = todo.pop_front() {
            let (number, state) = place;
            let block = &self.blocks[number];
            let mut values = nodes[&place].values.clone();
            for instruction in &self.instructions[block.instructions.clone()] {
                instruction.execute(&mut values, bank);
            }
            let last = &self.instructions[block.instructions.end - 1];
            // Its operands are as they were, as neither branches nor ends write any.
            let takes_place = last.takes_place(&values, bank);
            let (may, may_not) = (takes_place != Some(false), takes_place != Some(true));
            let mut next = Vec::new();
            let mut exits = false;
            match (last.effect, &block.targets[..], last.name()) {
                (Some(effect), ..) => {
                    let then = after(state, effect).filter(|_| may);
                    next.extend(then.map(|then| ((number + 1, then), true)));
                    next.extend(may_not.then_some(((number + 1, state), false)));
                }
                (None, targets @ [_, ..], _) => {
                    let taken = targets.iter().filter(|_| may);
                    next.extend(taken.map(|&target| ((target, state), false)));
                    next.extend(may_not.then_some(((number + 1, state), false)));
                }
                (None, [], "EXIT") => {
                    exits = may;
                    next.extend(may_not.then_some(((number + 1, state), false)));
                }
                _ => next.push(((number + 1, state), false)),
            }
            for &(to, _) in &next {
                if let Some(node) = nodes.get_mut(&to) {
                    let joined = join(&node.values, &values);
                    if joined == node.values {
                        continue;
                    }
                    node.values = joined;
                } else {
                    nodes.insert(to, Node::new(values.clone()));
                }
                todo.push_back(to);
            }
            let node = nodes.get_mut(&place).expect("it was visited");
            (node.next, node.exits) = (next, exits);
        }
        nodes
    }

    /// Effects and ends that a thread may come to without having waited for earlier work.
    pub fn before_waiting(&self, bank: &Bank) -> Vec<(Option<Effect>, &str)> {
        let waited = |state, effect| Some(usize::from(state == 1 || effect == Effect::Wait));
        let nodes = self.walk(bank, waited);
        let unwaited = nodes.iter().filter(|((_, state), _)| *state == 0);
        let found = unwaited.filter_map(|(&(block, _), node)| {
            let last = &self.instructions[self.blocks[block].instructions.end - 1];
            let happens = node.exits || node.next.iter().any(|&(_, happens)| happens);
            let matters = last.effect != Some(Effect::Wait);
            (happens && matters).then_some((last.effect, last.text.as_str()))
        });
        found.collect()
    }

    /// Instructions of the shortest way on which a thread has these effects in this order, and besides
    /// only loads of constants and of shared memory and, unless one is named, waits and barriers; of
    /// several the one with the most arithmetic in f32, so that it leaves none out. It ends with the
    /// thread, or with the last effect. `None` if there is no such way.
    pub fn way(&self, bank: &Bank, effects: &[Effect], end: End) -> Option<usize> {
        let after = |state: usize, effect| match effect {
            Effect::LoadConstant | Effect::LoadShared => Some(state),
            Effect::Wait | Effect::Barrier if !effects.contains(&effect) => Some(state),
            _ => (effects.get(state) == Some(&effect)).then_some(state + 1),
        };
        let nodes = self.walk(bank, after);
        let cost = |block: usize| -> Cost {
            let instructions = &self.instructions[self.blocks[block].instructions.clone()];
            let arithmetic = instructions.iter().filter(|i| i.is_arithmetic()).count();
            (Reverse(arithmetic), instructions.len())
        };
        let mut best = BTreeMap::from([((0, 0), (Reverse(0), 0))]);
        let mut todo = VecDeque::from([(0, 0)]);
        let mut found: Option<Cost> = None;
        let mut turns = 0;
        while let Some(place) = todo.pop_front() {
            turns += 1;
            assert!(turns < 1000 * nodes.len(), "a loop of mere arithmetic");
            let (block, state) = place;
            let (Reverse(arithmetic), instructions) = best[&place];
            let (Reverse(more), further) = cost(block);
            let total = (Reverse(arithmetic + more), instructions + further);
            let node = &nodes[&place];
            let done = |state: usize| state == effects.len();
            let ends = match end {
                End::Thread => node.exits && done(state),
                End::LastEffect => node.next.iter().any(|&(to, happens)| happens && done(to.1)),
            };
            if ends && found.is_none_or(|known| total < known) {
                found = Some(total);
            }
            for &(to, _) in &node.next {
                if best.get(&to).is_none_or(|known| total < *known) {
                    best.insert(to, total);
                    todo.push_back(to);
                }
            }
        }
        found.map(|(_, instructions)| instructions)
    }
}

/// Of a way, the best being the least: its arithmetic, and all its instructions.
type Cost = (Reverse<usize>, usize);

/// Where a way ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    LastEffect,
    Thread,
}

/// What is known either way.
fn join(a: &Values, b: &Values) -> Values {
    let both = a.iter().filter_map(|(register, bits)| {
        let bits = bits.join(*b.get(register)?);
        (bits.known != 0).then_some((*register, bits))
    });
    both.collect()
}

/// Ids are loaded like elements of f32, but then made 64 bits wide.
fn tell_ids_by_their_sign(instructions: &mut [Instruction]) {
    for n in 0..instructions.len() {
        let loaded = instructions[n].operands.first().and_then(Operand::register);
        let widens = |i: &Instruction| {
            let register = i.operands.get(3).and_then(Operand::register);
            i.name() == "SHF" && i.has("R") && i.has("S32") && register == loaded
        };
        // As far as the way goes on that is not branched from, and until the register has something else.
        let mut following = instructions[n + 1..].iter().take_while(|i| {
            i.guard.is_some()
                || !i.is_branch() && loaded.is_none_or(|loaded| !i.destinations().contains(&loaded))
        });
        if instructions[n].effect == Some(Effect::Load) && following.any(widens) {
            instructions[n].effect = Some(Effect::LoadId);
        }
    }
}
