use super::Frequencies;
use crate::Error;

/// Several rows of frequencies, of which each sequence or token of a call uses one.
///
/// For frequencies that change with the length of a sequence (LongRoPE, dynamic NTK): each row is a
/// set of steps with an attention factor of its own. One launch serves sequences of different rows,
/// and nothing is rebuilt when a sequence grows out of its row: it is given another index. Who says
/// which row is used:
///
/// * the call, with an index per sequence, per token or for all
///   ([`Positions::frequency_row`](crate::PositionsIn::frequency_row) and its kin);
/// * or each token's own position, with [`by_position`](Self::by_position).
///
/// ```
/// # fn main() -> Result<(), phasor::Error> {
/// use phasor::{Frequencies, FrequencyRows, Pairing, Positions, Rope};
///
/// // Row 0 for short sequences, row 1 for long ones.
/// let short = Frequencies::from_theta(10_000.0, 64)?;
/// let long = Frequencies::from_theta(40_000.0, 64)?;
/// let rope = Rope::new(FrequencyRows::new(&[short, long])?, Pairing::HalfSplit);
/// // In a batch of two sequences, at 100 and at 9,000.
/// let positions = Positions::start_per_sequence(&[100, 9_000]).frequency_rows_per_sequence(&[0, 1]);
/// # let _ = (rope, positions);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct FrequencyRows {
    /// `[rows, axes, pairs]`
    steps: Vec<u64>,
    attention_factors: Vec<f32>,
    axes: usize,
    lengths: Vec<u64>,
    boundary: Option<i64>,
}

impl FrequencyRows {
    /// Rows of equal numbers of pairs and axes.
    ///
    /// # Errors
    /// [`Error::FrequencyRows`] if there is no row, or rows differ in pairs or axes.
    pub fn new(rows: &[Frequencies]) -> Result<Self, Error> {
        let unlike = |what| Err(Error::FrequencyRows { what });
        let Some(first) = rows.first() else {
            return unlike("there is no row: give at least one");
        };
        if rows
            .iter()
            .any(|row| row.pairs() != first.pairs() || row.axes() != first.axes())
        {
            return unlike("rows differ in pairs or axes: give each the same");
        }
        if u32::try_from(rows.len()).is_err() {
            return unlike("there are more than 2^32 - 1 rows");
        }
        Ok(Self {
            steps: rows.iter().flat_map(Frequencies::steps).copied().collect(),
            attention_factors: rows.iter().map(Frequencies::attention_factor).collect(),
            axes: first.axes(),
            lengths: Vec::new(),
            boundary: None,
        })
    }

    /// Says which lengths of sequence each row serves, for [`row_for_length`](Self::row_for_length):
    /// row `r` those of up to `lengths[r]` tokens that no row before it serves.
    ///
    /// # Errors
    /// [`Error::FrequencyRows`] unless there is one length per row, in ascending order.
    pub fn with_lengths(mut self, lengths: &[u64]) -> Result<Self, Error> {
        if lengths.len() != self.rows() || !lengths.is_sorted_by(|a, b| a < b) {
            return Err(Error::FrequencyRows {
                what: "lengths must ascend, one per row",
            });
        }
        self.lengths = lengths.to_vec();
        Ok(self)
    }

    /// Lets each token's position choose: row 0 below `boundary`, row 1 from there on. (Modular MAX
    /// does this for LongRoPE; the models were trained with one row for a whole sequence.)
    ///
    /// # Errors
    /// [`Error::FrequencyRows`] unless there are two rows on one axis.
    pub fn by_position(mut self, boundary: i64) -> Result<Self, Error> {
        if self.rows() != 2 || self.axes != 1 {
            return Err(Error::FrequencyRows {
                what: "positions choose between two rows on one axis",
            });
        }
        self.boundary = Some(boundary);
        Ok(self)
    }

    /// The row for a sequence of `length` tokens, those in its cache included. For any rotation, with
    /// rows or without: [`Rope::row_for_length`](crate::Rope::row_for_length).
    ///
    /// # Errors
    /// [`Error::NoRowForLength`] if it is longer than the last of
    /// [`with_lengths`](Self::with_lengths), or none were given.
    pub fn row_for_length(&self, length: u64) -> Result<u32, Error> {
        let row = self.lengths.partition_point(|&longest| longest < length);
        if row == self.lengths.len() {
            return Err(Error::NoRowForLength {
                length,
                longest: self.lengths.last().copied(),
            });
        }
        Ok(row as u32)
    }

    /// How many there are.
    pub fn rows(&self) -> usize {
        self.attention_factors.len()
    }

    /// Pairs that rotate in each head: `rotary_dim / 2`.
    pub fn pairs(&self) -> usize {
        self.steps.len() / (self.rows() * self.axes)
    }

    /// Axes that a position has; 1 for text.
    pub fn axes(&self) -> usize {
        self.axes
    }

    /// One row.
    ///
    /// # Errors
    /// [`Error::FrequencyRowOutOfRange`] if there is no such row.
    pub fn row(&self, row: u32) -> Result<Frequencies, Error> {
        let index = row as usize;
        if index >= self.rows() {
            return Err(Error::FrequencyRowOutOfRange {
                row: i64::from(row),
                rows: self.rows(),
            });
        }
        Frequencies::from_axis_steps(self.row_steps(index).to_vec(), self.axes)?
            .with_attention_factor(self.attention_factors[index])
    }

    /// All steps, row-major `[rows, axes, pairs]`.
    pub fn steps(&self) -> &[u64] {
        &self.steps
    }

    /// One attention factor per row.
    pub fn attention_factors(&self) -> &[f32] {
        &self.attention_factors
    }

    /// The first position of row 1, where positions choose the row.
    pub fn boundary(&self) -> Option<i64> {
        self.boundary
    }

    /// The same rows with factors of 1.
    pub(crate) fn without_attention_factors(&self) -> Self {
        Self {
            attention_factors: vec![1.0; self.rows()],
            ..self.clone()
        }
    }

    /// Steps of a row, `[axes, pairs]`.
    pub(crate) fn row_steps(&self, row: usize) -> &[u64] {
        let len = self.axes * self.pairs();
        &self.steps[row * len..(row + 1) * len]
    }
}
