//! Whole layers: against an oracle in f64, and against themselves in another shape.

use phasor_attention::phasor::half::bf16;
use phasor_attention::phasor::norm::HeadNorm;
use phasor_attention::phasor::{
    CacheLayout, Element, Frequencies, FrequencyRows, Host, Pairing, Rope, Stages,
};
use phasor_attention::{
    AttentionConfig, AttentionError, AttentionLayer, AttentionMask, DenseWeights, HeadWeights,
    KvCacheMut, Linear, PagedKvCache, Projection, QkvProjection, RaggedBatch, StackedWeights,
    Workspace,
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
    let config = &case.config;
    let (hidden, dims) = (config.hidden_size, config.head_dim);
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let tokens = x.len() / hidden;
    let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    let linear = |weight: &[f32], x: &[f64], clip: Option<f32>| -> Vec<f64> {
        let value = |&w: &f32| f64::from(clip.map_or(w, |clip| w.clamp(-clip, clip)));
        let rows = weight.chunks(x.len());
        rows.map(|row| row.iter().zip(x).map(|(w, x)| value(w) * x).sum())
            .collect()
    };
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
