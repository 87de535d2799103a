use super::{Grid, MultimodalError, check_merge, zeros};

/// The row and column of each patch, in the order in which a vision tower sees them: `[2, patches]`,
/// rows first, for [`Positions::per_axis`](crate::Positions::per_axis) and
/// [`Axes::VisionHalves`](crate::config::Axes::VisionHalves) or
/// [`Axes::PixtralHalves`](crate::config::Axes::PixtralHalves).
///
/// The towers of Qwen2-VL to Qwen3.5, GLM-4V and ERNIE 4.5 VL are given the patches of each merged
/// token side by side: `spatial_merge_size` rows of `spatial_merge_size` patches. Those of Pixtral and
/// PaddleOCR-VL take them row by row, which is a `spatial_merge_size` of 1. Frames of a video repeat
/// the positions of an image, and images follow one another. Where a tower sorts its patches into
/// windows (Qwen2.5-VL), positions move with their patches: [`VisionWindows`] has them so.
///
/// These are those of `get_vision_position_ids` in Hugging Face transformers 5.23, which has them as
/// `[patches, 2]`.
///
/// ```
/// use phasor::multimodal::{Grid, vision_position_ids};
///
/// # fn main() -> Result<(), phasor::multimodal::MultimodalError> {
/// let image = Grid::image(2, 4);
/// let [rows, columns] = [[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 2, 3, 2, 3]];
/// assert_eq!(vision_position_ids(&[image], 2)?, [rows, columns].concat());
/// // Pixtral
/// let [rows, columns] = [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3]];
/// assert_eq!(vision_position_ids(&[image], 1)?, [rows, columns].concat());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`MultimodalError::MergeSize`] for a `spatial_merge_size` of 0; [`MultimodalError::Grid`] for a
/// grid that is empty or does not merge into whole tokens; [`MultimodalError::TooManyTokens`] for more
/// than 2^26 patches; [`MultimodalError::OutOfMemory`].
pub fn vision_position_ids(
    grids: &[Grid],
    spatial_merge_size: usize,
) -> Result<Vec<i64>, MultimodalError> {
    check_merge("spatial_merge_size", spatial_merge_size)?;
    let mut patches = Some(0usize);
    for (which, grid) in grids.iter().enumerate() {
        grid.merged([1, spatial_merge_size], which)?;
        patches = patches.and_then(|sum| sum.checked_add(grid.cells()?));
    }
    let mut ids = zeros(2, patches)?;
    let half = ids.len() / 2;
    let (rows, columns) = ids.split_at_mut(half);
    let mut cells = rows.iter_mut().zip(columns);
    for grid in grids {
        let (across, down) = (
            grid.width / spatial_merge_size,
            grid.height / spatial_merge_size,
        );
        let inside =
            || (0..spatial_merge_size).flat_map(|r| (0..spatial_merge_size).map(move |c| (r, c)));
        for _frame in 0..grid.time {
            for block in 0..down * across {
                let (top, left) = (block / across, block % across);
                for ((r, c), (row, column)) in inside().zip(&mut cells) {
                    *row = (top * spatial_merge_size + r) as i64;
                    *column = (left * spatial_merge_size + c) as i64;
                }
            }
        }
    }
    Ok(ids)
}

/// The order in which the vision towers of Qwen2.5-VL and Qwen2.5-Omni see an image: tokens are sorted
/// into square windows, and most layers attend within a window only. A token is `spatial_merge_size`
/// squared patches, which stay together.
///
/// This is `get_vision_window_index` of Hugging Face transformers 5.23 (`get_window_index` before).
///
/// ```
/// use phasor::multimodal::{Grid, VisionWindows};
///
/// # fn main() -> Result<(), phasor::multimodal::MultimodalError> {
/// // 2 rows of 3 tokens of 2 by 2 patches of 14 pixels, and windows of 2 by 2 tokens.
/// let windows = VisionWindows::new(&[Grid::image(4, 6)], 2, 56, 14)?;
/// assert_eq!(windows.token_order(), [0, 1, 3, 4, 2, 5]);
/// assert_eq!(windows.cu_seqlens(), [0, 16, 24]); // in patches
/// let rows = &windows.position_ids()[..24];
/// assert_eq!(rows[8..16], [2, 2, 3, 3, 2, 2, 3, 3]); // of tokens 3 and 4
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisionWindows {
    token_order: Vec<usize>,
    cu_seqlens: Vec<i32>,
    position_ids: Vec<i64>,
}

impl VisionWindows {
    /// Sorts the tokens of images and videos into windows of `window_size` pixels. All three sizes are
    /// keys of `vision_config`; a window has `window_size / spatial_merge_size / patch_size` tokens a
    /// side, rounded down. Windows at the right and lower edges hold what is left.
    ///
    /// # Errors
    /// Those of [`vision_position_ids`]; [`MultimodalError::Window`] for windows smaller than a token.
    pub fn new(
        grids: &[Grid],
        spatial_merge_size: usize,
        window_size: usize,
        patch_size: usize,
    ) -> Result<Self, MultimodalError> {
        let in_order = vision_position_ids(grids, spatial_merge_size)?;
        let side = (window_size / spatial_merge_size)
            .checked_div(patch_size)
            .filter(|&side| side > 0)
            .ok_or(MultimodalError::Window {
                window_size,
                patch_size,
                spatial_merge_size,
            })?;
        let patches = in_order.len() / 2;
        let unit = spatial_merge_size * spatial_merge_size;
        let mut token_order = Vec::with_capacity(patches / unit);
        let mut cu_seqlens = vec![0];
        for (which, &grid) in grids.iter().enumerate() {
            let tokens = grid.merged([1, spatial_merge_size], which)?;
            for _frame in 0..tokens.time {
                let first = token_order.len();
                for top in (0..tokens.height).step_by(side) {
                    for left in (0..tokens.width).step_by(side) {
                        let columns = left..tokens.width.min(left.saturating_add(side));
                        for row in top..tokens.height.min(top.saturating_add(side)) {
                            let start = first + row * tokens.width;
                            token_order.extend(columns.clone().map(|column| start + column));
                        }
                        // Patches are few enough for all of them to be counted in 32 bits.
                        cu_seqlens.push((token_order.len() * unit) as i32);
                    }
                }
            }
        }
        let (rows, columns) = in_order.split_at(patches);
        let mut position_ids = zeros(2, Some(patches))?;
        let (sorted_rows, sorted_columns) = position_ids.split_at_mut(patches);
        for (axis, sorted) in [(rows, sorted_rows), (columns, sorted_columns)] {
            for (place, &token) in sorted.chunks_exact_mut(unit).zip(&token_order) {
                place.copy_from_slice(&axis[token * unit..][..unit]);
            }
        }
        Ok(Self {
            token_order,
            cu_seqlens,
            position_ids,
        })
    }

    /// The number of each token in the order of the image, in the order of windows: `[tokens]`
    /// (transformers' `window_index`). Patches of a token, and the hidden states made of them, move
    /// with it.
    pub fn token_order(&self) -> &[usize] {
        &self.token_order
    }

    /// Where windows begin, in patches, and the number of all: `[windows + 1]` (transformers'
    /// `cu_window_seqlens`), for attention within windows.
    pub fn cu_seqlens(&self) -> &[i32] {
        &self.cu_seqlens
    }

    /// What [`vision_position_ids`] says, in the order of windows: `[2, patches]`.
    pub fn position_ids(&self) -> &[i64] {
        &self.position_ids
    }
}
