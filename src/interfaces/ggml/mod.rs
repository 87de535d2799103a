//! llama.cpp: `ggml_rope_ext`, `ggml_rope_multi` and their backward passes.
//!
//! ```text
//! ggml_rope_ext  (ctx, a, b, c, n_dims,           mode, n_ctx_orig, freq_base, freq_scale,
//!                 ext_factor, attn_factor, beta_fast, beta_slow)
//! ggml_rope_multi(ctx, a, b, c, n_dims, sections, mode, n_ctx_orig, freq_base, freq_scale,
//!                 ext_factor, attn_factor, beta_fast, beta_slow)
//! ggml_rope_ext_back(...)  ggml_rope_multi_back(...)
//! ```
//!
//! `a` is what is rotated, `b` the positions, `c` the frequency factors (`rope_freqs.weight` of a GGUF
//! file). ggml names the innermost axis first: its `a->ne` of `{head_dim, heads, tokens, batch}` is the
//! shape `[batch, tokens, heads, head_dim]` here.
//!
//! | argument | here |
//! |---|---|
//! | `n_dims` | dims that rotate in each head; half of the head with [`Mode::Vision`] |
//! | `mode` | [`Mode`] |
//! | `freq_base` | theta |
//! | `freq_scale` | multiplies the angle: `1 / factor` of linear scaling and YaRN |
//! | `ext_factor` | not 0: YaRN, with this weight of the unscaled angle |
//! | `attn_factor` | multiplies cos and sin; with YaRN beside `1 + 0.1 ln(1 / freq_scale)` |
//! | `beta_fast`, `beta_slow`, `n_ctx_orig` | where YaRN's ramp lies; read with YaRN alone |
//! | `sections` | pairs by time, height, width and a fourth axis |
//! | `c` | divides the angle of each pair |
//! | `ggml_rope_set_offset(a, n_offs)` | [`Rope::with_offset`] |
//!
//! ggml forms the angle of a pair from that of the pair before, in f32 (5.0e-4 off at position 4,095,
//! 9.8e-3 at 100,000 with base 10,000 and 128 dims). Here angles are exact for the f32 arguments given;
//! `1 / freq_scale` is rounded to f64 once. Like ggml's, results are rounded once. For ggml's own
//! angles, rounding by rounding, see [`tables::ggml`](super::tables::ggml).

mod table;

pub use table::table;

use super::tensor::{Engine, Operand};
use super::{InterfaceError, Tensor};
use crate::angle::DoubleDouble;
use crate::config::{Axes, GgmlMrope, LinearScaling, RopeConfig, Scaling, YarnScaling, mscale};
use crate::{Device, DeviceElement, Layout, Pairing, Positions};

/// `GGML_ROPE_TYPE_...`: which dims form a pair, and how many axes a position has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Mode {
    /// `GGML_ROPE_TYPE_NORMAL`: dims `(2i, 2i + 1)`.
    Normal = 0,
    /// `GGML_ROPE_TYPE_NEOX`: dims `(i, i + n_dims / 2)`.
    Neox = 2,
    /// `GGML_ROPE_TYPE_MROPE`: as `Neox`, one section of pairs after the other (Qwen2-VL).
    Mrope = 8,
    /// `GGML_ROPE_TYPE_VISION`: dims `(i, i + n_dims)` of the whole head, each section with frequencies
    /// of its own (vision towers).
    Vision = 24,
    /// `GGML_ROPE_TYPE_IMROPE`: as `Mrope`, the first three axes taking turns (Qwen3-VL).
    Imrope = 40,
}

impl TryFrom<i32> for Mode {
    type Error = InterfaceError;

    fn try_from(mode: i32) -> Result<Self, InterfaceError> {
        match mode {
            0 => Ok(Mode::Normal),
            2 => Ok(Mode::Neox),
            8 => Ok(Mode::Mrope),
            24 => Ok(Mode::Vision),
            40 => Ok(Mode::Imrope),
            _ => Err(InterfaceError::value(
                "mode",
                mode,
                "0 (normal), 2 (neox), 8 (mrope), 24 (vision) or 40 (imrope)",
            )),
        }
    }
}

/// The arguments that are numbers, under ggml's names.
///
/// ```
/// use phasor::interfaces::ggml::{Arguments, Mode};
///
/// // Qwen2.5 with YaRN of factor 4
/// let arguments = Arguments {
///     n_ctx_orig: 32_768,
///     freq_scale: 0.25,
///     ext_factor: 1.0,
///     ..Arguments::new(128, Mode::Neox, 1_000_000.0)
/// };
/// assert_eq!((arguments.attn_factor, arguments.beta_fast), (1.0, 32.0));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arguments {
    /// Dims that rotate in each head.
    pub n_dims: usize,
    /// Which dims form a pair.
    pub mode: Mode,
    /// Tokens that the model was first trained on.
    pub n_ctx_orig: u32,
    /// The base of the frequencies.
    pub freq_base: f32,
    /// Multiplies the angle.
    pub freq_scale: f32,
    /// Weight of the unscaled angle, YaRN's.
    pub ext_factor: f32,
    /// Multiplies cos and sin.
    pub attn_factor: f32,
    /// Turns over `n_ctx_orig` above which a pair keeps its frequency.
    pub beta_fast: f32,
    /// Turns below which a pair is scaled.
    pub beta_slow: f32,
}

impl Arguments {
    /// A plain rotation: `freq_scale` and `attn_factor` of 1, `ext_factor` and `n_ctx_orig` of 0, and
    /// llama.cpp's betas, 32 and 1.
    pub const fn new(n_dims: usize, mode: Mode, freq_base: f32) -> Self {
        Self {
            n_dims,
            mode,
            n_ctx_orig: 0,
            freq_base,
            freq_scale: 1.0,
            ext_factor: 0.0,
            attn_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
        }
    }

    /// Pairs of each head.
    fn pairs(&self) -> usize {
        match self.mode {
            Mode::Vision => self.n_dims,
            _ => self.n_dims / 2,
        }
    }

    fn check(&self) -> Result<(), InterfaceError> {
        /// More dims than any head has, and half as many as a [`RopeConfig`] takes: vision rotates
        /// twice as many.
        const MOST: usize = 1 << 13;
        let (n_dims, scale) = (self.n_dims, self.freq_scale);
        if n_dims == 0 || n_dims % 2 == 1 || n_dims > MOST {
            let expected = format!("even, from 2 to {MOST}");
            return Err(InterfaceError::value("n_dims", n_dims, expected));
        }
        if !(1e-9..=1e9).contains(&scale) {
            let expected = "from 1e-9 to 1e9 (it multiplies angles: 1 / factor)";
            return Err(InterfaceError::value("freq_scale", scale, expected));
        }
        if !(1e-9..=1e9).contains(&self.attn_factor) {
            let expected = "from 1e-9 to 1e9";
            return Err(InterfaceError::value(
                "attn_factor",
                self.attn_factor,
                expected,
            ));
        }
        if self.ext_factor == 0.0 {
            return Ok(());
        }
        if !(0.0..=1.0).contains(&self.ext_factor) {
            let expected = "from 0 to 1 (llama.cpp's -1 stands for 1 with YaRN and 0 without)";
            return Err(InterfaceError::value(
                "ext_factor",
                self.ext_factor,
                expected,
            ));
        }
        if scale > 1.0 {
            let expected = "at most 1 where ext_factor is not 0: YaRN is for longer sequences";
            return Err(InterfaceError::value("freq_scale", scale, expected));
        }
        if self.mode == Mode::Vision {
            let expected = "0 in the vision mode, whose sections have no ramp in common";
            return Err(InterfaceError::value(
                "ext_factor",
                self.ext_factor,
                expected,
            ));
        }
        self.check_ramp()
    }

    /// Where YaRN's ramp begins and ends, before both are brought into the head.
    ///
    /// ggml's own answer where they are then the wrong way round depends on a division by 0.001.
    fn check_ramp(&self) -> Result<(), InterfaceError> {
        let [fast, slow] = [self.beta_fast, self.beta_slow].map(f64::from);
        if !(fast >= slow && slow > 0.0 && fast.is_finite()) {
            let expected = format!("positive, finite and at least beta_slow, which is {slow}");
            return Err(InterfaceError::value("beta_fast", fast, expected));
        }
        let base = f64::from(self.freq_base);
        let pair_of_turns = |turns: f64| {
            let context = f64::from(self.n_ctx_orig) / (turns * std::f64::consts::TAU);
            self.n_dims as f64 * context.ln() / (2.0 * base.ln())
        };
        let (low, high) = (pair_of_turns(fast).floor(), pair_of_turns(slow).ceil());
        if base > 1.0 && low <= (self.n_dims - 1) as f64 && high >= 0.0 {
            return Ok(());
        }
        Err(InterfaceError::value(
            "n_ctx_orig",
            self.n_ctx_orig,
            "such that YaRN's ramp, from beta_fast turns to beta_slow, begins or ends among the pairs \
             (and freq_base above 1)",
        ))
    }

    /// The rotation that the arguments describe.
    fn config(
        &self,
        sections: Option<[usize; 4]>,
        freq_factors: Option<&[f32]>,
    ) -> Result<RopeConfig, InterfaceError> {
        self.check()?;
        let factor = f64::from(self.freq_scale).recip();
        let scaling = if self.ext_factor == 0.0 {
            Scaling::Linear(LinearScaling { factor })
        } else {
            Scaling::Yarn(YarnScaling {
                beta_fast: self.beta_fast.into(),
                beta_slow: self.beta_slow.into(),
                extrapolation_factor: self.ext_factor.into(),
                ..YarnScaling::new(factor, self.n_ctx_orig.into())
            })
        };
        let magnitude = match self.ext_factor {
            0.0 => f64::from(self.attn_factor),
            _ => DoubleDouble::from(f64::from(self.attn_factor))
                .mul(mscale(factor, 1.0))
                .to_f64(),
        };
        let pairing = match self.mode {
            Mode::Normal => Pairing::Interleaved,
            _ => Pairing::HalfSplit,
        };
        let mut config = RopeConfig::new(self.freq_base.into(), 2 * self.pairs())?
            .with_scaling(scaling)?
            .with_attention_factor(magnitude)?
            .with_pairing(pairing);
        if let Some(factors) = freq_factors {
            let factors = factors_of_pairs(factors, self.pairs())?;
            let divisors = factors.iter().map(|&factor| factor.into()).collect();
            config = config.with_frequency_divisors(divisors)?;
        }
        if let Some(sections) = sections {
            let mode = match self.mode {
                Mode::Imrope => GgmlMrope::Imrope,
                Mode::Vision => GgmlMrope::Vision,
                _ => GgmlMrope::Mrope,
            };
            config = config.with_axes(Axes::Ggml { mode, sections });
        }
        Ok(config)
    }
}

/// As ggml, more of them than pairs may be given.
fn factors_of_pairs(factors: &[f32], pairs: usize) -> Result<&[f32], InterfaceError> {
    if factors.len() < pairs {
        return Err(InterfaceError::shape(
            "c",
            &[factors.len()],
            format!("[{pairs}] or more, a divisor for each pair of dims"),
        ));
    }
    Ok(&factors[..pairs])
}

/// A prepared `ggml_rope_ext` or `ggml_rope_multi`.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::Tensor;
/// use phasor::interfaces::ggml::{Arguments, Mode, Rope};
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// let cpu = Device::host();
/// // Llama: cur = ggml_rope_ext(ctx0, cur, inp_pos, rope_factors, n_rot, GGML_ROPE_TYPE_NORMAL, ...)
/// let rope = Rope::ext(&cpu, None, &Arguments::new(128, Mode::Normal, 500_000.0))?;
/// let inp_pos = [0, 1, 2, 131_071];
/// let mut cur = vec![0.5f32; 4 * 32 * 128]; // ne = {128, 32, 4}
/// rope.call(Tensor::new(&mut cur, &[4, 32, 128]), &inp_pos)?;
///
/// // Qwen2-VL: ggml_rope_multi(ctx0, cur, inp_pos, nullptr, n_rot, sections, GGML_ROPE_TYPE_MROPE, ...)
/// let arguments = Arguments::new(128, Mode::Mrope, 1_000_000.0);
/// let rope = Rope::multi(&cpu, None, [16, 24, 24, 0], &arguments)?;
/// let inp_pos = [0, 1, 1, 1, 0, 1, 1, 2, 0, 1, 2, 1, 0, 0, 0, 0]; // time, height, width and one more
/// rope.call(Tensor::new(&mut cur, &[4, 32, 128]), &inp_pos)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Rope {
    engine: Engine,
    mode: Mode,
    axes: usize,
    n_offs: usize,
}

impl Rope {
    /// `ggml_rope_ext`, for [`Mode::Normal`] and [`Mode::Neox`]. `c` has a divisor for each pair;
    /// infinity stops one.
    ///
    /// # Errors
    /// [`InterfaceError::Value`] for another mode, and for arguments without meaning: `n_dims` must be
    /// even and from 2 to 8,192, `freq_scale` and `attn_factor` from 1e-9 to 1e9, `ext_factor` from 0
    /// to 1, and with one above 0 `freq_scale` at most 1, the betas positive and in order, and the
    /// ramp among the pairs; [`InterfaceError::Shape`] for fewer divisors than pairs;
    /// [`InterfaceError::Config`] for a `freq_base` that is not finite or below 2^-32 and for divisors
    /// that are not positive; [`InterfaceError::Rope`] if the device has no room.
    pub fn ext(
        device: &Device,
        c: Option<&[f32]>,
        arguments: &Arguments,
    ) -> Result<Self, InterfaceError> {
        if !matches!(arguments.mode, Mode::Normal | Mode::Neox) {
            return Err(InterfaceError::value(
                "mode",
                arguments.mode as i32,
                "0 (normal) or 2 (neox); the others take sections, see Rope::multi",
            ));
        }
        Self::new(device, c, None, arguments)
    }

    /// `ggml_rope_multi`, for [`Mode::Mrope`], [`Mode::Imrope`] and [`Mode::Vision`]. Where the
    /// sections hold fewer pairs than there are, they repeat.
    ///
    /// # Errors
    /// Those of [`ext`](Self::ext), [`InterfaceError::Value`] for an `ext_factor` with
    /// [`Mode::Vision`], and [`InterfaceError::Config`] for sections that are all 0 or hold more than
    /// 2^20 pairs.
    pub fn multi(
        device: &Device,
        c: Option<&[f32]>,
        sections: [usize; 4],
        arguments: &Arguments,
    ) -> Result<Self, InterfaceError> {
        check_multi(arguments.mode, sections)?;
        Self::new(device, c, Some(sections), arguments)
    }

    fn new(
        device: &Device,
        c: Option<&[f32]>,
        sections: Option<[usize; 4]>,
        arguments: &Arguments,
    ) -> Result<Self, InterfaceError> {
        let rope = arguments.config(sections, c)?.rope()?;
        Ok(Self {
            engine: Engine::new(device, rope)?,
            mode: arguments.mode,
            axes: if sections.is_some() { 4 } else { 1 },
            n_offs: 0,
        })
    }

    /// `ggml_rope_set_offset`: the dims from `n_offs` on rotate, and those before keep their bits.
    ///
    /// # Errors
    /// [`InterfaceError::Value`] for an odd offset, or any with [`Mode::Vision`].
    pub fn with_offset(mut self, n_offs: usize) -> Result<Self, InterfaceError> {
        if n_offs % 2 == 1 || (self.mode == Mode::Vision && n_offs > 0) {
            let expected = "even, and 0 in the vision mode";
            return Err(InterfaceError::value("n_offs", n_offs, expected));
        }
        self.n_offs = n_offs;
        Ok(self)
    }

    /// Rotates `a` of shape `[tokens, heads, head_dim]` or `[batch, tokens, heads, head_dim]`. `b` has
    /// a position for each token, with several axes first those of all tokens on the first axis; the
    /// sequences of a batch share them. Dims that do not rotate keep their bits.
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for another number of axes or positions, or a head in which the dims
    /// that rotate do not lie (with [`Mode::Vision`], of other than `2 * n_dims`);
    /// [`InterfaceError::Value`] if there is no memory to repeat the positions of several axes for each
    /// sequence of a batch; [`InterfaceError::Length`] if the memory of `a` holds another number of
    /// elements.
    pub fn call<T: DeviceElement>(
        &self,
        a: Tensor<'_, T>,
        b: &[i32],
    ) -> Result<(), InterfaceError> {
        let (batch, tokens, operand) = self.operand(a)?;
        if tokens.checked_mul(self.axes) != Some(b.len()) {
            let expected = match self.axes {
                1 => format!("[{tokens}], one for each token"),
                axes => format!("[{axes} * {tokens}], one for each axis and token"),
            };
            return Err(InterfaceError::shape("b", &[b.len()], expected));
        }
        if self.axes == 1 {
            return self
                .engine
                .rotate(operand, None, Positions::per_token_shared(b));
        }
        if batch == 1 {
            return self.engine.rotate(operand, None, Positions::per_axis(b));
        }
        let ids = repeated(b, tokens, batch)?;
        self.engine.rotate(operand, None, Positions::per_axis(&ids))
    }

    /// `ggml_rope_ext_back` and `ggml_rope_multi_back`: the gradient turns back by the same angles
    /// ([`Direction::Inverse`](crate::Direction::Inverse)).
    ///
    /// # Errors
    /// [`InterfaceError::Rope`] if the device has no room.
    pub fn backward(&self) -> Result<Self, InterfaceError> {
        Ok(Self {
            engine: self.engine.backward()?,
            ..*self
        })
    }

    /// The rotation, for a plan of one's own.
    pub fn rope(&self) -> &crate::Rope {
        self.engine.rope()
    }

    fn operand<'a, T: DeviceElement>(
        &self,
        a: Tensor<'a, T>,
    ) -> Result<(usize, usize, Operand<'a, T>), InterfaceError> {
        let rotary_dim = self.rope().rotary_dim();
        let (batch, tokens, heads, head_dim) = match *a.shape() {
            [tokens, heads, head_dim] => (1, tokens, heads, head_dim),
            [batch, tokens, heads, head_dim] => (batch, tokens, heads, head_dim),
            _ => {
                return Err(InterfaceError::shape(
                    "a",
                    a.shape(),
                    "[tokens, heads, head_dim] or [batch, tokens, heads, head_dim]",
                ));
            }
        };
        let end = self.n_offs.saturating_add(rotary_dim);
        let fits = match self.mode {
            Mode::Vision => head_dim == rotary_dim,
            _ => head_dim >= end,
        };
        if !fits {
            let expected = match self.mode {
                Mode::Vision => format!("{rotary_dim} along the last axis, twice n_dims"),
                _ => format!("at least {end} along the last axis, n_offs + n_dims"),
            };
            return Err(InterfaceError::shape("a", a.shape(), expected));
        }
        let layout = Layout::bshd(batch, tokens, heads, head_dim).with_rotary_offset(self.n_offs);
        Ok((batch, tokens, a.operand("a", layout)?))
    }
}

/// `ggml_rope_ext`: one call. A model that rotates again and again keeps a [`Rope`] instead.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::Tensor;
/// use phasor::interfaces::ggml::{Arguments, Mode, rope_ext, rope_ext_back};
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// let cpu = Device::host();
/// let arguments = Arguments { freq_scale: 0.5, ..Arguments::new(8, Mode::Neox, 10_000.0) };
/// let factors = [1.0, 1.0, 2.0, 8.0];
/// let mut a = [1.0f32; 2 * 8]; // ne = {8, 1, 2}
/// rope_ext(&cpu, Tensor::new(&mut a, &[2, 1, 8]), &[3, 7], Some(&factors), &arguments)?;
/// rope_ext_back(&cpu, Tensor::new(&mut a, &[2, 1, 8]), &[3, 7], Some(&factors), &arguments)?;
/// assert!(a.iter().all(|a| (a - 1.0).abs() < 1e-6));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`Rope::ext`] and [`Rope::call`].
pub fn rope_ext<T: DeviceElement>(
    device: &Device,
    a: Tensor<'_, T>,
    b: &[i32],
    c: Option<&[f32]>,
    arguments: &Arguments,
) -> Result<(), InterfaceError> {
    Rope::ext(device, c, arguments)?.call(a, b)
}

/// `ggml_rope_ext_back`: the gradient of [`rope_ext`].
///
/// # Errors
/// Those of [`Rope::ext`] and [`Rope::call`].
pub fn rope_ext_back<T: DeviceElement>(
    device: &Device,
    a: Tensor<'_, T>,
    b: &[i32],
    c: Option<&[f32]>,
    arguments: &Arguments,
) -> Result<(), InterfaceError> {
    Rope::ext(device, c, arguments)?.backward()?.call(a, b)
}

/// `ggml_rope_multi`: one call.
///
/// # Errors
/// Those of [`Rope::multi`] and [`Rope::call`].
pub fn rope_multi<T: DeviceElement>(
    device: &Device,
    a: Tensor<'_, T>,
    b: &[i32],
    c: Option<&[f32]>,
    sections: [usize; 4],
    arguments: &Arguments,
) -> Result<(), InterfaceError> {
    Rope::multi(device, c, sections, arguments)?.call(a, b)
}

/// `ggml_rope_multi_back`: the gradient of [`rope_multi`].
///
/// # Errors
/// Those of [`Rope::multi`] and [`Rope::call`].
pub fn rope_multi_back<T: DeviceElement>(
    device: &Device,
    a: Tensor<'_, T>,
    b: &[i32],
    c: Option<&[f32]>,
    sections: [usize; 4],
    arguments: &Arguments,
) -> Result<(), InterfaceError> {
    Rope::multi(device, c, sections, arguments)?
        .backward()?
        .call(a, b)
}

fn check_multi(mode: Mode, sections: [usize; 4]) -> Result<(), InterfaceError> {
    if matches!(mode, Mode::Normal | Mode::Neox) {
        return Err(InterfaceError::value(
            "mode",
            mode as i32,
            "8 (mrope), 24 (vision) or 40 (imrope); the others take no sections, see Rope::ext",
        ));
    }
    if sections[..3] == [0; 3] {
        return Err(InterfaceError::value(
            "sections",
            format_args!("{sections:?}"),
            "such that not all of the first three are 0",
        ));
    }
    Ok(())
}

/// `[4, tokens]` as `[4, batch, tokens]`.
fn repeated(b: &[i32], tokens: usize, batch: usize) -> Result<Vec<i32>, InterfaceError> {
    let mut ids = Vec::new();
    let fits = b
        .len()
        .checked_mul(batch)
        .is_some_and(|all| ids.try_reserve_exact(all).is_ok());
    if !fits {
        return Err(InterfaceError::value(
            "a->ne[3]",
            batch,
            "small enough for the positions of all sequences to fit memory",
        ));
    }
    for axis in b.chunks_exact(tokens.max(1)) {
        for _ in 0..batch {
            ids.extend_from_slice(axis);
        }
    }
    Ok(ids)
}
