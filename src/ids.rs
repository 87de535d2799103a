//! Integers that a call reads for each token or sequence: of any type, in any memory.

use std::ptr::with_exposed_provenance;

/// The type of [`Ids`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IdType {
    /// Signed 32-bit.
    I32,
    /// Signed 64-bit.
    I64,
    /// Unsigned 32-bit.
    U32,
}

impl IdType {
    /// Bytes of one value.
    pub const fn size(self) -> usize {
        match self {
            IdType::I32 | IdType::U32 => 4,
            IdType::I64 => 8,
        }
    }

    /// Reads a value of this type.
    ///
    /// # Safety
    /// There is one at the address, in host memory, exposed.
    pub(crate) unsafe fn read(self, address: usize) -> i64 {
        // SAFETY: the caller's.
        unsafe {
            match self {
                IdType::I32 => with_exposed_provenance::<i32>(address)
                    .read_unaligned()
                    .into(),
                IdType::I64 => with_exposed_provenance::<i64>(address).read_unaligned(),
                IdType::U32 => with_exposed_provenance::<u32>(address)
                    .read_unaligned()
                    .into(),
            }
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for i32 {}
    impl Sealed for i64 {}
    impl Sealed for u32 {}
}

/// An integer that [`Ids`] may hold: `i32`, `i64` or `u32`.
pub trait Id: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Its [`IdType`].
    const TYPE: IdType;
}

impl Id for i32 {
    const TYPE: IdType = IdType::I32;
}

impl Id for i64 {
    const TYPE: IdType = IdType::I64;
}

impl Id for u32 {
    const TYPE: IdType = IdType::U32;
}

/// Integers: positions, or rows of frequencies. `M` is where their bytes are: `&[u8]` for host memory,
/// `cudarc`'s `CudaView<u8>` for a GPU's, [`DeviceMemory`](crate::DeviceMemory) for either. Made by
/// `From` slices of [`Id`]s. They are signed 64-bit once read; arithmetic on them wraps.
///
/// ```
/// use phasor::{Ids, Positions};
///
/// let ids: Ids<&[u8]> = (&[7i64, -1, 1 << 40]).into();
/// let positions = Positions::per_token(ids);
/// let the_same = Positions::per_token(&[7i64, -1, 1 << 40]);
/// assert_eq!(positions, the_same);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids<M> {
    memory: M,
    id_type: IdType,
    len: usize,
}

impl<M> Ids<M> {
    /// `memory` holds `len` values of this type, aligned to their size.
    pub(crate) fn new(memory: M, id_type: IdType, len: usize) -> Self {
        Self {
            memory,
            id_type,
            len,
        }
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The type of the values.
    pub fn id_type(&self) -> IdType {
        self.id_type
    }

    /// Where the values are: their bytes, or their address.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// The same in other memory.
    #[inline(always)]
    pub(crate) fn try_map<'a, M2, E>(
        &'a self,
        memory: impl FnOnce(&'a M) -> Result<M2, E>,
    ) -> Result<Ids<M2>, E> {
        Ok(Ids {
            memory: memory(&self.memory)?,
            id_type: self.id_type,
            len: self.len,
        })
    }
}

impl Ids<&[u8]> {
    /// A value.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len), as indexing does.
    pub fn get(&self, index: usize) -> i64 {
        // The product below would wrap.
        assert!(index < self.len, "index {index} of {} ids", self.len);
        let size = self.id_type.size();
        let value = &self.memory[index * size..(index + 1) * size];
        // SAFETY: the value's own bytes.
        unsafe { self.id_type.read(value.as_ptr().expose_provenance()) }
    }
}

impl<'a, T: Id> From<&'a [T]> for Ids<&'a [u8]> {
    fn from(ids: &'a [T]) -> Self {
        // SAFETY: the integers have no padding, and the slice of bytes borrows them.
        let bytes = unsafe { std::slice::from_raw_parts(ids.as_ptr().cast(), size_of_val(ids)) };
        Self::new(bytes, T::TYPE, ids.len())
    }
}

impl<'a, T: Id> From<&'a Vec<T>> for Ids<&'a [u8]> {
    fn from(ids: &'a Vec<T>) -> Self {
        ids[..].into()
    }
}

impl<'a, T: Id, const N: usize> From<&'a [T; N]> for Ids<&'a [u8]> {
    fn from(ids: &'a [T; N]) -> Self {
        ids[..].into()
    }
}
