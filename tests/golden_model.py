"""The recorded model of the published code (tests/golden/), converted to this library's layout.

The published predictors give (keep, drop), ours (drop, keep): the conversion swaps the rows of their last layers, and
tests swap the recorded two-channel noise. tests/golden/ holds the recordings and says how they were made.
"""

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.names import PUBLISHED, has_keep_first, to_ours

FOLDER = Path(__file__).parent / "golden"
OFFICIAL_IMAGE, IMAGE_TOKEN = -200, 127
"""-200 marks an image in the published code's ids; 127 is the one id that no recording uses."""
TOKENS_PER_IMAGE = 16


def recording(name):
    """Return the tensors of tests/golden/<name>.safetensors."""
    return load_file(FOLDER / f"{name}.safetensors")


def facts(name):
    """Return tests/golden/<name>.json."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def our_name(official):
    """Translate the name of a tensor."""
    return to_ours(official, PUBLISHED)[0]


def our_value(official, tensor):
    """Translate a tensor or its gradient: the two rows of a predictor's last layer change places."""
    return tensor.flip(0) if has_keep_first(*to_ours(official, PUBLISHED)) else tensor


def golden_folder(folder, **settings):
    """Write the recorded model as a checkpoint of the published code, with `settings` added to its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts("config") | settings), encoding="utf-8")
    (folder / "model.safetensors").write_bytes((FOLDER / "model.safetensors").read_bytes())
    return folder


@lru_cache(maxsize=2)
def golden_model(attention="sdpa"):
    """Return the recorded model; shared, so nothing may write to its weights.

    <image> is one of its 128 words: a larger head would change the recorded loss.
    """
    with tempfile.TemporaryDirectory() as place:
        source = golden_folder(Path(place) / "published", image_token_index=IMAGE_TOKEN)
        converted = convert(source, Path(place) / "ours", say=lambda line: None)
        model = DynamicLlavaForConditionalGeneration.from_pretrained(
            converted, attn_implementation=attention, sparsity={"cache_block": 8}
        )
    model.generation_config.eos_token_id = None
    return model.eval()


def expand(ids, values=None, filler=0):
    """Replace the single -200 of each row of ids (B, n) by 16 image tokens.

    With `values` (B, n), such as labels or a mask, the same places are filled with `filler` instead.
    """
    rows = []
    for row, source in zip(ids, ids if values is None else values, strict=True):
        place = int((row == OFFICIAL_IMAGE).nonzero())  # one image per row in every recording
        image = torch.full((TOKENS_PER_IMAGE,), IMAGE_TOKEN if values is None else filler, dtype=source.dtype)
        rows.append(torch.cat([source[:place], image, source[place + 1 :]]))
    return torch.stack(rows)
