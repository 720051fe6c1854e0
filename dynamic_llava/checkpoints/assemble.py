"""A LLaVA put together from a language model and a vision tower, as LLaVA's first stage starts.

A language model comes as a folder, a name of the hub or one GGUF file, which is unpacked here; the conversion of a
language model alone does the rest, with all of its checks.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GgufConfig,
)
from transformers.utils import is_accelerate_available

from dynamic_llava.checkpoints.convert import check_destination, convert
from dynamic_llava.checkpoints.folders import Say
from dynamic_llava.checkpoints.plan import Dtype
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.files import writing
from dynamic_llava.projectors import DEFAULT

GGUF = ".gguf"
STAND_IN = {
    "hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
"""The tower of a LLaVA for text alone, as small as a tower can be: four tokens an image."""


def assemble(
    language_model: str | Path,
    destination: str | Path,
    *,
    vision_tower: str | Path | None = None,
    text_only: bool = False,
    projector: str = DEFAULT,
    seed: int = 0,
    dtype: Dtype | None = None,
    say: Say = print,
) -> Path:
    """Make the folder of a LLaVA from a language model and a tower, whose projector is new; return it.

    language_model: a folder or hub name of a Llama, Mistral, Qwen2 or Qwen3 with its tokenizer and chat template, or a
    GGUF file of one. vision_tower: a CLIP model's folder or hub name. text_only: no tower is at hand and no image will
    be shown; a small random one stands in. projector: its name, such as mlp, or package.module:Class. seed: what the
    values of projector and stand-in are drawn from. dtype: float32, float16 or bfloat16 for every tensor; None keeps
    each as it is, and a GGUF file's are float32 then. say: gets one line at a time of what is done.
    The folder appears only when it is complete. Raises ImportError where a GGUF file is given and the package gguf is
    missing; FileNotFoundError and ValueError as `convert` does, before anything is written.
    """
    destination = Path(destination)
    check_destination(destination)
    if (vision_tower is None) is not text_only:
        given = "both were given" if text_only else "neither was given"
        raise ValueError(
            f"{given}: say --vision-tower PATH for a LLaVA that sees (LLaVA-1.5: openai/clip-vit-large-patch14-336), "
            "or --text-only for one that reads and writes text alone, with a random tower as a stand-in"
        )
    with _scratch(destination) as scratch:
        source = _language_model(language_model, scratch / "language_model", dtype, say)
        tower = _stand_in(scratch / "vision_tower", seed, say) if vision_tower is None else vision_tower
        return convert(source, destination, vision_tower=tower, projector=projector, seed=seed, dtype=dtype, say=say)


@contextmanager
def _scratch(destination: Path) -> Iterator[Path]:
    """Give a name beside the destination for what is in between; what a killed process left there is removed."""
    scratch = destination.absolute().with_name(f".{destination.name}.parts")
    with writing(destination):
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _language_model(given: str | Path, folder: Path, dtype: Dtype | None, say: Say) -> str | Path:
    """Return where the language model lies in transformers' layout: where it was given, or in `folder`, unpacked."""
    file = Path(given)
    if file.suffix.lower() != GGUF:
        return given
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; give a GGUF file, a model's folder, or a name of the hub")
    if not is_accelerate_available():
        raise ImportError("transformers reads a GGUF file with the help of accelerate", name="accelerate")
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        kind = AutoConfig.from_pretrained(file.parent, trust_remote_code=False, **where).model_type
        if kind not in FAMILIES:
            raise ValueError(f"it holds a {kind}, and only {', '.join(FAMILIES)} can be sparse here")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **where)
        kept = {"dtype": getattr(torch, dtype or "float32"), "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(file.parent, trust_remote_code=False, **where, **kept)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # gguf and transformers raise what they like for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{file} gives no language model ({reason[:500]}); get the file again, or another one"
        ) from None
    config, weights = model.config, model.state_dict()
    for name in ("bos_token", "eos_token", "pad_token"):  # transformers before 5.24 lets a tokenizer guess them
        number = getattr(config, f"{name}_id")
        if number is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the file; for its sake transformers would save nothing
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    say(f"{file}: a GGUF file of a {kind}; {sum(value.numel() for value in weights.values()):,} numbers unpacked")
    return folder


def _stand_in(folder: Path, seed: int, say: Say) -> Path:
    """Write a vision tower that has learned nothing; return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPVisionModel(CLIPVisionConfig(**STAND_IN)).save_pretrained(folder)
    say("vision tower: a random one stands in, for text alone; what the model says of an image means nothing")
    return folder
