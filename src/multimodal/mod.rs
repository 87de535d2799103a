//! Position ids of images, video and sound, for models whose positions have several axes.
//!
//! A token of text has one position; a patch of an image has a row and a column, one of a video a
//! time as well. [`RopeIndex`] numbers a sequence of text, images and video as the language models do
//! (M-RoPE), [`vision_position_ids`] the patches that a vision tower sees. Both come as `[axes, batch,
//! tokens]` for [`Positions::per_axis`], and go with the [`Axes`](crate::config::Axes) of
//! [`config`](crate::config), which say which pairs turn with which axis.
//!
//! | model | positions | axes |
//! |---|---|---|
//! | Qwen2-VL, PaddleOCR-VL | [`RopeIndex::qwen2_vl`] | [`Axes::MropeSections`] |
//! | Qwen2.5-VL | [`RopeIndex::qwen2_5_vl`] | [`Axes::MropeSections`] |
//! | Qwen2.5-Omni | [`RopeIndex::qwen2_5_omni`] | [`Axes::MropeSections`] |
//! | Qwen3-Omni | [`RopeIndex::qwen3_omni`] | [`Axes::MropeInterleaved`] |
//! | Qwen3-VL, Qwen3.5 | [`RopeIndex::qwen3_vl`] | [`Axes::MropeInterleaved`] |
//! | GLM-4V, GLM-4.5V, GLM-4.6V, GLM-OCR | [`RopeIndex::glm4v`] | [`Axes::MropeSections`] |
//! | ERNIE 4.5 VL | [`RopeIndex::ernie4_5_vl`] | [`Axes::ErnieSections`] |
//! | vision towers of all of these | [`vision_position_ids`] | [`Axes::VisionHalves`] |
//! | those of Qwen2.5-VL and Qwen2.5-Omni, in windows | [`VisionWindows`] | [`Axes::VisionHalves`] |
//! | Pixtral's vision tower | [`vision_position_ids`], merging 1 | [`Axes::PixtralHalves`] |
//!
//! [`Axes::MropeSections`]: crate::config::Axes::MropeSections
//! [`Axes::MropeInterleaved`]: crate::config::Axes::MropeInterleaved
//! [`Axes::ErnieSections`]: crate::config::Axes::ErnieSections
//! [`Axes::VisionHalves`]: crate::config::Axes::VisionHalves
//! [`Axes::PixtralHalves`]: crate::config::Axes::PixtralHalves
//!
//! ```
//! use phasor::config::{Axes, RopeConfig};
//! use phasor::multimodal::{Grid, RopeIndex, Segment};
//! use phasor::{Dtype, Host, InOut, Layout, Positions, Problem};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A prompt to Qwen2-VL: text, an image of 8 by 12 patches that become 4 by 6 tokens, text.
//! let index = RopeIndex::qwen2_vl(2)?;
//! let prompt = [Segment::Text(15), Segment::Image(Grid::image(8, 12)), Segment::Text(9)];
//! let ids = index.position_ids(&prompt)?;
//! assert_eq!(ids.tokens(), 15 + 4 * 6 + 9);
//!
//! let config = RopeConfig::new(1_000_000.0, 128)?.with_axes(Axes::MropeSections([16, 24, 24]));
//! let rotator = Host::new().rotator(&config.rope()?);
//! let plan = rotator.plan(&Problem::new(Dtype::F32).q(Layout::tokens(ids.tokens(), 12, 128)))?;
//! let mut q = vec![1.0f32; ids.tokens() * 12 * 128];
//! rotator.rotate(&plan, Some(InOut::InPlace(&mut q[..])), None, ids.positions())?;
//!
//! // Decoding goes on: the next token is number 48 of the sequence, at position 30 on all axes.
//! let next = ids.position_of(0, 48);
//! assert_eq!(next, 15 + 6 + 9);
//! let plan = rotator.plan(&Problem::new(Dtype::F32).q(Layout::tokens(1, 12, 128)))?;
//! let mut q = vec![1.0f32; 12 * 128];
//! rotator.rotate(&plan, Some(InOut::InPlace(&mut q[..])), None, Positions::start(next))?;
//! # Ok(())
//! # }
//! ```

mod audio;
mod error;
mod rope_index;
mod vision;

pub use audio::{qwen2_5_omni_audio_tokens, qwen3_omni_audio_tokens};
pub use error::MultimodalError;
pub use rope_index::{Padding, PositionIds, Resume, RopeIndex, Segment, TokenType};
pub use vision::{VisionWindows, vision_position_ids};

#[cfg(doc)]
use crate::Positions;

/// The patches of an image or video: what processors call `grid_thw`, before any merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Frames, after those that one patch spans were taken together; 1 for an image.
    pub time: usize,
    /// Rows of patches.
    pub height: usize,
    /// Columns of patches.
    pub width: usize,
}

impl Grid {
    /// A video: `[time, height, width]`.
    pub const fn video(time: usize, height: usize, width: usize) -> Self {
        Self {
            time,
            height,
            width,
        }
    }

    /// An image: one frame.
    pub const fn image(height: usize, width: usize) -> Self {
        Self::video(1, height, width)
    }

    /// What is left where `merge` (time, side) patches become one token, `which` being its place
    /// among the images and videos of the call.
    fn merged(self, merge: [usize; 2], which: usize) -> Result<Self, MultimodalError> {
        let [time, side] = merge;
        let divides = |length: usize, by: usize| length > 0 && length.is_multiple_of(by);
        if divides(self.time, time) && divides(self.height, side) && divides(self.width, side) {
            return Ok(Self::video(
                self.time / time,
                self.height / side,
                self.width / side,
            ));
        }
        Err(MultimodalError::Grid {
            which,
            grid: self,
            temporal_merge_size: time,
            spatial_merge_size: side,
        })
    }

    /// Its cells; `None` past `usize`.
    fn cells(self) -> Option<usize> {
        self.time.checked_mul(self.height)?.checked_mul(self.width)
    }
}

/// More tokens than any call has. A number from a broken file must not take all memory.
const MOST_TOKENS: usize = 1 << 26;

/// Zeros for `axes` positions of each of `tokens` tokens, `None` of which is a number past `usize`.
fn zeros(axes: usize, tokens: Option<usize>) -> Result<Vec<i64>, MultimodalError> {
    let tokens = tokens.filter(|&tokens| tokens <= MOST_TOKENS);
    let tokens = tokens.ok_or(MultimodalError::TooManyTokens { most: MOST_TOKENS })?;
    let mut ids = Vec::new();
    ids.try_reserve_exact(axes * tokens)
        .map_err(|_| MultimodalError::OutOfMemory { tokens })?;
    ids.resize(axes * tokens, 0);
    Ok(ids)
}

fn check_merge(name: &'static str, value: usize) -> Result<(), MultimodalError> {
    if value == 0 {
        return Err(MultimodalError::MergeSize { name });
    }
    Ok(())
}
