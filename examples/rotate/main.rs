//! Rotates the queries and keys of a real model and shows what there is to know about it: how
//! far the result is from the one transformers computes, whether attention scores depend on
//! relative position alone, and how the speed compares with copying memory.
//!
//! ```text
//! cargo run --release --example rotate
//! cargo run --release --example rotate -- --help
//! ```
//!
//! `builtin.rs` and `tensors.rs` are where the crate is used; the rest is options, files and
//! layout of the report.

mod builtin;
mod config;
mod file;
mod options;
mod output;
mod report;
mod scores;
mod speed;
mod tensors;

use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use options::{Options, Request};

/// What went wrong, as one line.
#[derive(Debug)]
struct Failure(String);

type Result<T, E = Failure> = std::result::Result<T, E>;

/// A [`Failure`], to be returned.
fn fail<T>(message: impl Into<String>) -> Result<T> {
    Err(Failure(message.into()))
}

impl From<phasor::config::ConfigError> for Failure {
    fn from(error: phasor::config::ConfigError) -> Self {
        Self(error.to_string())
    }
}

impl From<phasor::Error> for Failure {
    fn from(error: phasor::Error) -> Self {
        Self(error.to_string())
    }
}

fn main() -> ExitCode {
    let args = std::env::args_os().skip(1);
    ExitCode::from(run(args, &mut std::io::stdout(), &mut std::io::stderr()))
}

/// The whole program; returns its exit code.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> u8 {
    let written = answer(args).and_then(|text| {
        let written = stdout.write_all(text.as_bytes());
        match written.and_then(|()| stdout.flush()) {
            // The reader has seen enough, as in `rotate | head -1`.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            Err(error) => fail(format!("cannot write the report: {error}")),
            Ok(()) => Ok(()),
        }
    });
    match written {
        Ok(()) => 0,
        Err(Failure(message)) => {
            // If nobody reads errors either, the exit code remains.
            let _ = writeln!(stderr, "rotate: {}", report::printable(&message));
            2
        }
    }
}

/// What goes to stdout. It is printed in one piece, so that a failure prints none of it.
fn answer(args: impl IntoIterator<Item = OsString>) -> Result<String> {
    match Options::parse(args)? {
        Request::Help => Ok(options::HELP.to_string()),
        Request::Rotate(options) => match &options.input {
            None => builtin::rotate(&options),
            Some(path) => file::rotate(&options, path),
        },
    }
}
