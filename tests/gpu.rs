//! The kernels on a real GPU, held against the host backend bit for bit.
//!
//! Without a GPU every test says so and passes, unless `PHASOR_REQUIRE_GPU=1`. `PHASOR_GPU_SHORT=1`
//! runs fewer cases, for tools that slow the device down.

#[path = "support/call_layout.rs"]
mod call_layout;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/kernel_cases.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod kernel_cases;

use gpu::{context, images, short};
use kernel_cases::{
    Bits, Case, MODES, Outcome, Rng, TensorCase, TypedIds, Wish, random_case, random_elements, raw,
    typed,
};
use phasor::call::{RawPositions, TensorAddresses};
use phasor::cuda::{
    Cuda, CudaIds, CudaInOut, CudaKeyScales, CudaPositions, CudaRotator, CudaStep, CudaWeights,
    KernelImage, LaunchMode,
};
use phasor::cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use phasor::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use phasor::half::{bf16, f16};
use phasor::norm::HeadNorm;
use phasor::quantize::Codes;
use phasor::{
    CacheLayout, DeviceElement, Dtype, Error, Frequencies, Host, HostRotator, HostStep,
    HostWeights, IdType, Ids, InOut, Isa, KeyScales, KvCacheLayout, Layout, Pairing, Positions,
    Problem, Rope, ScaleLayout, SlotRange, Slots, SlotsIn, Stages, Stored, StoredCodes,
};
use std::sync::Arc;

/// Ids on the device.
enum DeviceIds {
    I32(CudaSlice<i32>),
    I64(CudaSlice<i64>),
    U32(CudaSlice<u32>),
}

impl DeviceIds {
    fn upload(stream: &Arc<CudaStream>, ids: &TypedIds) -> Self {
        match ids {
            TypedIds::I32(ids) => DeviceIds::I32(upload(stream, ids)),
            TypedIds::I64(ids) => DeviceIds::I64(upload(stream, ids)),
            TypedIds::U32(ids) => DeviceIds::U32(upload(stream, ids)),
        }
    }

    fn ids(&self) -> CudaIds<'_> {
        match self {
            DeviceIds::I32(ids) => ids.into(),
            DeviceIds::I64(ids) => ids.into(),
            DeviceIds::U32(ids) => ids.into(),
        }
    }
}

/// Also of no elements at all, which the driver does not allocate.
fn upload<T: phasor::cudarc::driver::DeviceRepr>(
    stream: &Arc<CudaStream>,
    data: &[T],
) -> CudaSlice<T> {
    if data.is_empty() {
        stream.null().unwrap()
    } else {
        stream.clone_htod(data).unwrap()
    }
}

fn on_gpu(cuda: &Cuda, stream: &Arc<CudaStream>, case: &Case) -> Outcome {
    match case.dtype {
        Dtype::F32 => on_gpu_typed::<f32>(cuda, stream, case),
        Dtype::F16 => on_gpu_typed::<f16>(cuda, stream, case),
        Dtype::Bf16 => on_gpu_typed::<bf16>(cuda, stream, case),
        other => panic!("{other} is not covered"),
    }
}

/// A buffer that starts `misalign` elements into its allocation.
fn device_buffer<T: Bits + DeviceElement>(
    stream: &Arc<CudaStream>,
    elements: &[u32],
    misalign: usize,
) -> CudaSlice<T> {
    let mut padded = vec![T::from_raw(0); misalign + 1];
    padded.splice(misalign..misalign, typed::<T>(elements));
    upload(stream, &padded)
}

fn read_back<T: Bits + DeviceElement>(
    stream: &Arc<CudaStream>,
    buffer: &CudaSlice<T>,
    misalign: usize,
    len: usize,
) -> Vec<u32> {
    raw(&stream.clone_dtoh(buffer).unwrap()[misalign..misalign + len])
}

fn on_gpu_typed<T: Bits + DeviceElement>(
    cuda: &Cuda,
    stream: &Arc<CudaStream>,
    case: &Case,
) -> Outcome {
    // Everything is uploaded before.
    let rotator = cuda
        .rotator(&case.rope)
        .unwrap()
        .with_launch_mode(case.mode);
    let plan = rotator.plan(&case.problem()).unwrap();
    let ids = [&case.positions.ids, &case.positions.rows]
        .map(|values| DeviceIds::upload(stream, &TypedIds::new(values)));
    let positions = case
        .positions
        .placed(|name, _| ids[usize::from(name == "rows")].ids());

    if let Some(elements) = &case.one_buffer {
        let misalign = case.q.as_ref().map_or(0, |q| q.misalign);
        let mut buffer = device_buffer::<T>(stream, elements, misalign);
        let view = buffer.slice_mut(misalign..misalign + elements.len());
        rotator
            .rotate_one_buffer(stream, &plan, view, &positions)
            .unwrap();
        let outcome = read_back(stream, &buffer, misalign, elements.len());
        stream.synchronize().unwrap();
        return Outcome(vec![outcome]);
    }

    let buffers = |tensor: &TensorCase| {
        let source = device_buffer::<T>(stream, &tensor.source, tensor.misalign);
        let destination = tensor
            .destination
            .as_ref()
            .map(|elements| device_buffer::<T>(stream, elements, tensor.misalign));
        (source, destination)
    };
    let mut q = case.q.as_ref().map(buffers);
    let mut k = case.k.as_ref().map(buffers);
    rotator
        .rotate(
            stream,
            &plan,
            operand(&case.q, &mut q),
            operand(&case.k, &mut k),
            &positions,
        )
        .unwrap();
    let mut outcome = Vec::new();
    for (tensor, buffers) in [(&case.q, &q), (&case.k, &k)] {
        let (Some(tensor), Some((source, destination))) = (tensor, buffers) else {
            continue;
        };
        let (buffer, len) = match (destination, &tensor.destination) {
            (Some(buffer), Some(elements)) => (buffer, elements.len()),
            _ => (source, tensor.source.len()),
        };
        outcome.push(read_back(stream, buffer, tensor.misalign, len));
    }
    stream.synchronize().unwrap();
    Outcome(outcome)
}

fn operand<'a, T: Bits + DeviceElement>(
    tensor: &Option<TensorCase>,
    buffers: &'a mut Option<(CudaSlice<T>, Option<CudaSlice<T>>)>,
) -> Option<CudaInOut<'a, T>> {
    let tensor = tensor.as_ref()?;
    let from = tensor.misalign;
    Some(match buffers.as_mut()? {
        (source, None) => InOut::InPlace(source.slice_mut(from..from + tensor.source.len())),
        (source, Some(destination)) => {
            let len = tensor.destination.as_ref()?.len();
            InOut::OutOfPlace {
                source: source.slice(from..from + tensor.source.len()),
                destination: destination.slice_mut(from..from + len),
            }
        }
    })
}

#[test]
fn random_cases_equal_the_host_bit_for_bit() {
    let Some(context) = context() else { return };
    let stream = context.default_stream();
    let count = if short() { 40 } else { 1500 };
    for (image, cuda) in images(&context, &Dtype::ALL) {
        for seed in 0..count {
            let case = random_case(&mut Rng(seed), Wish::default());
            let expected = case.on_host(Isa::best());
            let got = on_gpu(&cuda, &stream, &case);
            assert_eq!(got, expected, "{image}, seed {seed}: {case:?}");
        }
    }
}

#[test]
fn every_head_dim_equals_the_host_bit_for_bit() {
    let Some(context) = context() else { return };
    let stream = context.default_stream();
    let step = if short() { 62 } else { 2 };
    for (image, cuda) in images(&context, &Dtype::ALL) {
        for head_dim in (2..=512).step_by(step) {
            for aligned in [false, true] {
                if aligned && head_dim % 16 != 0 {
                    continue;
                }
                let wish = Wish {
                    head_dim: Some(head_dim),
                    aligned: Some(aligned),
                    ..Wish::default()
                };
                let case = random_case(&mut Rng(head_dim as u64), wish);
                let expected = case.on_host(Isa::best());
                assert_eq!(on_gpu(&cuda, &stream, &case), expected, "{image}: {case:?}");
            }
        }
    }
}

/// A model's shape, so that the grids of real use are run too.
struct Llama {
    plan: phasor::Plan,
    rotator: CudaRotator,
    q: Vec<bf16>,
    k: Vec<bf16>,
    rope: Rope,
}

impl Llama {
    fn new(cuda: &Cuda, tokens: usize) -> Self {
        let rope = Rope::new(
            Frequencies::from_theta(5e5, 128).unwrap(),
            Pairing::HalfSplit,
        );
        let rotator = cuda.rotator(&rope).unwrap();
        let (q_layout, k_layout) = (
            Layout::tokens(tokens, 32, 128),
            Layout::tokens(tokens, 8, 128),
        );
        let problem = Problem::new(Dtype::Bf16).q(q_layout).k(k_layout);
        let mut rng = Rng(99);
        let mut elements = |layout: Layout| {
            typed(&random_elements(
                &mut rng,
                Dtype::Bf16,
                layout.required_len().unwrap(),
            ))
        };
        Self {
            plan: rotator.plan(&problem).unwrap(),
            q: elements(q_layout),
            k: elements(k_layout),
            rotator,
            rope,
        }
    }

    fn in_mode(mut self, mode: LaunchMode) -> Self {
        self.rotator = self.rotator.with_launch_mode(mode);
        self
    }

    fn upload(&self, stream: &Arc<CudaStream>) -> [CudaSlice<bf16>; 2] {
        [upload(stream, &self.q), upload(stream, &self.k)]
    }

    fn rotate(
        &self,
        stream: &CudaStream,
        [q, k]: &mut [CudaSlice<bf16>; 2],
        positions: &CudaPositions<'_>,
    ) {
        let (q, k) = (q.as_view_mut(), k.as_view_mut());
        self.rotator
            .rotate(
                stream,
                &self.plan,
                Some(InOut::InPlace(q)),
                Some(InOut::InPlace(k)),
                positions,
            )
            .unwrap();
    }

    fn expected(&self, positions: Positions<'_>) -> (Vec<u32>, Vec<u32>) {
        let mut both = (self.q.clone(), self.k.clone());
        self.rotate_on_host(&mut both, positions);
        (raw(&both.0), raw(&both.1))
    }

    fn rotate_on_host(&self, (q, k): &mut (Vec<bf16>, Vec<bf16>), positions: Positions<'_>) {
        let rotator = Host::new().rotator(&self.rope);
        let (q, k) = (InOut::InPlace(&mut q[..]), InOut::InPlace(&mut k[..]));
        rotator
            .rotate(&self.plan, Some(q), Some(k), positions)
            .unwrap();
    }
}

fn download(stream: &Arc<CudaStream>, [q, k]: &[CudaSlice<bf16>; 2]) -> (Vec<u32>, Vec<u32>) {
    let read = |buffer| raw(&stream.clone_dtoh(buffer).unwrap());
    let both = (read(q), read(k));
    stream.synchronize().unwrap();
    both
}

#[test]
fn shapes_of_real_models_equal_the_host() {
    let Some(context) = context() else { return };
    let stream = context.default_stream();
    let cuda = Cuda::new(&context, &[Dtype::Bf16]).unwrap();
    for tokens in [1, 7, 256, 2048] {
        let llama = Llama::new(&cuda, tokens);
        let mut buffers = llama.upload(&stream);
        llama.rotate(&stream, &mut buffers, &CudaPositions::start(131_000));
        let got = download(&stream, &buffers);
        assert!(
            got == llama.expected(Positions::start(131_000)),
            "{tokens} tokens"
        );
    }
}

/// An enqueue is one kernel and nothing else: a capture refuses synchronisation, and would show an
/// allocation, copy or wait as a further node. The replay reads the positions that are in device
/// memory by then.
#[test]
fn a_captured_graph_replays_with_new_positions() {
    let Some(context) = context() else { return };
    // SAFETY: this test orders its own work, on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let cuda = Cuda::new(&context, &[Dtype::Bf16]).unwrap();
    let tokens = 64;
    let llama = Llama::new(&cuda, tokens);
    let mut ids = upload(&stream, &vec![0i64; tokens]);
    let mut buffers = llama.upload(&stream);
    stream.synchronize().unwrap();

    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL)
        .unwrap();
    llama.rotate(&stream, &mut buffers, &CudaPositions::per_token(&ids));
    let graph = stream
        .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
        .unwrap()
        .expect("something was captured");
    let mut nodes = 0;
    // SAFETY: the graph lives; without an array only the count is written.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut nodes) }
        .result()
        .unwrap();
    assert_eq!(nodes, 1);

    for round in 0..3i64 {
        let positions: Vec<i64> = (0..tokens as i64)
            .map(|t| t * 7 + round * 100_000)
            .collect();
        stream.memcpy_htod(&positions, &mut ids).unwrap();
        stream.memcpy_htod(&llama.q, &mut buffers[0]).unwrap();
        stream.memcpy_htod(&llama.k, &mut buffers[1]).unwrap();
        graph.launch().unwrap();
        let got = download(&stream, &buffers);
        assert!(
            got == llama.expected(Positions::per_token(&positions[..])),
            "round {round}"
        );
    }
}

/// In a chain of dependent launches on the same buffers each rotation sees what the one before wrote, in
/// a stream as in a graph; and where an image cannot be launched so, it is launched ordinarily.
#[test]
fn dependent_launches_see_what_earlier_ones_wrote() {
    let Some(context) = context() else { return };
    // SAFETY: this test orders its own work, on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let (major, _) = context.compute_capability().unwrap();
    let (chain_length, tokens) = match short() {
        true => (4, &[1, 40][..]),
        false => (20, &[1, 40, 1000][..]),
    };
    for (image, cuda) in images(&context, &[Dtype::Bf16]) {
        let dependent = cuda.can_launch_dependently(Dtype::Bf16);
        match image {
            KernelImage::PtxCompute75 | KernelImage::PtxCompute80 => assert!(!dependent),
            KernelImage::PtxCompute90 => assert!(dependent),
            _ => assert!(major >= 9 || !dependent),
        }
        for (&tokens, mode) in tokens.iter().flat_map(|t| MODES.map(|m| (t, m))) {
            let llama = Llama::new(&cuda, tokens).in_mode(mode);
            let positions: Vec<i64> = (0..tokens as i64).map(|t| 3 * t + 100).collect();
            let ids = upload(&stream, &positions);
            let mut buffers = llama.upload(&stream);
            stream.synchronize().unwrap();
            let mut expected = (llama.q.clone(), llama.k.clone());
            for link in 0..chain_length {
                let positions = match link % 2 {
                    0 => Positions::start(link),
                    _ => Positions::per_token(&positions),
                };
                llama.rotate_on_host(&mut expected, positions);
            }
            let expected = (raw(&expected.0), raw(&expected.1));
            let chain = |buffers: &mut [CudaSlice<bf16>; 2]| {
                for link in 0..chain_length {
                    let positions = match link % 2 {
                        0 => CudaPositions::start(link),
                        _ => CudaPositions::per_token(&ids),
                    };
                    llama.rotate(&stream, buffers, &positions);
                }
            };
            chain(&mut buffers);
            let got = download(&stream, &buffers);
            assert!(got == expected, "{image}, {tokens} tokens, {mode:?}");

            stream.memcpy_htod(&llama.q, &mut buffers[0]).unwrap();
            stream.memcpy_htod(&llama.k, &mut buffers[1]).unwrap();
            stream.synchronize().unwrap();
            stream
                .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL)
                .unwrap();
            chain(&mut buffers);
            let graph = stream
                .end_capture(
                    CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
                )
                .unwrap()
                .expect("something was captured");
            graph.launch().unwrap();
            let got = download(&stream, &buffers);
            assert!(got == expected, "graph: {image}, {tokens} tokens, {mode:?}");
        }
    }
}

/// A step of five sequences from packed qkv, with prompts and single tokens, padding, and one page that the
/// cache does not have.
struct ServingStep {
    cu_seqlens: [i32; 6],
    lengths: [i32; 5],
    pages: Vec<i32>,
    qkv: Vec<bf16>,
}

impl ServingStep {
    const TOKENS: usize = 160;
    const HEADS: usize = 8;
    const PAGES: usize = 48;
    const CACHE: usize = Self::PAGES * 16 * 2 * 128;

    /// 4 query, 2 key and 2 value heads of 128; with norms and a cache of codes, if that is wanted.
    fn problem(staged: bool) -> Problem {
        let window = |range| Layout::packed_heads(1, Self::TOKENS, Self::HEADS, 128, range);
        let cache = CacheLayout::paged_hnd(Self::PAGES, 16, 2, 128);
        let caches = KvCacheLayout::separate(cache, cache);
        let problem = Problem::new(Dtype::Bf16)
            .q(window(0..4))
            .k_to_cache(window(4..6))
            .v_to_cache(window(6..8))
            .one_buffer();
        if !staged {
            return problem.cache(caches);
        }
        let norm = Stages::new().norm(HeadNorm::rms(1e-6));
        let scales = ScaleLayout::heads_tokens(16, 2, 1);
        problem
            .q_stages(norm.scale(0.125))
            .k_stages(norm)
            .cache(caches.with_codes(StoredCodes::dynamic(Codes::E4m3, 1e-6, scales)))
    }

    fn new(seed: u64) -> Self {
        let elements = Self::TOKENS * Self::HEADS * 128;
        let qkv = random_elements(&mut Rng(seed), Dtype::Bf16, elements);
        let lengths = [0, 0, 3, 40, 100];
        let mut pages: Vec<i32> = (0..5 * 9).map(|i| (i * 29) % Self::PAGES as i32).collect();
        // Of the third sequence's token.
        pages[18] = Self::PAGES as i32;
        Self {
            cu_seqlens: [0, 7, 137, 138, 139, 140],
            lengths,
            pages,
            qkv: typed(&qkv),
        }
    }

    fn gamma() -> Vec<bf16> {
        (0..128)
            .map(|i| bf16::from_f32(1.0 + i as f32 / 64.0))
            .collect()
    }

    /// q, k and v; the caches; and their scales, as bytes of a buffer that has room for elements: after two
    /// steps, the second of which finds q as the first left it.
    fn twice_on_host(
        &self,
        rotator: &HostRotator,
        staged: bool,
    ) -> (Vec<bf16>, [Vec<u8>; 2], [Vec<f32>; 2]) {
        let plan = rotator.plan(&Self::problem(staged)).unwrap();
        let mut qkv = self.qkv.clone();
        let mut caches = [0; 2].map(|_| vec![0u8; 2 * Self::CACHE]);
        let mut scales = [0; 2].map(|_| vec![0f32; Self::CACHE / 128]);
        let gamma = Self::gamma();
        for _ in 0..2 {
            let positions =
                Positions::start_per_sequence(&self.lengths).cu_seqlens(&self.cu_seqlens);
            let ([k, v], [k_scales, v_scales]) = (&mut caches, &mut scales);
            let mut step = HostStep::new(positions)
                .buffer(&mut qkv[..])
                .k_cache(k)
                .v_cache(v)
                .slots(Slots::page_table(&self.pages, &self.lengths));
            if staged {
                step = step
                    .q_weights(HostWeights::new().norm(&gamma[..]))
                    .k_weights(HostWeights::new().norm(&gamma[..]))
                    .k_scales(k_scales)
                    .v_scales(v_scales);
            }
            assert_eq!(rotator.step(&plan, step), Ok(Stored::NotAll));
        }
        (qkv, caches, scales)
    }
}

#[test]
fn a_serving_step_equals_the_host_and_replays_with_new_pages() {
    let Some(context) = context() else { return };
    // SAFETY: all work of this context is ordered by one stream here, which capture needs.
    unsafe { context.disable_event_tracking() };
    let rope = Rope::new(
        Frequencies::from_theta(500_000.0, 128).unwrap(),
        Pairing::HalfSplit,
    );
    let host = Host::new().rotator(&rope);
    for (image, cuda) in images(&context, &[Dtype::Bf16]) {
        for (staged, mode) in [false, true]
            .into_iter()
            .flat_map(|staged| MODES.map(|mode| (staged, mode)))
        {
            let stream = context.new_stream().unwrap();
            let rotator = cuda.rotator(&rope).unwrap().with_launch_mode(mode);
            let plan = rotator.plan(&ServingStep::problem(staged)).unwrap();
            let mut report = cuda.report().unwrap();
            let first = ServingStep::new(1);
            let mut qkv = upload(&stream, &first.qkv);
            let bytes = 2 * ServingStep::CACHE;
            let mut caches = [0; 2].map(|_| stream.alloc_zeros::<u8>(bytes).unwrap());
            let mut scales =
                [0; 2].map(|_| stream.alloc_zeros::<f32>(ServingStep::CACHE / 128).unwrap());
            let gamma = upload(&stream, &ServingStep::gamma());
            let cu_seqlens = upload(&stream, &first.cu_seqlens);
            let mut lengths = upload(&stream, &first.lengths);
            let mut pages = upload(&stream, &first.pages);
            stream.synchronize().unwrap();
            stream
                .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
                .unwrap();
            // A dependent launch has one before it then that writes what it reads.
            for _ in 0..2 {
                let positions = CudaPositions::start_per_sequence(&lengths).cu_seqlens(&cu_seqlens);
                let ([k, v], [k_scales, v_scales]) = (&mut caches, &mut scales);
                let mut step = CudaStep::new(positions)
                    .buffer(qkv.as_view_mut())
                    .k_cache(k)
                    .v_cache(v)
                    .slots(SlotsIn::page_table(&pages, &lengths));
                if staged {
                    step = step
                        .q_weights(CudaWeights::new().norm(gamma.as_view()))
                        .k_weights(CudaWeights::new().norm(gamma.as_view()))
                        .k_scales(k_scales)
                        .v_scales(v_scales);
                }
                rotator.step(&stream, &plan, step, Some(&report)).unwrap();
            }
            let graph = stream
                .end_capture(
                    CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
                )
                .unwrap()
                .unwrap();
            for seed in 1..4 {
                let mut given = ServingStep::new(seed);
                given.lengths[3] += seed as i32;
                given.pages.rotate_left(9 * (seed as usize - 1));
                // Wherever the page is that the cache does not have, a token needs it.
                given.pages[18] = -1;
                stream.memcpy_htod(&given.qkv, &mut qkv).unwrap();
                stream.memcpy_htod(&given.lengths, &mut lengths).unwrap();
                stream.memcpy_htod(&given.pages, &mut pages).unwrap();
                for cache in &mut caches {
                    stream.memset_zeros(cache).unwrap();
                }
                for scales in &mut scales {
                    stream.memset_zeros(scales).unwrap();
                }
                report.clear(&stream).unwrap();
                assert_eq!(report.stored(&stream), Ok(Stored::All));
                graph.launch().unwrap();
                let what = format!("{image}, staged: {staged}, {mode:?}, seed {seed}");
                assert_eq!(report.stored(&stream), Ok(Stored::NotAll), "{what}");
                let (expected, expected_caches, expected_scales) =
                    given.twice_on_host(&host, staged);
                let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let got: Vec<bf16> = stream.clone_dtoh(&qkv).unwrap();
                assert!(bits(&got) == bits(&expected), "{what}");
                for (got, expected) in caches.iter().zip(&expected_caches) {
                    assert!(stream.clone_dtoh(got).unwrap() == *expected, "{what}");
                }
                for (got, expected) in scales.iter().zip(&expected_scales) {
                    assert!(stream.clone_dtoh(got).unwrap() == *expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn two_threads_share_one_rotator_on_two_streams() {
    let Some(context) = context() else { return };
    let cuda = Cuda::new(&context, &[Dtype::Bf16]).unwrap();
    let llama = Llama::new(&cuda, 128);
    let rounds = if short() { 3 } else { 20 };
    std::thread::scope(|scope| {
        for thread in 0..2i64 {
            let (context, llama) = (&context, &llama);
            scope.spawn(move || {
                let stream = context.new_stream().unwrap();
                for round in 0..rounds {
                    let start = thread * 1_000_000 + round;
                    let mut buffers = llama.upload(&stream);
                    llama.rotate(&stream, &mut buffers, &CudaPositions::start(start));
                    let got = download(&stream, &buffers);
                    assert!(got == llama.expected(Positions::start(start)));
                }
            });
        }
    });
}

/// A raw stream and raw addresses, as an engine with its own allocator has them.
#[test]
fn the_raw_entry_equals_the_safe_one() {
    use phasor::cudarc::driver::{DevicePtr, DevicePtrMut};
    let Some(context) = context() else { return };
    let stream = context.new_stream().unwrap();
    let cuda = Cuda::new(&context, &[Dtype::Bf16]).unwrap();
    let llama = Llama::new(&cuda, 33);
    let positions: Vec<i32> = (0..33).map(|t| 5 * t - 40).collect();
    let ids = upload(&stream, &positions);
    let mut buffers = llama.upload(&stream);
    {
        let [q, k] = &mut buffers;
        let (q, _q_guard) = q.device_ptr_mut(&stream);
        let (k, _k_guard) = k.device_ptr_mut(&stream);
        let (ids, _ids_guard) = ids.device_ptr(&stream);
        let both = |address| TensorAddresses {
            source: address,
            destination: address,
        };
        let positions = RawPositions::per_token(Ids::at(ids, IdType::I32, 33));
        // SAFETY: the buffers have the plan's lengths, and outlive the launch, which the copies
        // below wait for.
        unsafe {
            llama
                .rotator
                .rotate_raw(stream.cu_stream(), &llama.plan, both(q), both(k), positions)
                .unwrap();
        }
    }
    let got = download(&stream, &buffers);
    assert!(got == llama.expected(Positions::per_token(&positions[..])));
}

/// Objects of one context refuse buffers of another, and work in one that is not the device's
/// primary context.
#[test]
fn contexts_are_kept_apart() {
    let Some(primary) = context() else { return };
    let mut raw_context = std::ptr::null_mut();
    // SAFETY: a plain context on a device that exists; its ownership goes to cudarc.
    let other = unsafe {
        sys::cuCtxCreate_v4(
            &mut raw_context,
            std::ptr::null_mut(),
            0,
            primary.cu_device(),
        )
        .result()
        .unwrap();
        CudaContext::from_raw_context(0, primary.cu_device(), raw_context).unwrap()
    };
    let case = random_case(
        &mut Rng(3),
        Wish {
            dtype: Some(Dtype::F32),
            ..Wish::default()
        },
    );
    let cuda = Cuda::new(&other, &[Dtype::F32]).unwrap();
    let got = on_gpu(&cuda, &other.default_stream(), &case);
    assert_eq!(got, case.on_host(Isa::best()));

    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, 64).unwrap(),
        Pairing::HalfSplit,
    );
    let rotator = cuda.rotator(&rope).unwrap();
    let layout = Layout::tokens(1, 1, 64);
    let plan = rotator.plan(&Problem::new(Dtype::F32).q(layout)).unwrap();
    let foreign = primary.default_stream();
    let mut q = upload(&foreign, &vec![0f32; layout.required_len().unwrap()]);
    let error = rotator
        .rotate(
            &foreign,
            &plan,
            Some(InOut::InPlace(q.as_view_mut())),
            None,
            &CudaPositions::start(0),
        )
        .unwrap_err();
    assert!(
        matches!(error, phasor::Error::DeviceMismatch { .. }),
        "{error}"
    );
}

/// More than 2^32 elements, with the last token's bytes compared.
#[test]
fn a_tensor_past_two_to_the_32_elements() {
    let Some(context) = context() else { return };
    if short() {
        return;
    }
    let stream = context.default_stream();
    let cuda = Cuda::new(&context, &[Dtype::Bf16]).unwrap();
    let (heads, head_dim) = (64, 128);
    let tokens = (1usize << 32) / (heads * head_dim) + 3;
    let free = context.mem_get_info().unwrap().0;
    if free < 10 << 30 {
        println!("skipped: {free} bytes free, 9 GiB needed");
        return;
    }
    let rope = Rope::new(
        Frequencies::from_theta(1e4, head_dim).unwrap(),
        Pairing::Interleaved,
    );
    let rotator = cuda.rotator(&rope).unwrap();
    let layout = Layout::tokens(tokens, heads, head_dim);
    let plan = rotator.plan(&Problem::new(Dtype::Bf16).q(layout)).unwrap();
    let mut q = stream
        .alloc_zeros::<bf16>(layout.required_len().unwrap())
        .unwrap();
    let token: Vec<bf16> = typed(&random_elements(&mut Rng(5), Dtype::Bf16, heads * head_dim));
    let last = (tokens - 1) * heads * head_dim;
    stream
        .memcpy_htod(&token, &mut q.slice_mut(last..))
        .unwrap();
    rotator
        .rotate(
            &stream,
            &plan,
            Some(InOut::InPlace(q.as_view_mut())),
            None,
            &CudaPositions::start(11),
        )
        .unwrap();
    let got = stream.clone_dtoh(&q.slice(last..)).unwrap();
    stream.synchronize().unwrap();

    let host = Host::new().rotator(&rope);
    let one = Layout::tokens(1, heads, head_dim);
    let plan = host.plan(&Problem::new(Dtype::Bf16).q(one)).unwrap();
    let mut expected = token;
    host.rotate(
        &plan,
        Some(InOut::InPlace(&mut expected[..])),
        None,
        Positions::start(11 + tokens as i64 - 1),
    )
    .unwrap();
    assert_eq!(raw(&got), raw(&expected));
}

/// Pages whose slots are not like the next page's, so that ranges are up to three launches.
#[test]
fn cached_keys_move_as_on_the_host() {
    let Some(context) = context() else { return };
    let stream = context.default_stream();
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, 64).unwrap(),
        Pairing::HalfSplit,
    );
    let layout = CacheLayout::paged_hnd(20, 16, 3, 80);
    let cache = KvCacheLayout::k(layout);
    let ranges = [
        SlotRange::new(5..70, -300),
        SlotRange::new(64..90, -300),
        SlotRange::new(200..207, 1 << 40),
    ];
    let len = layout.required_len().unwrap();
    let keys: Vec<bf16> = typed(&random_elements(&mut Rng(8), Dtype::Bf16, len));
    let mut expected = keys.clone();
    let host = Host::new().rotator(&rope);
    let plan = host.shift_plan(Dtype::Bf16, &cache, 4).unwrap();
    host.shift_cached(&plan, &mut expected, KeyScales::None, &ranges)
        .unwrap();
    for (image, cuda) in images(&context, &[Dtype::Bf16]) {
        let rotator = cuda.rotator(&rope).unwrap();
        let plan = rotator.shift_plan(Dtype::Bf16, &cache, 4).unwrap();
        let mut on_device = stream.clone_htod(&keys).unwrap();
        rotator
            .shift_cached(&stream, &plan, &mut on_device, CudaKeyScales::None, &ranges)
            .unwrap();
        let got = stream.clone_dtoh(&on_device).unwrap();
        stream.synchronize().unwrap();
        assert!(raw(&got) == raw(&expected), "{image}");
        let past = [SlotRange::new(0..16, 1), SlotRange::new(0..321, 1)];
        let none = CudaKeyScales::None;
        let refused = rotator.shift_cached(&stream, &plan, &mut on_device, none, &past);
        assert!(matches!(refused, Err(Error::SlotRange { .. })));
    }
}

/// Codes and their scales, in pages of heads in blocks.
#[test]
fn cached_codes_move_as_on_the_host() {
    let Some(context) = context() else { return };
    let stream = context.default_stream();
    let rope = Rope::new(
        Frequencies::from_theta(10_000.0, 64).unwrap(),
        Pairing::Interleaved,
    );
    let layout = CacheLayout::paged_packed(20, 16, 3, 80, 16);
    let scale_layout = ScaleLayout::tokens_heads(16, 3, 1);
    let ranges = [
        SlotRange::new(5..70, -300),
        SlotRange::new(200..207, 1 << 40),
    ];
    let len = layout.required_len().unwrap();
    let mut rng = Rng(8);
    let keys: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
    let scales = vec![0.25f32; 20 * 16 * 3];
    for codes in [Codes::E4m3, Codes::Int8] {
        let stored = StoredCodes::dynamic(codes, 1e-6, scale_layout);
        let cache = KvCacheLayout::k(layout).with_k_codes(stored);
        let (mut expected, mut expected_scales) = (keys.clone(), scales.clone());
        let host = Host::new().rotator(&rope);
        let plan = host.shift_plan(Dtype::Bf16, &cache, 4).unwrap();
        let written = KeyScales::Written((&mut expected_scales).into());
        host.shift_cached(&plan, &mut expected, written, &ranges)
            .unwrap();
        assert!(expected != keys);
        for (image, cuda) in images(&context, &[Dtype::Bf16]) {
            let rotator = cuda.rotator(&rope).unwrap();
            let plan = rotator.shift_plan(Dtype::Bf16, &cache, 4).unwrap();
            let mut on_device = stream.clone_htod(&keys).unwrap();
            let mut scales_there = stream.clone_htod(&scales).unwrap();
            let written = CudaKeyScales::Written((&mut scales_there).into());
            rotator
                .shift_cached(&stream, &plan, &mut on_device, written, &ranges)
                .unwrap();
            let got = stream.clone_dtoh(&on_device).unwrap();
            let got_scales = stream.clone_dtoh(&scales_there).unwrap();
            stream.synchronize().unwrap();
            assert!(got == expected, "{codes:?}, {image}");
            assert!(
                got_scales == expected_scales,
                "scales of {codes:?}, {image}"
            );
        }
    }
}

/// The driver's compiler lays the structs of a call out as the bindings do.
#[test]
fn call_layout_agrees_with_the_bindings() {
    use phasor::cudarc::driver::{LaunchConfig, PushKernelArg};
    use phasor::cudarc::nvrtc::Ptx;
    let Some(context) = context() else { return };
    let stream = context.default_stream();
    let text = include_str!("../cuda/prebuilt/call_layout.compute_75.ptx");
    let module = context.load_module(Ptx::from_src(text)).unwrap();
    let kernel = module.load_function("phasor_call_layout").unwrap();
    let expected = call_layout::host_layout();
    let mut out = stream.alloc_zeros::<u64>(expected.len()).unwrap();
    let one = LaunchConfig {
        grid_dim: (1, 1, 1),
        block_dim: (1, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the kernel writes as many values as the list has, which the interpreter checks too.
    unsafe { stream.launch_builder(&kernel).arg(&mut out).launch(one) }.unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), expected);
}
