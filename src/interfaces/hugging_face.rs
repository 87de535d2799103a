//! Hugging Face transformers: `apply_rotary_pos_emb` with cos and sin, and Meta's `apply_rotary_emb`
//! with complex numbers, over tables that the caller brings.
//!
//! ```text
//! cos, sin = rotary_emb(x, position_ids)                 # [batch, sequence, dim]
//! apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
//! apply_rotary_emb(xq, xk, freqs_cis)                    # complex [sequence, dim / 2]
//! ```
//!
//! A table has a row for each token of a call: positions are in it, and the calls take none. A model's
//! config gives exact angles without a table: see [`ModelConfig`](crate::config::ModelConfig).
//!
//! transformers rounds cos and sin to the model's dtype and then, in most families, every operation;
//! here the values given are used as they are, and a result is rounded once.

use super::tensor::{Engine, Operand, from_starts, pairing, starts_of_rows, table};
use super::{Array, InterfaceError, Tensor};
use crate::{Device, DeviceElement, Element, Layout, OutOfRange, Pairing};

/// How a family of models lays cos and sin out, and which dims they rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// Llama and most others: the second half of a row repeats the first, and dims
    /// `(i, i + dim / 2)` form a pair.
    RotateHalf,
    /// GLM: the second half of a row repeats the first, but dims `(2i, 2i + 1)` form a pair. Serves
    /// DeepSeek-V3 too, whose scores do not depend on where the rotated dims go.
    Interleaved,
    /// DeepSeek-V3 and its relatives, to the letter (`apply_rotary_pos_emb_interleave`): as
    /// `Interleaved`, and rotated pair `i` is written to dims `(i, i + dim / 2)`. Only out of place.
    InterleavedToHalfSplit,
    /// Cohere: each odd column repeats the even one before it, and dims `(2i, 2i + 1)` form a pair.
    RepeatInterleave,
}

impl Form {
    fn pairing(self) -> Pairing {
        pairing(self != Form::RotateHalf)
    }

    fn output_pairing(self) -> Pairing {
        match self {
            Form::InterleavedToHalfSplit => Pairing::HalfSplit,
            _ => self.pairing(),
        }
    }
}

/// Columns of cos and sin as transformers makes them, ready on a [`Device`]: each pair's value occurs
/// twice in a row.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::{Array, Tensor};
/// use phasor::interfaces::hugging_face::{CosSin, Form};
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// // cos, sin = rotary_emb(x, position_ids): [1, 3, 4], the second half as the first
/// let cos = [1.0f32, 1.0, 1.0, 1.0, 0.6, 0.8, 0.6, 0.8, 0.0, 0.6, 0.0, 0.6];
/// let sin = [0.0f32, 0.0, 0.0, 0.0, 0.8, 0.6, 0.8, 0.6, 1.0, 0.8, 1.0, 0.8];
/// let (cos, sin) = (Array::new(&cos, &[1, 3, 4]), Array::new(&sin, &[1, 3, 4]));
/// let embedding = CosSin::new(&Device::host(), cos, sin, Form::RotateHalf)?;
///
/// // q, k = apply_rotary_pos_emb(q, k, cos, sin)
/// let mut q = vec![1.0f32; 2 * 8 * 3 * 4]; // [batch, heads, sequence, dim]
/// let mut k = vec![1.0f32; 2 * 2 * 3 * 4];
/// embedding.apply(
///     Tensor::new(&mut q, &[2, 8, 3, 4]),
///     Some(Tensor::new(&mut k, &[2, 2, 3, 4])),
///     1,
/// )?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CosSin(TokenTable);

impl CosSin {
    /// cos and sin of f32, f16 or bf16, `[sequence, dim]` or `[batch, sequence, dim]`, in one of
    /// transformers' forms.
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for other ranks, an odd `dim`, or unlike shapes;
    /// [`InterfaceError::Unpaired`] where columns that must be equal are not;
    /// [`InterfaceError::Length`] if memory holds another number of elements;
    /// [`InterfaceError::Value`] for a `dim` of 0 or above 65,536; [`InterfaceError::Rope`] if the
    /// device has no room.
    pub fn new<C: Element>(
        device: &Device,
        cos: Array<'_, C>,
        sin: Array<'_, C>,
        form: Form,
    ) -> Result<Self, InterfaceError> {
        let (batch, sequence, dim) = match *cos.shape() {
            [sequence, dim] if dim % 2 == 0 => (1, sequence, dim),
            [batch, sequence, dim] if dim % 2 == 0 => (batch, sequence, dim),
            _ => {
                return Err(InterfaceError::shape(
                    "cos",
                    cos.shape(),
                    "[sequence, dim] or [batch, sequence, dim], dim even",
                ));
            }
        };
        if sin.shape() != cos.shape() {
            return Err(InterfaceError::shape(
                "sin",
                sin.shape(),
                format!("{:?}, as that of cos", cos.shape()),
            ));
        }
        let cos = unrepeated("cos", cos.checked("cos")?, dim, form)?;
        let sin = unrepeated("sin", sin.checked("sin")?, dim, form)?;
        // The positions of a call are in its table.
        let table = table(&cos, &sin, dim / 2)?.with_out_of_range(OutOfRange::Clamp);
        let rope =
            crate::Rope::new(table, form.pairing()).with_output_pairing(form.output_pairing());
        Ok(Self(TokenTable::new(device, rope, batch, sequence)?))
    }

    /// `apply_rotary_pos_emb`: rotates q, and k if given, in one launch. With an `unsqueeze_dim` of
    /// 1 they are `[batch, heads, sequence, head_dim]`, with 2 `[batch, sequence, heads, head_dim]`.
    /// Where `dim` is less than `head_dim`, the dims after it keep their bits, as in families that
    /// slice q and k first.
    ///
    /// # Errors
    /// [`InterfaceError::Value`] for another `unsqueeze_dim`; [`InterfaceError::Shape`] for tensors
    /// that are not of rank 4, of the table's batch (unless that is 1) and sequence, and of heads of
    /// at least `dim`; [`InterfaceError::MixedMemory`] for one tensor in host memory and one on a
    /// device; [`InterfaceError::Length`] if memory holds another number of elements;
    /// [`InterfaceError::Rope`] for [`Form::InterleavedToHalfSplit`] in place.
    pub fn apply<T: DeviceElement>(
        &self,
        q: Tensor<'_, T>,
        k: Option<Tensor<'_, T>>,
        unsqueeze_dim: usize,
    ) -> Result<(), InterfaceError> {
        self.0.rotate(("q", q), ("k", k), unsqueeze_dim)
    }

    /// The gradient: turns back by the same angles
    /// ([`Direction::Inverse`](crate::Direction::Inverse)).
    ///
    /// # Errors
    /// [`InterfaceError::Rope`] if the device has no room.
    pub fn backward(&self) -> Result<Self, InterfaceError> {
        self.0.backward().map(Self)
    }

    /// The rotation, for a plan of one's own.
    pub fn rope(&self) -> &crate::Rope {
        self.0.engine.rope()
    }
}

/// One call of `apply_rotary_pos_emb` in its `rotate_half` form. A model rotates the q and k of every
/// layer with one [`CosSin`] instead.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::{Array, Tensor};
/// use phasor::interfaces::hugging_face::apply_rotary_pos_emb;
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// let (cos, sin) = ([0.6f32, 0.6], [0.8f32, 0.8]); // one token, dim 2
/// let (mut q, mut k) = ([1.0f32, 2.0], [3.0f32, 4.0]);
///
/// // q, k = apply_rotary_pos_emb(q, k, cos, sin)
/// apply_rotary_pos_emb(
///     &Device::host(),
///     Tensor::new(&mut q, &[1, 1, 1, 2]),
///     Some(Tensor::new(&mut k, &[1, 1, 1, 2])),
///     Array::new(&cos, &[1, 2]),
///     Array::new(&sin, &[1, 2]),
///     1,
/// )?;
/// assert!((q[0] - (0.6 - 2.0 * 0.8)).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`CosSin::new`] and [`CosSin::apply`].
pub fn apply_rotary_pos_emb<T: DeviceElement, C: Element>(
    device: &Device,
    q: Tensor<'_, T>,
    k: Option<Tensor<'_, T>>,
    cos: Array<'_, C>,
    sin: Array<'_, C>,
    unsqueeze_dim: usize,
) -> Result<(), InterfaceError> {
    CosSin::new(device, cos, sin, Form::RotateHalf)?.apply(q, k, unsqueeze_dim)
}

/// Complex factors, ready on a [`Device`]: Meta's `freqs_cis`, also in transformers' Llama 4 and
/// DeepSeek-V2. They need not be of length 1.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::{Array, Tensor};
/// use phasor::interfaces::hugging_face::FreqsCis;
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// // freqs_cis = torch.polar(...), as torch.view_as_real(freqs_cis): [sequence, dim / 2, 2]
/// let freqs_cis = [1.0f32, 0.0, 1.0, 0.0, 0.6, 0.8, 0.8, 0.6];
/// let freqs_cis = FreqsCis::new(&Device::host(), Array::new(&freqs_cis, &[2, 2, 2]))?;
///
/// // xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
/// let mut xq = vec![1.0f32; 2 * 8 * 4]; // [batch, sequence, heads, dim]
/// let mut xk = vec![1.0f32; 2 * 2 * 4];
/// freqs_cis.apply_rotary_emb(
///     Tensor::new(&mut xq, &[1, 2, 8, 4]),
///     Some(Tensor::new(&mut xk, &[1, 2, 2, 4])),
///     2,
/// )?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct FreqsCis(TokenTable);

impl FreqsCis {
    /// Real and imaginary parts side by side, `[sequence, dim / 2, 2]` or
    /// `[batch, sequence, dim / 2, 2]`, in f32, f16 or bf16.
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for other shapes; [`InterfaceError::Length`] if its memory holds
    /// another number of elements; [`InterfaceError::Value`] for factors of no pair, or of more than
    /// 32,768; [`InterfaceError::Rope`] if the device has no room.
    pub fn new<C: Element>(
        device: &Device,
        freqs_cis: Array<'_, C>,
    ) -> Result<Self, InterfaceError> {
        let (batch, sequence, pairs) = match *freqs_cis.shape() {
            [sequence, pairs, 2] => (1, sequence, pairs),
            [batch, sequence, pairs, 2] => (batch, sequence, pairs),
            _ => {
                return Err(InterfaceError::shape(
                    "freqs_cis",
                    freqs_cis.shape(),
                    "[sequence, dim / 2, 2] or [batch, sequence, dim / 2, 2]",
                ));
            }
        };
        let parts = freqs_cis.checked("freqs_cis")?;
        let part =
            |first: usize| -> Vec<C> { parts.iter().skip(first).step_by(2).copied().collect() };
        let rope = crate::Rope::new(table(&part(0), &part(1), pairs)?, Pairing::Interleaved);
        Ok(Self(TokenTable::new(device, rope, batch, sequence)?))
    }

    /// `apply_rotary_emb`: rotates xq, and xk if given, whose dims `(2i, 2i + 1)` are taken as complex
    /// numbers and multiplied by the factors. With an `unsqueeze_dim` of 2 they are
    /// `[batch, sequence, heads, head_dim]` (Meta, Llama 4), with 1
    /// `[batch, heads, sequence, head_dim]` (DeepSeek-V2).
    ///
    /// # Errors
    /// As [`CosSin::apply`].
    pub fn apply_rotary_emb<T: DeviceElement>(
        &self,
        xq: Tensor<'_, T>,
        xk: Option<Tensor<'_, T>>,
        unsqueeze_dim: usize,
    ) -> Result<(), InterfaceError> {
        self.0.rotate(("xq", xq), ("xk", xk), unsqueeze_dim)
    }

    /// The gradient: multiplies by the conjugate factors
    /// ([`Direction::Inverse`](crate::Direction::Inverse)).
    ///
    /// # Errors
    /// [`InterfaceError::Rope`] if the device has no room.
    pub fn backward(&self) -> Result<Self, InterfaceError> {
        self.0.backward().map(Self)
    }

    /// The rotation, for a plan of one's own.
    pub fn rope(&self) -> &crate::Rope {
        self.0.engine.rope()
    }
}

/// A table with a row for each token of a call.
#[derive(Clone, Debug)]
struct TokenTable {
    engine: Engine,
    /// 1 where all sequences of the batch share the table.
    batch: usize,
    starts: Vec<i64>,
    sequence: usize,
}

impl TokenTable {
    fn new(
        device: &Device,
        rope: crate::Rope,
        batch: usize,
        sequence: usize,
    ) -> Result<Self, InterfaceError> {
        Ok(Self {
            engine: Engine::new(device, rope)?,
            batch,
            starts: starts_of_rows(batch, sequence),
            sequence,
        })
    }

    fn backward(&self) -> Result<Self, InterfaceError> {
        Ok(Self {
            engine: self.engine.backward()?,
            ..self.clone()
        })
    }

    fn operand<'a, T: DeviceElement>(
        &self,
        argument: &'static str,
        tensor: Tensor<'a, T>,
        heads_first: bool,
    ) -> Result<Operand<'a, T>, InterfaceError> {
        let rotary_dim = self.engine.rope().rotary_dim();
        let (table_batch, sequence) = (self.batch, self.sequence);
        let layout = match (heads_first, tensor.shape()) {
            (true, &[batch, heads, sequence, dim]) => {
                Some(Layout::bhsd(batch, sequence, heads, dim))
            }
            (false, &[batch, sequence, heads, dim]) => {
                Some(Layout::bshd(batch, sequence, heads, dim))
            }
            _ => None,
        };
        let fits = |layout: &Layout| {
            let [batch, tokens, _, dim] = layout.shape();
            (table_batch == 1 || batch == table_batch) && tokens == sequence && dim >= rotary_dim
        };
        match layout.filter(fits) {
            Some(layout) => tensor.operand(argument, layout),
            None => {
                let batch = match table_batch {
                    1 => "batch".to_string(),
                    batch => batch.to_string(),
                };
                let expected = if heads_first {
                    format!("[{batch}, heads, {sequence}, head_dim]")
                } else {
                    format!("[{batch}, {sequence}, heads, head_dim]")
                };
                let expected =
                    format!("{expected} with head_dim at least {rotary_dim}, as the table");
                Err(InterfaceError::shape(argument, tensor.shape(), expected))
            }
        }
    }

    fn rotate<T: DeviceElement>(
        &self,
        (name, q): (&'static str, Tensor<'_, T>),
        (name_of_k, k): (&'static str, Option<Tensor<'_, T>>),
        unsqueeze_dim: usize,
    ) -> Result<(), InterfaceError> {
        let heads_first = match unsqueeze_dim {
            1 => true,
            2 => false,
            other => {
                return Err(InterfaceError::value(
                    "unsqueeze_dim",
                    other,
                    "1 for [batch, heads, sequence, head_dim], or 2 for [batch, sequence, heads, \
                     head_dim]",
                ));
            }
        };
        let q = self.operand(name, q, heads_first)?;
        let k = k
            .map(|k| self.operand(name_of_k, k, heads_first))
            .transpose()?;
        self.engine.rotate(q, k, from_starts(&self.starts))
    }
}

/// One column per pair, of two that must be equal.
fn unrepeated<C: Element>(
    argument: &'static str,
    values: &[C],
    dim: usize,
    form: Form,
) -> Result<Vec<C>, InterfaceError> {
    let columns = |pair: usize| match form {
        Form::RotateHalf | Form::Interleaved | Form::InterleavedToHalfSplit => {
            (pair, pair + dim / 2)
        }
        Form::RepeatInterleave => (2 * pair, 2 * pair + 1),
    };
    let mut kept = Vec::with_capacity(values.len() / 2);
    for (row, cells) in values.chunks_exact(dim.max(1)).enumerate() {
        for pair in 0..dim / 2 {
            let (column, partner) = columns(pair);
            let (left, right) = (cells[column].widen(), cells[partner].widen());
            if left != right && !(left.is_nan() && right.is_nan()) {
                return Err(InterfaceError::Unpaired {
                    argument,
                    row,
                    column,
                    partner,
                    left,
                    right,
                });
            }
            kept.push(cells[column]);
        }
    }
    Ok(kept)
}
