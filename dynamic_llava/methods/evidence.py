"""What a method may be shown beside hidden states; it is computed only where it asks (`Cut.sees`, `evict_sees`).

Shape suffixes: I images, n image tokens of the longest, t question tokens of the longest, D hidden size, F feature
size, H query heads, K key heads, d head size, p pieces of the longest text, s size of CLIP's shared space; B rows, W
slots of a cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

Evidence = Literal[
    "question_row",
    "question_rows",
    "relevance",
    "keys",
    "normed",
    "rotation",
    "class_row",
    "early_class_row",
    "tower_keys",
    "joint_class_row",
    "joint_tower_keys",
    "received",
    "early_received",
    "tower",
    "clip_tokens",
    "clip_text",
]
"""At a layer above 0, of what the layer before the cut sees. question_row: (I, n) head-mean attention of the last token
before the row's first answer to each image token; question_rows: (I, n, t, H) float32, the attention of each token of
the question (`QuestionTokens`), whole heads, to each image token; relevance: (I, n) float32, how much the row's image
tokens look for a token of the question as they enter the language model: the mean over them of a softmax, over the
question, of products of their embeddings, 0 at other tokens; keys: (I, n, Kd), the keys of all key heads, rotated as in
a row that begins at position 0; normed: (I, n, D), the hidden states under the norm behind the last layer; rotation:
(I, n, 2d), cosines and sines of the token's position. The last four are shown of the question's tokens too.

At layer 0, of the vision tower, one entry for each patch. class_row: (I, n) float32, the attention of the class token
to each patch, the mean over heads of a softmax that the class token itself is part of; early_class_row: the same in the
layer that the cut's `early_depth` says; tower_keys: (I, n, d), the mean over heads of the patches' keys;
joint_class_row, joint_tower_keys: the same of whole queries and keys, (I, n) and (I, n, F of one layer), as if all
heads were one; received: (I, n) float32, the attention that each patch receives, the mean over heads and over all of
the tower's tokens; early_received: the same in the layer of `early_depth`; tower: (I, n, F), the features that the
projector reads; clip_tokens: (I, n, s) float32, the patches in CLIP's shared space: those features, of several layers
the last, under CLIP's norm behind its last layer and its projection of images. Of the question, in `QuestionTokens`:
clip_text: (I, p, s) float32, the text tower's embedding of each piece of its text; no cut sees it without
clip_tokens."""
TOKEN_EVIDENCE: frozenset[Evidence] = frozenset({"relevance", "keys", "normed", "rotation"})
"""What is shown of single tokens in the language model, those of the question too."""
QUESTION_EVIDENCE: frozenset[Evidence] = TOKEN_EVIDENCE | {"question_row", "question_rows", "clip_text"}
"""The evidence for which there has to be a question behind the images: clip_text at layer 0, the others above it."""
TOWER_EVIDENCE: frozenset[Evidence] = frozenset(get_args(Evidence)) - QUESTION_EVIDENCE
"""The evidence that is read in the vision tower; a call that gives images as projected features has none."""
CLIP_EVIDENCE: frozenset[Evidence] = frozenset({"clip_tokens", "clip_text"})
"""The evidence for which a whole CLIP checkpoint is opened beside the model (`Cut.text_tower`)."""


@dataclass(frozen=True)
class QuestionTokens:
    """The first question of each image's row: its prompt tokens behind the image and before the row's first answer.

    The last token before the answer is one of them, whatever it is. Where a cut sees clip_text, t is p instead: the
    entries are pieces of the question's text, each as long as CLIP's text tower reads, nearly always one.
    """

    valid: Tensor
    """(I, t) bool: tokens, or pieces, of the question; the others fill up a shorter one, or stand before the image."""
    seen: Mapping[Evidence, Tensor]
    """(I, t, ...) of clip_text, or of each TOKEN_EVIDENCE, that the cut sees."""


SlotEvidence = Literal["mass", "latest", "place", "output", "key_norm"]
"""What `evict` may be shown of each stored token, (B, K, W). mass: float32, the attention that it has received from all
tokens so far, summed over the query heads of the key head; latest: float32, the same from the last `latest_queries`
tokens of this pass alone; place: int64, how many tokens its row had before it in this layer, evicted ones included;
output: bool, whether it is an output token; key_norm: float32, the Euclidean norm of its key."""


@dataclass(frozen=True)
class Slots:
    """What `evict` is shown: the tokens that the key heads of one layer hold, right after the layer has attended."""

    filled: Tensor
    """(B, K, W) bool: slots that hold a token; they come first, from a head's oldest token to its newest."""
    tokens: Tensor
    """(B,) int64: tokens that the layer has been given so far, evicted ones included and padding not."""
    outputs: Tensor
    """(B,) int64: how many of `tokens` are output tokens."""
    seen: Mapping[SlotEvidence, Tensor] = field(default_factory=dict)
    """What the method sees (`evict_sees`); the values at unfilled slots mean nothing."""

    @property
    def lengths(self) -> Tensor:
        """(B, K) int64: tokens that each head holds."""
        return self.filled.sum(-1)

    def newest(self, count: int | Tensor) -> Tensor:
        """(B, K, W) bool: the newest `count` tokens of each head, an int or (B,) int64: one count per row."""
        count_B11 = count[:, None, None] if isinstance(count, Tensor) else count
        place_W = torch.arange(self.filled.shape[-1], device=self.filled.device)
        return self.filled & (place_W >= self.lengths[..., None] - count_B11)
