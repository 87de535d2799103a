//! Weights of GPTQ checkpoints.

use crate::AttentionError;
use crate::error::agree;
use crate::projection::{Weights, check_features};
use phasor::half::f16;
use std::ops::Range;

/// What the zero points of a checkpoint are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GptqFormat {
    /// One less than what is subtracted (`gptq`, of AutoGPTQ and most files): 7 where 8 is meant.
    #[default]
    V1,
    /// What is subtracted (`gptq_v2`).
    V2,
}

impl GptqFormat {
    /// What a stored zero point lacks.
    pub(crate) fn zero_offset(self) -> i32 {
        match self {
            GptqFormat::V1 => 1,
            GptqFormat::V2 => 0,
        }
    }
}

/// The tensors of a 4-bit GPTQ matrix, as checkpoints have them.
#[derive(Clone, Debug, Default)]
pub struct GptqTensors {
    /// `qweight`, `[in_features / 8, out_features]`: eight inputs in a word, the first in its lowest bits.
    pub qweight: Vec<i32>,
    /// `scales`, `[groups, out_features]`.
    pub scales: Vec<f16>,
    /// `qzeros`, `[groups, out_features / 8]`: eight outputs in a word.
    pub qzeros: Vec<i32>,
    /// `g_idx`, `[in_features]`: the group of each input (act-order, desc_act). Empty: runs of
    /// `group_size`.
    pub g_idx: Vec<i32>,
}

/// A 4-bit GPTQ matrix. Its value at output `o` and input `i` of group `g` is
/// `(nibble[i, o] - zero[g, o]) * scale[g, o]`, which is exact in f32.
#[derive(Clone, Debug)]
pub struct GptqWeights {
    tensors: GptqTensors,
    /// What a stored zero point lacks.
    zero_offset: i32,
    out_features: usize,
    in_features: usize,
}

impl GptqWeights {
    /// Inputs in a word, or outputs.
    const IN_WORD: usize = 8;

    /// Checks the tensors. `group_size` is that of the config; `None` is -1 there: one group.
    ///
    /// # Errors
    /// [`AttentionError::Mismatch`] for a tensor of another size, [`AttentionError::Weights`] for a
    /// `g_idx` past the groups, [`AttentionError::Value`] for a number that cannot be used.
    pub fn new(
        mut tensors: GptqTensors,
        format: GptqFormat,
        group_size: Option<usize>,
        out_features: usize,
        in_features: usize,
    ) -> Result<Self, AttentionError> {
        check_features(out_features, in_features)?;
        for (what, value) in [
            ("out_features of GPTQ weights", out_features),
            ("in_features of GPTQ weights", in_features),
        ] {
            if !value.is_multiple_of(Self::IN_WORD) {
                return Err(AttentionError::Value {
                    what,
                    value,
                    remedy: "it must be a multiple of 8, as words have eight of them",
                });
            }
        }
        let group_size = group_size.unwrap_or(in_features);
        if group_size == 0 {
            return Err(AttentionError::Value {
                what: "group_size",
                value: 0,
                remedy: "it must be above 0; None is one group",
            });
        }
        let groups = in_features.div_ceil(group_size);
        let words = |a: usize, b: usize| a.saturating_mul(b);
        agree(
            "words of qweight",
            words(in_features / 8, out_features),
            tensors.qweight.len(),
        )?;
        agree(
            "scales, one a group and output",
            words(groups, out_features),
            tensors.scales.len(),
        )?;
        agree(
            "words of qzeros",
            words(groups, out_features / 8),
            tensors.qzeros.len(),
        )?;
        if tensors.g_idx.is_empty() {
            tensors.g_idx = (0..in_features).map(|i| (i / group_size) as i32).collect();
        }
        agree(
            "entries of g_idx, one an input",
            in_features,
            tensors.g_idx.len(),
        )?;
        let inside = |&group: &i32| usize::try_from(group).is_ok_and(|group| group < groups);
        if !tensors.g_idx.iter().all(inside) {
            return Err(AttentionError::Weights {
                what: "g_idx",
                remedy: "a group is past the scales: check group_size",
            });
        }
        Ok(Self {
            tensors,
            zero_offset: format.zero_offset(),
            out_features,
            in_features,
        })
    }
}

fn nibble(word: i32, at: usize) -> i32 {
    word >> (4 * at) & 15
}

impl Weights for GptqWeights {
    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) {
        let GptqTensors {
            qweight,
            scales,
            qzeros,
            g_idx,
        } = &self.tensors;
        let outputs = self.out_features;
        for (row, values) in rows.zip(values.chunks_exact_mut(self.in_features)) {
            for (word, (values, groups)) in values
                .chunks_exact_mut(Self::IN_WORD)
                .zip(g_idx.chunks_exact(Self::IN_WORD))
                .enumerate()
            {
                let word = qweight[word * outputs + row];
                for (at, (value, &group)) in values.iter_mut().zip(groups).enumerate() {
                    // Checked: it is a group.
                    let group = group as usize;
                    let zeros = qzeros[(group * outputs + row) / Self::IN_WORD];
                    let zero = nibble(zeros, row % Self::IN_WORD) + self.zero_offset;
                    let scale = scales[group * outputs + row].to_f32();
                    *value = (nibble(word, at) - zero) as f32 * scale;
                }
            }
        }
    }
}
