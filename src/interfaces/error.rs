use crate::config::ConfigError;
use crate::error::cut;

/// What is wrong with the arguments of a call, under the names that the original gives them, and
/// what to change.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InterfaceError {
    /// An argument has the wrong number of axes, or one of them the wrong length.
    #[error("{argument} has the shape {}: it must be {expected}", shown(shape))]
    Shape {
        /// The argument.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// What it must be.
        expected: String,
    },
    /// An argument's value has no meaning.
    #[error("{argument} is {value}: it must be {expected}")]
    Value {
        /// The argument, with an index into it where it is a list.
        argument: String,
        /// The value.
        value: String,
        /// What it must be.
        expected: String,
    },
    /// An argument that may be absent in general is needed here, or must be absent.
    #[error("{argument} {problem}")]
    Presence {
        /// The argument.
        argument: &'static str,
        /// Why it is needed or must be absent.
        problem: &'static str,
    },
    /// The memory of an argument does not hold what its shape says.
    #[error(
        "{argument} has the shape {}, but its memory holds {got} elements: give just as many as the \
         shape says",
        shown(shape)
    )]
    Length {
        /// The argument.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Elements of its memory.
        got: usize,
    },
    /// Two columns of a table that must be equal are not: the table is in another form.
    #[error(
        "{argument}: row {row} has {left} in column {column} and {right} in column {partner}, which \
         must be equal: give the table in the form that was named"
    )]
    Unpaired {
        /// The table.
        argument: &'static str,
        /// Its row, all leading axes taken as one.
        row: usize,
        /// One column.
        column: usize,
        /// The other.
        partner: usize,
        /// What is in the one.
        left: f32,
        /// What is in the other.
        right: f32,
    },
    /// A position has no row in the table that the call speaks of.
    #[error(
        "{argument}: position {position} (token {token}) is outside the {rows} rows of the table: \
         {}",
        if *position < 0 { "no table has negative positions: check them" } else { "give a longer one" }
    )]
    OutOfTable {
        /// The argument that gave the position.
        argument: &'static str,
        /// The position.
        position: i64,
        /// The first token with such a position, all leading axes taken as one.
        token: usize,
        /// Rows of the table.
        rows: usize,
    },
    /// One tensor of a call is in host memory, the other in a buffer of a device.
    #[error(
        "{argument} is not where the other tensor of the call is: give both as slices, or both as \
         buffers of one device"
    )]
    MixedMemory {
        /// The tensor that was found elsewhere.
        argument: &'static str,
    },
    /// Parameters of a scaling have no meaning.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The rest of the crate refuses the call.
    #[error(transparent)]
    Rope(#[from] crate::Error),
}

/// A shape, cut where a caller gives one of thousands of axes.
fn shown(shape: &[usize]) -> String {
    cut(&format!("{shape:?}"), 240)
}

impl InterfaceError {
    pub(super) fn shape(
        argument: &'static str,
        shape: &[usize],
        expected: impl Into<String>,
    ) -> Self {
        InterfaceError::Shape {
            argument,
            shape: shape.to_vec(),
            expected: expected.into(),
        }
    }

    pub(super) fn value(
        argument: impl Into<String>,
        value: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        InterfaceError::Value {
            argument: argument.into(),
            value: value.to_string(),
            expected: expected.into(),
        }
    }
}
