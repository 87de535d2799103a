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
tokens of text before each frame.

v5_vision_*.safetensors hold position_ids [2, patches] (row, column) of vision towers: by
get_vision_position_ids, and by a tiny PixtralVisionModel, what its forward pass gives its
rotary embedding. "case" has "grids" and "spatial_merge_size".

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
IMAGE, VIDEO, START, WORD, PAD = 101, 102, 103, 7, 0
CLASSES = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl": "Qwen3VLModel",
    "glm4v": "Glm4vModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeModel",
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
    return made | {
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


def parts(sequence):
    """(token type, tokens, grid, seconds) of each run of equal tokens."""
    for kind, size, *more in sequence:
        if kind == "text":
            yield 0, size, None, None
        elif kind == "frames":
            for _ in range(size[0]):
                yield 0, more[0], None, None
                yield 2, None, [1, *size[1:]], None
        else:
            yield {"image": 1, "video": 2}[kind], None, size, more[0] if more else None


def inputs(case):
    """Token ids, their types, the mask, and the grids, as a processor makes them."""
    merge = case["vision_config"]["spatial_merge_size"]
    temporal = case["vision_config"].get("temporal_merge_size", 1)
    ids, types, images, videos, seconds = [], [], [], [], []
    for sequence in case["sequences"]:
        row, kinds = [], []
        for kind, tokens, grid, each in parts(sequence):
            if kind == 0:
                row += [WORD] * tokens
            else:
                time, height, width = grid
                tokens = time * (height // merge) * (width // merge)
                if kind == 2:
                    tokens //= temporal
                    seconds.append(each)
                # The last word before is the one that marks the beginning.
                if row:
                    row[-1] = START
                row += [IMAGE if kind == 1 else VIDEO] * tokens
                if kind == 1:
                    images.append(grid)
            kinds += [kind] * tokens
        for kind, size, *_ in sequence:
            if kind in ("video", "frames"):
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
    return ids, types, grids, [each for each in seconds if each is not None]


def compute_case(case):
    ids, types, (images, videos), seconds = inputs(case)
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
    if MAJOR >= 5:
        stub.get_vision_position_ids = model.get_vision_position_ids.__get__(stub)
        arguments["mm_token_type_ids"] = types
    position_ids, deltas = model.get_rope_index(stub, ids, **arguments)
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


def compute():
    peer = f"transformers {VERSION}, torch {torch.__version__.split('+')[0]} (CPU)"
    made_by = "transformers-positions.py"
    made = {name: (case, compute_case(case)) for name, case in cases().items()}
    if MAJOR >= 5:
        made |= {
            name: (case, {"position_ids": ids.T.contiguous().numpy()})
            for name, case, ids in vision()
        }
    return {
        f"v{MAJOR}_{name}.safetensors": golden(
            name, tensors, peer=peer, case=case, made_by=made_by
        )
        for name, (case, tensors) in made.items()
    }


if __name__ == "__main__":
    run("Make the goldens of position ids; see the top of this file.", "positions", f"v{MAJOR}_",
        compute)
