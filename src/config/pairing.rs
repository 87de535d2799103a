use std::fmt;

/// Why a config's pairing is what it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PairingRule {
    /// The caller chose it.
    Given,
    /// All models of this `model_type` pair so in Hugging Face transformers, and their weights are
    /// stored for it.
    ModelType(String),
    /// A key of the config says so.
    Key {
        /// The key, with its path.
        key: String,
        /// What it says.
        value: bool,
    },
    /// llama.cpp's table of architectures says so, and the file's weights are stored for it.
    GgufArchitecture(String),
    /// The `model_type` is unknown or absent: half-split is the commonest, and the right one only
    /// if the model agrees.
    Assumed,
}

impl fmt::Display for PairingRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PairingRule::Given => f.write_str("chosen by the caller"),
            PairingRule::ModelType(name) => write!(f, "rule of model_type {name:?}"),
            PairingRule::Key { key, value } => write!(f, "{key} is {value}"),
            PairingRule::GgufArchitecture(name) => {
                write!(f, "rule of the GGUF architecture {name:?}")
            }
            PairingRule::Assumed => {
                f.write_str("assumed, for the model_type is not known: check it against the model")
            }
        }
    }
}

/// The order of the dims in what Hugging Face transformers returns from its rotation. This crate
/// leaves every dim in its place, unless
/// [`Rope::with_output_pairing`](crate::Rope::with_output_pairing) asks for what transformers does,
/// out of place; scores `q . k` come out the same either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OutputOrder {
    /// Each dim in its place.
    #[default]
    AsInput,
    /// Taken in interleaved and returned half-split: rotated pair `i` is at `(i, i + rotary_dim /
    /// 2)` (DeepSeek-V3 and its relatives).
    HalfSplit,
}
