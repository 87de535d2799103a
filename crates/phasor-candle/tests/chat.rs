//! A real model talks sense wherever it begins. Skipped where `scripts/fetch-smollm2` has not been run,
//! unless `PHASOR_REQUIRE_SMOLLM2=1` is set.

#[path = "../examples/chat/model.rs"]
mod model;
#[path = "../examples/chat/text.rs"]
mod text;

use candle_core::Device;
use candle_core::quantized::gguf_file;
use model::{Attention, Model, Rope, Settings};
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::Path;
use text::Sampler;
use tokenizers::Tokenizer;

const QUESTION: &str = "Why is the sky blue?";
const ANSWER: &str = "The answer to this question lies in the intricate dance of light and color. The sky \
     appears blue because of a phenomenon known as Rayleigh scattering";
const TOKENS: usize = 32;
/// How far logits may be apart that were added up in another order; the largest are near 20.
const NEAR: f32 = 1e-3;

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

/// The logits after the prompt, and the likeliest answer, which begins as it should.
fn answer(model: &mut Model, tokenizer: &Tokenizer, prompt: &[u32]) -> (Vec<f32>, Vec<u32>) {
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
    let text = tokenizer.decode(&tokens, true).unwrap();
    assert!(text.starts_with(ANSWER), "{text}");
    (of_prompt, tokens)
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
    let mut load = |rope, attention| {
        let settings = Settings {
            rope,
            attention,
            start: 0,
            capacity: prompt.len() + TOKENS,
            dequantise: true,
            device: Device::Cpu,
        };
        Model::load(&content, &mut file, settings, |_| {}).unwrap()
    };

    let mut ours = load(Rope::Phasor, Attention::Candle);
    let (at_zero, tokens) = answer(&mut ours, &tokenizer, &prompt);
    let moved = |logits: &[f32]| {
        let pairs = logits.iter().zip(&at_zero);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    for start in [1_000_000, 15_000_000] {
        ours.begin_at(start).unwrap();
        let (logits, again) = answer(&mut ours, &tokenizer, &prompt);
        assert_eq!(again, tokens, "at {start}");
        assert!(moved(&logits) < NEAR, "at {start}: {}", moved(&logits));
    }
    drop(ours);

    // The layers of phasor-attention: the same, near or far.
    let mut layers = load(Rope::Phasor, Attention::Phasor);
    for start in [0, 15_000_000] {
        layers.begin_at(start).unwrap();
        let (logits, again) = answer(&mut layers, &tokenizer, &prompt);
        assert_eq!(again, tokens, "at {start}");
        assert!(moved(&logits) < NEAR, "at {start}: {}", moved(&logits));
    }
    drop(layers);

    // Candle's own rope, by tables in f32: the same at 0, and not where f32 has no room for the angles.
    let mut theirs = load(Rope::Candle, Attention::Candle);
    let (logits, again) = answer(&mut theirs, &tokenizer, &prompt);
    assert_eq!(again, tokens);
    assert!(moved(&logits) < NEAR, "{}", moved(&logits));
    theirs.begin_at(15_000_000).unwrap();
    let logits = theirs.forward(&prompt).unwrap().to_vec1::<f32>().unwrap();
    assert!(moved(&logits) > 0.1, "{}", moved(&logits));
}
