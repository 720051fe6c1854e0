"""What an answer line of LVIS-VQA and ShareGPT4V-VQA holds: perplexity, METEOR, and the columns of Table 3 behind both.

Names are those of the published scripts' lines. Two runs stand behind them, the teacher-forced one and the generating
one, so the latter's fields begin with `meteor_`. Numbers are numbers; lengths are in tokens, memory in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from dynamic_llava.costs import DecoderShape, decoder_shape, flops_paper, kv_bytes
from dynamic_llava.eval.generation.dialogues import (
    EncodedRound,
    LiveDialogues,
    RoundSeparator,
    answer_dialogues,
    encode_dialogue,
)
from dynamic_llava.eval.generation.perplexity import Scored, score_dialogues
from dynamic_llava.eval.metrics.meteor import nltk_meteor
from dynamic_llava.eval.tasks.base import Said


@dataclass(frozen=True)
class Lengths:
    """The tokens of one dialogue, of all its rounds together."""

    image: int
    image_seen: Sequence[int]
    """Per layer the image tokens that it sees."""
    text: int
    """Text tokens of all prompts, system text included."""
    text_seen: tuple[Sequence[int], Sequence[int]]
    """Per layer those of the first prompt, and of all, that it sees."""
    output: int
    """Answer tokens that were fed; the last one of each answer is not."""
    output_seen: Sequence[int]
    """Per layer those that it sees, and so stores, unless they are evicted."""
    heads_hold: tuple[int, int] | None = None
    """Tokens that all key heads held after the first prompt, and at the end, where the method evicts."""

    def fields(self, shape: DecoderShape, bytes_per_value: int, *, several: bool) -> dict[str, int]:
        """Return lengths, memory and decode FLOPs by the names that answer lines give them.

        `decode_flop` is Table 3's: Eq. 13 on the output tokens in one pass. `decode_kv_bytes` is what the keys and
        values of these tokens fill; `max_prefill_memory` and `max_decode_memory` are what all tokens fill after the
        first prompt and at the end (the scripts read the device's allocation there, which is no property of a method).
        Of a method that evicts, both are what its heads hold, and `decode_kv_bytes` is by how much that has grown.
        """

        def filled(tokens: Sequence[int]) -> int:
            return kv_bytes(shape, tokens, bytes_per_value=bytes_per_value)

        first, texts = self.text_seen
        opened = filled([*map(sum, zip(self.image_seen, first, strict=True))])
        ended = filled([*map(sum, zip(self.image_seen, texts, self.output_seen, strict=True))])
        answers = filled(self.output_seen)
        if self.heads_hold is not None:
            opened, ended = (count * 2 * shape.head_width * bytes_per_value for count in self.heads_hold)
            answers = ended - opened
        return {
            "total_token_length": self.image + self.text + self.output,
            # The scripts count the place of the image as one more token where there are several rounds.
            "instruct_token_length": self.text + several,
            "output_token_length": self.output,
            "output_cache_length": self.output_seen[-1],
            "max_prefill_memory": opened,
            "max_decode_memory": ended,
            "decode_flop": flops_paper(self.output_seen, shape.hidden, shape.layers),
            "decode_kv_bytes": answers,
        }


@dataclass(frozen=True)
class Generated:
    """The model's own answers to one dialogue's questions."""

    tokens: list[list[int]]
    """Ids per round, the end token included where it came."""
    image_seen: list[int]
    """Per layer the image tokens that it saw."""
    output_seen: list[int]
    """Per layer the fed answer tokens that it saw."""
    text_seen: tuple[list[int], list[int]]
    """As those of `Lengths`."""
    heads_hold: tuple[int, int] | None
    """As those of `Lengths`."""


def measure_dialogues(
    run: Any,
    dialogues: Sequence[Sequence[Sequence[str]]],
    pixels: torch.Tensor,
    separator: RoundSeparator | None,
    sample_key: torch.Tensor | None = None,
) -> list[Said]:
    """Measure (question, reference) rounds about one image each, (B, 3, S, S); separator=None says one round each.

    `run` is the ModelRun of eval/answering.py; sample_key (B,) int64 are the noise keys of methods that draw. Raises
    ValueError, before anything is computed, where NLTK's data are missing.
    """
    meteor = nltk_meteor()
    model, processor = run.model, run.processor
    rows = [
        encode_dialogue(
            processor.tokenizer,
            rounds,
            processor.tokens_per_image,
            processor.image_token_id,
            separator or "official",
            processor.prompt_format,
        )
        for rounds in dialogues
    ]
    scored = score_dialogues(model, rows, pixels, run.method, processor.pad_token_id, sample_key)
    generated = _generate(run, rows, pixels, sample_key)
    measured = []
    for rounds, row, one, said in zip(dialogues, rows, scored, generated, strict=True):
        texts = [processor.decode(tokens).strip() for tokens in said.tokens]
        scores = [meteor(reference, text) for (_, reference), text in zip(rounds, texts, strict=True)]
        measured.append(_line(run, row, one, said, texts, scores, several=separator is not None))
    return measured


def _generate(
    run: Any, rows: Sequence[Sequence[EncodedRound]], pixels: torch.Tensor, sample_key: torch.Tensor | None
) -> list[Generated]:
    ends = run.model.generation_config.eos_token_id
    live = LiveDialogues(run.model, pixels, run.method, sample_key)
    prompts = [[one.prompt for one in row] for row in rows]
    said = answer_dialogues(live, prompts, run.max_new_tokens, set(ends if isinstance(ends, list) else [ends]))
    counted = live.image_seen.tolist(), live.output_seen.tolist(), live.text_seen(), live.heads_hold()
    return [Generated(tokens, *numbers) for tokens, *numbers in zip(said, *counted, strict=True)]


def _line(
    run: Any,
    row: Sequence[EncodedRound],
    scored: Scored,
    said: Generated,
    texts: list[str],
    scores: list[float],
    *,
    several: bool,
) -> Said:
    image = run.processor.tokens_per_image
    text = sum(len(one.prompt) for one in row) - image
    shape, size = decoder_shape(run.model.config), run.model.dtype.itemsize
    fed, own_fed = sum(len(one.answer) - 1 for one in row), sum(len(one) - 1 for one in said.tokens)
    forced = Lengths(image, scored.image_seen, text, scored.text_seen, fed, scored.output_seen, scored.heads_hold)
    free = Lengths(image, said.image_seen, text, said.text_seen, own_fed, said.output_seen, said.heads_hold)
    extra: dict[str, Any] = dict(forced.fields(shape, size, several=several))
    own = free.fields(shape, size, several=several)
    extra |= {f"meteor_{name}": value for name, value in own.items()}
    perplexities = list(scored.perplexities)
    if several:
        extra |= {"answer": texts, "ppl": perplexities, "meteor": scores}
        extra |= {"mean_round_ppl": fmean(perplexities), "mean_round_meteor": fmean(scores)}
    else:
        extra |= {"ppl": perplexities[0], "meteor": scores[0]}
    dropped = text - said.text_seen[1][-1]
    metadata = {
        "prompt_tokens": image + text,
        **({"prompt_dropped": dropped} if dropped else {}),
        "image_kept": [said.image_seen[-1]],
        "image_seen": said.image_seen,
        "output_tokens": free.output + 1,
        "output_kept": said.output_seen[-1],
        **({} if said.heads_hold is None else {"heads_hold": said.heads_hold[1]}),
        "tokens": said.tokens,
    }
    return Said("\n".join(texts), metadata, extra)
