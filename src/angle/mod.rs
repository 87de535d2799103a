//! Where angles come from: exact frequencies, or a table of cos and sin.

mod double_double;
mod frequencies;
pub(crate) mod phase;
mod table;

pub use frequencies::Frequencies;
pub use table::{CosSinTable, OutOfRange};

/// An angle source.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Angles {
    /// Exact phases, `step * position mod 2^64`, at any position.
    Exact(Frequencies),
    /// Rows of cos and sin that the caller gives.
    Table(CosSinTable),
}

impl Angles {
    /// Pairs that rotate in each head: `rotary_dim / 2`.
    pub fn pairs(&self) -> usize {
        match self {
            Angles::Exact(frequencies) => frequencies.pairs(),
            Angles::Table(table) => table.pairs(),
        }
    }

    /// The factor that multiplies cos and sin; 1 for a table, whose values already hold any.
    pub fn attention_factor(&self) -> f32 {
        match self {
            Angles::Exact(frequencies) => frequencies.attention_factor(),
            Angles::Table(_) => 1.0,
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
