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
                             or [batch, sequence], says where the tokens are; for
                             models of images and video also [axes, sequence] or
                             [axes, batch, sequence].
  --config CONFIG.json       with --input: the model's Hugging Face config, which
                             says all about the rotation: theta, dims, scaling,
                             pairing, axes
  --layer-type NAME          with --config: which layers' rotation, where a model
                             has several (such as sliding_attention)
  --rows-by WHAT             with --config, where frequencies depend on the length
                             (LongRoPE, dynamic NTK): sequence (default; each has
                             its own), call (all have those of the longest, as
                             transformers does), or position (LongRoPE: each token
                             has its own, as MAX does)
  --output FILE.safetensors  write the rotated q and k
  --plot FILE.svg            draw against the position how much scores change when
                             all positions shift alike, and how far rotated values
                             are off: of up to 64 tokens of the first sequence, one
                             after the other, whatever position_ids say
  --pairing PAIRING          half-split (default) or interleaved; with --config,
                             the config's unless given
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

/// What chooses the frequencies, where they depend on the length of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowsBy {
    Sequence,
    Call,
    Position,
}

#[derive(Debug, Default)]
pub struct Options {
    pub input: Option<PathBuf>,
    pub config: Option<PathBuf>,
    pub layer_type: Option<String>,
    rows_by: Option<RowsBy>,
    pub output: Option<PathBuf>,
    pub plot: Option<PathBuf>,
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
                "--plot" => set(&mut options.plot, &name, value()?.into())?,
                "--layer-type" => {
                    let name_of_type = value()?.to_string_lossy().into_owned();
                    set(&mut options.layer_type, &name, name_of_type)?;
                }
                "--rows-by" => {
                    let rows_by = match &*value()?.to_string_lossy() {
                        "sequence" => RowsBy::Sequence,
                        "call" => RowsBy::Call,
                        "position" => RowsBy::Position,
                        other => {
                            return fail(format!(
                                "--rows-by is {other:?}: use sequence, call or position"
                            ));
                        }
                    };
                    set(&mut options.rows_by, &name, rows_by)?;
                }
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
        if options.plot.is_some() && options.plot == options.output {
            return fail("--plot and --output name the same file");
        }
        if options.config.is_none() {
            let given = [
                ("--layer-type", options.layer_type.is_some()),
                ("--rows-by", options.rows_by.is_some()),
            ];
            if let Some((name, _)) = given.iter().find(|(_, given)| *given) {
                return fail(format!("{name} needs --config"));
            }
        }
        Ok(Request::Rotate(options))
    }

    pub fn device(&self) -> &str {
        self.device.as_deref().unwrap_or("auto")
    }

    pub fn pairing(&self) -> Pairing {
        self.pairing.unwrap_or(Pairing::HalfSplit)
    }

    /// The pairing if one was asked for.
    pub fn chosen_pairing(&self) -> Option<Pairing> {
        self.pairing
    }

    pub fn rows_by(&self) -> RowsBy {
        self.rows_by.unwrap_or(RowsBy::Sequence)
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
