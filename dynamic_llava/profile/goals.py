"""What the measurements should show, where the number comes from, and whether it was reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_llava.profile.report import Column, Report


@dataclass(frozen=True)
class Goal:
    """A bound on one measured number."""

    key: str
    """Name of the number among those that were measured."""
    text: str
    bound: float
    at_most: bool = True
    form: str = ".3f"

    def met(self, value: float) -> bool:
        """Return whether a measured value keeps the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


_PREDICTORS = (
    Goal("image_predictor_share", "image predictor and selection / prefill, one 7B layer scaled", 0.01, form=".3%"),
    Goal("output_predictor_share", "output predictor / step, 7B layers scaled", 0.005, form=".3%"),
)
CPU_GOALS = (
    Goal("cache_bytes_256", "allocated cache / (batch x longest row in blocks), 256 generated tokens", 1.02),
    Goal("cache_bytes_1024", "the same, 1,024 tokens", 1.02),
    Goal("cache_bytes_4096", "the same, 4,096 tokens", 1.02),
    Goal(
        "step_cpu_512_both_over_dense",
        "cached step of I|T / of the dense model, the faster engine of each, 512 tokens, batch 8",
        0.6,
    ),
    Goal("step_cpu_512_both_over_image", "cached step of I|T / of image-only, both eager", 1.0),
    Goal("step_more_dropped", "step with 256 kept of 1,024 tokens / of 512, divided by the ratio of bytes", 1.1),
    Goal("prefill_cpu-prefill_over_flops", "sparse / dense prefill time, divided by the ratio of their FLOPs", 1.15),
    Goal("chunked_over_plain", "chunked MaskedSoftmax / plain attention, both passes, 2,048 tokens, 8 heads", 4.0),
    Goal("reference_over_chunked", "Eq. 7 as written / chunked, the same", 2.5, at_most=False),
    Goal("compiled_graphs", "graphs of the compiled step", 1.0, form=".0f"),
    Goal("compiled_breaks", "breaks in it", 0.0, form=".0f"),
    Goal("compiled_same_tokens", "same tokens as eager (1 = yes)", 1.0, at_most=False, form=".0f"),
    Goal("compiled_speedup", "eager / compiled step, hidden 256", 2.0, at_most=False, form=".2f"),
    *_PREDICTORS,
    Goal("output_predictor_bytes", "output predictor / step, by bytes", 0.005, form=".3%"),
)
"""Goals of the set that runs on two CPU cores."""
GPU_GOALS = (
    Goal(
        "step_7b-b1_512_bandwidth",
        "7B, batch 1: compiled I|T step, share of the data sheet's bandwidth, 512 tokens",
        0.75,
        False,
        ".0%",
    ),
    Goal("step_7b-b1_512_ms", "the same in ms a token, on an H200", 3.9, form=".2f"),
    Goal(
        "step_7b-b8_1024_bandwidth",
        "7B, batch 8: compiled I|T step, share of the data sheet's bandwidth, 1,024 tokens",
        0.7,
        False,
        ".0%",
    ),
    Goal(
        "step_7b-b8_1024_speedup",
        "7B, batch 8: compiled I|T step against the faster dense engine, speed-up over the roofline's",
        0.9,
        False,
        ".0%",
    ),
    Goal("prefill_7b-b8_dense_mfu", "7B, batch 8: dense prefill, MFU", 0.6, False, ".0%"),
    Goal("prefill_7b-b8_both_mfu", "7B, batch 8: sparse prefill, MFU", 0.5, False, ".0%"),
    *(
        Goal(
            f"attention_{tokens}_{percent}",
            f"MaskedSoftmax / FlashAttention-2, both passes, {tokens:,} tokens, {percent} % kept, bfloat16",
            1.6,
            form=".2f",
        )
        for tokens in (2048, 4096)
        for percent in (30, 50, 100)
    ),
    Goal("training_mfu", "7B: training step, MFU", 0.4, False, ".0%"),
    *_PREDICTORS,
)
"""Goals of the set that runs on one GPU; the paper's own device reached 46 % of its bandwidth and 51 % of its peak."""
GOALS: dict[str, tuple[Goal, ...]] = {"gpu": GPU_GOALS, "cpu": CPU_GOALS}
"""Goals by the set that measures them; a rehearsal has none."""


def goals_report(goals: Sequence[Goal], values: Mapping[str, float]) -> Report:
    """Return the goals as a table; a number that is not among `values` was not measured."""
    rows: list[dict[str, Any]] = []
    for goal in goals:
        value = values.get(goal.key)
        row: dict[str, Any] = {
            "goal": goal.text,
            "key": goal.key,
            "bound": f"{'at most' if goal.at_most else 'at least'} {format(goal.bound, goal.form)}",
        }
        if value is None:
            row |= {"measured": "not measured", "met": None}
        else:
            row |= {"measured": format(value, goal.form), "value": value, "met": "yes" if goal.met(value) else "no"}
        rows.append(row)
    columns = (Column("goal", "goal"), Column("bound", "bound"), Column("measured", "measured"), Column("met", "met"))
    return Report("goals", "Goals", columns, rows)
