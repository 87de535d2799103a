use crate::PositionKind;
use crate::element::Dtype;

/// Which tensor an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TensorName {
    /// The queries.
    Q,
    /// The keys.
    K,
    /// The values.
    V,
}

impl std::fmt::Display for TensorName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TensorName::Q => "q",
            TensorName::K => "k",
            TensorName::V => "v",
        })
    }
}

fn or_one(or: Option<usize>) -> String {
    or.map_or_else(String::new, |or| format!(", or {or} for all heads"))
}

/// Everything that can go wrong, and what to change about it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// rotary_dim is zero, odd or beyond what kernels address.
    #[error("rotary_dim is {rotary_dim}: it must be even, at least 2 and at most 2^22")]
    RotaryDim {
        /// As given, or twice the number of pairs given.
        rotary_dim: usize,
    },
    /// theta (the RoPE base) is not usable.
    #[error("theta is {theta}: it must be finite and at least 2^-32 (10000 is usual)")]
    Theta {
        /// As given.
        theta: f64,
    },
    /// theta and rotary_dim look exchanged.
    #[error(
        "theta is {theta} and rotary_dim is {rotary_dim}, which look exchanged: write theta first, \
         as in Frequencies::from_theta({rotary_dim}.0, {theta}); frequencies that are meant so can \
         be given with Frequencies::from_inv_freq"
    )]
    Exchanged {
        /// As given.
        theta: f64,
        /// As given.
        rotary_dim: usize,
    },
    /// A frequency is not usable.
    #[error(
        "inv_freq[{pair}] is {value}: it must be a finite number of radians per position, at most \
         2^32 in magnitude"
    )]
    InvFreq {
        /// Index of the pair.
        pair: usize,
        /// As given.
        value: f64,
    },
    /// The attention factor is not usable.
    #[error("attention_factor is {factor}: it must be positive and finite")]
    AttentionFactor {
        /// As given.
        factor: f32,
    },
    /// Steps do not form a row per axis.
    #[error(
        "{steps} steps on {axes} axes: give row-major steps of shape [axes, rotary_dim / 2], with 1 to \
         16 axes (frequencies on several axes are not given axes again)"
    )]
    AxisSteps {
        /// Steps given.
        steps: usize,
        /// Axes asked for.
        axes: usize,
    },
    /// The axes of pairs do not match the pairs.
    #[error(
        "{given} entries of axis_of_pair, the largest {largest}, for {pairs} pairs on {axes} axes: \
         give one per pair, each below the number of axes"
    )]
    AxisOfPair {
        /// Entries given.
        given: usize,
        /// The largest of them.
        largest: usize,
        /// Pairs of the frequencies.
        pairs: usize,
        /// Axes asked for.
        axes: usize,
    },
    /// Rows of frequencies do not fit together.
    #[error("rows of frequencies: {what}")]
    FrequencyRows {
        /// What is wrong, and what to change.
        what: &'static str,
    },
    /// No row serves sequences of a length.
    #[error(
        "no row of frequencies serves a sequence of {length} tokens ({}): make rows for longer \
         sequences, with FrequencyRows::with_lengths",
        longest.map_or("the rows have no lengths".into(), |n| format!("the last one serves {n}"))
    )]
    NoRowForLength {
        /// The length.
        length: u64,
        /// The longest one served; `None` if no lengths were given.
        longest: Option<u64>,
    },
    /// There is no such row of frequencies.
    #[error("frequency row {row} of {rows}: rows are numbered from 0")]
    FrequencyRowOutOfRange {
        /// The row asked for.
        row: i64,
        /// Rows there are.
        rows: usize,
    },
    /// Too few or too many row indices.
    #[error("{got} frequency row indices given, give {expected}: {kind}")]
    FrequencyRowsLength {
        /// What the plan's shape needs.
        expected: usize,
        /// What was given.
        got: usize,
        /// How they are given.
        kind: crate::FrequencyRowKind,
    },
    /// The arrays of a table do not form rows.
    #[error(
        "a table of {cos} cosines and {sin} sines does not form rows of {pairs} pairs: give both \
         arrays the shape [rows, rotary_dim / 2], with at least one row"
    )]
    TableShape {
        /// Length of the array of cosines.
        cos: usize,
        /// Length of the array of sines.
        sin: usize,
        /// Columns asked for.
        pairs: usize,
    },
    /// There is no memory for a table, or it has 2^32 rows or more.
    #[error(
        "a table of {rows} rows of {pairs} pairs is too large for memory, or has more than 2^32 - 1 rows: \
         give fewer positions, or rotate with Frequencies, which need no table"
    )]
    TableTooLarge {
        /// Rows asked for, or at least so many.
        rows: usize,
        /// Columns.
        pairs: usize,
    },
    /// The rotated dims do not lie inside the head.
    #[error(
        "{tensor}: rotary_dim {rotary_dim} at rotary_offset {rotary_offset} does not fit a head of \
         {head_dim} dims: the offset must be even, and offset + rotary_dim at most head_dim"
    )]
    RotaryWindow {
        /// The tensor.
        tensor: TensorName,
        /// First rotated dim.
        rotary_offset: usize,
        /// Dims that rotate.
        rotary_dim: usize,
        /// Dims of a head.
        head_dim: usize,
    },
    /// Two layouts that must agree in shape do not.
    #[error("{what}: [batch, tokens, heads, head_dim] is {left:?} against {right:?}")]
    ShapeMismatch {
        /// What must agree, as a sentence.
        what: &'static str,
        /// One shape.
        left: [usize; 4],
        /// The other.
        right: [usize; 4],
    },
    /// Source and destination rotate different dims.
    #[error(
        "{tensor}: rotary_offset is {source_offset} in the source and {destination_offset} in the \
         destination: give both the same"
    )]
    RotaryOffsetMismatch {
        /// The tensor.
        tensor: TensorName,
        /// First rotated dim of the source.
        source_offset: usize,
        /// First rotated dim of the destination.
        destination_offset: usize,
    },
    /// A layout counts past what 64-bit byte offsets or kernel counters hold.
    #[error(
        "{tensor}: the layout is too large: bytes read and written must stay below 2^63, heads and \
         head_dim below 2^28 each, and tokens of the whole batch below 2^31"
    )]
    LayoutTooLarge {
        /// The tensor.
        tensor: TensorName,
    },
    /// A cache's blocks do not divide its heads.
    #[error(
        "{tensor}'s cache has heads of {head_dim} dims in blocks of {block_dims}: blocks must divide \
         heads"
    )]
    CacheBlocks {
        /// The tensor.
        tensor: TensorName,
        /// Dims of a head.
        head_dim: usize,
        /// Dims of a block.
        block_dims: usize,
    },
    /// A cache counts past what 64-bit byte offsets or kernel counters hold.
    #[error(
        "{tensor}'s cache is too large: bytes and slots must stay below 2^63, pages and slots of a page \
         below 2^32"
    )]
    CacheTooLarge {
        /// The tensor.
        tensor: TensorName,
    },
    /// A cache does not fit what is to be stored in it.
    #[error("{tensor}'s cache: {what}: {left} and {right}")]
    CacheMismatch {
        /// The tensor.
        tensor: TensorName,
        /// What must agree.
        what: &'static str,
        /// Of the tensor, or of the keys' cache.
        left: usize,
        /// Of the cache.
        right: usize,
    },
    /// A tensor and its cache are not both there.
    #[error("{tensor}: {what}")]
    CacheMissing {
        /// The tensor.
        tensor: TensorName,
        /// What to change.
        what: &'static str,
    },
    /// A plan with a cache or values is used as one without, or the other way round.
    #[error("the plan {planned}: {remedy}")]
    AppendMismatch {
        /// What was planned.
        planned: &'static str,
        /// What to call or plan instead.
        remedy: &'static str,
    },
    /// As many slots, pages or lengths as there are tokens or sequences were not given.
    #[error("{what}: {got} values given where {expected} are needed")]
    SlotsLength {
        /// Which ids.
        what: &'static str,
        /// How many there must be; of a page table, of which number they must be a multiple.
        expected: usize,
        /// How many were given.
        got: usize,
    },
    /// What a norm is applied to, or with, does not fit the heads.
    #[error(
        "{what}: {len} elements do not fit heads of {head_dim} dims: give whole heads of an even head_dim, \
         and weights and biases of one head or of all"
    )]
    NormLength {
        /// What does not fit.
        what: &'static str,
        /// How many elements it has.
        len: usize,
        /// Dims of a head.
        head_dim: usize,
    },
    /// Values and their 8-bit codes are not as many.
    #[error("{got} codes given for {expected} values: give a code for each value of the group")]
    CodesLength {
        /// How many values there are.
        expected: usize,
        /// How many codes.
        got: usize,
    },
    /// Groups of dims that share a scale do not divide a head.
    #[error(
        "{tensor}: groups of {group_dims} dims do not divide heads of {head_dim}: name a divisor, as in \
         StoredCodes::groups_of(128)"
    )]
    CodeGroups {
        /// The tensor.
        tensor: TensorName,
        /// Dims of a head.
        head_dim: usize,
        /// Dims that are to share a scale.
        group_dims: usize,
    },
    /// Scales that are no powers of two cannot be stored as their exponents.
    #[error(
        "{tensor}: scales as E8M0 are powers of two: say how they are rounded to one, with \
         StoredCodes::rounded"
    )]
    ScalesNotPowers {
        /// The tensor.
        tensor: TensorName,
    },
    /// What stages need, and what a call brings, differ; or stages that do not fit.
    #[error("{tensor}: {what}")]
    Stages {
        /// The tensor.
        tensor: TensorName,
        /// What is wrong, and what to do.
        what: &'static str,
    },
    /// A bias, weights or scales are not as many as a stage needs.
    #[error("{tensor}'s {what}: {got} values given where {expected} are needed{}", or_one(*or))]
    StageLength {
        /// The tensor.
        tensor: TensorName,
        /// What is too short or too long.
        what: &'static str,
        /// How many it must have.
        expected: usize,
        /// Or how many, for all heads to share them.
        or: Option<usize>,
        /// How many it has.
        got: usize,
    },
    /// A buffer holds something else than was planned.
    #[error(
        "{what} holds values of another type: give what was planned, of {expected} bytes each, or a buffer \
         of bytes"
    )]
    BufferType {
        /// Which buffer.
        what: &'static str,
        /// Bytes of what it is to hold.
        expected: usize,
    },
    /// A buffer does not begin where elements may.
    #[error(
        "{what} begins at an address that is not a multiple of {align} bytes: align the buffer"
    )]
    BufferUnaligned {
        /// Which buffer.
        what: &'static str,
        /// What its address must be a multiple of.
        align: usize,
    },
    /// The offsets of a ragged batch are no offsets.
    #[error("cu_seqlens: {what}")]
    CuSeqlens {
        /// What is wrong.
        what: &'static str,
    },
    /// Elements that are written occur twice in one layout.
    #[error(
        "{tensor}: the layout writes some elements twice: make each stride at least the extent of \
         what lies inside it"
    )]
    SelfOverlap {
        /// The tensor.
        tensor: TensorName,
    },
    /// Two layouts of one buffer share elements, and at least one of them is written.
    #[error(
        "{first} and {second} share elements of the buffer: move one by its offset, or rotate in \
         place with equal layouts"
    )]
    Overlap {
        /// One layout.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// The strides do not nest, so disjointness is not decided.
    #[error(
        "cannot prove that {what} is free of overlap, because the strides do not nest or are too \
         unlike: order the strides so that each covers all that lies inside it, or vouch for it \
         with Problem::assume_disjoint"
    )]
    OverlapUnknown {
        /// The layout or pair of layouts.
        what: &'static str,
    },
    /// A buffer is shorter than its layout.
    #[error(
        "{what}: the buffer has {got} elements, the layout needs {needed}: check its shape, strides \
         and offset"
    )]
    BufferTooShort {
        /// The buffer.
        what: &'static str,
        /// Elements that the layout reaches.
        needed: usize,
        /// Elements that the buffer has.
        got: usize,
    },
    /// A buffer has room for more than the plan rotates, as if the plan were of an earlier step.
    #[error(
        "{what}: the buffer has {got} elements, room for another {more} after the {needed} that the \
         plan reaches: plan for what is to be rotated, take Plan::first_tokens or first_sequences of a \
         larger plan, or say with Problem::longer_buffers that more room is meant"
    )]
    BufferHasRoom {
        /// The buffer.
        what: &'static str,
        /// What there is room for: `token` or `sequence`.
        more: &'static str,
        /// Elements that the layout reaches.
        needed: usize,
        /// Elements that the buffer has.
        got: usize,
    },
    /// A part of a plan is larger than the plan.
    #[error(
        "the plan has {planned:?} [batch, tokens], {asked:?} were asked for: plan for the most that a \
         step has, and take parts of that"
    )]
    NotInPlan {
        /// `[batch, tokens]` of the plan.
        planned: [usize; 2],
        /// `[batch, tokens]` of the part.
        asked: [usize; 2],
    },
    /// A problem has neither q nor k.
    #[error("there is nothing to rotate: give the problem a layout, with Problem::q or Problem::k")]
    NothingToRotate,
    /// A tensor is given where the plan has none, or the other way round, or in place against out
    /// of place.
    #[error(
        "the plan has {tensor} {planned}, the call has it {given}: give it as it was planned, or \
         plan it as it is given"
    )]
    OperandMismatch {
        /// The tensor.
        tensor: TensorName,
        /// What the plan has.
        planned: &'static str,
        /// What the call gives.
        given: &'static str,
    },
    /// One buffer for all tensors is given where the plan has separate ones, or the other way round.
    #[error("the plan is over {planned}: {remedy}")]
    OneBufferMismatch {
        /// What the plan is over.
        planned: &'static str,
        /// What to call instead.
        remedy: &'static str,
    },
    /// The element type is not the plan's.
    #[error(
        "the plan was made for {planned}, the buffers hold {given}: plan with \
         Problem::new(Dtype::{given:?})"
    )]
    DtypeMismatch {
        /// The plan's.
        planned: Dtype,
        /// The buffers'.
        given: Dtype,
    },
    /// Too few or too many positions.
    #[error("{got} positions given, give {expected}: {kind}{}", packed_advice(*kind, *expected, *got))]
    PositionsLength {
        /// What the plan's shape needs.
        expected: usize,
        /// What was given.
        got: usize,
        /// How they are given.
        kind: PositionKind,
    },
    /// A position has no row in the table.
    #[error(
        "position {position} (sequence {batch}, token {token}) is outside the table's {rows} \
         rows: {}", out_of_table_advice(*position)
    )]
    PositionOutOfRange {
        /// The position.
        position: i64,
        /// Sequence of the first such token.
        batch: usize,
        /// Its index in the sequence.
        token: usize,
        /// Rows of the table.
        rows: usize,
    },
    /// `OutOfRange::Error` cannot be kept for positions that live on the device.
    #[error(
        "positions on the device cannot be checked by the host: give the table \
         OutOfRange::Clamp or PassThrough, or use a start position"
    )]
    DevicePositionsUnchecked,
    /// A rotation that puts pairs elsewhere than it found them is planned in place.
    #[error(
        "{tensor}: the rotation writes pairs elsewhere than it reads them, which cannot be done in \
         place: plan it out of place"
    )]
    OutputPairingInPlace {
        /// The tensor.
        tensor: TensorName,
    },
    /// A rotation that puts pairs elsewhere than it found them has a table that passes tokens
    /// through.
    #[error(
        "the rotation writes pairs elsewhere than it reads them, so that no token passes through: \
         give the table OutOfRange::Error or Clamp"
    )]
    OutputPairingPassThrough,
    /// The angles of two positions do not add up to that of their sum.
    #[error(
        "rotated keys cannot be moved to other positions with {what}: rotate the original keys \
         again, or use Frequencies"
    )]
    Shift {
        /// The angle source.
        what: &'static str,
    },
    /// The rotation would do more to cached keys than to move them.
    #[error(
        "the rotation has an attention factor, or an output pairing of its own, which rotated keys have \
         already: make the rotator of Rope::shift"
    )]
    NotAShift,
    /// Slots to be moved are not in the cache.
    #[error(
        "slots {first}..{end} are not a range of the cache's {slots}: give ranges that end where they begin \
         or later, numbered through all pages"
    )]
    SlotRange {
        /// The first slot.
        first: usize,
        /// The slot behind the last one.
        end: usize,
        /// Slots of the cache.
        slots: usize,
    },
    /// Slots are to be moved by two distances.
    #[error(
        "slot {slot} is in ranges of different distances or frequency rows: a slot that sequences share can \
         move only as they all do, so copy it for one of them first"
    )]
    SlotRangesDiffer {
        /// The first slot that two such ranges share.
        slot: usize,
    },
    /// Not a distance for each axis.
    #[error(
        "{got} distances for positions on {axes} axes: give one for each, or SlotRange::new one for all"
    )]
    ShiftAxes {
        /// Axes of the rotation.
        axes: usize,
        /// Distances given.
        got: usize,
    },
    /// Cached keys that only the host backend moves.
    #[error(
        "cached keys with {what} are moved by the host backend only: move them in host memory, or rotate \
         the original keys again"
    )]
    ShiftOnHost {
        /// What they have.
        what: &'static str,
    },
    /// The plan was made for another rotation: other angles (the same object, not equal values),
    /// pairing or direction. Rotators of one [`Rope`](crate::Rope) and its clones share plans.
    #[error(
        "the plan was made for another rotation: make it with this rotator's plan(), or make both \
         rotators from one Rope or its clones (equal ones that were made apart do not share plans)"
    )]
    PlanMismatch,
    /// The processor lacks the instruction set asked for.
    #[error(
        "this processor cannot run the {isa} variant of the host backend: leave the choice to \
         Host::new"
    )]
    IsaUnavailable {
        /// Its name.
        isa: &'static str,
    },
    /// A rotator or buffer belongs to another backend or device.
    #[error(
        "{what} is on {found}, the call runs on {expected}: allocate it there (on a GPU, with the \
         same CudaContext object)"
    )]
    DeviceMismatch {
        /// The buffer or object.
        what: &'static str,
        /// Where it is.
        found: String,
        /// Where the work runs.
        expected: String,
    },
    /// No NVIDIA driver library could be opened.
    #[error(
        "no NVIDIA driver found ({library} cannot be opened): to use a GPU, install the driver"
    )]
    NoDriver {
        /// The library that is missing.
        library: &'static str,
    },
    /// There is a driver but no such device.
    #[error("no CUDA device {ordinal}: the driver lists {count}, numbered from 0")]
    NoDevice {
        /// The ordinal asked for.
        ordinal: usize,
        /// Devices the driver lists.
        count: usize,
    },
    /// A driver call failed.
    #[error("{operation} failed: {code}")]
    Driver {
        /// What was being done.
        operation: &'static str,
        /// The driver's name for the error.
        code: String,
    },
    /// None of the embedded kernel images loads on this GPU.
    #[error(
        "no embedded kernel image runs on {device} (compute capability {major}.{minor}): {reason}. \
         GPUs from 7.5 on are supported; add the GPU to PHASOR_CUDA_ARCHS and build with nvcc, or \
         update the driver to 525 or later"
    )]
    KernelImage {
        /// Name of the GPU.
        device: String,
        /// Compute capability, major.
        major: i32,
        /// Compute capability, minor.
        minor: i32,
        /// What the driver said.
        reason: String,
    },
    /// The kernels of an element type were not loaded.
    #[error("kernels for {dtype} are not loaded: name it when constructing the CUDA backend")]
    DtypeNotLoaded {
        /// The element type.
        dtype: Dtype,
    },
    /// Heads with stages do not fit in the shared memory of a block of threads on a GPU.
    #[error(
        "{tensor}: heads that have stages take {bytes} bytes of the {most} that a block of threads has: \
         use the host backend, or plan heads of fewer dims (or fewer heads, where a norm is across them)"
    )]
    StagesTooLarge {
        /// The tensor.
        tensor: TensorName,
        /// Bytes of one head and its angles, or of all heads.
        bytes: u64,
        /// Bytes that there are.
        most: u64,
    },
    /// The CUDA backend is not compiled in.
    #[error("phasor was built without the cuda feature: enable it in Cargo.toml")]
    CudaNotBuilt,
    /// A device name is not understood.
    #[error("unknown device {:?}: use auto, host, cuda or cuda:N", cut(name, 60))]
    DeviceName {
        /// As given.
        name: String,
    },
}

/// The first characters of a text that a caller or a file gave, which may be of any length.
pub(crate) fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.to_string(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

/// For whoever packs several sequences as one and gives a value for each of them.
fn packed_advice(kind: PositionKind, expected: usize, got: usize) -> &'static str {
    match kind {
        PositionKind::StartPerSequence | PositionKind::PerSequence if expected == 1 && got > 1 => {
            " (for sequences that are packed as one, give the position of each token, with \
             Positions::per_token)"
        }
        _ => "",
    }
}

fn out_of_table_advice(position: i64) -> &'static str {
    if position < 0 {
        "no table has negative positions, so check the position ids; choose OutOfRange::Clamp or \
         PassThrough, or Frequencies, whose angles are exact at any position"
    } else {
        "extend the table, or choose OutOfRange::Clamp or PassThrough"
    }
}
