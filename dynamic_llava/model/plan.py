"""What one pass of the language model is asked to do."""

from dataclasses import dataclass

from torch import Tensor

from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Method


@dataclass(frozen=True)
class Plan:
    """Everything a pass needs to know besides the hidden states; made once per call, changed by none."""

    method: Method
    layout: TokenLayout
    sample_key: Tensor
    """(B,) int64: noise key of each sample."""
    masked: bool = False
    """Keep the full length and mask (training, teacher forcing) instead of removing tokens."""
    answers_only: bool = False
    """Mask as inference decides; hidden states are wanted at prompt and answer tokens only."""
    tau: float = 1.0
    """Temperature of the relaxation."""
    output_keep_rate: float = 0.5
    """r_OT: share of each answer that a relaxation with a budget keeps in training."""
    keep_mask: Tensor | None = None
    """(B, N): decisions given by the caller instead of made by the method."""
    compile: bool = False
    """Run a single-token step as one compiled graph."""

    @property
    def reads_attention(self) -> bool:
        """Whether the method is asked, and wants a row of attention to decide by."""
        return self.method.needs_attention and self.keep_mask is None
