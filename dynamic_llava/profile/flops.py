"""FLOPs of the paper's tables: Eq. 13 as printed, and counted from the real shapes of the modules."""

from dataclasses import dataclass

from dynamic_llava.costs import LLAVA_7B, LLAVA_13B, DecoderShape, average_tokens, flops_exact, flops_paper, kv_bytes
from dynamic_llava.profile.report import Column, Report


@dataclass(frozen=True)
class Prefilled:
    """A row of Table 10: image tokens that the early and the late layers see."""

    model: str
    method: str
    shape: DecoderShape
    tokens: int
    printed: str
    """TFLOP in Table 10."""
    kept: int | None = None
    sparse_layer: int = 0


def _table_10() -> list[Prefilled]:
    def rows(model: str, shape: DecoderShape, *printed: str) -> list[Prefilled]:
        """Return one size's rows, in the order of Table 10."""
        given = (
            ("LLaVA-1.5", 576, None, 0),
            ("PruMerge+", 146, None, 0),
            ("FastV", 576, 144, 3),
            ("VoCo-LLaMA", 128, None, 0),
            ("HiRED", 115, None, 0),
            ("Dynamic-LLaVA", 576, 115, 2),
            ("TokenPacker 144", 144, None, 0),
            ("TokenPacker 64", 64, None, 0),
            ("TokenPacker + FastV", 144, 72, 3),
            ("TokenPacker + Dynamic-LLaVA", 144, 57, 2),
        )
        return [
            Prefilled(model, method, shape, tokens, value, kept, layer)
            for (method, tokens, kept, layer), value in zip(given, printed, strict=True)
        ]

    small = ("10.1", "2.5", "3.2", "2.2", "2.07", "2.5", "2.5", "1.1", "1.4", "1.1")
    large = ("19.6", "4.9", "6.0", "4.3", "3.9", "4.7", "4.9", "2.2", "2.6", "2.1")
    return rows("7B", LLAVA_7B, *small) + rows("13B", LLAVA_13B, *large)


TABLE_10 = _table_10()
TABLE_3 = (
    ("7B", "LLaVA-1.5", LLAVA_7B, 159, None, "2.75", "103"),
    ("7B", "Dynamic-LLaVA_I|T", LLAVA_7B, 159, 84, "1.52", "63"),
    ("13B", "LLaVA-1.5", LLAVA_13B, 159, None, "5.36", "149"),
)
"""LVIS-VQA (single-round): model, method, shape, output tokens, kept ones, printed TFLOP and M of the cache."""


def prefill_report() -> Report:
    """Return Table 10: image tokens only, batch 1; values that the paper prints differently are named."""
    rows, differing = [], []
    for row in TABLE_10:
        groups = {"kept": row.kept, "sparse_layer": row.sparse_layer}
        paper = flops_paper(row.tokens, row.shape.hidden, row.shape.layers, **groups)
        kept = row.tokens if row.kept is None else row.kept
        decimals = len(row.printed.split(".")[1])
        agrees = f"{paper / 1e12:.{decimals}f}" == row.printed
        if not agrees:
            differing.append(f"{row.method} {row.model}: {row.printed} printed, {paper / 1e12:.2f} by Eq. 13")
        rows.append(
            {
                "model": row.model,
                "method": row.method,
                "tokens": row.tokens,
                "kept": row.kept,
                "average_tokens": average_tokens(row.tokens, kept, row.shape.layers, row.sparse_layer),
                "printed_tflop": row.printed,
                "flops_paper": paper,
                "flops_exact": flops_exact(row.tokens, row.shape, **groups),
                "flops_causal": flops_exact(row.tokens, row.shape, causal=True, **groups),
                "agrees": agrees,
            }
        )
    columns = (
        Column("method", "method"),
        Column("model", "model"),
        Column("tokens", "tokens"),
        Column("kept", "kept"),
        Column("average_tokens", "average per layer", ".1f"),
        Column("printed_tflop", "Table 10, TFLOP"),
        Column("flops_paper", "paper (Eq. 13)", ".4f", 1e-12),
        Column("flops_exact", "exact", ".4f", 1e-12),
        Column("flops_causal", "exact, causal", ".4f", 1e-12),
    )
    notes = (
        f"Printed differently in the paper: {'; '.join(differing)}. All other {len(rows) - len(differing)} agree.",
        "paper: 32 N C^2 + 4 N^2 C in each layer. exact: from the modules' shapes, two per multiply-add, full N x N "
        "attention; causal: visible pairs only.",
    )
    return Report("flops", "FLOPs of the image tokens in one prefill (Table 10), batch 1", columns, rows, notes)


def decoding_report() -> Report:
    """Return the decoding columns of Table 3: Eq. 13 on the output tokens of one pass, and their keys and values."""
    rows = []
    for model, method, shape, tokens, kept, printed, megabytes in TABLE_3:
        groups = {"kept": kept, "sparse_layer": 2}
        rows.append(
            {
                "model": model,
                "method": method,
                "tokens": tokens,
                "kept": kept,
                "printed_tflop": printed,
                "flops_paper": flops_paper(tokens, shape.hidden, shape.layers, **groups),
                "flops_exact": flops_exact(tokens, shape, **groups),
                "printed_mega": megabytes,
                "kv_bytes": kv_bytes(shape, tokens, **groups),
            }
        )
    columns = (
        Column("method", "method"),
        Column("model", "model"),
        Column("tokens", "output"),
        Column("kept", "kept"),
        Column("printed_tflop", "Table 3, TFLOP"),
        Column("flops_paper", "paper (Eq. 13)", ".3f", 1e-12),
        Column("flops_exact", "exact", ".3f", 1e-12),
        Column("printed_mega", "Table 3, M"),
        Column("kv_bytes", "keys and values, MiB", ".1f", 2**-20),
    )
    notes = (
        "The paper's values are means over its samples, these are at the mean length; its M is what the device held.",
    )
    return Report("flops", "Output tokens of LVIS-VQA, single-round (Table 3)", columns, rows, notes)
