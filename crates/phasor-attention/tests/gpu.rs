//! The CUDA side on a real GPU, held to the host: attention and dequantisation bit for bit, products and
//! layers within a bound.
//!
//! Without a GPU every test says so and passes, unless `PHASOR_REQUIRE_GPU=1`; those of products likewise
//! without cublasLt, unless `PHASOR_REQUIRE_CUBLASLT=1`. `scripts/stand-in-driver` runs them without a GPU, over
//! shorter contexts.

use phasor_attention::cuda::{
    AttentionKernels, CublasLt, CudaAttendOperands, CudaAttentionLayer, CudaBatch, CudaCacheView,
    CudaCodeScales, CudaCodeScalesMut, CudaCodes, CudaCollective, CudaDense, CudaFp8,
    CudaFp8Linear, CudaGgml, CudaGptq, CudaKvCache, CudaLatentKeys, CudaLayerShape, CudaLowRank,
    CudaPart, CudaProjection, CudaQkv, CudaShardCall, CudaTensorParallelAttention, Precision,
    TokensInOut,
};
use phasor_attention::kernels::CacheCodes;
use phasor_attention::phasor::cuda::{Cuda, CudaIds, device_count};
use phasor_attention::phasor::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use phasor_attention::phasor::cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits,
};
use phasor_attention::phasor::half::{bf16, f16};
use phasor_attention::phasor::quantize::{Codes, ScaleForm, ScaleRounding, e4m3_from_f32};
use phasor_attention::phasor::{
    CacheLayout, Dtype, Frequencies, Host, Pairing, Rope, ScaleLayout, Stages, Stored, StoredCodes,
};
use phasor_attention::{
    AttentionConfig, AttentionError, AttentionLayer, AttentionMask, CodeScales, CodedCache,
    DenseWeights, Fp8Activation, Fp8Linear, Fp8WeightScale, Fp8Weights, GgmlType, GgmlWeights,
    GptqFormat, GptqTensors, GptqWeights, HeadWeights, KvCacheMut, LatentKeys, LayerWeights,
    Linear, LowRank, Projection, QkvProjection, RaggedBatch, ShardingStrategy, Weights, Workspace,
};
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

#[path = "support/attend_cases.rs"]
mod attend_cases;
mod support;
use attend_cases::{Bytes, Case, Coded, Scales, Wish, bits};
use support::{Random, narrowed, widened};

/// The first GPU, for one test at a time.
struct Gpu {
    kernels: AttentionKernels,
    stream: Arc<CudaStream>,
    _turn: MutexGuard<'static, ()>,
}

/// Straight to stderr, which the test harness does not swallow.
fn say(once: &Once, text: &str) {
    once.call_once(|| {
        let _ = writeln!(std::io::stderr(), "{text}");
    });
}

fn gpu() -> Option<Gpu> {
    static TURN: Mutex<()> = Mutex::new(());
    static SAID: Once = Once::new();
    let reason = match device_count() {
        Ok(0) => "the driver lists no device".to_string(),
        Err(error) => error.to_string(),
        Ok(_) => {
            let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
            let context = CudaContext::new(0).unwrap();
            // SAFETY: all work of these tests is on one stream.
            unsafe { context.disable_event_tracking() };
            let cuda = Cuda::new(&context, &Dtype::ALL).unwrap();
            return Some(Gpu {
                kernels: AttentionKernels::new(&cuda),
                stream: context.new_stream().unwrap(),
                _turn: turn,
            });
        }
    };
    let required = std::env::var("PHASOR_REQUIRE_GPU").as_deref() == Ok("1");
    assert!(
        !required,
        "PHASOR_REQUIRE_GPU=1, but there is no GPU: {reason}"
    );
    say(&SAID, &format!("GPU tests are skipped: {reason}"));
    None
}

/// Codes on the device.
struct CodesThere {
    codes: CudaSlice<u8>,
    f32: Option<CudaSlice<f32>>,
    e8m0: Option<CudaSlice<u8>>,
}

impl CodesThere {
    fn view(&self) -> CudaCodes<'_> {
        CudaCodes {
            codes: self.codes.as_view(),
            scales: match (&self.f32, &self.e8m0) {
                (Some(scales), _) => CudaCodeScales::F32(scales.as_view()),
                (_, Some(scales)) => CudaCodeScales::E8m0(scales.as_view()),
                _ => CudaCodeScales::Inline,
            },
        }
    }
}

/// `PHASOR_STAND_IN_DRIVER=1` says that kernels run in an interpreter.
fn is_slow() -> bool {
    std::env::var("PHASOR_STAND_IN_DRIVER").as_deref() == Ok("1")
}

/// Sequences of `(cached, new)`.
fn contexts() -> [(usize, usize); 4] {
    let [long, longest] = if is_slow() {
        [300, 600]
    } else {
        [4096, 20_000]
    };
    [(long, 1), (0, 9), (255, 2), (longest, 1)]
}

impl Gpu {
    fn codes(&self, of: &Coded) -> CodesThere {
        let (f32, e8m0) = match &of.scales {
            Scales::Given(scales) | Scales::F32(scales) => (Some(scales), None),
            Scales::E8m0(scales) => (None, Some(scales)),
            Scales::Inline => (None, None),
        };
        let stream = &self.stream;
        CodesThere {
            codes: stream.clone_htod(&of.bytes).unwrap(),
            f32: f32.map(|scales| stream.clone_htod(scales).unwrap()),
            e8m0: e8m0.map(|scales| stream.clone_htod(scales).unwrap()),
        }
    }

    fn cublas(&self) -> Option<CublasLt> {
        static SAID: Once = Once::new();
        match CublasLt::new(&self.kernels) {
            Ok(lt) => Some(lt),
            Err(error) => {
                let required = std::env::var("PHASOR_REQUIRE_CUBLASLT").as_deref() == Ok("1");
                assert!(!required, "PHASOR_REQUIRE_CUBLASLT=1, but {error}");
                say(&SAID, &format!("tests of products are skipped: {error}"));
                None
            }
        }
    }

    /// What attention leaves in the output's buffer, run as a replay of a graph; whether it reported.
    fn attend<T: Bytes + DeviceRepr>(&self, case: &Case<T>) -> (Vec<T>, bool) {
        let stream = &self.stream;
        let attend = self
            .kernels
            .attend(T::DTYPE, &case.attend(), &case.shape())
            .unwrap();
        let up = |values: &[T]| stream.clone_htod(values).unwrap();
        let q = up(&case.q);
        let of_elements = case.codes.is_none().then(|| (up(&case.k), up(&case.v)));
        let of_codes = case
            .codes
            .as_ref()
            .map(|codes| codes.each_ref().map(|c| self.codes(c)));
        let table = stream.clone_htod(&case.table).unwrap();
        let lengths = stream.clone_htod(&case.lengths).unwrap();
        let offsets = case
            .cu_seqlens
            .as_ref()
            .map(|o| stream.clone_htod(o).unwrap());
        let mut out = up(&case.untouched());
        let len = attend.plan().workspace_len().max(1);
        let mut workspace = stream.alloc_zeros::<f32>(len).unwrap();
        let report = self.kernels.cuda().report().unwrap();
        let operands = CudaAttendOperands {
            q: q.as_view(),
            cache: match (&of_elements, &of_codes) {
                (Some((k, v)), _) => CudaCacheView::Elements {
                    k: k.as_view(),
                    v: v.as_view(),
                },
                (_, Some([k, v])) => CudaCacheView::Codes {
                    k: k.view(),
                    v: v.view(),
                },
                _ => unreachable!(),
            },
            page_table: CudaIds::from(&table),
            cache_lengths: CudaIds::from(&lengths),
            cu_seqlens: offsets.as_ref().map(CudaIds::from),
            report: Some(&report),
        };
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .unwrap();
        attend
            .run(
                stream,
                &operands,
                &mut workspace.as_view_mut(),
                &mut out.as_view_mut(),
            )
            .unwrap();
        let graph = stream
            .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .unwrap()
            .unwrap();
        graph.launch().unwrap();
        let stored = report.stored(stream).unwrap();
        (stream.clone_dtoh(&out).unwrap(), stored != Stored::All)
    }
}

fn attention_equals_the_host<T: Bytes + DeviceRepr>(gpu: &Gpu) {
    let masks = [
        AttentionMask::Causal,
        AttentionMask::SlidingWindow(300),
        AttentionMask::Chunked(128),
        AttentionMask::None,
    ];
    for (at, (heads, kv_heads, dims)) in [
        (32, 8, 128),
        (9, 3, 64),
        (8, 8, 80),
        (12, 1, 96),
        (4, 2, 256),
        (6, 2, 20),
    ]
    .into_iter()
    .enumerate()
    {
        let mut case = Wish::new(heads, kv_heads, dims, &contexts()).case::<T>(at as u64);
        case.mask = masks[at % masks.len()];
        case.soft_cap = (at % 2 == 1).then_some(5.0);
        case.sinks = (at % 3 == 1).then(|| vec![0.5; heads]);
        let (out, reported) = gpu.attend(&case);
        assert!(!reported);
        assert_eq!(bits(&out), bits(&case.on_host()), "{heads} of {dims}");
    }
}

#[test]
fn attention_equals_the_host_bit_for_bit() {
    let Some(gpu) = gpu() else { return };
    attention_equals_the_host::<f32>(&gpu);
    attention_equals_the_host::<f16>(&gpu);
    attention_equals_the_host::<bf16>(&gpu);
}

fn codes_equal_the_host<T: Bytes + DeviceRepr>(gpu: &Gpu) {
    let written = |kind| {
        let scales = ScaleLayout::tokens_heads(16, 2, 1);
        (StoredCodes::dynamic(kind, 1e-6, scales), 0)
    };
    let groups = ScaleLayout::tokens_heads(16, 2, 4);
    let groups = StoredCodes::dynamic(Codes::E4m3, 1e-6, groups).groups_of(32);
    let e8m0 = (groups.rounded(ScaleRounding::PowerOfTwoUp).e8m0(), 0);
    let given = (StoredCodes::given(Codes::E4m3, ScaleForm::Multiply), 2);
    for (at, codes) in [[written(Codes::Int8), written(Codes::E4m3)], [given, e8m0]]
        .into_iter()
        .enumerate()
    {
        let wish = Wish::new(8, 2, 128, &contexts());
        let case = wish.coded::<T>(at as u64, codes);
        let (out, reported) = gpu.attend(&case);
        assert!(!reported);
        assert_eq!(bits(&out), bits(&case.on_host()), "codes {at}");
    }
}

#[test]
fn attention_over_codes_equals_the_host_bit_for_bit() {
    let Some(gpu) = gpu() else { return };
    codes_equal_the_host::<f32>(&gpu);
    codes_equal_the_host::<f16>(&gpu);
    codes_equal_the_host::<bf16>(&gpu);
}

#[test]
fn what_is_outside_is_reported() {
    let Some(gpu) = gpu() else { return };
    let mut case = Wish::new(4, 2, 64, &[(600, 1), (20, 1)]).case::<f32>(1);
    let mut expected = case.on_host();
    case.table[3] = i64::MAX;
    expected[..4 * 64].fill(attend_cases::UNTOUCHED);
    let (out, reported) = gpu.attend(&case);
    assert!(reported);
    assert_eq!(bits(&out), bits(&expected));
}

/// A projection of random tokens beside the host's, whose weights, and activations where these become e4m3,
/// are rounded likewise.
fn product<T>(
    gpu: &Gpu,
    projection: &dyn CudaProjection<T>,
    weights: &dyn Weights,
    activation: Option<Fp8Activation>,
) where
    T: Bytes + DeviceRepr + ValidAsZeroBits,
{
    let stream = &gpu.stream;
    let (from, to) = (projection.in_features(), projection.out_features());
    let mut values = vec![0.0; from * to];
    weights.read(0..to, &mut values);
    let rounded = DenseWeights::<T>::new(narrowed(&values), to, from).unwrap();
    for tokens in [1, 17] {
        let x: Vec<T> = narrowed(&Random::new(3).values(tokens * from, 1.0));
        let mut met = widened(&x);
        for token in met.chunks_exact_mut(from) {
            if let Some(activation) = activation {
                activation.round(token);
            }
        }
        let mut expected = vec![T::default(); tokens * to];
        Linear(rounded.clone())
            .forward(&narrowed::<T>(&met), &mut expected)
            .unwrap();
        let on_device = stream.clone_htod(&x).unwrap();
        let mut out = stream.alloc_zeros::<T>(tokens * to).unwrap();
        let bytes = projection.prepare(tokens).unwrap().max(1);
        let mut workspace = stream.alloc_zeros::<u8>(bytes).unwrap();
        let operands = TokensInOut {
            tokens,
            x: on_device.as_view(),
            out: out.as_view_mut(),
        };
        projection
            .forward(stream, operands, &mut workspace.as_view_mut())
            .unwrap();
        let got = stream.clone_dtoh(&out).unwrap();
        // Sums in another order, then one rounding.
        let bound = if T::DTYPE == Dtype::F32 { 1e-5 } else { 8e-3 };
        support::near(&widened(&got), &widened(&expected), bound);
    }
    too_little_is_refused(gpu, projection);
}

/// A projection of less than it was said to be, to less, or by less of a workspace.
fn too_little_is_refused<T>(gpu: &Gpu, projection: &dyn CudaProjection<T>)
where
    T: Bytes + DeviceRepr + ValidAsZeroBits,
{
    let stream = &gpu.stream;
    let tokens = 3;
    let bytes = projection.prepare(tokens).unwrap();
    let [from, to] = [projection.in_features(), projection.out_features()].map(|n| tokens * n);
    for less in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
        // Products may need none.
        if bytes == 0 && less[2] > 0 {
            continue;
        }
        let x = stream.alloc_zeros::<T>(from - less[0]).unwrap();
        let mut out = stream.alloc_zeros::<T>(to - less[1]).unwrap();
        let mut workspace = stream.alloc_zeros::<u8>(bytes - less[2]).unwrap();
        let operands = TokensInOut {
            tokens,
            x: x.as_view(),
            out: out.as_view_mut(),
        };
        let error = projection.forward(stream, operands, &mut workspace.as_view_mut());
        assert!(
            matches!(error, Err(AttentionError::Mismatch { .. })),
            "{error:?}"
        );
    }
}

fn products<T>(gpu: &Gpu, lt: &CublasLt)
where
    T: Bytes + DeviceRepr + ValidAsZeroBits,
{
    let features = [192, 512];
    let mut random = Random::new(1);
    let dense: Vec<T> = narrowed(&random.values(192 * 512, 1.0));
    let on_device = gpu.stream.clone_htod(&dense).unwrap();
    let weights = DenseWeights::<T>::new(dense, 192, 512).unwrap();
    let projection = CudaDense::new(lt, on_device, features, Precision::F32).unwrap();
    product::<T>(gpu, &projection, &weights, None);

    let ggml_type = GgmlType::Q8_0;
    let mut bytes: Vec<u8> = (0..192 * 512 / 32 * 34)
        .map(|_| random.bits() as u8)
        .collect();
    for block in bytes.chunks_exact_mut(34) {
        block[..2].copy_from_slice(&f16::from_f32(0.01).to_le_bytes());
    }
    let projection = CudaGgml::<T>::new(lt, ggml_type, &bytes, features, Precision::F32).unwrap();
    let weights = GgmlWeights::new(ggml_type, bytes, 192, 512).unwrap();
    product::<T>(gpu, &projection, &weights, None);

    let mut words = |len: usize| -> Vec<i32> { (0..len).map(|_| random.bits() as i32).collect() };
    let tensors = GptqTensors {
        qweight: words(512 / 8 * 192),
        scales: vec![f16::from_f32(0.02); 4 * 192],
        qzeros: words(4 * 192 / 8),
        g_idx: (0..512).map(|i| i % 4).collect(),
    };
    let format = GptqFormat::V1;
    let projection =
        CudaGptq::<T>::new(lt, &tensors, format, Some(128), features, Precision::F32).unwrap();
    let weights = GptqWeights::new(tensors, format, Some(128), 192, 512).unwrap();
    product::<T>(gpu, &projection, &weights, None);

    let per_token = Fp8Activation::PerToken {
        most_amax: 0.75,
        scale_dtype: Dtype::Bf16,
    };
    for activation in [
        Fp8Activation::Static(0.002),
        per_token,
        Fp8Activation::Blocks(128),
    ] {
        let mut scales = |len| random.values(len, 0.01);
        let scale = match activation {
            Fp8Activation::Static(_) => Fp8WeightScale::Tensor(0.004),
            Fp8Activation::PerToken { .. } => Fp8WeightScale::Rows(scales(192)),
            Fp8Activation::Blocks(_) => Fp8WeightScale::Blocks {
                scales: scales(2 * 4),
                block: [128, 128],
            },
        };
        let codes: Vec<u8> = (0..192 * 512).map(|_| e4m3(&mut random)).collect();
        let weights = Fp8Weights::new(codes, scale, 192, 512).unwrap();
        let projection = CudaFp8::<T>::new(lt, &weights, Precision::F32).unwrap();
        product::<T>(gpu, &projection, &weights, None);
        let projection = CudaFp8Linear::<T>::new(lt, &weights, activation, Precision::F32);
        product::<T>(gpu, &projection.unwrap(), &weights, Some(activation));
    }
}

/// Any code but NaN.
fn e4m3(random: &mut Random) -> u8 {
    match random.bits() as u8 {
        nan if nan & 0x7f == 0x7f => 0x35,
        code => code,
    }
}

#[test]
fn products_are_the_hosts_but_for_their_sums() {
    let Some(gpu) = gpu() else { return };
    let Some(lt) = gpu.cublas() else { return };
    products::<f32>(&gpu, &lt);
    products::<f16>(&gpu, &lt);
    products::<bf16>(&gpu, &lt);
}

#[test]
fn float8_that_does_not_fit_is_refused() {
    let Some(gpu) = gpu() else { return };
    let Some(lt) = gpu.cublas() else { return };
    let weights =
        |rows, columns, scale| Fp8Weights::new(vec![0u8; rows * columns], scale, rows, columns);
    let blocks = |scales, block| Fp8WeightScale::Blocks {
        scales: vec![1.0; scales],
        block,
    };
    let tensor = || Fp8WeightScale::Tensor(1.0);
    let linear = |weights: Result<Fp8Weights, _>, activation| {
        CudaFp8Linear::<bf16>::new(&lt, &weights?, activation, Precision::F32).map(|_| ())
    };
    let of_static = Fp8Activation::Static;
    assert_eq!(linear(weights(8, 16, tensor()), of_static(1.0)), Ok(()));
    use AttentionError::*;
    for (error, what) in [
        (
            linear(weights(8, 16, tensor()), Fp8Activation::Blocks(16)),
            "scales of other kinds",
        ),
        (
            linear(weights(8, 16, blocks(2, [8, 8])), Fp8Activation::Blocks(16)),
            "blocks of another width",
        ),
    ] {
        assert!(matches!(error, Err(Weights { .. })), "{what}: {error:?}");
    }
    let error = linear(weights(8, 16, tensor()), of_static(0.0));
    assert!(matches!(error, Err(Factor { .. })), "{error:?}");
    let error = linear(weights(8, 16, blocks(3, [8, 8])), Fp8Activation::Blocks(8));
    assert!(matches!(error, Err(Mismatch { .. })), "{error:?}");
    for (error, what) in [
        (
            linear(weights(8, 12, tensor()), of_static(1.0)),
            "in_features",
        ),
        (
            linear(weights(12, 16, tensor()), of_static(1.0)),
            "out_features",
        ),
        (
            linear(
                weights(8, 24, blocks(2, [8, 12])),
                Fp8Activation::Blocks(12),
            ),
            "columns of a block",
        ),
    ] {
        assert!(matches!(error, Err(Value { .. })), "{what}: {error:?}");
    }
}

#[test]
fn a_layer_is_the_hosts_but_for_its_products() {
    let Some(gpu) = gpu() else { return };
    let Some(lt) = gpu.cublas() else { return };
    layer_over(&gpu, &lt, false, None, 2e-5);
    // A last bit of a product may be another code.
    layer_over(&gpu, &lt, true, None, 2e-2);
    let per_token = Fp8Activation::PerToken {
        most_amax: f32::INFINITY,
        scale_dtype: Dtype::F32,
    };
    for activation in [Fp8Activation::Static(0.01), per_token] {
        layer_over(&gpu, &lt, false, Some(activation), 4e-3);
    }
}

type Both = (Arc<dyn Projection<f32>>, Arc<dyn CudaProjection<f32>>);

/// The same projection on the host and on the device: of these weights, or of the nearest of e4m3.
fn projections(
    lt: &CublasLt,
    weights: &[f32],
    [rows, columns]: [usize; 2],
    activation: Option<Fp8Activation>,
) -> Both {
    let Some(activation) = activation else {
        let weights = DenseWeights::<f32>::new(weights.to_vec(), rows, columns).unwrap();
        let dense = CudaDense::of_weights(lt, &weights, Precision::F32).unwrap();
        return (Arc::new(Linear(weights)), Arc::new(dense));
    };
    let scale = 0.06 / 448.0;
    let codes = weights.iter().map(|x| e4m3_from_f32(x / scale)).collect();
    let scale = Fp8WeightScale::Tensor(scale);
    let weights = Fp8Weights::<Vec<u8>>::new(codes, scale, rows, columns).unwrap();
    let there = CudaFp8Linear::new(lt, &weights, activation, Precision::F32).unwrap();
    (
        Arc::new(Fp8Linear::new(weights, activation).unwrap()),
        Arc::new(there),
    )
}

/// A prompt of two sequences, then a token of each, through both layers; perhaps over codes, perhaps with
/// projections of e4m3.
fn layer_over(
    gpu: &Gpu,
    lt: &CublasLt,
    over_codes: bool,
    activation: Option<Fp8Activation>,
    bound: f32,
) {
    let (hidden, heads, kv_heads, dims) = (256, 4, 2, 64);
    let all = (heads + 2 * kv_heads) * dims;
    let mut random = Random::new(4);
    let mut weight = |len| random.values(len, 0.06);
    let (qkv, o) = (weight(all * hidden), weight(hidden * heads * dims));
    let (qkv, qkv_there) = projections(lt, &qkv, [all, hidden], activation);
    let (o, o_there) = projections(lt, &o, [hidden, heads * dims], activation);
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, dims).unwrap(),
        Pairing::HalfSplit,
    );
    let config = AttentionConfig::new(hidden, heads, kv_heads, dims);
    let host = AttentionLayer::<f32>::new(
        config.clone(),
        &Host::new(),
        &rope,
        QkvProjection::Stacked(qkv),
        o,
    )
    .unwrap();
    let layer = CudaAttentionLayer::new(
        config,
        &gpu.kernels,
        &rope,
        CudaQkv::Stacked(qkv_there),
        o_there,
    )
    .unwrap();

    layers_agree(gpu, &host, &layer, over_codes, bound);
}

/// A prompt of two sequences, then a token of each, through both layers; perhaps over codes.
fn layers_agree(
    gpu: &Gpu,
    host: &AttentionLayer<f32>,
    layer: &CudaAttentionLayer<f32>,
    over_codes: bool,
    bound: f32,
) {
    let stream = &gpu.stream;
    let AttentionConfig {
        hidden_size: hidden,
        num_key_value_heads: kv_heads,
        head_dim,
        v_head_dim,
        ..
    } = *host.config();
    let layouts = [head_dim, v_head_dim].map(|dims| CacheLayout::paged_nhd(8, 16, kv_heads, dims));
    let lens = layouts.map(|layout| layout.required_len().unwrap());
    let [mut k, mut v] = lens.map(|len| vec![0.0f32; len]);
    let mut on_device = lens.map(|len| stream.alloc_zeros::<f32>(len).unwrap());
    let of_codes = StoredCodes::dynamic(
        Codes::Int8,
        1e-6,
        ScaleLayout::tokens_heads(16, kv_heads, 1),
    );
    let scales_len = 8 * 16 * kv_heads;
    let [mut k_codes, mut v_codes] = lens.map(|len| (vec![0u8; len], vec![0.0f32; scales_len]));
    let mut codes_there = lens.map(|len| {
        let codes = stream.alloc_zeros::<u8>(len).unwrap();
        (codes, stream.alloc_zeros::<f32>(scales_len).unwrap())
    });
    let table = [5i32, 0, 3, 7, 1, 2];
    let report = gpu.kernels.cuda().report().unwrap();
    let prompt = ([0i32, 40, 47], [0i32, 0]);
    let next = ([0i32, 1, 2], [40i32, 7]);
    for (ragged, (cu_seqlens, lengths)) in [(true, prompt), (true, next), (false, next)] {
        let tokens = cu_seqlens[2] as usize;
        let x = Random::new(tokens as u64).values(tokens * hidden, 1.0);
        let mut expected = vec![0.0; x.len()];
        host.forward(
            &x,
            &mut match over_codes {
                false => {
                    let [of_k, of_v] = layouts;
                    KvCacheMut::separate((of_k, &mut k), (of_v, &mut v)).unwrap()
                }
                true => {
                    let both = [(&mut k_codes, layouts[0]), (&mut v_codes, layouts[1])];
                    let [k, v] = both.map(|((codes, scales), layout)| {
                        let of = CodedCache {
                            layout,
                            codes: of_codes,
                            scales: CodeScales::F32(scales),
                        };
                        (of, &mut codes[..])
                    });
                    KvCacheMut::separate_codes(k, v).unwrap()
                }
            },
            &RaggedBatch::new(&cu_seqlens, &lengths, &table),
            &mut Workspace::default(),
            &mut expected,
        )
        .unwrap();
        let plan = layer
            .plan(&CudaLayerShape {
                tokens,
                sequences: 2,
                ragged,
                table_pages: 3,
                most_keys: None,
                k: layouts[0],
                v: layouts[1],
                one_buffer: false,
                codes: over_codes.then_some(
                    [CacheCodes {
                        codes: of_codes,
                        given: 0,
                    }; 2],
                ),
            })
            .unwrap();
        let mut workspace = layer.workspace(stream, &plan).unwrap();
        let x = stream.clone_htod(&x).unwrap();
        let mut out = stream.alloc_zeros::<f32>(tokens * hidden).unwrap();
        let offsets = stream.clone_htod(&cu_seqlens).unwrap();
        let lengths = stream.clone_htod(&lengths).unwrap();
        let pages = stream.clone_htod(&table).unwrap();
        let batch = CudaBatch {
            cu_seqlens: ragged.then(|| CudaIds::from(&offsets)),
            cache_lengths: CudaIds::from(&lengths),
            page_table: CudaIds::from(&pages),
            position_ids: None,
            frequency_rows: None,
        };
        let [k, v] = &mut on_device;
        let mut of_layer = match over_codes {
            false => CudaKvCache::Separate {
                k: k.as_view_mut(),
                v: v.as_view_mut(),
            },
            true => {
                let [k, v] = codes_there.each_mut().map(|(codes, scales)| {
                    let scales = CudaCodeScalesMut::F32(scales.as_view_mut());
                    (codes.as_view_mut(), scales)
                });
                CudaKvCache::SeparateCodes { k, v }
            }
        };
        layer
            .forward(
                stream,
                &plan,
                x.as_view(),
                &mut of_layer,
                &batch,
                &mut workspace,
                out.as_view_mut(),
                &report,
            )
            .unwrap();
        assert_eq!(report.stored(stream).unwrap(), Stored::All);
        support::near(&stream.clone_dtoh(&out).unwrap(), &expected, bound);
    }
}

/// A layer of latent attention, whose queries, keys and values come by way of fewer dims, whose keys share those
/// that rotate, and whose values have other dims than keys.
#[test]
fn a_latent_layer_is_the_hosts_but_for_its_products() {
    let Some(gpu) = gpu() else { return };
    let Some(lt) = gpu.cublas() else { return };
    let (hidden, heads, [nope, rope, of_v], [q_rank, kv_rank]) = (128, 4, [32, 16, 24], [80, 64]);
    let mut random = Random::new(8);
    let mut pair = |rows: usize, columns: usize| {
        projections(
            &lt,
            &random.values(rows * columns, 0.1),
            [rows, columns],
            None,
        )
    };
    let (q_down, q_up) = (pair(q_rank, hidden), pair(heads * (nope + rope), q_rank));
    let (down, shared) = (pair(kv_rank, hidden), pair(rope, hidden));
    let (k_up, v_up) = (pair(heads * nope, kv_rank), pair(heads * of_v, kv_rank));
    let o = pair(hidden, heads * of_v);
    let norm: Vec<f32> = Random::new(9).values(q_rank, 1.5);
    let low_rank = |rank: usize, down: &Both, up: &Both| {
        let norm = &norm[..rank];
        let (kernels, eps) = (&gpu.kernels, 1e-6);
        (
            LowRank::new(down.0.clone(), norm, eps, up.0.clone()).unwrap(),
            CudaLowRank::new(kernels, down.1.clone(), norm, eps, up.1.clone()).unwrap(),
        )
    };
    let q = low_rank(q_rank, &q_down, &q_up);
    let k = low_rank(kv_rank, &down, &k_up);
    let v = low_rank(kv_rank, &down, &v_up);
    let k = (
        LatentKeys::new(k.0, shared.0, heads).unwrap(),
        CudaLatentKeys::new(k.1, shared.1.clone(), heads).unwrap(),
    );
    too_little_is_refused(&gpu, &q.1);
    too_little_is_refused(&gpu, &k.1);
    let refused = CudaLatentKeys::new(low_rank(kv_rank, &down, &k_up).1, shared.1, 3);
    assert!(matches!(refused.err(), Some(AttentionError::Value { .. })));
    let mut config = AttentionConfig::new(hidden, heads, heads, nope + rope);
    (config.v_head_dim, config.rotary_offset) = (of_v, nope);
    let frequencies = Frequencies::from_theta(10_000.0, rope).unwrap();
    let rope = Rope::new(frequencies, Pairing::Interleaved);
    let qkv = QkvProjection::Separate {
        q: Arc::new(q.0),
        k: Arc::new(k.0),
        v: Arc::new(v.0),
    };
    let host = AttentionLayer::new(config.clone(), &Host::new(), &rope, qkv, o.0).unwrap();
    let qkv = CudaQkv::Separate {
        q: Arc::new(q.1),
        k: Arc::new(k.1),
        v: Arc::new(v.1),
    };
    let layer = CudaAttentionLayer::new(config, &gpu.kernels, &rope, qkv, o.1).unwrap();
    layers_agree(&gpu, &host, &layer, false, 2e-5);
}

/// Parts of one device, summed on the host.
struct ByCopies(usize);

impl CudaCollective<f32> for ByCopies {
    fn devices(&self) -> usize {
        self.0
    }

    fn all_reduce_sum(&self, parts: &mut [CudaPart<'_, f32>]) -> Result<(), AttentionError> {
        let mut sum = vec![0.0; parts[0].elements.len()];
        for part in parts.iter() {
            let part = part.stream.clone_dtoh(&part.elements).unwrap();
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
        for part in parts {
            part.stream.memcpy_htod(&sum, &mut part.elements).unwrap();
        }
        Ok(())
    }
}

/// A layer of this many parts, all on one device, beside the host's whole one.
fn parts_are_the_layer<C: CudaCollective<f32>>(
    gpu: &Gpu,
    lt: &CublasLt,
    collective: C,
    activations: [Option<Fp8Activation>; 4],
    bound: f32,
) {
    let stream = &gpu.stream;
    let (hidden, heads, kv_heads, dims) = (256, 4, 2, 64);
    let mut random = Random::new(6);
    let mut weight = |rows: usize, columns: usize| -> Arc<dyn Weights> {
        let values = random.values(rows * columns, 0.06);
        Arc::new(DenseWeights::<f32>::new(values, rows, columns).unwrap())
    };
    let weights = LayerWeights::<f32> {
        q: weight(heads * dims, hidden),
        k: weight(kv_heads * dims, hidden),
        v: weight(kv_heads * dims, hidden),
        o: weight(hidden, heads * dims),
        heads: [heads, kv_heads, kv_heads].map(|heads| HeadWeights {
            bias: Some(Random::new(heads as u64).values(heads * dims, 0.5)),
            ..HeadWeights::default()
        }),
        activations,
    };
    let mut config = AttentionConfig::new(hidden, heads, kv_heads, dims);
    (config.q_stages, config.k_stages) = (Stages::new().bias(), Stages::new().bias());
    config.v_stages = Stages::new().bias();
    config.sinks = Some(vec![0.5, -0.5, 1.0, 0.0]);
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, dims).unwrap(),
        Pairing::HalfSplit,
    );
    let host = weights.layer(config.clone(), &Host::new(), &rope).unwrap();
    let devices = collective.devices();
    let strategy = ShardingStrategy::TensorParallel(devices);
    let shards = weights
        .shard(&config, strategy)
        .unwrap()
        .into_iter()
        .map(|(config, weights)| {
            CudaAttentionLayer::from_weights(config, lt, &rope, &weights, Precision::F32).unwrap()
        })
        .collect();
    let layer = CudaTensorParallelAttention::new(shards, collective).unwrap();

    let tokens = 21;
    let (cu_seqlens, lengths, table) = ([0i32, 21], [0i32], [2i32, 0]);
    let x = random.values(tokens * hidden, 1.0);
    let cache = CacheLayout::paged_nhd(3, 16, kv_heads, dims);
    let len = cache.required_len().unwrap();
    let (mut k, mut v) = (vec![0.0f32; len], vec![0.0f32; len]);
    let mut expected = vec![0.0; x.len()];
    host.forward(
        &x,
        &mut KvCacheMut::separate((cache, &mut k), (cache, &mut v)).unwrap(),
        &RaggedBatch::new(&cu_seqlens, &lengths, &table),
        &mut Workspace::default(),
        &mut expected,
    )
    .unwrap();

    let of_part = CacheLayout::paged_nhd(3, 16, kv_heads / devices, dims);
    let shape = CudaLayerShape {
        tokens,
        sequences: 1,
        ragged: true,
        table_pages: 2,
        most_keys: None,
        k: of_part,
        v: of_part,
        one_buffer: false,
        codes: None,
    };
    let x = stream.clone_htod(&x).unwrap();
    let offsets = stream.clone_htod(&cu_seqlens).unwrap();
    let lengths = stream.clone_htod(&lengths).unwrap();
    let pages = stream.clone_htod(&table).unwrap();
    let batch = CudaBatch {
        cu_seqlens: Some(CudaIds::from(&offsets)),
        cache_lengths: CudaIds::from(&lengths),
        page_table: CudaIds::from(&pages),
        position_ids: None,
        frequency_rows: None,
    };
    let report = gpu.kernels.cuda().report().unwrap();
    let plans: Vec<_> = layer
        .shards()
        .iter()
        .map(|shard| shard.plan(&shape).unwrap())
        .collect();
    let zeros = |len: usize| stream.alloc_zeros::<f32>(len).unwrap();
    let mut outs: Vec<_> = plans.iter().map(|_| zeros(tokens * hidden)).collect();
    let mut memory: Vec<_> = plans.iter().map(|_| [zeros(len), zeros(len)]).collect();
    let mut caches: Vec<_> = memory
        .iter_mut()
        .map(|[k, v]| CudaKvCache::Separate {
            k: k.as_view_mut(),
            v: v.as_view_mut(),
        })
        .collect();
    let mut workspaces: Vec<_> = layer
        .shards()
        .iter()
        .zip(&plans)
        .map(|(shard, plan)| shard.workspace(stream, plan).unwrap())
        .collect();
    let mut calls: Vec<_> = plans
        .iter()
        .zip(&mut caches)
        .zip(&mut workspaces)
        .zip(&mut outs)
        .map(|(((plan, cache), workspace), out)| CudaShardCall {
            stream,
            plan,
            x: x.as_view(),
            cache,
            batch: &batch,
            workspace,
            out: out.as_view_mut(),
            report: &report,
        })
        .collect();
    assert!(layer.forward(&mut calls[1..]).is_err());
    layer.forward(&mut calls).unwrap();
    for out in &outs {
        support::near(&stream.clone_dtoh(out).unwrap(), &expected, bound);
    }
}

#[test]
fn parts_of_a_layer_sum_to_the_hosts() {
    let Some(gpu) = gpu() else { return };
    let Some(lt) = gpu.cublas() else { return };
    parts_are_the_layer(&gpu, &lt, ByCopies(2), [None; 4], 2e-5);
    parts_are_the_layer(&gpu, &lt, ByCopies(1), [None; 4], 2e-5);
    let per_token = Fp8Activation::PerToken {
        most_amax: f32::INFINITY,
        scale_dtype: Dtype::F32,
    };
    // Blocks of o's activations are whole in each part.
    let [of_v, of_o] = [Fp8Activation::Static(0.01), Fp8Activation::Blocks(32)];
    let activations = [Some(per_token), None, Some(of_v), Some(of_o)];
    // A last bit of a product may be another code.
    parts_are_the_layer(&gpu, &lt, ByCopies(2), activations, 4e-3);
}

/// One rank, as one device is what there is for certain. Without NCCL it says so and passes, unless
/// `PHASOR_REQUIRE_NCCL=1`.
#[cfg(feature = "nccl")]
#[test]
fn nccl_sums_over_one_device() {
    use phasor_attention::cuda::Nccl;
    static SAID: Once = Once::new();
    let Some(gpu) = gpu() else { return };
    let nccl = match Nccl::new() {
        Ok(nccl) => nccl,
        Err(error) => {
            let required = std::env::var("PHASOR_REQUIRE_NCCL").as_deref() == Ok("1");
            assert!(!required, "PHASOR_REQUIRE_NCCL=1, but {error}");
            say(&SAID, &format!("tests of NCCL are skipped: {error}"));
            return;
        }
    };
    let stream = &gpu.stream;
    let collective = nccl.of_process(&[gpu.kernels.cuda()]).unwrap();
    let values: Vec<bf16> = narrowed(&Random::new(9).values(1000, 1.0));
    let mut on_device = stream.clone_htod(&values).unwrap();
    let part = CudaPart {
        stream,
        elements: on_device.as_view_mut(),
    };
    collective.all_reduce_sum(&mut [part]).unwrap();
    assert_eq!(stream.clone_dtoh(&on_device).unwrap(), values);
    collective.check().unwrap();
    if let Some(lt) = gpu.cublas() {
        parts_are_the_layer(&gpu, &lt, collective, [None; 4], 2e-5);
    }
}
