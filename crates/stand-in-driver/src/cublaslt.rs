//! cublasLt: products of a transposed matrix, added up in f32.

use crate::{Pointer, Status, device, leak, nothing};
use half::{bf16, f16};
use std::ffi::c_int;

const F32: c_int = 0;
const F16: c_int = 2;
const BF16: c_int = 14;
const COMPUTE_F32: c_int = 68;
const TRANSPOSE_A: c_int = 3;
/// Bytes that products are said to need.
const WORKSPACE: usize = 512;
/// Of the algorithm that is chosen.
const CHOSEN: [u64; 8] = [42; 8];

nothing! {
    cublasLtDestroy(Pointer),
    cublasLtMatmulDescDestroy(Pointer),
    cublasLtMatrixLayoutDestroy(Pointer),
    cublasLtMatmulPreferenceDestroy(Pointer),
    cublasLtMatmulPreferenceSetAttribute(Pointer, c_int, Pointer, usize),
}

struct Description {
    transposes_a: c_int,
}

/// Of a matrix whose columns are contiguous, `stride` elements apart.
struct Layout {
    element: c_int,
    rows: usize,
    columns: usize,
    stride: usize,
}

#[repr(C)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

/// # Safety
/// `to` is for a handle.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtCreate(to: *mut Pointer) -> Status {
    // SAFETY: the caller's promise.
    unsafe { to.write(device().handle()) };
    0
}

/// # Safety
/// `to` is for a handle.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatmulPreferenceCreate(to: *mut Pointer) -> Status {
    // SAFETY: the caller's promise.
    unsafe { to.write(device().handle()) };
    0
}

/// # Safety
/// `to` is for a description.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatmulDescCreate(
    to: *mut Pointer,
    compute: c_int,
    scale: c_int,
) -> Status {
    assert_eq!((compute, scale), (COMPUTE_F32, F32));
    // SAFETY: the caller's promise.
    unsafe { to.write(leak(Description { transposes_a: 0 })) };
    0
}

/// # Safety
/// `description` is one, and the value has as many bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    description: *mut Description,
    attribute: c_int,
    value: *const c_int,
    bytes: usize,
) -> Status {
    assert_eq!((attribute, bytes), (TRANSPOSE_A, 4));
    // SAFETY: the caller's promise.
    unsafe { (*description).transposes_a = *value };
    0
}

/// # Safety
/// `to` is for a layout.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    to: *mut Pointer,
    element: c_int,
    rows: u64,
    columns: u64,
    stride: i64,
) -> Status {
    assert!([F32, F16, BF16].contains(&element));
    let layout = Layout {
        element,
        rows: rows as usize,
        columns: columns as usize,
        stride: stride as usize,
    };
    // SAFETY: the caller's promise.
    unsafe { to.write(leak(layout)) };
    0
}

/// # Safety
/// There is room for one result, and for their number.
#[allow(clippy::too_many_arguments, reason = "as cublasLt has it")]
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _: Pointer,
    _: Pointer,
    _: Pointer,
    _: Pointer,
    _: Pointer,
    _: Pointer,
    _: Pointer,
    _: c_int,
    to: *mut Heuristic,
    count: *mut c_int,
) -> Status {
    let found = Heuristic {
        algorithm: CHOSEN,
        workspace: WORKSPACE,
        state: 0,
        waves: 1.0,
        reserved: [0; 4],
    };
    // SAFETY: the caller's promise.
    unsafe {
        to.write(found);
        count.write(1);
    }
    0
}

impl Layout {
    fn size(&self) -> usize {
        if self.element == F32 { 4 } else { 2 }
    }

    /// The columns of a matrix in device memory.
    fn read(&self, address: u64) -> Vec<Vec<f32>> {
        let size = self.size();
        let column = |at: usize| {
            let from = address + (at * self.stride * size) as u64;
            let bytes = device().memory.read(from, self.rows * size);
            let bytes = bytes.expect("a matrix that was written");
            let half = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
            bytes
                .chunks_exact(size)
                .map(|bytes| match self.element {
                    F32 => {
                        f32::from_bits(bytes.iter().rev().fold(0, |x, &b| x << 8 | u32::from(b)))
                    }
                    F16 => f16::from_bits(half(bytes)).to_f32(),
                    _ => bf16::from_bits(half(bytes)).to_f32(),
                })
                .collect()
        };
        (0..self.columns).map(column).collect()
    }

    fn write_column(&self, address: u64, at: usize, values: impl Iterator<Item = f32>) {
        let bytes: Vec<u8> = values
            .flat_map(|x| match self.element {
                F32 => x.to_le_bytes().to_vec(),
                F16 => f16::from_f32(x).to_le_bytes().to_vec(),
                _ => bf16::from_f32(x).to_le_bytes().to_vec(),
            })
            .collect();
        let to = address + (at * self.stride * self.size()) as u64;
        device().memory.write(to, &bytes);
    }
}

/// # Safety
/// Descriptions, layouts and the algorithm are of this library, and scalars are f32.
#[allow(clippy::too_many_arguments, reason = "as cublasLt has it")]
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasLtMatmul(
    _: Pointer,
    description: *const Description,
    alpha: *const f32,
    a: u64,
    a_layout: *const Layout,
    b: u64,
    b_layout: *const Layout,
    beta: *const f32,
    c: u64,
    c_layout: *const Layout,
    d: u64,
    d_layout: *const Layout,
    algorithm: *const [u64; 8],
    workspace: u64,
    workspace_bytes: usize,
    _: Pointer,
) -> Status {
    // SAFETY: the caller's promise.
    let ([a_layout, b_layout, d_layout], description, scalars, algorithm) = unsafe {
        (
            [&*a_layout, &*b_layout, &*d_layout],
            &*description,
            [*alpha, *beta],
            *algorithm,
        )
    };
    assert_eq!((description.transposes_a, scalars), (1, [1.0, 0.0]));
    assert_eq!((algorithm, workspace_bytes), (CHOSEN, WORKSPACE));
    assert!(c == d && std::ptr::eq(c_layout, d_layout));
    assert_eq!(a_layout.rows, b_layout.rows);
    assert_eq!(
        [d_layout.rows, d_layout.columns],
        [a_layout.columns, b_layout.columns]
    );
    assert!(
        [a, b, d, workspace]
            .iter()
            .all(|address| address.is_multiple_of(16))
    );
    // Whatever was there is gone.
    device().memory.write(workspace, &[0xab; WORKSPACE]);
    let a = a_layout.read(a);
    for (at, b) in b_layout.read(b).iter().enumerate() {
        let dot = |a: &Vec<f32>| a.iter().zip(b).map(|(a, b)| a * b).sum();
        d_layout.write_column(d, at, a.iter().map(dot));
    }
    0
}
