//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use phasor::Pairing;

use super::{Failure, Result, fail};

pub const HELP: &str = "\
Rotates queries and keys (rotary position embedding) and reports on it.

usage: rotate [OPTION]...
       cargo run --release --example rotate -- [OPTION]...

Without --input it rotates q and k of one layer of SmolLM2 for one sentence,
which it carries along, and compares them with what transformers computes.

  --input FILE.safetensors   rotate the tensors q and k of this file, either or
                             both: f32, f16 or bf16, [tokens, heads, head_dim]
                             or [batch, sequence, heads, head_dim]. An optional
                             tensor position_ids (i32, i64 or u32), [sequence]
                             or [batch, sequence], says where the tokens are.
  --config CONFIG.json       with --input: the model's Hugging Face config, read
                             for rope_theta (10000 if absent), head_dim or
                             hidden_size / num_attention_heads,
                             partial_rotary_factor, and rope_parameters or
                             rope_scaling, whose type has to be \"default\"
  --output FILE.safetensors  write the rotated q and k
  --pairing PAIRING          half-split (default) or interleaved
  --start-position N         position of the first token (default 0); may be
                             negative. Not with position_ids in the file.
  --device DEVICE            auto (default), host, cuda or cuda:N
  --repeat N                 samples per timing (default 21)
  --help                     print this

Exit code: 0, or 2 after one line on stderr that says what is wrong.
";

/// What the user asks for.
#[derive(Debug)]
pub enum Request {
    Help,
    Rotate(Options),
}

#[derive(Debug, Default)]
pub struct Options {
    pub input: Option<PathBuf>,
    pub config: Option<PathBuf>,
    pub output: Option<PathBuf>,
    device: Option<String>,
    pairing: Option<Pairing>,
    pub start_position: Option<i64>,
    repeat: Option<u16>,
}

impl Options {
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Request> {
        let mut options = Options::default();
        let mut args = args.into_iter().peekable();
        while let Some(arg) = args.next() {
            // An option is ASCII; paths need not be text.
            let name = arg.to_string_lossy();
            let mut value = || {
                args.next_if(|next| !next.as_encoded_bytes().starts_with(b"--"))
                    .ok_or_else(|| Failure(format!("{name} needs a value; see --help")))
            };
            match &*name {
                "--help" | "-h" => return Ok(Request::Help),
                "--input" => set(&mut options.input, &name, value()?.into())?,
                "--config" => set(&mut options.config, &name, value()?.into())?,
                "--output" => set(&mut options.output, &name, value()?.into())?,
                "--device" => {
                    let device = value()?.to_string_lossy().into_owned();
                    set(&mut options.device, &name, device)?;
                }
                "--pairing" => {
                    let pairing = match &*value()?.to_string_lossy() {
                        "half-split" => Pairing::HalfSplit,
                        "interleaved" => Pairing::Interleaved,
                        other => {
                            return fail(format!(
                                "--pairing is {other:?}: use half-split or interleaved"
                            ));
                        }
                    };
                    set(&mut options.pairing, &name, pairing)?;
                }
                "--start-position" => {
                    let position = number(&name, &value()?, "a whole number of 64 bits")?;
                    set(&mut options.start_position, &name, position)?;
                }
                "--repeat" => {
                    let expected = "a whole number from 1 to 65535";
                    let repeat = number(&name, &value()?, expected)?;
                    if repeat == 0 {
                        return fail(format!("{name} is \"0\": it must be {expected}"));
                    }
                    set(&mut options.repeat, &name, repeat)?;
                }
                _ => return fail(format!("unknown argument {name:?}; see --help")),
            }
        }
        if options.config.is_some() && options.input.is_none() {
            return fail("--config needs --input: the built-in tensors come with their theta");
        }
        Ok(Request::Rotate(options))
    }

    pub fn device(&self) -> &str {
        self.device.as_deref().unwrap_or("auto")
    }

    pub fn pairing(&self) -> Pairing {
        self.pairing.unwrap_or(Pairing::HalfSplit)
    }

    pub fn repeat(&self) -> u16 {
        // Odd, so that the median is a measurement.
        self.repeat.unwrap_or(21)
    }
}

fn set<T>(option: &mut Option<T>, name: &str, value: T) -> Result<()> {
    match option.replace(value) {
        None => Ok(()),
        Some(_) => fail(format!("{name} is given twice")),
    }
}

fn number<T: std::str::FromStr>(name: &str, value: &OsString, expected: &str) -> Result<T> {
    let value = value.to_string_lossy();
    value
        .parse()
        .map_err(|_| Failure(format!("{name} is {value:?}: it must be {expected}")))
}
