//! Sizes and counts as a broken file or a mistaken caller may give them: each is refused by a typed
//! error before anything is allocated or looped over. A test that panics, is killed or does not end
//! has found one that is not. Whatever text a file holds, messages stay short.

use phasor::call::{Addresses, AngleAddresses, RawPositions, TensorAddresses};
use phasor::config::{Axes, GgmlMrope, GgufValue, ModelConfig, RopeConfig};
use phasor::interfaces::{
    Array, InterfaceError, Tensor, hugging_face, max, mlx, onnx, tables, vllm,
};
use phasor::launch::Target;
use phasor::{
    CosSinTable, Device, Dtype, Error, Frequencies, FrequencyRows, Host, IdType, Ids, InOut,
    Layout, Pairing, Plan, Positions, Problem, Rope,
};

/// Above every limit, up to where sums and products of sizes wrap.
const HUGE: [usize; 10] = [
    (1 << 25) + 2,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    1 << 60,
    1 << 61,
    1 << 62,
    1 << 63,
    usize::MAX - 1,
    usize::MAX,
];

fn names<T>(what: &str, argument: &str, result: Result<T, InterfaceError>) {
    match result.err() {
        Some(InterfaceError::Value { argument: got, .. }) => assert_eq!(got, argument, "{what}"),
        other => panic!("{what}: {other:?}, and not an error about {argument}"),
    }
}

#[test]
fn tables_of_too_many_pairs() {
    for dims in HUGE.into_iter().chain([0, 1, 7, (1 << 16) + 2]) {
        let what = format!("{dims} dims");
        for rows in [0, 1, 100, usize::MAX] {
            names(&what, "rotary_dim", tables::inv_freq(1e4, dims));
            names(
                &what,
                "rotary_dim",
                tables::vllm(1e4, dims, rows, Dtype::F32),
            );
            names(&what, "head_dim", tables::max(1e4, dims, rows, Dtype::Bf16));
            names(&what, "dims", tables::mlx(1e4, dims, 1.0, rows, Dtype::F16));
            names(
                &what,
                "n_dims",
                tables::llama_cpp(1e4, dims, 1.0, None, rows),
            );
        }
    }
    let widest = tables::vllm(1e4, 1 << 16, 2, Dtype::F32).unwrap();
    assert_eq!((widest.rows(), widest.pairs()), (2, 1 << 15));
}

#[test]
fn tables_of_too_many_rows() {
    for rows in HUGE {
        let what = format!("{rows} rows");
        for dims in [2, 128, 1 << 16] {
            let inv_freq = tables::inv_freq(1e4, dims).unwrap();
            let periods = vec![1.0; dims / 2];
            let table = tables::hugging_face(&inv_freq, 1.0, rows, Dtype::F32);
            names(&what, "rows", table);
            names(&what, "rows", tables::vllm(1e4, dims, rows, Dtype::F32));
            names(&what, "rows", tables::max(1e4, dims, rows, Dtype::F32));
            names(&what, "rows", tables::mlx(1e4, dims, 1.0, rows, Dtype::F32));
            names(
                &what,
                "rows",
                tables::mlx_freqs(&periods, 1.0, rows, Dtype::F32),
            );
            names(&what, "rows", tables::llama_cpp(1e4, dims, 1.0, None, rows));
        }
    }
    // As many as are allowed, of so many pairs that no memory holds them.
    let vast = tables::vllm(1e4, 1 << 16, 1 << 25, Dtype::F32);
    names("2^41 bytes", "rows", vast);
}

#[test]
fn tables_of_nothing() {
    for rows in HUGE.into_iter().chain([0, 1, 3]) {
        for table in [
            tables::hugging_face(&[], 1.0, rows, Dtype::F32),
            tables::mlx_freqs(&[], 1.0, rows, Dtype::F32),
        ] {
            let rope = InterfaceError::Rope(Error::RotaryDim { rotary_dim: 0 });
            assert_eq!(table.err(), Some(rope), "{rows} rows of no pair");
        }
    }
    let none = tables::vllm(1e4, 128, 0, Dtype::F32).err();
    let (cos, sin, pairs) = (0, 0, 64);
    let shape = Error::TableShape { cos, sin, pairs };
    assert_eq!(none, Some(InterfaceError::Rope(shape)));
}

#[test]
fn tables_of_endless_positions() {
    let frequencies = Frequencies::from_theta(1e4, 128).unwrap();
    for table in [
        frequencies.table(0..i64::MAX),
        frequencies.table(i64::MIN..i64::MAX),
        frequencies.table(0..1 << 40),
        frequencies.table(std::iter::repeat(7)),
        frequencies.table(0..),
    ] {
        assert!(matches!(table, Err(Error::TableTooLarge { pairs: 64, .. })));
    }
}

#[test]
fn axes_of_heads_of_any_size() {
    let imrope = |sections| Axes::Ggml {
        mode: GgmlMrope::Imrope,
        sections,
    };
    let vision = |sections| Axes::Ggml {
        mode: GgmlMrope::Vision,
        sections,
    };
    for size in HUGE.into_iter().chain([(1 << 14) + 4]) {
        for rotary_dim in [size, size - size % 4] {
            let pairs = rotary_dim / 2;
            for axes in [
                Axes::MropeSections([pairs, 0, 0]),
                Axes::MropeInterleaved([pairs, 0, 0]),
                Axes::MropeInterleaved([0, usize::MAX, 1]),
                Axes::ErnieSections([pairs / 2, pairs / 2, pairs % 2]),
                Axes::VisionHalves,
                Axes::PixtralHalves,
                Axes::Video([rotary_dim, 0, 0]),
                Axes::Video([usize::MAX - 1, 2, rotary_dim]),
                Axes::wan(rotary_dim),
                imrope([16, 24, 24, 0]),
                imrope([usize::MAX; 4]),
                vision([pairs, 0, 0, 0]),
            ] {
                let axis_of_pair = axes.axis_of_pair(rotary_dim);
                assert!(axis_of_pair.is_err(), "{axes:?} of {rotary_dim}");
                assert!(axes.clone().frequencies(1e4, rotary_dim).is_err());
                // Sections of a file beside a head of usual size.
                let config = RopeConfig::new(1e4, 128).unwrap().with_axes(axes);
                if let Ok(frequencies) = config.frequencies() {
                    assert_eq!(frequencies.pairs(), 64);
                }
            }
        }
    }
    // The largest head that a config may have.
    let axes = Axes::VisionHalves.axis_of_pair(1 << 14).unwrap();
    assert_eq!(axes.len(), 1 << 13);
}

#[test]
fn frequencies_of_any_size() {
    for size in HUGE {
        assert!(Frequencies::from_theta(1e4, size).is_err());
        assert!(Frequencies::from_theta_scaled(1e4, size, 0.5).is_err());
        assert!(Frequencies::from_axis_steps(vec![1; 4], size).is_err());
        let one = Frequencies::from_theta(1e4, 8).unwrap();
        assert!(one.clone().with_axes(size, &[0, 0, 1, 1]).is_err());
        assert!(one.with_axes(2, &[0, 0, size, 1]).is_err());
        assert!(CosSinTable::new(vec![1.0; 4], vec![0.0; 4], size).is_err());
        assert!(RopeConfig::new(1e4, size).is_err());
        assert!(
            RopeConfig::new(1e4, 128)
                .unwrap()
                .with_rotary_dim(size)
                .is_err()
        );
    }
    let rows = FrequencyRows::new(&[Frequencies::from_theta(1e4, 8).unwrap()]).unwrap();
    assert!(rows.row(u32::MAX).is_err());
    let rows = rows.with_lengths(&[u64::MAX - 1]).unwrap();
    assert_eq!(rows.row_for_length(u64::MAX - 1), Ok(0));
    assert!(rows.row_for_length(u64::MAX).is_err());
}

/// Sizes that shapes are made of: none, usual ones and such as no memory holds.
const AXES: [usize; 7] = [0, 1, 2, 8, 1 << 33, 1 << 63, usize::MAX];

/// All shapes of `rank` axes that hold as many elements as the memory, or none.
fn shapes(rank: u32, memory: usize) -> impl Iterator<Item = Vec<usize>> {
    let all = AXES.len().pow(rank);
    let shape = move |mut number: usize| -> Vec<usize> {
        let axis = |_| {
            let axis = AXES[number % AXES.len()];
            number /= AXES.len();
            axis
        };
        (0..rank).map(axis).collect()
    };
    (0..all).map(shape).filter(move |shape| {
        let elements = shape.iter().map(|&axis| axis as f64).product::<f64>();
        elements == memory as f64
    })
}

/// Every shape that `memory` elements can be said to have, and that memory.
fn each_tensor(ranks: &[u32], mut call: impl FnMut(Tensor<'_, f32>, &[usize])) {
    for &rank in ranks {
        for memory in [0, 16] {
            for shape in shapes(rank, memory) {
                call(Tensor::new(&mut vec![1.0f32; memory], &shape), &shape);
            }
        }
    }
}

#[test]
fn tensors_of_any_shape() {
    let host = Device::host();
    let mut done = 0;
    let rope = mlx::Rope::new(&host, 2, false, mlx::Spectrum::Base(1e4), 1.0).unwrap();
    let embedding =
        max::RotaryEmbedding::new(&host, &max::Arguments::new(2, 1, 1e4, usize::MAX)).unwrap();
    each_tensor(&[3, 4], |x, _| done += usize::from(rope.call(x, 3).is_ok()));
    each_tensor(&[3, 4], |x, _| {
        done += usize::from(embedding.call(x, 3).is_ok())
    });
    let vllm = vllm::RotaryEmbedding::new(&host, 2, 2, usize::MAX, 1e4, true).unwrap();
    for positions in [&[][..], &[1], &[1, 2], &[1; 8]] {
        each_tensor(&[2, 3], |x, _| {
            done += usize::from(vllm.forward(positions, x, None).is_ok());
        });
    }
    // Every shape of a table, with every shape of what it rotates.
    for memory in [0, 16] {
        let values = vec![0.5f32; memory];
        for table in shapes(2, memory)
            .chain(shapes(3, memory))
            .chain(shapes(4, memory))
        {
            let array = Array::new(&values, &table);
            if let Ok(made) = vllm::RotaryEmbedding::from_cache(&host, 1 << 20, array, true) {
                each_tensor(&[2], |x, _| {
                    done += usize::from(made.forward(&[], x, None).is_ok());
                });
            }
            let form = hugging_face::Form::RotateHalf;
            if let Ok(made) = hugging_face::CosSin::new(&host, array, array, form) {
                each_tensor(&[4], |x, _| {
                    done += usize::from(made.apply(x, None, 1).is_ok())
                });
                each_tensor(&[4], |x, _| {
                    done += usize::from(made.apply(x, None, 2).is_ok())
                });
            }
            if let Ok(made) = hugging_face::FreqsCis::new(&host, array) {
                each_tensor(&[4], |x, _| {
                    done += usize::from(made.apply_rotary_emb(x, None, 2).is_ok());
                });
            }
            for (num_heads, rotary_embedding_dim) in [
                (0, 0),
                (1, 2),
                (8, 0),
                (usize::MAX, 0),
                (usize::MAX, usize::MAX),
            ] {
                let attributes = onnx::Attributes {
                    num_heads,
                    rotary_embedding_dim,
                    ..onnx::Attributes::default()
                };
                if let Ok(node) = onnx::RotaryEmbedding::new(&host, array, array, attributes) {
                    each_tensor(&[3, 4], |x, shape| {
                        let ids = Array::new(&[], &shape[..2]);
                        let ids = (table.len() == 2).then_some(ids);
                        done += usize::from(node.call(x, ids).is_ok());
                    });
                }
                let node =
                    onnx::com_microsoft::RotaryEmbedding::new(&host, array, array, attributes);
                if let Ok(node) = node {
                    each_tensor(&[3, 4], |x, _| {
                        let start = Array::new(&[0], &[1]);
                        done += usize::from(node.call(x, start).is_ok());
                    });
                }
            }
        }
    }
    assert!(done > 1000, "only {done} calls had something to do");
}

#[test]
fn embeddings_of_any_arguments() {
    let host = Device::host();
    let sizes = || HUGE.into_iter().chain([0, 1, 2, 64]);
    for dim in sizes() {
        for n_heads in sizes() {
            for max_seq_len in HUGE.into_iter().chain([0, 8]) {
                for head_dim in [None, Some(2), Some(dim)] {
                    let arguments = max::Arguments {
                        head_dim,
                        ..max::Arguments::new(dim, n_heads, 1e4, max_seq_len)
                    };
                    let Ok(mut embedding) = max::RotaryEmbedding::dynamic(&host, &arguments) else {
                        continue;
                    };
                    let table = embedding.freqs_cis_base();
                    assert_eq!(table.is_ok(), max_seq_len <= 8, "{arguments:?}");
                    embedding.maybe_update_freqs(usize::MAX);
                    assert!(embedding.freqs_cis().is_err());
                }
            }
        }
    }
    for size in HUGE {
        let vllm = |head, dim, rows| vllm::RotaryEmbedding::new(&host, head, dim, rows, 1e4, true);
        assert!(vllm(size, size, 8).is_err());
        // Nothing is made of these two.
        assert!(vllm(size, 64, size).is_ok());
        let rope = mlx::Rope::new(&host, size, true, mlx::Spectrum::Base(1e4), 1.0);
        assert!(rope.is_err());
    }
}

fn addresses(positions: RawPositions) -> Addresses {
    let tensor = TensorAddresses {
        source: 4096,
        destination: 4096,
    };
    let (steps, factors) = (4096, 4096);
    Addresses {
        q: tensor,
        k: tensor,
        angles: AngleAddresses::Steps { steps, factors },
        positions,
        v: TensorAddresses::default(),
        cache: None,
        stages: Default::default(),
    }
}

#[test]
fn rows_for_batches_of_nothing() {
    let one = Frequencies::from_theta(1e4, 8).unwrap();
    let rows = FrequencyRows::new(&[one.clone(), one]).unwrap();
    let rope = Rope::new(rows, Pairing::HalfSplit);
    let rotator = Host::new().rotator(&rope);
    for size in HUGE {
        for layout in [
            Layout::bshd(size, 0, 1, 8),
            Layout::bshd(0, size, 1, 8),
            Layout::bshd(size, 1, 0, 8),
            Layout::bshd(1, size, 0, 8),
        ] {
            let Ok(plan) = rotator.plan(&Problem::new(Dtype::F32).q(layout)) else {
                continue;
            };
            let none: [u32; 0] = [];
            let per_token = Positions::start(0).frequency_rows_per_token(&none);
            let per_sequence = Positions::start(0).frequency_rows_per_sequence(&none);
            for positions in [per_token, per_sequence] {
                let mut x: [f32; 0] = [];
                let q = Some(InOut::InPlace(&mut x[..]));
                let [batch, tokens, ..] = layout.shape();
                let wanted = match positions {
                    _ if positions == per_sequence => batch,
                    _ => batch.saturating_mul(tokens),
                };
                let result = rotator.rotate(&plan, q, None, positions);
                assert_eq!(result.is_ok(), wanted == 0, "{layout:?}: {result:?}");
            }
            // By address, ids may be said to be of any number.
            for len in [0, size, usize::MAX] {
                let ids = Ids::at(4096, IdType::I64, len);
                let positions = RawPositions::per_token(ids).frequency_rows_per_token(ids);
                if let Ok(call) = plan.call(&addresses(positions)) {
                    assert!(call.is_none());
                }
            }
        }
    }
}

#[test]
fn launches_of_any_device() {
    let rope = Rope::new(
        Frequencies::from_theta(1e4, 128).unwrap(),
        Pairing::HalfSplit,
    );
    let largest = (1 << 31) - 1;
    for tokens in [1, 7, largest] {
        let layout = Layout::tokens(tokens, 1, 128);
        let plan = Plan::new(&rope, &Problem::new(Dtype::F32).q(layout)).unwrap();
        let call = plan.call(&addresses(RawPositions::start(0)));
        let call = call.unwrap().unwrap();
        for multiprocessors in [0, 1, 132, u32::MAX] {
            let launch = call.launch(&Target::new(multiprocessors));
            let threads: u32 = launch.block.iter().product();
            assert!((1..=256).contains(&threads));
            let [x, ..] = launch.grid;
            assert!(u64::from(x) * u64::from(launch.block[2]) >= tokens as u64);
        }
    }
}

#[test]
#[should_panic(expected = "of 2 ids")]
fn an_index_of_an_id_does_not_wrap() {
    // Four bytes each: index 2^62 would be the first again.
    let ids: Ids<&[u8]> = (&[5i32, 6]).into();
    ids.get(1 << 62);
}

/// No message shows a text of this length whole, whoever gave it.
const LONG: usize = 100_000;

fn is_short<E: std::error::Error>(result: Result<(), E>) {
    if let Err(error) = result {
        let message = error.to_string();
        assert!(
            message.len() < 2000,
            "{} bytes: {:.200}",
            message.len(),
            message
        );
    }
}

#[test]
fn messages_do_not_repeat_long_texts() {
    let long = "x".repeat(LONG);
    for name in [
        long.clone(),
        format!("cuda:{long}"),
        format!("cuda:{}", "9".repeat(LONG)),
    ] {
        let device = Device::from_name(&name, &[Dtype::F32]);
        assert!(device.is_err());
        is_short(device.map(drop));
    }
    let host = Device::host();
    let rope = mlx::Rope::new(&host, 2, false, mlx::Spectrum::Base(1e4), 1.0).unwrap();
    let shape = vec![12_345_678; LONG];
    is_short(rope.call(Tensor::new(&mut [0.0f32; 2], &shape), 0));
    let wide = [&shape[..], &[2]].concat();
    is_short(rope.call(Tensor::new(&mut [0.0f32; 2], &wide), 0));

    // A file of any of whose texts may be long.
    let gguf = |long_key: &str, text: &str, architecture: &str| {
        let result = ModelConfig::from_gguf(|key| {
            if key.ends_with(long_key) {
                return Some(GgufValue::Str(text.into()));
            }
            match key.split_once('.').map_or(key, |(_, key)| key) {
                "architecture" => Some(GgufValue::Str(architecture.into())),
                "embedding_length" => Some(GgufValue::U64(4096)),
                "attention.head_count" => Some(GgufValue::U64(32)),
                "rope.scaling.factor" => Some(GgufValue::F64(4.0)),
                _ => None,
            }
        });
        assert!(result.is_err(), "{long_key}");
        is_short(result.map(drop));
    };
    for key in [
        "general.architecture",
        "embedding_length",
        "head_count",
        "freq_base",
        "scaling.type",
        "dimension_count",
    ] {
        gguf(key, &long, "llama");
    }
}

#[cfg(feature = "hf-config")]
#[test]
fn messages_about_a_config_are_short() {
    use serde_json::{Value, json};
    let long = "x".repeat(LONG);
    let list: Vec<_> = (0..1000)
        .map(|i| format!("{i}{}", "x".repeat(100)))
        .collect();
    let values = [
        json!(long),
        json!(vec![long.clone(); 8]),
        json!(list),
        json!({ &*long: 1 }),
        json!({ &*long: { "rope_type": &*long, "rope_theta": -1 } }),
        json!({ "full_attention": { "rope_type": &*long }, &*long: { "rope_theta": 1e4 } }),
        json!(vec![-7; 1 << 12]),
        Value::String("\u{1F600}".repeat(LONG / 4)),
    ];
    let model = |model_type: &str| {
        json!({
            "model_type": model_type,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 4,
            "rope_theta": 1e4,
            "max_position_embeddings": 4096,
            "rope_scaling": { "rope_type": "yarn", "factor": 4.0 },
        })
    };
    let mut refused = 0;
    for model_type in [
        &*long,
        "llama",
        "gemma3_text",
        "deepseek_v3",
        "qwen2_vl",
        "gemma3",
        "bert",
    ] {
        for key in [
            "",
            "/model_type",
            "/hidden_size",
            "/head_dim",
            "/num_attention_heads",
            "/num_hidden_layers",
            "/layer_types",
            "/rope_theta",
            "/partial_rotary_factor",
            "/rope_scaling",
            "/rope_scaling/rope_type",
            "/rope_scaling/type",
            "/rope_scaling/factor",
            "/rope_scaling/mrope_section",
            "/rope_parameters",
            "/rope_parameters/rope_type",
            "/text_config",
            "/vision_config",
        ] {
            for value in &values {
                let mut config = model(model_type);
                let (parent, name) = key.rsplit_once('/').unwrap_or(("", "other"));
                let parent = match parent {
                    "/rope_parameters" => {
                        config["rope_parameters"] = config["rope_scaling"].take();
                        &mut config["rope_parameters"]
                    }
                    parent => config.pointer_mut(parent).unwrap(),
                };
                parent[name] = value.clone();
                let config = config.to_string();
                let rope = RopeConfig::from_hf_config(&config);
                refused += usize::from(rope.is_err());
                is_short(rope.map(drop));
                let model = match ModelConfig::from_hf_config(&config) {
                    Ok(model) => model,
                    Err(error) => {
                        is_short(Err::<(), _>(error));
                        continue;
                    }
                };
                is_short(model.rope().map(drop));
                is_short(model.rope_for(&long).map(drop));
                is_short(model.rope_of_layer(usize::MAX).map(drop));
                is_short(model.vision().map(drop));
            }
        }
    }
    assert!(refused > 300, "only {refused} configs were refused");
    is_short(RopeConfig::from_hf_config(&long).map(drop));
    is_short(RopeConfig::from_hf_config(&format!("{{\"{long}\": {long}}}")).map(drop));
    is_short(RopeConfig::from_hf_config(&"[".repeat(LONG)).map(drop));
}

#[cfg(feature = "hf-config")]
#[test]
fn layers_without_number() {
    use serde_json::json;
    for layers in [1 << 17, 1 << 32, 1 << 53, u64::MAX - 1, u64::MAX] {
        for model_type in [
            "llama",
            "gemma3_text",
            "gemma2",
            "cohere2",
            "smollm3",
            "llama4_text",
        ] {
            let config = json!({
                "model_type": model_type,
                "hidden_size": 4096,
                "head_dim": 128,
                "num_attention_heads": 32,
                "num_hidden_layers": layers,
                "rope_theta": 1e4,
            });
            // Some families need no list of their layers.
            if let Ok(model) = ModelConfig::from_hf_config(&config.to_string()) {
                assert!(model.rope_of_layer(usize::MAX).is_err());
            }
        }
        for architecture in [
            "llama",
            "gemma3",
            "cohere2",
            "smollm3",
            "qwen35",
            "granitehybrid",
        ] {
            let read = ModelConfig::from_gguf(|key| {
                match key.split_once('.').map_or(key, |(_, key)| key) {
                    "architecture" => Some(GgufValue::Str(architecture.into())),
                    "block_count" => Some(GgufValue::U64(layers)),
                    "embedding_length" => Some(GgufValue::U64(4096)),
                    "attention.head_count" => Some(GgufValue::U64(32)),
                    _ => None,
                }
            });
            if let Ok(model) = read {
                assert!(model.rope_of_layer(usize::MAX).is_err());
            }
        }
    }
}
