use super::{Grid, TokenType};

/// What is wrong with images and video, and what to change.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MultimodalError {
    /// A merge size is 0.
    #[error("{name} is 0: it must be at least 1, which merges nothing")]
    MergeSize {
        /// Which of them.
        name: &'static str,
    },
    /// A grid is empty, or its patches do not merge into whole tokens.
    #[error(
        "image or video {which} is [{}, {}, {}] (time, height, width): none may be 0, time must be a \
         multiple of {temporal_merge_size}, height and width of {spatial_merge_size} (the merge \
         sizes); give patches before merging, as grid_thw has them",
        grid.time, grid.height, grid.width
    )]
    Grid {
        /// Its place among the images and videos of the call.
        which: usize,
        /// As given.
        grid: Grid,
        /// Frames that become one token.
        temporal_merge_size: usize,
        /// Rows and columns that become one token.
        spatial_merge_size: usize,
    },
    /// The model sees a video frame by frame, with a timestamp in the text before each.
    #[error(
        "video {which} has {frames} frames: this model has a timestamp before each of them, so give \
         each frame as a segment of its own, with the text between"
    )]
    Frames {
        /// Its place among the images and videos of the call.
        which: usize,
        /// As given.
        frames: usize,
    },
    /// A duration or a rate is not usable.
    #[error("{name} is {value}: it must be at least 0 and at most 1e9")]
    Seconds {
        /// Which of them.
        name: &'static str,
        /// As given.
        value: f32,
    },
    /// No position passes in a chunk of a video with sound.
    #[error(
        "{seconds_per_chunk} seconds_per_chunk at {position_id_per_seconds} position_id_per_seconds are \
         less than one position: their product must be at least 1"
    )]
    Chunk {
        /// As given.
        position_id_per_seconds: f32,
        /// As given.
        seconds_per_chunk: f32,
    },
    /// A frame lies between two positions.
    #[error(
        "frame {frame} of video {which} is {time} positions after its first, and positions are whole \
         numbers: round seconds_per_grid to a multiple of 1 / position_id_per_seconds"
    )]
    Fraction {
        /// Its place among the images and videos of the call.
        which: usize,
        /// The first such frame.
        frame: usize,
        /// Where it is.
        time: f32,
    },
    /// The model has no videos with sound.
    #[error(
        "video {which} has sound, which only the Omni models number: use RopeIndex::qwen2_5_omni or \
         RopeIndex::qwen3_omni, or give it as Segment::Video"
    )]
    NoAudio {
        /// Its place among the images and videos of the call.
        which: usize,
    },
    /// A window of a vision tower is smaller than a token.
    #[error(
        "window_size is {window_size} pixels: it must hold at least one token, of {patch_size} pixels times \
         spatial_merge_size {spatial_merge_size}, neither of which may be 0"
    )]
    Window {
        /// As given.
        window_size: usize,
        /// As given.
        patch_size: usize,
        /// As given.
        spatial_merge_size: usize,
    },
    /// A video takes more positions than any has.
    #[error(
        "video {which} reaches over more than {most} positions: check its grid, seconds_per_grid and \
         tokens_per_second"
    )]
    TooLong {
        /// Its place among the images and videos of the call.
        which: usize,
        /// As many are allowed.
        most: i64,
    },
    /// There are more tokens than a call may have.
    #[error("there are more than {most} tokens in the call: check the grids and token counts")]
    TooManyTokens {
        /// As many are allowed, padding included.
        most: usize,
    },
    /// There is no memory for the position ids.
    #[error("there is no memory for the position ids of {tokens} tokens: give fewer in one call")]
    OutOfMemory {
        /// As many there are, padding included.
        tokens: usize,
    },
    /// Tokens and grids do not fit each other.
    #[error(
        "tokens {start}..{end} are of the type {token_type:?}, but {expected}: token types and grids \
         must be of one sequence"
    )]
    TokenTypes {
        /// The first of the tokens.
        start: usize,
        /// One past the last of them.
        end: usize,
        /// What they are.
        token_type: TokenType,
        /// What the grids say.
        expected: String,
    },
    /// Grids are left over.
    #[error(
        "there are more grids than tokens of the type {token_type:?}: token types and grids must be of \
         one sequence"
    )]
    LeftOver {
        /// What the grids are of; frames for videos with timestamps.
        token_type: TokenType,
    },
}
