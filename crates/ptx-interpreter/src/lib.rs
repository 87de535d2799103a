//! Runs the PTX of CUDA kernels on the host, thread by thread, and checks what a GPU would not
//! report. For tests: no GPU, driver or toolkit is needed.
//!
//! * Every load and store is checked for bounds, alignment and bytes never written; two threads
//!   that touch one byte with nothing to order them, one of them writing, are a reported race.
//! * Anything the interpreter does not implement is an error that names its PTX line. No modifier
//!   is skipped: each opcode lists those it accepts.
//! * In a dependent launch ([`Launch::dependent`]) a thread that reads, writes or ends before its
//!   `griddepcontrol.wait` is a fault, as is `ld.global.nc` of what earlier work may write.
//! * Warps of 32 threads run in lock step. Lanes that part at a branch wait at the lowest program
//!   counter ahead, which is where structured code joins again.
//!
//! ```
//! use ptx_interpreter::{AccessError, FaultKind, Launch, Memory, Module, run};
//!
//! // x[thread] += 1
//! let module = Module::parse(
//!     ".version 8.0
//!      .target sm_80
//!      .address_size 64
//!      .visible .entry add_one(.param .u64 x)
//!      {
//!          .reg .b32 %r<3>;
//!          .reg .b64 %d<3>;
//!          ld.param.u64 %d0, [x];
//!          mov.u32 %r0, %tid.x;
//!          mad.wide.u32 %d1, %r0, 4, %d0;
//!          ld.global.u32 %r1, [%d1];
//!          add.u32 %r2, %r1, 1;
//!          st.global.u32 [%d1], %r2;
//!          ret;
//!      }",
//! )?;
//! let mut memory = Memory::new();
//! let values = [1u32, 2, 3, 4].map(u32::to_le_bytes).concat();
//! let x = memory.add("x", values, 0);
//! let params = x.to_le_bytes();
//!
//! let stats = run(&module, &mut memory, &Launch::new("add_one", [1; 3], [4, 1, 1], &params))?;
//! assert_eq!(memory.bytes(x), [2u32, 3, 4, 5].map(u32::to_le_bytes).concat());
//! assert_eq!(stats.buffer("x").map(|traffic| traffic.stores_of(4)), Some(4));
//!
//! // A fifth thread has no element.
//! let fault = run(&module, &mut memory, &Launch::new("add_one", [1; 3], [5, 1, 1], &params))
//!     .unwrap_err();
//! assert!(matches!(
//!     fault.kind,
//!     FaultKind::Access { error: AccessError::OutOfBounds, .. },
//! ));
//! assert_eq!(fault.place.map(|place| place.thread), Some([4, 0, 0]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Not modelled: timing, caches, atomics, device functions, `f64` arithmetic, and orderings weaker
//! than a block barrier.

mod alu;
mod decode;
mod inst;
mod lex;
mod machine;
mod memory;
mod parse;
mod regular;
mod warp;

pub use alu::e4m3;
pub use inst::Space;
pub use machine::{Fault, FaultKind, Launch, Place, Stats, run};
pub use memory::{AccessError, Memory, Touches, Traffic};
pub use parse::{Error, Module};
