"""A word-level tokenizer for the tiny world: every word of its questions, descriptions and of the vicuna_v1 prompt.

Words carry their leading space (`▁red`), punctuation stands alone, and a piece of text always starts with a space
mark, as with LLaMA's tokenizer: text may be cut at `<image>` or `</s>` without changing the ids, and
decode(encode(text)) == text.
"""

import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dynamic_llava.tiny.world.descriptions import REQUESTS, STYLES, describe
from dynamic_llava.tiny.world.questions import KINDS, NUMBERS, ask
from dynamic_llava.tiny.world.scenes import BACKGROUNDS, COLORS, COLUMNS, ROWS, SHAPES, SIZES, sample_scene

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE)
_MARK = "\u2581"
_PUNCTUATION = ".,?"


def build_tokenizer(prompt_texts: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer over the world's words and those of `prompt_texts` (system prompt and roles).

    The vocabulary does not depend on any random draw; ids are the special tokens, then punctuation, then sorted words.
    """
    words = _world_words() | _words(" ".join(prompt_texts))
    entries = [*SPECIAL, f"{_MARK}\n", *_PUNCTUATION, *sorted(_MARK + word for word in words)]
    backend = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +$"), "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(replacement=_MARK, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(f"[{_PUNCTUATION}]"), "isolated"),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(f"{_MARK}\n", "\n"),
            decoders.Replace(_MARK, " "),
            decoders.Fuse(),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, entries.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _words(text: str) -> set[str]:
    return {word for word in re.split(rf"[\s{re.escape(_PUNCTUATION)}]+", text) if word}


def _world_words() -> set[str]:
    """Every attribute word, and the words of the templates as met in 300 fixed scenes (far more than they need)."""
    words = {w for group in (COLORS, SHAPES, SIZES, BACKGROUNDS, ROWS, COLUMNS, NUMBERS, ("Yes", "No")) for w in group}
    words |= _words(" ".join(request for requests in REQUESTS.values() for request in requests))
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng)
        for style in STYLES:
            words |= _words(describe(scene, style).text)
        for question in (ask(scene, kind, rng) for kind in KINDS):
            words |= _words(question.text) if question else set()
    return words
