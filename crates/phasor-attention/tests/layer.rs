//! Whole layers: against an oracle in f64, and against themselves in another shape.

use phasor_attention::phasor::half::bf16;
use phasor_attention::phasor::norm::HeadNorm;
use phasor_attention::phasor::quantize::{
    Codes, ScaleForm, ScaleRounding, e4m3_to_f32, e8m0_to_scale,
};
use phasor_attention::phasor::{
    CacheLayout, Element, Frequencies, FrequencyRows, Host, Pairing, Rope, ScaleLayout, Stages,
    StoredCodes,
};
use phasor_attention::{
    AttentionConfig, AttentionError, AttentionLayer, AttentionMask, CodeScales, CodedCache,
    DenseWeights, HeadWeights, KvCacheMut, Linear, PagedCodeCache, PagedKvCache, Projection,
    QkvProjection, RaggedBatch, StackedWeights, Workspace,
};
use std::sync::Arc;

mod support;
use support::{Random, narrowed, widened};

const THETA: f64 = 10_000.0;

/// A layer as numbers.
struct Case {
    config: AttentionConfig,
    pairing: Pairing,
    rotary_dim: usize,
    norm_eps: Option<f32>,
    has_bias: bool,
    clip: Option<f32>,
    stacked: bool,
    /// Projections whose sums have one order for any number of tokens.
    plain: bool,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            config: AttentionConfig::new(40, heads, kv_heads, head_dim),
            pairing: Pairing::HalfSplit,
            rotary_dim: head_dim,
            norm_eps: None,
            has_bias: false,
            clip: None,
            stacked: false,
            plain: false,
        }
    }

    fn norms(mut self, eps: f32) -> Self {
        self.norm_eps = Some(eps);
        let stages = Stages::new().norm(HeadNorm::rms(eps));
        (self.config.q_stages, self.config.k_stages) = (stages, stages);
        self
    }

    fn biases(mut self) -> Self {
        self.has_bias = true;
        self.config.q_stages = self.config.q_stages.bias();
        self.config.k_stages = self.config.k_stages.bias();
        self.config.v_stages = self.config.v_stages.bias();
        self
    }

    fn dims(&self) -> [usize; 3] {
        let config = &self.config;
        let kv = config.num_key_value_heads * config.head_dim;
        [config.num_attention_heads * config.head_dim, kv, kv]
    }

    fn layer<T: Element>(&self, weights: &LayerWeights) -> AttentionLayer<T> {
        let hidden = self.config.hidden_size;
        let dense = |values: &[f32], rows: usize, columns: usize, clips: bool| {
            let weights = DenseWeights::new(narrowed::<T>(values), rows, columns).unwrap();
            match self.clip.filter(|_| clips) {
                None => weights,
                Some(clip) => weights.clip(clip).unwrap(),
            }
        };
        let projection = |values: &[f32], rows, columns, clips| -> Arc<dyn Projection<T>> {
            match self.plain {
                true => Arc::new(Plain {
                    weights: narrowed::<T>(values),
                    in_features: columns,
                }),
                false => Arc::new(Linear(dense(values, rows, columns, clips))),
            }
        };
        let [q, k, v] = self.dims();
        let [q_weight, k_weight, v_weight, o_weight] = &weights.matrices;
        let qkv = match self.stacked {
            true if self.plain => QkvProjection::Stacked(Arc::new(Plain {
                weights: narrowed::<T>(&[&q_weight[..], k_weight, v_weight].concat()),
                in_features: hidden,
            })),
            true => QkvProjection::Stacked(Arc::new(Linear(
                StackedWeights::new(vec![
                    dense(q_weight, q, hidden, true),
                    dense(k_weight, k, hidden, true),
                    dense(v_weight, v, hidden, true),
                ])
                .unwrap(),
            ))),
            false => QkvProjection::Separate {
                q: projection(q_weight, q, hidden, true),
                k: projection(k_weight, k, hidden, true),
                v: projection(v_weight, v, hidden, true),
            },
        };
        let frequencies = Frequencies::from_theta(THETA, self.rotary_dim).unwrap();
        let o = projection(o_weight, hidden, q, false);
        AttentionLayer::new(
            self.config.clone(),
            &Host::new(),
            &Rope::new(frequencies, self.pairing),
            qkv,
            o,
        )
        .unwrap()
        .with_head_weights(
            self.head_weights(weights, 0),
            self.head_weights(weights, 1),
            {
                let mut v = self.head_weights(weights, 2);
                v.norm = None;
                v
            },
        )
    }

    fn head_weights<T: Element>(&self, weights: &LayerWeights, at: usize) -> HeadWeights<T> {
        HeadWeights {
            bias: self.has_bias.then(|| narrowed(&weights.biases[at])),
            norm: self.norm_eps.map(|_| narrowed(&weights.norms[at % 2])),
            norm_bias: None,
        }
    }
}

/// The linear map of a token, whatever the other tokens are.
struct Plain<T> {
    weights: Vec<T>,
    in_features: usize,
}

impl<T: Element> Projection<T> for Plain<T> {
    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.weights.len() / self.in_features
    }

    fn forward(&self, x: &[T], out: &mut [T]) -> Result<(), AttentionError> {
        let (from, to) = (self.in_features, Projection::<T>::out_features(self));
        for (x, out) in x.chunks_exact(from).zip(out.chunks_exact_mut(to)) {
            for (row, out) in self.weights.chunks_exact(from).zip(out) {
                let sum: f32 = x.iter().zip(row).map(|(x, w)| x.widen() * w.widen()).sum();
                *out = T::narrow(sum);
            }
        }
        Ok(())
    }
}

/// Of q, k, v and o; of q, k and v; of q and k. Every value is one of bf16.
struct LayerWeights {
    matrices: [Vec<f32>; 4],
    biases: [Vec<f32>; 3],
    norms: [Vec<f32>; 2],
}

impl LayerWeights {
    fn of(case: &Case, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let hidden = case.config.hidden_size;
        let mut values = |len, most| widened(&narrowed::<bf16>(&random.values(len, most)));
        let [q, k, v] = case.dims();
        Self {
            matrices: [q, k, v, q].map(|rows| values(rows * hidden, 0.3)),
            biases: [q, k, v].map(|len| values(len, 0.5)),
            norms: [(); 2].map(|()| values(case.config.head_dim, 1.5)),
        }
    }
}

/// The layer of one sequence from its first token on, in f64.
fn oracle(case: &Case, weights: &LayerWeights, x: &[f32]) -> Vec<f64> {
    attended(case, weights, &streams(case, weights, x))
}

fn linear(weight: &[f32], x: &[f64], clip: Option<f32>) -> Vec<f64> {
    let value = |&w: &f32| f64::from(clip.map_or(w, |clip| w.clamp(-clip, clip)));
    let rows = weight.chunks(x.len());
    rows.map(|row| row.iter().zip(x).map(|(w, x)| value(w) * x).sum())
        .collect()
}

/// Queries, keys and values of each token, as attention has them.
fn streams(case: &Case, weights: &LayerWeights, x: &[f32]) -> [Vec<Vec<f64>>; 3] {
    let config = &case.config;
    let (hidden, dims) = (config.hidden_size, config.head_dim);
    let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    let mut streams: [Vec<Vec<f64>>; 3] = Default::default();
    for (place, x) in x.chunks(hidden).enumerate() {
        for (at, stream) in streams.iter_mut().enumerate() {
            let mut y = linear(&weights.matrices[at], x, case.clip);
            if case.has_bias {
                y.iter_mut()
                    .zip(&weights.biases[at])
                    .for_each(|(y, &b)| *y += f64::from(b));
            }
            for head in y.chunks_mut(dims).filter(|_| at < 2) {
                if let Some(eps) = case.norm_eps {
                    let mean = head.iter().map(|x| x * x).sum::<f64>() / dims as f64;
                    let r = 1.0 / (mean + f64::from(eps)).sqrt();
                    for (x, &w) in head.iter_mut().zip(&weights.norms[at]) {
                        *x *= r * f64::from(w);
                    }
                }
                let pairs = case.rotary_dim / 2;
                for pair in 0..pairs {
                    let (i, j) = match case.pairing {
                        Pairing::HalfSplit => (pair, pairs + pair),
                        Pairing::Interleaved => (2 * pair, 2 * pair + 1),
                    };
                    let angle = place as f64 * THETA.powf(-(pair as f64) / pairs as f64);
                    let (sin, cos) = angle.sin_cos();
                    let (a, b) = (head[i], head[j]);
                    (head[i], head[j]) = (a * cos - b * sin, a * sin + b * cos);
                }
            }
            stream.push(y);
        }
    }
    streams
}

fn attended(case: &Case, weights: &LayerWeights, streams: &[Vec<Vec<f64>>; 3]) -> Vec<f64> {
    let config = &case.config;
    let (dims, tokens) = (config.head_dim, streams[0].len());
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let scale = config.scale.map_or(1.0 / (dims as f64).sqrt(), f64::from);
    let mut out = Vec::new();
    for place in 0..tokens {
        let mut attended = Vec::new();
        for head in 0..heads {
            let kv = head / (heads / kv_heads) * dims;
            let q = &streams[0][place][head * dims..][..dims];
            let seen: Vec<usize> = (0..tokens)
                .filter(|&key| match config.mask {
                    AttentionMask::Causal => key <= place,
                    AttentionMask::SlidingWindow(w) => key <= place && key + w > place,
                    AttentionMask::Chunked(c) => key <= place && key / c == place / c,
                    AttentionMask::None => true,
                })
                .collect();
            let scores: Vec<f64> = seen
                .iter()
                .map(|&key| {
                    let k = &streams[1][key][kv..][..dims];
                    let score = scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                    let cap = config.logits_soft_cap.map(f64::from);
                    cap.map_or(score, |cap| cap * (score / cap).tanh())
                })
                .collect();
            let sink = config
                .sinks
                .as_ref()
                .map_or(0.0, |sinks| f64::from(sinks[head]).exp());
            let sum = sink + scores.iter().map(|s| s.exp()).sum::<f64>();
            for d in 0..dims {
                let values = seen.iter().zip(&scores);
                attended.push(
                    values
                        .map(|(&key, s)| s.exp() / sum * streams[2][key][kv + d])
                        .sum::<f64>(),
                );
            }
        }
        out.extend(linear(&weights.matrices[3], &attended, None));
    }
    out
}

/// What a sequence has in a call: its tokens of the input.
type Call<'a> = (&'a [i32], &'a [i32]);

const PAGES_OF_EACH: usize = 12;

/// Runs calls of sequences with pages of 8 slots, one after the other.
fn run<T: Element>(layer: &AttentionLayer<T>, calls: &[Call<'_>], x: &[T]) -> Vec<T> {
    let config = layer.config();
    let hidden = config.hidden_size;
    let sequences = calls[0].1.len();
    let pages = sequences * PAGES_OF_EACH;
    let table: Vec<i32> = Random::new(9)
        .permutation(pages)
        .into_iter()
        .map(|page| page as i32)
        .collect();
    let mut cache =
        PagedKvCache::new(pages, 3, 8, config.num_key_value_heads, config.head_dim).unwrap();
    cache.elements_mut().fill(T::narrow(f32::NAN));
    let mut workspace = Workspace::default();
    let mut out = vec![T::default(); x.len()];
    let mut first = 0;
    for &(cu_seqlens, lengths) in calls {
        let end = first + *cu_seqlens.last().unwrap() as usize * hidden;
        let batch = RaggedBatch::new(cu_seqlens, lengths, &table);
        let mut layer_cache = cache.layer(1).unwrap();
        let (x, out) = (&x[first..end], &mut out[first..end]);
        layer
            .forward(x, &mut layer_cache, &batch, &mut workspace, out)
            .unwrap();
        first = end;
    }
    assert_eq!(first, x.len());
    // Other layers were not touched.
    let of_page = cache.elements().len() / pages;
    let of_layer = of_page / 6;
    for (at, elements) in cache.elements().chunks(of_layer).enumerate() {
        if at % 3 != 1 {
            assert!(elements.iter().all(|x| x.widen().is_nan()));
        }
    }
    out
}

fn cases() -> Vec<Case> {
    let mut all = vec![
        Case::new(4, 2, 16),
        Case {
            stacked: true,
            ..Case::new(4, 2, 16)
        },
        Case {
            stacked: true,
            pairing: Pairing::Interleaved,
            ..Case::new(6, 2, 8).biases()
        },
        Case::new(4, 1, 16).norms(1e-6).biases(),
        Case {
            stacked: true,
            ..Case::new(2, 2, 24).norms(1e-5)
        },
        Case {
            rotary_dim: 8,
            ..Case::new(3, 3, 16)
        },
        Case {
            clip: Some(0.1),
            ..Case::new(4, 2, 16)
        },
        Case {
            clip: Some(0.1),
            stacked: true,
            ..Case::new(4, 2, 16).biases()
        },
    ];
    for mask in [
        AttentionMask::SlidingWindow(5),
        AttentionMask::Chunked(7),
        AttentionMask::None,
    ] {
        let mut case = Case::new(4, 2, 16);
        case.config.mask = mask;
        all.push(case);
    }
    let mut case = Case::new(4, 2, 16);
    case.config.logits_soft_cap = Some(2.0);
    case.config.sinks = Some(vec![0.3, -1.0, 2.0, 0.0]);
    case.config.scale = Some(0.9);
    all.push(case);
    all
}

fn holds_to_the_oracle<T: Element>(bound: f64) {
    for (at, case) in cases().iter().enumerate() {
        let weights = LayerWeights::of(case, at as u64);
        let layer = case.layer::<T>(&weights);
        let x = narrowed::<T>(&Random::new(100 + at as u64).values(75 * 40, 1.0));
        let got = run(&layer, &[(&[0, 75], &[0])], &x);
        let expected = oracle(case, &weights, &widened(&x));
        let most = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        for (got, expected) in widened(&got).iter().zip(&expected) {
            let error = (f64::from(*got) - expected).abs() / most;
            assert!(
                error < bound,
                "case {at}: {got} is not {expected}, at most {most}"
            );
        }
    }
}

#[test]
fn layers_hold_to_the_oracle() {
    holds_to_the_oracle::<f32>(2e-6);
    holds_to_the_oracle::<bf16>(3e-2);
}

/// Three sequences in one call, each alone, and in calls of other lengths: the same bits.
fn shapes_change_nothing<T: Element>() {
    for stacked in [false, true] {
        let case = Case {
            stacked,
            plain: true,
            ..Case::new(4, 2, 16).norms(1e-6)
        };
        let weights = LayerWeights::of(&case, 1);
        let layer = case.layer::<T>(&weights);
        let counts = [30usize, 1, 75];
        let inputs: Vec<Vec<T>> = counts
            .iter()
            .map(|&n| narrowed(&Random::new(n as u64).values(n * 40, 1.0)))
            .collect();
        let alone: Vec<Vec<T>> = inputs
            .iter()
            .map(|x| run(&layer, &[(&[0, x.len() as i32 / 40], &[0])], x))
            .collect();
        let together = run(&layer, &[(&[0, 30, 31, 106], &[0, 0, 0])], &inputs.concat());
        assert_eq!(widened(&together), widened(&alone.concat()));
        // The last sequence token by token, and in uneven parts, over the edges of pages and tiles.
        let ones: Vec<[i32; 1]> = (0..75).map(|place| [place]).collect();
        let steps: Vec<Call<'_>> = ones.iter().map(|at| (&[0, 1][..], &at[..])).collect();
        assert_eq!(
            widened(&run(&layer, &steps, &inputs[2])),
            widened(&alone[2])
        );
        let parts: [Call<'_>; 4] = [
            (&[0, 7], &[0]),
            (&[0, 2], &[7]),
            (&[0, 0], &[9]),
            (&[0, 66], &[9]),
        ];
        assert_eq!(
            widened(&run(&layer, &parts, &inputs[2])),
            widened(&alone[2])
        );
    }
}

#[test]
fn ragged_batches_and_cached_steps_are_the_same_bits() {
    shapes_change_nothing::<f32>();
    shapes_change_nothing::<bf16>();
}

#[test]
fn decoding_with_library_products_is_near_the_prompt() {
    let case = Case::new(4, 2, 16).norms(1e-6);
    let weights = LayerWeights::of(&case, 1);
    let layer = case.layer::<f32>(&weights);
    let x = Random::new(3).values(40 * 40, 1.0);
    let whole = run(&layer, &[(&[0, 40], &[0])], &x);
    let parts = run(&layer, &[(&[0, 39], &[0]), (&[0, 1], &[39])], &x);
    for (a, b) in whole.iter().zip(&parts) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn borrowed_caches_and_padding() {
    let case = Case {
        plain: true,
        ..Case::new(4, 2, 16)
    };
    let weights = LayerWeights::of(&case, 1);
    let layer = case.layer::<f32>(&weights);
    let x = Random::new(3).values(20 * 40, 1.0);
    let expected = run(&layer, &[(&[0, 20], &[0])], &x);
    // Contiguous caches of two sequences, the second of which is not in use; 3 tokens of padding.
    let layout = CacheLayout::bhsd(2, 32, 2, 16);
    let (mut k, mut v) = (vec![-1.0f32; 2048], vec![-1.0f32; 2048]);
    let mut padded = x.clone();
    padded.extend([f32::NAN; 3 * 40]);
    let mut out = vec![-7.5; 23 * 40];
    let mut workspace = Workspace::default();
    let batch = RaggedBatch::new(&[0u32, 20], &[0i64], &[0]);
    let mut cache = KvCacheMut::separate((layout, &mut k), (layout, &mut v)).unwrap();
    layer
        .forward(&padded, &mut cache, &batch, &mut workspace, &mut out)
        .unwrap();
    assert_eq!(out[..800], expected);
    assert!(out[800..].iter().all(|&x| x == -7.5));
    assert!(
        k[..1024]
            .chunks(512)
            .all(|head| head[..320].iter().all(|&x| x != -1.0))
    );
    assert!(k[1024..].iter().chain(&v[1024..]).all(|&x| x == -1.0));
    // Only the cache.
    let (mut k_too, mut v_too) = (vec![-1.0f32; 2048], vec![-1.0f32; 2048]);
    let mut cache = KvCacheMut::separate((layout, &mut k_too), (layout, &mut v_too)).unwrap();
    layer
        .store(&padded, &mut cache, &batch, &mut workspace)
        .unwrap();
    assert_eq!((k_too, v_too), (k, v));
    // Positions of their own: those in the cache are the same as none.
    let ids: Vec<i32> = (0..20).chain([0; 3]).collect();
    let mut again = vec![0.0; 23 * 40];
    let (mut k, mut v) = (vec![-1.0f32; 2048], vec![-1.0f32; 2048]);
    let mut cache = KvCacheMut::separate((layout, &mut k), (layout, &mut v)).unwrap();
    let with_ids = batch.position_ids(&ids);
    layer
        .forward(&padded, &mut cache, &with_ids, &mut workspace, &mut again)
        .unwrap();
    assert_eq!(again[..800], expected);
}

#[test]
fn rows_of_frequencies_follow_each_sequences_length() {
    let case = Case {
        plain: true,
        ..Case::new(2, 1, 8)
    };
    let weights = LayerWeights::of(&case, 1);
    let frequencies = |theta| Frequencies::from_theta(theta, 8).unwrap();
    let rows = FrequencyRows::new(&[frequencies(10_000.0), frequencies(500.0)]).unwrap();
    let rows = rows.with_lengths(&[16, 1 << 20]).unwrap();
    let layer = |rope: &Rope| {
        let plain = |at: usize, columns| {
            let weights = weights.matrices[at].clone();
            Arc::new(Plain {
                weights,
                in_features: columns,
            })
        };
        let qkv = QkvProjection::Separate {
            q: plain(0, 40),
            k: plain(1, 40),
            v: plain(2, 40),
        };
        AttentionLayer::new(case.config.clone(), &Host::new(), rope, qkv, plain(3, 16)).unwrap()
    };
    let of = |theta| layer(&Rope::new(frequencies(theta), Pairing::HalfSplit));
    let both = layer(&Rope::new(rows, Pairing::HalfSplit));
    let x = Random::new(3).values(37 * 40, 1.0);
    let got = run(&both, &[(&[0, 16, 37], &[0, 0])], &x);
    assert_eq!(
        got[..640],
        run(&of(10_000.0), &[(&[0, 16], &[0])], &x[..640])
    );
    assert_eq!(got[640..], run(&of(500.0), &[(&[0, 21], &[0])], &x[640..]));
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let case = Case::new(4, 2, 16);
    let weights = LayerWeights::of(&case, 1);
    let rope = |dims| Rope::new(Frequencies::from_theta(THETA, dims).unwrap(), case.pairing);
    let with = |change: &dyn Fn(&mut AttentionConfig), rows: usize, rope: &Rope| {
        let mut config = case.config.clone();
        change(&mut config);
        let weights = vec![0.0f32; rows * 40];
        let qkv = Linear(DenseWeights::new(weights, rows, 40).unwrap());
        let o = Linear(DenseWeights::new(weights_of(64), 40, 64).unwrap());
        AttentionLayer::new(
            config,
            &Host::new(),
            rope,
            QkvProjection::<f32>::Stacked(Arc::new(qkv)),
            Arc::new(o),
        )
        .map(|_| ())
    };
    fn weights_of(columns: usize) -> Vec<f32> {
        vec![0.0; 40 * columns]
    }
    use AttentionError::*;
    assert_eq!(with(&|_| {}, 128, &rope(16)), Ok(()));
    let refused = |change: &dyn Fn(&mut AttentionConfig)| with(change, 128, &rope(16)).unwrap_err();
    assert!(matches!(
        refused(&|c| c.num_attention_heads = 5),
        Heads {
            heads: 5,
            kv_heads: 2
        }
    ));
    assert!(matches!(
        refused(&|c| c.num_key_value_heads = 0),
        Heads { .. }
    ));
    assert!(matches!(
        refused(&|c| c.head_dim = 0),
        Factor { .. } | Value { .. }
    ));
    assert!(matches!(refused(&|c| c.hidden_size = 0), Value { .. }));
    assert!(matches!(
        refused(&|c| c.hidden_size = 41),
        Mismatch {
            expected: 41,
            got: 40,
            ..
        }
    ));
    assert!(matches!(refused(&|c| c.scale = Some(-1.0)), Factor { .. }));
    assert!(matches!(
        with(&|_| {}, 127, &rope(16)).unwrap_err(),
        Mismatch { expected: 128, .. }
    ));
    assert!(matches!(
        with(&|_| {}, 128, &rope(18)).unwrap_err(),
        Step(_)
    ));
    assert!(DenseWeights::new(vec![0.0f32; 5], 2, 3).is_err());
    assert!(DenseWeights::new(vec![0.0f32; 0], 0, 3).is_err());
    assert!(
        DenseWeights::new(vec![0.0f32; 6], 2, 3)
            .unwrap()
            .clip(0.0)
            .is_err()
    );
    assert!(PagedKvCache::<f32>::new(4, 1, 0, 2, 8).is_err());
    assert!(PagedKvCache::<f32>::new(usize::MAX, 1, 16, 2, 8).is_err());
    assert!(
        PagedKvCache::<f32>::new(4, 2, 16, 2, 8)
            .unwrap()
            .layer(2)
            .is_err()
    );

    // Calls: nothing is written.
    let layer = case.layer::<f32>(&weights);
    let call = |layer: &AttentionLayer<f32>,
                layout,
                x: &[f32],
                out_len,
                cu: &[i32],
                lengths: &[i32],
                table: &[i32]| {
        let (mut k, mut v) = (vec![-1.0f32; 1024], vec![-1.0f32; 1024]);
        let mut out = vec![-7.5f32; out_len];
        let mut cache = KvCacheMut::separate((layout, &mut k), (layout, &mut v)).unwrap();
        let batch = RaggedBatch::new(cu, lengths, table);
        let result = layer.forward(x, &mut cache, &batch, &mut Workspace::default(), &mut out);
        if result.is_err() {
            assert!(out.iter().all(|&x| x == -7.5));
            assert!(k.iter().chain(&v).all(|&x| x == -1.0));
        }
        result
    };
    let layout = CacheLayout::paged_nhd(4, 8, 2, 16);
    let x = vec![1.0f32; 3 * 40];
    let good = |layout, x: &[f32], out_len, cu: &[i32], lengths: &[i32], table: &[i32]| {
        call(&layer, layout, x, out_len, cu, lengths, table)
    };
    assert_eq!(good(layout, &x, 120, &[0, 3], &[6], &[1, 3]), Ok(()));
    assert!(good(layout, &x, 119, &[0, 3], &[6], &[1, 3]).is_err());
    assert!(good(layout, &x[1..], 119, &[0, 3], &[6], &[1, 3]).is_err());
    assert!(good(layout, &x, 120, &[0, 4], &[6], &[1, 3]).is_err());
    assert!(good(layout, &x, 120, &[0, 3], &[14], &[1, 3]).is_err());
    assert!(good(layout, &x, 120, &[0, 3], &[6], &[1, 4]).is_err());
    assert!(
        good(
            CacheLayout::paged_nhd(4, 8, 1, 16),
            &x,
            120,
            &[0, 3],
            &[6],
            &[1, 3]
        )
        .is_err()
    );
    assert!(
        good(
            CacheLayout::paged_nhd(4, 8, 2, 8),
            &x,
            120,
            &[0, 3],
            &[6],
            &[1, 3]
        )
        .is_err()
    );
    // A norm without its weight is one that multiplies nothing; a bias has to be there.
    let biased = Case::new(4, 2, 16).biases();
    let without = biased.layer::<f32>(&weights).with_head_weights(
        HeadWeights::default(),
        HeadWeights::default(),
        HeadWeights::default(),
    );
    let result = call(&without, layout, &x, 120, &[0, 3], &[6], &[1, 3]);
    assert!(
        matches!(
            result,
            Err(Step(phasor_attention::phasor::Error::Stages { .. }))
        ),
        "{result:?}"
    );
}

#[test]
fn sizes_past_all_memory_are_refused() {
    let most = usize::MAX;
    let rope = Rope::new(
        Frequencies::from_theta(THETA, 16).unwrap(),
        Pairing::HalfSplit,
    );
    let weights = || Arc::new(Linear(DenseWeights::new(vec![0.0f32; 16], 4, 4).unwrap()));
    for [hidden, heads, kv_heads, head_dim] in [
        [4, most, 1, 16],
        [4, most - 1, most - 1, 16],
        [4, 2, 1, most],
        [most, 2, 1, most / 2 + 1],
    ] {
        let config = AttentionConfig::new(hidden, heads, kv_heads, head_dim);
        let qkv = QkvProjection::<f32>::Stacked(weights());
        assert!(AttentionLayer::new(config, &Host::new(), &rope, qkv, weights()).is_err());
        assert!(PagedKvCache::<f32>::new(hidden, 1, heads, kv_heads, head_dim).is_err());
        assert!(DenseWeights::new(vec![0.0f32; 16], heads, head_dim).is_err());
        let bytes = vec![0u8; 18];
        let of = phasor_attention::GgmlType::Q4_0;
        assert!(phasor_attention::GgmlWeights::new(of, bytes, heads, most).is_err());
    }
    // Offsets and lengths at the ends of their types.
    let case = Case::new(4, 2, 16);
    let layer = case.layer::<f32>(&LayerWeights::of(&case, 1));
    let mut cache = PagedKvCache::<f32>::new(2, 1, 8, 2, 16).unwrap();
    let mut out = vec![0.0; 40];
    for (cu_seqlens, length, page) in [
        ([0, i64::MAX], 0, 0),
        ([i64::MIN, 1], 0, 0),
        ([0, 1], i64::MAX, 0),
        ([0, 1], i64::MIN, 0),
        ([0, 1], 0, i64::MAX),
        ([0, 1], 0, i64::MIN),
    ] {
        let (lengths, pages) = ([length], [page]);
        let batch = RaggedBatch::new(&cu_seqlens, &lengths, &pages);
        let mut cache = cache.layer(0).unwrap();
        let mut workspace = Workspace::default();
        assert!(
            layer
                .forward(&[1.0; 40], &mut cache, &batch, &mut workspace, &mut out)
                .is_err()
        );
    }
}

const PAGE: usize = 8;
const PAGES: usize = 12;

/// Keys and values as codes, 2 heads of 16 dims, over 12 pages of 8 slots.
struct Coded {
    codes: StoredCodes,
    /// Of keys and of values, where they are given.
    given: Option<[Vec<f32>; 2]>,
    /// In one buffer, page by page.
    one_buffer: bool,
}

impl Coded {
    fn layouts(&self) -> (CacheLayout, CacheLayout) {
        let dims = match self.codes.scale_layout() {
            // 16 codes and the four bytes of their scale.
            Some(at) if at.is_inline() => 20,
            _ => 16,
        };
        let slots = CacheLayout::paged_nhd(PAGES, PAGE, 2, dims).dims(0..16);
        match self.one_buffer {
            true => slots.in_pairs_of_pages(),
            false => (slots, slots),
        }
    }
}

/// What is in the caches: codes of keys and values, and their scales in f32 or as bytes.
#[derive(Clone, Debug, PartialEq)]
struct CodedMemory {
    codes: [Vec<u8>; 2],
    scales: [Vec<f32>; 2],
    bytes: [Vec<u8>; 2],
}

impl CodedMemory {
    fn new(of: &Coded) -> Self {
        let (k, _) = of.layouts();
        let len = PAGES * k.strides()[0] + 16;
        Self {
            codes: [(); 2].map(|()| vec![0x55; len]),
            scales: [(); 2].map(|()| vec![f32::NAN; PAGES * PAGE * 2 * 2]),
            bytes: [(); 2].map(|()| vec![0xff; PAGES * PAGE * 2 * 2]),
        }
    }

    fn cache<'a, T: Element>(
        &'a mut self,
        of: &'a Coded,
    ) -> Result<KvCacheMut<'a, T>, AttentionError> {
        let (k, v) = of.layouts();
        let inline = of.codes.scale_layout().is_some_and(|at| at.is_inline());
        let (scales, bytes) = (&mut self.scales, &mut self.bytes);
        let parts = scales.iter_mut().zip(bytes).zip([k, v]).enumerate().map(
            |(at, ((scales, bytes), layout))| CodedCache {
                layout,
                codes: of.codes,
                scales: match &of.given {
                    Some(given) => CodeScales::Given(&given[at]),
                    None if of.codes.scales_are_e8m0() => CodeScales::E8m0(bytes),
                    None if inline => CodeScales::Inline,
                    None => CodeScales::F32(scales),
                },
            },
        );
        let [k, v] = parts.collect::<Vec<_>>().try_into().unwrap();
        let [of_k, of_v] = &mut self.codes;
        match of.one_buffer {
            true => KvCacheMut::codes_in_one_buffer((k, v), of_k),
            false => KvCacheMut::separate_codes((k, of_k), (v, of_v)),
        }
    }

    /// What the codes of a token stand for, and how far from it a value may be.
    fn values(&self, of: &Coded, part: usize, page: usize, slot: usize) -> Vec<(f64, f64)> {
        let layout = [of.layouts().0, of.layouts().1][part];
        let codes = &self.codes[if of.one_buffer { 0 } else { part }];
        let [pages, slots, heads] = layout.strides();
        let group = of.codes.group_dims(16);
        let mut values = Vec::new();
        for head in 0..2 {
            let first = layout.offset() + page * pages + slot * slots + head * heads;
            for dim in 0..16 {
                let code = codes[first + dim];
                let scale_at = ((page * PAGE + slot) * 2 + head) * (16 / group) + dim / group;
                let scale = match &of.given {
                    Some(given) => given[part][head % given[part].len()],
                    None if of.codes.scales_are_e8m0() => e8m0_to_scale(self.bytes[part][scale_at]),
                    None if of.codes.scale_layout().unwrap().is_inline() => {
                        f32::from_ne_bytes(codes[first + 16..first + 20].try_into().unwrap())
                    }
                    None => self.scales[part][scale_at],
                };
                let scale = match of.given.is_some() && of.codes.form() == ScaleForm::Multiply {
                    true => 1.0 / f64::from(scale),
                    false => f64::from(scale),
                };
                values.push(match of.codes.codes() {
                    Codes::E4m3 => {
                        let value = f64::from(e4m3_to_f32(code)) * scale;
                        (value, (value.abs() / 14.0).max(scale / 512.0))
                    }
                    _ => (f64::from(code as i8) * scale, scale * 0.51),
                });
            }
        }
        values
    }
}

fn coded() -> Vec<Coded> {
    let per_head = ScaleLayout::tokens_heads(PAGE, 2, 1);
    let groups = ScaleLayout::tokens_heads(PAGE, 2, 2);
    let given = |codes, form, k: &[f32], v: &[f32]| Coded {
        codes: StoredCodes::given(codes, form),
        given: Some([k.to_vec(), v.to_vec()]),
        one_buffer: false,
    };
    let written = |codes, one_buffer| Coded {
        codes,
        given: None,
        one_buffer,
    };
    // Inline, a slot of a head has five scales' room, of which the last is one.
    let inline = ScaleLayout::strided(PAGE * 2 * 5, 2 * 5, 5, 1)
        .with_offset(4)
        .inline();
    vec![
        given(Codes::E4m3, ScaleForm::Divide, &[0.03], &[0.02, 0.01]),
        given(Codes::E4m3, ScaleForm::Multiply, &[20.0, 35.0], &[50.0]),
        given(Codes::Int8, ScaleForm::Divide, &[0.06], &[0.05]),
        written(StoredCodes::dynamic(Codes::E4m3, 1e-6, per_head), true),
        written(StoredCodes::dynamic(Codes::Int8, 1e-6, per_head), false),
        written(
            StoredCodes::dynamic(Codes::Int8Full, 1e-6, groups)
                .groups_of(8)
                .by_inverse()
                .rounded(ScaleRounding::PowerOfTwoUp)
                .e8m0(),
            false,
        ),
        written(StoredCodes::dynamic(Codes::E4m3, 1e-6, inline), false),
    ]
}

fn caches_of_codes_hold<T: Element>(bound: f64) {
    let case = Case {
        plain: true,
        ..Case::new(4, 2, 16).norms(1e-6)
    };
    let weights = LayerWeights::of(&case, 3);
    let layer = case.layer::<T>(&weights);
    const TOKENS: usize = 75;
    let x = narrowed::<T>(&Random::new(8).values(TOKENS * 40, 1.0));
    let table: Vec<i32> = (0..PAGES as i32).map(|page| page * 5 % 12).collect();
    for (at, of) in coded().iter().enumerate() {
        let run = |steps: &[usize]| {
            let mut memory = CodedMemory::new(of);
            let mut out = vec![T::default(); x.len()];
            let mut first = 0;
            for &new in steps {
                let (cu_seqlens, lengths) = ([0, new as i32], [first as i32]);
                let batch = RaggedBatch::new(&cu_seqlens, &lengths, &table);
                let part = first * 40..(first + new) * 40;
                let mut cache = memory.cache(of).unwrap();
                let (x, out) = (&x[part.clone()], &mut out[part]);
                layer
                    .forward(x, &mut cache, &batch, &mut Workspace::default(), out)
                    .unwrap();
                first += new;
            }
            assert_eq!(first, TOKENS);
            (widened(&out), memory)
        };
        let (prompt, memory) = run(&[TOKENS]);
        // A cached step is the same token in a prompt: the same bits, and the same codes.
        let (steps, of_steps) = run(&[1; TOKENS]);
        assert_eq!(prompt, steps, "codes {at}");
        let (parts, of_parts) = run(&[30, 1, 44]);
        assert_eq!(prompt, parts, "codes {at}");
        for other in [of_steps, of_parts] {
            assert_eq!(memory.codes, other.codes);
            assert_eq!(memory.bytes, other.bytes);
            let bits = |scales: &[Vec<f32>; 2]| {
                scales
                    .concat()
                    .iter()
                    .map(|s| s.to_bits())
                    .collect::<Vec<_>>()
            };
            assert_eq!(bits(&memory.scales), bits(&other.scales));
        }

        // Codes are near what they are of, and attention is that over their values.
        let mut streams = streams(&case, &weights, &widened(&x));
        for part in 0..2 {
            for place in 0..TOKENS {
                let page = table[place / PAGE] as usize;
                let stored = memory.values(of, part, page, place % PAGE);
                for (&(value, step), exact) in stored.iter().zip(&streams[part + 1][place]) {
                    let slack = bound * 4.0 * exact.abs().max(1.0);
                    assert!(
                        (value - exact).abs() <= step + slack,
                        "codes {at}: {value} is not {exact}"
                    );
                }
                streams[part + 1][place] = stored.iter().map(|&(value, _)| value).collect();
            }
        }
        let expected = attended(&case, &weights, &streams);
        let most = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        for (got, expected) in prompt.iter().zip(&expected) {
            let error = (f64::from(*got) - expected).abs() / most;
            assert!(
                error < bound,
                "codes {at}: {got} is not {expected}, at most {most}"
            );
        }
    }
}

#[test]
fn caches_of_codes_hold_to_the_oracle_and_to_themselves() {
    caches_of_codes_hold::<f32>(2e-6);
    caches_of_codes_hold::<bf16>(3e-2);
}

/// The owned cache of codes: the same as one that is borrowed, and no layer touches another.
#[test]
fn an_owned_cache_of_codes_is_one_that_is_borrowed() {
    let case = Case {
        plain: true,
        ..Case::new(4, 2, 16)
    };
    let weights = LayerWeights::of(&case, 3);
    let layer = case.layer::<f32>(&weights);
    let x = Random::new(8).values(75 * 40, 1.0);
    let table: Vec<i32> = (0..PAGES as i32).map(|page| page * 5 % 12).collect();
    let batch = RaggedBatch::new(&[0, 75], &[0], &table);
    let forward = |cache: &mut KvCacheMut<'_, f32>| {
        let mut out = vec![0.0; x.len()];
        layer
            .forward(&x, cache, &batch, &mut Workspace::default(), &mut out)
            .unwrap();
        out
    };
    for codes in [Codes::E4m3, Codes::Int8] {
        let scales = ScaleLayout::tokens_heads(PAGE, 2, 1);
        let of = Coded {
            codes: StoredCodes::dynamic(codes, 1e-6, scales),
            given: None,
            one_buffer: true,
        };
        let expected = forward(&mut CodedMemory::new(&of).cache(&of).unwrap());
        let mut owned = PagedCodeCache::new(codes, PAGES, 3, PAGE, 2, 16).unwrap();
        assert_eq!(owned.bytes(), PAGES * 3 * PAGE * 2 * 2 * (16 + 4));
        assert_eq!(forward(&mut owned.layer(1).unwrap()), expected);
        // Another layer of the cache does not touch it: a further token sees the same.
        let again = |owned: &mut PagedCodeCache| {
            let batch = RaggedBatch::new(&[0, 1], &[75], &table);
            let mut out = vec![0.0; 40];
            layer
                .forward(
                    &x[..40],
                    &mut owned.layer(1).unwrap(),
                    &batch,
                    &mut Workspace::default(),
                    &mut out,
                )
                .unwrap();
            out
        };
        let before = again(&mut owned);
        forward(&mut owned.layer(0).unwrap());
        forward(&mut owned.layer(2).unwrap());
        assert_eq!(again(&mut owned), before);
        assert!(owned.layer::<f32>(3).is_err());
    }
    for [pages, layers, page_size, heads, dims] in [
        [0, 1, 1, 1, 1],
        [1, 0, 1, 1, 1],
        [1, 1, 0, 1, 1],
        [1, 1, 1, 0, 1],
        [1, 1, 1, 1, 0],
        [usize::MAX, 1, 2, 1, 1],
    ] {
        assert!(PagedCodeCache::new(Codes::Int8, pages, layers, page_size, heads, dims).is_err());
    }
}

#[test]
fn codes_without_their_scales_are_refused() {
    let layout = CacheLayout::paged_nhd(2, PAGE, 2, 16);
    let per_head = ScaleLayout::tokens_heads(PAGE, 2, 1);
    let given = StoredCodes::given(Codes::E4m3, ScaleForm::Divide);
    let dynamic = StoredCodes::dynamic(Codes::Int8, 1e-6, per_head);
    let e8m0 = dynamic.rounded(ScaleRounding::PowerOfTwoUp).e8m0();
    let refused = |codes, scales: CodeScales<'_>| {
        let (mut k, mut v) = ([0u8; 512], [0u8; 512]);
        let keys = CodedCache {
            layout,
            codes,
            scales,
        };
        let values = CodedCache {
            layout,
            codes: given,
            scales: CodeScales::Given(&[1.0]),
        };
        KvCacheMut::<f32>::separate_codes((keys, &mut k), (values, &mut v)).err()
    };
    use AttentionError::*;
    let room = |len| CodeScales::F32(vec![0.0; len].leak());
    let bytes = |len| CodeScales::E8m0(vec![0; len].leak());
    assert_eq!(refused(given, CodeScales::Given(&[0.1, 0.2])), None);
    assert_eq!(refused(dynamic, room(32)), None);
    assert_eq!(refused(e8m0, bytes(32)), None);
    for (codes, scales) in [
        (given, room(32)),
        (given, CodeScales::Inline),
        (dynamic, CodeScales::Given(&[0.1])),
        (dynamic, bytes(32)),
        (dynamic, CodeScales::Inline),
    ] {
        assert!(matches!(refused(codes, scales), Some(Weights { .. })));
    }
    let count = |codes, scales| match refused(codes, scales) {
        Some(Mismatch { expected, got, .. }) => (expected, got),
        other => panic!("{other:?}"),
    };
    assert_eq!(count(given, CodeScales::Given(&[0.1; 3])), (2, 3));
    assert_eq!(count(dynamic, room(31)), (32, 31));
    assert_eq!(count(e8m0, bytes(31)), (32, 31));
    assert_eq!(count(dynamic.groups_of(5), room(32)), (16, 5));
    assert_eq!(count(dynamic.groups_of(0), room(32)), (16, 0));
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(
            refused(given, CodeScales::Given(&[scale])),
            Some(Factor { .. })
        ));
    }
    // A buffer that is too short; and nothing is written of a call that does not fit.
    let (mut k, mut v) = (vec![0x55u8; 511], vec![0x55u8; 512]);
    let part = || CodedCache {
        layout,
        codes: given,
        scales: CodeScales::Given(&[1.0]),
    };
    let parts = ((part(), &mut k[..]), (part(), &mut v[..]));
    assert!(KvCacheMut::<f32>::separate_codes(parts.0, parts.1).is_err());
    k.push(0x55);
    let case = Case::new(4, 2, 16);
    let layer = case.layer::<f32>(&LayerWeights::of(&case, 1));
    let mut out = [-7.5; 40];
    for (length, page) in [(16, 1), (8, 2)] {
        let (lengths, pages) = ([length], [0, page]);
        let batch = RaggedBatch::new(&[0, 1], &lengths, &pages);
        let parts = ((part(), &mut k[..]), (part(), &mut v[..]));
        let mut cache = KvCacheMut::separate_codes(parts.0, parts.1).unwrap();
        let mut workspace = Workspace::default();
        let result = layer.forward(&[1.0; 40], &mut cache, &batch, &mut workspace, &mut out);
        assert!(result.is_err());
    }
    assert!(out.iter().all(|&x| x == -7.5));
    assert!(k.iter().chain(&v).all(|&code| code == 0x55));
}
