//! ONNX: the operator `RotaryEmbedding`, of ai.onnx (opset 23 and later) and of com.microsoft.
//!
//! ```text
//! ai.onnx        RotaryEmbedding(X, cos_cache, sin_cache, position_ids?)
//! com.microsoft  RotaryEmbedding(input, position_ids, cos_cache, sin_cache)
//! attributes     interleaved=0, num_heads=0, rotary_embedding_dim=0
//! ```
//!
//! Both are one prepared [`RotaryEmbedding`] here, whose calls differ in what `position_ids` may be;
//! [`rotary_embedding`] and [`com_microsoft::rotary_embedding`] are single calls with the inputs in
//! the operator's order. Caches are used as they are: `cos^2 + sin^2` may be anything. X is
//! `[batch, heads, sequence, head_size]`, or `[batch, sequence, hidden]` with `num_heads`.
//!
//! Results are rounded once; the operator's definition rounds every operation (ONNX Runtime's f16
//! rounds once, too).

use super::tensor::{Engine, check_in_table, from_starts, pairing, starts_of_rows, table};
use super::{Array, InterfaceError, Tensor};
use crate::{Device, DeviceElement, Element, Layout, Positions};

/// The operator's attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// Whether dims `(2i, 2i + 1)` form a pair, or `(i, i + rotary_embedding_dim / 2)`.
    pub interleaved: bool,
    /// Heads of a 3-D X; 0 if X is 4-D, which says so itself.
    pub num_heads: usize,
    /// Dims that rotate in each head, its first ones; 0 for all.
    pub rotary_embedding_dim: usize,
}

/// The operator of ai.onnx with its caches, ready on a [`Device`].
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::{Array, Tensor};
/// use phasor::interfaces::onnx::{Attributes, RotaryEmbedding};
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// let (cos, sin) = (vec![0.6f32; 50 * 4], vec![0.8f32; 50 * 4]); // [max_position, head_size / 2]
/// let (cos, sin) = (Array::new(&cos, &[50, 4]), Array::new(&sin, &[50, 4]));
/// let attributes = Attributes { num_heads: 2, ..Attributes::default() };
/// let node = RotaryEmbedding::new(&Device::host(), cos, sin, attributes)?;
///
/// let mut x = vec![1.0f32; 2 * 3 * 16]; // [batch, sequence, hidden]
/// let position_ids = Array::new(&[0, 1, 2, 7, 8, 9], &[2, 3]); // [batch, sequence]
/// node.call(Tensor::new(&mut x, &[2, 3, 16]), Some(position_ids))?;
/// assert!((x[0] - -0.2).abs() < 1e-6); // 1 * 0.6 - 1 * 0.8
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    engine: Engine,
    attributes: Attributes,
    cache: Cache,
    passes_through: bool,
}

/// The leading axes of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    /// `[max_position, pairs]`
    Positions(usize),
    /// `[batch, sequence, pairs]`
    Tokens(usize, usize),
}

impl RotaryEmbedding {
    /// Caches of f32, f16 or bf16: `[max_position, pairs]`, to be looked up with `position_ids`, or
    /// `[batch, sequence, pairs]`, an angle for each token of X, where `pairs` is half of
    /// `rotary_embedding_dim` or of the head.
    ///
    /// # Errors
    /// [`InterfaceError::Shape`] for caches of other ranks or of unequal shapes, or not of
    /// `rotary_embedding_dim / 2` columns; [`InterfaceError::Value`] for caches without columns, or
    /// more than 32,768; [`InterfaceError::Length`] if a cache's memory holds another number of
    /// elements; [`InterfaceError::Rope`] if the device has no room.
    pub fn new<C: Element>(
        device: &Device,
        cos_cache: Array<'_, C>,
        sin_cache: Array<'_, C>,
        attributes: Attributes,
    ) -> Result<Self, InterfaceError> {
        let refused = |expected: String| {
            let shape = cos_cache.shape();
            Err(InterfaceError::shape("cos_cache", shape, expected))
        };
        let (cache, pairs) = match *cos_cache.shape() {
            [rows, pairs] => (Cache::Positions(rows), pairs),
            [batch, sequence, pairs] => (Cache::Tokens(batch, sequence), pairs),
            _ => return refused("[max_position, pairs] or [batch, sequence, pairs]".into()),
        };
        if sin_cache.shape() != cos_cache.shape() {
            return Err(InterfaceError::shape(
                "sin_cache",
                sin_cache.shape(),
                format!("{:?}, as that of cos_cache", cos_cache.shape()),
            ));
        }
        let rotary_dim = attributes.rotary_embedding_dim;
        if rotary_dim != 0 && pairs.checked_mul(2) != Some(rotary_dim) {
            return refused(format!(
                "half as wide as rotary_embedding_dim, which is {rotary_dim} and must be even"
            ));
        }
        let cos = cos_cache.checked("cos_cache")?;
        let sin = sin_cache.checked("sin_cache")?;
        let rope = crate::Rope::new(table(cos, sin, pairs)?, pairing(attributes.interleaved));
        Ok(Self {
            engine: Engine::new(device, rope)?,
            attributes,
            cache,
            passes_through: false,
        })
    }

    /// Leaves tokens whose positions are outside the caches unrotated, as the CUDA kernels of ONNX
    /// Runtime do. Its CPU kernels refuse such a call, and so does this type unless told otherwise.
    pub fn pass_through_out_of_range(mut self) -> Self {
        self.passes_through = true;
        self
    }

    /// Rotates X, `[batch, heads, sequence, head_size]` or, with `num_heads`,
    /// `[batch, sequence, hidden]`. `position_ids` are `[batch, sequence]`, given for caches of
    /// `[max_position, pairs]` and left out for the others.
    ///
    /// # Errors
    /// [`InterfaceError::Presence`] for `position_ids` missing or not wanted, or `num_heads` missing
    /// for a 3-D X; [`InterfaceError::Shape`] for shapes that do not fit each other;
    /// [`InterfaceError::OutOfTable`] for a position outside the caches;
    /// [`InterfaceError::Length`] if the memory of X holds another number of elements.
    pub fn call<T: DeviceElement>(
        &self,
        x: Tensor<'_, T>,
        position_ids: Option<Array<'_, i64>>,
    ) -> Result<(), InterfaceError> {
        let heads = self.attributes.num_heads;
        if x.shape().len() == 3 && heads == 0 {
            return Err(InterfaceError::Presence {
                argument: "num_heads",
                problem: "is needed for a 3-D X: set it, or give X as [batch, heads, sequence, \
                          head_size]",
            });
        }
        let layout = self.layout("X", x.shape(), heads)?;
        match (self.cache, position_ids) {
            (Cache::Positions(rows), Some(ids)) => self.rotate_at("X", x, layout, ids, rows),
            (Cache::Tokens(batch, sequence), None) => {
                let [x_batch, x_sequence, ..] = layout.shape();
                if (x_batch, x_sequence) != (batch, sequence) {
                    return Err(InterfaceError::shape(
                        "X",
                        x.shape(),
                        format!("of batch {batch} and sequence {sequence}, as the caches"),
                    ));
                }
                let starts = starts_of_rows(batch, sequence);
                let operand = x.operand("X", layout)?;
                self.engine.rotate(operand, None, from_starts(&starts))
            }
            (Cache::Positions(_), None) => Err(InterfaceError::Presence {
                argument: "position_ids",
                problem: "are needed for caches of [max_position, pairs]: give them, or caches of \
                          [batch, sequence, pairs]",
            }),
            (Cache::Tokens(..), Some(_)) => Err(InterfaceError::Presence {
                argument: "position_ids",
                problem: "do not go with caches of [batch, sequence, pairs]: leave them out, or \
                          give caches of [max_position, pairs]",
            }),
        }
    }

    /// The gradient with respect to X: turns back by the same angles
    /// ([`Direction::Inverse`](crate::Direction::Inverse)). It is the transposed map, also where
    /// `cos^2 + sin^2` is not 1.
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

    fn layout(
        &self,
        argument: &'static str,
        shape: &[usize],
        num_heads: usize,
    ) -> Result<Layout, InterfaceError> {
        let layout = match *shape {
            [batch, heads, sequence, head_size] => Layout::bhsd(batch, sequence, heads, head_size),
            [batch, sequence, hidden] if num_heads > 0 && hidden % num_heads == 0 => {
                Layout::bshd(batch, sequence, num_heads, hidden / num_heads)
            }
            [..] => {
                let expected = format!(
                    "[batch, heads, sequence, head_size], or [batch, sequence, hidden] with hidden \
                     a multiple of num_heads, which is {num_heads}"
                );
                return Err(InterfaceError::shape(argument, shape, expected));
            }
        };
        let [.., head_size] = layout.shape();
        let rotary_dim = self.rope().rotary_dim();
        let whole = self.attributes.rotary_embedding_dim == 0;
        if head_size < rotary_dim || (whole && head_size != rotary_dim) {
            return Err(InterfaceError::shape(
                argument,
                shape,
                format!(
                    "of heads of {}{rotary_dim} dims, twice the width of the caches",
                    if whole { "" } else { "at least " }
                ),
            ));
        }
        Ok(layout)
    }

    fn rotate_at<T: DeviceElement>(
        &self,
        argument: &'static str,
        x: Tensor<'_, T>,
        layout: Layout,
        position_ids: Array<'_, i64>,
        rows: usize,
    ) -> Result<(), InterfaceError> {
        let [batch, sequence, ..] = layout.shape();
        if *position_ids.shape() != [batch, sequence] {
            return Err(InterfaceError::shape(
                "position_ids",
                position_ids.shape(),
                format!("[{batch}, {sequence}], the batch and sequence of {argument}"),
            ));
        }
        let ids = position_ids.checked("position_ids")?;
        if !self.passes_through {
            check_in_table("position_ids", ids, rows)?;
        }
        let positions = Positions::per_token(ids);
        self.engine
            .rotate(x.operand(argument, layout)?, None, positions)
    }
}

/// One call of ai.onnx's operator, its inputs in the operator's order. A model that rotates again
/// and again keeps a [`RotaryEmbedding`] instead.
///
/// ```
/// use phasor::Device;
/// use phasor::interfaces::{Array, Tensor};
/// use phasor::interfaces::onnx::{Attributes, rotary_embedding};
///
/// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
/// // RotaryEmbedding(X, cos_cache, sin_cache), interleaved=1
/// let mut x = vec![1.0f32; 2 * 3 * 8]; // [batch 1, heads 2, sequence 3, head_size 8]
/// let (cos, sin) = (vec![0.6f32; 3 * 4], vec![0.8f32; 3 * 4]); // [batch, sequence, head_size / 2]
/// rotary_embedding(
///     &Device::host(),
///     Tensor::new(&mut x, &[1, 2, 3, 8]),
///     Array::new(&cos, &[1, 3, 4]),
///     Array::new(&sin, &[1, 3, 4]),
///     None,
///     Attributes { interleaved: true, ..Attributes::default() },
/// )?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`RotaryEmbedding::new`] and [`RotaryEmbedding::call`].
pub fn rotary_embedding<T: DeviceElement, C: Element>(
    device: &Device,
    x: Tensor<'_, T>,
    cos_cache: Array<'_, C>,
    sin_cache: Array<'_, C>,
    position_ids: Option<Array<'_, i64>>,
    attributes: Attributes,
) -> Result<(), InterfaceError> {
    RotaryEmbedding::new(device, cos_cache, sin_cache, attributes)?.call(x, position_ids)
}

/// The operator of the domain com.microsoft, which ONNX Runtime brings.
pub mod com_microsoft {
    use super::Attributes;
    use crate::interfaces::tensor::check_run_in_table;
    use crate::interfaces::{Array, InterfaceError, Tensor};
    use crate::{Device, DeviceElement, Element, Positions};

    /// The operator with its caches, ready on a [`Device`].
    #[derive(Clone, Debug)]
    pub struct RotaryEmbedding {
        node: super::RotaryEmbedding,
        max_position: usize,
    }

    impl RotaryEmbedding {
        /// Caches of f32, f16 or bf16, `[max_position, pairs]`, where `pairs` is half of
        /// `rotary_embedding_dim` or of the head. The attributes `scale` and `is_packed_batching`
        /// are not taken.
        ///
        /// # Errors
        /// [`InterfaceError::Presence`] for `rotary_embedding_dim` without `num_heads`; those of
        /// ai.onnx's [`RotaryEmbedding::new`](super::RotaryEmbedding::new).
        pub fn new<C: Element>(
            device: &Device,
            cos_cache: Array<'_, C>,
            sin_cache: Array<'_, C>,
            attributes: Attributes,
        ) -> Result<Self, InterfaceError> {
            if attributes.rotary_embedding_dim != 0 && attributes.num_heads == 0 {
                return Err(InterfaceError::Presence {
                    argument: "num_heads",
                    problem: "is needed where rotary_embedding_dim is given",
                });
            }
            let &[max_position, _] = cos_cache.shape() else {
                return Err(InterfaceError::shape(
                    "cos_cache",
                    cos_cache.shape(),
                    "[max_position, pairs]",
                ));
            };
            Ok(Self {
                node: super::RotaryEmbedding::new(device, cos_cache, sin_cache, attributes)?,
                max_position,
            })
        }

        /// See [`pass_through_out_of_range`](super::RotaryEmbedding::pass_through_out_of_range) of
        /// ai.onnx's operator.
        pub fn pass_through_out_of_range(self) -> Self {
            Self {
                node: self.node.pass_through_out_of_range(),
                ..self
            }
        }

        /// Rotates the input, `[batch, heads, sequence, head_size]` or `[batch, sequence, hidden]`
        /// (without `num_heads`, its heads are as wide as the caches say). `position_ids` are
        /// `[batch, sequence]`, or `[1]` or `[]`: the position of the first token of every sequence.
        ///
        /// # Errors
        /// Those of ai.onnx's [`RotaryEmbedding::call`](super::RotaryEmbedding::call).
        pub fn call<T: DeviceElement>(
            &self,
            input: Tensor<'_, T>,
            position_ids: Array<'_, i64>,
        ) -> Result<(), InterfaceError> {
            let (node, rows) = (&self.node, self.max_position);
            let heads = match (node.attributes.num_heads, input.shape()) {
                (0, &[_, _, hidden]) => hidden / node.rope().rotary_dim(),
                (heads, _) => heads,
            };
            let layout = node.layout("input", input.shape(), heads)?;
            if !matches!(position_ids.shape(), [] | [1]) {
                return node.rotate_at("input", input, layout, position_ids, rows);
            }
            let &[start] = position_ids.checked("position_ids")? else {
                return Ok(());
            };
            if !node.passes_through {
                let [_, sequence, ..] = layout.shape();
                check_run_in_table("position_ids", start, sequence, rows)?;
            }
            let positions = Positions::start(start);
            node.engine
                .rotate(input.operand("input", layout)?, None, positions)
        }

        /// The gradient with respect to the input; see
        /// [`backward`](super::RotaryEmbedding::backward) of ai.onnx's operator.
        ///
        /// # Errors
        /// [`InterfaceError::Rope`] if the device has no room.
        pub fn backward(&self) -> Result<Self, InterfaceError> {
            Ok(Self {
                node: self.node.backward()?,
                ..*self
            })
        }

        /// The rotation, for a plan of one's own.
        pub fn rope(&self) -> &crate::Rope {
            self.node.rope()
        }
    }

    /// One call, its inputs in the operator's order. A model that rotates again and again keeps a
    /// [`RotaryEmbedding`] instead.
    ///
    /// ```
    /// use phasor::Device;
    /// use phasor::interfaces::{Array, Tensor};
    /// use phasor::interfaces::onnx::{Attributes, com_microsoft};
    ///
    /// # fn main() -> Result<(), phasor::interfaces::InterfaceError> {
    /// // com.microsoft.RotaryEmbedding(input, position_ids, cos_cache, sin_cache)
    /// let mut input = vec![1.0f32; 3 * 16]; // [batch, sequence, hidden]: two heads
    /// let (cos, sin) = (vec![0.6f32; 50 * 4], vec![0.8f32; 50 * 4]);
    /// com_microsoft::rotary_embedding(
    ///     &Device::host(),
    ///     Tensor::new(&mut input, &[1, 3, 16]),
    ///     Array::new(&[17], &[1]), // tokens 17, 18, 19
    ///     Array::new(&cos, &[50, 4]),
    ///     Array::new(&sin, &[50, 4]),
    ///     Attributes::default(),
    /// )?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`RotaryEmbedding::new`] and [`RotaryEmbedding::call`].
    pub fn rotary_embedding<T: DeviceElement, C: Element>(
        device: &Device,
        input: Tensor<'_, T>,
        position_ids: Array<'_, i64>,
        cos_cache: Array<'_, C>,
        sin_cache: Array<'_, C>,
        attributes: Attributes,
    ) -> Result<(), InterfaceError> {
        RotaryEmbedding::new(device, cos_cache, sin_cache, attributes)?.call(input, position_ids)
    }
}
