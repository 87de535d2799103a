//! Where angles come from: exact frequencies, rows of them, or a table of cos and sin.

mod double_double;
mod frequencies;
pub(crate) mod phase;
mod rows;
mod table;

pub(crate) use double_double::DoubleDouble;
pub use frequencies::Frequencies;
pub(crate) use frequencies::{MAX_ROTARY_DIM, look_exchanged};
pub use rows::FrequencyRows;
pub use table::{CosSinTable, OutOfRange};

/// An angle source.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Angles {
    /// Exact phases, `step * position mod 2^64`, at any position.
    Exact(Frequencies),
    /// The same, with a row of frequencies for each sequence or token.
    Rows(FrequencyRows),
    /// Rows of cos and sin that the caller gives.
    Table(CosSinTable),
}

impl Angles {
    /// Pairs that rotate in each head: `rotary_dim / 2`.
    pub fn pairs(&self) -> usize {
        match self {
            Angles::Exact(frequencies) => frequencies.pairs(),
            Angles::Rows(rows) => rows.pairs(),
            Angles::Table(table) => table.pairs(),
        }
    }

    /// Axes that a position has; 1 for text.
    pub fn axes(&self) -> usize {
        match self {
            Angles::Exact(frequencies) => frequencies.axes(),
            Angles::Rows(rows) => rows.axes(),
            Angles::Table(_) => 1,
        }
    }
}

impl From<Frequencies> for Angles {
    fn from(frequencies: Frequencies) -> Self {
        Angles::Exact(frequencies)
    }
}

impl From<CosSinTable> for Angles {
    fn from(table: CosSinTable) -> Self {
        Angles::Table(table)
    }
}

impl From<FrequencyRows> for Angles {
    fn from(rows: FrequencyRows) -> Self {
        Angles::Rows(rows)
    }
}
