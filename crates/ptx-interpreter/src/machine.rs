//! Launches: blocks, warps, divergence, barriers, loads and stores.

use crate::alu;
use crate::inst::*;
use crate::memory::{AccessError, Earlier, Memory, Stored, Traffic, Who};
use crate::parse::Module;
use crate::warp::{Group, LANES, Raised, Warp, lanes, raise};
use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// Offset of a space in the generic address space; global memory is the generic space itself.
pub fn window(space: Space) -> u64 {
    match space {
        Space::Shared => 0x7e00_0000_0000,
        Space::Local => 0x7d00_0000_0000,
        Space::Param => 0x7c00_0000_0000,
        Space::Generic | Space::Global | Space::Const => 0,
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    pub entry: &'a str,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// The parameter block, laid out as the kernel declares it.
    pub params: &'a [u8],
    /// Bytes of `.extern .shared` memory.
    pub dynamic_shared: usize,
    /// Instructions a warp may run before it counts as stuck.
    pub budget: u64,
    /// Whether earlier work may still run when this launch starts (programmatic dependent launch). Each
    /// thread must then execute `griddepcontrol.wait` before it reads what earlier work may write, before
    /// it stores, and before it ends.
    pub dependent: bool,
    /// Whether to count how often each line is executed ([`Stats::lines`]).
    pub counts_lines: bool,
}

impl<'a> Launch<'a> {
    pub fn new(entry: &'a str, grid: [u32; 3], block: [u32; 3], params: &'a [u8]) -> Launch<'a> {
        Launch {
            entry,
            grid,
            block,
            params,
            dynamic_shared: 0,
            budget: 1 << 22,
            dependent: false,
            counts_lines: false,
        }
    }
}

/// What a launch did.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    pub warp_instructions: u64,
    /// Instructions summed over the threads that ran them.
    pub thread_instructions: u64,
    /// Threads that executed `griddepcontrol.launch_dependents`.
    pub launched_dependents: u64,
    /// Loads of global memory by threads of a dependent launch before their `griddepcontrol.wait`.
    pub loads_before_wait: u64,
    /// Loads and stores of global memory.
    pub global: Traffic,
    pub shared: Traffic,
    pub local: Traffic,
    /// Global traffic by buffer, in order of address; module variables are last.
    pub buffers: Vec<(String, Traffic)>,
    /// How often warps executed the instruction of each line of the PTX, numbered from 1, if that was asked
    /// for. Lanes that have parted execute it apart.
    pub lines: BTreeMap<u32, u64>,
    /// Of those, by lanes that all have executed `griddepcontrol.wait`.
    pub lines_after_wait: BTreeMap<u32, u64>,
}

impl Stats {
    /// The traffic of the first buffer of a name.
    pub fn buffer(&self, name: &str) -> Option<&Traffic> {
        self.buffers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, traffic)| traffic)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// The launch itself is wrong; no thread ran.
    BadLaunch(String),
    Access {
        error: AccessError,
        space: Space,
        address: u64,
        width: usize,
        store: bool,
        /// The buffer closest to the address.
        nearest: String,
    },
    UndefinedRegister(Slot),
    UndefinedPredicate(Slot),
    UndefinedCarry,
    DivisionByZero,
    /// The member mask of a `.sync` instruction is not the set of lanes that run it.
    Members {
        named: u32,
        running: u32,
    },
    /// `shfl` reads a lane that does not take part.
    InactiveSource(u32),
    /// `bra.uni` goes two ways.
    DivergentUniform,
    /// Some lanes of a warp are not at the barrier the others are at.
    DivergentBarrier {
        arrived: u32,
        live: u32,
    },
    /// All warps wait, but not all at one barrier.
    Deadlock,
    BudgetSpent,
    Trap,
    /// A thread of a dependent launch ends without having executed `griddepcontrol.wait`.
    EndsBeforeWait,
}

/// Where a fault happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    pub block: [u32; 3],
    pub thread: [u32; 3],
    /// PTX line, from 1.
    pub line: u32,
    pub text: String,
    /// Name of the register a fault is about.
    pub register: Option<String>,
}

/// Why a launch stopped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    pub kernel: String,
    pub place: Option<Box<Place>>,
    pub kind: FaultKind,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}", self.kernel)?;
        if let Some(p) = &self.place {
            write!(
                f,
                ", block {:?}, thread {:?}, line {} `{}`",
                p.block, p.thread, p.line, p.text
            )?;
        }
        let register = self
            .place
            .as_ref()
            .and_then(|p| p.register.as_deref())
            .unwrap_or("?");
        match &self.kind {
            FaultKind::BadLaunch(message) => write!(f, ": bad launch: {message}"),
            FaultKind::Access {
                error,
                space,
                address,
                width,
                store,
                nearest,
            } => {
                let verb = if *store { "store of" } else { "load of" };
                write!(
                    f,
                    ": {verb} {width} bytes at {space:?} {address:#x} ({nearest}): {error}"
                )
            }
            FaultKind::UndefinedRegister(_) | FaultKind::UndefinedPredicate(_) => {
                write!(f, ": register {register} is read before it is written")
            }
            FaultKind::UndefinedCarry => write!(f, ": the carry flag is read before it is written"),
            FaultKind::DivisionByZero => write!(f, ": division by zero"),
            FaultKind::Members { named, running } => {
                write!(
                    f,
                    ": the mask names lanes {named:#010x}, but {running:#010x} run this"
                )
            }
            FaultKind::InactiveSource(lane) => {
                write!(f, ": reads lane {lane}, which takes no part")
            }
            FaultKind::DivergentUniform => write!(f, ": a uniform branch goes two ways"),
            FaultKind::DivergentBarrier { arrived, live } => {
                write!(
                    f,
                    ": lanes {arrived:#010x} of {live:#010x} are at the barrier"
                )
            }
            FaultKind::Deadlock => write!(f, ": all warps wait, not all at one barrier"),
            FaultKind::BudgetSpent => write!(f, ": the instruction budget is spent"),
            FaultKind::Trap => write!(f, ": trap"),
            FaultKind::EndsBeforeWait => {
                write!(f, ": ends before this thread's griddepcontrol.wait")
            }
        }
    }
}

impl std::error::Error for Fault {}

/// Runs a kernel to its end or to its first fault. Blocks run one after the other.
pub fn run(module: &Module, memory: &mut Memory, launch: &Launch) -> Result<Stats, Fault> {
    let bad = |message: String| Fault {
        kernel: launch.entry.to_owned(),
        place: None,
        kind: FaultKind::BadLaunch(message),
    };
    let function = module
        .function(launch.entry)
        .ok_or_else(|| bad("no such kernel".into()))?;
    check_launch(function, launch).map_err(bad)?;
    memory.begin();
    // Each launch sees the module's variables as initialised.
    let mut addresses = HashMap::new();
    for (index, v) in module
        .variables
        .iter()
        .enumerate()
        .filter(|(_, v)| v.space != Space::Shared)
    {
        let address = memory.add_variable(&v.name, v.space, v.align, v.size);
        memory.write(address, &v.bytes);
        addresses.insert(index, address);
    }
    let mut result = Machine::new(module, function, launch, memory, &addresses).grid();
    if let Ok(stats) = &mut result {
        for buffer in memory.buffers.iter().filter(|b| b.space == Space::Global) {
            stats.global.add(&buffer.traffic);
            stats.buffers.push((buffer.name.clone(), buffer.traffic));
        }
    }
    addresses
        .values()
        .for_each(|&address| memory.remove(address));
    result
}

fn check_launch(function: &Function, launch: &Launch) -> Result<(), String> {
    let count = |n: [u32; 3]| n.iter().try_fold(1u64, |p, &n| p.checked_mul(u64::from(n)));
    let (Some(blocks @ 1..), Some(threads @ 1..=1024)) = (count(launch.grid), count(launch.block))
    else {
        return Err("the grid is empty or a block has not 1 to 1024 threads".into());
    };
    if launch.block[2] > 64 || launch.grid[0] > i32::MAX as u32 {
        return Err("block z is at most 64, grid x at most 2^31 - 1".into());
    }
    if launch.grid[1] > 65535 || launch.grid[2] > 65535 {
        return Err("grid y and z are at most 65535".into());
    }
    if blocks
        .checked_mul(threads)
        .is_none_or(|n| n > u64::from(u32::MAX))
    {
        return Err("more than 2^32 - 1 threads are not implemented".into());
    }
    if function.max_threads.is_some_and(|most| threads > most) {
        return Err(format!(
            "{threads} threads in a block, .maxntid allows {:?}",
            function.max_threads
        ));
    }
    if function
        .required_block
        .is_some_and(|block| block != launch.block)
    {
        return Err(format!(
            ".reqntid asks for blocks of {:?}",
            function.required_block
        ));
    }
    if launch.params.len() != function.param_size {
        let (have, want) = (launch.params.len(), function.param_size);
        return Err(format!(
            "{have} bytes of parameters, the kernel takes {want}"
        ));
    }
    Ok(())
}

/// The segments of shared or local memory and the addresses of the variables in them.
fn segment(variables: &[Variable], space: Space, dynamic: usize) -> (Memory, Vec<u64>) {
    let mut memory = Memory::segment();
    let addresses = variables.iter().map(|v| {
        let size = if v.dynamic { dynamic } else { v.size };
        memory.add_variable(&v.name, space, v.align, size)
    });
    let addresses = addresses.collect();
    (memory, addresses)
}

struct Machine<'a> {
    module: &'a Module,
    function: &'a Function,
    launch: &'a Launch<'a>,
    memory: &'a mut Memory,
    shared: Memory,
    /// One per thread of a block, where the kernel has local variables.
    local: Vec<Memory>,
    block: [u32; 3],
    block_index: u32,
    epoch: u32,
    block_epoch: u32,
    /// The buffer last used, likely the next one too.
    hint: usize,
    stats: Stats,
    /// How often each instruction was executed, where that is counted: before the wait, and after it.
    executed: Vec<[u64; 2]>,
    warps: Vec<Warp>,
}

impl<'a> Machine<'a> {
    fn new(
        module: &'a Module,
        function: &'a Function,
        launch: &'a Launch<'a>,
        memory: &'a mut Memory,
        addresses: &HashMap<usize, u64>,
    ) -> Self {
        let threads = launch.block.iter().product::<u32>() as usize;
        let (shared, shared_at) = segment(&function.shared, Space::Shared, launch.dynamic_shared);
        let (_, local_at) = segment(&function.local, Space::Local, 0);
        let local_count = if function.local.is_empty() {
            0
        } else {
            threads
        };
        let local = (0..local_count)
            .map(|_| segment(&function.local, Space::Local, 0).0)
            .collect();
        let mut warps: Vec<Warp> = (0..threads.div_ceil(LANES))
            .map(|_| Warp::new(function))
            .collect();
        for warp in &mut warps {
            for &(slot, fixed) in &function.fixed {
                match fixed {
                    Fixed::Value(value) => warp.set(slot, |_| value),
                    Fixed::Module(index) => warp.set(slot, |_| addresses[&index]),
                    Fixed::Shared(index) => warp.set(slot, |_| shared_at[index]),
                    Fixed::Local(index) => warp.set(slot, |_| local_at[index]),
                    Fixed::Special(_) => {}
                }
            }
        }
        Machine {
            module,
            function,
            launch,
            memory,
            shared,
            local,
            block: [0; 3],
            block_index: 0,
            epoch: 0,
            block_epoch: 0,
            hint: 0,
            stats: Stats::default(),
            executed: match launch.counts_lines {
                true => vec![[0; 2]; function.code.len()],
                false => Vec::new(),
            },
            warps,
        }
    }

    fn grid(mut self) -> Result<Stats, Fault> {
        let [gx, gy, gz] = self.launch.grid;
        for z in 0..gz {
            for y in 0..gy {
                for x in 0..gx {
                    self.block = [x, y, z];
                    self.run_block()?;
                    self.block_index += 1;
                }
            }
        }
        self.stats.shared = total(std::slice::from_ref(&self.shared));
        self.stats.local = total(&self.local);
        for (inst, [before, after]) in self.function.code.iter().zip(self.executed) {
            *self.stats.lines.entry(inst.line).or_default() += before + after;
            if after > 0 {
                *self.stats.lines_after_wait.entry(inst.line).or_default() += after;
            }
        }
        Ok(self.stats)
    }

    fn threads(&self) -> u32 {
        self.launch.block.iter().product()
    }

    fn run_block(&mut self) -> Result<(), Fault> {
        self.epoch += 1;
        self.block_epoch = self.epoch;
        self.shared.forget_contents();
        self.local.iter_mut().for_each(Memory::forget_contents);
        let mut warps = std::mem::take(&mut self.warps);
        for (index, warp) in warps.iter_mut().enumerate() {
            let first = (index * LANES) as u32;
            warp.start((self.threads() - first).min(LANES as u32));
            self.set_specials(warp, index as u32);
        }
        loop {
            for (index, warp) in warps.iter_mut().enumerate() {
                if warp.live != 0 && warp.waiting.is_none() {
                    self.run_warp(warp, index as u32)?;
                }
            }
            // Every warp has now exited or waits. Exited warps count as arrived.
            let mut waiting = warps
                .iter()
                .enumerate()
                .filter_map(|(n, w)| w.waiting.map(|id| (n, id)));
            let Some((_, id)) = waiting.next() else { break };
            if let Some((index, _)) = waiting.find(|&(_, other)| other != id) {
                let pc = warps[index].groups.last().map_or(0, |g| g.pc - 1);
                return Err(self.fault(
                    index as u32,
                    pc,
                    Raised {
                        lane: 0,
                        kind: FaultKind::Deadlock,
                    },
                ));
            }
            self.epoch += 1;
            warps.iter_mut().for_each(|w| w.waiting = None);
        }
        self.warps = warps;
        Ok(())
    }

    fn thread_at(&self, index: u32) -> [u32; 3] {
        let [x, y, _] = self.launch.block;
        [index % x, index / x % y, index / x / y]
    }

    fn set_specials(&self, warp: &mut Warp, index: u32) {
        let first = index * LANES as u32;
        for &(slot, fixed) in &self.function.fixed {
            if let Fixed::Special(special) = fixed {
                match special {
                    Special::Tid(axis) => {
                        warp.set(slot, |lane| {
                            u64::from(self.thread_at(first + lane)[axis as usize])
                        });
                    }
                    Special::Ntid(axis) => {
                        warp.set(slot, |_| u64::from(self.launch.block[axis as usize]))
                    }
                    Special::Ctaid(axis) => {
                        warp.set(slot, |_| u64::from(self.block[axis as usize]))
                    }
                    Special::Nctaid(axis) => {
                        warp.set(slot, |_| u64::from(self.launch.grid[axis as usize]))
                    }
                    Special::LaneId => warp.set(slot, u64::from),
                    Special::WarpId => warp.set(slot, |_| u64::from(index)),
                }
            } else {
                warp.keep(slot);
            }
        }
    }

    fn fault(&self, warp: u32, pc: u32, raised: Raised) -> Fault {
        let inst = &self.function.code[pc as usize];
        let text = self
            .module
            .lines()
            .get(inst.line as usize - 1)
            .map_or("", |l| l.trim());
        let register = match raised.kind {
            FaultKind::UndefinedRegister(slot) => Some(register_name(&self.function.names, slot)),
            FaultKind::UndefinedPredicate(slot) => {
                Some(register_name(&self.function.pred_names, slot))
            }
            _ => None,
        };
        let place = Place {
            block: self.block,
            thread: self.thread_at(warp * LANES as u32 + raised.lane),
            line: inst.line,
            text: text.to_owned(),
            register,
        };
        Fault {
            kernel: self.function.name.clone(),
            place: Some(Box::new(place)),
            kind: raised.kind,
        }
    }

    /// Runs a warp until it exits or waits. Of the groups its lanes have parted into, the one at
    /// the lowest pc runs, and joins the next as soon as it gets there.
    fn run_warp(&mut self, warp: &mut Warp, index: u32) -> Result<(), Fault> {
        while let Some(mut group) = warp.groups.pop() {
            while let Some(next) = warp.groups.pop_if(|next| next.pc == group.pc) {
                group.mask |= next.mask;
            }
            let join = warp.groups.last().map_or(u32::MAX, |next| next.pc);
            loop {
                let flow = self
                    .step(warp, index, group.pc, group.mask)
                    .map_err(|raised| self.fault(index, group.pc, raised))?;
                match flow {
                    Flow::Next => {
                        group.pc += 1;
                        if group.pc >= join {
                            warp.push(group.pc, group.mask);
                            break;
                        }
                    }
                    Flow::Queued => break,
                    Flow::Wait => return Ok(()),
                }
            }
        }
        // The others have exited instead.
        warp.cross();
        Ok(())
    }

    fn step(&mut self, warp: &mut Warp, index: u32, pc: u32, lanes: u32) -> Result<Flow, Raised> {
        let function = self.function;
        let inst = &function.code[pc as usize];
        warp.executed += 1;
        if warp.executed > self.launch.budget {
            return raise(lanes, FaultKind::BudgetSpent);
        }
        let mask = warp.pred(inst.guard, lanes)?;
        self.stats.warp_instructions += 1;
        if let Some(times) = self.executed.get_mut(pc as usize) {
            times[usize::from(lanes & !warp.waited == 0)] += 1;
        }
        self.stats.thread_instructions += u64::from(mask.count_ones());
        if mask == 0 {
            return Ok(Flow::Next);
        }
        warp.check_sources(inst, mask)?;
        match inst.op {
            Op::Bra { target, uniform } => {
                let rest = lanes & !mask;
                if rest != 0 {
                    if uniform {
                        return raise(rest, FaultKind::DivergentUniform);
                    }
                    warp.push(pc + 1, rest);
                }
                warp.push(target, mask);
                return Ok(Flow::Queued);
            }
            Op::LaunchDependents => {
                self.stats.launched_dependents += u64::from(mask.count_ones());
            }
            Op::Ret => {
                if self.launch.dependent && mask & !warp.waited != 0 {
                    return raise(mask & !warp.waited, FaultKind::EndsBeforeWait);
                }
                warp.live &= !mask;
                if lanes != mask {
                    warp.push(pc + 1, lanes & !mask);
                }
                return Ok(Flow::Queued);
            }
            Op::Barrier(id) => {
                // Compilers put code behind a barrier that leads to it: lanes there come later.
                let arrived = match warp.arrived.take() {
                    Some((group, _)) if group.pc == pc => group.mask | mask,
                    Some((group, _)) => group.mask,
                    None => mask,
                };
                let parted = arrived & mask != mask || mask != lanes;
                if parted || arrived != warp.live && warp.groups.is_empty() {
                    let live = warp.live;
                    return raise(mask, FaultKind::DivergentBarrier { arrived, live });
                }
                let group = Group { pc, mask: arrived };
                warp.arrived = Some((group, id));
                return Ok(match warp.cross() {
                    true => Flow::Wait,
                    false => Flow::Queued,
                });
            }
            Op::Ld(access) => self.load(warp, index, inst, access, mask)?,
            Op::St(access) => self.store(warp, index, inst, access, mask)?,
            Op::Prefetch(access) => self.prefetch(warp, index, inst, access, mask)?,
            _ => warp.execute(inst, mask)?,
        }
        Ok(Flow::Next)
    }

    fn load(
        &mut self,
        warp: &mut Warp,
        index: u32,
        inst: &Inst,
        a: Access,
        mask: u32,
    ) -> Result<(), Raised> {
        let element = a.ty.bytes();
        let width = element * usize::from(a.elements);
        let base = *warp.get(inst.src[0]);
        let mut values = [[0; LANES]; 4];
        for lane in lanes(mask) {
            let address = base[lane].wrapping_add(a.offset as u64);
            let thread = index * LANES as u32 + lane as u32;
            let (space, at) = resolve(a.space, address);
            let loaded = match space {
                Space::Param => self.param(at, width),
                Space::Local => match self.local.get_mut(thread as usize) {
                    Some(local) => local.load(at, width, None, false, PRIVATE, &mut 0),
                    None => Err(AccessError::OutOfBounds),
                },
                Space::Shared => {
                    let who = self.who(thread, warp.waited >> lane & 1 == 1);
                    self.shared.load(at, width, None, false, who, &mut 0)
                }
                Space::Global | Space::Const | Space::Generic => {
                    let who = self.who(thread, warp.waited >> lane & 1 == 1);
                    self.stats.loads_before_wait += u64::from(who.earlier == Earlier::Runs);
                    let only = if space == Space::Generic {
                        None
                    } else {
                        Some(space)
                    };
                    self.memory
                        .load(at, width, only, a.non_coherent, who, &mut self.hint)
                }
            };
            let bits = loaded
                .map_err(|error| self.access_fault(error, a, address, lane, thread, false))?;
            for (n, value) in values.iter_mut().take(usize::from(a.elements)).enumerate() {
                value[lane] = alu::extend((bits >> (8 * element * n)) as u64, a.ty, a.register);
            }
        }
        for (&slot, value) in inst.destinations().iter().zip(&values) {
            warp.write(slot, mask, value);
        }
        Ok(())
    }

    fn store(
        &mut self,
        warp: &mut Warp,
        index: u32,
        inst: &Inst,
        a: Access,
        mask: u32,
    ) -> Result<(), Raised> {
        let element = a.ty.bytes();
        let width = element * usize::from(a.elements);
        let (address_slot, sources) = (inst.src[0], &inst.sources()[1..]);
        for lane in lanes(mask) {
            let address = warp.get(address_slot)[lane].wrapping_add(a.offset as u64);
            let thread = index * LANES as u32 + lane as u32;
            let mut bits = 0u128;
            for (n, &slot) in sources.iter().enumerate() {
                bits |= u128::from(warp.get(slot)[lane] & a.ty.mask()) << (8 * element * n);
            }
            let data = Stored {
                value: bits,
                relaxed: a.relaxed,
            };
            let (space, at) = resolve(a.space, address);
            let stored = match space {
                Space::Param => Err(AccessError::ReadOnly),
                Space::Local => match self.local.get_mut(thread as usize) {
                    Some(local) => local.store(at, width, None, data, PRIVATE, &mut 0),
                    None => Err(AccessError::OutOfBounds),
                },
                Space::Shared => {
                    let who = self.who(thread, warp.waited >> lane & 1 == 1);
                    self.shared.store(at, width, None, data, who, &mut 0)
                }
                Space::Global | Space::Const | Space::Generic => {
                    let who = self.who(thread, warp.waited >> lane & 1 == 1);
                    let only = if space == Space::Generic {
                        None
                    } else {
                        Some(space)
                    };
                    self.memory
                        .store(at, width, only, data, who, &mut self.hint)
                }
            };
            stored.map_err(|error| self.access_fault(error, a, address, lane, thread, true))?;
        }
        Ok(())
    }

    fn prefetch(
        &mut self,
        warp: &mut Warp,
        index: u32,
        inst: &Inst,
        a: Access,
        mask: u32,
    ) -> Result<(), Raised> {
        for lane in lanes(mask) {
            let address = warp.get(inst.src[0])[lane].wrapping_add(a.offset as u64);
            let thread = index * LANES as u32 + lane as u32;
            let earlier = self.who(thread, warp.waited >> lane & 1 == 1).earlier;
            self.memory
                .prefetch(address, Some(a.space), earlier, &mut self.hint)
                .map_err(|error| self.access_fault(error, a, address, lane, thread, false))?;
        }
        Ok(())
    }

    fn who(&self, thread: u32, waited: bool) -> Who {
        let thread = self.block_index * self.threads() + thread;
        Who {
            thread,
            epoch: self.epoch,
            block_epoch: self.block_epoch,
            earlier: match (self.launch.dependent, waited) {
                (false, _) => Earlier::Ended,
                (true, false) => Earlier::Runs,
                (true, true) => Earlier::Waited,
            },
        }
    }

    fn param(&self, at: u64, width: usize) -> Result<u128, AccessError> {
        if !at.is_multiple_of(width as u64) {
            return Err(AccessError::Misaligned);
        }
        let range = usize::try_from(at)
            .ok()
            .and_then(|at| self.launch.params.get(at..at.checked_add(width)?));
        let mut bytes = [0; 16];
        bytes[..width].copy_from_slice(range.ok_or(AccessError::OutOfBounds)?);
        Ok(u128::from_le_bytes(bytes))
    }

    fn access_fault(
        &self,
        error: AccessError,
        a: Access,
        address: u64,
        lane: usize,
        thread: u32,
        store: bool,
    ) -> Raised {
        let (space, at) = resolve(a.space, address);
        let nearest = match space {
            Space::Param => format!("{} bytes of parameters", self.launch.params.len()),
            Space::Local => match self.local.get(thread as usize) {
                Some(local) => local.nearest(at),
                None => "no local memory".into(),
            },
            Space::Shared => self.shared.nearest(at),
            Space::Global | Space::Const | Space::Generic => self.memory.nearest(at),
        };
        let width = a.ty.bytes() * usize::from(a.elements);
        let kind = FaultKind::Access {
            error,
            space,
            address,
            width,
            store,
            nearest,
        };
        Raised {
            lane: lane as u32,
            kind,
        }
    }
}

/// Local memory belongs to one thread.
const PRIVATE: Who = Who {
    thread: 0,
    epoch: 1,
    block_epoch: 1,
    earlier: Earlier::Ended,
};

enum Flow {
    Next,
    /// The lanes are back in the queue, or have exited.
    Queued,
    Wait,
}

/// The space a generic address lies in, and the address there.
fn resolve(space: Space, address: u64) -> (Space, u64) {
    if space != Space::Generic {
        return (space, address);
    }
    for space in [Space::Shared, Space::Local, Space::Param] {
        if let Some(at @ 0..0x1_0000_0000) = address.checked_sub(window(space)) {
            return (space, at);
        }
    }
    (Space::Generic, address)
}

fn total(memories: &[Memory]) -> Traffic {
    let mut sum = Traffic::default();
    for buffer in memories.iter().flat_map(|m| &m.buffers) {
        sum.add(&buffer.traffic);
    }
    sum
}

fn register_name(names: &[(Slot, u32, String)], slot: Slot) -> String {
    let found = names
        .iter()
        .find(|(first, count, _)| (*first..first + (*count).max(1)).contains(&slot));
    match found {
        Some((_, 0, name)) => name.clone(),
        Some((first, _, stem)) => format!("{stem}{}", slot - first),
        None => "?".into(),
    }
}
