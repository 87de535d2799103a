//! The kernels' own PTX, executed on the host, and held to the host's attention bit for bit. The interpreter
//! reports every access outside of a buffer, every read of what nothing wrote, and every race.

use phasor_attention::kernels::{
    AttendAddresses, Fp8Shape, GptqAddresses, GptqShape, KernelLaunch, PhasorDequantize,
    dequantize_fp8, dequantize_ggml, dequantize_gptq, norm_latent, round_fp8, spread_latent,
};
use phasor_attention::phasor::half::{bf16, f16};
use phasor_attention::phasor::quantize::{Codes, ScaleForm, ScaleRounding};
use phasor_attention::phasor::{
    CacheLayout, Dtype, Element, Id, Ids, Layout, ScaleLayout, StoredCodes,
};
use phasor_attention::{
    AttentionError, AttentionMask, DenseWeights, Fp8Activation, Fp8WeightScale, Fp8Weights,
    GgmlType, GptqFormat, GptqTensors, GptqWeights, Linear, LowRank, Projection, Weights,
};
use ptx_interpreter::{Launch, Memory, Module, Traffic};
use std::sync::{Arc, LazyLock};

#[path = "support/attend_cases.rs"]
mod attend_cases;
mod support;
use attend_cases::{Bytes, Case, Layouts, Scales, UNTOUCHED, Wish, bits, nhd};
use support::{Random, narrowed, widened};

macro_rules! images {
    ($module:literal) => {
        [
            include_str!(concat!("../cuda/prebuilt/", $module, ".compute_75.ptx")),
            include_str!(concat!("../cuda/prebuilt/", $module, ".compute_80.ptx")),
            include_str!(concat!("../cuda/prebuilt/", $module, ".compute_90.ptx")),
        ]
        .map(|text| Module::parse(text).unwrap())
        .into_iter()
        .chain(extra($module))
        .collect()
    };
}

static F32: LazyLock<Vec<Module>> = LazyLock::new(|| images!("attend_f32"));
static F16: LazyLock<Vec<Module>> = LazyLock::new(|| images!("attend_f16"));
static BF16: LazyLock<Vec<Module>> = LazyLock::new(|| images!("attend_bf16"));
static CODES: LazyLock<Vec<Module>> = LazyLock::new(|| images!("attend_codes"));

/// A further image, of a folder that PHASOR_EXTRA_PTX names: what another compiler made of the kernels.
fn extra(name: &str) -> Option<Module> {
    let folder = std::env::var("PHASOR_EXTRA_PTX").ok()?;
    let path = format!("{folder}/{name}.ptx");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    Some(Module::parse(&text).unwrap_or_else(|error| panic!("{path}: {error}")))
}

/// Of compute_75, 80 and 90, and the further one.
fn modules<T: Element>() -> &'static [Module] {
    match T::DTYPE {
        Dtype::F32 => &F32,
        Dtype::F16 => &F16,
        _ => &BF16,
    }
}

/// What a run left: the output's buffer, and whether something was reported.
#[derive(Debug)]
struct Outcome<T> {
    out: Vec<T>,
    reported: bool,
}

trait IdBytes: Copy {
    fn bytes(self) -> Vec<u8>;
}

macro_rules! id_bytes {
    ($($type:ty),*) => {$(
        impl IdBytes for $type {
            fn bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        }
    )*};
}
id_bytes!(i32, i64, u32);

impl<T: Bytes> Case<T> {
    /// Of one of the images: of compute_75, 80 and 90, and the further one.
    fn on_image<I: Id + TryFrom<i64> + IdBytes>(&self, image: usize) -> Outcome<T> {
        let (module, of_codes) = (&modules::<T>()[image], &CODES[image]);
        let plan = self.plan().unwrap();
        let mut memory = Memory::new();
        let misalign = self.misalign * T::DTYPE.size();
        let mut read_only = |name, bytes: Vec<u8>, misalign| {
            let address = memory.add(name, bytes, misalign);
            memory.set_read_only(address);
            address
        };
        let q = read_only("q", T::bytes(&self.q), misalign);
        let mut cache = |at: usize, elements: &[T], [name, of_scales]: [&'static str; 2]| {
            let Some(codes) = &self.codes else {
                return (read_only(name, T::bytes(elements), misalign), 0);
            };
            let codes = &codes[at];
            let scales = match &codes.scales {
                Scales::Given(scales) | Scales::F32(scales) => f32::bytes(scales),
                Scales::E8m0(scales) => scales.clone(),
                Scales::Inline => Vec::new(),
            };
            let scales = match &scales[..] {
                [] => 0,
                _ => read_only(of_scales, scales, 4),
            };
            (read_only(name, codes.bytes.clone(), self.misalign), scales)
        };
        let (k, k_scales) = cache(0, &self.k, ["k", "k_scales"]);
        let (v, v_scales) = cache(1, &self.v, ["v", "v_scales"]);
        let mut ids = |name, values: &[i64]| {
            let values: Vec<I> = values
                .iter()
                .map(|&value| I::try_from(value).unwrap_or_else(|_| panic!("{value}")))
                .collect();
            let bytes = values.iter().flat_map(|&value| value.bytes()).collect();
            Ids::at(read_only(name, bytes, 0), I::TYPE, values.len())
        };
        let page_table = ids("page_table", &self.table);
        let cache_lengths = ids("lengths", &self.lengths);
        let cu_seqlens = self.cu_seqlens.as_ref().map(|o| ids("cu_seqlens", o));
        let sinks = plan.sinks().map_or(0, |sinks| {
            let address = memory.add("sinks", f32::bytes(sinks), 0);
            memory.set_constant(address);
            address
        });
        let out = memory.add("out", T::bytes(&self.untouched()), misalign);
        let workspace = memory.add_uninit("workspace", plan.workspace_len() * 4, 0);
        let report = memory.add("report", vec![0; 4], 0);
        memory.set_contended(report);
        let addresses = AttendAddresses {
            q,
            out,
            k,
            v,
            k_scales,
            v_scales,
            page_table,
            cache_lengths,
            cu_seqlens,
            sinks,
            workspace,
            report,
        };
        for launch in plan.launches(&addresses).unwrap().into_iter().flatten() {
            let KernelLaunch {
                kernel,
                grid,
                block,
                shared_bytes,
                params,
            } = launch;
            let mut run = Launch::new(kernel, grid, block, params.as_bytes());
            run.dynamic_shared = shared_bytes as usize;
            let module = if kernel.ends_with("_codes") {
                of_codes
            } else {
                module
            };
            let stats = ptx_interpreter::run(module, &mut memory, &run)
                .unwrap_or_else(|fault| panic!("{kernel}: {fault}"));
            // All stays in registers.
            assert_eq!(stats.local, Traffic::default(), "{kernel}");
        }
        Outcome {
            out: T::of_bytes(memory.bytes(out)),
            reported: memory.bytes(report) != [0; 4],
        }
    }

    fn equals_host(&self, label: &str) {
        let expected = bits(&self.on_host());
        for at in 0..modules::<T>().len() {
            let outcome = match at {
                0 => self.on_image::<i32>(at),
                _ => self.on_image::<i64>(at),
            };
            assert!(!outcome.reported, "{label}");
            assert_eq!(bits(&outcome.out), expected, "{label}, image {at}");
        }
    }
}

/// Contexts at the edges of tiles, splits and pages, a sequence without new tokens.
const RAGGED: [(usize, usize); 6] = [(0, 2), (254, 3), (63, 2), (5, 0), (300, 1), (511, 2)];

#[test]
fn masks_caps_and_sinks_equal_the_host() {
    for (at, mask) in [
        AttentionMask::Causal,
        AttentionMask::SlidingWindow(1),
        AttentionMask::SlidingWindow(70),
        AttentionMask::SlidingWindow(257),
        AttentionMask::Chunked(48),
        AttentionMask::Chunked(256),
        AttentionMask::None,
    ]
    .into_iter()
    .enumerate()
    {
        let mut case = Wish::new(3, 1, 16, &RAGGED).case::<f32>(at as u64);
        case.mask = mask;
        if at % 2 == 1 {
            case.soft_cap = Some(1.5);
        }
        if at % 3 == 1 {
            case.sinks = Some(vec![0.5, -3.0, 20.0]);
        }
        case.equals_host(&format!("{mask:?}"));
    }
}

fn heads_and_groups<T: Bytes>() {
    // Groups that are a block's heads, fewer, and more; dims of one piece of a tile and of several.
    for (at, (heads, kv_heads, dims)) in [
        (4, 2, 64),
        (2, 2, 80),
        (8, 1, 128),
        (12, 1, 96),
        (3, 1, 256),
    ]
    .into_iter()
    .enumerate()
    {
        let sequences = [(70, 1), (290, 1), (0, 1)];
        let mut case = Wish::new(heads, kv_heads, dims, &sequences).case::<T>(at as u64);
        if at % 2 == 0 {
            case.cu_seqlens = None;
        }
        case.equals_host(&format!("{heads} over {kv_heads} of {dims}"));
    }
}

#[test]
fn heads_and_groups_of_f32_equal_the_host() {
    heads_and_groups::<f32>();
}

#[test]
fn heads_and_groups_of_f16_equal_the_host() {
    heads_and_groups::<f16>();
}

#[test]
fn heads_and_groups_of_bf16_equal_the_host() {
    heads_and_groups::<bf16>();
}

#[test]
fn whatever_the_memory_looks_like_results_are_the_hosts() {
    let layouts: [Layouts; 6] = [
        |p, s, h, d| CacheLayout::paged_hnd(p, s, h, d).in_turn(),
        |p, s, h, d| {
            CacheLayout::paged_nhd(p, s, h, d)
                .of_layer(2, 1)
                .in_pairs_of_pages()
        },
        |p, s, h, d| CacheLayout::paged_nhd(p, s, h, d).side_by_side(),
        // As vLLM had it: blocks of 16 bytes of a key, and values transposed.
        |p, s, h, d| {
            (
                CacheLayout::paged_packed(p, s, h, d, 8),
                CacheLayout::paged_transposed(p, s, h, d),
            )
        },
        |p, s, h, d| {
            let layout = CacheLayout::paged_nhd(p, s, h, d).with_strides(s * h * d + 3, h * d, d);
            (layout.with_offset(1), layout)
        },
        |p, s, h, d| CacheLayout::paged_hnd(p, s, h, d).in_pairs_of_pages(),
    ];
    for (at, layouts) in layouts.into_iter().enumerate() {
        let wish = Wish {
            page_size: [16, 7, 64, 32, 5, 128][at],
            layouts,
            ..Wish::new(4, 2, [24, 16, 20, 16, 6, 7][at], &[(300, 1), (18, 3)])
        };
        let wish = match at {
            // Dims that are no whole accesses.
            5 => Wish {
                head_dim: 7,
                ..wish
            },
            _ => wish,
        };
        let mut case = wish.case::<bf16>(at as u64);
        case.misalign = at % 3;
        // Queries as a step leaves them in packed projections; results of heads far apart.
        if at % 2 == 0 {
            let (tokens, dims) = (4, wish.head_dim);
            let all = 4 + 2 * 2;
            case.q = narrowed(&Random::new(9).values(tokens * all * dims, 2.0));
            case.q_layout = Layout::packed_heads(tokens, 1, all, dims, 0..4);
            case.out_layout = Layout::bhsd(1, tokens, 4, dims).with_offset(5);
        }
        case.equals_host(&format!("layout {at}"));
    }
}

/// As a latent cache has them, values are the first dims of keys; others have dims of their own, more too.
fn latent_heads<T: Bytes>(seed: u64) {
    let layouts: [(Layouts, [usize; 3]); 5] = [
        (
            |p, s, h, d| {
                let keys = CacheLayout::paged_nhd(p, s, h, d);
                (keys, keys.dims(0..512))
            },
            [9, 1, 576],
        ),
        (
            |p, s, h, d| {
                (
                    CacheLayout::paged_hnd(p, s, h, d),
                    CacheLayout::paged_nhd(p, s, h, 128),
                )
            },
            [4, 2, 192],
        ),
        // No whole accesses, of odd counts.
        (
            |p, s, h, d| {
                let keys = CacheLayout::paged_nhd(p, s, h, d);
                (keys, keys.dims(3..36))
            },
            [6, 1, 40],
        ),
        (
            |p, s, h, d| {
                (
                    CacheLayout::paged_nhd(p, s, h, d),
                    CacheLayout::paged_nhd(p, s, h, 301),
                )
            },
            [3, 1, 20],
        ),
        // Of as many dims, but more than others have.
        (nhd, [2, 1, 264]),
    ];
    for (at, (layouts, [heads, kv_heads, dims])) in layouts.into_iter().enumerate() {
        let wish = Wish {
            layouts,
            ..Wish::new(heads, kv_heads, dims, &[(70, 1), (258, 2), (0, 1)])
        };
        let mut case = wish.case::<T>(seed + at as u64);
        if at % 2 == 1 {
            case.mask = AttentionMask::SlidingWindow(70);
            case.sinks = Some(vec![0.5; heads]);
        }
        case.equals_host(&format!("latent {at}"));
    }
}

#[test]
fn latent_heads_of_f32_equal_the_host() {
    latent_heads::<f32>(80);
}

#[test]
fn latent_heads_of_f16_equal_the_host() {
    latent_heads::<f16>(90);
}

#[test]
fn latent_heads_of_bf16_equal_the_host() {
    latent_heads::<bf16>(100);
}

/// Codes of a latent whose groups have scales of their own; keys have one more group.
#[test]
fn latent_codes_equal_the_host() {
    let of = |groups| ScaleLayout::tokens_heads(16, 1, groups);
    let both = [of(9), of(8)].map(|layout| {
        let codes = StoredCodes::dynamic(Codes::E4m3, 1e-6, layout);
        (codes.groups_of(64), 0)
    });
    let wish = Wish {
        layouts: |p, s, h, d| {
            let keys = CacheLayout::paged_nhd(p, s, h, d);
            (keys, keys.dims(0..512))
        },
        ..Wish::new(8, 1, 576, &[(70, 1), (3, 1)])
    };
    wish.coded::<bf16>(110, both).equals_host("latent codes");
}

/// Keys' and values' codes, and how many scales are given of either.
type OfBoth = [(StoredCodes, usize); 2];

fn codes<T: Bytes>(seed: u64) {
    let given = |codes, form, scales| (StoredCodes::given(codes, form), scales);
    let written = |codes, layout| (StoredCodes::dynamic(codes, 1e-6, layout), 0);
    let (e4m3, int8) = (Codes::E4m3, Codes::Int8);
    let (divide, multiply) = (ScaleForm::Divide, ScaleForm::Multiply);
    // Scales of each head, of each token and head, of groups in E8M0; of one scale whose inverse is given.
    let tokens_heads = |slots, groups| ScaleLayout::tokens_heads(slots, 2, groups);
    let mut wish = Wish::new(6, 2, 64, &[(290, 1), (20, 2), (0, 1)]);
    let both: [OfBoth; 3] = [
        [given(e4m3, divide, 2), written(int8, tokens_heads(16, 1))],
        [
            written(e4m3, ScaleLayout::heads_tokens(16, 2, 1)),
            given(int8, multiply, 1),
        ],
        [
            written(int8, tokens_heads(16, 2)),
            written(e4m3, tokens_heads(16, 4).with_offset(3)),
        ],
    ];
    let [a, b, mut c] = both;
    c[0].0 = c[0]
        .0
        .groups_of(32)
        .rounded(ScaleRounding::PowerOfTwoUp)
        .e8m0();
    c[1].0 = c[1].0.groups_of(16).by_inverse();
    let mut case = wish.coded::<T>(seed, a);
    case.mask = AttentionMask::SlidingWindow(70);
    case.sinks = Some(vec![0.5; 6]);
    case.equals_host("scales of heads, and of tokens and heads");
    let mut case = wish.coded::<T>(seed + 1, b);
    (case.soft_cap, case.misalign) = (Some(1.5), 1);
    case.equals_host("an inverse, codes anywhere");
    wish.coded::<T>(seed + 2, c).equals_host("groups");

    // Groups that end inside of what a thread reads at once; dims that no access divides.
    let mut odd = Wish::new(3, 1, 18, &[(79, 1), (3, 2)]);
    let of = |slots, groups| ScaleLayout::tokens_heads(slots, 1, groups);
    let mut both = [
        written(e4m3, of(16, 3)),
        written(Codes::Int8Full, of(16, 9)),
    ];
    (both[0].0, both[1].0) = (both[0].0.groups_of(6), both[1].0.groups_of(2));
    // The first sequence fills its pages, of which one is the cache's last: nothing may be read past it.
    let case = (seed..)
        .map(|seed| odd.coded::<T>(seed, both))
        .find(|case| case.table[..5].contains(&(case.k_layout.shape()[0] as i64 - 1)));
    case.unwrap().equals_host("groups of few dims");
    // Blocks of a head, and values that are transposed.
    odd.head_dim = 16;
    odd.layouts = |p, s, h, d| {
        (
            CacheLayout::paged_packed(p, s, h, d, 8),
            CacheLayout::paged_transposed(p, s, h, d),
        )
    };
    let both = [written(int8, of(16, 1)), given(e4m3, divide, 1)];
    odd.coded::<T>(seed + 4, both)
        .equals_host("blocks and columns");

    // A scale after each head, where the caches are one after the other.
    wish.layouts = |p, s, h, d| {
        let layout =
            CacheLayout::paged_nhd(p, s, h, d).with_strides(s * h * (d + 4), h * (d + 4), d + 4);
        (layout, layout)
    };
    let inline = ScaleLayout::strided(16 * 2 * 17, 2 * 17, 17, 0)
        .with_offset(16)
        .inline();
    let both = [written(e4m3, inline), written(int8, inline)];
    wish.coded::<T>(seed + 5, both)
        .equals_host("scales between codes");

    let most = Wish::new(9, 1, 256, &[(140, 1)]);
    let both = [written(e4m3, of(16, 1)), written(e4m3, of(16, 1))];
    most.coded::<T>(seed + 6, both).equals_host("the most dims");
}

#[test]
fn codes_for_queries_of_f32_equal_the_host() {
    codes::<f32>(20);
}

#[test]
fn codes_for_queries_of_f16_equal_the_host() {
    codes::<f16>(40);
}

#[test]
fn codes_for_queries_of_bf16_equal_the_host() {
    codes::<bf16>(60);
}

#[test]
fn every_code_and_scales_that_are_not_finite_equal_the_host() {
    for kind in [Codes::E4m3, Codes::Int8Full] {
        let wish = Wish::new(2, 1, 16, &[(40, 1), (80, 1)]);
        let of = StoredCodes::dynamic(kind, 1e-6, ScaleLayout::tokens_heads(16, 1, 1));
        let mut case = wish.coded::<f32>(1, [(of, 0); 2]);
        case.mask = AttentionMask::SlidingWindow(30);
        let values = case.codes.as_mut().unwrap();
        for (code, at) in (0..=255).zip(&mut values[1].bytes) {
            *at = code;
        }
        for scales in values.iter_mut().map(|part| &mut part.scales) {
            let Scales::F32(scales) = scales else {
                unreachable!()
            };
            for (at, scale) in scales.iter_mut().enumerate() {
                match at % 23 {
                    0 => *scale = f32::INFINITY,
                    1 => *scale = 1e-42,
                    2 => *scale = -0.0,
                    _ => {}
                }
            }
        }
        case.equals_host("codes");
    }
}

#[test]
fn codes_that_do_not_fit_are_refused() {
    let written = StoredCodes::dynamic(Codes::Int8, 1e-6, ScaleLayout::tokens_heads(16, 2, 1));
    let given = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
    let case = |codes: OfBoth| {
        let mut case = Wish::new(4, 2, 16, &[(20, 1)]).coded::<f32>(1, [(written, 0); 2]);
        let parts = case.codes.as_mut().unwrap();
        for (part, (codes, scales)) in parts.iter_mut().zip(codes) {
            part.codes = codes;
            part.scales = match scales {
                0 => Scales::Inline,
                _ => Scales::Given(vec![1.0; scales]),
            };
        }
        case
    };
    let error = |codes: OfBoth| case(codes).plan().map(|_| ()).unwrap_err();
    let good = (written, 0);
    let mismatch = |error| matches!(error, AttentionError::Mismatch { .. });
    for bad in [
        (given, 3),
        (given, 0),
        (written, 2),
        (written.groups_of(7), 0),
    ] {
        assert!(mismatch(error([good, bad])) && mismatch(error([bad, good])));
    }
    let layout = ScaleLayout::strided(usize::MAX / 8, 1, 1, 1);
    let huge = (StoredCodes::dynamic(Codes::Int8, 1e-6, layout), 0);
    assert!(matches!(error([good, huge]), AttentionError::Value { .. }));

    // What a call gives beside them.
    let plan = case([good, (given, 2)]).plan().unwrap();
    assert_eq!(plan.scale_bytes(), [4 * 2 * 16 * 4, 2 * 4]);
    let ids = |len| Ids::<u64>::at(0, i32::TYPE, len);
    let with = |k_scales, v_scales| {
        let addresses = AttendAddresses {
            q: 256,
            out: 256,
            k: 257,
            v: 257,
            k_scales,
            v_scales,
            page_table: ids(2),
            cache_lengths: ids(1),
            cu_seqlens: Some(ids(2)),
            sinks: 0,
            workspace: 256,
            report: 0,
        };
        plan.launches(&addresses)
            .map(|launches| launches.map(|[attend, _]| attend.kernel))
    };
    assert_eq!(with(256, 260), Ok(Some("attend_codes")));
    for (k, v) in [(0, 256), (256, 0)] {
        assert!(mismatch(with(k, v).unwrap_err()));
    }
    assert!(matches!(
        with(256, 257),
        Err(AttentionError::Value { value: 257, .. })
    ));
}

#[test]
fn nan_infinity_and_tiny_values_equal_the_host() {
    let mut case = Wish::new(4, 2, 16, &[(80, 1), (3, 1), (300, 1)]).case::<f32>(1);
    case.mask = AttentionMask::SlidingWindow(70);
    case.scale = 3.0;
    let mut random = Random::new(2);
    for cache in [&mut case.k, &mut case.v] {
        for x in cache.iter_mut() {
            match random.bits() % 400 {
                0 => *x = f32::INFINITY,
                1 => *x = f32::NEG_INFINITY,
                2 => *x = f32::NAN,
                3..20 => *x *= f32::MIN_POSITIVE,
                20..40 => *x = -0.0,
                _ => {}
            }
        }
    }
    case.equals_host("special values");
    let mut nan_sink = Wish::new(2, 1, 16, &[(600, 1)]).case::<f32>(1);
    nan_sink.sinks = Some(vec![f32::NAN, f32::NEG_INFINITY]);
    nan_sink.equals_host("a sink that is NaN");
    // Weights so small that products are zeros with a sign.
    let mut tiny = Wish::new(2, 1, 8, &[(70, 1)]).case::<f32>(3);
    tiny.scale = 30.0;
    for x in &mut tiny.v {
        *x = -x.abs() * 1e-38;
    }
    tiny.equals_host("zeros with a sign");
}

#[test]
fn what_is_outside_is_skipped_and_reported() {
    let good = Wish::new(4, 2, 16, &[(290, 1), (20, 2), (0, 1)]).case::<f32>(4);
    let expected = good.on_host();
    let pages = good.k_layout.shape()[0] as i64;
    let of_each = good.table.len() / 3;
    let token = 4 * 16;
    // Which tokens have no result; whether that is reported.
    let expect = |case: &Case<f32>, skipped: &[usize], reported: bool, label: &str| {
        let outcome = case.on_image::<i64>(2);
        assert_eq!(outcome.reported, reported, "{label}");
        let mut expected = expected.clone();
        for &t in skipped {
            expected[t * token..][..token].fill(UNTOUCHED);
        }
        assert_eq!(bits(&outcome.out), bits(&expected), "{label}");
    };
    let with = |change: &dyn Fn(&mut Case<f32>)| {
        let mut case = good.clone();
        change(&mut case);
        case
    };
    for page in [pages, -1, i64::MAX, i64::MIN, 1 << 32] {
        let label = format!("page {page}");
        let case = with(&|case| case.table[0] = page);
        expect(&case, &[0], true, &label);
        // Of a split that is not the first; of tokens that see it.
        let case = with(&|case| case.table[17] = page);
        expect(&case, &[0], true, &label);
        let case = with(&|case| case.table[of_each + 1] = page);
        expect(&case, &[1, 2], true, &label);
        // Pages that nothing sees may be anything.
        let case = with(&|case| case.table[of_each + 2] = page);
        expect(&case, &[], false, &label);
        let case = with(&|case| {
            case.mask = AttentionMask::SlidingWindow(20);
            case.table[0] = page;
            case.sinks = None;
        });
        let outcome = case.on_image::<i64>(2);
        assert!(!outcome.reported);
    }
    for length in [-1, i64::MAX, i64::MIN, 1 << 32, 304] {
        let case = with(&|case| case.lengths[1] = length);
        expect(&case, &[1, 2], true, &format!("length {length}"));
    }
    // As many as there is room for, and one more.
    let case = with(&|case| case.most_keys = Some(290));
    expect(&case, &[0], true, "most_keys");
    let case = with(&|case| case.most_keys = Some(291));
    expect(&case, &[], false, "most_keys");
    // Offsets: the last tokens are padding, or of no sequence.
    let case = with(&|case| case.cu_seqlens = Some(vec![0, 1, 3, 3]));
    expect(&case, &[3], false, "padding");
    for offsets in [
        [0, -5, -7, -9],
        [5, 6, 7, 8],
        [i64::MIN; 4],
        [i64::MAX; 4],
        [1 << 32, 1 << 33, 1 << 34, 1 << 35],
    ] {
        let case = with(&|case| case.cu_seqlens = Some(offsets.to_vec()));
        expect(&case, &[0, 1, 2, 3], false, "offsets");
    }
    let case = with(&|case| {
        case.mask = AttentionMask::None;
        case.cu_seqlens = Some(vec![0, i64::MAX, i64::MAX, i64::MAX]);
    });
    expect(&case, &[0, 1, 2, 3], true, "an end far away");
}

#[test]
fn nothing_to_do_launches_nothing() {
    let mut case = Wish::new(2, 1, 8, &[(4, 1)]).case::<f32>(1);
    case.most_keys = Some(0);
    assert!(case.on_image::<i32>(0).out == case.untouched());
    let mut case = Wish::new(2, 1, 8, &[(4, 0)]).case::<f32>(1);
    case.cu_seqlens = Some(vec![0, 0]);
    assert_eq!(case.plan().unwrap().workspace_len(), 0);
    assert!(case.on_image::<i32>(0).out.is_empty());
}

#[test]
fn a_window_needs_few_splits() {
    let sized = |mask, most_keys| {
        let mut case = Wish::new(8, 2, 128, &[(5000, 1)]).case::<bf16>(1);
        (case.mask, case.most_keys) = (mask, most_keys);
        case.plan().unwrap().workspace_len()
    };
    let of_splits = |splits: usize| splits * 8 * (128 + 2);
    let causal = AttentionMask::Causal;
    assert_eq!(sized(causal, None), of_splits(20));
    assert_eq!(sized(causal, Some(256)), of_splits(1));
    assert_eq!(sized(causal, Some(257)), of_splits(2));
    for (mask, splits) in [
        (AttentionMask::SlidingWindow(1), 1),
        (AttentionMask::SlidingWindow(2), 2),
        (AttentionMask::SlidingWindow(257), 2),
        (AttentionMask::SlidingWindow(258), 3),
        (AttentionMask::Chunked(512), 3),
        (AttentionMask::SlidingWindow(usize::MAX), 20),
        (AttentionMask::None, 20),
    ] {
        assert_eq!(sized(mask, None), of_splits(splits), "{mask:?}");
    }
}

#[test]
fn bad_shapes_are_refused() {
    let good = Wish::new(4, 2, 16, &[(20, 1), (7, 1)]).case::<f32>(1);
    let refused = |change: &dyn Fn(&mut Case<f32>)| {
        let mut case = good.clone();
        change(&mut case);
        case.plan().unwrap_err()
    };
    use AttentionError::*;
    assert!(matches!(refused(&|c| c.heads = 3), Heads { .. }));
    assert!(matches!(refused(&|c| c.scale = 0.0), Factor { .. }));
    let layouts = |dims| {
        let cache = CacheLayout::paged_nhd(9, 16, 2, dims);
        (cache, Layout::tokens(2, 4, dims))
    };
    for dims in [0, 577] {
        let (cache, tokens) = layouts(dims);
        let error = refused(&|c| {
            (c.k_layout, c.v_layout) = (cache, cache);
            (c.q_layout, c.out_layout) = (tokens, tokens);
        });
        assert!(
            matches!(
                error,
                Value {
                    what: "head_dim",
                    ..
                }
            ),
            "{error}"
        );
    }
    let (cache, tokens) = layouts(513);
    let error = refused(&|c| (c.v_layout, c.out_layout) = (cache, tokens));
    assert!(
        matches!(
            error,
            Value {
                what: "v_head_dim",
                ..
            }
        ),
        "{error}"
    );
    let (cache, tokens) = layouts(32);
    assert!(matches!(refused(&|c| c.k_layout = cache), Mismatch { .. }));
    assert!(matches!(refused(&|c| c.v_layout = cache), Mismatch { .. }));
    assert!(matches!(refused(&|c| c.q_layout = tokens), Mismatch { .. }));
    assert!(matches!(
        refused(&|c| c.out_layout = tokens),
        Mismatch { .. }
    ));
    let more = Layout::tokens(3, 4, 16);
    assert!(matches!(refused(&|c| c.out_layout = more), Mismatch { .. }));
    let batch = Layout::bshd(2, 2, 4, 16);
    assert!(matches!(refused(&|c| c.q_layout = batch), Mismatch { .. }));
    assert!(matches!(
        refused(&|c| c.most_keys = Some(33)),
        Value {
            what: "most_keys",
            ..
        }
    ));
    let over = Layout::tokens(2, 4, 16).with_strides(0, 63, 16);
    assert!(matches!(refused(&|c| c.out_layout = over), Value { .. }));
    let many = Layout::tokens(1 << 31, 4, 16).with_strides(0, 0, 0);
    assert!(matches!(
        refused(&|c| (c.q_layout, c.out_layout) = (many, many)),
        Value { .. }
    ));
    let huge = CacheLayout::paged_nhd(usize::MAX / 2, 16, 2, 16);
    assert!(matches!(
        refused(&|c| (c.k_layout, c.v_layout) = (huge, huge)),
        Value { .. }
    ));
    let pages = CacheLayout::paged_nhd(1 << 33, 16, 2, 16).with_strides(0, 0, 0);
    assert!(matches!(
        refused(&|c| (c.k_layout, c.v_layout) = (pages, pages)),
        Value { what: "pages", .. }
    ));

    let plan = good.plan().unwrap();
    let ids = |len| Ids::at(0, i32::TYPE, len);
    let addresses = AttendAddresses {
        q: 0,
        out: 0,
        k: 0,
        v: 0,
        k_scales: 0,
        v_scales: 0,
        page_table: ids(4),
        cache_lengths: ids(2),
        cu_seqlens: Some(ids(3)),
        sinks: 0,
        workspace: 0,
        report: 0,
    };
    assert!(plan.launches(&addresses).unwrap().is_some());
    let refused = |addresses: AttendAddresses| {
        assert!(matches!(plan.launches(&addresses), Err(Mismatch { .. })));
    };
    refused(AttendAddresses {
        page_table: ids(3),
        ..addresses
    });
    refused(AttendAddresses {
        cache_lengths: ids(3),
        ..addresses
    });
    refused(AttendAddresses {
        cu_seqlens: Some(ids(2)),
        ..addresses
    });
    refused(AttendAddresses {
        sinks: 8,
        ..addresses
    });
}

static DEQUANTIZE: LazyLock<Vec<Module>> = LazyLock::new(|| images!("dequantize"));
static LATENT: LazyLock<Vec<Module>> = LazyLock::new(|| images!("latent"));

fn dequantized<T: Bytes>(
    module: &Module,
    memory: &mut Memory,
    launch: &KernelLaunch<PhasorDequantize>,
    out: u64,
) -> Vec<T> {
    run(module, memory, launch, launch.params.as_bytes());
    T::of_bytes(memory.bytes(out))
}

fn ggml_equals_the_host<T: Bytes>() {
    let [rows, in_features] = [3, 512];
    for (at, ggml_type) in GgmlType::ALL.into_iter().enumerate() {
        let (elements, bytes) = ggml_type.block();
        let mut random = Random::new(at as u64);
        // Any bytes are blocks; some scales are infinite or NaN.
        let blocks: Vec<u8> = (0..rows * in_features / elements * bytes)
            .map(|_| random.bits() as u8)
            .collect();
        let mut values = vec![0.0; rows * in_features];
        ggml_type.dequantize(&blocks, &mut values).unwrap();
        let expected: Vec<T> = narrowed(&values);
        for module in DEQUANTIZE.iter() {
            let mut memory = Memory::new();
            let from = memory.add("blocks", blocks.clone(), 2);
            memory.set_read_only(from);
            let out = memory.add_uninit("out", values.len() * T::DTYPE.size(), 16);
            let launch = dequantize_ggml(ggml_type, T::DTYPE, [rows, in_features], from, out);
            let launch = launch.unwrap().unwrap();
            let got: Vec<T> = dequantized(module, &mut memory, &launch, out);
            assert_eq!(bits(&got), bits(&expected), "{}", ggml_type.name());
        }
    }
}

#[test]
fn blocks_of_gguf_become_the_hosts_values() {
    ggml_equals_the_host::<f32>();
    ggml_equals_the_host::<f16>();
    ggml_equals_the_host::<bf16>();
}

fn gptq_equals_the_host<T: Bytes>() {
    let words = |random: &mut Random, len: usize| -> Vec<i32> {
        (0..len).map(|_| random.bits() as i32).collect()
    };
    // Groups that end inside of a word, one that is not whole, one group; groups in any order.
    for (at, (out_features, in_features, group_size, act_order)) in [
        (40, 64usize, 32, false),
        (16, 72, 20, false),
        (8, 128, 128, false),
        (48, 96, 32, true),
    ]
    .into_iter()
    .enumerate()
    {
        let mut random = Random::new(at as u64);
        let groups = in_features.div_ceil(group_size);
        let shape = GptqShape {
            out_features,
            in_features,
            group_size,
            format: [GptqFormat::V1, GptqFormat::V2][at % 2],
        };
        let tensors = GptqTensors {
            qweight: words(&mut random, in_features / 8 * out_features),
            scales: (0..groups * out_features)
                .map(|_| f16::from_bits(random.bits() as u16))
                .collect(),
            qzeros: words(&mut random, groups * out_features / 8),
            g_idx: match act_order {
                true => (0..in_features)
                    .map(|_| (random.bits() % groups as u64) as i32)
                    .collect(),
                false => Vec::new(),
            },
        };
        let weights = GptqWeights::new(
            tensors.clone(),
            shape.format,
            Some(group_size),
            out_features,
            in_features,
        )
        .unwrap();
        for (rows, module) in [0..out_features, 3..7, 1..out_features, 2..8]
            .into_iter()
            .zip(DEQUANTIZE.iter())
        {
            let mut values = vec![0.0; rows.len() * in_features];
            weights.read(rows.clone(), &mut values);
            let mut memory = Memory::new();
            let mut read_only = |name, bytes: Vec<u8>| {
                let address = memory.add(name, bytes, 0);
                memory.set_read_only(address);
                address
            };
            let of_words = |words: &[i32]| words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let addresses = GptqAddresses {
                qweight: read_only("qweight", of_words(&tensors.qweight)),
                scales: read_only("scales", f16::bytes(&tensors.scales)),
                qzeros: read_only("qzeros", of_words(&tensors.qzeros)),
                g_idx: match act_order {
                    true => read_only("g_idx", of_words(&tensors.g_idx)),
                    false => 0,
                },
            };
            let out = memory.add_uninit("out", values.len() * T::DTYPE.size(), 0);
            let launch = dequantize_gptq(&shape, T::DTYPE, rows, &addresses, out);
            let launch = launch.unwrap().unwrap();
            let got: Vec<T> = dequantized(module, &mut memory, &launch, out);
            assert_eq!(bits(&got), bits(&narrowed::<T>(&values)), "case {at}");
        }
    }
}

#[test]
fn matrices_of_gptq_become_the_hosts_values() {
    gptq_equals_the_host::<f32>();
    gptq_equals_the_host::<f16>();
    gptq_equals_the_host::<bf16>();
}

#[test]
fn groups_past_the_last_are_the_last() {
    let shape = GptqShape {
        out_features: 8,
        in_features: 8,
        group_size: 4,
        format: GptqFormat::V2,
    };
    for group in [1, 2, -1, i32::MAX] {
        let mut memory = Memory::new();
        let mut words = |name, words: &[i32]| {
            let bytes = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            memory.add(name, bytes, 0)
        };
        let addresses = GptqAddresses {
            qweight: words("qweight", &[0x7654_3210; 8]),
            scales: words("scales", &[0; 8]),
            qzeros: words("qzeros", &[0; 2]),
            g_idx: words("g_idx", &[group; 8]),
        };
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let scales = [[half(1.0); 8], [half(2.0); 8]].concat().concat();
        memory.write(addresses.scales, &scales);
        let out = memory.add_uninit("out", 8 * 8 * 4, 0);
        let launch = dequantize_gptq(&shape, Dtype::F32, 0..8, &addresses, out).unwrap();
        let got: Vec<f32> = dequantized(&DEQUANTIZE[0], &mut memory, &launch.unwrap(), out);
        let row = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0];
        assert_eq!(got, [row; 8].concat(), "{group}");
    }
}

/// Any bits, and among them a share of those that arithmetic treats apart.
fn hostile(random: &mut Random) -> f32 {
    const APART: [f32; 8] = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        f32::MIN_POSITIVE / 3.0,
        f32::MAX,
        448.0,
    ];
    match random.bits() % 24 {
        at @ 0..8 => APART[at as usize],
        8 => f32::from_bits(random.bits() as u32),
        _ => random.values(1, 3.0)[0],
    }
}

fn fp8_equals_the_host<T: Bytes>() {
    // More columns than a block of threads has; blocks that end before the matrix does, and past it.
    for (at, (out_features, in_features, block)) in [
        (20, 64, None),
        (19, 72, Some([1, 72])),
        (24, 136, Some([7, 16])),
        (9, 264, Some([4, 128])),
        (3, 8, Some([128, 128])),
    ]
    .into_iter()
    .enumerate()
    {
        let mut random = Random::new(at as u64);
        let shape = Fp8Shape {
            out_features,
            in_features,
            block: block.unwrap_or([out_features, in_features]),
        };
        let scales: Vec<f32> = (0..shape.scales()).map(|_| hostile(&mut random)).collect();
        let scale = match block {
            None => Fp8WeightScale::Tensor(scales[0]),
            Some([1, _]) => Fp8WeightScale::Rows(scales.clone()),
            Some(block) => Fp8WeightScale::Blocks {
                scales: scales.clone(),
                block,
            },
        };
        // Every code is there.
        let codes: Vec<u8> = (0..out_features * in_features).map(|at| at as u8).collect();
        let weights = Fp8Weights::new(codes.clone(), scale, out_features, in_features).unwrap();
        for (rows, module) in [0..out_features, 2..3, 0..2, 1..out_features]
            .into_iter()
            .zip(DEQUANTIZE.iter())
        {
            let mut values = vec![0.0; rows.len() * in_features];
            weights.read(rows.clone(), &mut values);
            let mut memory = Memory::new();
            let mut read_only = |name, bytes: Vec<u8>, misalign| {
                let address = memory.add(name, bytes, misalign);
                memory.set_read_only(address);
                address
            };
            let addresses = [
                read_only("codes", codes.clone(), 8),
                read_only("scales", f32::bytes(&scales), 4),
            ];
            let out = memory.add_uninit("out", values.len() * T::DTYPE.size(), 0);
            let launch = dequantize_fp8(&shape, T::DTYPE, rows, addresses, out);
            let launch = launch.unwrap().unwrap();
            let got: Vec<T> = dequantized(module, &mut memory, &launch, out);
            assert_eq!(bits(&got), bits(&narrowed::<T>(&values)), "case {at}");
        }
    }
}

#[test]
fn matrices_of_e4m3_become_the_hosts_values() {
    fp8_equals_the_host::<f32>();
    fp8_equals_the_host::<f16>();
    fp8_equals_the_host::<bf16>();
}

fn activations_equal_the_host<T: Bytes>() {
    let per_token = |most_amax, scale_dtype| Fp8Activation::PerToken {
        most_amax,
        scale_dtype,
    };
    let blocks = Fp8Activation::Blocks;
    // A group for a thread, for lanes of a warp, for warps, and for threads several times; one that ends early.
    for (at, (activation, in_features)) in [
        (Fp8Activation::Static(0.0071), 136),
        // Without an inverse.
        (Fp8Activation::Static(f32::MIN_POSITIVE / 8.0), 8),
        (per_token(f32::INFINITY, Dtype::F32), 8),
        (per_token(1.5, Dtype::Bf16), 264),
        (per_token(1200.0, Dtype::F16), 1032),
        (per_token(f32::MIN_POSITIVE / 2.0, Dtype::F32), 16),
        (per_token(f32::INFINITY, Dtype::Bf16), 2056),
        (blocks(8), 24),
        (blocks(24), 64),
        (blocks(128), 320),
        (blocks(512), 64),
    ]
    .into_iter()
    .enumerate()
    {
        let mut random = Random::new(at as u64);
        let tokens = 6;
        let mut x: Vec<T> = narrowed(&random.values(tokens * in_features, 3.0));
        // Zeros, tiny and huge numbers, and anything.
        let (_, rest) = x.split_at_mut(2 * in_features);
        for (token, x) in rest.chunks_exact_mut(in_features).enumerate() {
            for x in x {
                *x = T::narrow(match token {
                    0 => 0.0,
                    1 => x.widen() * 1e-39,
                    2 => x.widen() * 1e30,
                    _ => hostile(&mut random),
                });
            }
        }
        let mut values = widened(&x);
        for token in values.chunks_exact_mut(in_features) {
            activation.round(token);
        }
        for module in DEQUANTIZE.iter() {
            let mut memory = Memory::new();
            let from = memory.add("x", T::bytes(&x), 0);
            memory.set_read_only(from);
            let out = memory.add_uninit("out", x.len() * T::DTYPE.size(), 0);
            let launch = round_fp8(activation, T::DTYPE, [tokens, in_features], from, out);
            let launch = launch.unwrap().unwrap();
            let got: Vec<T> = dequantized(module, &mut memory, &launch, out);
            assert_eq!(bits(&got), bits(&narrowed::<T>(&values)), "case {at}");
        }
    }
}

#[test]
fn activations_become_the_hosts_values_of_e4m3() {
    activations_equal_the_host::<f32>();
    activations_equal_the_host::<f16>();
    activations_equal_the_host::<bf16>();
}

#[test]
fn float8_that_kernels_cannot_take_is_refused() {
    use AttentionError::{Factor, Value};
    let weights = |out_features, in_features, block, rows, [codes, scales, out]: [u64; 3]| {
        let shape = Fp8Shape {
            out_features,
            in_features,
            block,
        };
        dequantize_fp8(&shape, Dtype::F32, rows, [codes, scales], out)
    };
    let good = [8, 4, 16];
    assert!(weights(3, 16, [2, 8], 0..3, good).unwrap().is_some());
    assert!(weights(3, 16, [2, 8], 3..3, good).unwrap().is_none());
    // Wider than the matrix is as wide.
    assert!(weights(3, 16, [9, 20], 0..3, good).unwrap().is_some());
    for refused in [
        weights(3, 12, [2, 8], 0..3, good),
        weights(3, 0, [2, 8], 0..0, good),
        weights(0, 16, [2, 8], 0..0, good),
        weights(3, 16, [0, 8], 0..3, good),
        weights(3, 16, [2, 0], 0..3, good),
        weights(3, 16, [2, 12], 0..3, good),
        weights(3, 1 << 24, [2, 8], 0..3, good),
        weights(3, 16, [2, 8], 0..4, good),
        weights(1 << 33, 16, [2, 8], 0..1 << 33, good),
        weights(3, 16, [2, 8], 0..3, [4, 4, 16]),
        weights(3, 16, [2, 8], 0..3, [8, 2, 16]),
        weights(3, 16, [2, 8], 0..3, [8, 4, 8]),
    ] {
        assert!(matches!(refused, Err(Value { .. })), "{refused:?}");
    }
    let shape = |out_features, in_features, block| Fp8Shape {
        out_features,
        in_features,
        block,
    };
    assert_eq!(shape(5, 24, [2, 16]).scales(), 6);
    assert_eq!(shape(5, 24, [0, 16]).scales(), 0);

    let activations = |activation, shape, [x, out]: [u64; 2]| {
        round_fp8(activation, Dtype::Bf16, shape, x, out).map(|launch| launch.is_some())
    };
    let (good, blocks) = ([16; 2], Fp8Activation::Blocks);
    let per_token = |most_amax| Fp8Activation::PerToken {
        most_amax,
        scale_dtype: Dtype::F32,
    };
    assert_eq!(activations(blocks(8), [2, 16], good), Ok(true));
    assert_eq!(activations(blocks(8), [0, 16], good), Ok(false));
    for refused in [
        activations(blocks(0), [2, 16], good),
        activations(blocks(12), [2, 16], good),
        activations(per_token(1.0), [2, 12], good),
        activations(per_token(1.0), [2, 0], good),
        activations(blocks(8), [1 << 30, 16], good),
        activations(blocks(8), [usize::MAX, 16], good),
        activations(blocks(8), [2, 16], [8, 16]),
        activations(blocks(8), [2, 16], [16, 8]),
    ] {
        assert!(matches!(refused, Err(Value { .. })), "{refused:?}");
    }
    for refused in [
        Fp8Activation::Static(0.0),
        Fp8Activation::Static(f32::INFINITY),
        per_token(-1.0),
        per_token(f32::NAN),
    ] {
        let refused = activations(refused, [2, 16], good);
        assert!(matches!(refused, Err(Factor { .. })), "{refused:?}");
    }
}

#[test]
fn weights_that_kernels_cannot_take_are_refused() {
    use AttentionError::{Mismatch, Value};
    let ggml = |rows, in_features, blocks, out| {
        dequantize_ggml(GgmlType::Q4_K, Dtype::F32, [rows, in_features], blocks, out)
    };
    assert!(ggml(1, 256, 2, 16).unwrap().is_some());
    assert!(ggml(0, 256, 2, 16).unwrap().is_none());
    assert!(matches!(ggml(1, 128, 2, 16), Err(Mismatch { .. })));
    assert!(matches!(ggml(1, 256, 1, 16), Err(Value { .. })));
    assert!(matches!(ggml(1, 256, 2, 8), Err(Value { .. })));
    assert!(matches!(ggml(usize::MAX, 256, 2, 16), Err(Value { .. })));
    let addresses = GptqAddresses {
        qweight: 0,
        scales: 0,
        qzeros: 0,
        g_idx: 0,
    };
    let gptq = |out_features, in_features, group_size, rows, out| {
        let shape = GptqShape {
            out_features,
            in_features,
            group_size,
            format: GptqFormat::V1,
        };
        dequantize_gptq(&shape, Dtype::F32, rows, &addresses, out)
    };
    assert!(gptq(8, 8, 4, 0..8, 0).unwrap().is_some());
    assert!(gptq(8, 8, 4, 3..3, 0).unwrap().is_none());
    for refused in [
        gptq(7, 8, 4, 0..1, 0),
        gptq(8, 9, 4, 0..1, 0),
        gptq(8, 0, 4, 0..1, 0),
        gptq(8, 8, 0, 0..1, 0),
        gptq(8, 8, 4, 0..9, 0),
        gptq(8, 8, 4, 0..1, 8),
        gptq(8, 1 << 40, 4, 0..1, 0),
        gptq(8, 1 << 24, 4, 0..1, 0),
    ] {
        assert!(matches!(refused, Err(Value { .. })), "{refused:?}");
    }
}

fn norms_equal_the_host<T: Bytes>() {
    // Lanes with no element, one, two, and more rounds: of some, up to the end of each, of more than are unrolled.
    for (at, dims) in [20usize, 33, 64, 100, 192, 224, 300]
        .into_iter()
        .enumerate()
    {
        let mut random = Random::new(at as u64);
        let (tokens, eps) = (3, [1e-6, 0.5][at % 2]);
        let x: Vec<T> = narrowed(&random.values(tokens * dims, [3.0, 1e-4][at % 2]));
        let weight: Vec<T> = narrowed(&random.values(dims, 1.5));
        // The two maps around a norm leave it as it is.
        let mut identity = vec![0.0f32; dims * dims];
        identity.iter_mut().step_by(dims + 1).for_each(|x| *x = 1.0);
        let identity: Arc<dyn Projection<T>> = Arc::new(Linear(
            DenseWeights::<f32>::new(identity, dims, dims).unwrap(),
        ));
        let low_rank = LowRank::new(identity.clone(), &weight, eps, identity).unwrap();
        let mut expected = vec![T::default(); x.len()];
        low_rank.forward(&x, &mut expected).unwrap();
        for module in LATENT.iter() {
            let mut memory = Memory::new();
            let to = memory.add("x", T::bytes(&x), 0);
            let of_norm = memory.add("weight", f32::bytes(&widened(&weight)), 4);
            memory.set_read_only(of_norm);
            let launch = norm_latent(T::DTYPE, [tokens, dims], to, of_norm, eps);
            let launch = launch.unwrap().unwrap();
            run(module, &mut memory, &launch, launch.params.as_bytes());
            let got = T::of_bytes(memory.bytes(to));
            assert_eq!(bits(&got), bits(&expected), "{dims}");
        }
    }
}

fn run<P>(module: &Module, memory: &mut Memory, launch: &KernelLaunch<P>, params: &[u8]) {
    let run = Launch::new(launch.kernel, launch.grid, launch.block, params);
    ptx_interpreter::run(module, memory, &run)
        .unwrap_or_else(|fault| panic!("{}: {fault}", launch.kernel));
}

#[test]
fn latents_are_normed_as_on_the_host() {
    norms_equal_the_host::<f32>();
    norms_equal_the_host::<f16>();
    norms_equal_the_host::<bf16>();
}

#[test]
fn keys_of_a_latent_are_those_of_heads_and_what_they_share() {
    for [tokens, heads, own, shared] in [[3, 2, 16, 8], [1, 1, 8, 64], [40, 3, 24, 8]] {
        let of = |len: usize, first: u32| -> Vec<f16> {
            (0..len as u32)
                .map(|at| f16::from_bits((first + at) as u16))
                .collect()
        };
        let (of_heads, of_all) = (of(tokens * heads * own, 0), of(tokens * shared, 0x4000));
        let mut expected = Vec::new();
        for (at, head) in of_heads.chunks(own).enumerate() {
            expected.extend_from_slice(head);
            expected.extend_from_slice(&of_all[at / heads * shared..][..shared]);
        }
        for module in LATENT.iter() {
            let mut memory = Memory::new();
            let from = [&of_heads, &of_all].map(|from| {
                let address = memory.add("from", f16::bytes(from), 16);
                memory.set_read_only(address);
                address
            });
            let out = memory.add_uninit("out", expected.len() * 2, 16);
            let launch = spread_latent(Dtype::F16, [tokens, heads], [own, shared], from, out);
            let launch = launch.unwrap().unwrap();
            run(module, &mut memory, &launch, launch.params.as_bytes());
            assert_eq!(memory.bytes(out), f16::bytes(&expected));
        }
    }
}

#[test]
fn latents_that_kernels_cannot_take_are_refused() {
    use AttentionError::{Factor, Value};
    let norm = |tokens, dims, eps| {
        norm_latent(Dtype::Bf16, [tokens, dims], 0, 0, eps).map(|launch| launch.is_some())
    };
    assert_eq!(norm(1, 5, 1e-6), Ok(true));
    assert_eq!(norm(0, 5, 1e-6), Ok(false));
    for refused in [
        norm(1, 0, 1e-6),
        norm(1, 1 << 31, 1e-6),
        norm(usize::MAX, 5, 1e-6),
    ] {
        assert!(matches!(refused, Err(Value { .. })), "{refused:?}");
    }
    for eps in [0.0, f32::NAN] {
        assert!(matches!(norm(1, 5, eps), Err(Factor { .. })));
    }
    let keys = |tokens, dims, [of_heads, of_all, out]: [u64; 3]| {
        spread_latent(Dtype::Bf16, [tokens, 2], dims, [of_heads, of_all], out)
            .map(|launch| launch.is_some())
    };
    let good = [16; 3];
    assert_eq!(keys(1, [16, 8], good), Ok(true));
    assert_eq!(keys(0, [16, 8], good), Ok(false));
    for refused in [
        keys(1, [12, 8], good),
        keys(1, [16, 4], good),
        keys(1, [16, 8], [8, 16, 16]),
        keys(1, [16, 8], [16, 8, 16]),
        keys(1, [16, 8], [16, 16, 8]),
        keys(usize::MAX, [16, 8], good),
    ] {
        assert!(matches!(refused, Err(Value { .. })), "{refused:?}");
    }
}
