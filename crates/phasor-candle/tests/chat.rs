//! A real model talks sense wherever it begins. Skipped where `scripts/fetch-smollm2` has not been run,
//! unless `PHASOR_REQUIRE_SMOLLM2=1` is set.

#[path = "../examples/chat/model.rs"]
mod model;
#[path = "../examples/chat/text.rs"]
mod text;

use candle_core::Device;
use candle_core::quantized::gguf_file;
use model::{Model, Rope, Settings};
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::Path;
use text::Sampler;
use tokenizers::Tokenizer;

const QUESTION: &str = "Why is the sky blue?";
const ANSWER: &str = "The answer to this question lies in the intricate dance of light and color. The sky \
     appears blue because of a phenomenon known as Rayleigh scattering";
const TOKENS: usize = 28;

fn file() -> Option<BufReader<File>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/models/smollm2.gguf");
    match File::open(&path) {
        Ok(file) => Some(BufReader::new(file)),
        Err(error) => {
            let required = std::env::var("PHASOR_REQUIRE_SMOLLM2").as_deref() == Ok("1");
            assert!(
                !required,
                "PHASOR_REQUIRE_SMOLLM2=1, but {}: {error}",
                path.display()
            );
            // Straight to stderr, which the test harness does not swallow.
            let _ = writeln!(
                std::io::stderr(),
                "the test of a real model is skipped: scripts/fetch-smollm2 fetches it"
            );
            None
        }
    }
}

/// The logits after the prompt, and the likeliest answer.
fn answer(model: &mut Model, tokenizer: &Tokenizer, prompt: &[u32]) -> (Vec<f32>, String) {
    let mut sampler = Sampler {
        temperature: 0.0,
        top_p: 1.0,
        state: 1,
    };
    let mut logits = model.forward(prompt).unwrap();
    let of_prompt = logits.to_vec1().unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < TOKENS {
        let token = sampler.next(&logits).unwrap();
        tokens.push(token);
        logits = model.forward(&[token]).unwrap();
    }
    (of_prompt, tokenizer.decode(&tokens, true).unwrap())
}

#[test]
fn a_model_talks_sense_wherever_it_begins() {
    let Some(mut file) = file() else { return };
    let content = gguf_file::Content::read(&mut file).unwrap();
    let tokenizer = text::tokenizer(&content).unwrap();
    let prompt = text::conversation(
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        QUESTION,
    );
    let prompt = text::encode(&tokenizer, &prompt).unwrap();
    assert_eq!(
        tokenizer
            .decode(&prompt, false)
            .unwrap()
            .matches(QUESTION)
            .count(),
        1
    );
    let mut load = |rope| {
        let settings = Settings {
            rope,
            start: 0,
            capacity: prompt.len() + TOKENS,
            dequantise: true,
            device: Device::Cpu,
        };
        Model::load(&content, &mut file, settings, |_| {}).unwrap()
    };

    let mut ours = load(Rope::Phasor);
    let (at_zero, text) = answer(&mut ours, &tokenizer, &prompt);
    assert_eq!(text, ANSWER);
    let moved = |logits: &[f32]| {
        let pairs = logits.iter().zip(&at_zero);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    for start in [1_000_000, 15_000_000] {
        ours.begin_at(start).unwrap();
        let (logits, text) = answer(&mut ours, &tokenizer, &prompt);
        assert_eq!(text, ANSWER, "at {start}");
        assert!(moved(&logits) < 1e-3, "at {start}: {}", moved(&logits));
    }
    drop(ours);

    // Candle's own rope, by tables in f32: the same at 0, and not where f32 has no room for the angles.
    let mut theirs = load(Rope::Candle);
    let (logits, text) = answer(&mut theirs, &tokenizer, &prompt);
    assert_eq!(text, ANSWER);
    assert!(moved(&logits) < 1e-3, "{}", moved(&logits));
    theirs.begin_at(15_000_000).unwrap();
    let logits = theirs.forward(&prompt).unwrap().to_vec1::<f32>().unwrap();
    assert!(moved(&logits) > 0.1, "{}", moved(&logits));
}
