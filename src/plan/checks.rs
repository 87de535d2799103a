//! What can be wrong with a problem.

use super::problem::{InOut, Problem, Sources};
use super::tensor::{PlannedTensor, Reach};
use crate::cache::{CacheLayout, KvCacheLayout};
use crate::codes::StoredCodes;
use crate::element::Dtype;
use crate::error::TensorName;
use crate::layout::{Layout, Overlap, Region};
use crate::{Angles, Direction, Error, OutOfRange, Rope};

/// Kernels count heads and dims in 32 bits, with room to step past the end.
const MAX_COUNT: usize = 1 << 28;
/// Blocks of a grid are counted in 31 bits, and one has a token at least.
const MAX_TOKENS: usize = (1 << 31) - 1;

pub(super) fn check_tensor(
    name: TensorName,
    operand: &InOut<Layout>,
    rotary_dim: usize,
    problem: &Problem,
) -> Result<PlannedTensor, Error> {
    let (source, destination, in_place) = match *operand {
        InOut::InPlace(layout) => (layout, layout, true),
        InOut::OutOfPlace {
            source,
            destination,
        } => (source, destination, false),
    };
    let (index, cache) = match name {
        TensorName::Q => (0, None),
        TensorName::K => (1, problem.cache.and_then(|cache| cache.k)),
        TensorName::V => (2, problem.cache.and_then(|cache| cache.v)),
    };
    let tensor = PlannedTensor {
        name,
        source,
        destination,
        in_place,
        nowhere: index > 0 && problem.only_cached[index - 1],
        cached: cache.is_some(),
        whole_heads: problem.stages[index].is_present(name != TensorName::V),
        reach: [Reach::of(&source), Reach::of(&destination)],
    };
    if source.shape() != destination.shape() {
        return Err(Error::ShapeMismatch {
            what: "source and destination must agree in shape",
            left: source.shape(),
            right: destination.shape(),
        });
    }
    if source.rotary_offset != destination.rotary_offset {
        return Err(Error::RotaryOffsetMismatch {
            tensor: name,
            source_offset: source.rotary_offset,
            destination_offset: destination.rotary_offset,
        });
    }
    if name != TensorName::V {
        source.check_rotary(rotary_dim, name)?;
    }
    for layout in [&source, &destination] {
        let bytes = layout
            .required_len()
            .and_then(|len| len.checked_mul(problem.dtype.size()));
        // A source may repeat elements, so its count is bounded apart from its length.
        let count = layout
            .shape()
            .iter()
            .try_fold(2 * problem.dtype.size(), |n, &dim| n.checked_mul(dim));
        let fits = |n: Option<usize>| n.is_some_and(|n| i64::try_from(n).is_ok());
        let tokens = layout.batch.checked_mul(layout.tokens);
        if !fits(bytes)
            || !fits(count)
            || layout.heads >= MAX_COUNT
            || layout.head_dim >= MAX_COUNT
            || !layout.is_empty() && tokens.is_none_or(|tokens| tokens > MAX_TOKENS)
        {
            return Err(Error::LayoutTooLarge { tensor: name });
        }
    }
    if source.is_empty() {
        return Ok(tensor);
    }
    let (written, read) = tensor.labels();
    let verdict = tensor.written(rotary_dim).self_overlap();
    match verdict {
        Overlap::Overlapping => return Err(Error::SelfOverlap { tensor: name }),
        Overlap::Unknown if !problem.assume_disjoint => {
            return Err(Error::OverlapUnknown { what: written });
        }
        _ => {}
    }
    if problem.sources == Sources::OneBuffer && !in_place {
        refuse_overlap(
            (written, &tensor.written(rotary_dim)),
            (read, &tensor.read(rotary_dim)),
            problem.assume_disjoint,
        )?;
    }
    Ok(tensor)
}

/// Two tensors of a problem agree in what they share, and are apart in one buffer.
pub(super) fn check_pair(
    a: &PlannedTensor,
    b: &PlannedTensor,
    rotary_dim: usize,
    problem: &Problem,
) -> Result<(), Error> {
    let (left, right) = (a.source.shape(), b.source.shape());
    if left[..2] != right[..2] {
        return Err(Error::ShapeMismatch {
            what: match (a.name, b.name) {
                (TensorName::Q, TensorName::K) => "q and k must agree in batch and tokens",
                (TensorName::Q, _) => "q and v must agree in batch and tokens",
                _ => "k and v must agree in batch and tokens",
            },
            left,
            right,
        });
    }
    if problem.sources == Sources::Apart {
        return Ok(());
    }
    check_apart(a, b, rotary_dim, problem)?;
    check_apart(b, a, rotary_dim, problem)
}

/// Stages fit the streams that they are for.
pub(super) fn check_stages(
    rope: &Rope,
    problem: &Problem,
    tensors: [&Option<PlannedTensor>; 3],
) -> Result<(), Error> {
    for (tensor, stages) in tensors.into_iter().zip(&problem.stages) {
        let Some(tensor) = tensor else { continue };
        let [.., head_dim] = tensor.source.shape();
        let wrong = |what| {
            Err(Error::Stages {
                tensor: tensor.name,
                what,
            })
        };
        if stages.norm.is_some() && !head_dim.is_multiple_of(2) {
            return wrong("a norm needs an even head_dim");
        }
        if stages.norm.is_some_and(|norm| norm.round_after) && stages.norm_after_rotation {
            // Nothing but a scale follows, and that one is not rounded to.
            return wrong(
                "round_after is for a norm before the rotation: one after it is the last to write",
            );
        }
        let more = stages.bias || stages.norm.is_some();
        if rope.direction() == Direction::Inverse && more && tensor.name != TensorName::V {
            return wrong(
                "the way back is that of the rotation alone: gradients of a bias or a norm are not \
                 formed, so plan it without",
            );
        }
        if !stages.rotates
            && tensor.name != TensorName::V
            && rope.pairing() != rope.output_pairing()
        {
            return wrong("without a rotation there is no output pairing: plan a plain Rope");
        }
    }
    if let (Some(codes), Some(q)) = (&problem.q_codes, tensors[0]) {
        let wrong = |what| {
            Err(Error::Stages {
                tensor: TensorName::Q,
                what,
            })
        };
        if q.in_place {
            return wrong("codes are written elsewhere than in place: plan (source, destination)");
        }
        if codes.dynamic.is_some() {
            return wrong("scales of codes that no cache holds are given: use StoredCodes::given");
        }
        if problem.sources == Sources::OneBuffer {
            return wrong("codes have a buffer of their own: plan with Problem::packed");
        }
    }
    Ok(())
}

/// Keys and values fit their caches, and these each other.
pub(super) fn check_cache(
    problem: &Problem,
    [k, v]: [&Option<PlannedTensor>; 2],
) -> Result<(), Error> {
    let cache = problem.cache.as_ref();
    for (name, tensor, layout) in [
        (TensorName::K, k, cache.and_then(|cache| cache.k)),
        (TensorName::V, v, cache.and_then(|cache| cache.v)),
    ] {
        let missing = |what| Err(Error::CacheMissing { tensor: name, what });
        match (tensor, layout) {
            (None, Some(_)) => return missing("it has a cache, and no layout to be read from"),
            (Some(tensor), None) if tensor.nowhere => {
                return missing(
                    "it is to be written to its cache, and has none: use Problem::cache",
                );
            }
            (Some(tensor), Some(layout)) => check_cache_of(tensor, &layout, problem)?,
            (_, None) => {}
        }
    }
    if let Some((k, v)) = cache.and_then(|cache| cache.k.zip(cache.v)) {
        let agree = |what, left, right| match left == right {
            true => Ok(()),
            false => Err(Error::CacheMismatch {
                tensor: TensorName::V,
                what,
                left,
                right,
            }),
        };
        agree("k's and v's must agree in pages", k.pages, v.pages)?;
        agree(
            "k's and v's must agree in page_size",
            k.page_size,
            v.page_size,
        )?;
    }
    match cache {
        Some(cache) => check_apart_in_cache(cache, problem),
        None => Ok(()),
    }
}

/// What is written of one buffer of caches is written once: codes, scales between them, and the other cache.
fn check_apart_in_cache(cache: &KvCacheLayout, problem: &Problem) -> Result<(), Error> {
    let sizes = cache.element_sizes(problem.dtype);
    let labels = [("k's cache", "k's scales"), ("v's cache", "v's scales")];
    let mut written: Vec<(usize, &'static str, Region)> = Vec::new();
    for (at, (_, layout)) in cache.parts().into_iter().enumerate() {
        let Some(layout) = layout.filter(|layout| !layout.is_empty()) else {
            continue;
        };
        let buffer = match cache.one_buffer {
            true => 0,
            false => at,
        };
        written.push((buffer, labels[at].0, layout.region(sizes[at])));
        let Some(codes) = &cache.codes[at] else {
            continue;
        };
        if let Some(scales) = codes.written_scales(layout) {
            match scales.self_overlap() {
                Overlap::Overlapping => {
                    return Err(Error::SelfOverlap {
                        tensor: [TensorName::K, TensorName::V][at],
                    });
                }
                Overlap::Unknown if !problem.assume_disjoint => {
                    return Err(Error::OverlapUnknown { what: labels[at].1 });
                }
                _ => {}
            }
            if !codes.has_scale_buffer() {
                written.push((buffer, labels[at].1, scales));
            }
        }
    }
    for (at, (buffer, first, a)) in written.iter().enumerate() {
        for (other, second, b) in &written[at + 1..] {
            if buffer == other {
                refuse_overlap((first, a), (second, b), problem.assume_disjoint)?;
            }
        }
    }
    Ok(())
}

fn check_cache_of(
    tensor: &PlannedTensor,
    layout: &CacheLayout,
    problem: &Problem,
) -> Result<(), Error> {
    let [.., heads, head_dim] = tensor.source.shape();
    for (what, left, right) in [
        ("heads must be those of the tensor", heads, layout.heads),
        (
            "head_dim must be that of the tensor",
            head_dim,
            layout.head_dim,
        ),
    ] {
        if left != right {
            return Err(Error::CacheMismatch {
                tensor: tensor.name,
                what,
                left,
                right,
            });
        }
    }
    let at = usize::from(tensor.name == TensorName::V);
    let cache = problem.cache.as_ref();
    let size = cache.map_or(1, |cache| cache.element_sizes(problem.dtype)[at]);
    let codes = cache.and_then(|cache| cache.codes[at]);
    check_cache_layout(tensor.name, layout, size, codes, problem.assume_disjoint)
}

/// A cache is a layout that can be written, of heads that its codes fit.
fn check_cache_layout(
    tensor: TensorName,
    layout: &CacheLayout,
    size: usize,
    codes: Option<StoredCodes>,
    assume_disjoint: bool,
) -> Result<(), Error> {
    layout.check(tensor, size)?;
    if let Some(codes) = codes {
        codes.check(tensor, layout)?;
    }
    if layout.is_empty() {
        return Ok(());
    }
    match layout.region(1).self_overlap() {
        Overlap::Overlapping => Err(Error::SelfOverlap { tensor }),
        Overlap::Unknown if !assume_disjoint => Err(Error::OverlapUnknown {
            what: match tensor {
                TensorName::V => "v's cache",
                _ => "k's cache",
            },
        }),
        _ => Ok(()),
    }
}

/// Elements that a cache's buffer must have: bytes of codes, and of scales between them. `None` past
/// `usize`.
pub(crate) fn cache_len(layout: &CacheLayout, codes: Option<&StoredCodes>) -> Option<usize> {
    let scales = match codes {
        Some(codes) if !codes.has_scale_buffer() => codes.scale_bytes(layout)?,
        _ => 0,
    };
    Some(layout.required_len()?.max(scales))
}

/// The keys of a cache can be written where they are.
pub(crate) fn check_keys(cache: &KvCacheLayout, dtype: Dtype) -> Result<(), Error> {
    if let Some(layout) = &cache.k {
        let [size, _] = cache.element_sizes(dtype);
        check_cache_layout(TensorName::K, layout, size, cache.codes[0], false)?;
    }
    let keys = KvCacheLayout { v: None, ..*cache };
    check_apart_in_cache(&keys, &Problem::new(dtype))
}

/// Each pair has one place to be read from and another to be written to.
pub(super) fn check_output_pairing(
    angles: &Angles,
    tensors: [&Option<PlannedTensor>; 2],
) -> Result<(), Error> {
    let in_place = |tensor: &&PlannedTensor| tensor.in_place && !tensor.nowhere;
    if let Some(tensor) = tensors.into_iter().flatten().find(in_place) {
        return Err(Error::OutputPairingInPlace {
            tensor: tensor.name,
        });
    }
    match angles {
        Angles::Table(table) if table.out_of_range() == OutOfRange::PassThrough => {
            Err(Error::OutputPairingPassThrough)
        }
        _ => Ok(()),
    }
}

/// What `written` writes is neither read nor written by `other`.
fn check_apart(
    written: &PlannedTensor,
    other: &PlannedTensor,
    rotary_dim: usize,
    problem: &Problem,
) -> Result<(), Error> {
    let assume_disjoint = problem.assume_disjoint;
    if written.source.is_empty() || other.source.is_empty() {
        return Ok(());
    }
    // Of packed sources, only what is written in place is in the buffer.
    let in_buffer =
        |tensor: &PlannedTensor| problem.sources == Sources::OneBuffer || tensor.in_place;
    if !in_buffer(written) {
        return Ok(());
    }
    let region = written.written(rotary_dim);
    let (label, _) = written.labels();
    let (other_written, other_read) = other.labels();
    if in_buffer(other) {
        refuse_overlap(
            (label, &region),
            (other_written, &other.written(rotary_dim)),
            assume_disjoint,
        )?;
    }
    refuse_overlap(
        (label, &region),
        (other_read, &other.read(rotary_dim)),
        assume_disjoint,
    )
}

fn refuse_overlap(
    (first, a): (&'static str, &Region),
    (second, b): (&'static str, &Region),
    assume_disjoint: bool,
) -> Result<(), Error> {
    match a.overlap(b) {
        Overlap::Overlapping => Err(Error::Overlap { first, second }),
        Overlap::Unknown if !assume_disjoint => {
            let nests = b.self_overlap() == Overlap::Disjoint;
            let what = if nests { first } else { second };
            Err(Error::OverlapUnknown { what })
        }
        _ => Ok(()),
    }
}
