#[cfg(doc)]
use crate::Error;
use crate::append::Known;
use crate::number::by_dtype;
use crate::plans::{Plans, Rotation, Work};
use crate::positions::Asked;
use crate::storages::{Held, OF_POSITIONS, Request, Slot};
use crate::view::{DimOrder, Rank, View};
use crate::{Positions, Result, host};
use candle_core::op::BackpropOp;
use candle_core::quantized::gguf_file;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Storage, Tensor};
use phasor::config::{ModelConfig, RopeConfig};
use phasor::{Dtype, Host, HostRotator, Rope};
use std::borrow::Cow;
use std::io::{Read, Seek};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A rotation of candle's tensors. Make one for each kind of layer of a model, and clone it for its layers:
/// clones are cheap, and share plans and what is on a GPU.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use phasor::{Frequencies, Pairing, Rope};
/// use phasor_candle::RotaryEmbedding;
///
/// # fn main() -> Result<(), phasor_candle::Error> {
/// let rope = Rope::new(Frequencies::from_theta(500_000.0, 128)?, Pairing::HalfSplit);
/// let rotary = RotaryEmbedding::new(&rope);
/// let q = Tensor::ones((1, 32, 5, 128), DType::BF16, &Device::Cpu)?; // [batch, heads, tokens, head_dim]
/// let rotated = rotary.apply(&q, 131_072)?; // tokens at 131,072 to 131,076
/// # assert_eq!(rotated.dims(), q.dims());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    pub(crate) shared: Arc<Shared>,
    pub(crate) order: DimOrder,
    pub(crate) rotary_offset: usize,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) rope: Rope,
    pub(crate) host: HostRotator,
    on: Host,
    plans: Plans<(Dtype, Work)>,
    pub(crate) appends: Plans<Known>,
    /// Whether a token was not stored on the CPU, and nobody was told yet.
    pub(crate) missed: AtomicBool,
    backward: OnceLock<Arc<Shared>>,
    #[cfg(feature = "cuda")]
    pub(crate) cuda: crate::cuda::Rotators,
}

impl Shared {
    fn new(rope: &Rope, on: Host) -> Arc<Self> {
        Arc::new(Self {
            rope: rope.clone(),
            host: on.rotator(rope),
            on,
            plans: Plans::default(),
            appends: Plans::default(),
            missed: AtomicBool::new(false),
            backward: OnceLock::new(),
            #[cfg(feature = "cuda")]
            cuda: crate::cuda::Rotators::default(),
        })
    }

    pub(crate) fn plan(&self, dtype: Dtype, work: &Work) -> Result<Rotation> {
        Ok(self.plans.of(&self.rope, dtype, work)?)
    }
}

impl From<&Rope> for RotaryEmbedding {
    fn from(rope: &Rope) -> Self {
        Self::new(rope)
    }
}

impl RotaryEmbedding {
    /// A rotation that was made with phasor.
    pub fn new(rope: &Rope) -> Self {
        Self {
            shared: Shared::new(rope, Host::new()),
            order: DimOrder::default(),
            rotary_offset: 0,
        }
    }

    /// The rotation of a model whose layers all rotate alike, from the text of its `config.json`.
    ///
    /// ```
    /// # fn main() -> Result<(), phasor_candle::Error> {
    /// let rotary = phasor_candle::RotaryEmbedding::from_hf_config(
    ///     r#"{"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
    ///         "rope_theta": 500000.0}"#,
    /// )?;
    /// assert_eq!(rotary.rope().rotary_dim(), 128);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`ModelConfig::from_hf_config`] and [`from_config`](Self::from_config);
    /// [`ConfigError::SeveralKinds`](phasor::config::ConfigError::SeveralKinds) where layers differ:
    /// then use [`from_config`](Self::from_config) with each of [`ModelConfig::rope_of_layer`].
    pub fn from_hf_config(text: &str) -> Result<Self> {
        Self::from_config(ModelConfig::from_hf_config(text)?.rope()?)
    }

    /// The rotation of a model whose layers all rotate alike, from a GGUF file. `reader` is the file: a
    /// model may store factors of its frequencies in a tensor.
    ///
    /// # Errors
    /// Those of [`gguf_config`](crate::gguf_config) and [`from_config`](Self::from_config);
    /// [`ConfigError::SeveralKinds`](phasor::config::ConfigError::SeveralKinds) where layers differ:
    /// then use [`from_config`](Self::from_config) with each of [`ModelConfig::rope_of_layer`].
    pub fn from_gguf<R: Read + Seek>(content: &gguf_file::Content, reader: &mut R) -> Result<Self> {
        Self::from_config(crate::gguf_config(content, reader)?.rope()?)
    }

    /// The rotation of one kind of layer. Where the dims that rotate are not the first of a head, they are
    /// found there.
    ///
    /// # Errors
    /// Those of [`RopeConfig::rope`].
    pub fn from_config(config: &RopeConfig) -> Result<Self> {
        let offset = config.rotary_offset();
        let rope = config.clone().with_layout_offset(offset).rope()?;
        Ok(Self::new(&rope).with_rotary_offset(offset))
    }

    /// The same rotation of tensors in another order of dims.
    pub fn with_dim_order(mut self, order: DimOrder) -> Self {
        self.order = order;
        self
    }

    /// The same rotation of the dims from `rotary_offset` on of each head: `head_dim - rotary_dim` for
    /// the last ones.
    pub fn with_rotary_offset(mut self, rotary_offset: usize) -> Self {
        self.rotary_offset = rotary_offset;
        self
    }

    /// The same rotation, with the threads and instructions that `host` names for tensors on the CPU.
    pub fn with_host(mut self, host: Host) -> Self {
        self.shared = Shared::new(&self.shared.rope, host);
        self
    }

    /// The rotation.
    pub fn rope(&self) -> &Rope {
        &self.shared.rope
    }

    /// The order of dims.
    pub fn dim_order(&self) -> DimOrder {
        self.order
    }

    /// The first dim of a head that rotates.
    pub fn rotary_offset(&self) -> usize {
        self.rotary_offset
    }

    /// The row of frequencies for a sequence of `length` tokens, those in its cache included, for
    /// [`Positions::frequency_row`]; `None` where a call gives none.
    ///
    /// # Errors
    /// Those of [`Rope::row_for_length`].
    pub fn row_for_length(&self, length: usize) -> Result<Option<u32>> {
        Ok(self.shared.rope.row_for_length(length as u64)?)
    }

    /// The rotation that takes gradients back: by the negative angles.
    pub fn backward(&self) -> Self {
        let shared = self.shared.backward.get_or_init(|| {
            let rope = self.shared.rope.backward();
            Shared::new(&rope, self.shared.on)
        });
        Self {
            shared: shared.clone(),
            ..*self
        }
    }

    /// Loads kernels and angles on a device now, instead of at the first call there: needed before a CUDA
    /// graph is captured. Nothing is to be loaded for the CPU.
    ///
    /// # Errors
    /// [`Error::Phasor`] if the device takes none of phasor's kernels.
    pub fn load(&self, device: &Device, dtype: candle_core::DType) -> Result<()> {
        let tensor = Tensor::zeros(0, dtype, device)?;
        let dtype = crate::view::dtype_of("a tensor of this type", &tensor)?;
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => self.shared.cuda.load(&self.shared.rope, device, dtype),
            _ => {
                let _ = dtype;
                Ok(())
            }
        }
    }

    /// Rotates `x`, of any strides, to a new contiguous tensor of the same shape: `[batch, heads, tokens,
    /// head_dim]`, or as [`with_dim_order`](Self::with_dim_order) says. Dims that do not rotate are
    /// copied. Gradients flow back through it.
    ///
    /// # Errors
    /// [`Error`]: each names what to change.
    pub fn apply<'p>(&self, x: &Tensor, positions: impl Into<Positions<'p>>) -> Result<Tensor> {
        self.out_of_place(x, Rank::Batched, positions.into())
    }

    /// Rotates `x` of shape `[tokens, heads, head_dim]`: one sequence, or with
    /// [`Positions::cu_seqlens`] several one after the other. Otherwise as [`apply`](Self::apply).
    ///
    /// # Errors
    /// [`Error`]: each names what to change.
    pub fn apply_packed<'p>(
        &self,
        x: &Tensor,
        positions: impl Into<Positions<'p>>,
    ) -> Result<Tensor> {
        self.out_of_place(x, Rank::Packed, positions.into())
    }

    fn out_of_place(&self, x: &Tensor, rank: Rank, mut positions: Positions<'_>) -> Result<Tensor> {
        let contiguous_heads = x.stride().last() == Some(&1) || x.dims().last() <= Some(&1);
        let x = match contiguous_heads {
            true => Cow::Borrowed(x),
            false => Cow::Owned(x.contiguous()?),
        };
        let view = self.view("the tensor", &x, rank)?;
        positions.place_on(x.device())?;
        let rotated = self.rotated(&view, &positions)?;
        if x.track_op() {
            let op = Rotated {
                storage: Mutex::new(Some(rotated)),
                rotary: self.clone(),
                rank,
                positions: positions.into_owned(),
            };
            return Ok(x.apply_op1(op)?);
        }
        let shape = x.shape().clone();
        Ok(Tensor::from_storage(
            rotated,
            shape,
            BackpropOp::none(),
            false,
        ))
    }

    /// A new storage with `view` rotated.
    fn rotated(&self, view: &View<'_>, positions: &Positions<'_>) -> Result<Storage> {
        let plan = self.shared.plan(view.dtype, &view.anew(self.order))?;
        let len = view.tensor.elem_count();
        let mut request = Request::<{ 1 + OF_POSITIONS }>::new();
        let source = request.read(view.tensor);
        let mut asked = positions.request(&mut request);
        asked.fit(view.counts())?;
        request.run(|held| {
            #[cfg(feature = "cuda")]
            if let Some(Storage::Cuda(storage)) = held.read(source) {
                let call = crate::cuda::Call::new(&self.shared, &plan, storage, &asked, &held)?;
                return by_dtype!(view.dtype, T => call.rotated::<T>(storage, view.start, len));
            }
            let given = asked.on_host(&held);
            let storage = by_dtype!(view.dtype, T => {
                let source = host::read::<T>(held.read(source), view.start)?;
                host::rotated(&self.shared.host, &plan, source, len, given)?
            });
            Ok(Storage::Cpu(storage))
        })
    }

    /// Rotates `x` where it is. Dims that do not rotate are not touched.
    ///
    /// # Errors
    /// [`Error`]: each names what to change. Nothing is written then.
    pub fn apply_inplace<'p>(&self, x: &Tensor, positions: impl Into<Positions<'p>>) -> Result<()> {
        let x = self.view("the tensor", x, Rank::Either)?;
        x.check_untracked()?;
        self.in_place(x, None, positions.into())
    }

    /// Rotates queries and keys where they are, at once: one launch on a GPU, one pass on the CPU. They
    /// may be tensors of their own or windows of one, such as heads of packed qkv, and have four dims or
    /// are both `[tokens, heads, head_dim]`.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use phasor_candle::{DimOrder, RotaryEmbedding};
    ///
    /// # fn main() -> Result<(), phasor_candle::Error> {
    /// # let rope = phasor::Rope::new(
    /// #     phasor::Frequencies::from_theta(1e4, 64)?, phasor::Pairing::HalfSplit);
    /// let rotary = RotaryEmbedding::new(&rope).with_dim_order(DimOrder::Bthd);
    /// // What a projection made: 8 query, 2 key and 2 value heads of each token.
    /// let qkv = Tensor::ones((1, 7, 12 * 64), DType::F32, &Device::Cpu)?;
    /// let heads = qkv.reshape((1, 7, 12, 64))?;
    /// let (q, k) = (heads.narrow(2, 0, 8)?, heads.narrow(2, 8, 2)?);
    /// rotary.apply_qk_inplace(&q, &k, 40)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error`]: each names what to change. Nothing is written then.
    pub fn apply_qk_inplace<'p>(
        &self,
        q: &Tensor,
        k: &Tensor,
        positions: impl Into<Positions<'p>>,
    ) -> Result<()> {
        let q = self.view("q", q, Rank::Either)?;
        q.check_untracked()?;
        let k = self.view("k", k, Rank::Either)?;
        k.check_untracked()?;
        k.check_beside(&q)?;
        self.in_place(q, Some(k), positions.into())
    }

    fn in_place(
        &self,
        q: View<'_>,
        k: Option<View<'_>>,
        mut positions: Positions<'_>,
    ) -> Result<()> {
        positions.place_on(q.tensor.device())?;
        let mut request = Request::<{ 2 + OF_POSITIONS }>::new();
        let slot = request.write(q.tensor);
        let k = k.map(|k| (k, request.write(k.tensor)));
        let mut asked = positions.request(&mut request);
        asked.fit(q.counts())?;
        match k {
            None => {
                let work = Work::InPlace(q.layout);
                self.rotate_in_place(&request, work, &[(q, slot)], &asked)
            }
            Some((k, other)) if slot != other => {
                let work = Work::Both {
                    q: q.layout,
                    k: k.layout,
                    one_buffer: false,
                };
                self.rotate_in_place(&request, work, &[(q, slot), (k, other)], &asked)
            }
            Some((k, _)) => {
                let base = q.start.min(k.start);
                let work = Work::Both {
                    q: q.from(base),
                    k: k.from(base),
                    one_buffer: true,
                };
                self.rotate_windows(&request, work, (q, slot, base), &asked)
            }
        }
    }

    /// Rotates one tensor or two, each in a storage of its own.
    fn rotate_in_place(
        &self,
        request: &Request<'_, { 2 + OF_POSITIONS }>,
        work: Work,
        tensors: &[(View<'_>, Slot)],
        asked: &Asked<'_>,
    ) -> Result<()> {
        let plan = self.shared.plan(tensors[0].0.dtype, &work)?;
        if plan.is_empty() {
            return Ok(());
        }
        let (q, slot) = tensors[0];
        let k = tensors.get(1);
        request.run(|mut held: Held<'_, { 2 + OF_POSITIONS }>| {
            #[cfg(feature = "cuda")]
            if q.tensor.device().is_cuda() {
                let k = k.map(|(k, slot)| (held.take(*slot), k.start));
                let q = (held.take(slot), q.start);
                return by_dtype!(plan.dtype(), T => {
                    crate::cuda::rotate::<T, _>(&self.shared, &plan, q, k, asked, &held)
                });
            }
            let given = asked.on_host(&held);
            by_dtype!(plan.dtype(), T => {
                let k = match k {
                    Some((k, slot)) => Some(host::written::<T>(held.take(*slot), k.start)?),
                    None => None,
                };
                let q = host::written::<T>(held.take(slot), q.start)?;
                host::rotate(&self.shared.host, &plan, q, k, given)
            })
        })
    }

    /// Performs a plan over one storage, which begins at `base`.
    fn rotate_windows(
        &self,
        request: &Request<'_, { 2 + OF_POSITIONS }>,
        work: Work,
        (view, slot, base): (View<'_>, Slot, usize),
        asked: &Asked<'_>,
    ) -> Result<()> {
        let plan = self.shared.plan(view.dtype, &work)?;
        if plan.is_empty() {
            return Ok(());
        }
        request.run(|mut held: Held<'_, { 2 + OF_POSITIONS }>| {
            #[cfg(feature = "cuda")]
            if view.tensor.device().is_cuda() {
                let buffer = (held.take(slot), base);
                return by_dtype!(view.dtype, T => {
                    crate::cuda::rotate_windows::<T, _>(&self.shared, &plan, buffer, asked, &held)
                });
            }
            let given = asked.on_host(&held);
            by_dtype!(view.dtype, T => {
                let buffer = host::written::<T>(held.take(slot), base)?;
                self.shared.host.rotate_one_buffer(&plan, buffer, given)?;
                Ok(())
            })
        })
    }

    /// Rotates `x` to `destination`, a tensor of the same shape and any strides, such as the next tokens of
    /// a cache: `cache.narrow(2, length, tokens)?`. The two may be windows of one tensor that have no
    /// element in common.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    ///
    /// # fn main() -> Result<(), phasor_candle::Error> {
    /// # let rope = phasor::Rope::new(
    /// #     phasor::Frequencies::from_theta(1e4, 64)?, phasor::Pairing::HalfSplit);
    /// # let rotary = phasor_candle::RotaryEmbedding::new(&rope);
    /// let cache = Tensor::zeros((1, 2, 512, 64), DType::F32, &Device::Cpu)?;
    /// let k = Tensor::ones((1, 2, 7, 64), DType::F32, &Device::Cpu)?;
    /// rotary.apply_into(&k, &cache.narrow(2, 100, 7)?, 100)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error`]: each names what to change. Nothing is written then.
    pub fn apply_into<'p>(
        &self,
        x: &Tensor,
        destination: &Tensor,
        positions: impl Into<Positions<'p>>,
    ) -> Result<()> {
        let source = self.view("the tensor", x, Rank::Either)?;
        source.check_untracked()?;
        let destination = self.view("the destination", destination, Rank::Either)?;
        destination.check_untracked()?;
        destination.check_beside(&source)?;
        let mut positions = positions.into();
        positions.place_on(x.device())?;
        let mut request = Request::<{ 2 + OF_POSITIONS }>::new();
        let (to, from) = (
            request.write(destination.tensor),
            request.read(source.tensor),
        );
        let mut asked = positions.request(&mut request);
        asked.fit(source.counts())?;
        if to == from {
            let base = source.start.min(destination.start);
            let work = Work::Into {
                from: source.from(base),
                to: destination.from(base),
                one_buffer: true,
            };
            return self.rotate_windows(&request, work, (destination, to, base), &asked);
        }
        let work = Work::Into {
            from: source.layout,
            to: destination.layout,
            one_buffer: false,
        };
        let plan = self.shared.plan(source.dtype, &work)?;
        if plan.is_empty() {
            return Ok(());
        }
        request.run(|mut held: Held<'_, { 2 + OF_POSITIONS }>| {
            #[cfg(feature = "cuda")]
            if let Some(Storage::Cuda(storage)) = held.read(from) {
                let to = (held.take(to), destination.start);
                let call = crate::cuda::Call::new(&self.shared, &plan, storage, &asked, &held)?;
                return by_dtype!(source.dtype, T => {
                    call.rotate_into::<T>(storage, source.start, to)
                });
            }
            let given = asked.on_host(&held);
            by_dtype!(source.dtype, T => {
                let to = host::written::<T>(held.take(to), destination.start)?;
                let from = host::read::<T>(held.read(from), source.start)?;
                host::rotate_into(&self.shared.host, &plan, from, to, given)
            })
        })
    }

    #[inline(always)]
    pub(crate) fn view<'t>(
        &self,
        name: &'static str,
        tensor: &'t Tensor,
        rank: Rank,
    ) -> Result<View<'t>> {
        View::new(name, tensor, self.order, rank, self.rotary_offset)
    }
}

/// A rotation that was performed, as an op of candle's graph.
struct Rotated {
    storage: Mutex<Option<Storage>>,
    rotary: RotaryEmbedding,
    rank: Rank,
    positions: Positions<'static>,
}

impl Rotated {
    fn storage(&self) -> candle_core::Result<Storage> {
        let mut storage = self.storage.lock().unwrap_or_else(PoisonError::into_inner);
        let again = "a rotation of a graph is performed once";
        storage.take().ok_or_else(|| candle_core::Error::msg(again))
    }
}

impl CustomOp1 for Rotated {
    fn name(&self) -> &'static str {
        "rotary-embedding"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.storage()? {
            Storage::Cpu(storage) => Ok((storage, layout.shape().clone())),
            _ => Err(candle_core::Error::msg("rotated on another device")),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        match self.storage()? {
            Storage::Cuda(storage) => Ok((storage, layout.shape().clone())),
            _ => Err(candle_core::Error::msg("rotated on another device")),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let positions = self.positions.clone();
        let backward = self.rotary.backward();
        Ok(Some(backward.out_of_place(grad, self.rank, positions)?))
    }
}
