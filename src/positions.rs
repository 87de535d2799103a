//! Where the tokens of a call are.

use crate::ids::Ids;

/// How the positions of a call are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PositionKind {
    /// One start for all sequences of the batch: token `t` of each is at `start + t`.
    #[default]
    Start,
    /// A start per sequence, `[batch]`: token `t` of sequence `b` is at `start[b] + t`.
    StartPerSequence,
    /// A position per sequence, `[batch]`, that all its tokens share: what
    /// [`Rope::shift`](crate::Rope::shift) moves the keys of each sequence by.
    PerSequence,
    /// A position per token, `[batch, tokens]`, contiguous.
    PerToken,
    /// A position per token that all sequences share, `[tokens]` (position_ids of shape `[1, tokens]`).
    PerTokenShared,
    /// A position per axis and token, `[axes, batch, tokens]`, contiguous. With the other kinds
    /// all axes of a token are at one position, as those of text are.
    PerAxis,
}

impl PositionKind {
    /// Positions a call must give, besides a start. `all`: tokens of the whole batch.
    pub(crate) fn expected_len(
        self,
        axes: usize,
        sequences: usize,
        tokens: usize,
        all: usize,
    ) -> usize {
        match self {
            PositionKind::Start => 0,
            PositionKind::StartPerSequence | PositionKind::PerSequence => sequences,
            PositionKind::PerToken => all,
            PositionKind::PerTokenShared => tokens,
            // A plan without elements may have any shape.
            PositionKind::PerAxis => axes.saturating_mul(all),
        }
    }
}

impl std::fmt::Display for PositionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PositionKind::Start => "one start",
            PositionKind::StartPerSequence => "one start per sequence of the batch",
            PositionKind::PerSequence => "one position per sequence of the batch",
            PositionKind::PerToken => "one position per token",
            PositionKind::PerTokenShared => "one position per token of a sequence",
            PositionKind::PerAxis => "one position per axis and token",
        })
    }
}

/// How a call chooses rows of frequencies, where the rotation has
/// [`FrequencyRows`](crate::FrequencyRows).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FrequencyRowKind {
    /// Not by the call: there are no rows, or positions choose between them.
    #[default]
    None,
    /// One row for the whole call. (Hugging Face transformers does this, by the call's largest
    /// position.)
    Call,
    /// A row per sequence, `[batch]`: for sequences of differing lengths.
    PerSequence,
    /// A row per token, `[batch, tokens]`, contiguous: for sequences that are packed as one.
    PerToken,
}

impl FrequencyRowKind {
    /// Indices a call must give, besides that of the whole call.
    pub(crate) fn expected_len(self, sequences: usize, all: usize) -> usize {
        match self {
            FrequencyRowKind::None | FrequencyRowKind::Call => 0,
            FrequencyRowKind::PerSequence => sequences,
            FrequencyRowKind::PerToken => all,
        }
    }
}

impl std::fmt::Display for FrequencyRowKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FrequencyRowKind::None => "no frequency row",
            FrequencyRowKind::Call => "one frequency row",
            FrequencyRowKind::PerSequence => "one frequency row per sequence of the batch",
            FrequencyRowKind::PerToken => "one frequency row per token",
        })
    }
}

/// Where the tokens of a call are: their positions and, where the rotation has
/// [`FrequencyRows`](crate::FrequencyRows) to choose from, their rows. `M` is where their
/// [`Ids`] are: see [`Positions`] for host memory, [`DevicePositions`](crate::DevicePositions), and
/// `cuda::CudaPositions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PositionsIn<M> {
    values: Values<M>,
    rows: RowIds<M>,
    cu_seqlens: Option<Ids<M>>,
}

/// The positions of one call, in host memory.
///
/// ```
/// use phasor::Positions;
///
/// let starts = [0i64, 40_000];
/// let positions = Positions::start_per_sequence(&starts).frequency_rows_per_sequence(&[0, 1]);
/// # let _ = positions;
/// ```
pub type Positions<'a> = PositionsIn<&'a [u8]>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values<M> {
    Start(i64),
    Ids(PositionKind, Ids<M>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RowIds<M> {
    None,
    Call(u32),
    Ids(FrequencyRowKind, Ids<M>),
}

impl<M> PositionsIn<M> {
    const fn new(values: Values<M>) -> Self {
        Self {
            values,
            rows: RowIds::None,
            cu_seqlens: None,
        }
    }

    /// One start for all sequences of the batch; see [`PositionKind::Start`].
    pub const fn start(start: i64) -> Self {
        Self::new(Values::Start(start))
    }

    /// One start per sequence, `[batch]`; see [`PositionKind::StartPerSequence`].
    pub fn start_per_sequence(starts: impl Into<Ids<M>>) -> Self {
        Self::ids_of(PositionKind::StartPerSequence, starts)
    }

    /// One position per sequence, `[batch]`, for all its tokens; see [`PositionKind::PerSequence`].
    pub fn per_sequence(ids: impl Into<Ids<M>>) -> Self {
        Self::ids_of(PositionKind::PerSequence, ids)
    }

    /// One position per token, `[batch, tokens]`; see [`PositionKind::PerToken`].
    pub fn per_token(ids: impl Into<Ids<M>>) -> Self {
        Self::ids_of(PositionKind::PerToken, ids)
    }

    /// One position per token, `[tokens]`, for all sequences of the batch; see
    /// [`PositionKind::PerTokenShared`].
    pub fn per_token_shared(ids: impl Into<Ids<M>>) -> Self {
        Self::ids_of(PositionKind::PerTokenShared, ids)
    }

    /// One position per axis and token, `[axes, batch, tokens]`; see [`PositionKind::PerAxis`].
    pub fn per_axis(ids: impl Into<Ids<M>>) -> Self {
        Self::ids_of(PositionKind::PerAxis, ids)
    }

    /// The tokens are those of several sequences, one sequence after the other (a ragged batch): sequence
    /// `s` has the tokens from `cu_seqlens[s]` to `cu_seqlens[s + 1]`, `[sequences + 1]`. Tokens from the
    /// last of them on are padding, which is not touched. The plan has one sequence, of as many tokens as
    /// there may be; what is given per sequence is given for each of these, and a token's place in its
    /// sequence counts from the sequence's first.
    ///
    /// ```
    /// use phasor::Positions;
    ///
    /// // Three sequences of 7, 1 and 2 new tokens, whose caches hold 0, 40 and 1,000.
    /// let cu_seqlens = [0, 7, 8, 10];
    /// let cache_lengths = [0, 40, 1000];
    /// let positions = Positions::start_per_sequence(&cache_lengths).cu_seqlens(&cu_seqlens);
    /// # let _ = positions;
    /// ```
    pub fn cu_seqlens(mut self, cu_seqlens: impl Into<Ids<M>>) -> Self {
        self.cu_seqlens = Some(cu_seqlens.into());
        self
    }

    fn ids_of(kind: PositionKind, ids: impl Into<Ids<M>>) -> Self {
        Self::new(Values::Ids(kind, ids.into()))
    }

    /// One row of frequencies for the whole call; see [`FrequencyRowKind::Call`].
    pub fn frequency_row(mut self, row: u32) -> Self {
        self.rows = RowIds::Call(row);
        self
    }

    /// A row of frequencies per sequence, `[batch]`; see [`FrequencyRowKind::PerSequence`].
    pub fn frequency_rows_per_sequence(mut self, rows: impl Into<Ids<M>>) -> Self {
        self.rows = RowIds::Ids(FrequencyRowKind::PerSequence, rows.into());
        self
    }

    /// A row of frequencies per token, `[batch, tokens]`; see [`FrequencyRowKind::PerToken`].
    pub fn frequency_rows_per_token(mut self, rows: impl Into<Ids<M>>) -> Self {
        self.rows = RowIds::Ids(FrequencyRowKind::PerToken, rows.into());
        self
    }

    /// How the positions are given.
    pub fn kind(&self) -> PositionKind {
        match self.values {
            Values::Start(_) => PositionKind::Start,
            Values::Ids(kind, _) => kind,
        }
    }

    /// How the rows of frequencies are chosen.
    pub fn frequency_row_kind(&self) -> FrequencyRowKind {
        match self.rows {
            RowIds::None => FrequencyRowKind::None,
            RowIds::Call(_) => FrequencyRowKind::Call,
            RowIds::Ids(kind, _) => kind,
        }
    }

    /// The start, if that is how positions are given.
    pub fn as_start(&self) -> Option<i64> {
        match self.values {
            Values::Start(start) => Some(start),
            Values::Ids(..) => None,
        }
    }

    /// The position values, if they are not given by one start.
    pub fn ids(&self) -> Option<&Ids<M>> {
        match &self.values {
            Values::Start(_) => None,
            Values::Ids(_, ids) => Some(ids),
        }
    }

    /// The row of frequencies of the whole call, if that is how it is chosen.
    pub fn as_frequency_row(&self) -> Option<u32> {
        match self.rows {
            RowIds::Call(row) => Some(row),
            RowIds::None | RowIds::Ids(..) => None,
        }
    }

    /// The row indices, if there is not one for the whole call.
    pub fn frequency_row_ids(&self) -> Option<&Ids<M>> {
        match &self.rows {
            RowIds::None | RowIds::Call(_) => None,
            RowIds::Ids(_, rows) => Some(rows),
        }
    }

    /// The offsets of a ragged batch, if it is one.
    pub fn as_cu_seqlens(&self) -> Option<&Ids<M>> {
        self.cu_seqlens.as_ref()
    }

    /// The same in other memory.
    pub(crate) fn try_map<'a, M2, E>(
        &'a self,
        memory: impl FnMut(&'a M) -> Result<M2, E>,
    ) -> Result<PositionsIn<M2>, E> {
        let mut mapped = PositionsIn::start(0);
        self.try_map_to(&mut mapped, memory)?;
        Ok(mapped)
    }

    /// [`try_map`](Self::try_map) to where it is wanted: handed on in a result it would be copied as other
    /// words than it was written in, which processors wait for.
    #[inline(always)]
    pub(crate) fn try_map_to<'a, M2, E>(
        &'a self,
        to: &mut PositionsIn<M2>,
        mut memory: impl FnMut(&'a M) -> Result<M2, E>,
    ) -> Result<(), E> {
        to.values = match &self.values {
            Values::Start(start) => Values::Start(*start),
            Values::Ids(kind, ids) => Values::Ids(*kind, ids.try_map(&mut memory)?),
        };
        to.rows = match &self.rows {
            RowIds::None => RowIds::None,
            RowIds::Call(row) => RowIds::Call(*row),
            RowIds::Ids(kind, ids) => RowIds::Ids(*kind, ids.try_map(&mut memory)?),
        };
        to.cu_seqlens = match &self.cu_seqlens {
            None => None,
            Some(offsets) => Some(offsets.try_map(&mut memory)?),
        };
        Ok(())
    }
}
