"""A whole CLIP checkpoint beside the model, for methods that compare patches with the question in CLIP's shared space.

A LLaVA checkpoint holds CLIP's vision tower alone. What is lacking is opened where a method's cut asks for it: frozen,
in float32, from safetensors, kept by its path and shared by all models of a device; no weight of it is saved with any.
Shape suffixes: B rows, N tokens, I images, n image tokens, t question tokens of the longest, F feature size of one
layer, p pieces of the longest text, s size of CLIP's shared space.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from dynamic_llava.engine.question import question_of, question_packing
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Cut, Method, QuestionTokens
from dynamic_llava.model.supported import check_place, refuse_code

logger = logging.getLogger(__name__)

_CLOSING = re.compile(r"\s*(\bASSISTANT:|assistant\s*\n|\[/INST\])\s*$")
"""How a chat template asks for the answer, behind the question: vicuna's, Qwen's and Llama's without marks, [/INST]."""


class Clip(nn.Module):
    """What is read of a CLIP checkpoint: the text tower, both projections, and the norm behind the vision tower."""

    def __init__(self, whole: CLIPModel, tokenizer: Any) -> None:
        super().__init__()
        self.text_model, self.text_projection = whole.text_model, whole.text_projection
        self.post_layernorm, self.visual_projection = whole.vision_model.post_layernorm, whole.visual_projection
        self.tokenizer = tokenizer
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def tokens(self, features_InF: Tensor) -> Tensor:
        """(I, n, s) float32: patches of the vision tower in the shared space."""
        with torch.autocast(features_InF.device.type, enabled=False):
            return self.visual_projection(self.post_layernorm(features_InF.float()))  # type: ignore[no-any-return]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> QuestionTokens:
        """Return each text's pieces in the shared space; those of like texts are made once."""
        device = self.visual_projection.weight.device
        pieces = {text: self._pieces(text) for text in texts}
        found = iter(self._embedded([one for several in pieces.values() for one in several], device))
        vectors = {text: torch.stack([next(found) for _ in several]) for text, several in pieces.items()}
        padded_Ips = nn.utils.rnn.pad_sequence([vectors[text] for text in texts], batch_first=True)
        counts_I = torch.tensor([len(pieces[text]) for text in texts], device=device)
        valid_Ip = torch.arange(padded_Ips.shape[1], device=device) < counts_I[:, None]
        return QuestionTokens(valid_Ip, {"clip_text": padded_Ips})

    def _pieces(self, text: str) -> list[list[int]]:
        """Return a text's ids, cut to what the text tower reads; each piece has a start and an end of its own."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.text_model.config.max_position_embeddings - 2
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [[start, *ids[at : at + room], end] for at in range(0, max(len(ids), 1), room)]

    def _embedded(self, pieces: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """(all pieces, s) float32; the tower is causal, so what fills up a shorter piece changes nothing."""
        rows = [torch.tensor(one, device=device) for one in pieces]
        end = float(self.tokenizer.eos_token_id)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in rows], batch_first=True)
        with torch.autocast(device.type, enabled=False):
            pooled = self.text_model(input_ids=ids, attention_mask=real).pooler_output
            return self.text_projection(pooled)  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def open_clip(source: str, width: int, device: torch.device) -> Clip:
    """Open a CLIP checkpoint, a folder or hub name, whose vision tower is `width` wide; one for each device.

    Raises ValueError that says what to do where it is not there, not whole, or another model.
    """
    remedy = (
        "give text_tower (--method.text-tower) the folder or hub name of the whole CLIP model that the vision tower is "
        "taken from, with model.safetensors and its tokenizer; LLaVA-1.5's is openai/clip-vit-large-patch14-336, of "
        "which CLIPModel.from_pretrained(...).save_pretrained(folder) writes safetensors"
    )
    try:
        check_place(source, {})
        refuse_code(source, {})
        config = CLIPConfig.from_pretrained(source, trust_remote_code=False)
        if config.vision_config.hidden_size != width:
            raise ValueError(
                f"its vision tower is {config.vision_config.hidden_size} wide and that of this model {width}, so its "
                "projection of images does not fit"
            )
        whole, info = CLIPModel.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"CLIP's text tower cannot be read from {source!r} ({_reason(error)}); {remedy}") from error
    if lost := sorted(info["missing_keys"]):
        raise ValueError(f"{source} lacks {len(lost)} tensors of a whole CLIP model ({lost[0]}, ...); {remedy}")
    return Clip(whole, tokenizer).to(device)


@lru_cache(maxsize=8)
def open_tokenizer(source: str) -> Any:
    """Return the tokenizer of the folder or hub name that a model was loaded from; ValueError where there is none."""
    try:
        if not source:
            raise ValueError("it was loaded from no folder")
        check_place(source, {})
        refuse_code(source, {})
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"CLIP is told the question as text, and this model has no tokenizer that says it ({_reason(error)}); load "
            "the model with from_pretrained from a folder or hub name that holds its tokenizer, or use a method that "
            "does not read the question's text, such as divprune"
        ) from error


def asked_text(
    config: Any, method: Method, cut: Cut, input_ids: Tensor | None, layout: TokenLayout
) -> QuestionTokens | None:
    """Return what CLIP says of the question of each image, for a cut that sees it; None for another cut.

    `config`: the model's, which knows the folder that it was loaded from. ValueError where a call gives no ids.
    """
    if "clip_text" not in cut.sees:
        return None
    if input_ids is None:
        raise ValueError(
            f"method {method.name!r} compares patches with the question's text, and this call gives inputs_embeds, "
            "which do not say it; give input_ids, or use a method that does not read text, such as divprune"
        )
    clip = open_clip(str(cut.text_tower), config.vision_config.hidden_size, layout.valid.device)
    tokenizer = open_tokenizer(str(getattr(config, "_name_or_path", "") or ""))
    texts = [question_text(tokenizer, ids) for ids in question_ids(input_ids, layout)]
    if not all(texts):
        logger.warning_once(  # transformers gives it to every logger
            f"method {method.name!r} compares patches with the text behind their image, and behind an image of this "
            "call stands none, so that they are compared with an empty text; put the question behind the image"
        )
    return clip.texts(texts)


def question_ids(input_ids: Tensor, layout: TokenLayout) -> list[list[int]]:
    """Return, for each image in row order, the ids of its question (`QuestionTokens`), image tokens left out."""
    asking = replace(layout, output=layout.output.cumsum(1) > 0)
    packing, rows_I = question_packing(asking), layout.image_rows()
    asked_It = question_of(asking, rows_I, {}).valid & ~packing.take(layout.is_image)[rows_I]
    ids_It = packing.take(input_ids.to(layout.valid.device))[rows_I]
    return [ids[asked].tolist() for ids, asked in zip(ids_It, asked_It, strict=True)]


def question_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return a question as text: special tokens, and the words by which a template asks for the answer, left out."""
    return _CLOSING.sub("", tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _reason(error: Exception) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split())[:500]
