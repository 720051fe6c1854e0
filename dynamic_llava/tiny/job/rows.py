"""The rows of the tiny world's table: which model, which selection, which path, and what each row is there to show.

All rows go through the same functions; a row is data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.metrics.slots import chance_of, window_of
from dynamic_llava.methods import Dynamic, FastV, Method, Mixed, Random, Structure, describe_method

BOTH = "both"
"""Key of the model of Dynamic I|T; others are base, the dense one, control, the dense one after the same extra steps,
image, Dynamic I, and those of `other_rate`."""

UNCACHED, CACHED_SUBSET = "uncached", "dynamic_subset"
"""Keys of the row that decodes without a cache and of the cached row on the same subset."""
DENSE: Mapping[str, Any] = {"sparsity": "none"}
REFERENCE = "dynamic"
"""Key of the row whose realised output keep rate and slots the rows that drop blindly are given."""
SINKS = 4
"""First tokens of an answer that stay beside a window, as StreamingLLM has it."""


@dataclass(frozen=True)
class Row:
    """One row: a trained model, the switches of its calls, and which measurements apply."""

    key: str
    title: str
    model: str
    """Key of a checkpoint."""
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


def other_rate(rate: float) -> str:
    """What is appended to the keys of the model, and of the rows, of Dynamic I|T trained at another r_OT."""
    return f"_{100 * rate:g}"


def learned_row(rate: float) -> Row:
    """The row of Dynamic I|T trained at another r_OT."""
    suffix = other_rate(rate)
    note = f"image and output tokens sparsified, trained at r_OT {rate:g}"
    return Row(f"{REFERENCE}{suffix}", f"Dynamic I|T, r_OT {rate:g}", f"{BOTH}{suffix}", {"sparsity": "both"}, note)


def window_rows(settings: SparsityConfig, lengths: Sequence[int], slots: float, rate: float | None = None) -> list[Row]:
    """Rows that show each output token as much of those before it as the learned selection does, by simple rules.

    `lengths` are those of the answers, `slots` what the learned selection showed under teacher forcing. Sinks and
    window: the smallest window that shows at least as much. Chance and window: half of that window, and of older tokens
    a random part that makes it as much in expectation. `rate`: the r_OT of a model other than the main one, whose rows
    are those inside it; without it there are rows of the dense control too.
    """
    learned, free = Dynamic.from_config(settings, "both"), Random(layer=settings.sparse_layer, image_keep_rate=None)
    window = window_of(lengths, slots, SINKS)
    half = window // 2
    sinks = replace(free, output_keep_rate=0, output_sinks=SINKS, output_window=window)
    chance = round(chance_of(lengths, slots, half), 4)
    recent = replace(free, output_keep_rate=chance, output_window=half)
    suffix, title = ("", "") if rate is None else (other_rate(rate), f", r_OT {rate:g}")
    share = f"{100 * slots:.1f} % of past outputs seen, as by the learned selection"
    rules = (
        ("sinks", "sinks + window", sinks, f"the first {SINKS} tokens of an answer and the last {window}; {share}"),
        (
            "recent",
            "random + window",
            recent,
            f"the last {half} tokens and {100 * chance:.1f} % of older ones; {share}",
        ),
    )
    inside = [
        Row(
            f"inside_{key}{suffix}", f"Dynamic I|T{title}, {name}", f"{BOTH}{suffix}",
            {"method": Mixed(image_by=learned, output_by=rule)},
            f"{note}, inside the trained model; image tokens learned", answers_of=f"{REFERENCE}{suffix}",
        )
        for key, name, rule, note in rules
    ]  # fmt: skip
    if rate is not None:
        return inside
    control = [
        Row(
            f"{key}_output", f"control + {name}", "control", {"method": rule}, f"{note}; training-free",
            answers_of="control",
        )
        for key, name, rule, note in rules
    ]  # fmt: skip
    return [*control, *inside]


def row_keys(settings: SparsityConfig, rates: Sequence[float], **which: bool) -> list[str]:
    """Keys of all rows of a job whose other r_OT are `rates`; `which` as `first_rows` has it."""
    rows = [*first_rows(settings, **which), *map(learned_row, rates), *equal_keep_rows(settings, 0.5)]
    rows += [row for rate in (None, *rates) for row in window_rows(settings, (2,), 0.5, rate)]
    return [row.key for row in rows]


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
