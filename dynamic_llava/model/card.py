"""The model card, README.md, of a saved checkpoint: what it is, its sparsity settings, and how to load it."""

import re
from pathlib import Path
from typing import Any

from dynamic_llava.methods import checkpoint_method, describe_method, said_settings
from dynamic_llava.methods.registry import NAME

CARD = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_GENERIC = "This model card has been automatically generated"
"""Stands in the empty form that transformers uploads where a repository has no card yet."""

_FORM = """\
---
library_name: dynamic-llava
pipeline_tag: image-text-to-text
tags:
- dynamic-llava
- llava
- token-sparsity{base_model}
# license: add yours here; the base model's licence binds these weights too
---

{about}

{state}

## Sparsity settings

| setting | value |
|---|---|
{settings}

## Use

```python
{imports}from transformers import pipeline

answer = pipeline("image-text-to-text", model="FOLDER_OR_HUB_NAME", trust_remote_code=False)
content = [{{"type": "image", "path": "cat.jpg"}}, {{"type": "text", "text": "What is it?"}}]
messages = [{{"role": "user", "content": content}}]
print(answer(text=messages, max_new_tokens=128, return_full_text=False)[0]["generated_text"])
```

The model's `generate` takes {switches} in each call.

## Training data, results and limits

To be written by whoever publishes these weights.
"""

_DYNAMIC = """\
# Dynamic-LLaVA

LLaVA-1.5 with learned sparsification of image and output tokens ([Dynamic-LLaVA](https://arxiv.org/abs/2412.00876),
ICLR 2025). The decoder layers from {layer} on (counted from 0) see {image}, and keep in their cache
the output tokens that a small predictor admits."""

_OWN = """\
# LLaVA-1.5 with a learned sparsification

Image or output tokens are dropped by `{method}`, whose weights are part of this checkpoint. Its class comes with its
author's code, not with this folder."""


def model_card(config: Any) -> str:
    """Return the text of README.md for a checkpoint of this configuration.

    A base model is named where the weights came from the hub; the name of a local folder would help nobody.
    """
    settings = config.sparsity.to_dict()
    source = str(getattr(config, "_name_or_path", "") or "")
    from_hub = _HUB_NAME.fullmatch(source) and not Path(source).exists()
    untrained = config.untrained_predictors
    imports, switches = "import dynamic_llava\n", '`sparsity="both"`, `"image"`, `"output"` or `"none"`'
    if config.sparsity.method is None:
        about = _DYNAMIC.format(layer=settings["sparse_layer"], image=_image_tokens(settings))
    else:
        about = _OWN.format(method=describe_method(checkpoint_method(config.sparsity)))
        module, _, own = said_settings(config.sparsity.method)[NAME].partition(":")
        imports += f"import {module}  # the class of its method; nothing of a checkpoint imports code\n" if own else ""
        switches = '`sparsity="none"`, or another `method`,'
    return _FORM.format(
        base_model=f"\nbase_model: {source}" if from_hub else "",
        about=about,
        state=f"**Not trained yet: {' and '.join(untrained)}.** Sparse answers are arbitrary until they are."
        if untrained
        else "The weights that decide are part of this checkpoint.",
        imports=imports,
        switches=switches,
        settings="\n".join(f"| `{name}` | {'none' if value is None else value} |" for name, value in settings.items()),
    )


def _image_tokens(settings: dict[str, Any]) -> str:
    if settings["image_selection"] == "topk":
        return f"{100 * settings['image_keep_rate']:g} % of each image's tokens"
    return "the image tokens that a predictor keeps"


def write_card(folder: str | Path, config: Any) -> None:
    """Write the card into a saved checkpoint's folder; one that is there already stays as it is."""
    path = Path(folder) / CARD
    if not path.exists():
        path.write_text(model_card(config), encoding="utf-8")


def replace_generic_card(folder: str | Path, config: Any) -> None:
    """Write the card over transformers' empty form, but not over anybody's own text."""
    path = Path(folder) / CARD
    if path.is_file() and _GENERIC in path.read_text(encoding="utf-8", errors="replace"):
        path.unlink()
    write_card(folder, config)
