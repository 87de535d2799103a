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
mod chart;
mod config;
mod file;
mod options;
mod output;
mod plot;
mod progress;
mod report;
mod scores;
mod speed;
mod tensors;

use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use options::{Options, Request};
use progress::Progress;

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
    let mut stderr = std::io::stderr();
    let progress_after = stderr.is_terminal().then_some(Duration::from_millis(500));
    let (stdout, stderr) = (&mut std::io::stdout(), &mut stderr);
    ExitCode::from(run(args, stdout, stderr, progress_after))
}

/// The whole program; returns its exit code. Work that takes longer than `progress_after` draws on stderr
/// how far it is.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
    progress_after: Option<Duration>,
) -> u8 {
    let answered = answer(args, &mut Progress::new(stderr, progress_after));
    let written = answered.and_then(|text| {
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
fn answer(args: impl IntoIterator<Item = OsString>, progress: &mut Progress<'_>) -> Result<String> {
    match Options::parse(args)? {
        Request::Help => Ok(options::HELP.to_string()),
        Request::Rotate(options) => match &options.input {
            None => builtin::rotate(&options, progress),
            Some(path) => file::rotate(&options, path, progress),
        },
    }
}
