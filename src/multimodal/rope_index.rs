use super::{Grid, MultimodalError, check_merge, zeros};
use crate::Positions;

/// A part of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Segment {
    /// So many tokens of text, those that mark the beginning and end of images among them.
    Text(usize),
    /// An image.
    Image(Grid),
    /// A video; for models with timestamps ([`RopeIndex::qwen3_vl`], [`RopeIndex::glm4v`]) one frame
    /// of it.
    Video {
        /// Its patches.
        grid: Grid,
        /// Seconds from one entry of `grid.time` to the next: what processors return as
        /// `second_per_grid_ts`, that is `temporal_patch_size / fps`. Only Qwen2.5-VL reads it; 1
        /// where nothing is known.
        seconds_per_grid: f32,
    },
}

impl Segment {
    /// A video, for models that do not read its seconds.
    pub const fn video(grid: Grid) -> Self {
        Segment::Video {
            grid,
            seconds_per_grid: 1.0,
        }
    }
}

/// What a token stands for: the values of `mm_token_type_ids` in Hugging Face transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenType {
    /// 0
    Text,
    /// 1
    Image,
    /// 2
    Video,
}

/// Where the tokens after an image or video go on.
///
/// For images it makes no difference, nor for models with timestamps. It does after a video that has
/// more frames (or seconds) than rows and columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Resume {
    /// After the largest position of the image or video, on whichever axis. So it is described by
    /// Wang et al., "Qwen2-VL" (2024), and so do vLLM and transformers up to 4.57.
    #[default]
    AfterLargest,
    /// After as many positions as the larger of height and width has tokens, however long the video:
    /// transformers from 5.0 on. Text then goes over positions that frames of the video have, too.
    AfterSides,
}

/// Which end of the shorter sequences of a batch is filled up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Padding {
    /// The end, as in training.
    #[default]
    Right,
    /// The beginning, as where decoding follows.
    Left,
}

/// How a model numbers text, images and video: the `get_rope_index` of Hugging Face transformers.
///
/// A token of text is at the same position on all three axes, one after that of the token before. The
/// tokens of an image are at the position that text would go on from, plus frame, row and column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeIndex {
    spatial_merge_size: usize,
    temporal_merge_size: usize,
    tokens_per_second: Option<f32>,
    timestamps: bool,
    resume: Resume,
}

impl RopeIndex {
    /// Qwen2-VL and PaddleOCR-VL: a frame of a video is one position after the frame before.
    ///
    /// # Errors
    /// [`MultimodalError::MergeSize`] for a size of 0.
    pub fn qwen2_vl(spatial_merge_size: usize) -> Result<Self, MultimodalError> {
        check_merge("spatial_merge_size", spatial_merge_size)?;
        Ok(Self {
            spatial_merge_size,
            temporal_merge_size: 1,
            tokens_per_second: None,
            timestamps: false,
            resume: Resume::default(),
        })
    }

    /// Qwen2.5-VL: frame `t` of a video is `t * tokens_per_second * seconds_per_grid` positions after
    /// the first, without the fraction. The product is formed in f32, as transformers does.
    ///
    /// ```
    /// use phasor::multimodal::{Grid, RopeIndex, Segment};
    ///
    /// # fn main() -> Result<(), phasor::multimodal::MultimodalError> {
    /// // Three frames of one token, 1.5 seconds from each to the next.
    /// let video = Segment::Video { grid: Grid::video(3, 2, 2), seconds_per_grid: 1.5 };
    /// let ids = RopeIndex::qwen2_5_vl(2, 2.0)?.position_ids(&[video])?;
    /// assert_eq!(ids.ids()[..3], [0, 3, 6]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MultimodalError::MergeSize`] for a size of 0; [`MultimodalError::Seconds`] unless
    /// `tokens_per_second` is from 0 to 1e9.
    pub fn qwen2_5_vl(
        spatial_merge_size: usize,
        tokens_per_second: f32,
    ) -> Result<Self, MultimodalError> {
        check_seconds("tokens_per_second", tokens_per_second)?;
        Ok(Self {
            tokens_per_second: Some(tokens_per_second),
            ..Self::qwen2_vl(spatial_merge_size)?
        })
    }

    /// Qwen3-VL, Qwen3.5 and their relatives (Cosmos 3, Cohere Compass): each frame of a
    /// video stands by itself, after a timestamp that is text. So give each frame as a
    /// [`Segment::Video`] of one frame, and the tokens of its timestamp as text before it.
    ///
    /// # Errors
    /// [`MultimodalError::MergeSize`] for a size of 0.
    pub fn qwen3_vl(spatial_merge_size: usize) -> Result<Self, MultimodalError> {
        Ok(Self {
            timestamps: true,
            ..Self::qwen2_vl(spatial_merge_size)?
        })
    }

    /// GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR: as [`qwen3_vl`](Self::qwen3_vl).
    ///
    /// # Errors
    /// [`MultimodalError::MergeSize`] for a size of 0.
    pub fn glm4v(spatial_merge_size: usize) -> Result<Self, MultimodalError> {
        Self::qwen3_vl(spatial_merge_size)
    }

    /// ERNIE 4.5 VL: `temporal_merge_size` frames of a video become one. Positions are `[time, height,
    /// width]` here as well.
    ///
    /// # Errors
    /// [`MultimodalError::MergeSize`] for a size of 0.
    pub fn ernie4_5_vl(
        spatial_merge_size: usize,
        temporal_merge_size: usize,
    ) -> Result<Self, MultimodalError> {
        check_merge("temporal_merge_size", temporal_merge_size)?;
        Ok(Self {
            temporal_merge_size,
            ..Self::qwen2_vl(spatial_merge_size)?
        })
    }

    /// Sets where the tokens after an image or video go on.
    pub fn with_resume(mut self, resume: Resume) -> Self {
        self.resume = resume;
        self
    }

    /// The position ids of one sequence, `[3, tokens]`.
    ///
    /// # Errors
    /// [`MultimodalError::Grid`] for a grid that is empty or does not merge into whole tokens;
    /// [`MultimodalError::Frames`] for a video of several frames where they have timestamps;
    /// [`MultimodalError::Seconds`] unless seconds are from 0 to 1e9; [`MultimodalError::TooLong`] for a video over
    /// more than 2^36 positions;
    /// [`MultimodalError::TooManyTokens`] for more than 2^26 tokens; [`MultimodalError::OutOfMemory`].
    pub fn position_ids(&self, segments: &[Segment]) -> Result<PositionIds, MultimodalError> {
        self.position_ids_of_batch(&[segments], Padding::default())
    }

    /// The position ids of several sequences, `[3, batch, tokens]`: as many tokens as the longest of
    /// them has, the others filled up with zeros.
    ///
    /// # Errors
    /// Those of [`position_ids`](Self::position_ids), images and videos being counted over all
    /// sequences.
    pub fn position_ids_of_batch(
        &self,
        sequences: &[&[Segment]],
        padding: Padding,
    ) -> Result<PositionIds, MultimodalError> {
        let mut which = 0;
        let mut lengths = Vec::with_capacity(sequences.len());
        for segments in sequences {
            let mut length = 0usize;
            for &segment in *segments {
                let more = self.block(segment, &mut which)?.tokens();
                length = more
                    .and_then(|more| length.checked_add(more))
                    .unwrap_or(usize::MAX);
            }
            lengths.push(length);
        }
        let tokens = lengths.iter().copied().max().unwrap_or(0);
        let all = tokens.checked_mul(sequences.len());
        let mut ids = zeros(3, all)?;
        let mut deltas = Vec::with_capacity(sequences.len());
        let mut which = 0;
        let (time, rest) = ids.split_at_mut(tokens * sequences.len());
        let (height, width) = rest.split_at_mut(time.len());
        for (sequence, (segments, &length)) in sequences.iter().zip(&lengths).enumerate() {
            let first = sequence * tokens
                + match padding {
                    Padding::Right => 0,
                    Padding::Left => tokens - length,
                };
            let range = first..first + length;
            let axes = [
                &mut time[range.clone()],
                &mut height[range.clone()],
                &mut width[range],
            ];
            let end = self.number(segments, axes, &mut which)?;
            deltas.push(end - length as i64);
        }
        Ok(PositionIds {
            ids,
            tokens,
            deltas,
        })
    }

    /// The segments of a sequence from what a processor of transformers returns: the type of each
    /// token (`mm_token_type_ids`, without padding), `image_grid_thw`, and `video_grid_thw` with
    /// `second_per_grid_ts`. For models with timestamps a video's grid stands for as many frames as it
    /// has. Images that follow each other without text between are told apart by their grids.
    ///
    /// ```
    /// use phasor::multimodal::{Grid, RopeIndex, Segment, TokenType};
    ///
    /// # fn main() -> Result<(), phasor::multimodal::MultimodalError> {
    /// use TokenType::{Text, Video};
    /// let types = [Text, Text, Video, Text, Text, Text, Video, Text];
    /// let segments = RopeIndex::qwen3_vl(2)?.segments(&types, &[], &[(Grid::video(2, 2, 2), 1.0)])?;
    /// let frame = Segment::video(Grid::video(1, 2, 2));
    /// let expected = [Segment::Text(2), frame, Segment::Text(3), frame, Segment::Text(1)];
    /// assert_eq!(segments, expected);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MultimodalError::TokenTypes`] where there are more or fewer tokens of an image or video than
    /// its grid says; [`MultimodalError::LeftOver`] for grids without tokens; [`MultimodalError::Grid`]
    /// and [`MultimodalError::Seconds`] as with [`position_ids`](Self::position_ids).
    pub fn segments(
        &self,
        token_types: &[TokenType],
        images: &[Grid],
        videos: &[(Grid, f32)],
    ) -> Result<Vec<Segment>, MultimodalError> {
        let mut images = images.iter().copied();
        let mut videos = videos.iter().flat_map(|&(grid, seconds_per_grid)| {
            // An empty one stays one, to be refused.
            let (parts, time) = match self.timestamps {
                true => (grid.time.max(1), grid.time.min(1)),
                false => (1, grid.time),
            };
            let grid = Grid { time, ..grid };
            std::iter::repeat_n(
                Segment::Video {
                    grid,
                    seconds_per_grid,
                },
                parts,
            )
        });
        let (mut segments, mut which, mut start) = (Vec::new(), 0, 0);
        for run in token_types.chunk_by(|a, b| a == b) {
            let end = start + run.len();
            let token_type = run[0];
            while start < end {
                let segment = match token_type {
                    TokenType::Text => Some(Segment::Text(end - start)),
                    TokenType::Image => images.next().map(Segment::Image),
                    TokenType::Video => videos.next(),
                };
                let mismatch = |expected| MultimodalError::TokenTypes {
                    start,
                    end,
                    token_type,
                    expected,
                };
                let segment = segment.ok_or_else(|| mismatch("no grid is left for them".into()))?;
                let tokens = self.block(segment, &mut which)?.tokens();
                match tokens {
                    Some(tokens) if tokens <= end - start => start += tokens,
                    _ => {
                        let tokens = tokens.map_or("more".to_string(), |n| n.to_string());
                        return Err(mismatch(format!(
                            "the next grid stands for {tokens} tokens"
                        )));
                    }
                }
                segments.push(segment);
            }
        }
        let left = [
            (TokenType::Image, images.next().is_some()),
            (TokenType::Video, videos.next().is_some()),
        ];
        if let Some(&(token_type, _)) = left.iter().find(|(_, is_left)| *is_left) {
            return Err(MultimodalError::LeftOver { token_type });
        }
        Ok(segments)
    }

    /// What the tokens of a segment are, and the number of the next image or video.
    fn block(&self, segment: Segment, which: &mut usize) -> Result<Block, MultimodalError> {
        let (grid, merge, interval) = match segment {
            Segment::Text(tokens) => return Ok(Block::Text(tokens)),
            Segment::Image(grid) => (grid, 1, None),
            Segment::Video {
                grid,
                seconds_per_grid,
            } => {
                if self.timestamps && grid.time > 1 {
                    return Err(MultimodalError::Frames {
                        which: *which,
                        frames: grid.time,
                    });
                }
                check_seconds("seconds_per_grid", seconds_per_grid)?;
                let interval = self.tokens_per_second.map(|n| n * seconds_per_grid);
                (grid, self.temporal_merge_size, interval)
            }
        };
        let grid = grid.merged([merge, self.spatial_merge_size], *which)?;
        *which += 1;
        Ok(Block::Vision { grid, interval })
    }

    /// Writes the positions of a sequence, and returns one more than the largest.
    fn number(
        &self,
        segments: &[Segment],
        axes: [&mut [i64]; 3],
        which: &mut usize,
    ) -> Result<i64, MultimodalError> {
        let [time, height, width] = axes;
        let mut tokens = time.iter_mut().zip(height).zip(width);
        let (mut next, mut largest_end) = (0, 0);
        for &segment in segments {
            match self.block(segment, which)? {
                Block::Text(count) => {
                    for ((t, h), w) in tokens.by_ref().take(count) {
                        (*t, *h, *w) = (next, next, next);
                        next += 1;
                    }
                    largest_end = largest_end.max(next);
                }
                Block::Vision { grid, interval } => {
                    let frame_at = |frame: usize| match interval {
                        Some(interval) => (frame as f32 * interval) as i64,
                        None => frame as i64,
                    };
                    let sides = grid.height.max(grid.width) as i64;
                    let last = frame_at(grid.time - 1);
                    if last >= LONGEST {
                        return Err(MultimodalError::TooLong {
                            which: *which - 1,
                            most: LONGEST,
                        });
                    }
                    for frame in 0..grid.time {
                        let t_at = next + frame_at(frame);
                        for row in 0..grid.height {
                            let cells = tokens.by_ref().take(grid.width).enumerate();
                            for (column, ((t, h), w)) in cells {
                                *t = t_at;
                                *h = next + row as i64;
                                *w = next + column as i64;
                            }
                        }
                    }
                    let end = next + sides.max(last + 1);
                    largest_end = largest_end.max(end);
                    next = match self.resume {
                        Resume::AfterLargest => end,
                        Resume::AfterSides => next + sides,
                    };
                }
            }
        }
        Ok(largest_end)
    }
}

/// More positions than any video takes, and few enough for as many videos as a call has tokens to stay
/// far inside `i64`.
const LONGEST: i64 = 1 << 36;

/// A segment, merged.
enum Block {
    Text(usize),
    Vision { grid: Grid, interval: Option<f32> },
}

impl Block {
    /// `None` past `usize`.
    fn tokens(&self) -> Option<usize> {
        match self {
            Block::Text(tokens) => Some(*tokens),
            Block::Vision { grid, .. } => grid.cells(),
        }
    }
}

fn check_seconds(name: &'static str, value: f32) -> Result<(), MultimodalError> {
    if (0.0..=1e9).contains(&value) {
        return Ok(());
    }
    Err(MultimodalError::Seconds { name, value })
}

/// Position ids on three axes, and where decoding goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PositionIds {
    ids: Vec<i64>,
    tokens: usize,
    deltas: Vec<i64>,
}

impl PositionIds {
    /// `[3, batch, tokens]`: time, height, width.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// [`ids`](Self::ids) as the positions of a call.
    pub fn positions(&self) -> Positions<'_> {
        Positions::per_axis(&self.ids)
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.deltas.len()
    }

    /// Tokens of each sequence, padding included.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// For each sequence, one more than its largest position less the number of its tokens, padding
    /// left out: transformers' `mrope_position_deltas` or `rope_deltas` (up to 4.57 it counts padding).
    pub fn deltas(&self) -> &[i64] {
        &self.deltas
    }

    /// The position, on all axes, of a later token of text: number `token` of its sequence, counted
    /// from 0 and without padding. For the first that is decoded that is the number of tokens of its
    /// prompt. Such positions go into a call as those of text do, by
    /// [`Positions::start`] or [`Positions::start_per_sequence`].
    ///
    /// # Panics
    /// If `sequence` is not below [`batch`](Self::batch), as indexing does.
    pub fn position_of(&self, sequence: usize, token: usize) -> i64 {
        self.deltas[sequence].wrapping_add(token as i64)
    }
}
