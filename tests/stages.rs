//! Whole steps: bias, norm, rotation, norm, scale, rounding, codes. What a call writes is held, bit for bit
//! and on every variant, to the same stages one after the other: `HeadNorm::apply`, a plain rotation in
//! f32, `Quantization::quantize`; and to f64 where that is to be right itself.

use phasor::half::{bf16, f16};
use phasor::norm::HeadNorm;
use phasor::quantize::{Codes, Quantization, Scale, ScaleForm, ScaleRounding, e8m0_from_scale};
use phasor::{
    CacheLayout, Dtype, Element, Error, Frequencies, Host, HostBytes, HostRotator, HostStep,
    HostWeights, InOut, Isa, KvCacheLayout, Layout, Pairing, Positions, Problem, Rope, ScaleLayout,
    Slots, Stages, Stored, StoredCodes, TensorName, Threads,
};
use proptest::prelude::*;

const POSITIONS: [i64; 5] = [0, 7, 131_072, -3, 20_000];
const TOKENS: usize = POSITIONS.len();
/// Of the caches' 3 pages of 4 slots; one token is not stored.
const SLOTS: [i64; TOKENS] = [5, 0, -1, 11, 2];

fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() * 3.0).collect()
}

fn narrowed<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::narrow(x)).collect()
}

fn widened<T: Element>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.widen()).collect()
}

fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.widen().to_bits()).collect()
}

#[derive(Clone, Copy, Debug)]
struct NormCase {
    layer: bool,
    after: bool,
    across: bool,
    offset: f32,
    round_before: bool,
    round_after: bool,
    weight: Option<bool>,
    bias: Option<bool>,
}

#[derive(Clone, Copy, Debug)]
enum CodeCase {
    None,
    Given {
        codes: Codes,
        form: ScaleForm,
        per_head: bool,
        round_first: bool,
    },
    Dynamic {
        codes: Codes,
        form: ScaleForm,
        rounding: ScaleRounding,
        groups: usize,
        e8m0: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Case {
    pairing: Pairing,
    heads: usize,
    head_dim: usize,
    offset: usize,
    rotary_dim: usize,
    bias: bool,
    norm: Option<NormCase>,
    scale: f32,
    temperature: bool,
    rotates: bool,
    codes: CodeCase,
    seed: u32,
}

impl Case {
    fn rope(&self) -> Rope {
        Rope::new(
            Frequencies::from_theta(10_000.0, self.rotary_dim).unwrap(),
            self.pairing,
        )
    }

    fn head_norm(&self) -> Option<HeadNorm> {
        let case = self.norm?;
        let mut norm = match case.layer {
            true => HeadNorm::layer(1e-5),
            false => HeadNorm::rms(1e-6),
        };
        norm = norm.with_weight_offset(case.offset);
        if case.round_before {
            norm = norm.round_before_weight();
        }
        if case.round_after {
            norm = norm.round_after();
        }
        if case.across {
            norm = norm.across_heads();
        }
        Some(norm)
    }

    fn stages(&self, rotates: bool) -> Stages {
        let mut stages = Stages::new().scale(self.scale);
        if self.bias {
            stages = stages.bias();
        }
        if let (Some(norm), Some(case)) = (self.head_norm(), self.norm) {
            stages = match case.after {
                true => stages.norm_after_rotation(norm),
                false => stages.norm(norm),
            };
        }
        if self.temperature {
            stages = stages.temperature(0.1, 8192);
        }
        if rotates && !self.rotates {
            stages = stages.without_rotation();
        }
        stages
    }

    fn dims(&self) -> usize {
        self.heads * self.head_dim
    }

    fn weight(&self, per_head: bool, seed: u32) -> Vec<f32> {
        values(if per_head { self.dims() } else { self.head_dim }, seed)
    }

    /// What becomes of all tokens of a stream, as f32 before the last rounding.
    fn expected<T: Element>(&self, input: &[T], rotates: bool) -> Vec<f32> {
        let mut x = widened(input);
        if self.bias {
            let bias = widened(&narrowed::<T>(&values(self.dims(), self.seed + 10)));
            for token in x.chunks_mut(self.dims()) {
                token.iter_mut().zip(&bias).for_each(|(x, bias)| *x += bias);
            }
        }
        let normed = |x: &mut Vec<f32>, after: bool| {
            if self.norm.is_some_and(|norm| norm.after == after) {
                x.chunks_mut(self.dims())
                    .for_each(|token| self.norm_token::<T>(token));
            }
        };
        normed(&mut x, false);
        if rotates && self.rotates {
            let host = Host::new().with_isa(Isa::Scalar).unwrap();
            let rotator = host.rotator(&self.rope());
            let layout =
                Layout::tokens(TOKENS, self.heads, self.head_dim).with_rotary_offset(self.offset);
            let plan = rotator.plan(&Problem::new(Dtype::F32).q(layout)).unwrap();
            let q = Some((&mut x).into());
            rotator
                .rotate(&plan, q, None, Positions::per_token(&POSITIONS))
                .unwrap();
        }
        normed(&mut x, true);
        for (token, &position) in x.chunks_mut(self.dims()).zip(&POSITIONS) {
            let factor = self.stages(rotates).factor_at(position);
            if factor != 1.0 {
                token.iter_mut().for_each(|x| *x *= factor);
            }
        }
        x
    }

    /// One token's norm, from the definition's own code in the steps that rounding asks for.
    fn norm_token<T: Element>(&self, token: &mut [f32]) {
        let (Some(case), Some(norm)) = (self.norm, self.head_norm()) else {
            return;
        };
        let weight = case
            .weight
            .map(|per_head| widened(&narrowed::<T>(&self.weight(per_head, self.seed + 11))));
        let bias = case
            .bias
            .map(|per_head| widened(&narrowed::<T>(&self.weight(per_head, self.seed + 12))));
        // Without weights, in f32: (x - mean) * r.
        norm.apply(token, self.head_dim, None, None).unwrap();
        for (at, x) in token.iter_mut().enumerate() {
            if case.round_before {
                *x = T::narrow(*x).widen();
            }
            if let Some(weight) = &weight {
                *x *= match case.offset {
                    0.0 => weight[at % weight.len()],
                    offset => offset + weight[at % weight.len()],
                };
            }
            if let Some(bias) = &bias {
                *x += bias[at % bias.len()];
            }
            if case.round_after {
                *x = T::narrow(*x).widen();
            }
        }
    }
}

/// A scale for each head, as far as they are given.
fn given_scales(case: &Case) -> Vec<f32> {
    match case.codes {
        CodeCase::Given { per_head: true, .. } => values(case.heads, 77)
            .iter()
            .map(|x| x.abs() / 40.0 + 0.01)
            .collect(),
        _ => vec![0.037],
    }
}

fn stored_codes(case: &Case) -> Option<StoredCodes> {
    Some(match case.codes {
        CodeCase::None => return None,
        CodeCase::Given {
            codes,
            form,
            round_first,
            ..
        } => {
            let stored = StoredCodes::given(codes, form);
            if round_first {
                stored.round_first()
            } else {
                stored
            }
        }
        CodeCase::Dynamic {
            codes,
            form,
            rounding,
            groups,
            e8m0,
        } => {
            let layout = ScaleLayout::tokens_heads(4, case.heads, groups);
            let mut stored = StoredCodes::dynamic(codes, 1e-6, layout)
                .groups_of(case.head_dim / groups)
                .rounded(rounding);
            if form == ScaleForm::Multiply {
                stored = stored.by_inverse();
            }
            if e8m0 {
                stored = stored.e8m0();
            }
            stored
        }
    })
}

/// Codes and scales of the heads of a token.
fn coded<T: Element>(case: &Case, token: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (groups, round_first) = match case.codes {
        CodeCase::Dynamic { groups, .. } => (groups, false),
        CodeCase::Given { round_first, .. } => (1, round_first),
        CodeCase::None => unreachable!(),
    };
    let given = given_scales(case);
    let mut codes = vec![0; token.len()];
    let mut scales = Vec::new();
    let dims = case.head_dim / groups;
    for (at, (x, codes)) in token.chunks(dims).zip(codes.chunks_mut(dims)).enumerate() {
        let quantization = match case.codes {
            CodeCase::Given { codes, form, .. } => {
                let scale = given[at % given.len()];
                Quantization::new(codes, Scale::Static { scale, form })
            }
            CodeCase::Dynamic {
                codes,
                form,
                rounding,
                ..
            } => Quantization::new(
                codes,
                Scale::Dynamic {
                    floor: 1e-6,
                    form,
                    rounding,
                },
            ),
            CodeCase::None => unreachable!(),
        };
        let x: Vec<f32> = match round_first {
            true => widened(&narrowed::<T>(x)),
            false => x.to_vec(),
        };
        scales.push(quantization.quantize(&x, codes).unwrap());
    }
    (codes, scales)
}

fn hosts() -> Vec<Host> {
    let isas = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    isas.flat_map(|isa| {
        let host = Host::new().with_isa(isa).unwrap();
        [Threads::One, Threads::Pool].map(|threads| host.with_threads(threads))
    })
    .collect()
}

fn check<T: Element>(case: &Case) {
    let dims = case.dims();
    let qkv: Vec<T> = narrowed(&values(TOKENS * 3 * dims, case.seed));
    let part = |at: usize| -> Vec<T> {
        qkv.chunks(3 * dims)
            .flat_map(|token| &token[at * dims..][..dims])
            .copied()
            .collect()
    };
    let [q, k, v] = [0, 1, 2].map(|at| case.expected(&part(at), at < 2));
    let bias: Vec<T> = narrowed(&values(dims, case.seed + 10));
    let per_head = |per_head: Option<bool>, seed| {
        per_head.map(|per_head| narrowed::<T>(&case.weight(per_head, seed)))
    };
    let weight = per_head(case.norm.and_then(|norm| norm.weight), case.seed + 11);
    let norm_bias = per_head(case.norm.and_then(|norm| norm.bias), case.seed + 12);
    let given = given_scales(case);

    let window = |at: usize| {
        Layout::packed_heads(
            1,
            TOKENS,
            3 * case.heads,
            case.head_dim,
            at * case.heads..(at + 1) * case.heads,
        )
        .with_rotary_offset(case.offset)
    };
    let cache = CacheLayout::paged_nhd(3, 4, case.heads, case.head_dim);
    let mut caches = KvCacheLayout::separate(cache, cache);
    if let Some(codes) = stored_codes(case) {
        caches = caches.with_codes(codes);
    }
    let elsewhere =
        Layout::tokens(TOKENS, case.heads, case.head_dim).with_rotary_offset(case.offset);
    // q in place, k elsewhere and to its cache, v to its cache only.
    let problem = Problem::new(T::DTYPE)
        .q(window(0))
        .k((window(1), elsewhere))
        .v_to_cache(window(2))
        .packed()
        .q_stages(case.stages(true))
        .k_stages(case.stages(true))
        .v_stages(case.stages(false))
        .cache(caches);
    for host in hosts() {
        let rotator = host.rotator(&case.rope());
        let plan = rotator.plan(&problem).unwrap();
        let weights = |codes: bool| {
            let mut weights = HostWeights::new();
            if case.bias {
                weights = weights.bias(&bias[..]);
            }
            if let Some(weight) = &weight {
                weights = weights.norm(&weight[..]);
            }
            if let Some(bias) = &norm_bias {
                weights = weights.norm_bias(&bias[..]);
            }
            match case.codes {
                CodeCase::Given { .. } if codes => weights.scales(&given[..]),
                _ => weights,
            }
        };
        let mut buffer = qkv.clone();
        let mut k_to = vec![T::narrow(9.0); TOKENS * dims];
        let mut elements = [
            vec![T::narrow(-7.0); 12 * dims],
            vec![T::narrow(-7.0); 12 * dims],
        ];
        let mut codes = [vec![0xeeu8; 12 * dims], vec![0xeeu8; 12 * dims]];
        let groups = match case.codes {
            CodeCase::Dynamic { groups, .. } => groups,
            _ => 1,
        };
        let mut scales = [
            vec![-1f32; 12 * case.heads * groups],
            vec![-1f32; 12 * case.heads * groups],
        ];
        let mut exponents = [
            vec![0xddu8; 12 * case.heads * groups],
            vec![0xddu8; 12 * case.heads * groups],
        ];
        let mut step = HostStep::new(Positions::per_token(&POSITIONS))
            .buffer(&mut buffer[..])
            .k_to(&mut k_to)
            .slots(Slots::mapping(&SLOTS))
            .q_weights(weights(false))
            .k_weights(weights(true))
            .v_weights(weights(true));
        let [k_elements, v_elements] = &mut elements;
        let [k_codes, v_codes] = &mut codes;
        step = match case.codes {
            CodeCase::None => step.k_cache(k_elements).v_cache(v_elements),
            _ => step.k_cache(k_codes).v_cache(v_codes),
        };
        let ([k_scales, v_scales], [k_exponents, v_exponents]) = (&mut scales, &mut exponents);
        step = match case.codes {
            CodeCase::Dynamic { e8m0: true, .. } => {
                step.k_scales(k_exponents).v_scales(v_exponents)
            }
            CodeCase::Dynamic { .. } => step.k_scales(k_scales).v_scales(v_scales),
            _ => step,
        };
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All));

        let label = format!(
            "{case:?} {} {} {:?}",
            T::DTYPE,
            host.isa().name(),
            host.threads()
        );
        let mut expected = qkv.clone();
        for (token, q) in expected.chunks_mut(3 * dims).zip(q.chunks(dims)) {
            token[..dims].copy_from_slice(&narrowed(q));
        }
        assert_eq!(bits(&buffer), bits(&expected), "q: {label}");
        assert_eq!(
            bits(&k_to),
            bits(&narrowed::<T>(&k)),
            "k elsewhere: {label}"
        );
        for (at, values) in [&k, &v].into_iter().enumerate() {
            let mut wanted = vec![T::narrow(-7.0); 12 * dims];
            let mut wanted_codes = vec![0xee; 12 * dims];
            let mut wanted_scales = vec![-1f32; 12 * case.heads * groups];
            for (token, &slot) in values.chunks(dims).zip(&SLOTS) {
                let Ok(slot) = usize::try_from(slot) else {
                    continue;
                };
                if let CodeCase::None = case.codes {
                    wanted[slot * dims..][..dims].copy_from_slice(&narrowed(token));
                } else {
                    let (codes, scales) = coded::<T>(case, token);
                    wanted_codes[slot * dims..][..dims].copy_from_slice(&codes);
                    if let CodeCase::Dynamic { .. } = case.codes {
                        let of_token = case.heads * groups;
                        wanted_scales[slot * of_token..][..of_token].copy_from_slice(&scales);
                    }
                }
            }
            assert_eq!(bits(&elements[at]), bits(&wanted), "cache {at}: {label}");
            assert_eq!(codes[at], wanted_codes, "codes {at}: {label}");
            if let CodeCase::Dynamic { e8m0: true, .. } = case.codes {
                let bytes: Vec<u8> = wanted_scales
                    .iter()
                    .map(|&scale| {
                        if scale < 0.0 {
                            0xdd
                        } else {
                            e8m0_from_scale(scale).unwrap()
                        }
                    })
                    .collect();
                assert_eq!(exponents[at], bytes, "exponents {at}: {label}");
            } else {
                assert_eq!(scales[at], wanted_scales, "scales {at}: {label}");
            }
        }
    }
}

fn check_dtypes(case: &Case) {
    check::<f32>(case);
    check::<f16>(case);
    check::<bf16>(case);
}

const PLAIN: Case = Case {
    pairing: Pairing::HalfSplit,
    heads: 3,
    head_dim: 128,
    offset: 0,
    rotary_dim: 128,
    bias: false,
    norm: None,
    scale: 1.0,
    temperature: false,
    rotates: true,
    codes: CodeCase::None,
    seed: 1,
};

const RMS: NormCase = NormCase {
    layer: false,
    after: false,
    across: false,
    offset: 0.0,
    round_before: false,
    round_after: false,
    weight: Some(false),
    bias: None,
};

#[test]
fn models_norms_and_rotations() {
    let with = |norm| Case {
        norm: Some(norm),
        ..PLAIN
    };
    // Qwen3 as transformers rounds it.
    check_dtypes(&with(NormCase {
        round_before: true,
        round_after: true,
        ..RMS
    }));
    // Gemma 3: 1 + gamma, heads of 256.
    let gemma = with(NormCase { offset: 1.0, ..RMS });
    check_dtypes(&Case {
        head_dim: 256,
        rotary_dim: 256,
        ..gemma
    });
    // Llama 4: after the rotation, without weights, adjacent pairs; temperature in its other layers.
    let llama = with(NormCase {
        after: true,
        weight: None,
        ..RMS
    });
    check_dtypes(&Case {
        pairing: Pairing::Interleaved,
        ..llama
    });
    check_dtypes(&Case {
        rotates: false,
        temperature: true,
        norm: None,
        ..PLAIN
    });
    // OLMo 2: across heads, a weight for each.
    check_dtypes(&with(NormCase {
        across: true,
        weight: Some(true),
        ..RMS
    }));
    // Cohere: LayerNorm, a weight for each head; StableLM: part of the dims rotates, with a bias.
    check_dtypes(&Case {
        pairing: Pairing::Interleaved,
        ..with(NormCase {
            layer: true,
            weight: Some(true),
            ..RMS
        })
    });
    let stable = with(NormCase {
        layer: true,
        weight: Some(true),
        bias: Some(true),
        ..RMS
    });
    check_dtypes(&Case {
        head_dim: 80,
        rotary_dim: 20,
        ..stable
    });
    // GLM-4-MoE: half of the dims rotate, a bias of the projection.
    check_dtypes(&Case {
        rotary_dim: 64,
        bias: true,
        ..with(RMS)
    });
    // The last dims of heads of 192 (MLA's q), and odd sizes.
    check_dtypes(&Case {
        head_dim: 192,
        offset: 128,
        rotary_dim: 64,
        ..with(RMS)
    });
    for (head_dim, rotary_dim) in [
        (96, 96),
        (6, 2),
        (2, 2),
        (514, 510),
        (1026, 1024),
        (512, 512),
    ] {
        check_dtypes(&Case {
            head_dim,
            rotary_dim,
            ..with(RMS)
        });
    }
}

fn codes() -> impl Strategy<Value = CodeCase> {
    let kind = prop_oneof![Just(Codes::E4m3), Just(Codes::Int8), Just(Codes::Int8Full)];
    let form = prop_oneof![Just(ScaleForm::Divide), Just(ScaleForm::Multiply)];
    let rounding = prop_oneof![
        Just(ScaleRounding::None),
        Just(ScaleRounding::PowerOfTwoUp),
        Just(ScaleRounding::PowerOfTwoDown)
    ];
    let given = (kind.clone(), form.clone(), any::<[bool; 2]>()).prop_map(
        |(codes, form, [per_head, round_first])| CodeCase::Given {
            codes,
            form,
            per_head,
            round_first,
        },
    );
    let dynamic = (kind, form, rounding, 1..3usize, any::<bool>()).prop_map(
        |(codes, form, rounding, groups, e8m0)| CodeCase::Dynamic {
            codes,
            form,
            rounding,
            groups,
            e8m0: e8m0 && rounding != ScaleRounding::None,
        },
    );
    prop_oneof![Just(CodeCase::None), given, dynamic]
}

prop_compose! {
    fn norms()(
        [layer, after, across, round_before, round_after] in any::<[bool; 5]>(),
        offset in prop_oneof![Just(0.0f32), Just(1.0)],
        weight in any::<Option<bool>>(),
        bias in any::<Option<bool>>(),
    ) -> NormCase {
        let round_after = round_after && !after;
        NormCase { layer, after, across, offset, round_before, round_after, weight, bias }
    }
}

prop_compose! {
    fn cases()(
        interleaved in any::<bool>(),
        heads in 1..4usize,
        half_dim in 1..40usize,
        [offset, rotary] in any::<[prop::sample::Index; 2]>(),
        [bias, rotates, temperature] in any::<[bool; 3]>(),
        norm in proptest::option::of(norms()),
        scale in prop_oneof![Just(1.0f32), Just(0.088_388)],
        codes in codes(),
        seed in 0..1000u32,
    ) -> Case {
        let half_dim = 2 * half_dim;
        let pairs = rotary.index(half_dim) + 1;
        let offset = offset.index(half_dim - pairs + 1) * 2;
        Case {
            pairing: if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit },
            heads,
            head_dim: 2 * half_dim,
            offset,
            rotary_dim: 2 * pairs,
            bias,
            norm,
            scale,
            temperature,
            rotates,
            codes,
            seed,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_stages_are_those_of_their_definitions(case in cases()) {
        check_dtypes(&case);
    }
}

/// Heads that rotate as a whole after a norm, k to its cache only: what a step leaves behind.
fn straight<T: Element>(
    isa: Isa,
    pairing: Pairing,
    [heads, head_dim]: [usize; 2],
    norm: HeadNorm,
    coded: bool,
) -> [Vec<u32>; 2]
where
    for<'a> HostBytes<'a>: From<&'a mut Vec<T>>,
{
    let rope = Rope::new(Frequencies::from_theta(1e4, head_dim).unwrap(), pairing);
    let rotator = Host::new().with_isa(isa).unwrap().rotator(&rope);
    let window = |at: usize| {
        Layout::packed_heads(1, TOKENS, 2 * heads, head_dim, at * heads..(at + 1) * heads)
    };
    let cache = CacheLayout::paged_nhd(3, 4, heads, head_dim);
    let mut caches = KvCacheLayout::k(cache);
    if coded {
        caches = caches.with_k_codes(StoredCodes::given(Codes::E4m3, ScaleForm::Divide));
    }
    let stages = Stages::new().norm(norm);
    let problem = Problem::new(T::DTYPE)
        .q(window(0))
        .k_to_cache(window(1))
        .one_buffer()
        .q_stages(stages)
        .k_stages(stages)
        .cache(caches);
    let plan = rotator.plan(&problem).unwrap();

    let len = 2 * TOKENS * heads * head_dim;
    let mut buffer: Vec<T> = narrowed(&values(len, 7));
    // One to a head, with heads between that have none; and one head that is tiny.
    let special = [f32::NAN, f32::INFINITY, -1e-39, -0.0, 3e38, 1e-25];
    for (at, &x) in special.iter().enumerate() {
        buffer[(2 * at + 1) * head_dim % len + (11 * at + 5)] = T::narrow(x);
    }
    buffer[..head_dim].fill(T::narrow(1e-22));
    let mut gamma: Vec<T> = narrowed(&values(head_dim, 8));
    // Results that are subnormal, and zero.
    (gamma[3], gamma[9]) = (T::narrow(1e-38), T::narrow(0.0));
    let mut elements = vec![T::narrow(-7.0); 12 * heads * head_dim];
    let mut codes = vec![0xeeu8; 12 * heads * head_dim];
    let weights = HostWeights::new().norm(&gamma[..]);
    let step = HostStep::new(Positions::per_token(&POSITIONS))
        .buffer(&mut buffer[..])
        .slots(Slots::mapping(&SLOTS))
        .q_weights(weights)
        .k_weights(match coded {
            true => HostWeights::new().norm(&gamma[..]).scales(&[0.3][..]),
            false => HostWeights::new().norm(&gamma[..]),
        });
    let step = match coded {
        true => step.k_cache(&mut codes),
        false => step.k_cache(&mut elements),
    };
    assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
    let mut cached = bits(&elements);
    cached.extend(codes.iter().map(|&code| u32::from(code)));
    [bits(&buffer), cached]
}

fn check_straight<T: Element>()
where
    for<'a> HostBytes<'a>: From<&'a mut Vec<T>>,
{
    let norms = [
        HeadNorm::rms(1e-6),
        HeadNorm::rms(0.0).with_weight_offset(1.0),
        HeadNorm::rms(1e-6).round_before_weight().round_after(),
    ];
    for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
        for shape in [[1, 64], [5, 128], [6, 256], [2, 512], [3, 192], [35, 64]] {
            for norm in norms {
                for coded in [false, true] {
                    let of = |isa| straight::<T>(isa, pairing, shape, norm, coded);
                    let expected = of(Isa::Scalar);
                    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                        let got = of(isa);
                        let label = format!(
                            "{} {}, {pairing:?}, {shape:?}, {norm:?}, codes: {coded}",
                            T::DTYPE,
                            isa.name()
                        );
                        assert!(got[0] == expected[0], "q: {label}");
                        assert!(got[1] == expected[1], "k's cache: {label}");
                    }
                }
            }
        }
    }
}

/// Common sizes are straight code on vectors, which looks at the results of a head at once.
#[test]
fn straight_code_gives_the_scalar_bits() {
    check_straight::<f32>();
    check_straight::<f16>();
    check_straight::<bf16>();
}

/// A step in f64, from the formulas.
#[test]
fn stages_are_right() {
    let (heads, head_dim) = (4, 128);
    let rope = Rope::new(
        Frequencies::from_theta(1e6, head_dim).unwrap(),
        Pairing::HalfSplit,
    );
    let rotator = Host::new().rotator(&rope);
    let layout = Layout::tokens(TOKENS, heads, head_dim);
    let stages = Stages::new()
        .bias()
        .norm(HeadNorm::rms(1e-6))
        .scale(0.125)
        .temperature(0.1, 8192);
    let plan = rotator
        .plan(&Problem::new(Dtype::F32).q(layout).q_stages(stages))
        .unwrap();
    let input = values(TOKENS * heads * head_dim, 3);
    let (bias, gamma) = (values(heads * head_dim, 4), values(head_dim, 5));
    let mut q = input.clone();
    let step = HostStep::new(Positions::per_token(&POSITIONS))
        .q(&mut q)
        .q_weights(HostWeights::new().bias(&bias[..]).norm(&gamma[..]));
    assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
    let dims = heads * head_dim;
    for (t, &position) in POSITIONS.iter().enumerate() {
        for head in 0..heads {
            let at = t * dims + head * head_dim;
            let x: Vec<f64> = (0..head_dim)
                .map(|d| f64::from(input[at + d]) + f64::from(bias[head * head_dim + d]))
                .collect();
            let mean = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
            let x: Vec<f64> = (0..head_dim)
                .map(|d| x[d] / (mean + 1e-6).sqrt() * f64::from(gamma[d]))
                .collect();
            let floor = ((position + 1) as f64 / 8192.0).floor().max(0.0);
            let factor = 0.125 * (1.0 + 0.1 * floor.ln_1p());
            for pair in 0..head_dim / 2 {
                let angle = position as f64 * 1e6f64.powf(-2.0 * pair as f64 / head_dim as f64);
                let (a, b) = (x[pair], x[pair + head_dim / 2]);
                let expected = [
                    a * angle.cos() - b * angle.sin(),
                    a * angle.sin() + b * angle.cos(),
                ];
                for (expected, d) in expected.into_iter().zip([pair, pair + head_dim / 2]) {
                    let got = f64::from(q[at + d]);
                    assert!(
                        (got - expected * factor).abs() < 2e-6 * factor * 8.0,
                        "{t} {head} {d}"
                    );
                }
            }
        }
    }
}

/// MLA: latent values as they are, or as the 656 bytes of DeepSeek-V3.2.
#[test]
fn latent_caches() {
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, 64).unwrap(),
        Pairing::Interleaved,
    );
    let rotator = Host::new().rotator(&rope);
    let latent: Vec<bf16> = narrowed(&values(TOKENS * 512, 6));
    let k_pe: Vec<bf16> = narrowed(&values(TOKENS * 64, 7));
    let problem = |cache| {
        Problem::new(Dtype::Bf16)
            .q(Layout::tokens(TOKENS, 2, 192).with_rotary_offset(128))
            .k_to_cache(Layout::tokens(TOKENS, 1, 64))
            .v_to_cache(Layout::tokens(TOKENS, 1, 512))
            .cache(cache)
    };
    let run = |cache: KvCacheLayout, bytes: &mut [u8]| {
        let plan = rotator.plan(&problem(cache)).unwrap();
        let mut q: Vec<bf16> = narrowed(&values(TOKENS * 2 * 192, 8));
        let step = HostStep::new(Positions::per_token(&POSITIONS))
            .q(&mut q)
            .k(&k_pe)
            .v(&latent)
            .kv_cache(bytes)
            .slots(Slots::mapping(&SLOTS));
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
        q
    };
    let mut plain = vec![0u8; 12 * 576 * 2];
    let q = run(KvCacheLayout::latent(3, 4, 512, 64), &mut plain);
    assert_eq!(bits(&q[..128]), bits(&narrowed::<bf16>(&values(128, 8))));
    let mut coded = vec![0u8; 12 * 656];
    let cache = KvCacheLayout::latent_e4m3(3, 4, f32::MIN_POSITIVE);
    assert_eq!(bits(&run(cache, &mut coded)), bits(&q));
    let bf16_at = |bytes: &[u8], at: usize| bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]);
    for (t, &slot) in SLOTS.iter().enumerate() {
        let Ok(slot) = usize::try_from(slot) else {
            continue;
        };
        let row = &plain[slot * 1152..][..1152];
        let tight = &coded[slot * 656..][..656];
        let latent = &latent[t * 512..][..512];
        for (dim, x) in latent.iter().enumerate() {
            assert_eq!(bf16_at(row, dim).to_bits(), x.to_bits());
        }
        // The rotated part is the same in both.
        assert_eq!(row[1024..], tight[528..]);
        assert!(t == 0 || bf16_at(row, 512).to_bits() != k_pe[t * 64].to_bits());
        let quantization = Quantization::new(Codes::E4m3, Scale::dynamic(f32::MIN_POSITIVE));
        for group in 0..4 {
            let mut codes = [0; 128];
            let scale = quantization
                .quantize(&latent[group * 128..][..128], &mut codes)
                .unwrap();
            assert_eq!(tight[group * 128..][..128], codes);
            assert_eq!(tight[512 + 4 * group..][..4], scale.to_le_bytes());
        }
    }
    // Slots that no token has.
    assert!(
        plain[1152..2304]
            .iter()
            .chain(&coded[656..1312])
            .all(|&byte| byte == 0)
    );
}

/// q as codes, from packed qkv and from a buffer of its own.
#[test]
fn queries_become_codes() {
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, 64).unwrap(),
        Pairing::HalfSplit,
    );
    let rotator = Host::new().rotator(&rope);
    let input: Vec<bf16> = narrowed(&values(TOKENS * 2 * 64, 9));
    let layout = Layout::tokens(TOKENS, 2, 64);
    let codes = StoredCodes::given(Codes::E4m3, ScaleForm::Multiply).round_first();
    let apart = Problem::new(Dtype::Bf16).q((layout, layout)).q_codes(codes);
    let scales = [3.0f32, 5.0];
    let mut expected = Vec::new();
    let plan = rotator.plan(&Problem::new(Dtype::Bf16).q(layout)).unwrap();
    let mut rotated = input.clone();
    let positions = || Positions::per_token(&POSITIONS);
    rotator
        .rotate(&plan, Some((&mut rotated).into()), None, positions())
        .unwrap();
    for (head, x) in rotated.chunks(64).enumerate() {
        let mut codes = [0; 64];
        let quantization = Quantization::new(Codes::E4m3, Scale::inverse(scales[head % 2]));
        quantization.quantize(x, &mut codes).unwrap();
        expected.extend(codes);
    }
    for packed in [false, true] {
        let problem = if packed { apart.packed() } else { apart };
        let plan = rotator.plan(&problem).unwrap();
        let mut codes = vec![0u8; TOKENS * 2 * 64];
        let mut buffer = input.clone();
        let step = HostStep::new(positions())
            .q_codes(&mut codes)
            .q_weights(HostWeights::new().scales(&scales[..]));
        let step = if packed {
            step.buffer(&mut buffer[..])
        } else {
            step.q_source(&input[..])
        };
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
        assert_eq!(codes, expected);
        assert_eq!(bits(&buffer), bits(&input));
    }
}

/// Special values do what the definitions say, on every variant.
#[test]
fn special_values_are_stored_as_defined() {
    let head_dim = 16;
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, 2).unwrap(),
        Pairing::HalfSplit,
    );
    let cache = CacheLayout::flat(1, 1, head_dim);
    let layout = Layout::tokens(1, 1, head_dim).with_rotary_offset(14);
    let mut head = vec![1.0f32; head_dim];
    (head[0], head[1], head[2], head[3]) = (f32::NAN, f32::INFINITY, -f32::INFINITY, -448.0);
    for (codes, expected) in [
        (Codes::E4m3, [0x7f, 0x7e, 0xfe, 0xfe, 0x38]),
        (Codes::Int8, [0, 127, 0x81, 0x81, 0]),
    ] {
        let stored = StoredCodes::dynamic(codes, 1e-6, ScaleLayout::tokens_heads(1, 1, 1));
        let problem = Problem::new(Dtype::F32)
            .k_to_cache(layout)
            .cache(KvCacheLayout::k(cache).with_k_codes(stored));
        for host in hosts() {
            let rotator = host.rotator(&rope);
            let plan = rotator.plan(&problem).unwrap();
            let (mut bytes, mut scale) = (vec![0u8; head_dim], vec![0f32]);
            let step = HostStep::new(Positions::start(0))
                .k(&head)
                .k_cache(&mut bytes)
                .k_scales(&mut scale)
                .slots(Slots::mapping(&[0]));
            assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
            assert_eq!(bytes[..5], expected, "{}", host.isa().name());
            let most = if codes == Codes::E4m3 { 448.0 } else { 127.0 };
            assert_eq!(scale, [448.0 / most]);
        }
    }
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, 64).unwrap(),
        Pairing::HalfSplit,
    );
    let rotator = Host::new().rotator(&rope);
    let layout = Layout::tokens(2, 2, 64);
    let problem = Problem::new(Dtype::F32).q(layout);
    let stages = |tensor: TensorName, result: Result<_, Error>| match result {
        Err(Error::Stages { tensor: found, .. }) => assert_eq!(found, tensor),
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("accepted"),
    };
    let plan = |problem: &Problem| rotator.plan(problem).map(|_| ());
    let norm = HeadNorm::rms(1e-6);
    stages(
        TensorName::Q,
        plan(&problem.q_stages(Stages::new().norm_after_rotation(norm.round_after()))),
    );
    let back = Host::new().rotator(&rope.backward());
    let gradient = problem.q_stages(Stages::new().norm(norm));
    stages(TensorName::Q, back.plan(&gradient).map(|_| ()));
    assert!(
        back.plan(&problem.q_stages(Stages::new().scale(0.5)))
            .is_ok()
    );
    let given = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
    stages(TensorName::Q, plan(&problem.q_codes(given)));
    let apart = Problem::new(Dtype::F32).q((layout, layout));
    let written = StoredCodes::dynamic(Codes::E4m3, 0.0, ScaleLayout::tokens_heads(1, 2, 1));
    stages(TensorName::Q, plan(&apart.q_codes(written)));
    let cache = CacheLayout::flat(4, 2, 64);
    let cached = |codes| {
        Problem::new(Dtype::F32)
            .k_to_cache(layout)
            .cache(KvCacheLayout::k(cache).with_k_codes(codes))
    };
    let layout_of_scales = ScaleLayout::tokens_heads(4, 2, 1);
    let dynamic = StoredCodes::dynamic(Codes::Int8, 0.0, layout_of_scales);
    assert!(matches!(
        plan(&cached(dynamic.groups_of(48))),
        Err(Error::CodeGroups {
            head_dim: 64,
            group_dims: 48,
            ..
        })
    ));
    assert!(matches!(
        plan(&cached(dynamic.groups_of(0))),
        Err(Error::CodeGroups { .. })
    ));
    assert!(matches!(
        plan(&cached(dynamic.e8m0())),
        Err(Error::ScalesNotPowers { .. })
    ));
    // Scales that two heads share, and scales on top of codes.
    let shared = StoredCodes::dynamic(Codes::Int8, 0.0, ScaleLayout::strided(8, 2, 0, 0));
    assert!(matches!(
        plan(&cached(shared)),
        Err(Error::SelfOverlap { .. })
    ));
    let inline = StoredCodes::dynamic(Codes::Int8, 0.0, layout_of_scales.inline());
    assert!(matches!(plan(&cached(inline)), Err(Error::Overlap { .. })));

    fn start<'a>() -> HostStep<'a, f32> {
        HostStep::new(Positions::start(0))
    }
    fn step_of(
        rotator: &HostRotator,
        problem: &Problem,
        step: HostStep<'_, f32>,
    ) -> Result<(), Error> {
        rotator
            .step(&rotator.plan(problem).unwrap(), step)
            .map(|_| ())
    }
    let (mut q, weights) = (vec![1.0; 256], vec![1.0; 65]);
    let normed = problem.q_stages(Stages::new().norm(norm));
    stages(
        TensorName::Q,
        step_of(
            &rotator,
            &problem,
            start()
                .q(&mut q)
                .q_weights(HostWeights::new().norm(&weights[..64])),
        ),
    );
    assert!(matches!(
        step_of(
            &rotator,
            &normed,
            start()
                .q(&mut q)
                .q_weights(HostWeights::new().norm(&weights[..]))
        ),
        Err(Error::StageLength {
            expected: 128,
            or: Some(64),
            got: 65,
            ..
        })
    ));
    let biased = problem.q_stages(Stages::new().bias());
    stages(TensorName::Q, step_of(&rotator, &biased, start().q(&mut q)));
    assert!(matches!(
        step_of(
            &rotator,
            &biased,
            start()
                .q(&mut q)
                .q_weights(HostWeights::new().bias(&weights[..64]))
        ),
        Err(Error::StageLength {
            expected: 128,
            or: None,
            got: 64,
            ..
        })
    ));
    assert!(q.iter().all(|&x| x == 1.0));

    let (mut bytes, mut short, mut scales) = (vec![0u8; 512], vec![0u8; 511], vec![0f32; 8]);
    let k = vec![1.0; 256];
    let slots = || Slots::mapping(&[0, 1]);
    let fixed = cached(given);
    stages(
        TensorName::K,
        step_of(
            &rotator,
            &fixed,
            start().k(&k).k_cache(&mut bytes).slots(slots()),
        ),
    );
    let weights = || HostWeights::new().scales(&[1.0][..]);
    assert!(matches!(
        step_of(
            &rotator,
            &fixed,
            start()
                .k(&k)
                .k_cache(&mut short)
                .k_weights(weights())
                .slots(slots())
        ),
        Err(Error::BufferTooShort {
            needed: 512,
            got: 511,
            ..
        })
    ));
    assert!(matches!(
        step_of(
            &rotator,
            &fixed,
            start()
                .k(&k)
                .k_cache(&mut scales)
                .k_weights(weights())
                .slots(slots())
        ),
        Err(Error::BufferType { expected: 1, .. })
    ));
    let written = cached(dynamic);
    stages(
        TensorName::K,
        step_of(
            &rotator,
            &written,
            start()
                .k(&k)
                .k_cache(&mut bytes)
                .k_weights(weights())
                .slots(slots()),
        ),
    );
    assert!(matches!(
        step_of(
            &rotator,
            &written,
            start()
                .k(&k)
                .k_cache(&mut bytes)
                .k_scales(&mut scales[..7])
                .slots(slots())
        ),
        Err(Error::StageLength {
            expected: 8,
            got: 7,
            ..
        })
    ));
    assert_eq!(
        step_of(
            &rotator,
            &written,
            start()
                .k(&k)
                .k_cache(&mut bytes)
                .k_scales(&mut scales)
                .slots(slots())
        ),
        Ok(())
    );
    let mut odd = [0u8; 36];
    let odd = match odd.as_ptr().align_offset(4) {
        0 => &mut odd[1..],
        _ => &mut odd[..],
    };
    if !odd.as_ptr().cast::<f32>().is_aligned() {
        assert!(matches!(
            step_of(
                &rotator,
                &written,
                start()
                    .k(&k)
                    .k_cache(&mut bytes)
                    .k_scales(odd)
                    .slots(slots())
            ),
            Err(Error::BufferUnaligned { align: 4, .. })
        ));
    }
}

/// Positions on three axes, a norm and a paged cache in one call, of a ragged batch with padding: the same
/// as a norm, a rotation and an append one after the other.
#[test]
fn axes_norms_and_appends_of_a_ragged_batch() {
    let (heads, head_dim, tokens) = (2, 64, 9);
    let axis_of_pair: Vec<usize> = (0..head_dim / 2).map(|pair| pair % 3).collect();
    let frequencies = Frequencies::from_theta(10_000.0, head_dim)
        .unwrap()
        .with_axes(3, &axis_of_pair)
        .unwrap();
    let rope = Rope::new(frequencies, Pairing::HalfSplit);
    let rotator = Host::new().rotator(&rope);
    let ids: Vec<i64> = (0..3 * tokens as i64).map(|i| i * i % 97 - 5).collect();
    let (cu_seqlens, lengths) = ([0, 4, 4, 5, 7], [3, 0, 11, 6]);
    // Two padding tokens; the last sequence shares a page with the first, at other slots.
    let pages = [4, 2, 0, 0, 1, 3, 2, 5];
    let slots = || Slots::page_table(&pages, &lengths);
    let positions = || Positions::per_axis(&ids).cu_seqlens(&cu_seqlens);
    let layout = Layout::tokens(tokens, heads, head_dim);
    let cache = KvCacheLayout::separate(
        CacheLayout::paged_nhd(6, 8, heads, head_dim),
        CacheLayout::paged_nhd(6, 8, heads, head_dim),
    );
    let append = Problem::new(Dtype::F32)
        .q(layout)
        .k_to_cache(layout)
        .v_to_cache(layout)
        .cache(cache);
    let norm = HeadNorm::rms(1e-6);
    let normed = append
        .q_stages(Stages::new().norm(norm))
        .k_stages(Stages::new().norm(norm));
    let [q, k, v] = [20, 21, 22].map(|seed| values(tokens * heads * head_dim, seed));
    let gamma = values(head_dim, 23);
    let run = |problem: &Problem, q: &mut Vec<f32>, k: &[f32]| {
        let plan = rotator.plan(problem).unwrap();
        let mut caches = [vec![0f32; 6 * 8 * 128], vec![0f32; 6 * 8 * 128]];
        let [k_cache, v_cache] = &mut caches;
        let mut step = HostStep::new(positions())
            .q(q)
            .k(k)
            .v(&v)
            .k_cache(k_cache)
            .v_cache(v_cache)
            .slots(slots());
        if problem == &normed {
            step = step
                .q_weights(HostWeights::new().norm(&gamma[..]))
                .k_weights(HostWeights::new().norm(&gamma[..]));
        }
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
        caches
    };
    let mut at_once = q.clone();
    let caches = run(&normed, &mut at_once, &k);
    let (mut one_by_one, mut k) = (q.clone(), k);
    // Padding keeps what it is.
    for x in [&mut one_by_one, &mut k] {
        norm.apply(&mut x[..7 * heads * head_dim], head_dim, Some(&gamma), None)
            .unwrap();
    }
    assert_eq!(caches, run(&append, &mut one_by_one, &k));
    assert_eq!(at_once, one_by_one);
    assert_eq!(at_once[7 * heads * head_dim..], q[7 * heads * head_dim..]);
}

/// Angles of more pairs than are formed at a time are those of all tensors, with stages or without.
#[test]
fn wide_heads_beside_plain_ones() {
    let head_dim = 320;
    let rope = Rope::new(
        Frequencies::from_theta(1e4, head_dim).unwrap(),
        Pairing::HalfSplit,
    );
    let rotator = Host::new().rotator(&rope);
    let layout = Layout::tokens(3, 2, head_dim);
    let staged = Problem::new(Dtype::F32)
        .q(layout)
        .q_stages(Stages::new().scale(0.5));
    let input = values(3 * 2 * head_dim, 7);
    let run = |with_k: bool| {
        let (mut q, mut k) = (input.clone(), input.clone());
        let step = HostStep::new(Positions::start(9)).q(&mut q);
        let (problem, step) = match with_k {
            true => (staged.k(layout), step.k(InOut::InPlace(&mut k[..]))),
            false => (staged, step),
        };
        let plan = rotator.plan(&problem).unwrap();
        assert_eq!(rotator.step(&plan, step), Ok(Stored::All));
        [q, k]
    };
    let [q, mut k] = run(true);
    assert_eq!(q, run(false)[0]);
    // Halves of what is rotated alone, which are exact.
    k.iter_mut().for_each(|x| *x *= 0.5);
    assert_eq!(q, k);
}
