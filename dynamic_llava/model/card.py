"""The model card, README.md, of a saved checkpoint: what it is, its sparsity settings, and how to load it."""

import re
from pathlib import Path
from typing import Any

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

# Dynamic-LLaVA

LLaVA-1.5 with learned sparsification of image and output tokens ([Dynamic-LLaVA](https://arxiv.org/abs/2412.00876),
ICLR 2025). The decoder layers from {layer} on (counted from 0) see {image}, and keep in their cache
the output tokens that a small predictor admits.

{state}

## Sparsity settings

| setting | value |
|---|---|
{settings}

## Use

```python
import dynamic_llava
from transformers import pipeline

answer = pipeline("image-text-to-text", model="FOLDER_OR_HUB_NAME", trust_remote_code=False)
content = [{{"type": "image", "path": "cat.jpg"}}, {{"type": "text", "text": "What is it?"}}]
messages = [{{"role": "user", "content": content}}]
print(answer(text=messages, max_new_tokens=128, return_full_text=False)[0]["generated_text"])
```

The model's `generate` takes `sparsity="both"`, `"image"`, `"output"` or `"none"` in each call.

## Training data, results and limits

To be written by whoever publishes these weights.
"""


def model_card(config: Any) -> str:
    """Return the text of README.md for a checkpoint of this configuration.

    A base model is named where the weights came from the hub; the name of a local folder would help nobody.
    """
    settings = config.sparsity.to_dict()
    source = str(getattr(config, "_name_or_path", "") or "")
    from_hub = _HUB_NAME.fullmatch(source) and not Path(source).exists()
    untrained = config.untrained_predictors
    image = (
        f"{100 * settings['image_keep_rate']:g} % of each image's tokens"
        if settings["image_selection"] == "topk"
        else "the image tokens that a predictor keeps"
    )
    return _FORM.format(
        base_model=f"\nbase_model: {source}" if from_hub else "",
        layer=settings["sparse_layer"],
        image=image,
        state=f"**Not trained yet: {' and '.join(untrained)}.** Sparse answers are arbitrary until they are."
        if untrained
        else "The predictors' weights are part of this checkpoint.",
        settings="\n".join(f"| `{name}` | {'none' if value is None else value} |" for name, value in settings.items()),
    )


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
