use std::ops::RangeInclusive;

use super::frequencies::check_rotary_dim;
use crate::Error;

/// What a position outside a table's rows does. The same on every backend; no choice lets a
/// position read outside the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OutOfRange {
    /// Nothing is rotated and the call fails with [`Error::PositionOutOfRange`]. Needs
    /// positions that the host can see; a plan for positions on a GPU is refused.
    #[default]
    Error,
    /// The nearest row is used: row 0 below, the last row above.
    Clamp,
    /// The token is left as it is (copied, out of place).
    PassThrough,
}

/// Rows of cos and sin, one row per position and one column per pair.
///
/// For bit parity with another system, or for frequencies that change with the position. The
/// values are used as they are; `cos² + sin² = 1` is not assumed. Made from arrays, or by
/// [`Frequencies::table`](crate::Frequencies::table).
///
/// ```
/// # fn main() -> Result<(), phasor::Error> {
/// use phasor::{CosSinTable, OutOfRange, Pairing, Rope};
///
/// // Positions 0 and 1 of two pairs; positions beyond them use the last row.
/// let cos = vec![1.0, 1.0, 0.5403023, 0.99995];
/// let sin = vec![0.0, 0.0, 0.84147096, 0.009999833];
/// let table = CosSinTable::new(cos, sin, 2)?.with_out_of_range(OutOfRange::Clamp);
/// let rope = Rope::new(table, Pairing::HalfSplit);
/// assert_eq!(rope.rotary_dim(), 4);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct CosSinTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
    out_of_range: OutOfRange,
    /// Smallest and largest of what [`magnitudes`](Self::magnitudes) says.
    magnitudes: (f32, f32),
}

impl CosSinTable {
    /// A table from two row-major arrays of shape `[rows, pairs]`, where `pairs` is
    /// `rotary_dim / 2`.
    ///
    /// # Errors
    /// [`Error::RotaryDim`] if `pairs` is zero; [`Error::TableShape`] if the arrays differ in
    /// length, are empty, or are no multiple of `pairs`; [`Error::TableTooLarge`] from 2^32 rows on.
    pub fn new(cos: Vec<f32>, sin: Vec<f32>, pairs: usize) -> Result<Self, Error> {
        check_shape(cos.len(), sin.len(), pairs)?;
        let mut magnitudes = (f32::INFINITY, 0.0f32);
        for (cos, sin) in cos.iter().zip(&sin) {
            let larger = match (cos.abs(), sin.abs()) {
                // What is no number has no bounds.
                (a, b) if a.is_nan() || b.is_nan() => {
                    magnitudes = (0.0, f32::INFINITY);
                    break;
                }
                (a, b) => a.max(b),
            };
            magnitudes = (magnitudes.0.min(larger), magnitudes.1.max(larger));
        }
        Ok(Self {
            cos,
            sin,
            pairs,
            out_of_range: OutOfRange::default(),
            magnitudes,
        })
    }

    /// Of all entries: where the larger of |cos| and |sin| lies.
    pub(crate) fn magnitudes(&self) -> RangeInclusive<f32> {
        self.magnitudes.0..=self.magnitudes.1
    }

    /// Sets what a position outside the table does.
    pub fn with_out_of_range(mut self, choice: OutOfRange) -> Self {
        self.out_of_range = choice;
        self
    }

    /// Rows: the positions `0..rows` are inside the table.
    pub fn rows(&self) -> usize {
        self.cos.len() / self.pairs
    }

    /// Columns: `rotary_dim / 2`.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// All cosines, row-major.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// All sines, row-major.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }

    /// What a position outside the table does.
    pub fn out_of_range(&self) -> OutOfRange {
        self.out_of_range
    }
}

/// Of arrays that are so long.
fn check_shape(cos: usize, sin: usize, pairs: usize) -> Result<(), Error> {
    check_rotary_dim(pairs.saturating_mul(2))?;
    if cos != sin || cos == 0 || !cos.is_multiple_of(pairs) {
        return Err(Error::TableShape { cos, sin, pairs });
    }
    let rows = cos / pairs;
    match u32::try_from(rows) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::TableTooLarge { rows, pairs }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fit_what_kernels_count_with() {
        let most = u32::MAX as usize;
        assert_eq!(check_shape(most, most, 1), Ok(()));
        // On 32 bits there are no longer arrays.
        let Some(rows) = most.checked_add(1) else {
            return;
        };
        let too_large = |pairs| Err(Error::TableTooLarge { rows, pairs });
        assert_eq!(check_shape(rows, rows, 1), too_large(1));
        assert_eq!(check_shape(rows * 3, rows * 3, 3), too_large(3));
        assert_eq!(check_shape(rows, rows, 2), Ok(()));
    }
}
