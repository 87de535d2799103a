/// How a plan's positions are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PositionKind {
    /// One start for all rows: token `s` of every batch row is at `start + s`.
    #[default]
    Start,
    /// A start per batch row, `[batch]`: token `s` of row `b` is at `start[b] + s`.
    StartPerRow,
    /// A position per batch row, `[batch]`, that all tokens of the row share: what
    /// [`Rope::shift`](crate::Rope::shift) moves the keys of each sequence by.
    PerRow,
    /// A position per token, `[batch, sequence]`, contiguous.
    PerToken,
    /// A position per axis and token, `[axes, batch, sequence]`, contiguous. With the other kinds
    /// all axes of a token are at one position, as those of text are.
    PerAxis,
}

impl PositionKind {
    /// Positions a call must give, besides a start.
    pub(crate) fn expected_len(self, axes: usize, batch: usize, sequence: usize) -> usize {
        match self {
            PositionKind::Start => 0,
            PositionKind::StartPerRow | PositionKind::PerRow => batch,
            PositionKind::PerToken => batch.saturating_mul(sequence),
            // A plan without elements may have any shape.
            PositionKind::PerAxis => axes.saturating_mul(batch).saturating_mul(sequence),
        }
    }
}

impl std::fmt::Display for PositionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PositionKind::Start => "one start",
            PositionKind::StartPerRow => "one start per batch row",
            PositionKind::PerRow => "one position per batch row",
            PositionKind::PerToken => "one position per token",
            PositionKind::PerAxis => "one position per axis and token",
        })
    }
}

/// How a plan's rows of frequencies are chosen, where the rotation has
/// [`FrequencyRows`](crate::FrequencyRows).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FrequencyRowKind {
    /// Not by the call: there are no rows, or positions choose between them.
    #[default]
    None,
    /// One row for the whole call. (Hugging Face transformers does this, by the call's largest
    /// position.)
    Call,
    /// A row per batch row, `[batch]`: for sequences of differing lengths.
    PerSequence,
    /// A row per token, `[batch, sequence]`, contiguous: for sequences that are packed in one
    /// batch row.
    PerToken,
}

impl FrequencyRowKind {
    /// Indices a call must give, besides that of the whole call.
    pub(crate) fn expected_len(self, batch: usize, sequence: usize) -> usize {
        match self {
            FrequencyRowKind::None | FrequencyRowKind::Call => 0,
            FrequencyRowKind::PerSequence => batch,
            FrequencyRowKind::PerToken => batch.saturating_mul(sequence),
        }
    }
}

impl std::fmt::Display for FrequencyRowKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FrequencyRowKind::None => "no frequency row",
            FrequencyRowKind::Call => "one frequency row",
            FrequencyRowKind::PerSequence => "one frequency row per batch row",
            FrequencyRowKind::PerToken => "one frequency row per token",
        })
    }
}

/// Position values in host memory. They are signed 64-bit once read; arithmetic on them wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionIds<'a> {
    /// Signed 32-bit.
    I32(&'a [i32]),
    /// Signed 64-bit.
    I64(&'a [i64]),
    /// Unsigned 32-bit.
    U32(&'a [u32]),
}

impl PositionIds<'_> {
    /// How many values there are.
    pub fn len(&self) -> usize {
        match self {
            PositionIds::I32(ids) => ids.len(),
            PositionIds::I64(ids) => ids.len(),
            PositionIds::U32(ids) => ids.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn get(&self, index: usize) -> i64 {
        match self {
            PositionIds::I32(ids) => i64::from(ids[index]),
            PositionIds::I64(ids) => ids[index],
            PositionIds::U32(ids) => i64::from(ids[index]),
        }
    }
}

impl<'a> From<&'a [i32]> for PositionIds<'a> {
    fn from(ids: &'a [i32]) -> Self {
        PositionIds::I32(ids)
    }
}

impl<'a> From<&'a [i64]> for PositionIds<'a> {
    fn from(ids: &'a [i64]) -> Self {
        PositionIds::I64(ids)
    }
}

impl<'a> From<&'a [u32]> for PositionIds<'a> {
    fn from(ids: &'a [u32]) -> Self {
        PositionIds::U32(ids)
    }
}

impl<'a, T> From<&'a Vec<T>> for PositionIds<'a>
where
    PositionIds<'a>: From<&'a [T]>,
{
    fn from(ids: &'a Vec<T>) -> Self {
        ids[..].into()
    }
}

impl<'a, T, const N: usize> From<&'a [T; N]> for PositionIds<'a>
where
    PositionIds<'a>: From<&'a [T]>,
{
    fn from(ids: &'a [T; N]) -> Self {
        ids[..].into()
    }
}

/// Where the tokens of a call are: their positions and, where the rotation has
/// [`FrequencyRows`](crate::FrequencyRows) to choose from, their rows. `I` is where position values
/// are, `R` where row indices are: see [`Positions`] for host memory,
/// [`DevicePositions`](crate::DevicePositions), and `cuda::CudaPositions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PositionsIn<I, R> {
    values: Values<I>,
    rows: RowIds<R>,
}

/// The positions of one call, in host memory.
///
/// ```
/// use phasor::Positions;
///
/// let starts = [0i64, 40_000];
/// let positions = Positions::start_per_row(&starts).frequency_rows_per_sequence(&[0, 1]);
/// # let _ = positions;
/// ```
pub type Positions<'a> = PositionsIn<PositionIds<'a>, &'a [u32]>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values<I> {
    Start(i64),
    Ids(PositionKind, I),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RowIds<R> {
    None,
    Call(u32),
    Ids(FrequencyRowKind, R),
}

impl<I, R> PositionsIn<I, R> {
    const fn new(values: Values<I>) -> Self {
        Self {
            values,
            rows: RowIds::None,
        }
    }

    /// One start for all batch rows; see [`PositionKind::Start`].
    pub const fn start(start: i64) -> Self {
        Self::new(Values::Start(start))
    }

    /// One start per batch row; see [`PositionKind::StartPerRow`].
    pub fn start_per_row(starts: impl Into<I>) -> Self {
        Self::new(Values::Ids(PositionKind::StartPerRow, starts.into()))
    }

    /// One position per batch row, `[batch]`, for all its tokens; see [`PositionKind::PerRow`].
    pub fn per_row(ids: impl Into<I>) -> Self {
        Self::new(Values::Ids(PositionKind::PerRow, ids.into()))
    }

    /// One position per token, `[batch, sequence]`; see [`PositionKind::PerToken`].
    pub fn per_token(ids: impl Into<I>) -> Self {
        Self::new(Values::Ids(PositionKind::PerToken, ids.into()))
    }

    /// One position per axis and token, `[axes, batch, sequence]`; see [`PositionKind::PerAxis`].
    pub fn per_axis(ids: impl Into<I>) -> Self {
        Self::new(Values::Ids(PositionKind::PerAxis, ids.into()))
    }

    /// One row of frequencies for the whole call; see [`FrequencyRowKind::Call`].
    pub fn frequency_row(mut self, row: u32) -> Self {
        self.rows = RowIds::Call(row);
        self
    }

    /// A row of frequencies per batch row, `[batch]`; see [`FrequencyRowKind::PerSequence`].
    pub fn frequency_rows_per_sequence(mut self, rows: R) -> Self {
        self.rows = RowIds::Ids(FrequencyRowKind::PerSequence, rows);
        self
    }

    /// A row of frequencies per token, `[batch, sequence]`; see [`FrequencyRowKind::PerToken`].
    pub fn frequency_rows_per_token(mut self, rows: R) -> Self {
        self.rows = RowIds::Ids(FrequencyRowKind::PerToken, rows);
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
    pub fn ids(&self) -> Option<&I> {
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
    pub fn frequency_row_ids(&self) -> Option<&R> {
        match &self.rows {
            RowIds::None | RowIds::Call(_) => None,
            RowIds::Ids(_, rows) => Some(rows),
        }
    }

    /// The same in other memory.
    pub(crate) fn try_map<'a, I2, R2, E>(
        &'a self,
        ids: impl FnOnce(&'a I) -> Result<I2, E>,
        rows: impl FnOnce(&'a R) -> Result<R2, E>,
    ) -> Result<PositionsIn<I2, R2>, E> {
        Ok(PositionsIn {
            values: match &self.values {
                Values::Start(start) => Values::Start(*start),
                Values::Ids(kind, values) => Values::Ids(*kind, ids(values)?),
            },
            rows: match &self.rows {
                RowIds::None => RowIds::None,
                RowIds::Call(row) => RowIds::Call(*row),
                RowIds::Ids(kind, values) => RowIds::Ids(*kind, rows(values)?),
            },
        })
    }
}

impl Positions<'_> {
    /// The position of a token on an axis, for indices inside the checked shape.
    pub(crate) fn at(&self, axis: usize, token: Token) -> i64 {
        let Token { b, s, .. } = token;
        match &self.values {
            Values::Start(start) => start.wrapping_add(s as i64),
            Values::Ids(PositionKind::StartPerRow, starts) => starts.get(b).wrapping_add(s as i64),
            Values::Ids(PositionKind::PerRow, ids) => ids.get(b),
            Values::Ids(PositionKind::PerAxis, ids) => {
                ids.get(axis * token.batch * token.sequence + token.index())
            }
            Values::Ids(_, ids) => ids.get(token.index()),
        }
    }

    /// The row of frequencies of a token, for indices inside the checked shape.
    pub(crate) fn frequency_row_at(&self, token: Token) -> u32 {
        match self.rows {
            RowIds::None => 0,
            RowIds::Call(row) => row,
            RowIds::Ids(FrequencyRowKind::PerSequence, rows) => rows[token.b],
            RowIds::Ids(_, rows) => rows[token.index()],
        }
    }
}

/// One token of a call.
#[derive(Clone, Copy)]
pub(crate) struct Token {
    /// Batch row.
    pub(crate) b: usize,
    /// Index in the row.
    pub(crate) s: usize,
    pub(crate) batch: usize,
    pub(crate) sequence: usize,
}

impl Token {
    fn index(&self) -> usize {
        self.b * self.sequence + self.s
    }
}
