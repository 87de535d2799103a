//! Two charts of the user's own tensors: how much scores change when all positions shift alike, and how
//! far rotated values are off, against the position.

use std::f64::consts::TAU;
use std::ops::{Add, Mul, Sub};

use phasor::{Device, Frequencies, Pairing, Positions, Rope};

use super::chart::{self, Chart, Curve};
use super::progress::Progress;
use super::report::{Report, small, thousands};
use super::scores::{difference, largest, scores};
use super::tensors::{QueriesKeys, Rotation, Stored, Tensor};
use super::{Result, fail};

/// Points of a curve: two in each octave, up to position 2^24.
const HALF_OCTAVES: i32 = 48;
/// Products that the scores at one position may take.
const PRODUCTS: usize = 1 << 22;
const MOST_TOKENS: usize = 64;
/// Columns of the table in the report.
const IN_TABLE: [i64; 3] = [1 << 10, 1 << 20, 1 << 24];

/// How tensors are rotated where they are drawn.
pub struct Subject<'a> {
    pub device: &'a Device,
    pub frequencies: &'a Frequencies,
    pub pairing: Pairing,
    /// The first dim of a head that rotates.
    pub rotary_offset: usize,
}

/// Some tokens of the first sequence, in f32 whatever they were stored in.
struct Sample {
    tensors: QueriesKeys<f32>,
    /// Which tokens of the sequence.
    tokens: Vec<i64>,
}

/// The charts, and the figures in them.
pub struct Drawn {
    pub svg: String,
    positions: Vec<i64>,
    tokens: usize,
    /// With phasor and with angles in f32; none without q or k.
    scores: Option<[Vec<f64>; 2]>,
    errors: [Vec<f64>; 2],
}

pub fn draw<T: Stored>(
    subject: &Subject<'_>,
    tensors: &QueriesKeys<T>,
    progress: &mut Progress<'_>,
) -> Result<Drawn> {
    let sample = Sample::of(tensors);
    let reach = largest(sample.tensors.elements().map(f64::from));
    if !reach.is_finite() {
        return fail("it has values that are not finite: --plot has no errors to draw");
    }
    if sample.tokens.is_empty() || sample.tensors.is_empty() {
        return fail("it has no elements: --plot has nothing to draw");
    }
    let has_scores = sample.tensors.q.is_some() && sample.tensors.k.is_some();
    let mut positions: Vec<i64> = (0..=HALF_OCTAVES)
        .map(|half| 2f64.powf(f64::from(half) / 2.0).round() as i64)
        .collect();
    positions.dedup();

    progress.begin("drawing", positions.len());
    let unshifted = [
        scores(&subject.by_phasor(&sample, 0)?),
        scores(&subject.by_f32_angles(&sample, 0)),
    ];
    let (mut changes, mut errors) = ([vec![], vec![]], [vec![], vec![]]);
    for &position in &positions {
        let exact = subject.exact(&sample, position);
        let rotated = [
            subject.by_phasor(&sample, position)?,
            subject.by_f32_angles(&sample, position),
        ];
        for (i, rotated) in rotated.iter().enumerate() {
            let off = rotated.elements().zip(&exact);
            errors[i].push(largest(off.map(|(x, exact)| f64::from(x) - exact)));
            changes[i].push(difference(&scores(rotated), &unshifted[i]));
        }
        progress.step();
    }
    let scores = has_scores.then_some(changes);

    let points = |values: &[f64]| {
        let positions = positions.iter().map(|&position| position as f64);
        positions.zip(values.iter().copied()).collect()
    };
    let curves = |[phasor, f32_angles]: &[Vec<f64>; 2]| {
        vec![
            Curve {
                name: "angles in f32",
                colour: "#4c8dd6",
                points: points(f32_angles),
            },
            Curve {
                name: "phasor",
                colour: "#d9480f",
                points: points(phasor),
            },
        ]
    };
    let mut charts = Vec::new();
    if let Some(scores) = &scores {
        charts.push(Chart {
            title: "Largest change of a score when all positions shift alike",
            across: "shift, in tokens",
            curves: curves(scores),
            guide: None,
        });
    }
    charts.push(Chart {
        title: "Largest error of a rotated value",
        across: "position of the first token",
        curves: curves(&errors),
        // Half a unit in the last of its 8 bits, of the largest value.
        guide: Some((
            "one rounding to bf16",
            2f64.powf(reach.log2().floor()) / 256.0,
        )),
    });
    Ok(Drawn {
        svg: chart::svg(&charts),
        positions,
        tokens: sample.tokens.len(),
        scores,
        errors,
    })
}

impl Sample {
    fn of<T: Stored>(tensors: &QueriesKeys<T>) -> Self {
        let shapes = || tensors.named().map(|(_, tensor)| tensor.layout().shape());
        let there = shapes().map(|[_, tokens, _, _]| tokens).max().unwrap_or(0);
        let products = shapes().map(|[_, _, heads, dims]| heads * dims).max();
        let affordable = (PRODUCTS / products.unwrap_or(1).max(1)).isqrt();
        let wanted = there.min(affordable.clamp(2, MOST_TOKENS));
        // Evenly spread, the first and the last of them too.
        let tokens: Vec<usize> = (0..wanted)
            .map(|i| i * (there - 1) / (wanted - 1).max(1))
            .collect();
        let take = |tensor: &Tensor<T>| {
            let [_, _, heads, dims] = tensor.layout().shape();
            let size = heads * dims;
            let of_token = |&token: &usize| tensor.data.get(token * size..(token + 1) * size);
            let data = tokens.iter().filter_map(of_token).flatten();
            Tensor {
                shape: vec![tokens.len(), heads, dims],
                data: data.map(|x| x.widen()).collect(),
            }
        };
        Self {
            tensors: QueriesKeys {
                q: tensors.q.as_ref().map(take),
                k: tensors.k.as_ref().map(take),
            },
            tokens: tokens.iter().map(|&token| token as i64).collect(),
        }
    }
}

impl Subject<'_> {
    fn by_phasor(&self, sample: &Sample, shift: i64) -> Result<QueriesKeys<f32>> {
        let rope = Rope::new(self.frequencies.clone(), self.pairing);
        let positions: Vec<i64> = sample.tokens.iter().map(|token| token + shift).collect();
        let rotation = Rotation {
            rope: &rope,
            rotary_offset: self.rotary_offset,
            positions: Positions::per_token(&positions),
        };
        sample.tensors.rotated(self.device, &rotation)
    }

    /// Frequency, position, angle, cos, sin and products all in f32, as most implementations have them.
    fn by_f32_angles(&self, sample: &Sample, shift: i64) -> QueriesKeys<f32> {
        let factor = self.frequencies.attention_factor();
        let turn = |tensor: &Tensor<f32>| {
            let cos_sin = |pair: usize, token: i64| {
                let step = self.frequencies.phase(pair, 1) as i64;
                let inv_freq = (step as f64 / 2f64.powi(64) * TAU) as f32;
                let angle = (token + shift) as f32 * inv_freq;
                (angle.cos() * factor, angle.sin() * factor)
            };
            Tensor {
                shape: tensor.shape.clone(),
                data: self.turned(tensor, &sample.tokens, cos_sin),
            }
        };
        QueriesKeys {
            q: sample.tensors.q.as_ref().map(turn),
            k: sample.tensors.k.as_ref().map(turn),
        }
    }

    /// What is right, in f64.
    fn exact(&self, sample: &Sample, shift: i64) -> Vec<f64> {
        let factor = f64::from(self.frequencies.attention_factor());
        let cos_sin = |pair: usize, token: i64| {
            let phase = self.frequencies.phase(pair, token + shift) as i64;
            let (sin, cos) = (phase as f64 / 2f64.powi(64) * TAU).sin_cos();
            (cos * factor, sin * factor)
        };
        let tensors = sample.tensors.named();
        tensors
            .flat_map(|(_, tensor)| self.turned(tensor, &sample.tokens, cos_sin))
            .collect()
    }

    /// A tensor turned by these cos and sin of each pair and token.
    fn turned<F>(
        &self,
        tensor: &Tensor<f32>,
        tokens: &[i64],
        cos_sin: impl Fn(usize, i64) -> (F, F),
    ) -> Vec<F>
    where
        F: Copy + From<f32> + Add<Output = F> + Sub<Output = F> + Mul<Output = F>,
    {
        let [_, _, heads, dims] = tensor.layout().shape();
        let mut turned: Vec<F> = tensor.data.iter().map(|&x| F::from(x)).collect();
        let pairs = self.frequencies.pairs();
        for (of_token, &token) in turned.chunks_mut((heads * dims).max(1)).zip(tokens) {
            for pair in 0..pairs {
                let (cos, sin) = cos_sin(pair, token);
                let (first, second) = match self.pairing {
                    Pairing::HalfSplit => (pair, pair + pairs),
                    Pairing::Interleaved => (2 * pair, 2 * pair + 1),
                };
                for head in of_token.chunks_mut(dims) {
                    let head = &mut head[self.rotary_offset..];
                    let (a, b) = (head[first], head[second]);
                    head[first] = a * cos - b * sin;
                    head[second] = b * cos + a * sin;
                }
            }
        }
        turned
    }
}

impl Drawn {
    pub fn report(&self, report: &mut Report) {
        let at = |values: &[f64]| {
            IN_TABLE.map(|shown| {
                let here = self.positions.iter().position(|&p| p == shown);
                here.map_or(String::new(), |i| small(values[i]))
            })
        };
        let row = |name: &str, [a, b, c]: [String; 3]| [name.to_string(), a, b, c];
        let rows = |[phasor, f32_angles]: &[Vec<f64>; 2]| {
            [
                row("position", IN_TABLE.map(thousands)),
                row("phasor", at(phasor)),
                row("angles in f32", at(f32_angles)),
            ]
        };
        if let Some(scores) = &self.scores {
            report.heading(
                "Largest change of a score when all positions shift alike: it should not change",
            );
            report.table(&rows(scores));
        }
        report.heading("Largest error of a rotated value");
        report.table(&rows(&self.errors));
        report.note(&format!(
            "Of {} tokens of the first sequence, in f32, one after the other from the position on.",
            self.tokens
        ));
    }
}
