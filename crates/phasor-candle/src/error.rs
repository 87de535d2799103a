use candle_core::DType;
use phasor::config::ConfigError;

/// Everything that can go wrong, and what to change about it.
///
/// It turns into candle's error by `?`, so that the layers of a model may go on returning
/// `candle_core::Result`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Phasor refuses the call: shapes, overlap, positions, or what its CUDA backend says.
    #[error(transparent)]
    Phasor(#[from] phasor::Error),
    /// A model's config.
    #[error(transparent)]
    Config(Box<ConfigError>),
    /// Candle refuses.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A tensor has another number of dims than the call takes.
    #[error("{tensor} has the shape {got:?}: it must be {expected}")]
    Shape {
        /// Which one.
        tensor: &'static str,
        /// What the call takes.
        expected: &'static str,
        /// Its shape.
        got: Vec<usize>,
    },
    /// A tensor's elements are of a type that is not taken here.
    #[error("{tensor} is of {got:?}: it must be {expected} (Tensor::to_dtype)")]
    DType {
        /// Which one.
        tensor: &'static str,
        /// What is taken.
        expected: &'static str,
        /// Its type.
        got: DType,
    },
    /// Positions, rows or offsets do not fit the tokens.
    #[error(
        "positions of shape {got:?} for {batch} sequences of {tokens} tokens: give [tokens], \
         [batch, tokens] or [axes, batch, tokens], or where each sequence begins, [batch], with \
         Positions::starts"
    )]
    PositionsShape {
        /// Their shape.
        got: Vec<usize>,
        /// Sequences of the rotated tensor.
        batch: usize,
        /// Tokens of each of them.
        tokens: usize,
    },
    /// Two tensors of a call are not on one device.
    #[error(
        "{first} is on {first_device}, and {second} on {second_device}: move one of them \
         (Tensor::to_device){}",
        if first_device == second_device {
            "; these are two devices, as each call of Device::new_cuda makes a CUDA context of its own: \
             make the device once, and clone it"
        } else {
            ""
        }
    )]
    Devices {
        /// One tensor.
        first: &'static str,
        /// Where it is.
        first_device: String,
        /// The other.
        second: &'static str,
        /// Where that is.
        second_device: String,
    },
    /// A device that nothing is rotated on.
    #[error("{tensor} is on Metal: only tensors of the CPU and of CUDA devices are rotated")]
    Metal {
        /// Which one.
        tensor: &'static str,
    },
    /// The elements of a head are apart, in a tensor that is written where it is.
    #[error(
        "the last dim of {tensor} has the stride {stride}: a tensor that is written needs contiguous \
         heads (copy it with Tensor::contiguous, or use apply)"
    )]
    Strided {
        /// Which one.
        tensor: &'static str,
        /// Stride of its last dim.
        stride: usize,
    },
    /// A tensor of a graph that gradients flow through would be written.
    #[error(
        "{tensor} is part of a graph for backward, and what is written in place has no gradient: use \
         apply, or detach it"
    )]
    Tracked {
        /// Which one.
        tensor: &'static str,
    },
    /// Two tensors share a storage where they may not.
    #[error("{first} and {second} share one storage: {remedy}")]
    SharedStorage {
        /// One tensor.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// What to change.
        remedy: &'static str,
    },
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        Error::Config(Box::new(error))
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}

/// What calls of this crate return.
pub type Result<T> = std::result::Result<T, Error>;
