//! Text as tokens, and the choice of the next one.

use candle_core::quantized::gguf_file;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use candle_core::{Result, Tensor};
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

/// The tokenizer that a file describes.
pub fn tokenizer(content: &gguf_file::Content) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(content)?;
    let kind = content.metadata.get("tokenizer.ggml.pre");
    if kind.is_some_and(|kind| kind.to_string().is_ok_and(|kind| kind == "smollm")) {
        // Each digit by itself and no space before a text, which candle's reader does not know of.
        let steps = vec![
            Digits::new(true).into(),
            ByteLevel::new(false, true, true).into(),
        ];
        tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    }
    Ok(tokenizer)
}

/// A question as the model was trained to see it (ChatML).
pub fn conversation(system: &str, question: &str) -> String {
    let turn = |role, text| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
    let (system, user) = (turn("system", system), turn("user", question));
    format!("{system}{user}<|im_start|>assistant\n")
}

/// Tokens of a text.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoded = tokenizer.encode(text, false);
    Ok(encoded
        .map_err(candle_core::Error::wrap)?
        .get_ids()
        .to_vec())
}

/// How the next token is chosen.
pub struct Sampler {
    /// 0 for the likeliest.
    pub temperature: f64,
    /// The likeliest tokens that have this much probability together are chosen among.
    pub top_p: f64,
    /// Where random numbers are, which is never 0.
    pub state: u64,
}

impl Sampler {
    pub fn next(&mut self, logits: &Tensor) -> Result<u32> {
        let logits: Vec<f32> = logits.to_vec1()?;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let logit = |token: u32| f64::from(logits[token as usize]);
        if self.temperature == 0.0 {
            let best = order
                .into_iter()
                .max_by(|&a, &b| logit(a).total_cmp(&logit(b)));
            return Ok(best.unwrap_or_default());
        }
        order.sort_unstable_by(|&a, &b| logit(b).total_cmp(&logit(a)));
        let largest = logit(order[0]);
        let weight = |token: u32| ((logit(token) - largest) / self.temperature).exp();
        let all: f64 = order.iter().map(|&token| weight(token)).sum();
        let mut kept = 0.0;
        let end = order.iter().position(|&token| {
            kept += weight(token);
            kept >= self.top_p * all
        });
        let kept_tokens = &order[..=end.unwrap_or(order.len() - 1)];
        // Xorshift.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let mut at = (self.state >> 11) as f64 / (1u64 << 53) as f64 * kept;
        let chosen = kept_tokens.iter().find(|&&token| {
            at -= weight(token);
            at <= 0.0
        });
        Ok(chosen.copied().unwrap_or(order[0]))
    }
}
