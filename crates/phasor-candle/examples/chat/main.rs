//! A small language model that talks, with rotary embedding by phasor or by candle.
//!
//! ```text
//! scripts/fetch-smollm2
//! cargo run --release -p phasor-candle --example chat -- \
//!     --model target/models/smollm2.gguf "Why is the sky blue?"
//! ```
//!
//! `--start-position 15000000` begins there instead of at 0. Nothing should change by that, for attention
//! sees distances alone; `--rope candle` shows what does where angles are formed in f32, and at 1000000000
//! it can be read.
//! `--attention phasor` runs the layers of phasor-attention in place of candle's products and softmax.
//! `model.rs` is where both are used.

mod model;
mod text;

use candle_core::Device;
use candle_core::quantized::gguf_file;
use model::{Attention, Model, Rope, Settings};
use std::fs::File;
use std::io::{BufReader, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;
use text::Sampler;

const HELP: &str = "\
usage: chat --model FILE.gguf [options] \"A question\"

  --rope phasor|candle   whose rotary embedding (phasor)
  --attention candle|phasor  whose attention layers; phasor's rotate as phasor does, on the host (candle)
  --start-position N     the position of the first token (0)
  --max-tokens N         the longest answer (200)
  --temperature T        0 for the likeliest token, else how freely one is drawn (0)
  --top-p P              draw among the likeliest tokens of this probability (0.9)
  --seed N               of what is drawn (1)
  --weights f32|file     widened, or quantised as in the file, which takes less memory (f32)
  --system TEXT          what the model is told beforehand
  --device cpu|cuda      where it runs (cpu)

The model is of the llama architecture and knows ChatML, as the one does that scripts/fetch-smollm2 fetches.
";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

struct Options {
    model: String,
    question: String,
    rope: Rope,
    attention: Attention,
    start: i64,
    max_tokens: usize,
    sampler: Sampler,
    dequantise: bool,
    system: String,
    device: Device,
}

/// Options, or `None` where help was asked for.
fn options(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options {
        model: String::new(),
        question: String::new(),
        rope: Rope::Phasor,
        attention: Attention::Candle,
        start: 0,
        max_tokens: 200,
        sampler: Sampler {
            temperature: 0.0,
            top_p: 0.9,
            state: 1,
        },
        dequantise: true,
        system: "You are a helpful AI assistant named SmolLM, trained by Hugging Face".into(),
        device: Device::Cpu,
    };
    while let Some(argument) = arguments.next() {
        if ["-h", "--help"].contains(&argument.as_str()) {
            return Ok(None);
        }
        if !argument.starts_with("--") {
            if !options.question.is_empty() {
                return Err(format!("two questions: put quotes around one ({argument:?})").into());
            }
            options.question = argument;
            continue;
        }
        let Some(value) = arguments.next() else {
            return Err(format!("{argument} needs a value; --help lists what there is").into());
        };
        let is_not = |expected| format!("{argument} is {value:?}: it must be {expected}");
        match argument.as_str() {
            "--model" => options.model = value,
            "--system" => options.system = value,
            "--rope" => {
                options.rope = match value.as_str() {
                    "phasor" => Rope::Phasor,
                    "candle" => Rope::Candle,
                    _ => return Err(is_not("phasor or candle").into()),
                }
            }
            "--attention" => {
                options.attention = match value.as_str() {
                    "candle" => Attention::Candle,
                    "phasor" => Attention::Phasor,
                    _ => return Err(is_not("candle or phasor").into()),
                }
            }
            "--weights" => {
                options.dequantise = match value.as_str() {
                    "f32" => true,
                    "file" => false,
                    _ => return Err(is_not("f32 or file").into()),
                }
            }
            "--device" => {
                options.device = match value.as_str() {
                    "cpu" => Device::Cpu,
                    "cuda" => Device::new_cuda(0)?,
                    _ => return Err(is_not("cpu or cuda").into()),
                }
            }
            "--start-position" => {
                options.start = value.parse().map_err(|_| is_not("an integer"))?;
            }
            "--max-tokens" => {
                options.max_tokens = value.parse().map_err(|_| is_not("a number of tokens"))?;
            }
            "--seed" => {
                let seed: u64 = value.parse().map_err(|_| is_not("a number"))?;
                options.sampler.state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).max(1);
            }
            "--temperature" => {
                let given: f64 = value.parse().map_err(|_| is_not("a number"))?;
                if !(0.0..=100.0).contains(&given) {
                    return Err(is_not("from 0 to 100").into());
                }
                options.sampler.temperature = given;
            }
            "--top-p" => {
                let given: f64 = value.parse().map_err(|_| is_not("a number"))?;
                if !(0.0..=1.0).contains(&given) {
                    return Err(is_not("from 0 to 1").into());
                }
                options.sampler.top_p = given;
            }
            _ => return Err(format!("there is no {argument}; --help lists what there is").into()),
        }
    }
    let of_phasor = options.attention == Attention::Phasor;
    if of_phasor && (options.rope != Rope::Phasor || !options.device.is_cpu()) {
        return Err("--attention phasor is for --rope phasor and --device cpu".into());
    }
    if options.model.is_empty() {
        return Err(
            "which model? scripts/fetch-smollm2 fetches one; give --model FILE.gguf".into(),
        );
    }
    if options.question.is_empty() {
        return Err("what is the question? give it in quotes, after the options".into());
    }
    Ok(Some(options))
}

/// Draws what part is done on stderr, if that is a terminal.
fn bar(what: &'static str) -> impl FnMut(f64) {
    let drawn = std::io::stderr().is_terminal();
    let mut shown = 0;
    move |part: f64| {
        let percent = (part * 100.0) as u32;
        if drawn && percent > shown {
            shown = percent;
            let bar = "#".repeat(percent as usize / 4);
            eprint!("\r{what} [{bar:<25}] {percent:>3}%");
        }
    }
}

fn clear_bar() {
    if std::io::stderr().is_terminal() {
        eprint!("\r{:75}\r", "");
    }
}

fn run(options: Options) -> Result<()> {
    let file = File::open(&options.model);
    let file = file.map_err(|error| format!("cannot open {}: {error}", options.model))?;
    let mut reader = BufReader::new(file);
    let content = gguf_file::Content::read(&mut reader)
        .map_err(|error| format!("cannot read {} as GGUF: {error}", options.model))?;
    let tokenizer = text::tokenizer(&content)?;
    let end = content.metadata.get("tokenizer.ggml.eos_token_id");
    let end = end.map(|id| id.to_u32()).transpose()?;
    let prompt = text::conversation(&options.system, &options.question);
    let prompt = text::encode(&tokenizer, &prompt)?;

    let begun = Instant::now();
    let settings = Settings {
        rope: options.rope,
        attention: options.attention,
        start: options.start,
        capacity: prompt.len() + options.max_tokens,
        dequantise: options.dequantise,
        device: options.device.clone(),
    };
    let loading = bar("loading the model");
    let mut model = Model::load(&content, &mut reader, settings, loading)?;
    clear_bar();
    let loaded = begun.elapsed().as_secs_f64();

    // The same prompt from 0 on, of which only distances should matter.
    let at_zero = match options.start {
        0 => None,
        start => {
            model.begin_at(0)?;
            let reading = bar("reading the prompt at position 0");
            let logits = model.forward_with(&prompt, reading)?.to_vec1::<f32>()?;
            clear_bar();
            model.begin_at(start)?;
            Some(logits)
        }
    };

    let begun = Instant::now();
    let mut logits = model.forward_with(&prompt, bar("reading the prompt"))?;
    clear_bar();
    let values = logits.to_vec1::<f32>()?;
    let of_prompt = begun.elapsed().as_secs_f64();

    let begun = Instant::now();
    let mut sampler = options.sampler;
    let mut words = tokenizer.decode_stream(true);
    let mut count = 0;
    let mut stdout = std::io::stdout();
    while count < options.max_tokens {
        let token = sampler.next(&logits)?;
        if Some(token) == end {
            break;
        }
        count += 1;
        if let Some(word) = words.step(token).map_err(|error| error.to_string())? {
            write!(stdout, "{word}")?;
            stdout.flush()?;
        }
        if count < options.max_tokens {
            logits = model.forward(&[token])?;
        }
    }
    writeln!(stdout)?;
    let of_answer = begun.elapsed().as_secs_f64();

    let per_second = |tokens: usize, seconds: f64| tokens as f64 / seconds;
    eprintln!();
    eprintln!(
        "{:?} rope from position {}, {:?} attention; loaded in {loaded:.1} s",
        options.rope, options.start, options.attention
    );
    eprintln!(
        "prompt: {} tokens, {:.0} a second; answer: {count} tokens, {:.1} a second",
        prompt.len(),
        per_second(prompt.len(), of_prompt),
        per_second(count, of_answer)
    );
    if let Some(at_zero) = at_zero {
        let pairs = values.iter().zip(&at_zero);
        let moved = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        eprintln!("beside position 0, the prompt's last logits moved by up to {moved:.1e}");
    }
    Ok(())
}

fn main() -> ExitCode {
    let result = options(std::env::args().skip(1)).and_then(|options| match options {
        Some(options) => run(options),
        None => {
            print!("{HELP}");
            Ok(())
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chat: {error}");
            ExitCode::from(2)
        }
    }
}
