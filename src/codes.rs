//! Caches that hold 8-bit codes in place of elements, and where the scales of these are.

use crate::Error;
use crate::cache::CacheLayout;
use crate::error::TensorName;
use crate::layout::Region;
use crate::quantize::{Codes, ScaleForm, ScaleRounding};
#[cfg(doc)]
use crate::{KvCacheLayout, Problem, quantize};

/// Strides of the scales that a call writes, `[pages, slots of a page, heads, groups of a head]`, counted in
/// scales: f32, or bytes of E8M0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScaleLayout {
    pub(crate) page: usize,
    pub(crate) slot: usize,
    pub(crate) head: usize,
    pub(crate) group: usize,
    pub(crate) offset: usize,
    pub(crate) inline: bool,
}

impl ScaleLayout {
    /// Contiguous `[pages, page_size, heads, groups]` in a buffer of their own. vLLM's scales per token
    /// and head have one group.
    pub const fn tokens_heads(page_size: usize, heads: usize, groups: usize) -> Self {
        let slot = heads.saturating_mul(groups);
        Self::strided(page_size.saturating_mul(slot), slot, groups, 1)
    }

    /// Contiguous `[pages, heads, page_size, groups]` in a buffer of their own.
    pub const fn heads_tokens(page_size: usize, heads: usize, groups: usize) -> Self {
        let head = page_size.saturating_mul(groups);
        Self::strided(heads.saturating_mul(head), groups, head, 1)
    }

    /// Any strides, in scales, over pages, slots, heads and groups.
    pub const fn strided(page: usize, slot: usize, head: usize, group: usize) -> Self {
        Self {
            page,
            slot,
            head,
            group,
            offset: 0,
            inline: false,
        }
    }

    /// Scale of the buffer at which `[0, 0, 0, 0]` lies.
    pub const fn with_offset(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }

    /// In the buffer of the cache, between its codes.
    pub const fn inline(mut self) -> Self {
        self.inline = true;
        self
    }

    /// Strides over pages, slots, heads and groups, in scales.
    pub const fn strides(&self) -> [usize; 4] {
        [self.page, self.slot, self.head, self.group]
    }

    /// Scale of the buffer at which `[0, 0, 0, 0]` lies.
    pub const fn offset(&self) -> usize {
        self.offset
    }

    /// Whether scales are in the buffer of the cache.
    pub const fn is_inline(&self) -> bool {
        self.inline
    }
}

/// How values become 8-bit codes where a call stores them. What codes and scales are is defined in
/// [`quantize`].
///
/// ```
/// use phasor::quantize::{Codes, ScaleForm, ScaleRounding};
/// use phasor::{ScaleLayout, StoredCodes};
///
/// // vLLM's fp8 cache, with a scale of the tensor or of each head that values are divided by; the call
/// // brings it.
/// let fixed = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
/// // Its int8 cache with a scale for each token and head, of 8 heads in pages of 16.
/// let dynamic = StoredCodes::dynamic(Codes::Int8, 1e-6, ScaleLayout::tokens_heads(16, 8, 1));
/// // Groups of 128 dims, scales that are powers of two, stored as their exponents.
/// let groups = StoredCodes::dynamic(Codes::E4m3, 1e-6, ScaleLayout::tokens_heads(16, 1, 4))
///     .groups_of(128)
///     .rounded(ScaleRounding::PowerOfTwoUp)
///     .e8m0();
/// # let _ = (fixed, dynamic, groups);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredCodes {
    pub(crate) codes: Codes,
    pub(crate) form: ScaleForm,
    pub(crate) dynamic: Option<DynamicScales>,
    pub(crate) round_first: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DynamicScales {
    pub(crate) floor: f32,
    pub(crate) rounding: ScaleRounding,
    /// Dims that share a scale; `None`: all of a head.
    pub(crate) group_dims: Option<usize>,
    pub(crate) e8m0: bool,
    pub(crate) layout: ScaleLayout,
}

impl DynamicScales {
    /// Bytes of a scale.
    pub(crate) const fn size(&self) -> usize {
        match self.e8m0 {
            true => 1,
            false => size_of::<f32>(),
        }
    }
}

impl StoredCodes {
    /// By scales that each call brings: one for all heads, or one for each. `form` says whether values are
    /// divided by them (vLLM), or multiplied by what is given, their inverse (FlashInfer).
    pub const fn given(codes: Codes, form: ScaleForm) -> Self {
        Self {
            codes,
            form,
            dynamic: None,
            round_first: false,
        }
    }

    /// By the scale of each token and head, which is written; `floor` is the least
    /// ([`quantize::Scale::Dynamic`]).
    pub const fn dynamic(codes: Codes, floor: f32, layout: ScaleLayout) -> Self {
        Self {
            codes,
            form: ScaleForm::Divide,
            dynamic: Some(DynamicScales {
                floor,
                rounding: ScaleRounding::None,
                group_dims: None,
                e8m0: false,
                layout,
            }),
            round_first: false,
        }
    }

    /// Multiplies by the inverse of a scale rather than to divide by it.
    pub const fn by_inverse(mut self) -> Self {
        self.form = ScaleForm::Multiply;
        self
    }

    /// A scale for each so many dims of a head, which divide it. Scales that are given are those of whole
    /// heads.
    pub const fn groups_of(mut self, dims: usize) -> Self {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.group_dims = Some(dims);
        }
        self
    }

    /// Rounds scales to powers of two. Scales that are given are as they are.
    pub const fn rounded(mut self, rounding: ScaleRounding) -> Self {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.rounding = rounding;
        }
        self
    }

    /// Stores scales, which are to be powers of two, as bytes of E8M0.
    pub const fn e8m0(mut self) -> Self {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.e8m0 = true;
        }
        self
    }

    /// Rounds values to the element type first, as systems do that store what another step wrote.
    pub const fn round_first(mut self) -> Self {
        self.round_first = true;
        self
    }

    /// What codes stand for.
    pub const fn codes(&self) -> Codes {
        self.codes
    }

    /// How scales are applied.
    pub const fn form(&self) -> ScaleForm {
        self.form
    }

    /// Where scales are written, unless they are given.
    pub fn scale_layout(&self) -> Option<ScaleLayout> {
        self.dynamic.map(|dynamic| dynamic.layout)
    }

    /// Whether scales are written as bytes of E8M0, rather than as f32.
    pub fn scales_are_e8m0(&self) -> bool {
        self.dynamic.is_some_and(|dynamic| dynamic.e8m0)
    }

    /// Dims that share a scale, of heads of so many.
    pub fn group_dims(&self, head_dim: usize) -> usize {
        self.dynamic
            .and_then(|dynamic| dynamic.group_dims)
            .unwrap_or(head_dim)
    }

    /// Where scales are written in a buffer for a cache, in units of `unit` bytes, which divide a scale.
    fn scale_region(&self, cache: &CacheLayout, unit: usize) -> Option<Region> {
        let dynamic = self.dynamic?;
        let units = dynamic.size() / unit;
        let at = dynamic.layout;
        let [pages, page_size, heads, head_dim] = cache.shape();
        let groups = head_dim / self.group_dims(head_dim).max(1);
        let extents = [
            (pages, at.page),
            (page_size, at.slot),
            (heads, at.head),
            (groups, at.group),
        ];
        Some(Region::new(
            at.offset * units,
            units,
            extents.map(|(count, stride)| (count, stride.saturating_mul(units))),
        ))
    }

    /// Bytes that the buffer of the scales for a cache must have, the cache's own where they are inline; 0
    /// where no scales are written, `None` past `usize`.
    pub fn scale_bytes(&self, cache: &CacheLayout) -> Option<usize> {
        let Some(dynamic) = self.dynamic.filter(|_| !cache.is_empty()) else {
            return Some(0);
        };
        let at = dynamic.layout;
        let [pages, page_size, heads, head_dim] = cache.shape();
        let groups = head_dim / self.group_dims(head_dim).max(1);
        let mut scales = at.offset.checked_add(1)?;
        for (count, stride) in [
            (pages, at.page),
            (page_size, at.slot),
            (heads, at.head),
            (groups, at.group),
        ] {
            scales = scales.checked_add(count.checked_sub(1)?.checked_mul(stride)?)?;
        }
        scales
            .checked_mul(dynamic.size())
            .filter(|&bytes| i64::try_from(bytes).is_ok())
    }

    /// Groups divide a head, E8M0 has powers of two, and scales reach no further than addresses do.
    pub(crate) fn check(&self, tensor: TensorName, cache: &CacheLayout) -> Result<(), Error> {
        let Some(dynamic) = self.dynamic else {
            return Ok(());
        };
        let [.., head_dim] = cache.shape();
        let group_dims = self.group_dims(head_dim);
        if head_dim > 0 && !head_dim.is_multiple_of(group_dims) {
            return Err(Error::CodeGroups {
                tensor,
                head_dim,
                group_dims,
            });
        }
        if dynamic.e8m0 && dynamic.rounding == ScaleRounding::None {
            return Err(Error::ScalesNotPowers { tensor });
        }
        if self.scale_bytes(cache).is_none() {
            return Err(Error::CacheTooLarge { tensor });
        }
        Ok(())
    }

    /// What is written in the scales' own buffer, in scales; or between the codes, in bytes.
    pub(crate) fn written_scales(&self, cache: &CacheLayout) -> Option<Region> {
        let dynamic = self.dynamic?;
        let unit = match dynamic.layout.inline {
            true => 1,
            false => dynamic.size(),
        };
        self.scale_region(cache, unit)
    }

    /// Whether scales have a buffer of their own, which a call brings.
    pub(crate) fn has_scale_buffer(&self) -> bool {
        self.dynamic.is_none_or(|dynamic| !dynamic.layout.inline)
    }
}
