use super::rope_config::MAX_HEAD_DIM;
use super::{ConfigError, RopeConfig};
use crate::Frequencies;

/// How the pairs of a head are shared out among the axes of a position: time, height and width of
/// a video, row and column of an image.
///
/// An axis of a text token's position is its index, on all axes alike. Sections count pairs, not
/// dims. Any [`Scaling`](super::Scaling) goes with any of these: the frequencies are formed first,
/// then shared out.
///
/// ```
/// use phasor::config::{Axes, RopeConfig};
///
/// # fn main() -> Result<(), phasor::config::ConfigError> {
/// // Qwen2-VL: 16 pairs by time, 24 by height, 24 by width.
/// let config = RopeConfig::new(1_000_000.0, 128)?.with_axes(Axes::MropeSections([16, 24, 24]));
/// let frequencies = config.frequencies()?;
/// assert_eq!(frequencies.axes(), 3);
/// // Pair 16 is the first to turn with the height.
/// assert_eq!(
///     frequencies.cos_sin_at(16, &[7, 3, 5]),
///     config.without_axes().frequencies()?.cos_sin(16, 3),
/// );
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Axes {
    /// Qwen2-VL, Qwen2.5-VL, GLM-4V, PaddleOCR-VL: the first section's pairs turn with the time,
    /// the second's with the height, the third's with the width. Positions are `[time, height,
    /// width]`.
    ///
    /// ```
    /// # use phasor::config::Axes;
    /// assert_eq!(Axes::MropeSections([1, 1, 2]).axis_of_pair(8).unwrap(), [0, 1, 2, 2]);
    /// ```
    MropeSections([usize; 3]),
    /// Qwen3-VL, Qwen3.5: pairs turn with time, height, width in turn; an axis whose section is
    /// used up leaves its turn to the time. Positions are `[time, height, width]`.
    ///
    /// ```
    /// # use phasor::config::Axes;
    /// let axes = Axes::MropeInterleaved([3, 2, 1]);
    /// assert_eq!(axes.axis_of_pair(12).unwrap(), [0, 1, 2, 0, 1, 0]);
    /// ```
    MropeInterleaved([usize; 3]),
    /// ERNIE 4.5 VL, sections `[height, width, time]`: the first two take turns, then the time.
    /// Positions are `[time, height, width]`.
    ///
    /// ```
    /// # use phasor::config::Axes;
    /// assert_eq!(Axes::ErnieSections([1, 1, 2]).axis_of_pair(8).unwrap(), [1, 2, 0, 0]);
    /// ```
    ErnieSections([usize; 3]),
    /// The vision towers of Qwen2-VL to Qwen3.5 and of GLM-4V: the first half of the pairs turns
    /// with the row, the second with the column, each half with the frequencies
    /// `theta^(-2i / (rotary_dim / 2))`. Positions are `[row, column]`.
    ///
    /// ```
    /// # use phasor::config::Axes;
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let frequencies = Axes::VisionHalves.frequencies(10_000.0, 80)?;
    /// assert_eq!(frequencies.cos_sin_at(0, &[3, 9]), frequencies.cos_sin_at(20, &[9, 3]));
    /// # Ok(())
    /// # }
    /// ```
    VisionHalves,
    /// Pixtral: the first half of the pairs takes the frequencies of even index and turns with the
    /// row, the second takes those of odd index and turns with the column. Positions are `[row,
    /// column]`.
    ///
    /// ```
    /// # use phasor::config::Axes;
    /// # fn main() -> Result<(), phasor::config::ConfigError> {
    /// let frequencies = Axes::PixtralHalves.frequencies(10_000.0, 8)?;
    /// let plain = phasor::Frequencies::from_theta(10_000.0, 8)?;
    /// assert_eq!(frequencies.cos_sin_at(1, &[3, 9]), plain.cos_sin(2, 3));
    /// assert_eq!(frequencies.cos_sin_at(2, &[3, 9]), plain.cos_sin(1, 9));
    /// # Ok(())
    /// # }
    /// ```
    PixtralHalves,
    /// Video models such as Wan: so many dims (not pairs) of the head by time, height and width,
    /// each part with frequencies `theta^(-2i / its dims)` of its own. Positions are `[time,
    /// height, width]`. See [`Axes::wan`], which is held to diffusers.
    ///
    /// ```
    /// # use phasor::config::Axes;
    /// assert_eq!(Axes::wan(128), Axes::Video([44, 42, 42]));
    /// assert_eq!(Axes::Video([4, 2, 2]).axis_of_pair(8).unwrap(), [0, 0, 1, 2]);
    /// ```
    Video([usize; 3]),
    /// llama.cpp's `rope_multi`: four sections, whose pattern repeats where they hold fewer pairs
    /// than the head. Positions have four axes: time, height, width and one more.
    ///
    /// ```
    /// # use phasor::config::{Axes, GgmlMrope};
    /// let axes = Axes::Ggml { mode: GgmlMrope::Mrope, sections: [1, 1, 2, 0] };
    /// assert_eq!(axes.axis_of_pair(8).unwrap(), [0, 1, 2, 2]);
    /// ```
    Ggml {
        /// How the sections are used.
        mode: GgmlMrope,
        /// Pairs by time, height, width and the fourth axis.
        sections: [usize; 4],
    },
}

/// llama.cpp's modes of RoPE with several axes. All pair half-split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GgmlMrope {
    /// Mode 8: one section after the other (Qwen2-VL).
    Mrope,
    /// Mode 40: time, height and width take turns; what no section claims is the fourth axis'
    /// (Qwen3-VL).
    Imrope,
    /// Mode 24: as mode 8, and each section starts again at frequency 1, over half the head
    /// (vision towers).
    Vision,
}

/// Where the frequency of a pair comes from: entry `index` of `theta^(-2 index / dim)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PairSource {
    pub dim: usize,
    pub index: usize,
    pub axis: usize,
}

impl Axes {
    /// Wan's division of a head: a third each, in whole pairs, and what is left over to the time.
    pub fn wan(head_dim: usize) -> Self {
        let side = 2 * (head_dim / 6);
        Axes::Video([head_dim - 2 * side, side, side])
    }

    /// How many axes a position has.
    pub fn axes(&self) -> usize {
        match self {
            Axes::VisionHalves | Axes::PixtralHalves => 2,
            Axes::MropeSections(_)
            | Axes::MropeInterleaved(_)
            | Axes::ErnieSections(_)
            | Axes::Video(_) => 3,
            Axes::Ggml { .. } => 4,
        }
    }

    /// The axis that each pair of a head turns with.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] if `rotary_dim` and the sections do not fit each other, or `rotary_dim`
    /// is above 16,384.
    pub fn axis_of_pair(&self, rotary_dim: usize) -> Result<Vec<usize>, ConfigError> {
        if rotary_dim > MAX_HEAD_DIM {
            return Err(ConfigError::invalid(
                "rotary_dim",
                rotary_dim,
                format!("at most {MAX_HEAD_DIM}"),
            ));
        }
        Ok(self.sources(rotary_dim)?.iter().map(|s| s.axis).collect())
    }

    /// The frequencies of a head of which `rotary_dim` dims rotate, without any scaling.
    ///
    /// # Errors
    /// As [`RopeConfig::frequencies`].
    pub fn frequencies(self, theta: f64, rotary_dim: usize) -> Result<Frequencies, ConfigError> {
        RopeConfig::new(theta, rotary_dim)?
            .with_axes(self)
            .frequencies()
    }

    pub(super) fn sources(&self, rotary_dim: usize) -> Result<Vec<PairSource>, ConfigError> {
        let pairs = rotary_dim / 2;
        let whole = |axis_of: &dyn Fn(usize) -> usize| {
            let source = |index| PairSource {
                dim: rotary_dim,
                index,
                axis: axis_of(index),
            };
            (0..pairs).map(source).collect()
        };
        Ok(match *self {
            Axes::MropeSections(sections) => {
                check_sum("mrope_section", &sections, pairs)?;
                let [time, height, _] = sections;
                whole(&|pair| usize::from(pair >= time) + usize::from(pair >= time + height))
            }
            Axes::MropeInterleaved(sections) => {
                check_sum("mrope_section", &sections, pairs)?;
                whole(&|pair| match pair % 3 {
                    axis if pair / 3 < sections[axis] => axis,
                    _ => 0,
                })
            }
            Axes::ErnieSections(sections) => {
                check_sum("mrope_section", &sections, pairs)?;
                let [height, width, _] = sections;
                if height != width {
                    return Err(ConfigError::invalid(
                        "mrope_section",
                        format_args!("{sections:?}"),
                        "equal in its first two entries, which take turns",
                    ));
                }
                whole(&|pair| if pair < 2 * height { 1 + pair % 2 } else { 0 })
            }
            Axes::VisionHalves => {
                check_multiple_of_4(rotary_dim)?;
                let half = pairs / 2;
                let source = |pair| PairSource {
                    dim: rotary_dim / 2,
                    index: pair % half,
                    axis: pair / half,
                };
                (0..pairs).map(source).collect()
            }
            Axes::PixtralHalves => {
                check_multiple_of_4(rotary_dim)?;
                let half = pairs / 2;
                let source = |pair| PairSource {
                    dim: rotary_dim,
                    index: 2 * (pair % half) + pair / half,
                    axis: pair / half,
                };
                (0..pairs).map(source).collect()
            }
            Axes::Video(dims) => {
                if dims.iter().any(|dim| dim % 2 == 1) || sum(&dims) != Some(rotary_dim) {
                    return Err(ConfigError::invalid(
                        "dims of the axes",
                        format_args!("{dims:?}"),
                        format!("even, with the sum {rotary_dim} (rotary_dim)"),
                    ));
                }
                let part = |axis: usize| {
                    let dim = dims[axis];
                    (0..dim / 2).map(move |index| PairSource { dim, index, axis })
                };
                (0..3).flat_map(part).collect()
            }
            Axes::Ggml { mode, sections } => ggml_sources(mode, &sections, rotary_dim)?,
        })
    }
}

fn ggml_sources(
    mode: GgmlMrope,
    sections: &[usize; 4],
    rotary_dim: usize,
) -> Result<Vec<PairSource>, ConfigError> {
    let pairs = rotary_dim / 2;
    let period = sum(sections).filter(|&period| period > 0 && period <= MAX_SECTIONS);
    let Some(period) = period else {
        return Err(ConfigError::invalid(
            "dimension_sections",
            format_args!("{sections:?}"),
            format!("not all 0, with a sum of at most {MAX_SECTIONS}"),
        ));
    };
    let section_of = |sector: usize| {
        let mut start = 0;
        for (axis, &length) in sections.iter().enumerate() {
            if sector < start + length {
                return (axis, start);
            }
            start += length;
        }
        (3, start)
    };
    let source = |pair: usize| {
        let sector = pair % period;
        let (axis, start) = section_of(sector);
        match mode {
            GgmlMrope::Mrope => PairSource {
                dim: rotary_dim,
                index: pair,
                axis,
            },
            GgmlMrope::Imrope => {
                let turn = sector % 3;
                let claimed = sector / 3 < sections[turn];
                PairSource {
                    dim: rotary_dim,
                    index: pair,
                    axis: if claimed { turn } else { 3 },
                }
            }
            GgmlMrope::Vision => PairSource {
                dim: pairs,
                index: sector - start,
                axis,
            },
        }
    };
    Ok((0..pairs).map(source).collect())
}

/// More pairs than any head has; keeps sums of sections far from overflow.
const MAX_SECTIONS: usize = 1 << 20;

fn sum(sections: &[usize]) -> Option<usize> {
    sections
        .iter()
        .try_fold(0usize, |sum, &section| sum.checked_add(section))
}

fn check_sum(key: &str, sections: &[usize], pairs: usize) -> Result<(), ConfigError> {
    if sum(sections) == Some(pairs) {
        return Ok(());
    }
    Err(ConfigError::invalid(
        key,
        format_args!("{sections:?}"),
        format!("sections whose sum is the number of rotated pairs, {pairs}"),
    ))
}

fn check_multiple_of_4(rotary_dim: usize) -> Result<(), ConfigError> {
    if rotary_dim.is_multiple_of(4) {
        return Ok(());
    }
    Err(ConfigError::invalid(
        "rotary_dim",
        rotary_dim,
        "a multiple of 4, half for the row and half for the column",
    ))
}
