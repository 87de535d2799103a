use crate::AttentionError;
use std::ops::Range;

/// Which keys a token sees. Places are counted in its sequence, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AttentionMask {
    /// Itself and all before.
    #[default]
    Causal,
    /// Itself and so many less 1 before (Mistral, Gemma).
    SlidingWindow(usize),
    /// Itself and those before it in its chunk; chunks of so many tokens follow each other from place 0
    /// (Llama 4).
    Chunked(usize),
    /// All of the sequence, those after it too.
    None,
}

impl AttentionMask {
    pub(crate) fn check(self) -> Result<(), AttentionError> {
        match self {
            AttentionMask::SlidingWindow(0) | AttentionMask::Chunked(0) => {
                Err(AttentionError::Value {
                    what: "the window or chunk of the mask",
                    value: 0,
                    remedy: "a token sees itself, so it must be at least 1",
                })
            }
            _ => Ok(()),
        }
    }

    /// The keys that the token at `place` sees, of `context`.
    pub(crate) fn keys(self, place: usize, context: usize) -> Range<usize> {
        match self {
            AttentionMask::Causal => 0..place + 1,
            AttentionMask::SlidingWindow(window) => (place + 1).saturating_sub(window)..place + 1,
            AttentionMask::Chunked(chunk) => place / chunk * chunk..place + 1,
            AttentionMask::None => 0..context,
        }
    }
}
