"""The rows of the tiny world's table: which model, which selection, which path, and what each row is there to show.

All rows go through the same functions; a row is data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods import Dynamic, FastV, Method, Mixed, Random, Structure, describe_method

ModelKey = Literal["base", "control", "image", "both"]
"""The dense base, the dense control (same extra steps), Dynamic I and Dynamic I|T."""

UNCACHED, CACHED_SUBSET = "uncached", "dynamic_subset"
"""Keys of the row that decodes without a cache and of the cached row on the same subset."""
DENSE: Mapping[str, Any] = {"sparsity": "none"}
REFERENCE = "dynamic"
"""Key of the row whose realised output keep rate the equal-keep rows are given."""


@dataclass(frozen=True)
class Row:
    """One row: a trained model, the switches of its calls, and which measurements apply."""

    key: str
    title: str
    model: ModelKey
    switches: Mapping[str, Any]
    """Keyword arguments of forward() and generate()."""
    note: str = ""
    """Purpose of the row, for the page."""
    use_cache: bool = True
    generates: bool = True
    """False: only perplexity is measured (a selection that needs the whole answer)."""
    subset: bool = False
    """Measure on the smaller subset of the row without a cache."""
    answers_of: str | None = None
    """Key of a row that differs in output tokens only: a one-word answer is complete before any can be dropped."""


def first_rows(settings: SparsityConfig, *, dynamic_image: bool = True, uncached: bool = True) -> list[Row]:
    """Rows that need no other row's result; `settings` are those of the sparse checkpoints."""
    layer, rate = settings.sparse_layer, settings.image_keep_rate
    rows = [
        Row("base", "dense base", "base", DENSE, "the model that every training starts from"),
        Row("control", "dense control", "control", DENSE, "the base trained on, dense, for the same steps"),
        Row("dynamic_image", "Dynamic I", "image", {"sparsity": "image"}, "image tokens sparsified"),
        Row(REFERENCE, "Dynamic I|T", "both", {"sparsity": "both"}, "image and output tokens sparsified, cached"),
        Row(
            UNCACHED, "Dynamic I|T, no cache", "both", {"sparsity": "both"}, use_cache=False, subset=True,
            note="decoded without a cache on a subset; must equal the cached model on that subset",
        ),
        Row(
            "fastv", "control + FastV-like", "control", {"method": FastV(layer=layer, image_keep_rate=rate)},
            "image tokens by attention, same average number per layer as Dynamic I, training-free",
        ),
        Row(
            "random_image", "control + random image", "control",
            {"method": Random(layer=layer, image_keep_rate=rate, output_keep_rate=None)},
            "image tokens at random, same number, training-free",
        ),
        Row(
            "no_image", f"control, no image after layer {layer}", "control",
            {"method": Random(layer=layer, image_keep_rate=0, output_keep_rate=None)},
            "proof that dropping matters: what the later layers know without any image token",
        ),
    ]  # fmt: skip
    return [row for row in rows if (dynamic_image or row.model != "image") and (uncached or row.key != UNCACHED)]


def method_row(method: Method) -> Row:
    """The row of a method that learns nothing and that the job was told to show."""
    title = f"control + {describe_method(method)}"
    return Row("method", title, "control", {"method": method}, "the method that the job names; training-free")


def equal_keep_rows(settings: SparsityConfig, output_rate: float) -> list[Row]:
    """Rows that drop output tokens at the rate that the learned selection realised under teacher forcing."""
    layer = settings.sparse_layer
    learned = Dynamic.from_config(settings, "both")
    rate = round(output_rate, 4)
    random = Random(layer=layer, image_keep_rate=None, output_keep_rate=rate)
    alternate = Structure(layer=layer, image_keep_rate=None, output_keep_rate=rate)
    share = f"{100 * rate:.1f} % of the output tokens, the learned model's realised rate"
    return [
        Row(
            "random_output", "control + random output", "control", {"method": random},
            f"{share}; training-free", answers_of="control",
        ),
        Row(
            "alternate_output", "control + alternate output", "control", {"method": alternate},
            f"{share}, evenly spaced; training-free", answers_of="control",
        ),
        Row(
            "inside_random", "Dynamic I|T, random output", "both",
            {"method": Mixed(image_by=learned, output_by=random)},
            f"{share}, at random inside the trained model; image tokens learned", answers_of=REFERENCE,
        ),
        Row(
            "inside_alternate", "Dynamic I|T, alternate output", "both",
            {"method": Mixed(image_by=learned, output_by=alternate)},
            f"{share}, evenly spaced inside the trained model; image tokens learned", answers_of=REFERENCE,
        ),
        Row(
            "inside_topk", "Dynamic I|T, top-k output", "both",
            {"method": replace(learned, output_selection="topk", output_keep_rate=rate)}, generates=False,
            note=f"{share}, the highest learned margins of each answer (whole answers, so perplexity only)",
        ),
    ]  # fmt: skip
