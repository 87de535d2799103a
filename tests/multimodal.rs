//! Position ids of images, video and sound: against those that Hugging Face transformers computed (the files
//! in `tests/goldens/positions`), and what is refused.

use std::path::Path;

use phasor::config::{Axes, RopeConfig};
use phasor::multimodal::{
    Grid, MultimodalError, Padding, PositionIds, Resume, RopeIndex, Segment, TokenType,
    VisionWindows, qwen2_5_omni_audio_tokens, qwen3_omni_audio_tokens, vision_position_ids,
};
use phasor::{Dtype, Host, InOut, Layout, Positions, Problem};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;

// ---- files ----

struct Golden {
    name: String,
    case: Value,
    bytes: Vec<u8>,
}

impl Golden {
    fn integers(&self, name: &str) -> (Vec<usize>, Vec<i64>) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::I64, "{}", self.name);
        let value = |bytes: &[u8]| i64::from_le_bytes(bytes.try_into().unwrap());
        (
            tensor.shape().to_vec(),
            tensor.data().chunks_exact(8).map(value).collect(),
        )
    }
}

fn goldens(prefix: &str) -> Vec<Golden> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/positions");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        if !name.starts_with(prefix) {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let case = serde_json::from_str(&header.metadata().as_ref().unwrap()["case"]).unwrap();
        found.push(Golden { name, case, bytes });
    }
    assert!(!found.is_empty(), "no goldens {prefix}*");
    found
}

fn grid(value: &Value) -> Grid {
    let side = |index: usize| value[index].as_u64().unwrap() as usize;
    Grid::video(side(0), side(1), side(2))
}

/// The model of a case.
fn index_of(case: &Value) -> RopeIndex {
    let vision = &case["vision_config"];
    let merge = |key: &str| vision[key].as_u64().unwrap() as usize;
    let side = merge("spatial_merge_size");
    let number = |key: &str| vision[key].as_f64().unwrap() as f32;
    let index = match case["model"].as_str().unwrap() {
        "qwen2_vl" => RopeIndex::qwen2_vl(side),
        "qwen2_5_vl" => RopeIndex::qwen2_5_vl(side, number("tokens_per_second")),
        "qwen3_vl" => RopeIndex::qwen3_vl(side),
        "glm4v" => RopeIndex::glm4v(side),
        "qwen2_5_omni" => RopeIndex::qwen2_5_omni(
            side,
            number("position_id_per_seconds"),
            number("seconds_per_chunk"),
        ),
        "qwen3_omni_moe" => RopeIndex::qwen3_omni(side, number("position_id_per_seconds")),
        "ernie4_5_vl_moe" => RopeIndex::ernie4_5_vl(side, merge("temporal_merge_size")),
        other => panic!("{other}"),
    };
    index.unwrap()
}

fn segments_of(model: &str, sequence: &Value) -> Vec<Segment> {
    let mut segments = Vec::new();
    let sound = |features: &Value| {
        let features = features.as_u64().unwrap() as usize;
        match model {
            "qwen2_5_omni" => qwen2_5_omni_audio_tokens(features),
            _ => qwen3_omni_audio_tokens(features),
        }
    };
    for part in sequence.as_array().unwrap() {
        match part[0].as_str().unwrap() {
            "text" => segments.push(Segment::Text(part[1].as_u64().unwrap() as usize)),
            "image" => segments.push(Segment::Image(grid(&part[1]))),
            "video" => segments.push(Segment::Video {
                grid: grid(&part[1]),
                seconds_per_grid: part[2].as_f64().unwrap() as f32,
            }),
            "audio" => segments.push(Segment::Audio(sound(&part[1]))),
            "video_with_audio" => segments.push(Segment::VideoWithAudio {
                grid: grid(&part[1]),
                seconds_per_grid: part[2].as_f64().unwrap() as f32,
                audio_tokens: sound(&part[3]),
            }),
            "frames" => {
                let frames = grid(&part[1]);
                for _ in 0..frames.time {
                    segments.push(Segment::Text(part[2].as_u64().unwrap() as usize));
                    let frame = Grid { time: 1, ..frames };
                    segments.push(Segment::video(frame));
                }
            }
            other => panic!("{other}"),
        }
    }
    segments
}

/// As processors give them: images, and whole videos with their seconds.
fn grids_of(sequence: &Value) -> (Vec<Grid>, Vec<(Grid, f32)>) {
    let (mut images, mut videos) = (Vec::new(), Vec::new());
    for part in sequence.as_array().unwrap() {
        match part[0].as_str().unwrap() {
            "image" => images.push(grid(&part[1])),
            "video" => videos.push((grid(&part[1]), part[2].as_f64().unwrap() as f32)),
            "frames" => videos.push((grid(&part[1]), 1.0)),
            _ => {}
        }
    }
    (images, videos)
}

/// Neighbouring texts as one.
fn joined(segments: &[Segment]) -> Vec<Segment> {
    let mut joined: Vec<Segment> = Vec::new();
    for &segment in segments {
        match (joined.last_mut(), segment) {
            (_, Segment::Text(0)) => {}
            (Some(Segment::Text(before)), Segment::Text(tokens)) => *before += tokens,
            _ => joined.push(segment),
        }
    }
    joined
}

fn token_types(row: &[i64]) -> Vec<TokenType> {
    let token_type = |&value: &i64| match value {
        0 => Some(TokenType::Text),
        1 => Some(TokenType::Image),
        2 => Some(TokenType::Video),
        -1 => None,
        other => panic!("{other}"),
    };
    row.iter().filter_map(token_type).collect()
}

fn index_goldens_agree(version: &str, resume: Resume) {
    for golden in goldens(version) {
        let Golden { name, case, .. } = &golden;
        if case["model"].is_null() {
            continue;
        }
        let model = case["model"].as_str().unwrap();
        // These go on after the largest in each version.
        let omni = model.contains("omni");
        let index = match omni {
            true => index_of(case),
            false => index_of(case).with_resume(resume),
        };
        let sequences = case["sequences"].as_array().unwrap();
        let segments = sequences
            .iter()
            .map(|sequence| segments_of(model, sequence));
        let segments: Vec<_> = segments.collect();
        let padding = match case["padding"].as_str().unwrap() {
            "left" => Padding::Left,
            _ => Padding::Right,
        };
        let all: Vec<_> = segments.iter().map(|segments| &segments[..]).collect();
        let ours = index.position_ids_of_batch(&all, padding).unwrap();

        let (shape, theirs) = golden.integers("position_ids");
        assert_eq!([3, ours.batch(), ours.tokens()], shape[..], "{name}");
        assert_eq!(ours.ids(), theirs, "{name}");

        let (_, types) = golden.integers("token_types");
        let (_, deltas) = golden.integers("deltas");
        for (row, sequence) in sequences.iter().enumerate() {
            let types = token_types(&types[row * ours.tokens()..][..ours.tokens()]);
            // Version 4 counts padding among the tokens here.
            let padding = match version {
                "v4_" => (ours.tokens() - types.len()) as i64,
                _ => 0,
            };
            assert_eq!(ours.deltas()[row], deltas[row] + padding, "{name}");
            if omni {
                let alone = index.position_ids(&segments[row]).unwrap();
                assert_eq!(alone.deltas(), [ours.deltas()[row]], "{name}");
                continue;
            }
            let (images, videos) = grids_of(sequence);
            let found = index.segments(&types, &images, &videos).unwrap();
            assert_eq!(found, joined(&segments[row]), "{name}");
            let alone = index.position_ids(&found).unwrap();
            assert_eq!(alone.deltas(), [ours.deltas()[row]], "{name}");
        }
    }
}

#[test]
fn positions_are_those_of_transformers_5() {
    index_goldens_agree("v5_", Resume::AfterSides);
}

#[test]
fn positions_are_those_of_transformers_4() {
    assert_eq!(Resume::default(), Resume::AfterLargest);
    index_goldens_agree("v4_", Resume::AfterLargest);
}

#[test]
fn patches_of_vision_towers_are_those_of_transformers() {
    for golden in goldens("v5_vision_") {
        let case = &golden.case;
        let grids: Vec<_> = case["grids"].as_array().unwrap().iter().map(grid).collect();
        let merge = case["spatial_merge_size"].as_u64().unwrap() as usize;
        let (shape, theirs) = golden.integers("position_ids");
        let ours = vision_position_ids(&grids, merge).unwrap();
        assert_eq!(ours, theirs, "{}", golden.name);
        assert_eq!(shape, [2, ours.len() / 2], "{}", golden.name);
    }
}

#[test]
fn windows_of_vision_towers_are_those_of_transformers() {
    for golden in goldens("v5_windows_") {
        let Golden { name, case, .. } = &golden;
        let grids: Vec<_> = case["grids"].as_array().unwrap().iter().map(grid).collect();
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let [merge, window, patch] = ["spatial_merge_size", "window_size", "patch_size"].map(size);
        let ours = VisionWindows::new(&grids, merge, window, patch).unwrap();
        let order: Vec<_> = ours.token_order().iter().map(|&i| i as i64).collect();
        let ends: Vec<_> = ours.cu_seqlens().iter().map(|&i| i64::from(i)).collect();
        assert_eq!(order, golden.integers("token_order").1, "{name}");
        assert_eq!(ends, golden.integers("cu_seqlens").1, "{name}");
        let (shape, theirs) = golden.integers("position_ids");
        assert_eq!(shape, [2, ours.position_ids().len() / 2], "{name}");
        assert_eq!(ours.position_ids(), theirs, "{name}");
    }
}

// ---- what follows from the rule ----

/// Axis by axis, for one sequence.
fn columns(ids: &PositionIds) -> Vec<[i64; 3]> {
    assert_eq!(ids.batch(), 1);
    let at = |axis: usize, token: usize| ids.ids()[axis * ids.tokens() + token];
    (0..ids.tokens())
        .map(|token| [at(0, token), at(1, token), at(2, token)])
        .collect()
}

#[test]
fn decoding_goes_on_where_text_would_have() {
    let index = RopeIndex::qwen2_5_vl(2, 2.0).unwrap();
    let prompt = [
        Segment::Text(6),
        Segment::Video {
            grid: Grid::video(5, 4, 8),
            seconds_per_grid: 1.5,
        },
        Segment::Text(3),
    ];
    let more = [&prompt[..], &[Segment::Text(4)]].concat();
    let (ids, whole) = (
        index.position_ids(&prompt).unwrap(),
        index.position_ids(&more).unwrap(),
    );
    let (seen, all) = (columns(&ids), columns(&whole));
    assert_eq!(seen[..], all[..seen.len()]);
    for (token, at) in all.iter().enumerate().skip(seen.len()) {
        assert_eq!([ids.position_of(0, token); 3], *at);
    }
    // The last frame is at 6 + 4 * 3.
    assert_eq!(all[seen.len() - 3], [19; 3]);
}

#[test]
fn tokens_of_text_rotate_as_they_do_without_axes() {
    let config = RopeConfig::new(10_000.0, 16)
        .unwrap()
        .with_axes(Axes::MropeSections([2, 3, 3]));
    let rotator = Host::new().rotator(&config.rope().unwrap());
    let plan = rotator
        .plan(&Problem::new(Dtype::F32).q(Layout::tokens(7, 2, 16)))
        .unwrap();
    let rotated = |positions: Positions<'_>| {
        let mut q: Vec<f32> = (0..7 * 2 * 16).map(|i| i as f32).collect();
        rotator
            .rotate(&plan, Some(InOut::InPlace(&mut q[..])), None, positions)
            .unwrap();
        q
    };
    let ids = RopeIndex::qwen2_vl(2)
        .unwrap()
        .position_ids(&[Segment::Text(7)])
        .unwrap();
    assert_eq!(rotated(ids.positions()), rotated(Positions::start(0)));
    assert_eq!(ids.deltas(), [0]);
}

#[test]
fn nothing_to_number_is_no_error() {
    let index = RopeIndex::qwen2_vl(2).unwrap();
    for sequences in [&[][..], &[&[][..]], &[&[Segment::Text(0)], &[]]] {
        let ids = index
            .position_ids_of_batch(sequences, Padding::Left)
            .unwrap();
        assert_eq!((ids.tokens(), ids.ids().len()), (0, 0));
        assert_eq!(ids.deltas(), vec![0; sequences.len()]);
    }
    assert_eq!(vision_position_ids(&[], 2), Ok(vec![]));
    assert_eq!(index.segments(&[], &[], &[]), Ok(vec![]));
}

fn segment() -> impl Strategy<Value = Segment> {
    let grid = (1usize..4, 1usize..5, 1usize..5);
    prop_oneof![
        (0usize..6).prop_map(Segment::Text),
        (1usize..5, 1usize..5).prop_map(|(h, w)| Segment::Image(Grid::image(2 * h, 2 * w))),
        (grid, 0u8..5).prop_map(|((t, h, w), quarters)| Segment::Video {
            grid: Grid::video(t, 2 * h, 2 * w),
            seconds_per_grid: f32::from(quarters) / 4.0,
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Types of tokens and grids say the same as segments, also where images have no text between.
    #[test]
    fn segments_are_found_by_token_types(segments in prop::collection::vec(segment(), 0..8)) {
        let (mut types, mut images, mut videos) = (Vec::new(), Vec::new(), Vec::new());
        for &segment in &segments {
            let (token_type, tokens) = match segment {
                Segment::Text(tokens) => (TokenType::Text, tokens),
                Segment::Image(grid) => {
                    images.push(grid);
                    (TokenType::Image, grid.height * grid.width / 4)
                }
                Segment::Video { grid, seconds_per_grid } => {
                    videos.push((grid, seconds_per_grid));
                    (TokenType::Video, grid.time * grid.height * grid.width / 4)
                }
                other => panic!("{other:?}"),
            };
            types.extend(std::iter::repeat_n(token_type, tokens));
        }
        let index = RopeIndex::qwen2_5_vl(2, 4.0).unwrap();
        prop_assert_eq!(index.segments(&types, &images, &videos).unwrap(), joined(&segments));
        let ids = index.position_ids(&segments).unwrap();
        prop_assert_eq!(ids.tokens(), types.len());
    }

    /// Each sequence of a batch has the positions that it has alone; padding has zeros.
    #[test]
    fn sequences_of_a_batch_do_not_see_each_other(
        sequences in prop::collection::vec(prop::collection::vec(segment(), 0..5), 1..4),
        left in any::<bool>(),
    ) {
        let index = RopeIndex::qwen2_5_vl(2, 4.0).unwrap();
        let all: Vec<_> = sequences.iter().map(|segments| &segments[..]).collect();
        let padding = if left { Padding::Left } else { Padding::Right };
        let ids = index.position_ids_of_batch(&all, padding).unwrap();
        for (row, segments) in sequences.iter().enumerate() {
            let alone = index.position_ids(segments).unwrap();
            prop_assert_eq!(ids.deltas()[row], alone.deltas()[0]);
            let first = if left { ids.tokens() - alone.tokens() } else { 0 };
            for axis in 0..3 {
                let start = (axis * ids.batch() + row) * ids.tokens();
                let of_row = &ids.ids()[start..start + ids.tokens()];
                let expected = &alone.ids()[axis * alone.tokens()..][..alone.tokens()];
                prop_assert_eq!(&of_row[first..first + alone.tokens()], expected);
                let filling = of_row[..first].iter().chain(&of_row[first + alone.tokens()..]);
                prop_assert!(filling.copied().all(|id| id == 0));
            }
        }
    }
}

#[test]
fn sound_is_numbered_as_text_is() {
    let spoken = [Segment::Text(2), Segment::Audio(5), Segment::Text(1)];
    for index in [
        RopeIndex::qwen2_5_omni(2, 25.0, 2.0),
        RopeIndex::qwen3_omni(2, 13.0),
    ] {
        let ids = index.unwrap().position_ids(&spoken).unwrap();
        assert_eq!(columns(&ids), (0..8).map(|at| [at; 3]).collect::<Vec<_>>());
        assert_eq!(ids.deltas(), [0]);
    }
}

/// A mixture of video and sound, from which nothing is missing, for both models: even where one of them
/// is absent or times stand still.
#[test]
fn video_and_sound_take_turns() {
    for (frames, seconds, audio_tokens) in [
        (1, 1.0, 0),
        (3, 0.0, 7),
        (4, 1.0, 1),
        (2, 9.0, 400),
        (9, 1.0, 50),
    ] {
        let clip = Segment::VideoWithAudio {
            grid: Grid::video(frames, 4, 2),
            seconds_per_grid: seconds,
            audio_tokens,
        };
        for (index, first, rate) in [
            (RopeIndex::qwen2_5_omni(2, 25.0, 2.0), 4, 25),
            (RopeIndex::qwen3_omni(2, 13.0), 5, 13),
        ] {
            let ids = index
                .unwrap()
                .position_ids(&[Segment::Text(3), clip])
                .unwrap();
            let all = columns(&ids);
            assert_eq!(all.len(), 3 + 2 + 2 * frames + audio_tokens + 2);
            assert_eq!(all[3..5], [[3; 3], [first - 1; 3]]);
            let mut found = all[5..all.len() - 2].to_vec();
            let time = |frame: usize| first + frame as i64 * seconds as i64 * rate;
            let video = (0..2 * frames).map(|i| [time(i / 2), first + i as i64 % 2, first]);
            let mut expected: Vec<_> = video.collect();
            expected.extend((0..audio_tokens as i64).map(|i| [first + i; 3]));
            found.sort();
            expected.sort();
            assert_eq!(found, expected);
            let largest = all.iter().flatten().max().unwrap();
            assert_eq!(ids.deltas(), [largest + 1 - all.len() as i64]);
        }
    }
}

// ---- what is refused ----

#[test]
fn merge_sizes_of_0_are_refused() {
    let named = |error: MultimodalError, name: &str| {
        assert!(
            matches!(error, MultimodalError::MergeSize { name: found } if found == name),
            "{error}"
        );
    };
    for index in [
        RopeIndex::qwen2_vl(0),
        RopeIndex::qwen2_5_vl(0, 2.0),
        RopeIndex::qwen3_vl(0),
        RopeIndex::glm4v(0),
        RopeIndex::qwen2_5_omni(0, 25.0, 2.0),
        RopeIndex::qwen3_omni(0, 13.0),
        RopeIndex::ernie4_5_vl(0, 2),
    ] {
        named(index.unwrap_err(), "spatial_merge_size");
    }
    named(
        RopeIndex::ernie4_5_vl(2, 0).unwrap_err(),
        "temporal_merge_size",
    );
    named(
        vision_position_ids(&[], 0).unwrap_err(),
        "spatial_merge_size",
    );
    named(
        VisionWindows::new(&[], 0, 112, 14).unwrap_err(),
        "spatial_merge_size",
    );
}

#[test]
fn grids_that_do_not_merge_are_refused() {
    let qwen = RopeIndex::qwen2_vl(2).unwrap();
    let good = Segment::Image(Grid::image(4, 4));
    for (time, height, width) in [(0, 4, 4), (1, 0, 4), (1, 4, 0), (1, 5, 4), (1, 4, 3)] {
        let bad = Grid::video(time, height, width);
        for segment in [Segment::Image(bad), Segment::video(bad)] {
            let error = qwen.position_ids(&[good, Segment::Text(1), segment]);
            assert!(
                matches!(error, Err(MultimodalError::Grid { which: 1, grid, spatial_merge_size: 2, .. }) if grid == bad),
                "{error:?}"
            );
        }
        let grids = [Grid::image(2, 2), bad];
        let error = vision_position_ids(&grids, 2).unwrap_err();
        assert!(
            matches!(error, MultimodalError::Grid { which: 1, .. }),
            "{error:?}"
        );
        assert_eq!(VisionWindows::new(&grids, 2, 112, 14), Err(error));
    }
    let ernie = RopeIndex::ernie4_5_vl(2, 2).unwrap();
    let odd = Grid::video(3, 4, 4);
    let error = ernie.position_ids(&[Segment::video(odd)]).unwrap_err();
    assert!(
        error.to_string().contains("[3, 4, 4]") && error.to_string().contains("multiple of 2"),
        "{error}"
    );
    // An image is never merged over time.
    assert!(ernie.position_ids(&[good]).is_ok());
}

#[test]
fn videos_with_timestamps_come_frame_by_frame() {
    for index in [RopeIndex::qwen3_vl(2), RopeIndex::glm4v(2)] {
        let whole = Segment::video(Grid::video(3, 4, 4));
        let error = index.unwrap().position_ids(&[Segment::Text(2), whole]);
        assert_eq!(
            error,
            Err(MultimodalError::Frames {
                which: 0,
                frames: 3
            })
        );
    }
}

#[test]
fn seconds_without_meaning_are_refused() {
    for value in [-1.0, f32::NAN, f32::INFINITY, 1.1e9] {
        let error = RopeIndex::qwen2_5_vl(2, value).unwrap_err();
        assert!(error.to_string().contains("tokens_per_second"), "{error}");
        let video = Segment::Video {
            grid: Grid::video(2, 2, 2),
            seconds_per_grid: value,
        };
        let index = RopeIndex::qwen2_5_vl(2, 1.0).unwrap();
        let error = index.position_ids(&[video]).unwrap_err();
        assert!(error.to_string().contains("seconds_per_grid"), "{error}");
    }
}

#[test]
fn windows_smaller_than_a_token_are_refused() {
    let of = |window, patch| VisionWindows::new(&[Grid::image(4, 4)], 2, window, patch);
    assert_eq!(of(28, 14).unwrap().cu_seqlens(), [0, 4, 8, 12, 16]);
    assert_eq!(of(usize::MAX, 1).unwrap().cu_seqlens(), [0, 16]);
    for (window_size, patch_size) in [(27, 14), (0, 14), (112, 0)] {
        assert_eq!(
            of(window_size, patch_size),
            Err(MultimodalError::Window {
                window_size,
                patch_size,
                spatial_merge_size: 2
            })
        );
    }
}

#[test]
fn what_omni_models_cannot_number_is_refused() {
    let clip = |seconds_per_grid| Segment::VideoWithAudio {
        grid: Grid::video(3, 2, 2),
        seconds_per_grid,
        audio_tokens: 4,
    };
    let image = Segment::Image(Grid::image(2, 2));
    for index in [
        RopeIndex::qwen2_vl(2),
        RopeIndex::qwen2_5_vl(2, 2.0),
        RopeIndex::qwen3_vl(2),
    ] {
        let error = index.unwrap().position_ids(&[image, clip(1.0)]);
        assert_eq!(error, Err(MultimodalError::NoAudio { which: 1 }));
    }
    // 13 positions a second: half of one is between two.
    let qwen3 = RopeIndex::qwen3_omni(2, 13.0).unwrap();
    let video = Segment::Video {
        grid: Grid::video(3, 2, 2),
        seconds_per_grid: 0.5,
    };
    for segment in [clip(0.5), video] {
        assert_eq!(
            qwen3.position_ids(&[image, segment]),
            Err(MultimodalError::Fraction {
                which: 1,
                frame: 1,
                time: 6.5
            })
        );
    }
    let qwen2_5 = RopeIndex::qwen2_5_omni(2, 13.0, 2.0).unwrap();
    assert_eq!(
        qwen2_5.position_ids(&[video]).unwrap().ids()[..3],
        [0, 6, 13]
    );
    for (rate, chunk) in [(25.0, 0.0), (0.0, 2.0), (0.5, 1.5)] {
        let error = RopeIndex::qwen2_5_omni(2, rate, chunk).unwrap_err();
        assert!(matches!(error, MultimodalError::Chunk { .. }), "{error}");
    }
    for value in [-1.0, f32::NAN, 1.1e9] {
        let named = |index: Result<RopeIndex, MultimodalError>, key: &str| {
            let error = index.unwrap_err().to_string();
            assert!(error.starts_with(key), "{error}");
        };
        named(
            RopeIndex::qwen2_5_omni(2, value, 2.0),
            "position_id_per_seconds is",
        );
        named(
            RopeIndex::qwen2_5_omni(2, 25.0, value),
            "seconds_per_chunk is",
        );
        named(
            RopeIndex::qwen3_omni(2, value),
            "position_id_per_seconds is",
        );
        for index in [&qwen3, &qwen2_5] {
            let error = index.position_ids(&[clip(value)]).unwrap_err().to_string();
            assert!(error.starts_with("seconds_per_grid is"), "{error}");
        }
    }
    // 13 billion positions a frame.
    let long = Segment::VideoWithAudio {
        grid: Grid::video(9, 2, 2),
        seconds_per_grid: 1e9,
        audio_tokens: 4,
    };
    for index in [qwen3, qwen2_5] {
        let error = index.position_ids(&[image, long]).unwrap_err();
        assert!(
            matches!(error, MultimodalError::TooLong { which: 1, .. }),
            "{error}"
        );
        // The sixth frame is at 65 billion, the seventh at 78; 2^36 is 69.
        for (frames, fits) in [(6, true), (7, false)] {
            let video = Segment::Video {
                grid: Grid::video(frames, 2, 2),
                seconds_per_grid: 1e9,
            };
            assert_eq!(index.position_ids(&[video]).is_ok(), fits);
        }
    }
}

/// Sizes from a broken file end in an error at once: nothing of their size is allocated or counted.
#[test]
fn sizes_from_a_broken_file_are_refused() {
    let qwen = RopeIndex::qwen2_vl(1).unwrap();
    let many = |segments: &[Segment]| {
        let error = qwen.position_ids(segments);
        assert!(
            matches!(error, Err(MultimodalError::TooManyTokens { .. })),
            "{error:?}"
        );
    };
    for huge in [1 << 27, 1 << 40, usize::MAX] {
        many(&[Segment::Text(huge)]);
        many(&[Segment::Text(huge), Segment::Text(huge)]);
        many(&[Segment::Image(Grid::image(huge, huge))]);
        many(&[
            Segment::video(Grid::video(huge, huge, huge)),
            Segment::Text(1),
        ]);
        for (side, audio_tokens) in [(huge, 1), (1, huge)] {
            let clip = Segment::VideoWithAudio {
                grid: Grid::image(side, side),
                seconds_per_grid: 1.0,
                audio_tokens,
            };
            let omni = RopeIndex::qwen2_5_omni(1, 25.0, 2.0).unwrap();
            let error = omni.position_ids(&[clip]);
            assert!(
                matches!(error, Err(MultimodalError::TooManyTokens { .. })),
                "{error:?}"
            );
        }
        let error = vision_position_ids(&[Grid::image(1, 1), Grid::image(huge, 1)], 1);
        assert!(
            matches!(error, Err(MultimodalError::TooManyTokens { .. })),
            "{error:?}"
        );
        // A short sequence beside a long one takes as much room.
        let error = qwen.position_ids_of_batch(&[&[Segment::Text(huge)], &[]], Padding::Left);
        assert!(
            matches!(error, Err(MultimodalError::TooManyTokens { .. })),
            "{error:?}"
        );
        let timestamps = RopeIndex::qwen3_vl(1).unwrap();
        let frames = (Grid::video(huge, 1, 1), 1.0);
        assert_eq!(
            timestamps.segments(&[TokenType::Video; 2], &[], &[frames, frames]),
            Err(MultimodalError::LeftOver {
                token_type: TokenType::Video
            })
        );
    }
    let video = Segment::Video {
        grid: Grid::video(200, 1, 1),
        seconds_per_grid: 1e9,
    };
    let fast = RopeIndex::qwen2_5_vl(1, 1e9).unwrap();
    let error = fast.position_ids(&[Segment::Text(1), video]).unwrap_err();
    assert!(
        matches!(error, MultimodalError::TooLong { which: 0, .. }),
        "{error}"
    );
}

#[test]
fn token_types_have_to_fit_their_grids() {
    use TokenType::{Image, Text, Video};
    let index = RopeIndex::qwen2_vl(2).unwrap();
    let four = Grid::image(4, 4);
    let refused = |types: &[TokenType], images: &[Grid], what: &str| {
        let error = index.segments(types, images, &[]).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(
        &[Text, Image, Image],
        &[],
        "tokens 1..3 are of the type Image, but no grid",
    );
    refused(&[Image; 3], &[four], "tokens 0..3");
    refused(&[Image; 3], &[four], "stands for 4 tokens");
    refused(&[Text, Text, Image, Image, Image], &[four], "tokens 2..5");
    refused(&[Image; 5], &[four], "tokens 4..5");
    refused(
        &[Image; 4],
        &[four, four],
        "more grids than tokens of the type Image",
    );
    refused(&[Video; 4], &[four], "no grid is left");
    let left = index.segments(&[Text], &[], &[(four, 1.0)]).unwrap_err();
    assert_eq!(left, MultimodalError::LeftOver { token_type: Video });
    let empty =
        RopeIndex::qwen3_vl(2)
            .unwrap()
            .segments(&[Text], &[], &[(Grid::video(0, 4, 4), 1.0)]);
    assert!(empty.is_err());
}
