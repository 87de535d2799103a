//! Attention scores, and angles as transformers forms them.

use super::tensors::{QueriesKeys, Tensor};

/// The products `q_i . k_j` of all tokens i and j for each query head, summed in f64 so that the
/// sum adds nothing to what is compared. Consecutive query heads share a key head.
pub fn scores(tensors: &QueriesKeys<f32>) -> Vec<f64> {
    let (Some(q), Some(k)) = (&tensors.q, &tensors.k) else {
        return Vec::new();
    };
    let [_, tokens, q_heads, head_dim] = q.layout().shape();
    let [_, _, k_heads, _] = k.layout().shape();
    let mut scores = Vec::with_capacity(q_heads * tokens * tokens);
    for head in 0..q_heads {
        let k_head = head * k_heads / q_heads;
        for i in 0..tokens {
            let query = &q.data[(i * q_heads + head) * head_dim..][..head_dim];
            for j in 0..tokens {
                let key = &k.data[(j * k_heads + k_head) * head_dim..][..head_dim];
                let products = query.iter().zip(key);
                scores.push(products.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum());
            }
        }
    }
    scores
}

/// The largest absolute difference; NaN if there is one.
pub fn difference(a: &[f64], b: &[f64]) -> f64 {
    largest(a.iter().zip(b).map(|(a, b)| a - b))
}

/// The largest magnitude; NaN if there is one.
pub fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |largest: f64, x| {
        if x.is_nan() || x.abs() > largest {
            x.abs()
        } else {
            largest
        }
    })
}

/// Half-split rotation step by step as transformers does it, everything in f32: frequencies,
/// angle = position * frequency, cos, sin, products. An f32 holds an angle of 1,000,000 radians
/// to 1/16 of a radian only.
pub fn rotate_by_f32_angles(
    tensors: &QueriesKeys<f32>,
    theta: f64,
    start: i64,
) -> QueriesKeys<f32> {
    let rotate = |tensor: &Tensor<f32>| {
        let mut rotated = tensor.clone();
        let [_, _, heads, head_dim] = tensor.layout().shape();
        let pairs = head_dim / 2;
        for (token, heads) in rotated.data.chunks_mut(heads * head_dim).enumerate() {
            let position = start.wrapping_add(token as i64) as f32;
            for i in 0..pairs {
                let exponent = (2 * i) as f32 / head_dim as f32;
                let angle = position * (1.0 / (theta as f32).powf(exponent));
                let (sin, cos) = angle.sin_cos();
                for head in heads.chunks_mut(head_dim) {
                    let (a, b) = (head[i], head[i + pairs]);
                    head[i] = a * cos - b * sin;
                    head[i + pairs] = b * cos + a * sin;
                }
            }
        }
        rotated
    };
    QueriesKeys {
        q: tensors.q.as_ref().map(rotate),
        k: tensors.k.as_ref().map(rotate),
    }
}
