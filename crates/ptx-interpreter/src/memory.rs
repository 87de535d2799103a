//! Buffers with device-like addresses, and the checks every access goes through.

use crate::inst::Space;
use std::collections::BTreeMap;
use std::fmt;

/// First address handed out; what lies below holds the windows of the other spaces.
const FIRST_ADDRESS: u64 = 0x7f40_0000_0000;
/// Room between buffers: an access off by less hits nothing.
const GAP: u64 = 1 << 20;
/// Every buffer starts at a multiple of this plus its own misalignment.
const GRAIN: u64 = 256;
/// Storage unit of a sparse buffer. Small, as it is cleared when it is made, and what is in one is often a
/// head of a tensor that is spread far.
const PAGE: u64 = 1 << 10;
/// Bytes whose access records are allocated and cleared together.
const RECORDS: usize = 256;

/// Why a load or store was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AccessError {
    OutOfBounds,
    Misaligned,
    /// A byte read here was never written.
    Unwritten {
        at: u64,
    },
    ReadOnly,
    /// Another thread touched the byte, nothing orders the two, and one of them writes.
    Race {
        at: u64,
        /// Its number in the grid, where the records still tell.
        other_thread: Option<u32>,
        other_wrote: bool,
    },
    /// A byte read by `ld.global.nc` is written in the same launch.
    NonCoherent {
        at: u64,
    },
    /// In a dependent launch, a load of what earlier work may still write, or a store, by a thread that
    /// has not executed `griddepcontrol.wait`.
    BeforeWait,
    /// In a dependent launch, `ld.global.nc` of what earlier work may write.
    NonCoherentWithEarlier,
}

impl fmt::Display for AccessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AccessError::OutOfBounds => write!(f, "out of bounds"),
            AccessError::Misaligned => write!(f, "not naturally aligned"),
            AccessError::Unwritten { at } => {
                write!(f, "reads byte {at:#x}, which was never written")
            }
            AccessError::ReadOnly => write!(f, "writes a read-only buffer"),
            AccessError::Race {
                at,
                other_thread,
                other_wrote,
            } => {
                let verb = if *other_wrote { "wrote" } else { "read" };
                write!(f, "races at byte {at:#x}, which ")?;
                match other_thread {
                    Some(thread) => write!(f, "thread {thread} of the grid {verb}"),
                    None => write!(f, "another thread {verb}"),
                }
            }
            AccessError::BeforeWait => {
                write!(f, "before this thread's griddepcontrol.wait")
            }
            AccessError::NonCoherentWithEarlier => {
                write!(f, "ld.global.nc of what earlier work may write")
            }
            AccessError::NonCoherent { at } => {
                write!(
                    f,
                    "byte {at:#x} is read by ld.global.nc and written in one launch"
                )
            }
        }
    }
}

/// Numbers of loads and stores by width: index `n` counts accesses of `2^n` bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Traffic {
    pub loads: [u64; 5],
    pub stores: [u64; 5],
    pub prefetches: u64,
    /// Of the loads, those by threads of a dependent launch before their `griddepcontrol.wait`.
    pub loads_before_wait: u64,
    /// The same of the prefetches.
    pub prefetches_before_wait: u64,
}

fn bytes_of(counts: &[u64; 5]) -> u64 {
    counts.iter().enumerate().map(|(n, count)| count << n).sum()
}

impl Traffic {
    /// Loads of `width` bytes (1, 2, 4, 8 or 16).
    pub fn loads_of(&self, width: usize) -> u64 {
        self.loads[width.trailing_zeros() as usize]
    }

    pub fn stores_of(&self, width: usize) -> u64 {
        self.stores[width.trailing_zeros() as usize]
    }

    pub fn loaded_bytes(&self) -> u64 {
        bytes_of(&self.loads)
    }

    pub fn stored_bytes(&self) -> u64 {
        bytes_of(&self.stores)
    }

    pub(crate) fn add(&mut self, other: &Traffic) {
        for n in 0..5 {
            self.loads[n] += other.loads[n];
            self.stores[n] += other.stores[n];
        }
        self.prefetches += other.prefetches;
        self.loads_before_wait += other.loads_before_wait;
        self.prefetches_before_wait += other.prefetches_before_wait;
    }
}

/// How often the bytes of a range were read and written in the last launch, as (least, most).
/// Reads count up to 65535, writes up to 255.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Touches {
    pub reads: (u32, u32),
    pub writes: (u32, u32),
}

/// The thread that makes an access, and when.
#[derive(Clone, Copy)]
pub struct Who {
    /// Number of the thread in the grid.
    pub thread: u32,
    /// Counts barriers and block starts; only accesses of one epoch are unordered within a block.
    pub epoch: u32,
    /// The epoch in which the running block started: what is older belongs to other blocks.
    pub block_epoch: u32,
    pub earlier: Earlier,
}

/// How a thread stands to work that was enqueued before its launch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// It has ended: the launch is no dependent one.
    Ended,
    /// It may still run.
    Runs,
    /// The launch is dependent, and the thread has waited.
    Waited,
}

/// What a store writes.
#[derive(Clone, Copy)]
pub struct Stored {
    pub value: u128,
    /// It may meet others that are.
    pub relaxed: bool,
}

/// What earlier work that may still run can do to a buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Writes,
    /// Nothing, by the caller's promise for this launch.
    Promised,
    /// Nothing ever.
    Constant,
}

/// More than one thread read the byte in `read_epoch`.
const MANY_READERS: u8 = 1;
/// A block before that of `reader` read the byte too.
const FOREIGN_READER: u8 = 2;
const READ_NON_COHERENT: u8 = 4;
/// All that was written was so by stores that may meet.
const WRITES_MAY_MEET: u8 = 8;

/// What one launch did to one byte. Epoch 0 is never.
#[derive(Clone, Copy, Default)]
struct Record {
    write_epoch: u32,
    writer: u32,
    read_epoch: u32,
    reader: u32,
    reads: u16,
    writes: u8,
    flags: u8,
}

impl Record {
    fn race_with_writer(&self) -> AccessError {
        AccessError::Race {
            at: 0,
            other_thread: Some(self.writer),
            other_wrote: true,
        }
    }

    fn read(&mut self, who: Who, non_coherent: bool) -> Result<(), AccessError> {
        if self.write_epoch != 0 {
            if non_coherent {
                return Err(AccessError::NonCoherent { at: 0 });
            }
            if self.write_epoch < who.block_epoch
                || (self.write_epoch == who.epoch && self.writer != who.thread)
            {
                return Err(self.race_with_writer());
            }
        }
        self.reads = self.reads.saturating_add(1);
        if non_coherent {
            self.flags |= READ_NON_COHERENT;
        }
        if self.read_epoch == who.epoch {
            if self.reader != who.thread {
                self.flags |= MANY_READERS;
            }
            return Ok(());
        }
        if self.read_epoch != 0 && self.read_epoch < who.block_epoch {
            self.flags |= FOREIGN_READER;
        }
        self.flags &= !MANY_READERS;
        self.read_epoch = who.epoch;
        self.reader = who.thread;
        Ok(())
    }

    /// `may_meet`: with other stores that may.
    fn write(&mut self, who: Who, may_meet: bool) -> Result<(), AccessError> {
        if self.write_epoch == 0 {
            self.flags |= WRITES_MAY_MEET;
        }
        if !may_meet {
            self.flags &= !WRITES_MAY_MEET;
        }
        if self.write_epoch != 0
            && self.flags & WRITES_MAY_MEET == 0
            && (self.write_epoch < who.block_epoch
                || (self.write_epoch == who.epoch && self.writer != who.thread))
        {
            return Err(self.race_with_writer());
        }
        if self.flags & READ_NON_COHERENT != 0 {
            return Err(AccessError::NonCoherent { at: 0 });
        }
        let other_reader = self.read_epoch == who.epoch
            && (self.reader != who.thread || self.flags & MANY_READERS != 0);
        let other_block = self.read_epoch < who.block_epoch;
        if self.read_epoch != 0 && (other_reader || other_block || self.flags & FOREIGN_READER != 0)
        {
            let known = other_block || (other_reader && self.reader != who.thread);
            let other_thread = known.then_some(self.reader);
            return Err(AccessError::Race {
                at: 0,
                other_thread,
                other_wrote: false,
            });
        }
        self.writes = self.writes.saturating_add(1);
        self.write_epoch = who.epoch;
        self.writer = who.thread;
        Ok(())
    }
}

/// The records of `RECORDS` bytes, valid in one launch.
#[derive(Clone, Default)]
struct Shadow {
    generation: u32,
    records: Vec<Record>,
}

/// Contiguous storage: bytes, one bit each for "holds a value", and the access records.
#[derive(Clone)]
struct Chunk {
    data: Vec<u8>,
    written: Vec<u64>,
    shadow: Vec<Shadow>,
}

impl Chunk {
    fn new(len: usize) -> Chunk {
        Chunk {
            data: vec![0; len],
            written: vec![0; len.div_ceil(64)],
            shadow: vec![Shadow::default(); len.div_ceil(RECORDS)],
        }
    }

    fn fill(&mut self, at: usize, bytes: &[u8]) {
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
        for i in at..at + bytes.len() {
            self.written[i / 64] |= 1 << (i % 64);
        }
    }

    fn is_written(&self, at: usize) -> bool {
        self.written[at / 64] >> (at % 64) & 1 == 1
    }

    /// The records of an access, which being aligned lies in one `Shadow`.
    fn records(&mut self, at: usize, width: usize, generation: u32) -> &mut [Record] {
        let shadow = &mut self.shadow[at / RECORDS];
        if shadow.generation != generation {
            shadow.generation = generation;
            shadow.records.clear();
            shadow.records.resize(RECORDS, Record::default());
        }
        &mut shadow.records[at % RECORDS..][..width]
    }

    fn load(
        &mut self,
        at: usize,
        width: usize,
        generation: u32,
        who: Who,
        non_coherent: bool,
    ) -> Result<u128, (usize, AccessError)> {
        let missing = !(self.written[at / 64] >> (at % 64)) & ((1 << width) - 1);
        if missing != 0 {
            return Err((
                missing.trailing_zeros() as usize,
                AccessError::Unwritten { at: 0 },
            ));
        }
        for (i, record) in self.records(at, width, generation).iter_mut().enumerate() {
            record.read(who, non_coherent).map_err(|e| (i, e))?;
        }
        let mut bytes = [0; 16];
        bytes[..width].copy_from_slice(&self.data[at..at + width]);
        Ok(u128::from_le_bytes(bytes))
    }

    fn store(
        &mut self,
        at: usize,
        width: usize,
        generation: u32,
        who: Who,
        may_meet: bool,
        value: u128,
    ) -> Result<(), (usize, AccessError)> {
        for (i, record) in self.records(at, width, generation).iter_mut().enumerate() {
            record.write(who, may_meet).map_err(|e| (i, e))?;
        }
        self.data[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        self.written[at / 64] |= ((1 << width) - 1) << (at % 64);
        Ok(())
    }
}

enum Store {
    Dense(Chunk),
    Sparse(BTreeMap<u64, Chunk>),
}

pub(crate) struct Buffer {
    pub name: String,
    pub space: Space,
    pub traffic: Traffic,
    address: u64,
    length: u64,
    /// Bytes between the multiple of `GRAIN` where storage starts and `address`. Storage offsets
    /// then have the alignment of addresses.
    lead: u64,
    read_only: bool,
    contended: bool,
    standing: Standing,
    store: Store,
}

impl Buffer {
    fn holds(&self, address: u64, width: u64) -> bool {
        address
            .checked_sub(self.address)
            .is_some_and(|at| at < self.length && width <= self.length - at)
    }

    /// The chunk with an address and the place in it; `None` for a sparse page nobody wrote.
    fn chunk(&mut self, address: u64, make: bool) -> Option<(&mut Chunk, usize)> {
        let at = address - self.address + self.lead;
        match &mut self.store {
            Store::Dense(chunk) => Some((chunk, at as usize)),
            Store::Sparse(pages) => {
                if make {
                    pages
                        .entry(at / PAGE)
                        .or_insert_with(|| Chunk::new(PAGE as usize));
                }
                Some((pages.get_mut(&(at / PAGE))?, (at % PAGE) as usize))
            }
        }
    }

    fn chunk_ref(&self, address: u64) -> Option<(&Chunk, usize)> {
        let at = address - self.address + self.lead;
        match &self.store {
            Store::Dense(chunk) => Some((chunk, at as usize)),
            Store::Sparse(pages) => Some((pages.get(&(at / PAGE))?, (at % PAGE) as usize)),
        }
    }
}

/// The buffers kernels may touch.
pub struct Memory {
    /// By address.
    pub(crate) buffers: Vec<Buffer>,
    /// Where the next buffer may start.
    next: u64,
    gap: u64,
    /// Number of the launch whose records count.
    generation: u32,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    pub fn new() -> Memory {
        Memory {
            buffers: Vec::new(),
            next: FIRST_ADDRESS,
            gap: GAP,
            generation: 0,
        }
    }

    /// A segment of another space, with addresses from 0.
    pub(crate) fn segment() -> Memory {
        Memory {
            buffers: Vec::new(),
            next: 0,
            gap: GRAIN,
            generation: 0,
        }
    }

    /// Registers a buffer with contents. Its address is a multiple of 256 plus `misalign`.
    pub fn add(&mut self, name: &str, bytes: Vec<u8>, misalign: usize) -> u64 {
        let address = self.add_uninit(name, bytes.len(), misalign);
        self.write(address, &bytes);
        address
    }

    /// Registers a buffer none of whose bytes holds a value yet.
    pub fn add_uninit(&mut self, name: &str, len: usize, misalign: usize) -> u64 {
        let address = self.next_multiple() + misalign as u64;
        let chunk = Chunk::new((address % GRAIN) as usize + len);
        self.place(
            name,
            Space::Global,
            address,
            len as u64,
            Store::Dense(chunk),
        )
    }

    /// Registers a buffer of any length that takes room only where it is written.
    pub fn add_sparse(&mut self, name: &str, len: u64, misalign: usize) -> u64 {
        let address = self.next_multiple() + misalign as u64;
        self.place(
            name,
            Space::Global,
            address,
            len,
            Store::Sparse(BTreeMap::new()),
        )
    }

    /// Registers a buffer at an address of the caller's choice, which must be free and at or above
    /// 0x7f40_0000_0000.
    pub fn add_at(&mut self, name: &str, address: u64, bytes: &[u8]) -> u64 {
        assert!(
            address >= FIRST_ADDRESS,
            "{address:#x} is below device memory"
        );
        let chunk = Chunk::new((address % GRAIN) as usize + bytes.len());
        self.place(
            name,
            Space::Global,
            address,
            bytes.len() as u64,
            Store::Dense(chunk),
        );
        self.write(address, bytes);
        address
    }

    /// A variable: aligned as declared and no better, so that code counting on more is found out.
    pub(crate) fn add_variable(
        &mut self,
        name: &str,
        space: Space,
        align: usize,
        len: usize,
    ) -> u64 {
        let address = self.next_multiple() + align as u64 % GRAIN;
        let chunk = Chunk::new((address % GRAIN) as usize + len);
        self.place(name, space, address, len as u64, Store::Dense(chunk));
        // Earlier work knows nothing of it.
        self.set_standing(address, Standing::Constant);
        address
    }

    /// Takes a variable away again.
    pub(crate) fn remove(&mut self, address: u64) {
        let index = self.index_of(address);
        self.buffers.remove(index);
    }

    fn next_multiple(&self) -> u64 {
        self.next.next_multiple_of(GRAIN)
    }

    fn place(&mut self, name: &str, space: Space, address: u64, length: u64, store: Store) -> u64 {
        let index = self.buffers.partition_point(|b| b.address < address);
        let free = |b: &Buffer| b.address >= address + length || address >= b.address + b.length;
        assert!(
            self.buffers.iter().all(free),
            "{name} overlaps another buffer"
        );
        let lead = address % GRAIN;
        let traffic = Traffic::default();
        let name = name.to_owned();
        let buffer = Buffer {
            name,
            space,
            traffic,
            address,
            length,
            lead,
            read_only: false,
            contended: false,
            standing: Standing::Writes,
            store,
        };
        self.buffers.insert(index, buffer);
        self.next = self.next.max(address + length + self.gap);
        address
    }

    /// Makes stores into the buffer at `address` a fault.
    pub fn set_read_only(&mut self, address: u64) {
        let index = self.index_of(address);
        self.buffers[index].read_only = true;
    }

    /// The buffer at `address` is written by no earlier work: a dependent launch may read it before it
    /// waits, and by `ld.global.nc`.
    pub fn set_constant(&mut self, address: u64) {
        self.set_standing(address, Standing::Constant);
    }

    /// The caller promises that no earlier work that may still run writes the buffer at `address`: this
    /// launch may read it before it waits. Not by `ld.global.nc`, as the same instruction serves
    /// launches without the promise.
    pub fn set_promised(&mut self, address: u64) {
        self.set_standing(address, Standing::Promised);
    }

    /// Earlier work has ended: nothing writes any buffer before a dependent launch waits.
    pub fn earlier_work_has_ended(&mut self) {
        for buffer in &mut self.buffers {
            buffer.standing = Standing::Constant;
        }
    }

    /// The last launch may still run when the next one begins, and so may those before it if it was `dependent`
    /// itself: a dependent launch waits before it reads what any of them stored to.
    pub fn last_launch_may_still_run(&mut self, dependent: bool) {
        for buffer in &mut self.buffers {
            let stored = buffer.traffic.stores.iter().any(|&stores| stores != 0);
            if stored {
                buffer.standing = Standing::Writes;
            } else if !dependent {
                buffer.standing = Standing::Constant;
            }
        }
    }

    /// Several threads may write a byte of the buffer that starts at `address`: whichever store the
    /// interpreter executes last stays, as any may on a GPU.
    pub fn set_contended(&mut self, address: u64) {
        let index = self.index_of(address);
        self.buffers[index].contended = true;
    }

    fn set_standing(&mut self, address: u64, standing: Standing) {
        let index = self.index_of(address);
        self.buffers[index].standing = standing;
    }

    /// The bytes of the dense buffer that starts at `address`; those never written are zero.
    pub fn bytes(&self, address: u64) -> &[u8] {
        let buffer = &self.buffers[self.index_of(address)];
        match &buffer.store {
            Store::Dense(chunk) => &chunk.data[buffer.lead as usize..],
            Store::Sparse(_) => panic!("{} is sparse: use read", buffer.name),
        }
    }

    /// Writes from the host.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        let Some(index) = self.find(address, bytes.len(), None, 0) else {
            assert!(bytes.is_empty(), "host write out of bounds at {address:#x}");
            return;
        };
        let buffer = &mut self.buffers[index];
        if let Store::Dense(chunk) = &mut buffer.store {
            chunk.fill((address - buffer.address + buffer.lead) as usize, bytes);
            return;
        }
        let (mut address, mut bytes) = (address, bytes);
        while !bytes.is_empty() {
            let (chunk, at) = buffer.chunk(address, true).expect("it is made");
            let (here, further) = bytes.split_at(bytes.len().min(PAGE as usize - at));
            chunk.fill(at, here);
            address += here.len() as u64;
            bytes = further;
        }
    }

    /// Reads from the host; `None` if a byte was never written.
    pub fn read(&self, address: u64, len: usize) -> Option<Vec<u8>> {
        let buffer = &self.buffers[self.find(address, len, None, 0)?];
        let byte = |address| {
            let (chunk, at) = buffer.chunk_ref(address)?;
            chunk.is_written(at).then(|| chunk.data[at])
        };
        (address..address + len as u64).map(byte).collect()
    }

    /// For each byte of a range, whether it holds a value.
    pub fn written(&self, address: u64, len: usize) -> Vec<bool> {
        let index = self.find(address, len, None, 0);
        let buffer = &self.buffers[index.expect("the range lies in one buffer")];
        let byte = |address| {
            buffer
                .chunk_ref(address)
                .is_some_and(|(chunk, at)| chunk.is_written(at))
        };
        (address..address + len as u64).map(byte).collect()
    }

    /// How often each byte of a range was (read, written) in the last launch.
    pub fn counts(&self, address: u64, len: usize) -> Vec<(u32, u32)> {
        let index = self.find(address, len, None, 0);
        let buffer = &self.buffers[index.expect("the range lies in one buffer")];
        let count = |address| {
            let Some((chunk, at)) = buffer.chunk_ref(address) else {
                return (0, 0);
            };
            let shadow = &chunk.shadow[at / RECORDS];
            if shadow.generation != self.generation || shadow.records.is_empty() {
                return (0, 0);
            }
            let record = &shadow.records[at % RECORDS];
            (u32::from(record.reads), u32::from(record.writes))
        };
        (address..address + len as u64).map(count).collect()
    }

    /// The extremes of [`Memory::counts`].
    pub fn touches(&self, address: u64, len: usize) -> Touches {
        let counts = self.counts(address, len);
        let range = |pick: fn(&(u32, u32)) -> u32| {
            let values = counts.iter().map(pick);
            (values.clone().min().unwrap_or(0), values.max().unwrap_or(0))
        };
        Touches {
            reads: range(|c| c.0),
            writes: range(|c| c.1),
        }
    }

    fn index_of(&self, address: u64) -> usize {
        let index = self.buffers.iter().position(|b| b.address == address);
        index.unwrap_or_else(|| panic!("no buffer starts at {address:#x}"))
    }

    /// Forgets the counts and records of earlier launches.
    pub(crate) fn begin(&mut self) {
        self.generation += 1;
        for buffer in &mut self.buffers {
            buffer.traffic = Traffic::default();
        }
    }

    /// For a new block: contents and records go, the buffers stay.
    pub(crate) fn forget_contents(&mut self) {
        self.generation += 1;
        for buffer in &mut self.buffers {
            if let Store::Dense(chunk) = &mut buffer.store {
                chunk.written.fill(0);
            }
        }
    }

    /// The buffer that holds all of a range, tried at `hint` first.
    fn find(&self, address: u64, width: usize, space: Option<Space>, hint: usize) -> Option<usize> {
        let fits =
            |b: &Buffer| b.holds(address, width as u64) && space.is_none_or(|s| s == b.space);
        if self.buffers.get(hint).is_some_and(fits) {
            return Some(hint);
        }
        let index = self
            .buffers
            .partition_point(|b| b.address <= address)
            .checked_sub(1)?;
        fits(&self.buffers[index]).then_some(index)
    }

    fn prepare(
        &self,
        address: u64,
        width: usize,
        space: Option<Space>,
        hint: &mut usize,
    ) -> Result<usize, AccessError> {
        if !address.is_multiple_of(width as u64) {
            return Err(AccessError::Misaligned);
        }
        *hint = self
            .find(address, width, space, *hint)
            .ok_or(AccessError::OutOfBounds)?;
        Ok(*hint)
    }

    pub(crate) fn load(
        &mut self,
        address: u64,
        width: usize,
        space: Option<Space>,
        non_coherent: bool,
        who: Who,
        hint: &mut usize,
    ) -> Result<u128, AccessError> {
        let index = self.prepare(address, width, space, hint)?;
        let generation = self.generation;
        let buffer = &mut self.buffers[index];
        if who.earlier == Earlier::Runs && buffer.standing == Standing::Writes {
            return Err(AccessError::BeforeWait);
        }
        if who.earlier != Earlier::Ended && non_coherent && buffer.standing != Standing::Constant {
            return Err(AccessError::NonCoherentWithEarlier);
        }
        buffer.traffic.loads[width.trailing_zeros() as usize] += 1;
        buffer.traffic.loads_before_wait += u64::from(who.earlier == Earlier::Runs);
        let (chunk, at) = buffer
            .chunk(address, false)
            .ok_or(AccessError::Unwritten { at: address })?;
        chunk
            .load(at, width, generation, who, non_coherent)
            .map_err(|(i, e)| e.at(address + i as u64))
    }

    /// A prefetch reads nothing, so that earlier work may write the byte all the same.
    pub(crate) fn prefetch(
        &mut self,
        address: u64,
        space: Option<Space>,
        earlier: Earlier,
        hint: &mut usize,
    ) -> Result<(), AccessError> {
        let index = self.prepare(address, 1, space, hint)?;
        let traffic = &mut self.buffers[index].traffic;
        traffic.prefetches += 1;
        traffic.prefetches_before_wait += u64::from(earlier == Earlier::Runs);
        Ok(())
    }

    pub(crate) fn store(
        &mut self,
        address: u64,
        width: usize,
        space: Option<Space>,
        data: Stored,
        who: Who,
        hint: &mut usize,
    ) -> Result<(), AccessError> {
        let index = self.prepare(address, width, space, hint)?;
        let generation = self.generation;
        let buffer = &mut self.buffers[index];
        if buffer.read_only || buffer.space == Space::Const {
            return Err(AccessError::ReadOnly);
        }
        if who.earlier == Earlier::Runs && buffer.space == Space::Global {
            return Err(AccessError::BeforeWait);
        }
        buffer.traffic.stores[width.trailing_zeros() as usize] += 1;
        let may_meet = data.relaxed || buffer.contended;
        let (chunk, at) = buffer
            .chunk(address, true)
            .ok_or(AccessError::OutOfBounds)?;
        chunk
            .store(at, width, generation, who, may_meet, data.value)
            .map_err(|(i, e)| e.at(address + i as u64))
    }

    /// Where an address lies in relation to the buffer closest to it.
    pub(crate) fn nearest(&self, address: u64) -> String {
        let distance = |b: &Buffer| {
            let end = b.address + b.length;
            if address < b.address {
                b.address - address
            } else {
                (address + 1).saturating_sub(end)
            }
        };
        match self.buffers.iter().min_by_key(|b| distance(b)) {
            None => "no buffer exists".into(),
            Some(b) if address < b.address => {
                format!(
                    "{} bytes before buffer {} of {} bytes",
                    b.address - address,
                    b.name,
                    b.length
                )
            }
            Some(b) => {
                format!(
                    "offset {} in buffer {} of {} bytes",
                    address - b.address,
                    b.name,
                    b.length
                )
            }
        }
    }
}

impl AccessError {
    fn at(mut self, address: u64) -> AccessError {
        match &mut self {
            AccessError::Unwritten { at }
            | AccessError::Race { at, .. }
            | AccessError::NonCoherent { at } => *at = address,
            AccessError::OutOfBounds
            | AccessError::Misaligned
            | AccessError::ReadOnly
            | AccessError::BeforeWait
            | AccessError::NonCoherentWithEarlier => {}
        }
        self
    }
}
