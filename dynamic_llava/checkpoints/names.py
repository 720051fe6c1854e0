"""Tables of tensor names: every layout's names on the left, this library's on the right.

A rule is a pair of beginnings; what follows them is the same on both sides, and `{i}` stands for a number. The first
rule that fits counts, in both directions, so each table is also the way back.
"""

import re
from collections.abc import Iterable
from functools import cache

Rule = tuple[str, str]

IMAGE_PREDICTOR = "model.language_model.image_predictor."
OUTPUT_PREDICTOR = "model.language_model.output_predictor."
"""Our beginnings of the names of Dynamic-LLaVA's predictors, which the published layout has others for."""
TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
"""The two tensors that have one row per word of the vocabulary."""

_PROJECTORS: tuple[Rule, ...] = (
    ("model.mm_projector.0.", f"{PROJECTOR}linear_1."),
    ("model.mm_projector.2.", f"{PROJECTOR}linear_2."),
    ("model.mm_projector.q_proj_1.", f"{PROJECTOR}query."),
    ("model.mm_projector.k_proj_1.", f"{PROJECTOR}key."),
    ("model.mm_projector.v_proj_1.", f"{PROJECTOR}value."),
    ("model.mm_projector.ln_q_1.", f"{PROJECTOR}query_norm."),
    ("model.mm_projector.ln_k_1.", f"{PROJECTOR}key_norm."),
    ("model.mm_projector.ln_v_1.", f"{PROJECTOR}value_norm."),
    ("model.mm_projector.clip_attn.in_proj_", f"{PROJECTOR}in_proj_"),
    ("model.mm_projector.clip_attn.out_proj.", f"{PROJECTOR}out_proj."),
    ("model.mm_projector.mlp.", f"{PROJECTOR}mlp."),
)
"""LLaVA's own projector, and TokenPacker's (github.com/CircleRadon/TokenPacker)."""

ORIGINAL: tuple[Rule, ...] = (
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.{i}.", "model.language_model.layers.{i}."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
    *_PROJECTORS,
    ("model.vision_tower.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.vision_tower.", TOWER),
)
"""LLaVA's own names (github.com/haotian-liu/LLaVA), and a Llama's as far as they go."""

PUBLISHED: tuple[Rule, ...] = (
    *ORIGINAL,
    ("model.image_score_predictor.down_mlp.", f"{IMAGE_PREDICTOR}down."),
    ("model.image_score_predictor.output_mlp.", f"{IMAGE_PREDICTOR}head."),
    ("model.image_score_predictor.transformer.{i}.norm1.", f"{IMAGE_PREDICTOR}blocks.{{i}}.attention_norm."),
    ("model.image_score_predictor.transformer.{i}.attn.", f"{IMAGE_PREDICTOR}blocks.{{i}}.attention."),
    ("model.image_score_predictor.transformer.{i}.norm2.", f"{IMAGE_PREDICTOR}blocks.{{i}}.mlp_norm."),
    ("model.image_score_predictor.transformer.{i}.mlp.fc1.", f"{IMAGE_PREDICTOR}blocks.{{i}}.mlp.0."),
    ("model.image_score_predictor.transformer.{i}.mlp.fc2.", f"{IMAGE_PREDICTOR}blocks.{{i}}.mlp.2."),
    ("model.output_text_score_predictor.output_mlp.0.", f"{OUTPUT_PREDICTOR}down.0."),
    ("model.output_text_score_predictor.output_mlp.1.", f"{OUTPUT_PREDICTOR}down.1."),
    ("model.output_text_score_predictor.output_mlp.3.", f"{OUTPUT_PREDICTOR}head.0."),
    ("model.output_text_score_predictor.output_mlp.5.", f"{OUTPUT_PREDICTOR}head.2."),
    ("model.output_text_score_predictor.output_mlp.7.", f"{OUTPUT_PREDICTOR}head.4."),
)
"""The names of the paper's published code: LLaVA's own with its two predictors."""
_LAST_LAYERS = (f"{IMAGE_PREDICTOR}head.4.", f"{OUTPUT_PREDICTOR}head.4.")

PARTS: tuple[Rule, ...] = (*PUBLISHED, *((theirs.removeprefix("model."), ours) for theirs, ours in _PROJECTORS))
"""The same, with the short names that some of LLaVA's tools give a projector in a file of its own."""

LLAVA_HF: tuple[Rule, ...] = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", TOWER),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    # What transformers 5 writes for the tower, and the names that it uses inside.
    ("vision_tower.", TOWER),
    ("lm_head.", "lm_head."),
    ("model.language_model.", "model.language_model."),
    ("model.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.", TOWER),
    ("model.multi_modal_projector.", "model.multi_modal_projector."),
)
"""The names of llava-hf's folders: first those on the hub, which every transformers reads, then newer ones."""

OURS: tuple[Rule, ...] = tuple(rule for rule in LLAVA_HF if rule[0].startswith(("model.", "lm_head.")))

CLIP: tuple[Rule, ...] = (
    ("vision_model.", TOWER),
    ("embeddings.", f"{TOWER}embeddings."),
    ("pre_layrnorm.", f"{TOWER}pre_layrnorm."),
    ("encoder.", f"{TOWER}encoder."),
    ("post_layernorm.", f"{TOWER}post_layernorm."),
)
"""A CLIPVisionModel or the image half of a CLIPModel."""

RECOMPUTED = (
    (re.compile(r"(^|\.)embeddings\.position_ids$"), "position numbers of the vision tower, which are counted anew"),
    (re.compile(r"\.rotary_emb\.inv_freq$"), "rotary frequencies, which follow from the configuration"),
)
"""Stored by old versions of transformers, and no part of a model: left out, and the report says so."""
TEXT_HALF = (
    (re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)"), "CLIP's text half and heads"),
)
"""What a full CLIPModel has and a vision tower does not."""

_PEFT = re.compile(r"^base_model\.model\.")
_COPY = re.compile(r"\.modules_to_save(\.default)?\.")


def to_ours(name: str, rules: Iterable[Rule]) -> tuple[str, Rule] | None:
    """Return our name of a stored tensor and the rule that gave it; None where no rule fits."""
    for rule in rules:
        found = _translate(name, *rule)
        if found is not None:
            return found, rule
    return None


def from_ours(name: str, rules: Iterable[Rule]) -> str | None:
    """Return the name under which a layout stores one of our tensors; None where it has no place for it."""
    return next((found for theirs, ours in rules if (found := _translate(name, ours, theirs)) is not None), None)


def is_predictors(name: str) -> bool:
    """Whether a tensor with our name belongs to a predictor of Dynamic-LLaVA."""
    return name.startswith((IMAGE_PREDICTOR, OUTPUT_PREDICTOR))


def has_keep_first(name: str, rule: Rule) -> bool:
    """Return whether a tensor with our name, stored under `rule`, gives (keep, drop) where ours gives (drop, keep)."""
    return name.startswith(_LAST_LAYERS) and "_score_predictor." in rule[0]


def without_peft(name: str) -> str:
    """Return a tensor's name as the model had it before peft wrapped it."""
    return _COPY.sub(".", _PEFT.sub("", name))


def reason_to_leave_out(name: str, kinds: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    """Return what a stored tensor is, in words, where it belongs to no model; None for every other name."""
    return next((reason for pattern, reason in kinds if pattern.search(name)), None)


def _translate(name: str, source: str, target: str) -> str | None:
    match = _beginning(source).match(name)
    if match is None:
        return None
    number = match.groupdict().get("i")
    return (target if number is None else target.replace("{i}", number)) + name[match.end() :]


@cache
def _beginning(text: str) -> re.Pattern[str]:
    return re.compile("^" + re.escape(text).replace(re.escape("{i}"), r"(?P<i>\d+)"))
