//! A plan: everything about a call that can be checked before there is memory to work on.

use crate::element::Dtype;
use crate::error::TensorName;
use crate::layout::{Layout, Overlap, Region};
use crate::positions::{FrequencyRowKind, PositionIds, PositionKind, Positions, Token};
use crate::{Angles, Error, OutOfRange, Rope};

/// One tensor of a call: written where it is read, or somewhere else.
///
/// Used for layouts (`InOut<Layout>`) when planning, and for buffers of each backend when
/// rotating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InOut<S, D = S> {
    /// Rotated where it is. Dims that do not rotate are not touched.
    InPlace(D),
    /// Read from `source`, written to `destination`; dims that do not rotate are copied.
    OutOfPlace {
        /// Read only.
        source: S,
        /// Written in full.
        destination: D,
    },
}

impl<S, D> InOut<S, D> {
    /// Turns each side into something else.
    pub(crate) fn try_map<S2, D2, E>(
        self,
        source: impl FnOnce(S) -> Result<S2, E>,
        destination: impl FnOnce(D) -> Result<D2, E>,
    ) -> Result<InOut<S2, D2>, E> {
        Ok(match self {
            InOut::InPlace(buffer) => InOut::InPlace(destination(buffer)?),
            InOut::OutOfPlace {
                source: from,
                destination: to,
            } => InOut::OutOfPlace {
                source: source(from)?,
                destination: destination(to)?,
            },
        })
    }
}

impl From<Layout> for InOut<Layout> {
    fn from(layout: Layout) -> Self {
        InOut::InPlace(layout)
    }
}

/// `(source, destination)`.
impl From<(Layout, Layout)> for InOut<Layout> {
    fn from((source, destination): (Layout, Layout)) -> Self {
        InOut::OutOfPlace {
            source,
            destination,
        }
    }
}

/// What is to be rotated: element type, the layouts of q and k, how positions are given.
///
/// ```
/// use phasor::{Dtype, Layout, PositionKind, Problem};
///
/// let problem = Problem::new(Dtype::Bf16)
///     .q(Layout::tokens(256, 32, 128))
///     .k(Layout::tokens(256, 8, 128))
///     .positions(PositionKind::PerToken);
/// # let _ = problem;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    dtype: Dtype,
    q: Option<InOut<Layout>>,
    k: Option<InOut<Layout>>,
    positions: PositionKind,
    frequency_rows: FrequencyRowKind,
    one_buffer: bool,
    assume_disjoint: bool,
}

impl Problem {
    /// An empty problem over elements of `dtype`, with positions from one start.
    pub const fn new(dtype: Dtype) -> Self {
        Self {
            dtype,
            q: None,
            k: None,
            positions: PositionKind::Start,
            frequency_rows: FrequencyRowKind::None,
            one_buffer: false,
            assume_disjoint: false,
        }
    }

    /// The queries: a [`Layout`] in place, or a pair `(source, destination)`. Queries and keys agree
    /// in batch and sequence only; heads, head_dim and rotary_offset may differ.
    pub fn q(mut self, layout: impl Into<InOut<Layout>>) -> Self {
        self.q = Some(layout.into());
        self
    }

    /// The keys: a [`Layout`] in place, or a pair `(source, destination)`.
    pub fn k(mut self, layout: impl Into<InOut<Layout>>) -> Self {
        self.k = Some(layout.into());
        self
    }

    /// How positions are given; [`PositionKind::Start`] if not set.
    pub const fn positions(mut self, kind: PositionKind) -> Self {
        self.positions = kind;
        self
    }

    /// How a call chooses among the rotation's [`FrequencyRows`](crate::FrequencyRows);
    /// [`FrequencyRowKind::None`] if not set, for rotations without rows.
    pub const fn frequency_rows(mut self, kind: FrequencyRowKind) -> Self {
        self.frequency_rows = kind;
        self
    }

    /// All layouts are windows of one buffer, such as packed qkv. Overlap is then checked across
    /// tensors too. Otherwise every source and destination is a buffer of its own.
    pub const fn one_buffer(mut self) -> Self {
        self.one_buffer = true;
        self
    }

    /// Accepts layouts whose strides do not nest, so that freedom of overlap cannot be decided.
    /// Overlap that is certain is refused all the same.
    ///
    /// # Safety
    /// No element that is written may occur twice in its layout or in another layout of the same
    /// buffer, except for source and destination of one tensor rotated in place.
    pub const unsafe fn assume_disjoint(mut self) -> Self {
        self.assume_disjoint = true;
        self
    }
}

/// A tensor of a plan, its layouts checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedTensor {
    pub(crate) name: TensorName,
    pub(crate) source: Layout,
    pub(crate) destination: Layout,
    pub(crate) in_place: bool,
}

impl PlannedTensor {
    pub(crate) const fn form(&self) -> &'static str {
        if self.in_place {
            "in place"
        } else {
            "out of place"
        }
    }

    /// Buffers of these lengths reach as far as the layouts do.
    pub(crate) fn check_lengths(&self, source: usize, destination: usize) -> Result<(), Error> {
        let (written, read) = self.labels();
        for (what, layout, got) in [
            (read, &self.source, source),
            (written, &self.destination, destination),
        ] {
            // A planned layout has a length.
            let needed = layout.required_len().unwrap_or(usize::MAX);
            if got < needed {
                return Err(Error::BufferTooShort { what, needed, got });
            }
        }
        Ok(())
    }

    /// The elements that are written.
    fn written(&self, rotary_dim: usize) -> Region {
        if self.in_place {
            self.destination
                .region(self.destination.rotary_offset, rotary_dim)
        } else {
            self.destination.region(0, self.destination.head_dim)
        }
    }

    fn read(&self, rotary_dim: usize) -> Region {
        if self.in_place {
            self.written(rotary_dim)
        } else {
            self.source.region(0, self.source.head_dim)
        }
    }

    /// Names for errors: of what is written and of what is read.
    const fn labels(&self) -> (&'static str, &'static str) {
        match (self.name, self.in_place) {
            (TensorName::Q, true) => ("q", "q"),
            (TensorName::K, true) => ("k", "k"),
            (TensorName::Q, false) => ("q's destination", "q's source"),
            (TensorName::K, false) => ("k's destination", "k's source"),
        }
    }
}

/// A checked [`Problem`] for one [`Rope`], valid for any number of calls.
///
/// All that can be wrong with shapes, strides and overlap has been refused; a call checks that it
/// brings what was planned (rotation, element type, operands), buffer lengths and positions.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) rope: Rope,
    pub(crate) dtype: Dtype,
    pub(crate) q: Option<PlannedTensor>,
    pub(crate) k: Option<PlannedTensor>,
    pub(crate) positions: PositionKind,
    pub(crate) frequency_rows: FrequencyRowKind,
    pub(crate) one_buffer: bool,
    pub(crate) batch: usize,
    pub(crate) sequence: usize,
}

/// Where the positions of a plan will be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionMemory {
    /// By the host, which can check them.
    Host,
    /// By the device: starts per row and positions per token are device addresses.
    Device,
}

/// Kernels count heads and dims in 32 bits, with room to step past the end.
const MAX_COUNT: usize = 1 << 28;

impl Plan {
    /// Checks `problem` for `rope`. Backends call this through their own `plan`.
    ///
    /// # Errors
    /// [`Error::RotaryWindow`], [`Error::ShapeMismatch`], [`Error::RotaryOffsetMismatch`],
    /// [`Error::LayoutTooLarge`], [`Error::SelfOverlap`], [`Error::Overlap`],
    /// [`Error::OverlapUnknown`], [`Error::OutputPairingInPlace`],
    /// [`Error::OutputPairingPassThrough`], [`Error::FrequencyRows`] if rows are to be chosen where there are
    /// none or the other way round, and [`Error::DevicePositionsUnchecked`] for a table with [`OutOfRange::Error`] whose positions
    /// the host cannot see.
    pub fn new(rope: &Rope, problem: &Problem, memory: PositionMemory) -> Result<Self, Error> {
        let checked = |name, operand: &Option<InOut<Layout>>| {
            operand
                .as_ref()
                .map(|operand| check_tensor(name, operand, rope.rotary_dim(), problem))
                .transpose()
        };
        let q = checked(TensorName::Q, &problem.q)?;
        let k = checked(TensorName::K, &problem.k)?;
        if let (Some(q), Some(k)) = (&q, &k) {
            let (left, right) = (q.source.shape(), k.source.shape());
            if left[..2] != right[..2] {
                return Err(Error::ShapeMismatch {
                    what: "q and k must agree in batch and sequence",
                    left,
                    right,
                });
            }
            if problem.one_buffer {
                check_apart(q, k, rope.rotary_dim(), problem.assume_disjoint)?;
                check_apart(k, q, rope.rotary_dim(), problem.assume_disjoint)?;
            }
        }
        if let Angles::Table(table) = rope.angles()
            && table.out_of_range() == OutOfRange::Error
            && memory == PositionMemory::Device
            && problem.positions != PositionKind::Start
        {
            return Err(Error::DevicePositionsUnchecked);
        }
        check_row_kind(rope.angles(), problem.frequency_rows)?;
        if rope.pairing() != rope.output_pairing() {
            check_output_pairing(rope.angles(), [&q, &k])?;
        }
        let [batch, sequence, ..] = q.or(k).map_or([0; 4], |tensor| tensor.source.shape());
        Ok(Self {
            rope: rope.clone(),
            dtype: problem.dtype,
            q,
            k,
            positions: problem.positions,
            frequency_rows: problem.frequency_rows,
            one_buffer: problem.one_buffer,
            batch,
            sequence,
        })
    }

    /// The rotation that this plan performs.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How a call gives its positions.
    pub fn position_kind(&self) -> PositionKind {
        self.positions
    }

    /// How a call chooses rows of frequencies.
    pub fn frequency_row_kind(&self) -> FrequencyRowKind {
        self.frequency_rows
    }

    /// Bytes that a call reads and writes: in place the rotated dims, out of place all of them.
    /// Angles and positions are not counted.
    pub fn bytes(&self) -> u64 {
        self.tensors()
            .map(|tensor| {
                let [batch, sequence, heads, head_dim] = tensor.source.shape();
                let dims = if tensor.in_place {
                    self.rope.rotary_dim()
                } else {
                    head_dim
                };
                2 * (batch * sequence * heads * dims * self.dtype.size()) as u64
            })
            .sum()
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.q.iter().chain(&self.k)
    }

    /// No head to rotate.
    pub(crate) fn is_empty(&self) -> bool {
        self.tensors().all(|tensor| tensor.source.is_empty())
    }

    /// The plan is over one buffer, which reaches as far as its layouts do.
    pub(crate) fn check_one_buffer(&self, len: usize) -> Result<(), Error> {
        if !self.one_buffer {
            return Err(Error::OneBufferMismatch {
                planned: "separate buffers",
                remedy: "call rotate, or plan with Problem::one_buffer",
            });
        }
        self.tensors()
            .try_for_each(|tensor| tensor.check_lengths(len, len))
    }

    /// Checks the kind and number of positions whose values are not seen.
    pub(crate) fn check_position_count(
        &self,
        given: PositionKind,
        got: usize,
    ) -> Result<(), Error> {
        let planned = self.positions;
        if given != planned {
            return Err(Error::PositionKindMismatch { planned, given });
        }
        let axes = self.rope.angles().axes();
        let expected = planned.expected_len(axes, self.batch, self.sequence);
        if got != expected {
            return Err(Error::PositionsLength {
                expected,
                got,
                kind: planned,
            });
        }
        Ok(())
    }

    /// Checks the kind and number of row indices whose values are not seen.
    pub(crate) fn check_row_count(&self, given: FrequencyRowKind, got: usize) -> Result<(), Error> {
        let planned = self.frequency_rows;
        if given != planned {
            return Err(Error::FrequencyRowMismatch { planned, given });
        }
        let expected = planned.expected_len(self.batch, self.sequence);
        if got != expected {
            return Err(Error::FrequencyRowsLength {
                expected,
                got,
                kind: planned,
            });
        }
        Ok(())
    }

    /// The index of a row that the host sees is one of the rotation's.
    pub(crate) fn check_row(&self, row: u32) -> Result<(), Error> {
        match self.rope.angles() {
            Angles::Rows(rows) if row as usize >= rows.rows() => {
                Err(Error::FrequencyRowOutOfRange {
                    row,
                    rows: rows.rows(),
                })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn token(&self, b: usize, s: usize) -> Token {
        Token {
            b,
            s,
            batch: self.batch,
            sequence: self.sequence,
        }
    }

    /// Checks host positions and row indices: kind, number, and that rows and the table have them.
    pub(crate) fn check_positions(&self, positions: &Positions<'_>) -> Result<(), Error> {
        let ids = positions.ids().map_or(0, PositionIds::len);
        self.check_position_count(positions.kind(), ids)?;
        let rows = positions.frequency_row_ids().copied().unwrap_or_default();
        self.check_row_count(positions.frequency_row_kind(), rows.len())?;
        for row in positions.as_frequency_row().iter().chain(rows) {
            self.check_row(*row)?;
        }
        self.check_table_range(positions)
    }

    /// Positions are inside the table, where it refuses others.
    pub(crate) fn check_table_range(&self, positions: &Positions<'_>) -> Result<(), Error> {
        if self.is_empty() {
            return Ok(());
        }
        let Angles::Table(table) = self.rope.angles() else {
            return Ok(());
        };
        if table.out_of_range() != OutOfRange::Error {
            return Ok(());
        }
        let rows = table.rows();
        // The usual case at no cost: this runs at every launch.
        if let Some(start) = positions.as_start()
            && let Ok(start) = usize::try_from(start)
            && start
                .checked_add(self.sequence)
                .is_some_and(|end| end <= rows)
        {
            return Ok(());
        }
        for batch in 0..self.batch {
            for token in 0..self.sequence {
                let position = positions.at(0, self.token(batch, token));
                if position < 0 || position as u64 >= rows as u64 {
                    return Err(Error::PositionOutOfRange {
                        position,
                        batch,
                        token,
                        rows,
                    });
                }
            }
            // All rows are alike.
            if self.positions == PositionKind::Start {
                break;
            }
        }
        Ok(())
    }

    /// Checks the forms of the operands of a call against the plan's.
    pub(crate) fn check_operands<'a, S: 'a, D: 'a>(
        &self,
        q: &Option<InOut<S, D>>,
        k: &Option<InOut<S, D>>,
    ) -> Result<(), Error> {
        if self.one_buffer {
            return Err(Error::OneBufferMismatch {
                planned: "one buffer",
                remedy: "call rotate_one_buffer",
            });
        }
        for (tensor, planned, given) in [(TensorName::Q, &self.q, q), (TensorName::K, &self.k, k)] {
            let planned = planned.as_ref().map_or("absent", PlannedTensor::form);
            let given = match given {
                None => "absent",
                Some(InOut::InPlace(_)) => "in place",
                Some(InOut::OutOfPlace { .. }) => "out of place",
            };
            if planned != given {
                return Err(Error::OperandMismatch {
                    tensor,
                    planned,
                    given,
                });
            }
        }
        Ok(())
    }

    /// The element type of a call is the plan's.
    pub(crate) fn check_dtype(&self, given: Dtype) -> Result<(), Error> {
        if given != self.dtype {
            return Err(Error::DtypeMismatch {
                planned: self.dtype,
                given,
            });
        }
        Ok(())
    }
}

fn check_tensor(
    name: TensorName,
    operand: &InOut<Layout>,
    rotary_dim: usize,
    problem: &Problem,
) -> Result<PlannedTensor, Error> {
    let (source, destination, in_place) = match *operand {
        InOut::InPlace(layout) => (layout, layout, true),
        InOut::OutOfPlace {
            source,
            destination,
        } => (source, destination, false),
    };
    let tensor = PlannedTensor {
        name,
        source,
        destination,
        in_place,
    };
    if source.shape() != destination.shape() {
        return Err(Error::ShapeMismatch {
            what: "source and destination must agree in shape",
            left: source.shape(),
            right: destination.shape(),
        });
    }
    if source.rotary_offset != destination.rotary_offset {
        return Err(Error::RotaryOffsetMismatch {
            tensor: name,
            source_offset: source.rotary_offset,
            destination_offset: destination.rotary_offset,
        });
    }
    source.check_rotary(rotary_dim, name)?;
    for layout in [&source, &destination] {
        let bytes = layout
            .required_len()
            .and_then(|len| len.checked_mul(problem.dtype.size()));
        // A source may repeat elements, so its count is bounded apart from its length.
        let count = layout
            .shape()
            .iter()
            .try_fold(2 * problem.dtype.size(), |n, &dim| n.checked_mul(dim));
        let fits = |n: Option<usize>| n.is_some_and(|n| i64::try_from(n).is_ok());
        if !fits(bytes) || !fits(count) || layout.heads >= MAX_COUNT || layout.head_dim >= MAX_COUNT
        {
            return Err(Error::LayoutTooLarge { tensor: name });
        }
    }
    if source.is_empty() {
        return Ok(tensor);
    }
    let (written, read) = tensor.labels();
    let verdict = tensor.written(rotary_dim).self_overlap();
    match verdict {
        Overlap::Overlapping => return Err(Error::SelfOverlap { tensor: name }),
        Overlap::Unknown if !problem.assume_disjoint => {
            return Err(Error::OverlapUnknown { what: written });
        }
        _ => {}
    }
    if problem.one_buffer && !in_place {
        refuse_overlap(
            (written, &tensor.written(rotary_dim)),
            (read, &tensor.read(rotary_dim)),
            problem.assume_disjoint,
        )?;
    }
    Ok(tensor)
}

/// Rows are chosen where there are rows to choose from, and only there.
fn check_row_kind(angles: &Angles, kind: FrequencyRowKind) -> Result<(), Error> {
    let to_choose = matches!(angles, Angles::Rows(rows) if rows.boundary().is_none());
    match (to_choose, kind) {
        (true, FrequencyRowKind::None) => Err(Error::FrequencyRows {
            what: "say how a call chooses among them, with Problem::frequency_rows",
        }),
        (true, _) | (false, FrequencyRowKind::None) => Ok(()),
        (false, _) => Err(Error::FrequencyRows {
            what: "the rotation has none that a call could choose among: leave out \
                   Problem::frequency_rows",
        }),
    }
}

/// Each pair has one place to be read from and another to be written to.
fn check_output_pairing(
    angles: &Angles,
    tensors: [&Option<PlannedTensor>; 2],
) -> Result<(), Error> {
    if let Some(tensor) = tensors.into_iter().flatten().find(|tensor| tensor.in_place) {
        return Err(Error::OutputPairingInPlace {
            tensor: tensor.name,
        });
    }
    match angles {
        Angles::Table(table) if table.out_of_range() == OutOfRange::PassThrough => {
            Err(Error::OutputPairingPassThrough)
        }
        _ => Ok(()),
    }
}

/// What `written` writes is neither read nor written by `other`.
fn check_apart(
    written: &PlannedTensor,
    other: &PlannedTensor,
    rotary_dim: usize,
    assume_disjoint: bool,
) -> Result<(), Error> {
    if written.source.is_empty() || other.source.is_empty() {
        return Ok(());
    }
    let region = written.written(rotary_dim);
    let (label, _) = written.labels();
    let (other_written, other_read) = other.labels();
    refuse_overlap(
        (label, &region),
        (other_written, &other.written(rotary_dim)),
        assume_disjoint,
    )?;
    refuse_overlap(
        (label, &region),
        (other_read, &other.read(rotary_dim)),
        assume_disjoint,
    )
}

fn refuse_overlap(
    (first, a): (&'static str, &Region),
    (second, b): (&'static str, &Region),
    assume_disjoint: bool,
) -> Result<(), Error> {
    match a.overlap(b) {
        Overlap::Overlapping => Err(Error::Overlap { first, second }),
        Overlap::Unknown if !assume_disjoint => {
            let nests = b.self_overlap() == Overlap::Disjoint;
            let what = if nests { first } else { second };
            Err(Error::OverlapUnknown { what })
        }
        _ => Ok(()),
    }
}
