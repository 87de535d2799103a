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
/// windows (Qwen2.5-VL), positions move with their patches.
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
