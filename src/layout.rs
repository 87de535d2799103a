//! Where the elements of q and k are, and which layouts may be written.

use crate::Error;
use crate::error::TensorName;

/// Shape and strides of one tensor, `[batch, tokens, heads, head_dim]`, in elements.
///
/// The innermost dimension is contiguous; the others have any strides, so that
/// `[batch, tokens, heads, dim]`, `[batch, heads, tokens, dim]`, `[tokens, heads, dim]` and
/// windows of a packed qkv buffer are all just layouts. A layout says nothing about element type
/// or memory; a [`Plan`](crate::Plan) checks it.
///
/// ```
/// use phasor::Layout;
///
/// // A packed buffer of 8 query, 2 key and 2 value heads a token: q and k are windows of it.
/// let q = Layout::tokens(100, 8, 64).with_strides(0, 12 * 64, 64);
/// let k = Layout::tokens(100, 2, 64).with_strides(0, 12 * 64, 64).with_offset(8 * 64);
/// assert_eq!(Layout::packed_heads(1, 100, 12, 64, 0..8), q.with_strides(100 * 12 * 64, 12 * 64, 64));
/// # let _ = k;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) batch_stride: usize,
    pub(crate) token_stride: usize,
    pub(crate) head_stride: usize,
    pub(crate) offset: usize,
    pub(crate) rotary_offset: usize,
}

impl Layout {
    /// Contiguous `[batch, tokens, heads, head_dim]` (BSHD, BTHD).
    #[inline]
    pub const fn bshd(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> Self {
        let token = heads.saturating_mul(head_dim);
        Self {
            batch,
            tokens,
            heads,
            head_dim,
            batch_stride: tokens.saturating_mul(token),
            token_stride: token,
            head_stride: head_dim,
            offset: 0,
            rotary_offset: 0,
        }
    }

    /// Contiguous `[batch, heads, tokens, head_dim]` (BHSD, BHTD). The arguments keep the order
    /// batch, tokens, heads, head_dim.
    #[inline]
    pub const fn bhsd(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> Self {
        let head = tokens.saturating_mul(head_dim);
        Self {
            batch,
            tokens,
            heads,
            head_dim,
            batch_stride: heads.saturating_mul(head),
            token_stride: head_dim,
            head_stride: head,
            offset: 0,
            rotary_offset: 0,
        }
    }

    /// Contiguous `[tokens, heads, head_dim]`: one sequence.
    pub const fn tokens(tokens: usize, heads: usize, head_dim: usize) -> Self {
        Self::bshd(1, tokens, heads, head_dim)
    }

    /// The heads `range` of a contiguous `[batch, tokens, total_heads, head_dim]` buffer, such
    /// as q or k in packed qkv. An empty or backward range has no heads; one that ends past
    /// `total_heads` reaches into the next token, and past the end of the buffer.
    pub const fn packed_heads(
        batch: usize,
        tokens: usize,
        total_heads: usize,
        head_dim: usize,
        range: std::ops::Range<usize>,
    ) -> Self {
        let mut layout = Self::bshd(batch, tokens, total_heads, head_dim);
        layout.heads = range.end.saturating_sub(range.start);
        layout.offset = range.start.saturating_mul(head_dim);
        layout
    }

    /// Replaces the strides, in elements, over batch, tokens and heads.
    #[inline]
    pub const fn with_strides(mut self, batch: usize, token: usize, head: usize) -> Self {
        self.batch_stride = batch;
        self.token_stride = token;
        self.head_stride = head;
        self
    }

    /// Element of the buffer at which `[0, 0, 0, 0]` lies.
    #[inline]
    pub const fn with_offset(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }

    /// First rotated dim inside each head; even. 0 rotates a prefix (GPT-NeoX),
    /// `head_dim - rotary_dim` a suffix (MLA).
    #[inline]
    pub const fn with_rotary_offset(mut self, rotary_offset: usize) -> Self {
        self.rotary_offset = rotary_offset;
        self
    }

    /// `[batch, tokens, heads, head_dim]`.
    #[inline]
    pub const fn shape(&self) -> [usize; 4] {
        [self.batch, self.tokens, self.heads, self.head_dim]
    }

    /// Strides over batch, tokens and heads, in elements.
    pub const fn strides(&self) -> [usize; 3] {
        [self.batch_stride, self.token_stride, self.head_stride]
    }

    /// Element of the buffer at which `[0, 0, 0, 0]` lies.
    pub const fn offset(&self) -> usize {
        self.offset
    }

    /// First rotated dim inside each head.
    pub const fn rotary_offset(&self) -> usize {
        self.rotary_offset
    }

    /// Whether it has no elements.
    pub const fn is_empty(&self) -> bool {
        self.batch == 0 || self.tokens == 0 || self.heads == 0 || self.head_dim == 0
    }

    /// Elements a buffer must have; 0 for an empty layout, `None` past `usize`.
    pub fn required_len(&self) -> Option<usize> {
        if self.is_empty() {
            return Some(0);
        }
        let mut len = self.offset.checked_add(self.head_dim)?;
        for (count, stride) in self.dims() {
            len = len.checked_add((count - 1).checked_mul(stride)?)?;
        }
        Some(len)
    }

    /// The first tokens of the first sequences.
    pub(crate) const fn with_counts(mut self, batch: usize, tokens: usize) -> Self {
        self.batch = batch;
        self.tokens = tokens;
        self
    }

    /// All dims that rotate lie inside the head.
    pub(crate) fn check_rotary(&self, rotary_dim: usize, tensor: TensorName) -> Result<(), Error> {
        let fits = self
            .rotary_offset
            .checked_add(rotary_dim)
            .is_some_and(|end| end <= self.head_dim);
        if self.rotary_offset % 2 == 1 || !fits {
            return Err(Error::RotaryWindow {
                tensor,
                rotary_offset: self.rotary_offset,
                rotary_dim,
                head_dim: self.head_dim,
            });
        }
        Ok(())
    }

    fn dims(&self) -> [(usize, usize); 3] {
        [
            (self.batch, self.batch_stride),
            (self.tokens, self.token_stride),
            (self.heads, self.head_stride),
        ]
    }

    /// The elements of all heads' dims `first..first + run`.
    pub(crate) fn region(&self, first: usize, run: usize) -> Region {
        Region::new(self.offset + first, run, self.dims())
    }
}

/// A set of elements of one buffer: runs of contiguous elements, repeated over strided dims.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    base: usize,
    run: usize,
    /// (count, stride), largest stride first; counts of at least 2.
    dims: [(usize, usize); 4],
    rank: usize,
}

/// What can be said about two sets of elements, or about one set written twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overlap {
    Disjoint,
    Overlapping,
    /// Not decided: the layouts do not nest, or nest in each other in too many ways.
    Unknown,
}

impl Region {
    pub(crate) fn new<const N: usize>(
        base: usize,
        run: usize,
        mut dims: [(usize, usize); N],
    ) -> Self {
        const { assert!(N <= 4) };
        dims.sort_by_key(|&(_, stride)| std::cmp::Reverse(stride));
        let mut region = Self {
            base,
            run,
            dims: [(0, 0); 4],
            rank: 0,
        };
        // Dims that continue each other become one, so that the same set has the same form.
        for (count, stride) in dims.into_iter().filter(|&(count, _)| count > 1) {
            match region.dims[..region.rank].last_mut() {
                Some(outer) if Some(outer.1) == stride.checked_mul(count) => {
                    *outer = (outer.0.saturating_mul(count), stride);
                }
                _ => {
                    region.dims[region.rank] = (count, stride);
                    region.rank += 1;
                }
            }
        }
        if let Some(&(count, stride)) = region.dims().last()
            && stride == region.run
        {
            region.run *= count;
            region.rank -= 1;
        }
        region
    }

    fn dims(&self) -> &[(usize, usize)] {
        &self.dims[..self.rank]
    }

    /// Whether any element occurs twice. Exact where the dims nest: each stride at least the
    /// extent of everything inside it.
    pub(crate) fn self_overlap(&self) -> Overlap {
        if self.run == 0 {
            return Overlap::Disjoint;
        }
        if self.dims().iter().any(|&(_, stride)| stride < self.run) {
            return Overlap::Overlapping;
        }
        for inner in 0..self.rank {
            if self.dims[inner].1 < self.extent(inner + 1) {
                return Overlap::Unknown;
            }
        }
        Overlap::Disjoint
    }

    /// Elements from the first to the last of the part inside dim `from - 1`.
    fn extent(&self, from: usize) -> usize {
        self.dims()[from..]
            .iter()
            .map(|&(count, stride)| (count - 1) * stride)
            .sum::<usize>()
            + self.run
    }

    /// Whether two regions of one buffer share an element. Exact for regions that nest, as long as
    /// the budget lasts.
    pub(crate) fn overlap(&self, other: &Region) -> Overlap {
        if self.run == 0 || other.run == 0 {
            return Overlap::Disjoint;
        }
        let apart = other.base as i128 - self.base as i128;
        if self.out_of_reach(0, other, 0, apart) {
            return Overlap::Disjoint;
        }
        if self.self_overlap() != Overlap::Disjoint || other.self_overlap() != Overlap::Disjoint {
            return Overlap::Unknown;
        }
        // Enough for a million tokens of unlike strides, which takes some ten milliseconds; like
        // strides take a few steps.
        let mut budget = 1 << 21;
        self.overlap_inside(0, other, 0, apart, &mut budget)
    }

    fn out_of_reach(&self, from: usize, other: &Region, other_from: usize, apart: i128) -> bool {
        apart >= self.extent(from) as i128 || -apart >= other.extent(other_from) as i128
    }

    /// The same question for one window of each: `self` inside dim `a - 1`, `other` inside dim
    /// `b - 1`, whose first elements lie `apart`.
    fn overlap_inside(
        &self,
        a: usize,
        other: &Region,
        b: usize,
        apart: i128,
        budget: &mut u32,
    ) -> Overlap {
        if self.out_of_reach(a, other, b, apart) {
            return Overlap::Disjoint;
        }
        if *budget == 0 {
            return Overlap::Unknown;
        }
        *budget -= 1;
        let stride_of = |dims: &[(usize, usize)], i: usize| dims.get(i).map_or(0, |&(_, s)| s);
        let (stride_a, stride_b) = (stride_of(self.dims(), a), stride_of(other.dims(), b));
        let stride = stride_a.max(stride_b) as i128;
        if stride == 0 {
            return Overlap::Overlapping;
        }
        // Step into the larger stride, or into both where they are equal; only the difference of
        // the two indices matters then.
        let (mut lowest, mut highest) = (0, 0);
        let (mut next_a, mut next_b) = (a, b);
        if stride_a as i128 == stride {
            lowest = -(self.dims[a].0 as i128 - 1);
            next_a += 1;
        }
        if stride_b as i128 == stride {
            highest = other.dims[b].0 as i128 - 1;
            next_b += 1;
        }
        // Windows within reach: -extent_b < apart + index * stride < extent_a.
        let (extent_a, extent_b) = (self.extent(next_a) as i128, other.extent(next_b) as i128);
        let first = (-extent_b - apart).div_euclid(stride) + 1;
        let last = (extent_a - 1 - apart).div_euclid(stride);
        for index in first.max(lowest)..=last.min(highest) {
            match self.overlap_inside(next_a, other, next_b, apart + index * stride, budget) {
                Overlap::Disjoint => {}
                // Also where the budget is at its end.
                verdict => return verdict,
            }
        }
        Overlap::Disjoint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn elements(region: &Region) -> Vec<usize> {
        let mut starts = vec![region.base];
        for &(count, stride) in region.dims() {
            starts = starts
                .iter()
                .flat_map(|&at| (0..count).map(move |i| at + i * stride))
                .collect();
        }
        starts.iter().flat_map(|&at| at..at + region.run).collect()
    }

    fn regions() -> impl Strategy<Value = Region> {
        (
            0usize..40,
            1usize..5,
            prop::array::uniform3((1usize..4, 0usize..30)),
        )
            .prop_map(|(base, run, dims)| Region::new(base, run, dims))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// Whatever is decided agrees with listing every element.
        #[test]
        fn verdicts_agree_with_enumeration(a in regions(), b in regions()) {
            let (all_a, all_b) = (elements(&a), elements(&b));
            let (set_a, set_b): (HashSet<_>, HashSet<_>) =
                (all_a.iter().collect(), all_b.iter().collect());
            match a.self_overlap() {
                Overlap::Disjoint => prop_assert_eq!(set_a.len(), all_a.len()),
                Overlap::Overlapping => prop_assert!(set_a.len() < all_a.len()),
                Overlap::Unknown => {}
            }
            let nested = a.self_overlap() == Overlap::Disjoint
                && b.self_overlap() == Overlap::Disjoint;
            match a.overlap(&b) {
                Overlap::Disjoint => prop_assert!(set_a.is_disjoint(&set_b)),
                Overlap::Overlapping => prop_assert!(!set_a.is_disjoint(&set_b)),
                Overlap::Unknown => prop_assert!(!nested, "nested layouts are decided"),
            }
        }
    }

    #[test]
    fn heads_of_a_packed_buffer_are_disjoint() {
        let q = Layout::packed_heads(2, 1000, 12, 64, 0..8).region(0, 64);
        let k = Layout::packed_heads(2, 1000, 12, 64, 8..10).region(0, 64);
        let too_far = Layout::packed_heads(2, 1000, 12, 64, 7..10).region(0, 64);
        assert_eq!(q.overlap(&k), Overlap::Disjoint);
        assert_eq!(q.overlap(&too_far), Overlap::Overlapping);
        // Per-head packing, as GPT-NeoX stores it: q, k, v of one head side by side.
        let head = Layout::tokens(1000, 8, 64).with_strides(0, 8 * 192, 192);
        assert_eq!(
            head.region(0, 64)
                .overlap(&head.with_offset(64).region(0, 64)),
            Overlap::Disjoint
        );
        assert_eq!(
            head.region(0, 64)
                .overlap(&head.with_offset(63).region(0, 64)),
            Overlap::Overlapping
        );
    }

    #[test]
    fn dims_may_follow_each_other_without_a_gap() {
        // Two runs of 3 that are 5 apart take 8: the next two begin right there, or an element sooner.
        let region = |stride| Region::new(0, 3, [(4, stride), (2, 5), (1, 0)]);
        assert_eq!(region(8).self_overlap(), Overlap::Disjoint);
        assert_eq!(region(7).self_overlap(), Overlap::Unknown);
        let (within, some) = (
            Region::new(2, 0, [(1, 0); 3]),
            Region::new(0, 4, [(1, 0); 3]),
        );
        assert_eq!(within.overlap(&some), Overlap::Disjoint);
        assert_eq!(some.overlap(&within), Overlap::Disjoint);
    }

    #[test]
    fn layouts_tell_what_they_were_given() {
        let layout = Layout::bshd(2, 3, 4, 8)
            .with_offset(5)
            .with_rotary_offset(6);
        assert_eq!((layout.offset(), layout.rotary_offset()), (5, 6));
        assert_eq!(
            (layout.shape(), layout.strides()),
            ([2, 3, 4, 8], [96, 32, 8])
        );
    }

    #[test]
    fn a_search_has_an_end() {
        // Tokens of unlike strides that never meet: the one's begin at multiples of 12, the other's 6
        // further on.
        let pair = |count| {
            let dims = [(1, 0), (1, 0)];
            let of = |base, stride| {
                let region = Region::new(base, 4, [(count, stride), dims[0], dims[1]]);
                assert_eq!(region.self_overlap(), Overlap::Disjoint);
                region
            };
            (of(0, 36), of(6, 60))
        };
        // Enough is searched for a million tokens, as long as they are within reach.
        let (a, b) = pair(1_000_000);
        assert_eq!(a.overlap(&b), Overlap::Disjoint);
        assert_eq!(b.overlap(&a), Overlap::Disjoint);
        let last = Region::new(60 * 999_999 + 9, 1, [(1, 0); 3]);
        assert_eq!(b.overlap(&last), Overlap::Overlapping);
        // Not more than that, however many there are.
        for count in [1 << 40, 1 << 56] {
            let (a, b) = pair(count);
            assert_eq!(a.overlap(&b), Overlap::Unknown);
            assert_eq!(b.overlap(&a), Overlap::Unknown);
        }
    }

    #[test]
    fn required_len_counts_to_the_last_element() {
        assert_eq!(Layout::bshd(2, 3, 4, 8).required_len(), Some(192));
        assert_eq!(Layout::bhsd(2, 3, 4, 8).required_len(), Some(192));
        assert_eq!(
            Layout::packed_heads(1, 5, 12, 8, 8..10).required_len(),
            Some(4 * 96 + 80)
        );
        assert_eq!(Layout::bshd(0, 3, 4, 8).required_len(), Some(0));
        assert_eq!(Layout::bshd(usize::MAX, 3, 4, 8).required_len(), None);
    }
}
