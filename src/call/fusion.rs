//! The stages of a call as data.

use super::{
    Addresses, PHASOR_CODES_E4M3, PHASOR_CODES_INT8, PHASOR_CODES_INT8_FULL, PHASOR_CODES_NONE,
    PHASOR_NORM_LAYER, PHASOR_NORM_NONE, PHASOR_NORM_RMS, PHASOR_SCALE_ANY,
    PHASOR_SCALE_POWER_OF_TWO_DOWN, PHASOR_SCALE_POWER_OF_TWO_UP, PHASOR_STAGE_BIAS,
    PHASOR_STAGE_CODES, PHASOR_STAGE_CODES_OUT, PHASOR_STAGE_DYNAMIC_SCALE, PHASOR_STAGE_NORM,
    PHASOR_STAGE_NORM_BIAS, PHASOR_STAGE_NORM_LATE, PHASOR_STAGE_NORM_MEAN,
    PHASOR_STAGE_NORM_WEIGHT, PHASOR_STAGE_OF_HEADS, PHASOR_STAGE_PRESENT, PHASOR_STAGE_ROTATES,
    PHASOR_STAGE_ROUND_AFTER_NORM, PHASOR_STAGE_ROUND_BEFORE_CODES,
    PHASOR_STAGE_ROUND_BEFORE_WEIGHT, PhasorCall, PhasorCodes, PhasorFusion, PhasorNorm,
    PhasorScale, PhasorStages, PhasorStream, StageAddresses, VectorAddress,
};
use crate::cache::{CacheLayout, KvCacheLayout};
use crate::codes::StoredCodes;
use crate::element::Dtype;
use crate::error::TensorName;
use crate::norm::{HeadNorm, Kind};
use crate::plan::PlannedTensor;
use crate::quantize::{self, Codes, ScaleForm, ScaleRounding};
use crate::stages::Stages;
use crate::{Error, Plan};

/// The stages of q, k and v; `None` where there are none. Addresses are offsets.
pub(crate) fn fusion(
    dtype: Dtype,
    tensors: [&Option<PlannedTensor>; 3],
    stages: &[Stages; 3],
    cache: Option<&KvCacheLayout>,
    q_codes: Option<&StoredCodes>,
) -> Option<PhasorFusion> {
    let mut some = false;
    let mut of = |at: usize, codes: Option<(&StoredCodes, Option<&CacheLayout>)>| {
        let Some(tensor) = tensors[at].as_ref().filter(|t| !t.source.is_empty()) else {
            return PhasorStages::default();
        };
        let params = stages_of(dtype, at, tensor, &stages[at], codes);
        some |= params.present == 1;
        params
    };
    let cached = |at: usize, layout: Option<&'_ CacheLayout>| {
        let codes = cache.and_then(|cache| cache.codes[at].as_ref());
        codes.zip(layout).map(|(codes, layout)| (codes, *layout))
    };
    let k = cached(0, cache.and_then(|cache| cache.k.as_ref()));
    let v = cached(1, cache.and_then(|cache| cache.v.as_ref()));
    let fusion = PhasorFusion {
        q: of(0, q_codes.map(|codes| (codes, None))),
        k: of(1, k.as_ref().map(|(codes, layout)| (*codes, Some(layout)))),
        v: of(2, v.as_ref().map(|(codes, layout)| (*codes, Some(layout)))),
        ..PhasorFusion::default()
    };
    some.then_some(fusion)
}

fn stages_of(
    dtype: Dtype,
    at: usize,
    tensor: &PlannedTensor,
    stages: &Stages,
    codes: Option<(&StoredCodes, Option<&CacheLayout>)>,
) -> PhasorStages {
    let [.., head_dim] = tensor.source.shape();
    let rotates = at < 2;
    let (slope, interval) = stages.temperature.unwrap_or((0.0, 0));
    let norm = stages.norm.as_ref();
    PhasorStages {
        bias: 0,
        // A planned head has no more dims than fit.
        bias_head: (head_dim * dtype.size()) as i64,
        norm: norm.map_or_else(PhasorNorm::default, |norm| {
            norm_params(norm, stages.norm_after_rotation)
        }),
        scale: PhasorScale {
            factor: stages.scale,
            slope,
            interval,
            reserved: 0,
        },
        codes: codes.map_or_else(PhasorCodes::default, |(codes, layout)| {
            code_params(codes, head_dim, layout)
        }),
        rotates: u32::from(rotates && stages.rotates),
        present: u32::from(stages.is_present(rotates) || codes.is_some()),
        from_cache: 0,
        flags: 0,
    }
}

impl PhasorStages {
    /// What kernels test of the stages of q, k or v, which is in `flags` of what they take.
    fn tested(&self, tensor: TensorName) -> u32 {
        let norm = &self.norm;
        let codes = &self.codes;
        let has_codes = codes.type_ != PHASOR_CODES_NONE;
        let is_given = has_codes && codes.dynamic == 0;
        let own = self.bias != 0 && self.bias_head != 0
            || norm.weight != 0 && norm.weight_head != 0
            || norm.bias != 0 && norm.bias_head != 0
            || is_given && codes.head != 0;
        // Without stages, a stream has its rotation alone.
        let rotates = match self.present {
            0 => tensor != TensorName::V,
            _ => self.rotates != 0,
        };
        let flags = [
            (self.present != 0, PHASOR_STAGE_PRESENT),
            (rotates, PHASOR_STAGE_ROTATES),
            (self.bias != 0, PHASOR_STAGE_BIAS),
            (norm.kind != PHASOR_NORM_NONE, PHASOR_STAGE_NORM),
            (norm.kind == PHASOR_NORM_LAYER, PHASOR_STAGE_NORM_MEAN),
            (norm.after_rotation != 0, PHASOR_STAGE_NORM_LATE),
            (norm.weight != 0, PHASOR_STAGE_NORM_WEIGHT),
            (norm.bias != 0, PHASOR_STAGE_NORM_BIAS),
            (
                norm.round_before_weight != 0,
                PHASOR_STAGE_ROUND_BEFORE_WEIGHT,
            ),
            (norm.round_after != 0, PHASOR_STAGE_ROUND_AFTER_NORM),
            (has_codes, PHASOR_STAGE_CODES),
            (has_codes && tensor == TensorName::Q, PHASOR_STAGE_CODES_OUT),
            (codes.round_first != 0, PHASOR_STAGE_ROUND_BEFORE_CODES),
            (codes.dynamic != 0, PHASOR_STAGE_DYNAMIC_SCALE),
            (own, PHASOR_STAGE_OF_HEADS),
        ];
        let set = flags.into_iter().filter(|(is_set, _)| *is_set);
        // Each is a bit of its own.
        set.map(|(_, flag)| flag).sum()
    }

    /// Of keys that rotate in the cache where they are.
    pub(crate) fn in_cache(self) -> Self {
        Self {
            scale: PhasorScale {
                factor: 1.0,
                ..PhasorScale::default()
            },
            rotates: 1,
            present: 1,
            from_cache: 1,
            ..self
        }
    }
}

impl PhasorFusion {
    /// As kernels take it, with the call that it belongs to.
    pub(crate) fn for_kernels(mut self, call: &PhasorCall, weights_before_wait: bool) -> Self {
        self.weights_before_wait = u32::from(weights_before_wait);
        let streams = [
            (TensorName::Q, &mut self.q, &call.q_output),
            (TensorName::K, &mut self.k, &call.k_output),
            (TensorName::V, &mut self.v, &call.v_output),
        ];
        for (tensor, stages, output) in streams {
            stages.flags = stages.tested(tensor);
            stages.norm.inverse_dims = 1.0 / output.head_dim as f32;
        }
        let turns = |stream: &PhasorStream, stages: &PhasorStages| {
            stream.heads != 0 && stages.flags & PHASOR_STAGE_ROTATES != 0
        };
        self.turns = u32::from(turns(&call.q, &self.q) || turns(&call.k, &self.k));
        self
    }
}

fn norm_params(norm: &HeadNorm, after_rotation: bool) -> PhasorNorm {
    PhasorNorm {
        kind: match norm.kind {
            Kind::Rms => PHASOR_NORM_RMS,
            Kind::Layer => PHASOR_NORM_LAYER,
        },
        eps: norm.eps,
        weight_offset: norm.weight_offset,
        after_rotation: u32::from(after_rotation),
        round_before_weight: u32::from(norm.round_before_weight),
        round_after: u32::from(norm.round_after),
        across_heads: u32::from(norm.across_heads),
        ..PhasorNorm::default()
    }
}

fn code_params(codes: &StoredCodes, head_dim: usize, layout: Option<&CacheLayout>) -> PhasorCodes {
    let mut params = PhasorCodes {
        type_: match codes.codes {
            Codes::E4m3 => PHASOR_CODES_E4M3,
            Codes::Int8 => PHASOR_CODES_INT8,
            Codes::Int8Full => PHASOR_CODES_INT8_FULL,
        },
        multiply: u32::from(codes.form == ScaleForm::Multiply),
        group_dims: codes.group_dims(head_dim) as u32,
        round_first: u32::from(codes.round_first),
        ..PhasorCodes::default()
    };
    let (Some(dynamic), Some(layout)) = (codes.dynamic, layout) else {
        return params;
    };
    let [pages, page_size, heads, head_dim] = layout.shape();
    let groups = head_dim / codes.group_dims(head_dim).max(1);
    let at = dynamic.layout;
    // The stride of a dimension of size 1 is never used, and may be anything.
    let stride = |count: usize, stride: usize| match count {
        0 | 1 => 0,
        _ => (stride * dynamic.size()) as i64,
    };
    params.scales = (at.offset * dynamic.size()) as u64;
    params.page = stride(pages, at.page);
    params.slot = stride(page_size, at.slot);
    params.head = stride(heads, at.head);
    params.group = stride(groups, at.group);
    params.dynamic = 1;
    params.scale_rounding = match dynamic.rounding {
        ScaleRounding::None => PHASOR_SCALE_ANY,
        ScaleRounding::PowerOfTwoUp => PHASOR_SCALE_POWER_OF_TWO_UP,
        ScaleRounding::PowerOfTwoDown => PHASOR_SCALE_POWER_OF_TWO_DOWN,
    };
    params.e8m0 = u32::from(dynamic.e8m0);
    params.floor = quantize::least_scale(dynamic.floor, dynamic.rounding);
    params
}

const NONE: StageAddresses = StageAddresses {
    bias: None,
    norm_weight: None,
    norm_bias: None,
    scales: None,
};

impl PhasorCodes {
    /// Codes that a cache has, whose scales, if they are written, end within `i64`
    /// ([`StoredCodes::scale_bytes`]). The address of the scales is that of the first, counted from the start
    /// of their buffer.
    pub fn of(codes: &StoredCodes, layout: &CacheLayout) -> Self {
        let [.., head_dim] = layout.shape();
        code_params(codes, head_dim, Some(layout))
    }
}

impl Plan {
    /// Fills in the addresses of a call's stages.
    ///
    /// # Errors
    /// [`Error::Stages`] where something that a stage needs is missing, or has no stage.
    #[inline]
    pub(crate) fn fill_fusion(
        &self,
        addresses: &Addresses,
        fusion: &mut Option<PhasorFusion>,
    ) -> Result<(), Error> {
        // The usual case at no cost: this runs at every call.
        if self.fusion.is_none() && addresses.stages.is_none() {
            return Ok(());
        }
        *fusion = self.fusion;
        let given = addresses.stages.as_ref().unwrap_or(&[NONE; 3]);
        let Some(fusion) = fusion else {
            let some = |given: &StageAddresses| *given != NONE;
            return match given.iter().position(some) {
                None => Ok(()),
                Some(at) => Err(Error::Stages {
                    tensor: [TensorName::Q, TensorName::K, TensorName::V][at],
                    what: "the call has a bias, weights or scales, and the plan no stage for them",
                }),
            };
        };
        let caches = addresses.cache.as_ref();
        let [q, k, v] = given;
        let [k_cache, v_cache] = [caches.map(|cache| cache.k), caches.map(|cache| cache.v)];
        self.fill_stages((0, &self.q), &mut fusion.q, q, None)?;
        self.fill_stages((1, &self.k), &mut fusion.k, k, k_cache)?;
        self.fill_stages((2, &self.v), &mut fusion.v, v, v_cache)
    }

    /// Scales that the buffer for those of keys (1) or values (2) must have.
    fn scales_needed(&self, at: usize) -> usize {
        let needed = || {
            let cache = self.cache.as_ref()?;
            let codes = cache.codes[at - 1]?;
            let layout = [cache.k, cache.v][at - 1]?;
            Some(codes.scale_bytes(&layout)? / codes.dynamic?.size())
        };
        needed().unwrap_or(0)
    }

    fn fill_stages(
        &self,
        (at, planned): (usize, &Option<PlannedTensor>),
        params: &mut PhasorStages,
        given: &StageAddresses,
        cache: Option<u64>,
    ) -> Result<(), Error> {
        // The usual case of values at no cost, as above.
        if params.present == 0 && *given == NONE {
            return Ok(());
        }
        let Some(planned) = planned.as_ref().filter(|t| !t.source.is_empty()) else {
            return Ok(());
        };
        let tensor = planned.name;
        let wrong = |what| Err(Error::Stages { tensor, what });
        let [.., heads, head_dim] = planned.source.shape();
        let head = (head_dim * self.dtype.size()) as i64;
        // Of one head, or of all.
        let vector = |what, vector: Option<VectorAddress>, one: usize| match vector {
            None => Ok((0, false)),
            Some(vector) if vector.len == heads * one => Ok((vector.address, heads > 1)),
            Some(vector) if vector.len == one => Ok((vector.address, false)),
            Some(vector) => Err(Error::StageLength {
                tensor,
                what,
                expected: heads * one,
                or: Some(one).filter(|_| heads != 1),
                got: vector.len,
            }),
        };
        match (self.stages[at].bias, given.bias) {
            (true, None) => {
                return wrong("a bias is planned: give it with StageWeights::bias");
            }
            (false, Some(_)) => {
                return wrong("no bias is planned: plan with Stages::bias");
            }
            (true, Some(bias)) if bias.len != heads * head_dim => {
                return Err(Error::StageLength {
                    tensor,
                    what: "bias",
                    expected: heads * head_dim,
                    or: None,
                    got: bias.len,
                });
            }
            (true, Some(bias)) => params.bias = bias.address,
            (false, None) => {}
        }
        if params.norm.kind == PHASOR_NORM_NONE
            && (given.norm_weight.is_some() || given.norm_bias.is_some())
        {
            return wrong("no norm is planned for these weights: plan with Stages::norm");
        }
        let stride = |each| if each { head } else { 0 };
        let (weight, each) = vector("norm weight", given.norm_weight, head_dim)?;
        (params.norm.weight, params.norm.weight_head) = (weight, stride(each));
        let (bias, each) = vector("norm bias", given.norm_bias, head_dim)?;
        (params.norm.bias, params.norm.bias_head) = (bias, stride(each));
        let codes = &mut params.codes;
        if codes.type_ == PHASOR_CODES_NONE {
            return match given.scales {
                None => Ok(()),
                Some(_) => wrong("no codes are planned for these scales"),
            };
        }
        let planned_codes = match at {
            0 => self.q_codes.as_ref(),
            _ => self
                .cache
                .as_ref()
                .and_then(|cache| cache.codes[at - 1].as_ref()),
        };
        let inline = planned_codes.is_some_and(|codes| !codes.has_scale_buffer());
        match (codes.dynamic, given.scales) {
            (_, Some(_)) if inline => wrong("scales lie in the cache: give no buffer for them"),
            (1, None) if inline => {
                codes.scales = codes.scales.wrapping_add(cache.unwrap_or(0));
                Ok(())
            }
            (_, None) => wrong("codes are planned: give their scales, or a buffer for them"),
            (0, Some(_)) => {
                let (scales, each) = vector("scales", given.scales, 1)?;
                (codes.scales, codes.head) =
                    (scales, if each { size_of::<f32>() as i64 } else { 0 });
                Ok(())
            }
            (_, Some(scales)) => {
                let expected = self.scales_needed(at);
                if scales.len < expected {
                    return Err(Error::StageLength {
                        tensor,
                        what: "buffer of scales",
                        expected,
                        or: None,
                        got: scales.len,
                    });
                }
                codes.scales = codes.scales.wrapping_add(scales.address);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `cuda/phasor_call.h` has it.
    #[test]
    fn kernels_test_what_there_is() {
        use TensorName::{K, Q, V};
        let absent = PhasorStages::default();
        assert_eq!(absent.tested(Q), PHASOR_STAGE_ROTATES);
        assert_eq!(absent.tested(K), PHASOR_STAGE_ROTATES);
        assert_eq!(absent.tested(V), 0);
        let present = PhasorStages {
            present: 1,
            ..absent
        };
        assert_eq!(present.tested(Q), PHASOR_STAGE_PRESENT);
        let rotates = PhasorStages {
            rotates: 1,
            ..present
        };
        assert_eq!(
            rotates.tested(K),
            PHASOR_STAGE_PRESENT | PHASOR_STAGE_ROTATES
        );

        let with = |change: &dyn Fn(&mut PhasorStages)| {
            let mut stages = present;
            change(&mut stages);
            stages.tested(K) - PHASOR_STAGE_PRESENT
        };
        // Vectors that heads share, those that each has one of, and a stride of one that is not there.
        type Vector = fn(&mut PhasorStages) -> (&mut u64, &mut i64);
        let vectors: [(Vector, u32); 3] = [
            (|s| (&mut s.bias, &mut s.bias_head), PHASOR_STAGE_BIAS),
            (
                |s| (&mut s.norm.weight, &mut s.norm.weight_head),
                PHASOR_STAGE_NORM_WEIGHT,
            ),
            (
                |s| (&mut s.norm.bias, &mut s.norm.bias_head),
                PHASOR_STAGE_NORM_BIAS,
            ),
        ];
        for (vector, flag) in vectors {
            for (address, stride, flags) in [
                (64, 0, flag),
                (64, 256, flag | PHASOR_STAGE_OF_HEADS),
                (0, 256, 0),
            ] {
                let set = |stages: &mut PhasorStages| {
                    let (at, head) = vector(stages);
                    (*at, *head) = (address, stride);
                };
                assert_eq!(with(&set), flags, "{flag:#x} {address} {stride}");
            }
        }
        // Scales that are given may be those of heads; those that are written always are.
        for (type_, dynamic, head, flags) in [
            (PHASOR_CODES_E4M3, 0, 0, PHASOR_STAGE_CODES),
            (
                PHASOR_CODES_E4M3,
                0,
                4,
                PHASOR_STAGE_CODES | PHASOR_STAGE_OF_HEADS,
            ),
            (
                PHASOR_CODES_E4M3,
                1,
                4,
                PHASOR_STAGE_CODES | PHASOR_STAGE_DYNAMIC_SCALE,
            ),
            (PHASOR_CODES_NONE, 0, 4, 0),
        ] {
            let set = |stages: &mut PhasorStages| {
                let codes = &mut stages.codes;
                (codes.type_, codes.dynamic, codes.head) = (type_, dynamic, head);
            };
            assert_eq!(with(&set), flags, "{type_} {dynamic} {head}");
        }
        let mut coded = present;
        coded.codes.type_ = PHASOR_CODES_E4M3;
        let codes = PHASOR_STAGE_PRESENT | PHASOR_STAGE_CODES;
        assert_eq!(coded.tested(V), codes);
        assert_eq!(coded.tested(Q), codes | PHASOR_STAGE_CODES_OUT);
    }

    /// Scales lie as `[pages, slots, heads]`, of 4 bytes.
    #[test]
    fn codes_of_a_cache() {
        let layout = crate::ScaleLayout::tokens_heads(4, 2, 1).with_offset(3);
        let stored = StoredCodes::dynamic(Codes::E4m3, 1e-6, layout);
        let codes = PhasorCodes::of(&stored, &CacheLayout::paged_nhd(5, 4, 2, 64));
        let strides = [codes.page, codes.slot, codes.head, codes.group];
        assert_eq!((codes.scales, strides), (12, [32, 8, 4, 0]));
        assert_eq!((codes.type_, codes.dynamic), (PHASOR_CODES_E4M3, 1));
        assert_eq!((codes.group_dims, codes.floor), (64, 1e-6));
    }

    #[test]
    fn angles_are_for_heads_that_rotate() {
        let turns = |heads: [u32; 2], rotates: [u32; 2]| {
            let mut call = PhasorCall::default();
            let mut fusion = PhasorFusion::default();
            [call.q.heads, call.k.heads] = heads;
            [fusion.q.rotates, fusion.k.rotates] = rotates;
            (fusion.q.present, fusion.k.present) = (1, 1);
            fusion.for_kernels(&call, false).turns
        };
        for (heads, rotates, expected) in [
            ([1, 1], [1, 1], 1),
            ([1, 0], [1, 0], 1),
            ([0, 1], [0, 1], 1),
            ([1, 1], [0, 0], 0),
            ([0, 0], [1, 1], 0),
            ([1, 0], [0, 1], 0),
            ([0, 1], [1, 0], 0),
        ] {
            assert_eq!(turns(heads, rotates), expected, "{heads:?} {rotates:?}");
        }
    }

    #[test]
    fn keys_in_a_cache_rotate_and_keep_their_size() {
        let stages = PhasorStages::default().in_cache();
        let (scale, codes) = (stages.scale, stages.codes.type_);
        assert_eq!(
            (scale.factor, scale.interval, codes),
            (1.0, 0, PHASOR_CODES_NONE)
        );
        assert_eq!(
            (stages.rotates, stages.present, stages.from_cache),
            (1, 1, 1)
        );
    }
}
