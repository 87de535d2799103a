//! Faults seeded in a kernel's PTX, one at a time: every place where a kind of fault applies.
//!
//! A mutant is a textual change of one or two lines. Registers are recognised by what the PTX does
//! with them, never by their numbers, so that the rules outlive a new compiler.

use phasor::Pairing;
use phasor::call::{
    PhasorCache, PhasorCall, PhasorFusion, PhasorOutput, PhasorStages, PhasorStream,
};
use phasor::launch::{Family, Kernel};
use std::collections::{HashMap, HashSet};
use std::mem::offset_of;

/// Kinds of fault, in the order of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    Barrier,
    WaitDropped,
    WaitLater,
    TriggerDropped,
    SharedFurther,
    SharedOther,
    SinCosSwapped,
    LaneZero,
    FactorDropped,
    Coefficient,
    Unfused,
    RoundedToZero,
    RoundingConstant,
    SignDropped,
    NegDropped,
    MaskDropped,
    Shift,
    Product32,
    Extension,
    Clamp,
    Select,
    Bound,
    BoundValue,
    Branch,
    PredicateLogic,
    Address,
    Parameter,
    StoreDropped,
    StoresSwapped,
    Shuffle,
}

impl Kind {
    pub const ALL: [Kind; 30] = [
        Kind::Barrier,
        Kind::WaitDropped,
        Kind::WaitLater,
        Kind::TriggerDropped,
        Kind::SharedFurther,
        Kind::SharedOther,
        Kind::SinCosSwapped,
        Kind::LaneZero,
        Kind::FactorDropped,
        Kind::Coefficient,
        Kind::Unfused,
        Kind::RoundedToZero,
        Kind::RoundingConstant,
        Kind::SignDropped,
        Kind::NegDropped,
        Kind::MaskDropped,
        Kind::Shift,
        Kind::Product32,
        Kind::Extension,
        Kind::Clamp,
        Kind::Select,
        Kind::Bound,
        Kind::BoundValue,
        Kind::Branch,
        Kind::PredicateLogic,
        Kind::Address,
        Kind::Parameter,
        Kind::StoreDropped,
        Kind::StoresSwapped,
        Kind::Shuffle,
    ];

    pub fn describe(self) -> &'static str {
        match self {
            Kind::Barrier => "a barrier dropped",
            Kind::WaitDropped => "a wait for earlier work dropped",
            Kind::WaitLater => "a wait moved below the next load, or the next store",
            Kind::TriggerDropped => "dependents not launched",
            Kind::SharedFurther => "a shared load or store one pair further",
            Kind::SharedOther => {
                "a shared load or store among the next token's angles or the last one's"
            }
            Kind::SinCosSwapped => "sin and cos swapped",
            Kind::LaneZero => "lane 0's angle for every lane",
            Kind::FactorDropped => "the attention factor as 1, in one place",
            Kind::Coefficient => "last bit of an `f32` constant flipped",
            Kind::Unfused => "`fma` as `mul` and `add`",
            Kind::RoundedToZero => "`cvt.rn` as `cvt.rz`",
            Kind::RoundingConstant => "an added constant off by one",
            Kind::SignDropped => "`xor` of a sign dropped",
            Kind::NegDropped => "`neg` or `abs` dropped",
            Kind::MaskDropped => "`and` mask dropped",
            Kind::Shift => "a shift off by one",
            Kind::Product32 => "a 64-bit product cut to 32 bits",
            Kind::Extension => "an id extended with the other sign",
            Kind::Clamp => "`min` or `max` dropped",
            Kind::Select => "`selp` swapped, or one side always",
            Kind::Bound => "`<` as `<=` and the like",
            Kind::BoundValue => "a constant compared with off by one",
            Kind::Branch => "a branch taken when it must not be",
            Kind::PredicateLogic => "predicate `and` as `or`, `not` dropped",
            Kind::Address => "a load or store one access further",
            Kind::Parameter => "a parameter read from the next field",
            Kind::StoreDropped => "a store dropped",
            Kind::StoresSwapped => "the stores of a head's two places swapped",
            Kind::Shuffle => "a shuffle that leaves each lane its own value",
        }
    }
}

pub struct Mutant {
    pub kind: Kind,
    pub was: String,
    pub now: String,
    /// Why no launch can tell it from the kernel.
    pub equivalent: Option<&'static str>,
    /// New text of lines, by index in the kernel's text.
    edits: Vec<(usize, String)>,
}

impl Mutant {
    /// The lines with the fault, from 1.
    pub fn lines(&self) -> impl Iterator<Item = u32> {
        self.edits.iter().map(|&(line, _)| line as u32 + 1)
    }
}

/// One kernel, as a module of its own.
pub struct KernelText {
    pub kernel: Kernel,
    lines: Vec<String>,
}

impl KernelText {
    pub fn of(kernel: Kernel, module: &str) -> KernelText {
        let entry = format!(".visible .entry {}(", kernel.name());
        let directive = |line: &&str| {
            let word = line.split_whitespace().next();
            matches!(
                word,
                Some(".version" | ".target" | ".address_size" | ".extern")
            )
        };
        let head = module.lines().filter(directive);
        let body = module.lines().skip_while(|line| !line.starts_with(&entry));
        let end = body.clone().position(|line| line == "}");
        let end = end.unwrap_or_else(|| panic!("{} is not in the module", kernel.name()));
        KernelText {
            kernel,
            lines: head.chain(body.take(end + 1)).map(str::to_owned).collect(),
        }
    }

    pub fn text(&self) -> String {
        self.lines.join("\n")
    }

    /// Whether the instructions are the same, whatever the target.
    pub fn same_code(&self, other: &KernelText) -> bool {
        let code = |lines: &[String]| lines.iter().position(|line| line.contains(".entry"));
        match (code(&self.lines), code(&other.lines)) {
            (Some(a), Some(b)) => self.lines[a..] == other.lines[b..],
            _ => false,
        }
    }

    pub fn apply(&self, mutant: &Mutant) -> String {
        let mut lines = self.lines.clone();
        for (line, text) in &mutant.edits {
            lines[*line].clone_from(text);
        }
        lines.join("\n")
    }
}

/// An instruction of the text.
#[derive(Clone)]
struct Inst<'a> {
    line: usize,
    guard: Option<&'a str>,
    op: &'a str,
    args: Vec<&'a str>,
}

impl<'a> Inst<'a> {
    fn parse(line: usize, text: &'a str) -> Option<Inst<'a>> {
        let mut rest = text.trim().strip_suffix(';')?;
        let mut guard = None;
        if let Some(guarded) = rest.strip_prefix('@') {
            let (predicate, code) = guarded.split_once(char::is_whitespace)?;
            (guard, rest) = (Some(predicate), code.trim());
        }
        if !rest.starts_with(|c: char| c.is_ascii_lowercase()) {
            return None;
        }
        let (op, args) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let mut depth = 0;
        let split = args.split(move |c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        });
        let args = split.map(str::trim).filter(|a| !a.is_empty()).collect();
        Some(Inst {
            line,
            guard,
            op,
            args,
        })
    }

    fn text(&self) -> String {
        let guard = self.guard.map_or(String::new(), |g| format!("@{g} "));
        format!("\t{guard}{} \t{};", self.op, self.args.join(", "))
    }

    fn with(&self, op: &str, args: &[&str]) -> String {
        Inst {
            op,
            args: args.to_vec(),
            ..self.clone()
        }
        .text()
    }

    fn is(&self, stem: &str) -> bool {
        self.op == stem || (self.op.starts_with(stem) && self.op[stem.len()..].starts_with('.'))
    }

    fn is_global_load(&self) -> bool {
        self.op.starts_with("ld.global")
    }

    fn is_constant_load(&self) -> bool {
        self.op.starts_with("ld.global.nc")
    }

    fn is_shared_access(&self) -> bool {
        self.is("ld.shared") || self.is("st.shared")
    }

    fn is_global_store(&self) -> bool {
        self.is("st") && self.op.contains(".global.")
    }

    /// The same load or store at an address `by` bytes further on (`add`) or back (`sub`), where `by` is so
    /// many times a special register.
    fn elsewhere(&self, way: &str, times: usize, register: &str) -> String {
        let (bits, mul) = match self.is_shared_access() {
            true => (32, "mul.lo.u32"),
            false => (64, "mul.wide.u32"),
        };
        let mut args = self.args.clone();
        let at = args.iter().position(|arg| arg.starts_with('['));
        let here = at.map(|at| std::mem::replace(&mut args[at], "[%there]"));
        let here = here.expect("a load or store").trim_matches(['[', ']']);
        let (base, offset) = here.split_once('+').unwrap_or((here, "0"));
        let access = self.with(self.op, &args);
        format!(
            "\t{{ .reg .b{bits} %by, %here, %there; add.s{bits} %here, {base}, {offset}; \
             {mul} %by, {register}, {times}; {way}.s{bits} %there, %here, %by; {} }}",
            access.trim()
        )
    }

    /// Registers written, in `{a, b}` or alone.
    fn destinations(&self) -> Vec<&'a str> {
        let no_result = self.is("st") || self.is("bra") || self.is("ret") || self.is("bar");
        match self.args.first() {
            Some(first) if !no_result => members(first),
            _ => Vec::new(),
        }
    }

    /// Bytes of a load or store.
    fn width(&self) -> i64 {
        let vector = if self.op.contains(".v4.") {
            4
        } else if self.op.contains(".v2.") {
            2
        } else {
            1
        };
        let bits = self
            .op
            .rsplit('.')
            .next()
            .and_then(|ty| ty[1..].parse().ok());
        vector * bits.unwrap_or(0i64) / 8
    }
}

fn members(arg: &str) -> Vec<&str> {
    arg.trim_matches(['{', '}'])
        .split(',')
        .map(str::trim)
        .collect()
}

/// Whether a comparison with a constant, and what became of it, tell the same of some numbers.
fn says_the_same(inst: &Inst, now: &str, numbers: impl IntoIterator<Item = i64>) -> bool {
    let holds = |inst: &Inst, number: i64| {
        let with = integer(inst.args[2])?;
        match inst.op.split('.').nth(1)? {
            "lt" => Some(number < with),
            "le" => Some(number <= with),
            "gt" => Some(number > with),
            "ge" => Some(number >= with),
            "eq" => Some(number == with),
            "ne" => Some(number != with),
            _ => None,
        }
    };
    Inst::parse(0, now).is_some_and(|now| {
        let is_same =
            |number| holds(inst, number).is_some_and(|was| Some(was) == holds(&now, number));
        numbers.into_iter().all(is_same)
    })
}

fn integer(arg: &str) -> Option<i64> {
    arg.parse().ok()
}

/// What the rules know of a kernel.
struct Code<'a> {
    insts: Vec<Inst<'a>>,
    /// The register a parameter was loaded to: by register, its offset.
    parameters: HashMap<&'a str, i64>,
    /// The only instruction that writes a register, by index.
    writers: HashMap<&'a str, usize>,
    /// Registers that hold the attention factor.
    factors: HashSet<&'a str>,
    kernel: Kernel,
}

/// Bytes of the struct that all kernels take, and of the one that those with stages take too.
const CALL: i64 = size_of::<PhasorCall>() as i64;
const FUSION: i64 = size_of::<PhasorFusion>() as i64;

/// The second word of ln 2.
const LN_2_REST: u32 = 0xb102_e308;

/// Offsets in the parameters.
const COS: i64 = offset_of!(PhasorCall, table.cos) as i64;
const SIN: i64 = offset_of!(PhasorCall, table.sin) as i64;
const PAIRS: i64 = offset_of!(PhasorCall, angles.pairs) as i64;
const FACTOR: i64 = offset_of!(PhasorCall, angles.factor) as i64;
const Q_HEADS: i64 = offset_of!(PhasorCall, q.heads) as i64;
const K_HEADS: i64 = offset_of!(PhasorCall, k.heads) as i64;
const BATCH: i64 = offset_of!(PhasorCall, batch) as i64;
const CHOICE: i64 = offset_of!(PhasorCall, angles.row_choice) as i64;
const EACH_TOKEN: i64 = offset_of!(PhasorCall, sequences.each_token) as i64;
const SEQUENCES: i64 = offset_of!(PhasorCall, sequences.count) as i64;
const PAGES: i64 = offset_of!(PhasorCall, slots.pages) as i64;
const ID_TYPES: [i64; 3] = [
    offset_of!(PhasorCall, slots.ids.type_) as i64,
    offset_of!(PhasorCall, slots.offsets.type_) as i64,
    offset_of!(PhasorCall, sequences.offsets.type_) as i64,
];
const SLOT_CHOICE: i64 = offset_of!(PhasorCall, slots.choice) as i64;
const LENGTHS_TYPE: i64 = offset_of!(PhasorCall, slots.lengths.type_) as i64;
const BLOCK_DIMS: [i64; 2] = [
    offset_of!(PhasorCall, k_cache.block_dims) as i64,
    offset_of!(PhasorCall, v_cache.block_dims) as i64,
];
const PRESENT: [i64; 2] = [
    offset_of!(PhasorCall, k_cache.present) as i64,
    offset_of!(PhasorCall, v_cache.present) as i64,
];
const AXES: i64 = offset_of!(PhasorCall, angles.axes) as i64;
const GROUPS_END: i64 = offset_of!(PhasorCall, groups_end) as i64;
/// Sizes of what lies side by side for q, k and v.
const SIZES: [i64; 4] = [
    size_of::<PhasorStream>() as i64,
    size_of::<PhasorOutput>() as i64,
    size_of::<PhasorCache>() as i64,
    size_of::<PhasorStages>() as i64,
];

/// The struct that an address is in, by name or register, and how far into it: of the first of what lies side by
/// side there, if one of it is chosen by its number. `None` where there are several ways to it.
fn place_of<'a>(
    insts: &[Inst<'a>],
    writers: &HashMap<&str, usize>,
    address: &'a str,
) -> Option<(&'a str, i64)> {
    let Some(inst) = writers.get(address).map(|&n| &insts[n]) else {
        return (!address.starts_with('%')).then_some((address, 0));
    };
    if inst.op != "add.s64" {
        return Some((address, 0));
    }
    let further = match integer(inst.args[2]) {
        Some(further) => further,
        None => {
            let index = &insts[*writers.get(inst.args[2])?];
            index.is("mul").then_some(0)?
        }
    };
    let (base, begin) = place_of(insts, writers, inst.args[1])?;
    Some((base, begin + further))
}

impl<'a> Code<'a> {
    fn new(kernel: Kernel, lines: &'a [String]) -> Code<'a> {
        let insts: Vec<_> = lines
            .iter()
            .enumerate()
            .filter_map(|(n, line)| Inst::parse(n, line))
            .collect();
        let mut parameters = HashMap::new();
        let mut writers = HashMap::new();
        let mut written_again = HashSet::new();
        // Names of the second struct.
        let mut second: HashSet<&str> = HashSet::new();
        for inst in insts.iter().filter(|inst| inst.is("mov")) {
            if inst.args[1].ends_with("_param_1") || second.contains(inst.args[1]) {
                second.insert(inst.args[0]);
            }
        }
        let of_second = insts.iter().filter(|inst| inst.is("ld.param"));
        let bases = of_second.map(|inst| inst.args[1].trim_matches(['[', ']']));
        let bases = bases.map(|at| at.split_once('+').map_or(at, |(base, _)| base));
        second.extend(bases.filter(|base| base.ends_with("_param_1")));
        for (n, inst) in insts.iter().enumerate() {
            for register in inst.destinations() {
                if writers.insert(register, n).is_some() {
                    written_again.insert(register);
                }
            }
        }
        writers.retain(|register, _| !written_again.contains(register));
        for inst in insts.iter().filter(|inst| inst.is("ld.param")) {
            let at = inst.args[1].trim_matches(['[', ']']);
            let (base, offset) = at.split_once('+').unwrap_or((at, "0"));
            let Some((base, begin)) = place_of(&insts, &writers, base) else {
                continue;
            };
            // Those of the second struct count on from the end of the first.
            let begin = begin + if second.contains(base) { CALL } else { 0 };
            let offset = integer(offset).map(|n| begin + n);
            let registers = inst.destinations();
            let size = inst.width() / registers.len() as i64;
            for (n, register) in registers.into_iter().enumerate() {
                parameters.insert(register, offset.unwrap_or(0) + n as i64 * size);
            }
        }
        // The call's own factor, and what else is put where that is: the factor of a row.
        let of_call = parameters.iter().filter(|&(_, &offset)| offset == FACTOR);
        let mut factors: HashSet<_> = of_call.map(|(&register, _)| register).collect();
        for inst in insts.iter().filter(|inst| inst.is("mov")) {
            if factors.contains(inst.args[1]) {
                factors.insert(inst.args[0]);
            }
        }
        Code {
            insts,
            parameters,
            writers,
            factors,
            kernel,
        }
    }

    fn writer(&self, register: &str) -> Option<&Inst<'a>> {
        self.writers.get(register).map(|&n| &self.insts[n])
    }

    /// The bits of a float that is a constant, alone or in a register.
    fn float(&self, arg: &str) -> Option<u32> {
        let known = self.writer(arg).filter(|w| w.op == "mov.f32");
        let bits = known.map_or(arg, |w| w.args[1]).strip_prefix("0f")?;
        u32::from_str_radix(bits, 16).ok()
    }

    /// The offset that a parameter is loaded from.
    fn parameter(&self, inst: &Inst) -> Option<i64> {
        let first = inst.destinations().first().copied()?;
        inst.is("ld.param")
            .then(|| self.parameters.get(first).copied())?
    }

    /// Whether a register holds a parameter, of fewer bits perhaps.
    fn comes_from(&self, register: &str, offset: i64) -> bool {
        self.parameters.get(register) == Some(&offset)
            || self
                .writer(register)
                .is_some_and(|w| w.is("cvt") && self.parameters.get(w.args[1]) == Some(&offset))
    }

    /// Whether a masked register is only used where other bits are inserted above the mask.
    fn is_inserted_over(&self, register: &str, mask: &str) -> bool {
        let mut uses = self
            .insts
            .iter()
            .filter(|i| i.args.iter().skip(1).any(|arg| *arg == register));
        let bits = integer(mask).map_or(0, |mask| i64::from((mask + 1).trailing_zeros()));
        uses.all(|i| {
            i.op == "bfi.b32"
                && i.args[2] == register
                && integer(i.args[3]) == Some(bits)
                && integer(i.args[4]) == Some(32 - bits)
        })
    }

    /// Whether an instruction asks if there is more than one sequence, and now asks for less.
    fn asks_for_sequences(&self, inst: &Inst, now: &str) -> bool {
        match inst.op {
            "setp.lt.u32" => self.comes_from(inst.args[1], BATCH) && now.ends_with(" 1;"),
            _ => self.parameter(inst) == Some(BATCH),
        }
    }

    /// Whether an instruction decides if there is but one row, of steps on one axis: it loads or compares
    /// one of the two parameters.
    fn is_asked_for_one_row(&self, inst: &Inst) -> bool {
        self.insts.iter().any(|both| {
            let compares = |arg: &str, offset| {
                let compare = self.writer(arg)?;
                let value = self.writer(compare.args.get(1)?)?;
                (self.parameter(value) == Some(offset)).then_some([compare.line, value.line])
            };
            let args = &both.args;
            both.op == "and.pred"
                && compares(args[1], CHOICE)
                    .zip(compares(args[2], AXES))
                    .is_some_and(|(choice, axes)| [choice, axes].concat().contains(&inst.line))
        })
    }

    /// Whether what an instruction selects is asked of the call: if each token is a sequence.
    fn asks_whether_each_token_is_one(&self, inst: &Inst) -> bool {
        let compare = inst
            .args
            .get(3)
            .and_then(|predicate| self.writer(predicate));
        compare.is_some_and(|c| c.is("setp") && self.parameters.get(c.args[1]) == Some(&EACH_TOKEN))
    }

    /// Why a register's sign is nothing to the kernel, if it is not.
    fn needs_no_sign(&self, register: &str) -> Option<&'static str> {
        let compares = |op: &str, at: usize, with: &dyn Fn(&str) -> bool| {
            let is_it = |i: &&Inst| i.op == op && i.args[at] == register && with(i.args[3 - at]);
            self.insts.iter().any(|i| is_it(&i))
        };
        let is_pages = |with: &str| self.comes_from(with, PAGES);
        if compares("setp.ge.u64", 1, &is_pages) {
            return Some(
                "a page of 2^31 or more is outside of the caches, and so is a negative one",
            );
        }
        if compares("setp.gt.u64", 1, &|_| true) {
            return Some("a sequence that begins at 2^31 or later, or before 0, has no token");
        }
        if compares("setp.lt.s64", 1, &|with| with == "0") && compares("setp.lt.s64", 2, &|_| true)
        {
            return Some("pages that begin at index 2^31 or later, or before 0, are none");
        }
        None
    }

    /// The id that an instruction makes 64 bits wide, or of which it decides whether it has a sign: that of the
    /// next conversion.
    fn id_of_sign(&self, inst: &Inst<'a>) -> Option<&'a str> {
        if inst.is("cvt") {
            return Some(inst.args[0]);
        }
        let of_type = |i: &Inst| {
            let parameter = i.args.get(1).and_then(|value| self.parameters.get(value));
            i.is("setp") && parameter.is_some_and(|at| ID_TYPES.contains(at)) && i.args[2] == "3"
        };
        let decides = match inst.guard {
            Some(guard) => self
                .writer(guard.trim_start_matches('!'))
                .is_some_and(of_type),
            None => of_type(inst),
        };
        let mut behind = self
            .insts
            .iter()
            .skip_while(|i| i.line <= inst.line)
            .take(4);
        behind
            .find(|i| i.is("cvt"))
            .filter(|_| decides)
            .map(|widened| widened.args[0])
    }

    /// Whether a register has 0 or 1.
    fn is_flag(&self, register: &str) -> bool {
        self.is_flag_by_way_of(register, &mut HashSet::new())
    }

    fn is_flag_by_way_of(&self, register: &str, seen: &mut HashSet<String>) -> bool {
        if !seen.insert(register.to_owned()) {
            return true;
        }
        let is_constant = |value: &str| {
            let known = self
                .writer(value)
                .filter(|w| w.is("mov"))
                .map_or(value, |w| w.args[1]);
            matches!(known, "0" | "1")
        };
        let mut writers = self
            .insts
            .iter()
            .filter(|i| i.destinations().contains(&register))
            .peekable();
        writers.peek().is_some()
            && writers.all(|w| {
                w.is("mov") && (is_constant(w.args[1]) || self.is_flag_by_way_of(w.args[1], seen))
                    || w.is("selp") && w.args[1..3] == ["1", "0"]
            })
    }

    /// The instructions before one.
    fn before(&self, inst: &Inst) -> impl DoubleEndedIterator<Item = &Inst<'a>> {
        let n = self.insts.partition_point(|i| i.line < inst.line);
        self.insts[..n].iter()
    }

    /// Whether a comparison of a register with 0 is behind a branch that is taken where it is 0.
    fn is_passed_unless_zero(&self, compare: &Inst) -> bool {
        let n = self.insts.partition_point(|i| i.line < compare.line);
        let before = &self.insts[..n];
        let is_same = |i: &Inst| i.op == compare.op && i.args[1..] == compare.args[1..];
        let Some(first) = before.iter().rposition(is_same) else {
            return false;
        };
        let mut between = before[first + 1..].iter();
        between
            .next()
            .is_some_and(|i| i.is("bra") && i.guard == Some(before[first].args[0]))
            && between.all(|i| !i.destinations().contains(&compare.args[1]))
    }

    /// Whether a group of heads may have none: kernels with stages have groups in vain.
    fn has_stages(&self) -> bool {
        self.parameters.values().any(|&at| at >= CALL)
    }

    /// Whether a comparison is one of the two by which heads of a group are found one by one: they go to two
    /// places, or lie in blocks.
    fn finds_heads_late(&self, compare: &Inst) -> bool {
        let is_of_blocks = |w: &Inst| w.op == "setp.lt.u32" && self.is_block_dims(w.args[1]);
        let either = self
            .only_user(compare.args[0])
            .filter(|user| user.op == "or.pred");
        is_of_blocks(compare)
            || either.is_some_and(|or| {
                let mut terms = or.args[1..3].iter().filter_map(|term| self.writer(term));
                terms.any(is_of_blocks)
            })
    }

    /// The only instruction that reads a register.
    fn only_user(&self, register: &str) -> Option<&Inst<'a>> {
        let reads = |i: &&Inst| {
            let guard = i.guard.map(|guard| guard.trim_start_matches('!'));
            let operands = i
                .args
                .iter()
                .skip(usize::from(!i.destinations().is_empty()));
            guard == Some(register)
                || operands
                    .copied()
                    .flat_map(members)
                    .any(|arg| arg == register)
        };
        let mut users = self.insts.iter().filter(reads);
        users.next().filter(|_| users.next().is_none())
    }

    /// Whether a register has the dims of a block of a cache, of k or of v.
    fn is_block_dims(&self, register: &str) -> bool {
        let of_parameter = |register: &str| {
            let at = self.parameters.get(register);
            at.is_some_and(|at| BLOCK_DIMS.contains(at))
        };
        let chosen = self.writer(register).filter(|w| w.is("selp"));
        of_parameter(register)
            || chosen.is_some_and(|w| w.args[1..3].iter().all(|arg| of_parameter(arg)))
    }

    /// Whether a register has how many heads a group has at most.
    fn is_heads_at_once(&self, register: &str) -> bool {
        self.writer(register).is_some_and(|w| {
            w.op == "shl.b32"
                && self
                    .writer(w.args[1])
                    .is_some_and(|one| one.is("mov") && one.args[1] == "1")
        })
    }

    /// Whether a register has the upper half of another, which decides how wide a division is.
    fn chooses_division(&self, register: &str) -> bool {
        self.writer(register)
            .is_some_and(|w| w.op == "and.b64" && w.args[2] == "-4294967296")
    }

    /// Whether a comparison of the lanes of a block with a constant tells the same of all that kernels with stages
    /// are launched with.
    fn asks_the_same_of_lanes(&self, inst: &Inst, now: &str) -> bool {
        let is_lanes = |w: &Inst| w.is("mov") && w.args[1] == "%ntid.x";
        let lanes: &[i64] = match (self.kernel.family, self.kernel.pairing) {
            (Family::Fused, Some(_)) => &[8, 16, 32],
            (Family::Fused, None) => &[32],
            _ => return false,
        };
        self.writer(inst.args[1]).is_some_and(is_lanes)
            && says_the_same(inst, now, lanes.iter().copied())
    }

    /// Whether a comparison of how many terms of a sum are left with a constant tells the same of all powers of two.
    fn asks_the_same_of_terms(&self, inst: &Inst, now: &str) -> bool {
        let is_halved =
            |i: &Inst| i.op == "shr.u32" && i.args[2] == "1" && i.args[..2].contains(&inst.args[1]);
        self.kernel.family == Family::Fused
            && self.kernel.pairing.is_none()
            && self.insts.iter().any(is_halved)
            && says_the_same(inst, now, (0..31).map(|n| 1 << n))
    }

    /// Whether a comparison asks if a block of warps has another round of heads to serve: of the heads that its warps
    /// have, each asks for itself whether it is there.
    fn asks_for_a_round(&self, compare: &Inst) -> bool {
        let first = compare.args[1];
        let goes_on = |w: &Inst| match w.op {
            // Each begins with the block's first head.
            "mul.lo.s32" => true,
            "mad.lo.s32" => w.args[3] == first,
            "add.s32" => w.args[1] == first,
            _ => false,
        };
        let is_heads = |register: &str| {
            let at = self.parameters.get(register);
            at.is_some_and(|at| [Q_HEADS, K_HEADS].contains(at))
        };
        let mut writers = (self.insts.iter()).filter(|i| i.destinations().contains(&first));
        self.kernel.family == Family::Fused
            && self.kernel.pairing.is_none()
            && is_heads(compare.args[2])
            && writers.clone().any(|w| w.op == "mul.lo.s32")
            && writers.all(goes_on)
    }

    /// Whether a comparison asks if heads are left from one on, of which then as many are taken as there are: of
    /// none there are 0.
    fn asks_for_heads_left(&self, compare: &Inst) -> bool {
        let heads = [compare.args[1], compare.args[2]];
        let is_rest = |register: &str| {
            let rest = self.writer(register).filter(|w| w.op == "sub.s32");
            rest.is_some_and(|w| w.args[1..3] == heads)
        };
        let is_some_of_rest = |register: &str| {
            let some = self.writer(register).filter(|w| w.op == "min.u32");
            some.is_some_and(|w| w.args[1..3].iter().any(|arg| is_rest(arg)))
        };
        compare.op == "setp.gt.u32"
            && self.only_user(compare.args[0]).is_some_and(|user| {
                user.op == "selp.b32" && user.args[2] == "0" && is_some_of_rest(user.args[1])
            })
    }

    /// Whether a comparison asks for the end of all groups, and a branch to the same place follows for a group that
    /// has no heads.
    fn is_followed_by_no_heads(&self, compare: &Inst) -> bool {
        let ends = |i: &Inst| self.parameters.get(i.args[2]) == Some(&GROUPS_END);
        let n = self.insts.partition_point(|i| i.line <= compare.line);
        let [branch, rest @ ..] = &self.insts[n..] else {
            return false;
        };
        let goes = |i: &Inst, predicate: &str, to: &str| {
            i.is("bra") && i.guard == Some(predicate) && i.args[0] == to
        };
        compare.op == "setp.ge.u32"
            && ends(compare)
            && branch.is("bra")
            && branch.guard == Some(compare.args[0])
            && rest.windows(2).take(3).any(|pair| {
                pair[0].op == "setp.eq.s32"
                    && pair[0].args[2] == "0"
                    && goes(&pair[1], pair[0].args[0], branch.args[0])
            })
    }

    /// Whether an instruction comes after the angles have been taken from shared memory.
    fn is_after_angles(&self, inst: &Inst) -> bool {
        let mut before = self.insts.iter().take_while(|i| i.line != inst.line);
        before.any(|i| i.is("ld.shared"))
    }

    /// Whether a register holds the heads of q and k together, or 0 for a thread that has none.
    fn is_all_heads(&self, register: &str) -> bool {
        self.writer(register).is_some_and(|w| {
            let of_parameters = [1, 2].map(|n| {
                let of = w.args.get(n).and_then(|term| self.parameters.get(term));
                of.copied()
            });
            w.op == "add.s32"
                && (of_parameters == [Some(Q_HEADS), Some(K_HEADS)]
                    || of_parameters == [Some(K_HEADS), Some(Q_HEADS)])
                || w.op == "selp.b32" && w.args[2] == "0" && self.is_all_heads(w.args[1])
        })
    }
}

/// Every mutant of a kernel.
pub fn mutants(kernel: &KernelText) -> Vec<Mutant> {
    let code = Code::new(kernel.kernel, &kernel.lines);
    let mut all = Vec::new();
    for inst in &code.insts {
        let mut add = |kind, now: String| {
            all.push(Mutant {
                kind,
                was: kernel.lines[inst.line].trim().into(),
                equivalent: equivalent(&code, inst, kind, now.trim()),
                edits: vec![(inst.line, now.clone())],
                now: now.trim().into(),
            });
        };
        values(&code, inst, &mut add);
        control(inst, &mut add);
        accesses(kernel.kernel, &code, inst, &mut add);
    }
    exchanges(kernel, &code, &mut all);
    all
}

/// Faults of arithmetic.
fn values(code: &Code, inst: &Inst, add: &mut impl FnMut(Kind, String)) {
    let args = &inst.args[..];
    for (n, arg) in args.iter().enumerate().skip(1) {
        if code.factors.contains(arg) && !inst.is("mov") {
            let mut args = args.to_vec();
            args[n] = "0f3F800000";
            add(Kind::FactorDropped, inst.with(inst.op, &args));
        }
    }
    for (n, arg) in args.iter().enumerate() {
        if let Some(bits) = arg.strip_prefix("0f").filter(|bits| bits.len() == 8) {
            let bits = u32::from_str_radix(bits, 16).expect("a float is eight hex digits");
            let flipped = format!("0f{:08X}", bits ^ 1);
            let mut args = args.to_vec();
            args[n] = &flipped;
            add(Kind::Coefficient, inst.with(inst.op, &args));
        }
    }
    if inst.op == "fma.rn.f32" {
        let [d, a, b, c] = args else { return };
        let now = format!(
            "{{ .reg .f32 %apart; mul.rn.f32 %apart, {a}, {b}; add.rn.f32 {d}, %apart, {c}; }}"
        );
        add(Kind::Unfused, now);
    }
    // To e4m3 there is no other rounding.
    if inst.op.starts_with("cvt.rn.") && !inst.op.contains(".e4m3x2.") {
        let op = inst.op.replacen(".rn.", ".rz.", 1);
        add(Kind::RoundedToZero, inst.with(&op, args));
    }
    if inst.is("add")
        && let Some(value) = integer(args[2])
    {
        for off in [value - 1, value + 1] {
            let off = off.to_string();
            let now = inst.with(inst.op, &[args[0], args[1], &off]);
            add(Kind::RoundingConstant, now);
        }
    }
    if inst.is("xor") {
        // The float is one of the two; whichever side is dropped, something must show.
        let mov = inst.op.replacen("xor", "mov", 1);
        for kept in [args[1], args[2]] {
            add(Kind::SignDropped, inst.with(&mov, &[args[0], kept]));
        }
    }
    if inst.is("neg") || inst.is("abs") {
        let op = if inst.op.ends_with("f32") {
            "mov.f32"
        } else {
            "mov.b64"
        };
        add(Kind::NegDropped, inst.with(op, args));
    }
    if inst.is("and") && integer(args[2]).is_some() {
        let op = inst.op.replacen("and", "mov", 1);
        add(Kind::MaskDropped, inst.with(&op, &args[..2]));
    }
    if (inst.is("shl") || inst.is("shr"))
        && let Some(by) = integer(args[2])
    {
        for off in [by - 1, by + 1] {
            let off = off.to_string();
            add(Kind::Shift, inst.with(inst.op, &[args[0], args[1], &off]));
        }
    }
    if inst.op == "mul.lo.s64" {
        let now = format!(
            "{{ .reg .b32 %low<2>; cvt.u32.u64 %low0, {}; cvt.u32.u64 %low1, {}; \
             mul.lo.s32 %low0, %low0, %low1; cvt.u64.u32 {}, %low0; }}",
            args[1], args[2], args[0]
        );
        add(Kind::Product32, now);
    }
    if inst.is("cvt") && code.writer(args[1]).is_some_and(Inst::is_global_load) {
        let op = match inst.op {
            "cvt.s64.s32" => Some("cvt.u64.u32"),
            "cvt.u64.u32" => Some("cvt.s64.s32"),
            _ => None,
        };
        if let Some(op) = op {
            add(Kind::Extension, inst.with(op, args));
        }
    }
    if inst.is("min") || inst.is("max") {
        let bits = inst.op.rsplit('.').next().map_or("64", |ty| &ty[1..]);
        let mov = format!("mov.b{bits}");
        for kept in [args[1], args[2]] {
            add(Kind::Clamp, inst.with(&mov, &[args[0], kept]));
        }
    }
    if inst.is("shfl") {
        let result = args[0].split('|').next().expect("a register");
        add(Kind::Shuffle, inst.with("mov.b32", &[result, args[1]]));
    }
    if inst.is("selp") {
        let [d, a, b, p] = args else { return };
        let mov = inst.op.replacen("selp", "mov", 1);
        add(Kind::Select, inst.with(inst.op, &[d, b, a, p]));
        add(Kind::Select, inst.with(&mov, &[d, a]));
        add(Kind::Select, inst.with(&mov, &[d, b]));
    }
}

/// Faults of control flow.
fn control(inst: &Inst, add: &mut impl FnMut(Kind, String)) {
    let args = &inst.args[..];
    if inst.is("setp") {
        for (was, now) in [
            (".lt.", ".le."),
            (".le.", ".lt."),
            (".gt.", ".ge."),
            (".ge.", ".gt."),
        ] {
            if inst.op.contains(was) {
                let op = inst.op.replacen(was, now, 1);
                add(Kind::Bound, inst.with(&op, args));
            }
        }
        if let Some(value) = integer(args[2]) {
            for off in [value - 1, value + 1] {
                let off = off.to_string();
                let now = inst.with(inst.op, &[args[0], args[1], &off]);
                add(Kind::BoundValue, now);
            }
        }
    }
    if let Some(guard) = inst.guard {
        let flipped = match guard.strip_prefix('!') {
            Some(plain) => plain.to_owned(),
            None => format!("!{guard}"),
        };
        let now = Inst {
            guard: Some(&flipped),
            ..inst.clone()
        };
        add(Kind::Branch, now.text());
    }
    match inst.op {
        "and.pred" => add(Kind::PredicateLogic, inst.with("or.pred", args)),
        "or.pred" => add(Kind::PredicateLogic, inst.with("and.pred", args)),
        "not.pred" => add(Kind::PredicateLogic, inst.with("mov.pred", args)),
        _ => {}
    }
}

/// Faults of loads and stores, and of what orders them.
fn accesses(kernel: Kernel, code: &Code, inst: &Inst, add: &mut impl FnMut(Kind, String)) {
    if inst.is("bar") || inst.is("barrier") {
        add(Kind::Barrier, String::new());
    }
    match inst.op {
        "griddepcontrol.wait" => add(Kind::WaitDropped, String::new()),
        "griddepcontrol.launch_dependents" => add(Kind::TriggerDropped, String::new()),
        _ => {}
    }
    let args = &inst.args[..];
    let further = |at: &str, by: i64| {
        let at = at.trim_matches(['[', ']']);
        let (base, offset) = at.split_once('+').unwrap_or((at, "0"));
        format!("[{base}+{}]", integer(offset).unwrap_or(0) + by)
    };
    if inst.is_global_load() {
        let at = further(args[1], inst.width());
        add(Kind::Address, inst.with(inst.op, &[args[0], &at]));
    }
    if inst.is_global_store() {
        let at = further(args[0], inst.width());
        add(Kind::Address, inst.with(inst.op, &[&at, args[1]]));
        add(Kind::StoreDropped, String::new());
    }
    // Bytes of the cosines and sines of a chunk, which lie beside those of the next lane's.
    let chunk = 8 * kernel.vector();
    if inst.is_shared_access() {
        let at = args.iter().position(|arg| arg.starts_with('[')).unwrap();
        let there = further(args[at], inst.width());
        let mut args = args.to_vec();
        args[at] = &there;
        add(Kind::SharedFurther, inst.with(inst.op, &args));
        for way in ["add", "sub"] {
            add(Kind::SharedOther, inst.elsewhere(way, chunk, "%ntid.x"));
        }
    }
    if inst.is("ld.shared") && members(args[0]).len() > 1 {
        let values = members(args[0]);
        let exchanged: Vec<_> = values.chunks(2).flat_map(|v| [v[1], v[0]]).collect();
        let exchanged = format!("{{{}}}", exchanged.join(", "));
        add(
            Kind::SinCosSwapped,
            inst.with(inst.op, &[&exchanged, args[1]]),
        );
        if values.len() > 2 {
            let next = [&values[2..], &values[..2]].concat().join(", ");
            let now = inst.with(inst.op, &[&format!("{{{next}}}"), args[1]]);
            add(Kind::SharedFurther, now);
        }
        // Two words that are no floats are a slot.
        if inst.op.ends_with(".f32") {
            add(Kind::LaneZero, inst.elsewhere("sub", chunk, "%tid.x"));
        }
    }
    // A pair lies beside that of the next lane, but where a vector holds pairs of two places.
    if inst.is_constant_load()
        && !code.factors.contains(args[0])
        && kernel.pairing != Some(Pairing::Interleaved)
    {
        let bytes = inst.width() as usize;
        add(Kind::LaneZero, inst.elsewhere("sub", bytes, "%tid.x"));
    }
    if inst.is("ld.param") {
        let size = inst.width();
        let mut at = further(args[1], size);
        if at.contains(&format!("+{CALL}]")) || at.contains(&format!("+{FUSION}]")) {
            at = further(args[1], -size);
        }
        add(Kind::Parameter, inst.with(inst.op, &[args[0], &at]));
    }
}

/// Faults that exchange something between two lines.
fn exchanges(kernel: &KernelText, code: &Code, all: &mut Vec<Mutant>) {
    let mut exchange = |kind, a: &Inst, b: &Inst, a_now: String, b_now: String| {
        let was = [a, b].map(|inst| kernel.lines[inst.line].trim());
        all.push(Mutant {
            kind,
            was: was.join(" … "),
            now: format!("{} … {}", a_now.trim(), b_now.trim()),
            equivalent: None,
            edits: vec![(a.line, a_now), (b.line, b_now)],
        });
    };
    let swapped = |inst: &Inst, n: usize, by: &str| {
        let mut args = inst.args.clone();
        args[n] = by;
        inst.with(inst.op, &args)
    };
    let use_of = |offset| {
        code.insts.iter().find_map(|inst| {
            let of_offset = |arg: &&str| code.parameters.get(arg) == Some(&offset);
            let n = inst.args.iter().skip(1).position(of_offset)? + 1;
            (!inst.is("ld.param")).then_some((inst, n))
        })
    };
    if let (Some((cos, n)), Some((sin, m))) = (use_of(COS), use_of(SIN)) {
        let now = [swapped(cos, n, sin.args[m]), swapped(sin, m, cos.args[n])];
        let [cos_now, sin_now] = now;
        exchange(Kind::SinCosSwapped, cos, sin, cos_now, sin_now);
    }
    // A wait, and what must not come before it.
    for (n, wait) in code.insts.iter().enumerate() {
        if wait.op != "griddepcontrol.wait" {
            continue;
        }
        let is_load = |i: &&Inst| i.is_global_load() && !i.is_constant_load();
        let is_store = |i: &&Inst| i.is_global_store();
        let after = &code.insts[n + 1..];
        for access in [after.iter().find(is_load), after.iter().find(is_store)] {
            let access = access.expect("a kernel stores last");
            let now = format!("{} griddepcontrol.wait;", access.text());
            exchange(Kind::WaitLater, wait, access, String::new(), now);
        }
    }
    // Two stores with nothing but address arithmetic between them are a head's two places.
    for (n, first) in code
        .insts
        .iter()
        .enumerate()
        .filter(|(_, i)| i.is_global_store())
    {
        let next = code.insts[n + 1..].iter().find(|i| !i.is("add"));
        if let Some(second) = next.filter(|i| i.is_global_store() && i.guard.is_none())
            && first.args[1] != second.args[1]
        {
            let now = [(first, second), (second, first)]
                .map(|(at, data)| at.with(at.op, &[at.args[0], data.args[1]]));
            let [first_now, second_now] = now;
            exchange(Kind::StoresSwapped, first, second, first_now, second_now);
        }
    }
}

/// Why a mutant is the kernel still, for the few that are.
fn equivalent<'a>(code: &Code<'a>, inst: &Inst<'a>, kind: Kind, now: &str) -> Option<&'static str> {
    let args = &inst.args[..];
    match kind {
        // The index in a vector, beside which the chunk is put.
        Kind::MaskDropped if code.is_inserted_over(args[0], args[2]) => {
            Some("the bits that it clears are overwritten")
        }
        Kind::MaskDropped if inst.op == "and.b32" => {
            let shift = code.writer(args[1]).filter(|w| w.op == "shr.u32")?;
            (code.parameters.get(shift.args[1]) == Some(&PAIRS)).then_some(
                "the mask clears what doubling the pairs would carry out of 32 bits, and pairs are \
                 at most 2^21",
            )
        }
        Kind::RoundedToZero if inst.op == "cvt.rn.f32.s32" => {
            let word = code.writer(args[1]).filter(|w| w.op == "cvt.u32.u64")?;
            let shift = code.writer(word.args[1]).filter(|w| w.op == "shr.u64")?;
            (integer(shift.args[2]) >= Some(40))
                .then_some("64 bits shifted right by 40 fit an `f32` exactly")
        }
        Kind::Unfused => {
            let factors = [args[1], args[2]].map(|arg| code.float(arg));
            let is_power_of_two = |bits: u32| bits & 0x7f_ffff == 0;
            if factors.into_iter().flatten().any(is_power_of_two) {
                return Some("a product with a power of two is exact, fused or not");
            }
            factors.contains(&Some(LN_2_REST)).then_some(
                "how the second word of ln 2 is added shows in no logarithm of an `f32` from 1 to 2^63, \
                 all of which were tried",
            )
        }
        Kind::Bound | Kind::BoundValue | Kind::Parameter if code.asks_for_sequences(inst, now) => {
            Some("with one sequence, the division gives it too")
        }
        Kind::Parameter if code.is_asked_for_one_row(inst) => {
            Some("what serves several rows and axes serves one of each too")
        }
        Kind::BoundValue
            if code.is_asked_for_one_row(inst)
                && (now.ends_with("-1;")
                    || code.comes_from(args[1], AXES) && now.ends_with(" 0;")) =>
        {
            Some("what serves several rows and axes serves one of each too")
        }
        // The heads that follow in a round have registers of their own, written once.
        Kind::Bound
            if code.is_all_heads(args[2])
                && code.writer(args[1]).is_none()
                && code.is_after_angles(inst) =>
        {
            Some(
                "the first head of a round is compared twice, at the end of the round before and in \
             this one, so either comparison may let one more through",
            )
        }
        Kind::Select if code.asks_whether_each_token_is_one(inst) => {
            let mut before = code.insts.iter().take_while(|i| i.line != inst.line);
            before.any(|i| i.is("bar") || i.is("barrier")).then_some(
                "in a ragged batch no sequence is known to be one token, and all threads that have a token \
                 are told its sequence by another",
            )
        }
        Kind::BoundValue
            if code.parameters.get(args[1]) == Some(&SEQUENCES) && now.ends_with("-1;") =>
        {
            Some("a call without sequences is none, and never launched")
        }
        Kind::Extension | Kind::BoundValue | Kind::Branch
            if let Some(id) = code.id_of_sign(inst)
                && let Some(reason) = code.needs_no_sign(id) =>
        {
            Some(reason)
        }
        Kind::BoundValue
            if code.parameters.get(args[1]) == Some(&LENGTHS_TYPE)
                && now.ends_with("-1;")
                && code.parameters.values().all(|&at| at < CALL) =>
        {
            Some(
                "what appends has lengths; what has none moves cached keys, by kernels with stages",
            )
        }
        Kind::BoundValue
            if inst.op == "setp.lt.s64"
                && now.ends_with("-1;")
                && code
                    .before(inst)
                    .rfind(|w| w.destinations().contains(&args[1]))
                    .is_some_and(|w| w.op == "add.s64") =>
        {
            Some("slot -1 of a sequence is, without its sign, past all of its pages")
        }
        Kind::BoundValue if code.chooses_division(args[1]) => {
            Some("a division of 64 bits gives what one of 32 does")
        }
        Kind::BoundValue
            if now.ends_with("-1;")
                && code
                    .writer(args[1])
                    .is_some_and(|w| w.op == "min.u32" && code.is_heads_at_once(w.args[2])) =>
        {
            Some("a group has a head")
        }
        Kind::MaskDropped if inst.op == "and.b16" && code.is_flag(args[1]) => {
            Some("the mask leaves 0 and 1 as they are")
        }
        Kind::MaskDropped if code.chooses_division(args[0]) => {
            Some("a division of 64 bits gives what one of 32 does")
        }
        Kind::MaskDropped
            if inst.op == "and.b64"
                && args[2] == "4294967295"
                && code
                    .insts
                    .iter()
                    .any(|i| i.op.starts_with("setp.ge.") && i.args[1] == args[1]) =>
        {
            Some("what is in bounds of a table has 32 bits")
        }
        Kind::Parameter
            if let Some(reason) = code.only_user(args[0]).and_then(|compare| {
                (compare.is("setp"))
                    .then(|| code.id_of_sign(compare))?
                    .and_then(|id| code.needs_no_sign(id))
            }) =>
        {
            Some(reason)
        }
        Kind::Select
            if args[2] == "0"
                && now.ends_with(&format!("{};", args[1]))
                && code
                    .only_user(args[0])
                    .filter(|user| user.op == "sub.s32")
                    .is_some_and(|user| {
                        let first = code.writer(user.args[2]).filter(|w| w.op == "cvt.u32.u64");
                        first.is_some_and(|w| code.needs_no_sign(w.args[1]).is_some())
                    }) =>
        {
            Some("only a thread that has a token looks for its sequence")
        }
        Kind::Bound
            if matches!(inst.op, "setp.lt.u32" | "setp.ge.u32") && code.is_block_dims(args[1]) =>
        {
            Some("in a block that is as long as its head, both ways lead to the same place")
        }
        Kind::Parameter
            if code.parameter(inst) == Some(SLOT_CHOICE)
                && code
                    .only_user(args[0])
                    .is_some_and(|user| user.op == "setp.eq.s32" && user.args[2] == "0") =>
        {
            Some("where there are slots there are pages, and where there are none there are not")
        }
        Kind::BoundValue
            if inst.op == "setp.eq.s32"
                && args[2] == "0"
                && now.ends_with("-1;")
                && code.is_passed_unless_zero(inst)
                && code.only_user(args[0]).is_some_and(|user| {
                    user.is("selp") && code.parameters.get(user.args[2]) == Some(&PAIRS)
                }) =>
        {
            Some("it was compared with 0 before, and is not 0 here")
        }
        Kind::BoundValue if now.ends_with("-1;") && code.finds_heads_late(inst) => {
            Some("what is found for each head is where all heads are found to be")
        }
        Kind::Parameter
            if code
                .parameter(inst)
                .is_some_and(|at| BLOCK_DIMS.contains(&at))
                && code
                    .only_user(args[0])
                    .is_some_and(|user| user.op == "setp.lt.u32") =>
        {
            Some("what is found for each head is where all heads are found to be")
        }
        Kind::Select
            if !code.has_stages()
                && args[2] == "0"
                && now.ends_with(&format!("{};", args[1]))
                && code
                    .writer(args[1])
                    .is_some_and(|w| w.op == "min.u32" && code.is_heads_at_once(w.args[2])) =>
        {
            Some("a group has a head")
        }
        Kind::Bound
            if !code.has_stages()
                && matches!(inst.op, "setp.le.u32" | "setp.gt.u32")
                && code.parameters.get(args[1]) == Some(&Q_HEADS) =>
        {
            Some("a group has a head")
        }
        Kind::Parameter
            if code.parameter(inst).is_some_and(|at| {
                let before = BLOCK_DIMS.iter().find(|&&block_dims| block_dims + 4 == at);
                PRESENT.contains(&at) && before.is_some_and(|at| now.contains(&format!("+{at}]")))
            }) =>
        {
            Some("a cache that is not there has blocks of no dims, and one that is there has not")
        }
        Kind::Product32
            if integer(args[2]).is_some_and(|size| SIZES.contains(&size))
                && code.writer(args[1]).is_some_and(|w| w.op == "cvt.u64.u32") =>
        {
            Some("there are three streams, and what lies side by side for them has few bytes")
        }
        Kind::Bound | Kind::BoundValue if code.asks_the_same_of_lanes(inst, now) => {
            Some("a block has as many lanes as a head has vectors of two places: 8, 16 or 32")
        }
        Kind::Bound | Kind::BoundValue if code.asks_the_same_of_terms(inst, now) => {
            Some("what a warp folds is a power of two of terms")
        }
        Kind::Bound if code.asks_for_a_round(inst) => {
            Some("in a round behind the last head no warp has one")
        }
        Kind::Bound if code.asks_for_heads_left(inst) => {
            Some("where no head is left, so many are 0")
        }
        Kind::Bound if code.is_followed_by_no_heads(inst) => {
            Some("a group behind the last one has no heads")
        }
        Kind::Bound | Kind::BoundValue if inst.op == "setp.gt.u32" && args[2] == "1015021567" => {
            Some("2^-6 and the number before it are the same code of e4m3, normal or not")
        }
        Kind::Clamp
            if inst.op == "min.u32"
                && args[2] == "30"
                && now.ends_with(&format!("{};", args[1])) =>
        {
            Some("of a number that is shifted by 31 or more nothing is left")
        }
        Kind::Select
            if args[1] == "0"
                && now.ends_with(&format!(" {};", args[2]))
                && code.writer(args[3]).is_some_and(|w| w.op == "setp.nan.f32") =>
        {
            Some("a NaN becomes the integer 0")
        }
        Kind::RoundedToZero
            if inst.op == "cvt.rn.f32.s32"
                && code
                    .writer(args[1])
                    .is_some_and(|w| w.op == "shr.s32" && w.args[2] == "23") =>
        {
            Some("an exponent fits an `f32` exactly")
        }
        Kind::Coefficient
            if args[1..]
                .iter()
                .any(|arg| code.float(arg) == Some(LN_2_REST)) =>
        {
            Some(
                "the last bit of the second word of ln 2 shows in no logarithm of an `f32` from 1 to \
                 2^63, all of which were tried",
            )
        }
        Kind::Coefficient if args[1] == "0f00000000" => {
            let mut uses = code
                .insts
                .iter()
                .filter(|i| i.args.iter().skip(1).any(|arg| *arg == args[0]));
            uses.all(|i| i.op == "cvt.rn.bf16x2.f32" && i.args[1] == args[0])
                .then_some("the least subnormal is 0 in bf16, as 0 is; and that half is not stored")
        }
        Kind::BoundValue if inst.op == "setp.gt.u32" && now.ends_with("2139095041;") => {
            Some("arithmetic gives no NaN with the bits 0x7f800001, the only value between the two")
        }
        _ => None,
    }
}
