//! Modular MAX: `max.nn.rotary_embedding`.
//!
//! ```text
//! RotaryEmbedding(dim, n_heads, theta, max_seq_len, head_dim=None, interleaved=True)
//!     .freqs_cis_base()  .freqs_cis  .compute_scale(user_scale=None)
//!     (x, start_pos=0, seq_len=None)
//! rope_ragged(input, input_row_offsets, start_pos, freqs_cis, interleaved=True, rope_first=False)
//! rope_ragged_with_position_ids(input, freqs_cis, position_ids, mrope_section=None, interleaved=True)
//! ```
//!
//! MAX's classes are constructors of one [`RotaryEmbedding`] here. Pairs are interleaved unless
//! `interleaved` is false, and x is `[batch, sequence, heads, head_dim]`.
//!
//! | MAX | here | its table |
//! |---|---|---|
//! | `RotaryEmbedding` | [`new`](RotaryEmbedding::new) | `2 * max_seq_len` rows |
//! | `Llama3RotaryEmbedding` | [`llama3`](RotaryEmbedding::llama3) | the same |
//! | the same with both factors 1e38 (Gemma 3) | [`linear`](RotaryEmbedding::linear) | the same |
//! | `DynamicRotaryEmbedding` | [`dynamic`](RotaryEmbedding::dynamic) | grows; frequencies stay as they are |
//! | `YarnRotaryEmbedding` | [`yarn`](RotaryEmbedding::yarn) | `max_seq_len` rows, the attention factor in them |
//! | `DeepseekYarnRotaryEmbedding` | [`deepseek_yarn`](RotaryEmbedding::deepseek_yarn) | `max_seq_len` rows of `dim / 2` pairs |
//! | `LongRoPERotaryEmbedding` | [`longrope`](RotaryEmbedding::longrope) | stitched: the position chooses the factors |
//!
//! [`RotaryEmbedding::rope_ragged`] and [`RotaryEmbedding::rope_ragged_with_position_ids`] are the kernels
//! of those names with the embedding's own `freqs_cis` and pairing; [`RotaryEmbedding::with_axes`] is
//! `mrope_section`.
//!
//! MAX rounds frequencies and angles to f32 (1.4e-4 off at position 4,095 with theta 10,000 and 128
//! dims) and the table to the type of x. Here angles are exact, calls read no table, and the tables
//! that [`freqs_cis_base`](RotaryEmbedding::freqs_cis_base) gives out are right to 7e-8. For MAX's own
//! see [`tables::max`](super::tables::max).

use super::tables::MOST_ROWS;
use super::tensor::{
    Engine, Operand, check_in_table, check_rotary_dim, check_run_in_table, pairing, product,
};
use super::{InterfaceError, Tensor};
use crate::angle::DoubleDouble;
use crate::config::{
    Axes, LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, Scaling, YarnScaling,
    long_rope_gain, mscale,
};
use crate::{Angles, Device, DeviceElement, Layout, Positions};

/// The arguments that all of MAX's classes take.
///
/// ```
/// use phasor::interfaces::max::Arguments;
///
/// // dim=4096, n_heads=32, theta=10000.0, max_seq_len=2048, interleaved=False
/// let arguments = Arguments { interleaved: false, ..Arguments::new(4096, 32, 10_000.0, 2048) };
/// assert_eq!(arguments.head_dim, None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arguments {
    /// Dims of the model; only `dim / n_heads` is used, unless `head_dim` is given.
    pub dim: usize,
    /// Heads of the model.
    pub n_heads: usize,
    /// The base of the frequencies.
    pub theta: f64,
    /// The longest sequence.
    pub max_seq_len: usize,
    /// Dims of a head.
    pub head_dim: Option<usize>,
    /// Whether dims `(2i, 2i + 1)` form a pair, or `(i, i + head_dim / 2)`.
    pub interleaved: bool,
}

impl Arguments {
    /// The arguments without a default; `head_dim` is `None` and `interleaved` true.
    pub const fn new(dim: usize, n_heads: usize, theta: f64, max_seq_len: usize) -> Self {
        Self {
            dim,
            n_heads,
            theta,
            max_seq_len,
            head_dim: None,
            interleaved: true,
        }
    }

    fn head_dim(&self) -> Result<usize, InterfaceError> {
        match (self.head_dim, self.dim.checked_div(self.n_heads)) {
            (Some(head_dim), _) | (None, Some(head_dim)) => Ok(head_dim),
            (None, None) => Err(InterfaceError::value("n_heads", 0, "at least 1")),
        }
    }
}

/// MAX's `Llama3RopeScalingParams`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3RopeScalingParams {
    /// Divides the frequencies of slow pairs.
    pub factor: f64,
    /// Turns over `orig_max_position` below which a pair is slow.
    pub low_freq_factor: f64,
    /// Turns above which a pair keeps its frequency.
    pub high_freq_factor: f64,
    /// Tokens that the model was first trained on.
    pub orig_max_position: u64,
}

/// MAX's `YarnScalingParams`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct YarnScalingParams {
    /// Divides the frequencies of slow pairs.
    pub factor: f64,
    /// Turns above which a pair keeps its frequency.
    pub beta_fast: f64,
    /// Turns below which a pair is slow.
    pub beta_slow: f64,
    /// Tokens that the model was first trained on.
    pub original_max_position_embeddings: u64,
    /// Not heeded, as in MAX: the ramp always begins and ends at whole pairs. (For gpt-oss, which
    /// wants otherwise, take [`RopeConfig`].)
    pub truncate: bool,
}

/// MAX's `DeepseekYarnRopeScalingParams`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeepseekYarnRopeScalingParams {
    /// Divides the frequencies of slow pairs.
    pub scaling_factor: f64,
    /// Tokens that the model was first trained on.
    pub original_max_position_embeddings: u64,
    /// Turns above which a pair keeps its frequency.
    pub beta_fast: f64,
    /// Turns below which a pair is slow.
    pub beta_slow: f64,
    /// Over `mscale_all_dim` this gives the factor of the table; alone, that of the scores.
    pub mscale: f64,
    /// See `mscale`.
    pub mscale_all_dim: f64,
}

/// MAX's `LongRoPEScalingParams`.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRoPEScalingParams {
    /// Divides the frequencies at positions below `original_max_position`, one per pair.
    pub short_factor: Vec<f64>,
    /// Divides those from there on.
    pub long_factor: Vec<f64>,
    /// Tokens that the model was first trained on.
    pub original_max_position: u64,
    /// Tokens that it is meant for.
    pub max_position_embeddings: u64,
}

/// MAX's `RotaryEmbedding` and its subclasses.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::Tensor;
/// use phasor::interfaces::max::{Arguments, RotaryEmbedding};
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// // rope = RotaryEmbedding(dim=256, n_heads=4, theta=10000.0, max_seq_len=128)
/// let rope = RotaryEmbedding::new(&Device::host(), &Arguments::new(256, 4, 10_000.0, 128))?;
/// assert_eq!(rope.compute_scale(None), 0.125); // 1 / sqrt(head_dim)
/// assert_eq!(rope.freqs_cis_base()?.len(), 256 * 32 * 2); // [2 * max_seq_len, head_dim / 2, 2]
///
/// // xq = rope(xq, start_pos=40)
/// let mut xq = vec![0.5f32; 2 * 7 * 4 * 64]; // [batch, sequence, heads, head_dim]
/// rope.call(Tensor::new(&mut xq, &[2, 7, 4, 64]), 40)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    engine: Engine,
    config: RopeConfig,
    axes: usize,
    max_seq_len: usize,
    rows: usize,
    grows: bool,
    scale: ScoreScale,
}

#[derive(Clone, Copy, Debug)]
struct ScoreScale {
    /// Where the user gives none.
    default: f64,
    /// Of a user's.
    factor: f64,
}

impl RotaryEmbedding {
    /// `RotaryEmbedding`: plain frequencies.
    ///
    /// # Errors
    /// [`InterfaceError::Value`] for `n_heads` of 0 without a `head_dim`, a head of odd or more than
    /// 65,536 dims, or a `max_seq_len` past what memory counts; [`InterfaceError::Config`] for a
    /// theta that is not finite, below 2^-32 or looks exchanged with the dims;
    /// [`InterfaceError::Rope`] if the device has no room.
    pub fn new(device: &Device, arguments: &Arguments) -> Result<Self, InterfaceError> {
        Self::scaled(device, arguments, Scaling::None)
    }

    /// All frequencies divided by `factor`. MAX has no class of its own for it: Gemma 3 asks
    /// `Llama3RotaryEmbedding`, with 1e38 for both of its frequency factors.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and [`InterfaceError::Config`] for a factor that is not positive.
    pub fn linear(
        device: &Device,
        arguments: &Arguments,
        factor: f64,
    ) -> Result<Self, InterfaceError> {
        Self::scaled(device, arguments, Scaling::Linear(LinearScaling { factor }))
    }

    /// `Llama3RotaryEmbedding`; without parameters it is [`new`](Self::new).
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and [`InterfaceError::Config`] for parameters without meaning.
    pub fn llama3(
        device: &Device,
        arguments: &Arguments,
        scaling_params: Option<&Llama3RopeScalingParams>,
    ) -> Result<Self, InterfaceError> {
        let scaling = scaling_params.map_or(Scaling::None, |params| {
            Scaling::Llama3(Llama3Scaling::new(
                params.factor,
                params.low_freq_factor,
                params.high_freq_factor,
                params.orig_max_position,
            ))
        });
        Self::scaled(device, arguments, scaling)
    }

    /// `DynamicRotaryEmbedding`: [`new`](Self::new) with a table that
    /// [`maybe_update_freqs`](Self::maybe_update_freqs) lengthens. Frequencies do not depend on the
    /// length: this is not the dynamic NTK scaling of Hugging Face transformers, for which see
    /// [`DynamicNtkScaling`](crate::config::DynamicNtkScaling).
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn dynamic(device: &Device, arguments: &Arguments) -> Result<Self, InterfaceError> {
        Ok(Self {
            grows: true,
            ..Self::new(device, arguments)?
        })
    }

    /// `YarnRotaryEmbedding`. Its table has `max_seq_len` rows, not twice as many, and
    /// `0.1 ln(factor) + 1` is multiplied into it.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and [`InterfaceError::Config`] for parameters without meaning.
    pub fn yarn(
        device: &Device,
        arguments: &Arguments,
        scaling_params: &YarnScalingParams,
    ) -> Result<Self, InterfaceError> {
        let scaling = Scaling::Yarn(YarnScaling {
            beta_fast: scaling_params.beta_fast,
            beta_slow: scaling_params.beta_slow,
            ..YarnScaling::new(
                scaling_params.factor,
                scaling_params.original_max_position_embeddings,
            )
        });
        Ok(Self {
            rows: arguments.max_seq_len,
            ..Self::scaled(device, arguments, scaling)?
        })
    }

    /// `DeepseekYarnRotaryEmbedding`. Frequencies span `dim`, the rotated part of a head, and not
    /// `head_dim`, of which only [`compute_scale`](Self::compute_scale) is made; theta loses its
    /// fraction. The table has `max_seq_len` rows, and the ratio of both mscales is multiplied into
    /// it.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and [`InterfaceError::Config`] for parameters without meaning.
    pub fn deepseek_yarn(
        device: &Device,
        arguments: &Arguments,
        scaling_params: &DeepseekYarnRopeScalingParams,
    ) -> Result<Self, InterfaceError> {
        let factor = scaling_params.scaling_factor;
        let yarn = YarnScaling {
            beta_fast: scaling_params.beta_fast,
            beta_slow: scaling_params.beta_slow,
            attention_factor: Some(
                mscale(factor, scaling_params.mscale)
                    .div(mscale(factor, scaling_params.mscale_all_dim))
                    .to_f64(),
            ),
            ..YarnScaling::new(factor, scaling_params.original_max_position_embeddings)
        };
        let config = RopeConfig::new(arguments.theta.trunc(), arguments.dim)?
            .with_scaling(Scaling::Yarn(yarn))?;
        let of_scores = mscale(factor, scaling_params.mscale);
        let of_scores = of_scores.mul(of_scores).to_f64();
        let scale = ScoreScale {
            default: of_scores / (arguments.head_dim()? as f64).sqrt(),
            factor: of_scores,
        };
        Self::of_config(device, arguments, &config, arguments.max_seq_len, scale)
    }

    /// `LongRoPERotaryEmbedding`. Each token's own position chooses the factors: the short ones
    /// below `original_max_position`, the long ones from there on. (Other systems choose for a whole
    /// sequence, as the models were trained; see [`RopeConfig::rope`].) The attention factor is in
    /// [`compute_scale`](Self::compute_scale), once, and not in the table.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and [`InterfaceError::Config`] for parameters without meaning,
    /// such as lists without an entry per pair.
    pub fn longrope(
        device: &Device,
        arguments: &Arguments,
        scaling_params: &LongRoPEScalingParams,
    ) -> Result<Self, InterfaceError> {
        let original = scaling_params.original_max_position;
        // Of no factor, so that no attention factor is in the table.
        let scaling = Scaling::LongRope(LongRopeScaling::new(
            scaling_params.short_factor.clone(),
            scaling_params.long_factor.clone(),
            original,
        ));
        let mut embedding = Self::scaled(device, arguments, scaling)?;
        let longest = scaling_params.max_position_embeddings;
        if longest > original {
            if original < 2 {
                return Err(InterfaceError::value(
                    "original_max_position",
                    original,
                    "at least 2, for the attention factor divides by its logarithm",
                ));
            }
            let factor = DoubleDouble::from(longest).div(DoubleDouble::from(original));
            embedding.scale.default *= long_rope_gain(factor, original).to_f64();
        }
        Ok(embedding)
    }

    fn scaled(
        device: &Device,
        arguments: &Arguments,
        scaling: Scaling,
    ) -> Result<Self, InterfaceError> {
        let head_dim = arguments.head_dim()?;
        check_rotary_dim("head_dim", head_dim)?;
        let config = RopeConfig::new(arguments.theta, head_dim)?.with_scaling(scaling)?;
        let scale = ScoreScale {
            default: config.score_scale(),
            factor: 1.0,
        };
        let rows = arguments.max_seq_len.saturating_mul(2);
        Self::of_config(device, arguments, &config, rows, scale)
    }

    fn of_config(
        device: &Device,
        arguments: &Arguments,
        config: &RopeConfig,
        rows: usize,
        scale: ScoreScale,
    ) -> Result<Self, InterfaceError> {
        let config = config.clone().with_pairing(pairing(arguments.interleaved));
        Ok(Self {
            engine: Engine::new(device, config.rope_by_position()?)?,
            config,
            axes: 1,
            max_seq_len: arguments.max_seq_len,
            rows,
            grows: false,
            scale,
        })
    }

    /// Rotates `x` of shape `[batch, sequence, heads, head_dim]`, whose tokens are at `start_pos`
    /// and on; there may be no batch axis, or several. MAX's `seq_len` is the length of the sequence
    /// axis here.
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for fewer than three axes or another `head_dim`;
    /// [`InterfaceError::OutOfTable`] past the rows that MAX's table has;
    /// [`InterfaceError::Length`] if the memory of `x` holds another number of elements.
    pub fn call<T: DeviceElement>(
        &self,
        x: Tensor<'_, T>,
        start_pos: i64,
    ) -> Result<(), InterfaceError> {
        let head_dim = self.rope().rotary_dim();
        let &[ref batch @ .., sequence, heads, width] = x.shape() else {
            return Err(InterfaceError::shape(
                "x",
                x.shape(),
                "[batch, sequence, heads, head_dim]",
            ));
        };
        if width != head_dim {
            return Err(InterfaceError::shape(
                "x",
                x.shape(),
                format!("[batch, sequence, heads, {head_dim}]"),
            ));
        }
        check_run_in_table("start_pos", start_pos, sequence, self.rows)?;
        let batch = batch.iter().fold(1usize, |n, &axis| n.saturating_mul(axis));
        let layout = Layout::bshd(batch, sequence, heads, width);
        let operand = x.operand("x", layout)?;
        self.engine
            .rotate(operand, None, Positions::start(start_pos))
    }

    /// The gradient: turns back by the same angles
    /// ([`Direction::Inverse`](crate::Direction::Inverse)).
    ///
    /// # Errors
    /// [`InterfaceError::Rope`] if the device has no room.
    pub fn backward(&self) -> Result<Self, InterfaceError> {
        Ok(Self {
            engine: self.engine.backward()?,
            ..self.clone()
        })
    }

    /// MAX's `mrope_section`: positions on several axes, as models of images and video have them.
    /// [`Axes::MropeInterleaved`] is how `rope_ragged_with_position_ids` shares pairs out,
    /// [`Axes::MropeSections`] how `fused_qk_ragged_rope` does.
    ///
    /// ```
    /// use phasor::Device;
    /// use phasor::config::Axes;
    /// use phasor::interfaces::Tensor;
    /// use phasor::interfaces::max::{Arguments, RotaryEmbedding};
    ///
    /// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
    /// let arguments = Arguments { interleaved: false, ..Arguments::new(4096, 32, 5e6, 32_768) };
    /// let rope = RotaryEmbedding::new(&Device::host(), &arguments)?
    ///     .with_axes(Axes::MropeInterleaved([24, 20, 20]))?;
    ///
    /// // xq = rope_ragged_with_position_ids(xq, rope.freqs_cis, position_ids, mrope_section=[24, 20, 20],
    /// //                                    interleaved=False)
    /// let position_ids = [9, 9, 9, 10, 9, 9]; // [3, tokens]
    /// let mut xq = vec![0.5f32; 2 * 32 * 128]; // [tokens, heads, head_dim]
    /// rope.rope_ragged_with_position_ids(Tensor::new(&mut xq, &[2, 32, 128]), &position_ids)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`InterfaceError::Config`] for sections that do not fit the head, and for LongRoPE, whose factors
    /// a position on one axis chooses; [`InterfaceError::Rope`] if the device has no room.
    pub fn with_axes(mut self, axes: Axes) -> Result<Self, InterfaceError> {
        self.axes = axes.axes();
        self.config = self.config.with_axes(axes);
        let rope = self.config.rope_by_position()?;
        let rope = rope.with_direction(self.rope().direction());
        self.engine = self.engine.with_rope(rope)?;
        Ok(self)
    }

    /// `rope_ragged`: rotates `input` of shape `[tokens, heads, head_dim]`, sequences one after the
    /// other. Sequence `b` has the tokens `input_row_offsets[b]..input_row_offsets[b + 1]`, the first of
    /// them at `start_pos[b]`. In heads that are wider than the embedding's the last dims rotate, with
    /// `rope_first` the first.
    ///
    /// ```
    /// use phasor::Device;
    /// use phasor::interfaces::Tensor;
    /// use phasor::interfaces::max::{Arguments, RotaryEmbedding};
    ///
    /// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
    /// let rope = RotaryEmbedding::new(&Device::host(), &Arguments::new(4096, 32, 5e5, 8192))?;
    /// // A prompt of three tokens, and the next token of a sequence that has 100 in its cache.
    /// let mut xq = vec![0.5f32; 4 * 32 * 128];
    /// rope.rope_ragged(Tensor::new(&mut xq, &[4, 32, 128]), &[0, 3, 4], &[0, 100], false)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for other than three axes, narrower heads, or offsets and starts whose
    /// numbers do not fit each other; [`InterfaceError::Value`] for offsets that do not ascend from 0 to
    /// the number of tokens; [`InterfaceError::OutOfTable`] past the rows of MAX's table;
    /// [`InterfaceError::Length`] if the memory of `input` holds another number of elements.
    pub fn rope_ragged<T: DeviceElement>(
        &self,
        input: Tensor<'_, T>,
        input_row_offsets: &[u32],
        start_pos: &[u32],
        rope_first: bool,
    ) -> Result<(), InterfaceError> {
        let without_heads = input.shape().get(1) == Some(&0);
        let (tokens, operand) = self.ragged(input, rope_first)?;
        if start_pos.len().checked_add(1) != Some(input_row_offsets.len()) {
            return Err(InterfaceError::shape(
                "input_row_offsets",
                &[input_row_offsets.len()],
                format!(
                    "[{} + 1], where the first sequence begins and each of them ends",
                    start_pos.len()
                ),
            ));
        }
        let ascend = input_row_offsets.is_sorted();
        let ends = [input_row_offsets[0], input_row_offsets[start_pos.len()]];
        if !ascend || ends[0] != 0 || usize::try_from(ends[1]) != Ok(tokens) {
            return Err(InterfaceError::value(
                "input_row_offsets",
                format_args!("from {} to {}", ends[0], ends[1]),
                format!("ascending, from 0 to the {tokens} tokens of input"),
            ));
        }
        // Then there may be any number of tokens without memory for one.
        if without_heads {
            return Ok(());
        }
        let sequences = input_row_offsets.windows(2).zip(start_pos);
        let ids: Vec<i64> = sequences
            .flat_map(|(ends, &start)| (0..ends[1] - ends[0]).map(move |n| (start, n)))
            .map(|(start, n)| i64::from(start) + i64::from(n))
            .collect();
        check_in_table("start_pos", &ids, self.rows)?;
        self.engine
            .rotate(operand, None, Positions::per_token(&ids))
    }

    /// `rope_ragged_with_position_ids`: rotates `input` of shape `[tokens, heads, head_dim]`, with a
    /// position for each token, or one for each axis and token, `[axes, tokens]`, where the embedding
    /// has [axes](Self::with_axes).
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for other than three axes, another `head_dim`, or another number of
    /// positions; [`InterfaceError::OutOfTable`] past the rows of MAX's table;
    /// [`InterfaceError::Length`] if the memory of `input` holds another number of elements.
    pub fn rope_ragged_with_position_ids<T: DeviceElement>(
        &self,
        input: Tensor<'_, T>,
        position_ids: &[u32],
    ) -> Result<(), InterfaceError> {
        let head_dim = self.rope().rotary_dim();
        if input.shape().last() != Some(&head_dim) {
            let expected = format!("[tokens, heads, {head_dim}]");
            return Err(InterfaceError::shape("input", input.shape(), expected));
        }
        let (tokens, operand) = self.ragged(input, true)?;
        if tokens.checked_mul(self.axes) != Some(position_ids.len()) {
            let expected = match self.axes {
                1 => format!("[{tokens}], one for each token"),
                axes => format!("[{axes}, {tokens}], one for each axis and token"),
            };
            let shape = [position_ids.len()];
            return Err(InterfaceError::shape("position_ids", &shape, expected));
        }
        let ids: Vec<i64> = position_ids.iter().copied().map(i64::from).collect();
        check_in_table("position_ids", &ids, self.rows)?;
        self.engine.rotate(operand, None, Positions::per_axis(&ids))
    }

    /// The tokens of `[tokens, heads, head_dim]`, and where its dims rotate.
    fn ragged<'a, T: DeviceElement>(
        &self,
        input: Tensor<'a, T>,
        rope_first: bool,
    ) -> Result<(usize, Operand<'a, T>), InterfaceError> {
        let rotary_dim = self.rope().rotary_dim();
        let &[tokens, heads, width] = input.shape() else {
            let expected = "[tokens, heads, head_dim]";
            return Err(InterfaceError::shape("input", input.shape(), expected));
        };
        let offset = match width.checked_sub(rotary_dim) {
            Some(_) if rope_first => 0,
            Some(rest) if rest % 2 == 0 => rest,
            _ => {
                let expected = format!(
                    "[tokens, heads, {rotary_dim}], or an even number of dims more, which do not \
                     rotate"
                );
                return Err(InterfaceError::shape("input", input.shape(), expected));
            }
        };
        let layout = Layout::tokens(tokens, heads, width).with_rotary_offset(offset);
        Ok((tokens, input.operand("input", layout)?))
    }

    /// Lengthens the table of [`dynamic`](Self::dynamic) to twice `seq_len` rows, if that is more
    /// than `max_seq_len`; other tables stay as they are.
    pub fn maybe_update_freqs(&mut self, seq_len: usize) {
        if self.grows {
            self.max_seq_len = self.max_seq_len.max(seq_len);
            self.rows = self.max_seq_len.saturating_mul(2);
        }
    }

    /// The table, row-major `[rows, head_dim / 2, 2]`: cos and sin of each pair at the positions
    /// `0..rows`.
    ///
    /// # Errors
    /// [`InterfaceError::Value`] for more than 2^25 rows, or more than there is memory for.
    pub fn freqs_cis_base(&self) -> Result<Vec<f32>, InterfaceError> {
        let rope = self.rope();
        let pairs = rope.rotary_dim() / 2;
        let mut table = Vec::new();
        let fits = self.rows <= MOST_ROWS
            && product(&[self.rows, pairs, 2])
                .is_some_and(|elements| table.try_reserve_exact(elements).is_ok());
        if !fits {
            return Err(InterfaceError::value(
                "max_seq_len",
                self.max_seq_len,
                format!("small enough for a table of {MOST_ROWS} rows that fits memory"),
            ));
        }
        let (frequencies, boundary) = match rope.angles() {
            Angles::Exact(frequencies) => ([frequencies.clone(), frequencies.clone()], i64::MAX),
            Angles::Rows(rows) => (
                [rows.row(0)?, rows.row(1)?],
                rows.boundary().unwrap_or(i64::MAX),
            ),
            Angles::Table(_) => unreachable!("made of frequencies"),
        };
        for position in 0..self.rows as i64 {
            let row = &frequencies[usize::from(position >= boundary)];
            for pair in 0..pairs {
                let (cos, sin) = row.cos_sin(pair, position);
                table.extend([cos, sin]);
            }
        }
        Ok(table)
    }

    /// [`freqs_cis_base`](Self::freqs_cis_base) as `[rows, head_dim]`: the same elements in the same
    /// order (cos, sin, cos, sin, ...), whether or not pairs are interleaved.
    ///
    /// # Errors
    /// [`InterfaceError::Value`] for more than 2^25 rows, or more than there is memory for.
    pub fn freqs_cis(&self) -> Result<Vec<f32>, InterfaceError> {
        self.freqs_cis_base()
    }

    /// Rows of the table.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// What multiplies the scores: the user's scale or `1 / sqrt(head_dim)`. [`deepseek_yarn`]
    /// multiplies either by `(0.1 mscale ln(scaling_factor) + 1)^2`; [`longrope`] multiplies the
    /// second by its attention factor and leaves a user's scale alone.
    ///
    /// [`deepseek_yarn`]: Self::deepseek_yarn
    /// [`longrope`]: Self::longrope
    pub fn compute_scale(&self, user_scale: Option<f64>) -> f64 {
        match user_scale {
            Some(scale) => scale * self.scale.factor,
            None => self.scale.default,
        }
    }

    /// The rotation, for a plan of one's own.
    pub fn rope(&self) -> &crate::Rope {
        self.engine.rope()
    }
}
