"""What one pass of the language model is asked to do."""

from dataclasses import dataclass, field

from torch import Tensor

from dynamic_llava.config import SparsityConfig, check_sparse_layer
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Cut, Method


@dataclass(frozen=True)
class Plan:
    """Everything a pass needs to know besides the hidden states; made once per call, changed by none."""

    method: Method
    cut: Cut
    """Where the method decides."""
    layout: TokenLayout
    sample_key: Tensor
    """(B,) int64: noise key of each sample."""
    has_images: bool = False
    """Whether the call's tokens include image tokens; known on the host."""
    masked: bool = False
    """Keep the full length and mask (training, teacher forcing) instead of removing tokens."""
    answers_only: bool = False
    """Mask as inference decides; hidden states are wanted at prompt and answer tokens only."""
    tau: float = 1.0
    """Temperature of the relaxation."""
    settings: SparsityConfig = field(default_factory=SparsityConfig)
    """The checkpoint's settings, with what the call has overridden."""
    keep_mask: Tensor | None = None
    """(B, N): decisions given by the caller instead of made by the method."""
    loss_scale: float = 1.0
    """What the caller multiplies the loss by before the backward pass."""
    compile: bool = False
    """Run a single-token step as one compiled graph."""

    @property
    def reads_attention(self) -> bool:
        """Whether the method is asked, and wants a row of attention to decide by."""
        return "question_row" in self.cut.sees and self.keep_mask is None


def check_cuts(method: Method, layers: int) -> None:
    """Raise ValueError for a method that cannot decide in a language model of so many layers."""
    if not method.is_dense:
        check_sparse_layer(one_cut(method, layers).layer, layers)


def one_cut(method: Method, layers: int) -> Cut:
    """Return the one cut of a method in a language model of so many layers. ValueError for any other number of cuts."""
    cuts = method.cuts(layers)
    if len(cuts) != 1:
        where = f"at layers {', '.join(str(cut.layer) for cut in cuts)}" if cuts else "at no layer"
        raise ValueError(
            f"method {method.name!r} decides {where}; the engine serves methods that decide at exactly one: choose "
            "such a one, or let `cuts` return one cut"
        )
    return cuts[0]
