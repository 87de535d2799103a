/// What can go wrong, and what to change about it. Nothing has been written then, neither to a cache nor
/// to an output.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// A number of a layer or a cache is not usable.
    #[error("{what} is {value}: {remedy}")]
    Value {
        /// Which number.
        what: &'static str,
        /// As given.
        value: usize,
        /// What it must be.
        remedy: &'static str,
    },
    /// Query heads do not form groups of the key-value heads.
    #[error(
        "{heads} query heads over {kv_heads} key-value heads: both must be above 0, and the second divide \
         the first"
    )]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key-value heads.
        kv_heads: usize,
    },
    /// Two things that must agree do not.
    #[error("{what}: {expected} is needed, {got} is given")]
    Mismatch {
        /// What must agree.
        what: &'static str,
        /// What is needed.
        expected: usize,
        /// What is given.
        got: usize,
    },
    /// A scale, clip or soft cap is not usable.
    #[error("{what} is {value}: it must be positive and finite")]
    Factor {
        /// Which number.
        what: &'static str,
        /// As given.
        value: f64,
    },
    /// The offsets of a ragged batch are no offsets.
    #[error("cu_seqlens[{index}] is {value}: {remedy}")]
    CuSeqlens {
        /// Which of them.
        index: usize,
        /// Its value.
        value: i64,
        /// What it must be.
        remedy: &'static str,
    },
    /// A sequence would not fit its pages.
    #[error(
        "sequence {sequence} has {cached} tokens in its cache and {new} new ones, and room for {room}: give \
         it more pages, and a length from 0 on"
    )]
    PastCache {
        /// Which sequence.
        sequence: usize,
        /// Its length before the call.
        cached: i64,
        /// Its new tokens.
        new: usize,
        /// Slots of its row of the page table.
        room: usize,
    },
    /// A page that a sequence needs is not in the cache.
    #[error(
        "page {index} of sequence {sequence} is {page}: the cache has {pages} pages, from 0 on"
    )]
    Page {
        /// Which sequence.
        sequence: usize,
        /// Which of its pages.
        index: usize,
        /// The page.
        page: i64,
        /// Pages of the cache.
        pages: usize,
    },
    /// Weights and what is said of them do not fit.
    #[error("{what}: {remedy}")]
    Weights {
        /// Which weights.
        what: &'static str,
        /// What to change.
        remedy: &'static str,
    },
    /// There are no kernels of an element type.
    #[error("{}: {remedy}", .dtype.name())]
    Dtype {
        /// The type.
        dtype: phasor::Dtype,
        /// What to use.
        remedy: &'static str,
    },
    /// The library for matrix products on CUDA could not be used.
    #[cfg(feature = "cuda")]
    #[error(
        "cublasLt cannot be used: {reason}. Install CUDA's libcublasLt or give its path to CublasLt::open, \
         or give the layer projections of your own"
    )]
    NoCublasLt {
        /// What was tried.
        reason: String,
    },
    /// A call of cublasLt failed.
    #[cfg(feature = "cuda")]
    #[error("cublasLt: {operation} failed with status {status}")]
    CublasLt {
        /// What was being done.
        operation: &'static str,
        /// `cublasStatus_t`, as a number.
        status: i32,
    },
    /// The library for sums over devices could not be used.
    #[cfg(feature = "nccl")]
    #[error(
        "NCCL cannot be used: {reason}. Install libnccl 2.10 or later, or give its path to Nccl::open"
    )]
    NoNccl {
        /// What was tried.
        reason: String,
    },
    /// A call of NCCL failed. The other ranks may wait for this one then.
    #[cfg(feature = "nccl")]
    #[error(
        "NCCL: {operation} failed with status {status}, {reason}; NCCL_DEBUG=WARN has it say more"
    )]
    Nccl {
        /// What was being done.
        operation: &'static str,
        /// `ncclResult_t`, as a number.
        status: i32,
        /// What NCCL says of this status.
        reason: String,
    },
    /// A weight is a NaN or an infinity ([`check_finite`](crate::check_finite)).
    #[error("the weight in row {row}, column {column} is {value}: it must be finite")]
    NotFinite {
        /// Its output.
        row: usize,
        /// Its input.
        column: usize,
        /// As it is.
        value: f32,
    },
    /// A weight is not among those given.
    #[error("there is no {name}: give it, under that name")]
    NoWeight {
        /// Its name.
        name: String,
    },
    /// The step between projection and attention.
    #[error(transparent)]
    Step(#[from] phasor::Error),
}

/// `got` is what is needed.
pub(crate) fn agree(what: &'static str, expected: usize, got: usize) -> Result<(), AttentionError> {
    match expected == got {
        true => Ok(()),
        false => Err(AttentionError::Mismatch {
            what,
            expected,
            got,
        }),
    }
}

/// Room for more than is needed is as good as room for it.
#[cfg(feature = "cuda")]
pub(crate) fn at_least(
    what: &'static str,
    needed: usize,
    got: usize,
) -> Result<(), AttentionError> {
    agree(what, needed, got.min(needed))
}

/// Positive and finite.
pub(crate) fn usable(what: &'static str, value: f64) -> Result<(), AttentionError> {
    match value > 0.0 && value.is_finite() {
        true => Ok(()),
        false => Err(AttentionError::Factor { what, value }),
    }
}
