//! A PTX interpreter for tests: runs a kernel's PTX on the host, thread by thread, and checks what
//! a GPU would not report.
//!
//! * Every load and store is checked for bounds, alignment and bytes never written; two threads
//!   that touch one byte with nothing to order them, one of them writing, are a reported race.
//! * Anything the interpreter does not implement is an error that names its PTX line. No modifier
//!   is skipped: each opcode lists those it accepts.
//! * Warps of 32 threads run in lock step. Lanes that part at a branch wait at the lowest program
//!   counter ahead, which is where structured code joins again.
//!
//! ```ignore
//! let module = ptx::Module::parse(text)?;
//! let mut memory = ptx::Memory::new();
//! let x = memory.add("x", &bytes, 0);
//! let stats = ptx::run(&module, &mut memory, &ptx::Launch::new("kernel", grid, block, &params))?;
//! ```
//!
//! Not modelled: timing, caches, atomics, device functions, `f64` arithmetic, and orderings weaker
//! than a block barrier.

#![allow(
    dead_code,
    unused_imports,
    reason = "each test binary uses a part of it"
)]

mod alu;
mod decode;
mod inst;
mod lex;
mod machine;
mod memory;
mod parse;
mod regular;
mod warp;

mod machine_tests;
mod opcode_tests;

pub use machine::{Fault, FaultKind, Launch, Place, Stats, run};
pub use memory::{AccessError, Memory, Touches, Traffic};
pub use parse::{Error, Module};
