#!/usr/bin/env python3
"""Make tests/goldens/positions/*: position ids of images and video, by Hugging Face transformers.

What
----
v5_*.safetensors (transformers 5.23) and v4_*.safetensors (transformers 4.57) are each one
call of a model's own get_rope_index:

    position_ids    i64 [3, batch, tokens]  time, height, width
    deltas          i64 [batch]             mrope_position_deltas
    token_types     i64 [batch, tokens]     mm_token_type_ids; -1 is padding

"case" is JSON: "model" is the module, "vision_config" what the method reads of it,
"sequences" lists the parts of each sequence: ["text", tokens], ["image", [t, h, w]] or
["video", [t, h, w], seconds_per_grid], grids in patches; "padding" is the padded side.
For models with timestamps a video stands for its frames, ["frames", [t, h, w], n]: n
tokens of text before each frame. For the Omni models, which number sound too,
["audio", n] has n frames of a spectrogram and ["video_with_audio", [t, h, w],
seconds_per_grid, n] is a video with its sound, between two marks on either side.

v5_vision_*.safetensors hold position_ids [2, patches] (row, column) of vision towers: by
get_vision_position_ids, and by a tiny PixtralVisionModel, what its forward pass gives its
rotary embedding. "case" has "grids" and "spatial_merge_size". v5_windows_*.safetensors
hold token_order [tokens], cu_seqlens [windows + 1] and position_ids [2, patches], by
get_vision_window_index and the way in which Qwen2.5-VL's tower sorts its angles.

How to run
----------
    python -m venv venv && . venv/bin/activate
    pip install -r scripts/goldens/requirements-transformers.txt
    python scripts/goldens/transformers-positions.py            # write v5_*
    python scripts/goldens/transformers-positions.py --check    # recompute, compare the bytes

and the same with requirements-transformers-4.txt, in an environment of its own, for v4_*:
up to that version the tokens after a video go on after its largest position.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import importlib
import sys
from types import SimpleNamespace

import torch
import transformers

# The shared file is beside this one; no cache folder is left there.
sys.dont_write_bytecode = True
from golden_files import golden, run

VERSION = transformers.__version__
MAJOR = int(VERSION.split(".")[0])
IMAGE, VIDEO, START, AUDIO, AUDIO_START, WORD, PAD = 101, 102, 103, 104, 105, 7, 0
CLASSES = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl": "Qwen3VLModel",
    "glm4v": "Glm4vModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeModel",
    "qwen2_5_omni": "Qwen2_5OmniPreTrainedModelForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoePreTrainedModelForConditionalGeneration",
}


def call(model, *sequences, padding="right", **vision_config):
    return {
        "model": model,
        "vision_config": {"spatial_merge_size": 2} | vision_config,
        "sequences": sequences,
        "padding": padding,
    }


def text(tokens):
    return ["text", tokens]


def image(height, width):
    return ["image", [1, height, width]]


def video(time, height, width, seconds=1.0):
    return ["video", [time, height, width], seconds]


def audio(features):
    return ["audio", features]


def video_with_audio(time, height, width, seconds, features):
    return ["video_with_audio", [time, height, width], seconds, features]


def frames(time, height, width, timestamp):
    return ["frames", [time, height, width], timestamp]


def shared_cases():
    """What both versions compute."""
    batch = (
        [text(3), image(4, 8), text(6)],
        [text(2), image(6, 2), text(1), video(2, 4, 4), text(20)],
        [text(5), video(9, 2, 4), text(2)],
    )
    timed = {"tokens_per_second": 2}
    return {
        "qwen2_vl_image": call("qwen2_vl", [text(5), image(8, 12), text(9)]),
        "qwen2_vl_images": call(
            "qwen2_vl", [text(4), image(4, 10), text(3), image(12, 2), text(1), image(2, 2), text(2)]
        ),
        "qwen2_vl_image_last": call("qwen2_vl", [text(2), image(4, 6)]),
        "qwen2_vl_no_merge": call("qwen2_vl", [text(3), image(3, 5), text(2)], spatial_merge_size=1),
        "qwen2_vl_video_short": call("qwen2_vl", [text(4), video(3, 8, 6), text(4)]),
        # More frames than rows and columns: the versions differ in what follows.
        "qwen2_vl_video_long": call("qwen2_vl", [text(4), video(9, 4, 4), text(4), image(4, 4), text(2)]),
        "qwen2_vl_batch_right": call("qwen2_vl", *batch),
        "qwen2_vl_batch_left": call("qwen2_vl", *batch, padding="left"),
        "qwen2_5_vl_video": call("qwen2_5_vl", [text(4), video(5, 4, 6, 1.0), text(4)], **timed),
        "qwen2_5_vl_video_slow": call(
            "qwen2_5_vl", [text(4), video(4, 4, 6, 3.0), text(4), image(4, 4), text(3)], **timed
        ),
        "qwen3_vl_frames": call("qwen3_vl", [text(4), frames(4, 6, 4, 5), text(3), image(4, 4), text(2)]),
    }


def cases():
    made = shared_cases()
    if MAJOR < 5:
        return made
    timed = {"tokens_per_second": 2}
    return made | omni_cases() | {
        "qwen2_vl_text": call("qwen2_vl", [text(7)]),
        "qwen2_vl_image_first": call("qwen2_vl", [image(4, 6), text(3)]),
        "qwen2_5_vl_video_half_seconds": call(
            "qwen2_5_vl", [text(3), video(7, 4, 4, 0.5), text(2), video(5, 2, 2, 0.75), text(2)], **timed
        ),
        # 30 frames a second, two to a patch.
        "qwen2_5_vl_video_fast": call("qwen2_5_vl", [text(3), video(80, 2, 2, 2 / 30), text(2)], **timed),
        # f32 products that land on whole numbers, where f64 stays below them.
        "qwen2_5_vl_video_f32": call(
            "qwen2_5_vl", [text(1), video(100, 2, 2, 0.29), text(1)], tokens_per_second=100
        ),
        "qwen2_5_vl_still": call("qwen2_5_vl", [text(3), video(4, 2, 2, 0.0), text(2)], **timed),
        "qwen3_vl_batch_left": call(
            "qwen3_vl",
            [text(4), frames(3, 4, 4, 6), text(3)],
            [text(2), image(6, 8), text(1), frames(2, 4, 8, 7), text(9)],
            padding="left",
        ),
        "glm4v_frames": call("glm4v", [text(4), frames(3, 6, 8, 4), text(3), image(4, 4), text(2)]),
        "ernie_image_and_video": call(
            "ernie4_5_vl_moe",
            [text(4), image(4, 6), text(3), video(12, 4, 4), text(5)],
            [text(2), video(2, 8, 4), text(2)],
            temporal_merge_size=2,
        ),
    }


def omni_cases():
    made = {}
    for model, rate in (("qwen2_5_omni", 25), ("qwen3_omni_moe", 13)):
        timed = {"position_id_per_seconds": rate}
        if model == "qwen2_5_omni":
            timed["seconds_per_chunk"] = 2
        short = model.removesuffix("_moe")
        made |= {
            f"{short}_audio": call(model, [text(4), audio(333), text(3), audio(9), text(2), audio(90), text(5)], **timed),
            f"{short}_all": call(
                model,
                [text(3), image(4, 6), text(2), audio(150), text(3), video(3, 4, 6, 1.0), text(2), image(2, 2), text(4)],
                [text(5), audio(41), text(2)],
                padding="left", **timed,
            ),
            # The sound is at its end sooner than the video, and later.
            f"{short}_video_longer": call(model, [text(3), video_with_audio(5, 4, 4, 1.0, 230), text(4)], **timed),
            f"{short}_audio_longer": call(model, [text(3), video_with_audio(3, 4, 4, 1.0, 900), text(4)], **timed),
            # Rows and columns reach further than times.
            f"{short}_wide": call(model, [text(3), video_with_audio(1, 4, 160, 1.0, 40), text(4)], **timed),
            # Frames that are further apart than a chunk is long.
            f"{short}_slow": call(model, [text(3), video_with_audio(3, 4, 4, 5.0, 700), text(4)], **timed),
            f"{short}_two": call(
                model,
                [text(3), video_with_audio(2, 4, 4, 2.0, 300), text(1), image(4, 4), text(2), audio(80), text(2),
                 video_with_audio(4, 2, 2, 1.0, 420), text(3)],
                [text(1), audio(10), text(1)],
                **timed,
            ),
        }
    made |= {
        # Times lose their fractions.
        "qwen2_5_omni_video_fast": call(
            "qwen2_5_omni", [text(3), video(80, 2, 2, 2 / 30), text(2)], position_id_per_seconds=25, seconds_per_chunk=2
        ),
        # (frame * seconds) * rate, rounded twice, is not frame * (rate * seconds).
        "qwen2_5_omni_video_f32": call(
            "qwen2_5_omni", [text(1), video(100, 2, 2, 0.29), text(1)], position_id_per_seconds=100, seconds_per_chunk=2
        ),
        "qwen2_5_omni_short_chunks": call(
            "qwen2_5_omni", [text(1), video_with_audio(9, 2, 4, 0.3, 250), text(1)],
            position_id_per_seconds=7, seconds_per_chunk=0.5,
        ),
    }
    return made


def parts(sequence):
    """(token type, tokens, grid, seconds) of each run of equal tokens."""
    for kind, size, *more in sequence:
        if kind in ("text", "audio"):
            yield kind, size, None, None
        elif kind == "frames":
            for _ in range(size[0]):
                yield "text", more[0], None, None
                yield "video", None, [1, *size[1:]], None
        else:
            yield kind, more[1] if kind == "video_with_audio" else None, size, more[0] if more else None


def audio_tokens(case, features):
    """As the encoders of sound have them."""
    module = importlib.import_module(f"transformers.models.{case['model']}.modeling_{case['model']}")
    features = torch.tensor(features)
    if case["model"] == "qwen2_5_omni":
        # What get_rope_index writes out each time.
        return ((features - 1) // 2 + 1 - 2) // 2 + 1
    return module._get_feat_extract_output_lengths(features, 50)


def inputs(case):
    """Token ids, their types, the mask, and the grids, as a processor makes them."""
    merge = case["vision_config"]["spatial_merge_size"]
    temporal = case["vision_config"].get("temporal_merge_size", 1)
    ids, types, images, videos, seconds, sounds = [], [], [], [], [], []
    for sequence in case["sequences"]:
        row, kinds = [], []
        for kind, size, grid, each in parts(sequence):
            if grid:
                time, height, width = grid
                tokens = time * (height // merge) * (width // merge)
            if kind == "text":
                row += [WORD] * size
                kinds += [0] * size
            elif kind == "audio":
                tokens = int(audio_tokens(case, size))
                sounds.append(size)
                row[-1] = AUDIO_START
                row += [AUDIO] * tokens
                kinds += [0] * tokens
            elif kind == "video_with_audio":
                sounds.append(size)
                seconds.append(each)
                of_sound = int(audio_tokens(case, size))
                # The method only counts them.
                row += [START, AUDIO_START, *[VIDEO] * tokens, *[AUDIO] * of_sound, WORD, WORD]
                kinds += [2] * (tokens + of_sound + 4)
            else:
                if kind == "video":
                    tokens //= temporal
                    seconds.append(each)
                # The last word before is the one that marks the beginning.
                if row:
                    row[-1] = START
                row += [IMAGE if kind == "image" else VIDEO] * tokens
                if kind == "image":
                    images.append(grid)
                kinds += [1 if kind == "image" else 2] * tokens
        for kind, size, *_ in sequence:
            if kind in ("video", "frames", "video_with_audio"):
                videos.append(size)
        ids.append(row)
        types.append(kinds)
    longest = max(map(len, ids))

    def padded(row, filler):
        filling = [filler] * (longest - len(row))
        return row + filling if case["padding"] == "right" else filling + row

    ids = torch.tensor([padded(row, PAD) for row in ids])
    types = torch.tensor([padded(row, -1) for row in types])
    grids = [torch.tensor(grid) if grid else None for grid in (images, videos)]
    return ids, types, grids, [each for each in seconds if each is not None], sounds


def compute_case(case):
    ids, types, (images, videos), seconds, sounds = inputs(case)
    name = case["model"]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model = getattr(module, CLASSES[name])
    config = SimpleNamespace(
        vision_config=SimpleNamespace(**case["vision_config"]),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
    )
    # The method reads nothing of a model but its config.
    stub = SimpleNamespace(config=config)
    arguments = {
        "image_grid_thw": images,
        "video_grid_thw": videos,
        "attention_mask": (types >= 0).long(),
    }
    if name == "qwen2_5_vl":
        arguments["second_per_grid_ts"] = torch.tensor(seconds)
    if "omni" in name:
        timed = {key: case["vision_config"].get(key) for key in ("position_id_per_seconds", "seconds_per_chunk")}
        stub.config = SimpleNamespace(
            image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO,
            vision_start_token_id=START, audio_start_token_id=AUDIO_START,
            audio_config=SimpleNamespace(n_window=50), **timed,
        )
        stub.spatial_merge_size = case["vision_config"]["spatial_merge_size"]
        for method in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
            setattr(stub, method, getattr(model, method).__get__(stub))
        arguments |= {
            "use_audio_in_video": any(part[0] == "video_with_audio" for row in case["sequences"] for part in row),
            "audio_seqlens": torch.tensor(sounds),
            "second_per_grids": torch.tensor(seconds),
        }
    elif MAJOR >= 5:
        stub.get_vision_position_ids = model.get_vision_position_ids.__get__(stub)
        arguments["mm_token_type_ids"] = types
    position_ids, deltas = model.get_rope_index(stub, ids, **arguments)
    # Whole numbers in f32, for one of them.
    assert (position_ids == position_ids.long()).all() and (deltas == deltas.long()).all()
    position_ids, deltas = position_ids.long(), deltas.long()
    # The versions fill padding with different numbers, which no one reads.
    position_ids = position_ids.masked_fill(types < 0, 0)
    return {
        "position_ids": position_ids.numpy(),
        "deltas": deltas.reshape(-1).numpy(),
        "token_types": types.numpy(),
    }


def vision():
    """(case, position ids [patches, 2]) of the vision towers."""
    from transformers.vision_utils import get_vision_position_ids

    for name, merge, grids in (
        ("vision_merge_2", 2, [[1, 4, 6], [3, 2, 8], [1, 6, 2]]),
        ("vision_merge_1", 1, [[1, 3, 5], [2, 1, 4]]),
        ("vision_merge_3", 3, [[1, 6, 9]]),
    ):
        case = {"grids": grids, "spatial_merge_size": merge, "by": "get_vision_position_ids"}
        yield name, case, get_vision_position_ids(torch.tensor(grids), merge)

    from transformers import PixtralVisionConfig, PixtralVisionModel

    config = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=2,
    )
    model, grids, seen = PixtralVisionModel(config), [[1, 3, 5], [1, 4, 2], [1, 1, 1]], []
    model.patch_positional_embedding.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[1])
    )
    sizes = [(2 * height, 2 * width) for _, height, width in grids]
    pixels = torch.zeros(len(grids), 3, *(max(side) for side in zip(*sizes)))
    with torch.no_grad():
        model(pixels, image_sizes=sizes)
    case = {"grids": grids, "spatial_merge_size": 1, "by": "PixtralVisionModel"}
    yield "vision_pixtral", case, seen[0]


def windows():
    """(case, tensors) of towers that sort their tokens into windows."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    for name, grids, window in (
        # Whole windows, what is left at the edges, less than one window, and a video.
        ("windows_exact", [[1, 16, 8]], 112),
        ("windows_edges", [[1, 10, 22], [1, 2, 4], [1, 8, 18]], 112),
        ("windows_video", [[3, 6, 10], [1, 4, 4]], 56),
        ("windows_rounded_down", [[1, 8, 6]], 111),
    ):
        merge, patch = 2, 14
        case = {"grids": grids, "spatial_merge_size": merge, "window_size": window, "patch_size": patch}
        grids = torch.tensor(grids)
        order, cu_seqlens = get_vision_window_index(grids, merge, window, patch)
        ids = get_vision_position_ids(grids, merge)
        ids = ids.reshape(len(order), merge**2, 2)[order].reshape(-1, 2)
        yield name, case, {
            "token_order": order.numpy(),
            "cu_seqlens": cu_seqlens.long().numpy(),
            "position_ids": ids.T.contiguous().numpy(),
        }


def compute():
    peer = f"transformers {VERSION}, torch {torch.__version__.split('+')[0]} (CPU)"
    made_by = "transformers-positions.py"
    made = {name: (case, compute_case(case)) for name, case in cases().items()}
    if MAJOR >= 5:
        made |= {
            name: (case, {"position_ids": ids.T.contiguous().numpy()})
            for name, case, ids in vision()
        }
        made |= {name: (case, tensors) for name, case, tensors in windows()}
    return {
        f"v{MAJOR}_{name}.safetensors": golden(
            name, tensors, peer=peer, case=case, made_by=made_by
        )
        for name, (case, tensors) in made.items()
    }


if __name__ == "__main__":
    run("Make the goldens of position ids; see the top of this file.", "positions", f"v{MAJOR}_",
        compute)
