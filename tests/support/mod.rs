//! What several test binaries share: the reference, and the cases that are compared with it.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod cases;
pub mod oracle;
