//! q and k, from a file to a device and back.

use phasor::half::{bf16, f16};
use phasor::{Device, DeviceElement, InOut, Layout, Positions, Problem, Rope};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as FileDtype, SafeTensors};

use super::{Failure, Result, fail};

/// An element type that files hold too. Their bytes are not aligned, so they are read one by one.
pub trait Stored: DeviceElement {
    const IN_FILE: FileDtype;
    fn from_le(bytes: &[u8]) -> Self;
    fn append_le(self, bytes: &mut Vec<u8>);
}

macro_rules! stored {
    ($($type:ty = $in_file:expr),*) => {$(
        impl Stored for $type {
            const IN_FILE: FileDtype = $in_file;
            fn from_le(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("one element"))
            }
            fn append_le(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
stored!(
    f32 = FileDtype::F32,
    f16 = FileDtype::F16,
    bf16 = FileDtype::BF16
);

/// A contiguous `[tokens, heads, head_dim]` or `[batch, sequence, heads, head_dim]`.
#[derive(Clone, Debug)]
pub struct Tensor<T> {
    pub shape: Vec<usize>,
    pub data: Vec<T>,
}

impl<T: Stored> Tensor<T> {
    /// Reads a tensor; `None` if the file has none of this name.
    pub fn read(file: &SafeTensors<'_>, name: &str) -> Result<Option<Self>> {
        let Ok(view) = file.tensor(name) else {
            return Ok(None);
        };
        if view.dtype() != T::IN_FILE {
            return fail(format!(
                "{name} is {}, expected {}",
                view.dtype(),
                T::IN_FILE
            ));
        }
        let shape = view.shape().to_vec();
        if !matches!(shape.len(), 3 | 4) {
            return fail(format!(
                "{name} has shape {shape:?}: it must be [tokens, heads, head_dim] or \
                 [batch, sequence, heads, head_dim]"
            ));
        }
        let data = view.data().chunks_exact(T::DTYPE.size());
        Ok(Some(Self {
            shape,
            data: data.map(T::from_le).collect(),
        }))
    }

    pub fn layout(&self) -> Layout {
        match self.shape[..] {
            [tokens, heads, head_dim] => Layout::tokens(tokens, heads, head_dim),
            [batch, sequence, heads, head_dim] => Layout::bshd(batch, sequence, heads, head_dim),
            _ => unreachable!("a tensor has three or four dims"),
        }
    }
}

/// How tensors are to be rotated.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    pub rope: &'a Rope,
    /// The first dim of a head that rotates.
    pub rotary_offset: usize,
    pub positions: Positions<'a>,
}

impl<'a> Rotation<'a> {
    /// From the first dim of each head on.
    pub fn leading(rope: &'a Rope, positions: Positions<'a>) -> Self {
        Self {
            rope,
            rotary_offset: 0,
            positions,
        }
    }
}

/// The tensors of one rotation. At least one is there.
#[derive(Clone, Debug)]
pub struct QueriesKeys<T> {
    pub q: Option<Tensor<T>>,
    pub k: Option<Tensor<T>>,
}

impl<T: Stored> QueriesKeys<T> {
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Tensor<T>)> {
        let q = self.q.as_ref().map(|q| ("q", q));
        let k = self.k.as_ref().map(|k| ("k", k));
        q.into_iter().chain(k)
    }

    pub fn is_empty(&self) -> bool {
        self.named().all(|(_, tensor)| tensor.data.is_empty())
    }

    /// All elements, those of q first.
    pub fn elements(&self) -> impl Iterator<Item = T> {
        self.named()
            .flat_map(|(_, tensor)| tensor.data.iter().copied())
    }

    /// `q [38, 9, 64], k [38, 3, 64]`.
    pub fn shapes(&self) -> String {
        let shapes = self
            .named()
            .map(|(name, t)| format!("{name} {:?}", t.shape));
        shapes.collect::<Vec<_>>().join(", ")
    }

    /// The same tensors with other elements.
    pub fn map<U>(&self, convert: impl Fn(T) -> U) -> QueriesKeys<U> {
        let map = |tensor: &Tensor<T>| Tensor {
            shape: tensor.shape.clone(),
            data: tensor.data.iter().map(|&x| convert(x)).collect(),
        };
        QueriesKeys {
            q: self.q.as_ref().map(map),
            k: self.k.as_ref().map(map),
        }
    }

    /// What a plan is made from; `place` says where the result goes.
    pub fn problem(&self, rotation: &Rotation<'_>, place: fn(Layout) -> InOut<Layout>) -> Problem {
        let mut problem = Problem::new(T::DTYPE);
        let layout = |tensor: &Tensor<T>| {
            let layout = tensor.layout();
            place(layout.with_rotary_offset(rotation.rotary_offset))
        };
        if let Some(q) = &self.q {
            problem = problem.q(layout(q));
        }
        if let Some(k) = &self.k {
            problem = problem.k(layout(k));
        }
        problem
    }

    /// Rotates a copy on `device`.
    pub fn rotated(&self, device: &Device, rotation: &Rotation<'_>) -> Result<Self> {
        let rotator = device.rotator(rotation.rope)?;
        let plan = rotator.plan(&self.problem(rotation, InOut::InPlace))?;
        let positions = device.positions(rotation.positions)?;

        let upload = |tensor: &Tensor<T>| device.upload(&tensor.data);
        let mut q = self.q.as_ref().map(upload).transpose()?;
        let mut k = self.k.as_ref().map(upload).transpose()?;
        rotator.rotate(
            &plan,
            q.as_mut().map(InOut::InPlace),
            k.as_mut().map(InOut::InPlace),
            &positions,
        )?;

        let mut rotated = self.clone();
        if let (Some(tensor), Some(buffer)) = (&mut rotated.q, &q) {
            tensor.data = buffer.to_vec()?;
        }
        if let (Some(tensor), Some(buffer)) = (&mut rotated.k, &k) {
            tensor.data = buffer.to_vec()?;
        }
        Ok(rotated)
    }

    /// The bytes of a file with these tensors.
    pub fn to_file(&self) -> Result<Vec<u8>> {
        let bytes: Vec<_> = self
            .named()
            .map(|(name, tensor)| {
                let mut bytes = Vec::with_capacity(tensor.data.len() * T::DTYPE.size());
                tensor.data.iter().for_each(|x| x.append_le(&mut bytes));
                (name, &tensor.shape, bytes)
            })
            .collect();
        let views = bytes
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((*name, TensorView::new(T::IN_FILE, shape.to_vec(), bytes)?))
            })
            .collect::<Result<Vec<_>, _>>();
        views
            .and_then(|views| safetensors::serialize(views, None))
            .map_err(|error| Failure(format!("cannot form the output: {error}")))
    }
}
