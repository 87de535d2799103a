//! Which axis each pair turns with, and how many steps a row has.

use phasor::config::{Axes, GgmlMrope};
use phasor::{Error, Frequencies};

/// What `axis_of_pair` says, which the frequencies must follow.
#[track_caller]
fn follows(axes: Axes, expected: &[usize]) {
    let rotary_dim = 2 * expected.len();
    let axis_of_pair = axes.axis_of_pair(rotary_dim).unwrap();
    assert_eq!(axis_of_pair, expected, "{axes:?}");
    let count = axes.axes();
    let frequencies = axes.frequencies(1e4, rotary_dim).unwrap();
    assert_eq!(frequencies.axes(), count);
    for (i, step) in frequencies.steps().iter().enumerate() {
        let (axis, pair) = (i / expected.len(), i % expected.len());
        assert_eq!(
            *step != 0,
            axis == expected[pair],
            "axis {axis}, pair {pair}"
        );
    }
}

#[test]
fn pairs_turn_with_the_axis_that_is_told() {
    let ggml = |mode, sections| Axes::Ggml { mode, sections };
    follows(Axes::MropeSections([2, 1, 1]), &[0, 0, 1, 2]);
    follows(Axes::MropeSections([0, 3, 1]), &[1, 1, 1, 2]);
    follows(Axes::MropeInterleaved([2, 1, 1]), &[0, 1, 2, 0]);
    follows(Axes::MropeInterleaved([6, 1, 1]), &[0, 1, 2, 0, 0, 0, 0, 0]);
    follows(Axes::MropeInterleaved([4, 2, 1]), &[0, 1, 2, 0, 1, 0, 0]);
    follows(Axes::ErnieSections([1, 1, 2]), &[1, 2, 0, 0]);
    follows(Axes::ErnieSections([2, 2, 1]), &[1, 2, 1, 2, 0]);
    follows(Axes::VisionHalves, &[0, 0, 1, 1]);
    follows(Axes::PixtralHalves, &[0, 0, 0, 1, 1, 1]);
    follows(Axes::Video([4, 2, 2]), &[0, 0, 1, 2]);
    follows(Axes::wan(22), &[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]);
    follows(ggml(GgmlMrope::Mrope, [1, 1, 1, 1]), &[0, 1, 2, 3, 0, 1]);
    follows(ggml(GgmlMrope::Mrope, [2, 0, 1, 0]), &[0, 0, 2, 0]);
    follows(ggml(GgmlMrope::Imrope, [2, 1, 1, 0]), &[0, 1, 2, 0]);
    follows(ggml(GgmlMrope::Imrope, [1, 1, 1, 1]), &[0, 1, 2, 3, 0]);
    follows(ggml(GgmlMrope::Vision, [2, 2, 0, 0]), &[0, 0, 1, 1]);
}

#[test]
fn sections_that_do_not_fit_have_no_axes() {
    for axes in [
        Axes::MropeSections([2, 1, 2]),
        Axes::MropeInterleaved([2, 1, 0]),
        Axes::ErnieSections([1, 2, 1]),
        Axes::Video([4, 3, 1]),
        Axes::Video([4, 2, 4]),
        Axes::Ggml {
            mode: GgmlMrope::Mrope,
            sections: [0; 4],
        },
    ] {
        assert!(axes.axis_of_pair(8).is_err(), "{axes:?}");
    }
    // Too few are as wrong as too many.
    for axes in [
        Axes::MropeSections([2, 1, 0]),
        Axes::ErnieSections([1, 1, 1]),
        Axes::ErnieSections([2, 2, 1]),
    ] {
        assert!(axes.axis_of_pair(8).is_err(), "{axes:?}");
    }
    let most = vec![0; 8192];
    assert_eq!(Axes::Video([16384, 0, 0]).axis_of_pair(16384), Ok(most));
    let over = Axes::Video([16386, 0, 0]).axis_of_pair(16386).unwrap_err();
    assert!(over.to_string().contains("at most 16384"), "{over}");
    assert!(Axes::VisionHalves.axis_of_pair(6).is_err());
    assert!(Axes::PixtralHalves.axis_of_pair(10).is_err());
}

#[test]
fn a_row_of_steps_has_a_limit_on_each_axis() {
    const MOST: usize = 1 << 21;
    // As many steps in all would be allowed on one axis.
    let halves = Frequencies::from_axis_steps(vec![7; MOST], 2).unwrap();
    assert_eq!((halves.axes(), halves.pairs()), (2, MOST / 2));
    let whole = Frequencies::from_axis_steps(vec![7; 2 * MOST], 2).unwrap();
    assert_eq!((whole.axes(), whole.pairs()), (2, MOST));
    for (steps, axes) in [(MOST + 1, 1), (2 * MOST + 2, 2), (3 * MOST + 3, 3)] {
        let rotary_dim = 2 * (MOST + 1);
        let refused = Frequencies::from_axis_steps(vec![7; steps], axes);
        assert_eq!(refused, Err(Error::RotaryDim { rotary_dim }));
    }
    for (steps, axes) in [(4, 0), (17, 17), (5, 2), (8, 3)] {
        let refused = Frequencies::from_axis_steps(vec![7; steps], axes);
        assert_eq!(refused, Err(Error::AxisSteps { steps, axes }));
    }
    let one = Frequencies::from_axis_steps(vec![7; 16], 16).unwrap();
    assert_eq!((one.axes(), one.pairs()), (16, 1));
    let steps = Frequencies::from_axis_steps((0..12).collect(), 3).unwrap();
    assert_eq!((steps.axes(), steps.pairs()), (3, 4));
    assert_eq!(steps.phase_at(1, &[1, 10, 100]), 1 + 50 + 900);
}
