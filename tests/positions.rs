//! What positions say about themselves.

use phasor::{FrequencyRowKind, IdType, Ids, PositionKind, Positions};

#[test]
fn positions_tell_how_they_are_given() {
    let ids = [3i64, -4, 5];
    for (positions, kind, shown) in [
        (
            Positions::start_per_sequence(&ids),
            PositionKind::StartPerSequence,
            "one start per sequence of the batch",
        ),
        (
            Positions::per_sequence(&ids),
            PositionKind::PerSequence,
            "one position per sequence of the batch",
        ),
        (
            Positions::per_token(&ids),
            PositionKind::PerToken,
            "one position per token",
        ),
        (
            Positions::per_token_shared(&ids),
            PositionKind::PerTokenShared,
            "one position per token of a sequence",
        ),
        (
            Positions::per_axis(&ids),
            PositionKind::PerAxis,
            "one position per axis and token",
        ),
    ] {
        assert_eq!((positions.kind(), positions.as_start()), (kind, None));
        assert_eq!(kind.to_string(), shown);
        let given = positions.ids().unwrap();
        assert_eq!((given.len(), given.is_empty()), (3, false));
        assert_eq!(given.id_type(), IdType::I64);
        assert_eq!([0, 1, 2].map(|i| given.get(i)), ids);
        assert_eq!(positions.frequency_row_kind(), FrequencyRowKind::None);
        assert_eq!(positions.as_frequency_row(), None);
        assert!(positions.frequency_row_ids().is_none());
    }
    let start = Positions::start(-9);
    assert_eq!(
        (start.kind(), start.as_start()),
        (PositionKind::Start, Some(-9))
    );
    assert_eq!(PositionKind::Start.to_string(), "one start");
    assert!(start.ids().is_none());
    let none: Ids<&[u8]> = (&[0u32; 0]).into();
    assert!(none.is_empty());
}

#[test]
fn positions_tell_how_rows_are_chosen() {
    let ids = [1u32, 0];
    let start = Positions::start(7);
    for (positions, kind, shown) in [
        (
            start.frequency_rows_per_sequence(&ids),
            FrequencyRowKind::PerSequence,
            "one frequency row per sequence of the batch",
        ),
        (
            start.frequency_rows_per_token(&ids),
            FrequencyRowKind::PerToken,
            "one frequency row per token",
        ),
    ] {
        assert_eq!(
            (positions.frequency_row_kind(), positions.as_frequency_row()),
            (kind, None)
        );
        assert_eq!(kind.to_string(), shown);
        let rows = positions.frequency_row_ids().unwrap();
        assert_eq!((rows.len(), rows.id_type()), (2, IdType::U32));
        assert_eq!([rows.get(0), rows.get(1)], [1, 0]);
        assert_eq!(positions.as_start(), Some(7));
    }
    let one = start.frequency_row(4);
    assert_eq!(one.frequency_row_kind(), FrequencyRowKind::Call);
    assert_eq!((one.as_frequency_row(), one.as_start()), (Some(4), Some(7)));
    assert!(one.frequency_row_ids().is_none());
    assert_eq!(FrequencyRowKind::Call.to_string(), "one frequency row");
    assert_eq!(FrequencyRowKind::None.to_string(), "no frequency row");
}
