use std::ops::Range;

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
        /// `second_per_grid_ts`, that is `temporal_patch_size / fps`. Qwen2.5-VL and the
        /// Omni models read it; 1 where nothing is known.
        seconds_per_grid: f32,
    },
    /// Sound, without the tokens that mark its beginning and end: they are numbered as text is.
    /// [`qwen2_5_omni_audio_tokens`](super::qwen2_5_omni_audio_tokens) and
    /// [`qwen3_omni_audio_tokens`](super::qwen3_omni_audio_tokens) say how many there are.
    Audio(usize),
    /// A video with its own sound, the tokens of both in the order of their times
    /// (`use_audio_in_video` in transformers); for [`RopeIndex::qwen2_5_omni`] and
    /// [`RopeIndex::qwen3_omni`]. The two tokens before that mark the beginning of video and sound
    /// belong to it, as do the two after.
    VideoWithAudio {
        /// The patches of the video.
        grid: Grid,
        /// As for [`Video`](Segment::Video).
        seconds_per_grid: f32,
        /// Tokens of the sound.
        audio_tokens: usize,
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
    times: Times,
    timestamps: bool,
    resume: Resume,
}

/// How far the frames of a video are apart.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Times {
    /// One position.
    Frames,
    /// By its seconds: `frame * (rate * seconds)`, in f32 and without the fraction.
    Rate(f32),
    /// By its seconds: `(frame * seconds) * rate`, in f32.
    Omni { rate: f32, mix: Mix },
}

/// In which order a video and its sound come.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mix {
    /// The video of so many positions, then their sound, and so on. A time loses its fraction, and
    /// marks of the video and of the sound share a position.
    Chunks(i64),
    /// Token by token, the sooner first. A time with a fraction is refused.
    ByTime,
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
            times: Times::Frames,
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
            times: Times::Rate(tokens_per_second),
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

    /// Qwen2.5-Omni's thinker: as [`qwen2_5_vl`](Self::qwen2_5_vl), with sound. A token of sound is
    /// numbered as one of text is. A video with its sound takes turns with it, `seconds_per_chunk` of
    /// each at a time. `position_id_per_seconds` and `seconds_per_chunk` are keys of `thinker_config`.
    ///
    /// What follows a video with sound goes on after its last chunk, be it of the video or of the
    /// sound, as it does in transformers: positions before may be larger.
    ///
    /// ```
    /// use phasor::multimodal::{Grid, RopeIndex, Segment, qwen2_5_omni_audio_tokens};
    ///
    /// # fn main() -> Result<(), phasor::multimodal::MultimodalError> {
    /// // Two seconds of one token each, 300 frames of the spectrogram.
    /// let clip = Segment::VideoWithAudio {
    ///     grid: Grid::video(2, 2, 2),
    ///     seconds_per_grid: 1.0,
    ///     audio_tokens: qwen2_5_omni_audio_tokens(300),
    /// };
    /// let ids = RopeIndex::qwen2_5_omni(2, 25.0, 2.0)?.position_ids(&[Segment::Text(3), clip])?;
    /// // Text, two marks at 3, frames at 4 and 29, sound from 4 to 53, its rest, two marks.
    /// assert_eq!(ids.ids()[..9], [0, 1, 2, 3, 3, 4, 29, 4, 5]);
    /// assert_eq!(ids.ids()[ids.tokens() - 3..ids.tokens()], [78, 79, 79]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MultimodalError::MergeSize`] for a size of 0; [`MultimodalError::Seconds`] unless both rates
    /// are from 0 to 1e9; [`MultimodalError::Chunk`] unless their product is at least 1.
    pub fn qwen2_5_omni(
        spatial_merge_size: usize,
        position_id_per_seconds: f32,
        seconds_per_chunk: f32,
    ) -> Result<Self, MultimodalError> {
        check_seconds("position_id_per_seconds", position_id_per_seconds)?;
        check_seconds("seconds_per_chunk", seconds_per_chunk)?;
        let positions = (f64::from(position_id_per_seconds) * f64::from(seconds_per_chunk)) as i64;
        if positions == 0 {
            return Err(MultimodalError::Chunk {
                position_id_per_seconds,
                seconds_per_chunk,
            });
        }
        Ok(Self {
            times: Times::Omni {
                rate: position_id_per_seconds,
                mix: Mix::Chunks(positions),
            },
            ..Self::qwen2_vl(spatial_merge_size)?
        })
    }

    /// Qwen3-Omni's thinker: tokens of a video and of its sound come in the order of their times, those
    /// of the video first where times are equal. `position_id_per_seconds` is a key of
    /// `thinker_config`.
    ///
    /// transformers gives this model positions in f32, with fractions where a frame does not fall on a
    /// whole one. Positions are whole numbers here, so such a video is an error: round
    /// `seconds_per_grid` to a multiple of `1 / position_id_per_seconds`.
    ///
    /// # Errors
    /// [`MultimodalError::MergeSize`] for a size of 0; [`MultimodalError::Seconds`] unless
    /// `position_id_per_seconds` is from 0 to 1e9.
    pub fn qwen3_omni(
        spatial_merge_size: usize,
        position_id_per_seconds: f32,
    ) -> Result<Self, MultimodalError> {
        check_seconds("position_id_per_seconds", position_id_per_seconds)?;
        Ok(Self {
            times: Times::Omni {
                rate: position_id_per_seconds,
                mix: Mix::ByTime,
            },
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
    /// [`MultimodalError::Seconds`] unless seconds are from 0 to 1e9; [`MultimodalError::TooLong`] for a
    /// video over more than 2^36 positions; [`MultimodalError::Fraction`] for a frame of Qwen3-Omni
    /// between two positions; [`MultimodalError::NoAudio`] for a video with sound in a model without;
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
    /// has. Images that follow each other without text between are told apart by their grids. Sound counts as
    /// text; a video with sound cannot be told from token types.
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
        let (grid, merge, seconds, sound) = match segment {
            Segment::Text(tokens) | Segment::Audio(tokens) => return Ok(Block::Text(tokens)),
            Segment::Image(grid) => (grid, 1, None, None),
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
                (grid, self.temporal_merge_size, Some(seconds_per_grid), None)
            }
            Segment::VideoWithAudio {
                grid,
                seconds_per_grid,
                audio_tokens,
            } => {
                let Times::Omni { mix, .. } = self.times else {
                    return Err(MultimodalError::NoAudio { which: *which });
                };
                (grid, 1, Some(seconds_per_grid), Some((mix, audio_tokens)))
            }
        };
        if let Some(seconds) = seconds {
            check_seconds("seconds_per_grid", seconds)?;
        }
        let grid = grid.merged([merge, self.spatial_merge_size], *which)?;
        let vision = Vision {
            grid,
            // An image is at one time.
            times: seconds.map_or(Times::Frames, |_| self.times),
            seconds: seconds.unwrap_or(1.0),
        };
        *which += 1;
        Ok(match sound {
            None => Block::Vision(vision),
            Some((mix, audio_tokens)) => Block::VisionWithAudio {
                vision,
                mix,
                audio_tokens,
            },
        })
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
        let mut largest = -1;
        // Writes one token after the other; returns the largest position of those of the call.
        let mut put = |positions: &mut dyn Iterator<Item = [i64; 3]>| {
            let mut largest_here = -1;
            for (at, ((t, h), w)) in positions.zip(&mut tokens) {
                [*t, *h, *w] = at;
                largest_here = at.into_iter().fold(largest_here, i64::max);
            }
            largest = largest.max(largest_here);
            largest_here
        };
        let mut next = 0;
        for &segment in segments {
            let block = self.block(segment, which)?;
            if let Block::Vision(vision) | Block::VisionWithAudio { vision, .. } = &block {
                vision.check(*which - 1)?;
            }
            match block {
                Block::Text(count) => {
                    put(&mut (next..).map(|at| [at; 3]).take(count));
                    next += count as i64;
                }
                Block::Vision(vision) => {
                    let end = put(&mut vision.tokens(0..vision.count(), next)) + 1;
                    next = match self.resume {
                        Resume::AfterLargest => end,
                        Resume::AfterSides => {
                            next + vision.grid.height.max(vision.grid.width) as i64
                        }
                    };
                }
                Block::VisionWithAudio {
                    vision,
                    mix,
                    audio_tokens,
                } => {
                    // The marks of video and sound: at one position, or one after the other.
                    let marks = |at: i64| match mix {
                        Mix::Chunks(_) => [[at; 3]; 2],
                        Mix::ByTime => [[at; 3], [at + 1; 3]],
                    };
                    let start = put(&mut marks(next).into_iter()) + 1;
                    let sound = |range: Range<usize>| range.map(|i| [start + i as i64; 3]);
                    let mut end = start;
                    match mix {
                        Mix::Chunks(length) => {
                            let mut of_video = Chunks::new(vision.count(), length);
                            let mut of_sound = Chunks::new(audio_tokens, length);
                            while of_video.is_left() || of_sound.is_left() {
                                if let Some(range) = of_video.next(|i| vision.time_of(i)) {
                                    end = put(&mut vision.tokens(range, start)) + 1;
                                }
                                if let Some(range) = of_sound.next(|i| i as i64) {
                                    end = put(&mut sound(range)) + 1;
                                }
                            }
                        }
                        Mix::ByTime => {
                            let (mut seen, mut heard) = (0, 0);
                            while seen < vision.count() && heard < audio_tokens {
                                if vision.time_of(seen) <= heard as i64 {
                                    put(&mut vision.tokens(seen..seen + 1, start));
                                    seen += 1;
                                } else {
                                    put(&mut sound(heard..heard + 1));
                                    heard += 1;
                                }
                            }
                            // One of them is at its end.
                            let rest = &mut vision.tokens(seen..vision.count(), start);
                            end = end.max(put(rest) + 1);
                            end = end.max(put(&mut sound(heard..audio_tokens)) + 1);
                        }
                    }
                    next = put(&mut marks(end).into_iter()) + 1;
                }
            }
        }
        Ok(largest + 1)
    }
}

/// More positions than any video takes, and few enough for as many videos as a call has tokens to stay
/// far inside `i64`.
const LONGEST: i64 = 1 << 36;

/// A segment, merged.
enum Block {
    Text(usize),
    Vision(Vision),
    VisionWithAudio {
        vision: Vision,
        mix: Mix,
        audio_tokens: usize,
    },
}

impl Block {
    /// `None` past `usize`.
    fn tokens(&self) -> Option<usize> {
        match self {
            Block::Text(tokens) => Some(*tokens),
            Block::Vision(vision) => vision.grid.cells(),
            Block::VisionWithAudio {
                vision,
                audio_tokens,
                ..
            } => {
                let marks = 4;
                let both = vision.grid.cells()?.checked_add(*audio_tokens)?;
                both.checked_add(marks)
            }
        }
    }
}

/// An image or a video, its grid merged.
#[derive(Clone, Copy)]
struct Vision {
    grid: Grid,
    times: Times,
    seconds: f32,
}

impl Vision {
    /// Tokens, once it is known that they are not too many.
    fn count(&self) -> usize {
        self.grid.cells().unwrap_or(usize::MAX)
    }

    /// Positions from the first frame to another, perhaps with a fraction.
    fn exact_time(&self, frame: usize) -> f32 {
        match self.times {
            Times::Frames => frame as f32,
            Times::Rate(rate) => frame as f32 * (rate * self.seconds),
            Times::Omni { rate, .. } => frame as f32 * self.seconds * rate,
        }
    }

    fn time(&self, frame: usize) -> i64 {
        match self.times {
            Times::Frames => frame as i64,
            _ => self.exact_time(frame) as i64,
        }
    }

    /// The time of a token.
    fn time_of(&self, token: usize) -> i64 {
        self.time(token / (self.grid.height * self.grid.width))
    }

    /// The positions of some of its tokens, if the first of all is at `first` on all axes.
    fn tokens(&self, range: Range<usize>, first: i64) -> impl Iterator<Item = [i64; 3]> {
        let vision = *self;
        range.map(move |token| {
            let (row, column) = (token / vision.grid.width, token % vision.grid.width);
            let row = row % vision.grid.height;
            [vision.time_of(token), row as i64, column as i64].map(|at| first + at)
        })
    }

    /// For a grid whose tokens are not too many.
    fn check(&self, which: usize) -> Result<(), MultimodalError> {
        if self.time(self.grid.time - 1) >= LONGEST {
            return Err(MultimodalError::TooLong {
                which,
                most: LONGEST,
            });
        }
        if let Times::Omni {
            mix: Mix::ByTime, ..
        } = self.times
        {
            for frame in 0..self.grid.time {
                let time = self.exact_time(frame);
                if time.fract() != 0.0 {
                    return Err(MultimodalError::Fraction { which, frame, time });
                }
            }
        }
        Ok(())
    }
}

/// Parts of so many positions each, of tokens whose times do not fall. As in transformers, a part
/// ends at the first token past its time, and only there: where times leap, the parts that would be
/// empty take a token each.
struct Chunks {
    tokens: usize,
    length: i64,
    start: usize,
    end_time: i64,
}

impl Chunks {
    fn new(tokens: usize, length: i64) -> Self {
        Self {
            tokens,
            length,
            start: 0,
            end_time: length,
        }
    }

    fn is_left(&self) -> bool {
        self.start < self.tokens
    }

    fn next(&mut self, time: impl Fn(usize) -> i64) -> Option<Range<usize>> {
        if !self.is_left() {
            return None;
        }
        let start = self.start;
        let mut later = start + 1..self.tokens;
        self.start = later
            .find(|&i| time(i) >= self.end_time)
            .unwrap_or(self.tokens);
        self.end_time = self.end_time.saturating_add(self.length);
        Some(start..self.start)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_counted_past_the_whole_numbers_of_f32() {
        let cell = Grid {
            time: 1,
            height: 2,
            width: 2,
        };
        let vision = Vision {
            grid: cell.merged([1, 2], 0).unwrap(),
            times: Times::Frames,
            seconds: 1.0,
        };
        for frame in [0, 1, (1 << 24) + 1, (1 << 40) + 1] {
            assert_eq!(vision.time(frame), frame as i64);
        }
    }
}
