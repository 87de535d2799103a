/// How a plan's positions are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PositionKind {
    /// One start for all rows: token `s` of every batch row is at `start + s`.
    #[default]
    Start,
    /// A start per batch row, `[batch]`: token `s` of row `b` is at `start[b] + s`.
    StartPerRow,
    /// A position per token, `[batch, sequence]`, contiguous.
    PerToken,
}

impl PositionKind {
    /// Positions a call must give, besides a start.
    pub(crate) fn expected_len(self, batch: usize, sequence: usize) -> usize {
        match self {
            PositionKind::Start => 0,
            PositionKind::StartPerRow => batch,
            PositionKind::PerToken => batch * sequence,
        }
    }
}

impl std::fmt::Display for PositionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PositionKind::Start => "one start",
            PositionKind::StartPerRow => "one start per batch row",
            PositionKind::PerToken => "one position per token",
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
    /// How many there are.
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

/// The positions of one call, in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions<'a> {
    /// See [`PositionKind::Start`].
    Start(i64),
    /// See [`PositionKind::StartPerRow`].
    StartPerRow(PositionIds<'a>),
    /// See [`PositionKind::PerToken`].
    PerToken(PositionIds<'a>),
}

impl<'a> Positions<'a> {
    /// One position per token, `[batch, sequence]`.
    pub fn per_token(ids: impl Into<PositionIds<'a>>) -> Self {
        Positions::PerToken(ids.into())
    }

    /// One start per batch row.
    pub fn start_per_row(starts: impl Into<PositionIds<'a>>) -> Self {
        Positions::StartPerRow(starts.into())
    }

    /// The kind of these positions.
    pub fn kind(&self) -> PositionKind {
        match self {
            Positions::Start(_) => PositionKind::Start,
            Positions::StartPerRow(_) => PositionKind::StartPerRow,
            Positions::PerToken(_) => PositionKind::PerToken,
        }
    }

    /// Values given, besides a start.
    pub(crate) fn len(&self) -> usize {
        match self {
            Positions::Start(_) => 0,
            Positions::StartPerRow(ids) | Positions::PerToken(ids) => ids.len(),
        }
    }

    /// The position of token `s` in batch row `b`, for indices inside the checked shape.
    pub(crate) fn at(&self, b: usize, s: usize, sequence: usize) -> i64 {
        match self {
            Positions::Start(start) => start.wrapping_add(s as i64),
            Positions::StartPerRow(starts) => starts.get(b).wrapping_add(s as i64),
            Positions::PerToken(ids) => ids.get(b * sequence + s),
        }
    }
}
