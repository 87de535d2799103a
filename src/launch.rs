//! A plan as a kernel launch: which kernel, on what grid, with which parameter bytes.
//!
//! This is data. The CUDA backend hands it to the driver; tests execute the same data elsewhere.

use crate::element::Dtype;
use crate::layout::Layout;
use crate::params::{
    PHASOR_OUT_OF_RANGE_CLAMP, PHASOR_OUT_OF_RANGE_PASS_THROUGH, PHASOR_POSITION_I32,
    PHASOR_POSITION_I64, PHASOR_POSITION_NONE, PHASOR_POSITION_U32, PHASOR_ROW_BY_POSITION,
    PHASOR_ROW_CALL, PHASOR_ROW_IDS, PhasorAngles, PhasorPairing, PhasorPositions,
    PhasorRopeParams, PhasorRows, PhasorStrides, PhasorTensor,
};
use crate::plan::{Plan, PlannedTensor};
use crate::positions::{FrequencyRowKind, PositionKind, Positions};
use crate::rope::{Pairing, Rope};
use crate::{Angles, Error, OutOfRange};

/// What a kernel forms its angles from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AngleKind {
    /// One step per pair.
    Exact,
    /// Steps of several rows or axes, and a factor per row.
    Rows,
    /// A table of cos and sin.
    Table,
}

impl AngleKind {
    /// All kinds, in the order of [`Kernel::index`].
    pub const ALL: [AngleKind; 3] = [AngleKind::Exact, AngleKind::Rows, AngleKind::Table];

    /// The kind that an angle source needs.
    pub fn of(angles: &Angles) -> Self {
        match angles {
            Angles::Exact(frequencies) if frequencies.axes() == 1 => AngleKind::Exact,
            Angles::Exact(_) | Angles::Rows(_) => AngleKind::Rows,
            Angles::Table(_) => AngleKind::Table,
        }
    }

    const fn suffix(self) -> &'static str {
        match self {
            AngleKind::Exact => "",
            AngleKind::Rows => "_rows",
            AngleKind::Table => "_table",
        }
    }
}

/// How a kernel accesses q and k.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// 16 bytes at a time, for one pairing.
    Wide(Pairing),
    /// One element at a time, for any pairing, also one that differs in what is written.
    Narrow,
}

/// One entry point of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Element type; each has a module of its own.
    pub dtype: Dtype,
    /// How it accesses q and k.
    pub access: Access,
    /// What angles are formed from.
    pub angles: AngleKind,
}

impl Kernel {
    /// Kernels of one element type.
    pub const PER_DTYPE: usize = Self::ACCESSES.len() * AngleKind::ALL.len();

    const ACCESSES: [Access; 3] = [
        Access::Wide(Pairing::HalfSplit),
        Access::Wide(Pairing::Interleaved),
        Access::Narrow,
    ];

    /// All kernels of an element type, in the order of [`index`](Self::index).
    pub fn all(dtype: Dtype) -> [Kernel; Self::PER_DTYPE] {
        std::array::from_fn(|index| Kernel {
            dtype,
            access: Self::ACCESSES[index / AngleKind::ALL.len()],
            angles: AngleKind::ALL[index % AngleKind::ALL.len()],
        })
    }

    /// Its place among the kernels of its element type.
    pub fn index(self) -> usize {
        let access = match self.access {
            Access::Wide(Pairing::HalfSplit) => 0,
            Access::Wide(Pairing::Interleaved) => 1,
            Access::Narrow => 2,
        };
        access * AngleKind::ALL.len() + self.angles as usize
    }

    /// Whether it accesses 16 bytes at a time.
    pub fn is_wide(self) -> bool {
        self.pairing().is_some()
    }

    /// The pairing, if it serves only one.
    pub fn pairing(self) -> Option<Pairing> {
        match self.access {
            Access::Wide(pairing) => Some(pairing),
            Access::Narrow => None,
        }
    }

    /// The entry's name: `rope_<pairing>_<dtype>[_rows|_table]`, or
    /// `rope_<dtype>[_rows|_table]_narrow`.
    pub fn name(self) -> String {
        let (dtype, angles) = (self.dtype.name(), self.angles.suffix());
        match self.access {
            Access::Wide(pairing) => format!("rope_{}_{dtype}{angles}", pairing.name()),
            Access::Narrow => format!("rope_{dtype}{angles}_narrow"),
        }
    }
}

/// A kernel launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks: over tokens, heads, batch rows.
    pub grid: [u32; 3],
    /// Threads: lanes of a head, heads, tokens.
    pub block: [u32; 3],
    /// The kernel's one parameter, passed by value.
    pub params: PhasorRopeParams,
}

/// Device addresses of the buffers of one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorAddresses {
    /// Start of the buffer that is read; the layout's offset is added to it. Not used in place.
    pub source: u64,
    /// Start of the buffer that is written.
    pub destination: u64,
}

/// Device addresses of an angle source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AngleAddresses {
    /// `u64` steps, one per pair.
    Exact {
        /// 16-byte aligned.
        steps: u64,
    },
    /// Steps of several rows or axes.
    Rows {
        /// `u64[rows, axes, pairs]`, 16-byte aligned.
        steps: u64,
        /// Attention factors, `f32[rows]`.
        factors: u64,
    },
    /// Table rows.
    Table {
        /// `f32[rows, pairs]`, 8-byte aligned.
        cos: u64,
        /// `f32[rows, pairs]`, 8-byte aligned.
        sin: u64,
    },
}

/// Type of position values in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PositionDtype {
    /// Signed 32-bit.
    I32,
    /// Signed 64-bit.
    I64,
    /// Unsigned 32-bit.
    U32,
}

impl PositionDtype {
    /// Bytes of one value.
    pub const fn size(self) -> usize {
        match self {
            PositionDtype::I32 | PositionDtype::U32 => 4,
            PositionDtype::I64 => 8,
        }
    }
}

/// The positions of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionAddresses {
    /// For [`PositionKind::Start`].
    Start(i64),
    /// For the other kinds: as many values as the plan needs, aligned to their size.
    Ids {
        /// Device address.
        address: u64,
        /// Type of the values.
        dtype: PositionDtype,
    },
}

/// The rows of frequencies of one launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowAddresses {
    /// For [`FrequencyRowKind::None`].
    #[default]
    None,
    /// For [`FrequencyRowKind::Call`].
    Call(u32),
    /// For the other kinds: the address of as many `u32` as the plan needs. An index past the last
    /// row is the last row.
    Ids(u64),
}

/// All addresses of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Ignored where the plan has no q.
    pub q: TensorAddresses,
    /// Ignored where the plan has no k.
    pub k: TensorAddresses,
    /// The angle source.
    pub angles: AngleAddresses,
    /// The positions.
    pub positions: PositionAddresses,
    /// The rows of frequencies.
    pub rows: RowAddresses,
}

/// Threads of a full block; the kernels' launch bounds allow no more.
const BLOCK: u32 = 256;
/// Most lanes of a block that share a head; wider heads loop.
const MAX_LANES: u32 = 64;
/// Heads that one thread visits where there is work for the whole device.
const HEADS_PER_THREAD: u32 = 8;
/// Threads per multiprocessor below which heads are spread over more threads.
const BUSY_THREADS: u64 = 512;
const MAX_GRID_X: u64 = (1 << 31) - 1;
const MAX_GRID_YZ: u64 = 65_535;
/// The hardware's limit on `blockDim.z`.
const MAX_BLOCK_Z: u64 = 64;

impl Plan {
    /// The launch that performs this plan on the given addresses; `None` if there is nothing to
    /// rotate. Allocates nothing.
    ///
    /// `multiprocessors` is the device's count; it shapes the grid and never the result.
    ///
    /// # Errors
    /// [`Error::PositionKindMismatch`] if the positions are not of the plan's kind, and
    /// [`Error::FrequencyRowMismatch`] if the rows are not; [`Error::FrequencyRowOutOfRange`];
    /// [`Error::PositionOutOfRange`] for a start that a table with [`OutOfRange::Error`] refuses;
    /// [`Error::PlanMismatch`] if the angle addresses are not of the plan's angle source;
    /// [`Error::DevicePositionsUnchecked`] for a table with [`OutOfRange::Error`] whose positions
    /// the host cannot see.
    pub fn launch(
        &self,
        addresses: &Addresses,
        multiprocessors: u32,
    ) -> Result<Option<Launch>, Error> {
        if self.is_empty() {
            return Ok(None);
        }
        // One token per row, as in decoding: the rows become the tokens of one row.
        let transposed = self.sequence == 1;
        let positions = self.position_params(&addresses.positions, transposed)?;
        let rows = self.row_params(&addresses.rows, transposed)?;
        let angles = self.angle_params(&addresses.angles)?;
        let tensor = |planned: &Option<PlannedTensor>, at: TensorAddresses| {
            planned.as_ref().map_or(ABSENT, |planned| {
                tensor_params(planned, at, self.dtype, transposed)
            })
        };
        let q = tensor(&self.q, addresses.q);
        let k = tensor(&self.k, addresses.k);
        let (batch, sequence) = if transposed {
            (1, self.batch as u64)
        } else {
            (self.batch as u64, self.sequence as u64)
        };

        let wide = self.is_wide(&q, &k, &addresses.angles);
        let kernel = Kernel {
            dtype: self.dtype,
            access: if wide {
                Access::Wide(self.rope.pairing())
            } else {
                Access::Narrow
            },
            angles: AngleKind::of(self.rope.angles()),
        };
        let pairs_per_lane = if wide {
            16 / self.dtype.size() as u32
        } else {
            1
        };
        let (grid, block) = shape(
            batch,
            sequence,
            q.heads + k.heads,
            angles.pairs / pairs_per_lane,
            multiprocessors,
        );
        Ok(Some(Launch {
            kernel,
            grid,
            block,
            params: PhasorRopeParams {
                q,
                k,
                angles,
                positions,
                rows,
                pairing: pairing_params(&self.rope),
                batch,
                sequence,
            },
        }))
    }

    /// 16-byte accesses need every address they form to be a multiple of 16 bytes, chunks that do not
    /// straddle an edge of the rotated window, and one pairing.
    fn is_wide(&self, q: &PhasorTensor, k: &PhasorTensor, angles: &AngleAddresses) -> bool {
        let per_access = 16 / self.dtype.size();
        let aligned = |tensor: &PhasorTensor| {
            let strides = |s: &PhasorStrides| (s.batch | s.sequence | s.head) as u64;
            let in_place = tensor.source == tensor.destination;
            let bytes = tensor.source
                | tensor.destination
                | strides(&tensor.source_strides)
                | strides(&tensor.destination_strides);
            bytes.is_multiple_of(16)
                && (tensor.rotary_offset as usize).is_multiple_of(per_access)
                && (in_place || (tensor.head_dim as usize).is_multiple_of(per_access))
        };
        let angles_aligned = match *angles {
            AngleAddresses::Exact { steps } | AngleAddresses::Rows { steps, .. } => {
                steps.is_multiple_of(16)
            }
            AngleAddresses::Table { cos, sin } => (cos | sin).is_multiple_of(8),
        };
        self.rope.pairing() == self.rope.output_pairing()
            && self.rope.angles().pairs().is_multiple_of(per_access)
            && aligned(q)
            && aligned(k)
            && angles_aligned
    }

    fn position_params(
        &self,
        positions: &PositionAddresses,
        transposed: bool,
    ) -> Result<PhasorPositions, Error> {
        let mut params = PhasorPositions {
            ids: 0,
            start: 0,
            advance: 0,
            axis_stride: 0,
            batch_stride: 0,
            sequence_stride: 0,
            type_: PHASOR_POSITION_NONE,
            reserved: 0,
        };
        let (per_row, per_token) = match (*positions, self.positions) {
            (PositionAddresses::Start(start), PositionKind::Start) => {
                self.check_table_range(&Positions::start(start))?;
                params.start = start;
                params.advance = 1;
                (0, 0)
            }
            (PositionAddresses::Ids { .. }, PositionKind::StartPerRow) => {
                params.advance = 1;
                (1, 0)
            }
            (PositionAddresses::Ids { .. }, PositionKind::PerRow) => (1, 0),
            (PositionAddresses::Ids { .. }, PositionKind::PerToken | PositionKind::PerAxis) => {
                (self.sequence, 1)
            }
            (given, planned) => {
                return Err(Error::PositionKindMismatch {
                    planned,
                    given: match given {
                        PositionAddresses::Start(_) => PositionKind::Start,
                        PositionAddresses::Ids { .. } => PositionKind::PerToken,
                    },
                });
            }
        };
        if let PositionAddresses::Ids { address, dtype } = *positions {
            params.ids = address;
            params.type_ = match dtype {
                PositionDtype::I32 => PHASOR_POSITION_I32,
                PositionDtype::I64 => PHASOR_POSITION_I64,
                PositionDtype::U32 => PHASOR_POSITION_U32,
            };
            params.batch_stride = (per_row * dtype.size()) as i64;
            params.sequence_stride = (per_token * dtype.size()) as i64;
            if self.positions == PositionKind::PerAxis {
                params.axis_stride = (self.batch * self.sequence * dtype.size()) as i64;
            }
        }
        if transposed {
            // There is one token per row, so nothing advances along it.
            params.sequence_stride = params.batch_stride;
            params.batch_stride = 0;
            params.advance = 0;
        }
        Ok(params)
    }

    fn row_params(&self, rows: &RowAddresses, transposed: bool) -> Result<PhasorRows, Error> {
        let mut params = PhasorRows {
            ids: 0,
            batch_stride: 0,
            sequence_stride: 0,
            boundary: 0,
            type_: PHASOR_ROW_CALL,
            row: 0,
        };
        let (per_row, per_token) = match (*rows, self.frequency_rows) {
            (RowAddresses::None, FrequencyRowKind::None) => {
                if let Angles::Rows(rows) = self.rope.angles()
                    && let Some(boundary) = rows.boundary()
                {
                    params.type_ = PHASOR_ROW_BY_POSITION;
                    params.boundary = boundary;
                }
                (0, 0)
            }
            (RowAddresses::Call(row), FrequencyRowKind::Call) => {
                self.check_row(row)?;
                params.row = row;
                (0, 0)
            }
            (RowAddresses::Ids(_), FrequencyRowKind::PerSequence) => (1, 0),
            (RowAddresses::Ids(_), FrequencyRowKind::PerToken) => (self.sequence, 1),
            (given, planned) => {
                return Err(Error::FrequencyRowMismatch {
                    planned,
                    given: match given {
                        RowAddresses::None => FrequencyRowKind::None,
                        RowAddresses::Call(_) => FrequencyRowKind::Call,
                        RowAddresses::Ids(_) => FrequencyRowKind::PerSequence,
                    },
                });
            }
        };
        if let RowAddresses::Ids(address) = *rows {
            params.ids = address;
            params.type_ = PHASOR_ROW_IDS;
            params.batch_stride = (per_row * size_of::<u32>()) as i64;
            params.sequence_stride = (per_token * size_of::<u32>()) as i64;
        }
        if transposed {
            params.sequence_stride = params.batch_stride;
            params.batch_stride = 0;
        }
        Ok(params)
    }

    fn angle_params(&self, addresses: &AngleAddresses) -> Result<PhasorAngles, Error> {
        let angles = self.rope.angles();
        let (cos_scale, sin_scale) = self.rope.scales(1.0);
        let mut params = PhasorAngles {
            steps: 0,
            factors: 0,
            cos: 0,
            sin: 0,
            rows: 1,
            pairs: angles.pairs() as u32,
            axes: angles.axes() as u32,
            out_of_range: PHASOR_OUT_OF_RANGE_CLAMP,
            cos_scale,
            sin_scale,
            reserved: 0,
        };
        match (angles, *addresses) {
            // A plan made with `PositionMemory::Host` can get here, so this is checked again.
            (Angles::Table(table), _)
                if table.out_of_range() == OutOfRange::Error
                    && self.positions != PositionKind::Start =>
            {
                return Err(Error::DevicePositionsUnchecked);
            }
            (Angles::Exact(frequencies), AngleAddresses::Exact { steps })
                if frequencies.axes() == 1 =>
            {
                params.steps = steps;
                (params.cos_scale, params.sin_scale) =
                    self.rope.scales(frequencies.attention_factor());
            }
            (Angles::Exact(_) | Angles::Rows(_), AngleAddresses::Rows { steps, factors })
                if AngleKind::of(angles) == AngleKind::Rows =>
            {
                params.steps = steps;
                params.factors = factors;
                if let Angles::Rows(rows) = angles {
                    params.rows = rows.rows() as u64;
                }
            }
            (Angles::Table(table), AngleAddresses::Table { cos, sin }) => {
                params.cos = cos;
                params.sin = sin;
                params.rows = table.rows() as u64;
                // Positions that must be in range have been checked by the host.
                if table.out_of_range() == OutOfRange::PassThrough {
                    params.out_of_range = PHASOR_OUT_OF_RANGE_PASS_THROUGH;
                }
            }
            _ => return Err(Error::PlanMismatch),
        }
        Ok(params)
    }
}

fn pairing_params(rope: &Rope) -> PhasorPairing {
    let steps = |pairing| match pairing {
        Pairing::HalfSplit => (1, rope.angles().pairs() as u32),
        Pairing::Interleaved => (2, 1),
    };
    let (source_step, source_gap) = steps(rope.pairing());
    let (destination_step, destination_gap) = steps(rope.output_pairing());
    PhasorPairing {
        source_step,
        source_gap,
        destination_step,
        destination_gap,
    }
}

const ABSENT: PhasorTensor = PhasorTensor {
    source: 0,
    destination: 0,
    source_strides: NO_STRIDES,
    destination_strides: NO_STRIDES,
    heads: 0,
    head_dim: 0,
    rotary_offset: 0,
    reserved: 0,
};
const NO_STRIDES: PhasorStrides = PhasorStrides {
    batch: 0,
    sequence: 0,
    head: 0,
};

fn tensor_params(
    planned: &PlannedTensor,
    at: TensorAddresses,
    dtype: Dtype,
    transposed: bool,
) -> PhasorTensor {
    let [.., heads, head_dim] = planned.source.shape();
    if planned.source.is_empty() {
        return ABSENT;
    }
    let address =
        |start: u64, layout: &Layout| start.wrapping_add((layout.offset * dtype.size()) as u64);
    let source = if planned.in_place {
        at.destination
    } else {
        at.source
    };
    PhasorTensor {
        source: address(source, &planned.source),
        destination: address(at.destination, &planned.destination),
        source_strides: byte_strides(&planned.source, dtype, transposed),
        destination_strides: byte_strides(&planned.destination, dtype, transposed),
        heads: heads as u32,
        head_dim: head_dim as u32,
        rotary_offset: planned.source.rotary_offset() as u32,
        reserved: 0,
    }
}

fn byte_strides(layout: &Layout, dtype: Dtype, transposed: bool) -> PhasorStrides {
    // The stride of a dimension of size 1 is never used; as 0 it cannot spoil alignment or overflow.
    let stride = |count: usize, stride: usize| match count {
        0 | 1 => 0,
        _ => (stride * dtype.size()) as i64,
    };
    let [batch, sequence, heads, _] = layout.shape();
    let [batch_stride, sequence_stride, head_stride] = layout.strides();
    let batch = stride(batch, batch_stride);
    let sequence = stride(sequence, sequence_stride);
    let (batch, sequence) = if transposed {
        (0, batch)
    } else {
        (batch, sequence)
    };
    PhasorStrides {
        batch,
        sequence,
        head: stride(heads, head_stride),
    }
}

/// Grid and block for a problem that is not empty. The kernels accept any shape; this one keeps a
/// device busy.
fn shape(
    batch: u64,
    sequence: u64,
    heads: u32,
    chunks: u32,
    multiprocessors: u32,
) -> ([u32; 3], [u32; 3]) {
    // Lanes that divide the chunks evenly among the fewest rounds.
    let lanes = chunks.div_ceil(chunks.div_ceil(MAX_LANES));
    let tokens = batch.saturating_mul(sequence);

    // Few tokens leave multiprocessors idle: then each thread visits fewer heads.
    let busy = BUSY_THREADS * u64::from(multiprocessors);
    let mut heads_per_thread = HEADS_PER_THREAD;
    let threads = |per_thread: u32| {
        tokens.saturating_mul(u64::from(heads.div_ceil(per_thread)) * u64::from(lanes))
    };
    while heads_per_thread > 1 && threads(heads_per_thread) < busy {
        heads_per_thread /= 2;
    }
    let rows_needed = heads.div_ceil(heads_per_thread);
    let rows = rows_needed.min(BLOCK / lanes).max(1);
    let block_tokens = u64::from(BLOCK / (lanes * rows))
        .min(sequence)
        .clamp(1, MAX_BLOCK_Z);
    let grid = [
        sequence.div_ceil(block_tokens).min(MAX_GRID_X) as u32,
        u64::from(rows_needed.div_ceil(rows)).min(MAX_GRID_YZ) as u32,
        batch.min(MAX_GRID_YZ) as u32,
    ];
    (grid, [lanes, rows, block_tokens as u32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_numbered_in_order() {
        for dtype in Dtype::ALL {
            for (index, kernel) in Kernel::all(dtype).into_iter().enumerate() {
                assert_eq!(kernel.index(), index, "{}", kernel.name());
            }
        }
    }

    #[test]
    fn blocks_respect_the_hardware() {
        for batch in [1, 3, 70_000] {
            for sequence in [1, 2, 100, 1 << 20, 1 << 40] {
                for heads in [1, 5, 40, 1000, 1 << 28] {
                    for chunks in [1, 8, 9, 64, 65, 1 << 27] {
                        let (grid, [x, y, z]) = shape(batch, sequence, heads, chunks, 132);
                        assert!(x >= 1 && y >= 1 && z >= 1 && x * y * z <= BLOCK);
                        assert!(z <= 64 && x <= chunks);
                        assert!(grid.iter().all(|&n| n >= 1));
                        assert!(grid[1] <= 65_535 && grid[2] <= 65_535 && grid[0] < 1 << 31);
                        // The head loop goes 4 rounds of the grid's heads past the last one, and
                        // looks 3 further.
                        assert!(u64::from(heads) + u64::from(grid[1]) * u64::from(y) * 7 < 1 << 32);
                    }
                }
            }
        }
    }
}
