"""TRIM (Song et al., COLING 2025, arXiv:2409.10994): patches by how they compare with the question in CLIP's space.

Before the projector. A patch's score is a softmax, over the image, of the negative product of its embedding in CLIP's
shared space and that of the question's text, which is cut off where CLIP's text tower ends: the patches least like the
question stay, as published (a known trait of CLIP's patches; issue 3 of its repository). With "outliers" as many stay
as have a score above the third quartile by more than 1.5 times the distance of the quartiles; one more token is the
mean of all others. It is published as training of the language model on what is left.
Source: FreedomIntelligence/TRIM f5a232d, llava/model/multimodal_encoder/clip_encoder.py. Ours: outliers are those of
each image, as many as were counted, where theirs pools those of a batch and multiplies their share out again; a share
of the tokens is rounded down and counts the mean as one of them, where theirs adds it; the question is the text behind
the image, decoded from its ids; tokens stand in raster order and keep their positions, the mean at the last patch that
is not kept, where theirs close up; ties go to the earlier patch.
Shape suffixes: I images, n image tokens, s size of CLIP's shared space.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods.base import Choice, Cut, ImageTokens
from dynamic_llava.methods.outliers import OutlierRate, outliers
from dynamic_llava.sparsity.decisions import budget, top_k_keep


@dataclass(frozen=True)
class TRIM(OutlierRate):
    """Training-free here: patches by CLIP's comparison with the question, and the mean of the others."""

    name: ClassVar[str] = "trim"
    training_free: ClassVar[bool] = True

    text_tower: str = "openai/clip-vit-large-patch14-336"
    """Folder or hub name of the whole CLIP model that the vision tower was taken from."""

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the projector, by CLIP."""
        sees = frozenset({"clip_tokens", "clip_text"})
        return (Cut(0, sees, before_projector=True, text_tower=self.text_tower),)  # type: ignore[arg-type]

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor | Choice:
        """Which patches stay of each image, the mean's among them, and what each becomes."""
        assert images.question is not None
        tokens_Ins, text_Is = images.seen["clip_tokens"], images.question.seen["clip_text"][:, 0]
        patches = tokens_Ins.shape[1]
        unlike_In = -(tokens_Ins @ text_Is[..., None])[..., 0]
        adapts = isinstance(self.image_keep_rate, str)
        count = outliers(unlike_In.softmax(-1)) if adapts else budget(float(self.image_keep_rate), patches) - 1
        chosen_In = top_k_keep(unlike_In, count)
        place_n = torch.arange(patches, device=unlike_In.device)
        mean_In = place_n == torch.where(chosen_In, -1, place_n).amax(1, keepdim=True)
        rest_In = (~chosen_In).float()
        average_In = rest_In / rest_In.sum(1, keepdim=True)
        itself_nn = torch.eye(patches, device=unlike_In.device)
        return Choice(chosen_In | mean_In, shares=torch.where(mean_In[..., None], average_In[:, None], itself_nn))
