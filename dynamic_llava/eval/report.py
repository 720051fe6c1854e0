"""Markdown from any text: aligned tables and code spans (standard library only)."""

import re
from collections.abc import Sequence

from dynamic_llava.eval.writing import decodable

MISSING = "-"
"""What a cell without a value shows."""


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Aligned markdown table: the first line is the head, the first column flush left, the others flush right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def join(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        return "| " + " | ".join(padded) + " |"

    marks = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([join(lines[0]), "|" + "|".join(marks) + "|", *(join(line) for line in lines[1:])])


def code(value: object) -> str:
    """Return any text as a markdown code span of one line, in which nothing is a link, HTML or an end of the span."""
    text = " ".join("".join(one if one.isprintable() else " " for one in decodable(str(value))).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""
