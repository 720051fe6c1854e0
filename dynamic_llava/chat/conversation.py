"""A conversation on a kept cache: each turn feeds its new tokens only, on what the model has admitted so far.

Shapes: 1 row, N tokens of the conversation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dynamic_llava.config import SparsityMode
from dynamic_llava.costs import decoder_shape, kv_bytes
from dynamic_llava.engine.cache import CACHE
from dynamic_llava.engine.decide import check_question
from dynamic_llava.methods import Method, Spelling
from dynamic_llava.model import AdmissionCache, SparsityRecord
from dynamic_llava.model.kv_budget import check_kv_budget, method_within
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing.prompts import IMAGE_PLACE


@dataclass(frozen=True)
class CacheUse:
    """How full the cache of a conversation is, and how full a dense one would be. Tokens per layer; bytes in all."""

    sparse_tokens: int
    """Tokens in each layer behind a method's last cut; in every layer of a dense conversation; where a method evicts,
    the mean over layers and key heads."""
    dense_tokens: int
    """Tokens that were fed, which each layer below a method's first cut holds."""
    bytes: int
    """Bytes of the filled slots, keys and values."""
    dense_bytes: int
    """Bytes that a dense cache would hold."""
    where: str = "in sparse layers"
    """What `sparse_tokens` are counted in."""

    def __str__(self) -> str:
        if self.sparse_tokens == self.dense_tokens:
            return f"cache: {_readable(self.bytes)}, {self.dense_tokens} tokens in every layer"
        share = round(100 * self.bytes / self.dense_bytes)
        size = f"cache: {_readable(self.bytes)} of {_readable(self.dense_bytes)} dense ({share} %)"
        return f"{size}, {self.sparse_tokens} of {self.dense_tokens} tokens {self.where}"


@dataclass(frozen=True)
class Step:
    """One new token of an answer, and what has become known about the one before it."""

    token: int
    kept: bool | None
    """Whether the answer's previous token stays in the cache of the sparse layers; None for the first token."""
    use: CacheUse
    """The cache without the new token, which the next step feeds."""


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: list[int]
    """Its ids, the end token included if it came."""
    kept: list[bool]
    """One decision per token but the last, which has not been fed yet."""
    use: CacheUse
    ended: Literal["end", "length", "stopped"]
    """Why it ended: by itself, for want of room or at max_new_tokens, or because it was told to stop."""


class Conversation:
    """One user's turns and the model's answers; owns the cache, so that nothing of it is left on the model.

        chat = Conversation(model, processor)
        print(chat.ask("What is in the picture?", images=["cat.jpg"]).text)
        print(chat.ask("And what is left of it?").text)

    Args:
        model: a DynamicLlavaForConditionalGeneration.
        processor: its DynamicLlavaProcessor.
        sparsity: "both", "image", "output", or "none" for a dense cache; default both, unless `method` is given.
        method: what decides instead of Dynamic-LLaVA, as `generate` takes it.
        kv_budget: bytes (an int, or "512MiB") that the conversation's keys and values may fill when an answer of
            max_new_tokens ends; each turn chooses the threshold of output tokens by what is left (docs/method.md, 4).
        max_new_tokens: most tokens of an answer; fewer where the model's context has no more room.
        temperature: 0 is greedy.
        options: more arguments of `generate`, such as top_p or compile.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        sparsity: SparsityMode | None = None,
        method: Spelling | None = None,
        kv_budget: int | str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        **options: Any,
    ) -> None:
        check_settings(max_new_tokens, temperature)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self.model, self.processor = model, processor
        self.method = choose_method(model.config.sparsity, sparsity=sparsity, method=method)
        """What decides; with a budget, but for the threshold of output tokens."""
        self.kv_budget = kv_budget
        if kv_budget is not None:
            check_kv_budget(kv_budget, model.config, self.method)
        self.max_new_tokens = max_new_tokens
        self._options = {"pad_token_id": processor.pad_token_id, **sampling, **options}
        self._shape = decoder_shape(model.config)
        self.reset()

    def check_later_images(self) -> None:
        """Raise ValueError where the method cannot decide on an image that comes now; the conversation stays."""
        cuts = () if self.method.is_dense else self.method.cuts(self.model.config.text_config.num_hidden_layers)
        if self.turns and any(cut.reads_question for cut in cuts):
            check_question(self.method, torch.ones(1, 1, dtype=torch.bool))

    def reset(self) -> None:
        """Forget everything that was said."""
        config = self.model.config
        self.turns: list[tuple[str, str]] = []
        """Questions, their image places included, and answers."""
        self.cache: Any = None
        """The cache, between turns; an AdmissionCache unless the conversation is dense."""
        if not self.method.is_dense:
            layers, block = config.text_config.num_hidden_layers, config.sparsity.cache_block
            self.cache = AdmissionCache.for_method(self.method, layers, block)
        self.ids = torch.zeros(1, 0, dtype=torch.int64, device=self.model.device)
        """(1, N) int64: every token so far; the last one is fed with the next turn."""
        self.output_mask = self.ids.bool()
        """(1, N) bool: tokens of an answer, end tokens included."""

    @property
    def record(self) -> SparsityRecord | None:
        """What was kept of the whole conversation; None before the first turn and in a dense conversation."""
        return self.cache.record if isinstance(self.cache, AdmissionCache) else None

    def ask(
        self,
        question: str,
        images: Sequence[Any] = (),
        *,
        on_step: Callable[[Step], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer a question about `images` (Pillow images or files, put in front of it) and all that came before.

        `on_step` is called with each new token as soon as it is chosen; after each, `stop` is asked whether to end the
        answer there. Raises ValueError, with the conversation as it was, for an empty question, one that holds
        `<image>`, an image that cannot be read (FileNotFoundError for none), and when there is no room for an answer,
        in the model's context or in the budget of bytes.
        Any error while the model runs begins the conversation anew: a cache that was left in the middle of a pass
        cannot be trusted.
        """
        if IMAGE_PLACE in question:
            raise ValueError(f"the question holds {IMAGE_PLACE!r}; give the images as `images`, they come first")
        if not question.strip():
            raise ValueError("the question is empty; ask something")
        if images:
            self.check_later_images()
        text = "\n".join([*[IMAGE_PLACE] * len(images), question.strip()])
        pixels = self.processor.preprocess_images(images) if images else None
        new_ids, closing = self._new_tokens(text)
        ids = torch.cat([self.ids, new_ids], dim=1)
        output = torch.cat([self.output_mask, (torch.arange(new_ids.shape[1]) < closing)[None].to(ids.device)], dim=1)
        room = self.model.config.text_config.max_position_embeddings - ids.shape[1]
        if room < 1:
            raise ValueError(
                f"with this question the conversation has {ids.shape[1]} tokens and the model reads "
                f"{ids.shape[1] + room} at most; begin a new one"
            )
        method = self._method_for(ids, min(self.max_new_tokens, room))
        steps = _Steps(self._use, ids.shape[1], None if self.method.is_dense else self.cache, on_step)
        try:
            result = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                output_mask=output,
                pixel_values=pixels,
                cache=self.cache,
                method=method,
                max_new_tokens=min(self.max_new_tokens, room),
                streamer=steps,
                stopping_criteria=None if stop is None else [_Stop(stop)],
                return_dict_in_generate=True,
                **self._options,
            )
        except BaseException:
            self.reset()
            raise
        self.cache, self.ids = result.cache, result.sequences
        self.output_mask = torch.nn.functional.pad(output, (0, len(steps.tokens)), value=True)
        answer = self._answer(steps, min(self.max_new_tokens, room))
        self.turns.append((text, answer.text))
        return answer

    def _method_for(self, ids: Tensor, longest: int) -> Method:
        """Return what decides in a turn that ends the ids (1, N) so far; ValueError where the budget has no room."""
        if self.kv_budget is None:
            return self.method
        given = {"input_ids": ids, CACHE: self.cache}
        return method_within(self.kv_budget, self.model.config, self.method, given, longest, self.model.dtype.itemsize)

    def _new_tokens(self, text: str) -> tuple[Tensor, int]:
        """Return the ids (1, N) that a question adds; the first 0 or 1 of them still close the answer before it."""
        processor, form, closing = self.processor, self.processor.prompt_format, 0
        if not self.turns:
            ids = processor.encode_prompt(processor.conversation_prompt([(text, None)]))
        else:
            # Tokenised behind the end of an answer, as in training: a tokenizer may treat the start of a text apart.
            prompt = form.end_token + form.question_opening + form.spoken(text) + form.answer_opening
            ids, end = processor.encode_prompt(prompt), processor.end_token_id
            closing = int(self.ids[0, -1] != end)
            first = ids.index(end, int(ids[0] == processor.tokenizer.bos_token_id))  # the start token may be the same
            ids = ids[first + 1 - closing :]
        return torch.tensor([ids], dtype=torch.int64, device=self.model.device), closing

    def _answer(self, steps: "_Steps", most: int) -> Answer:
        tokens, fed, record = steps.tokens, len(steps.tokens) - 1, self.record
        decisions = [True] * fed if record is None else record.output_decisions[0].tolist()
        ended: Literal["end", "length", "stopped"] = "length" if len(tokens) == most else "stopped"
        ends = self._options.get("eos_token_id", self.model.generation_config.eos_token_id)
        if tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            ended = "end"
        text = self.processor.decode(tokens).strip()
        return Answer(text, tokens, decisions[len(decisions) - fed :], steps.use(), ended)

    def _use(self, fed: int) -> CacheUse:
        """Return how full the cache is after so many tokens."""
        size = partial(kv_bytes, self._shape, bytes_per_value=self.model.dtype.itemsize)
        if not isinstance(self.cache, AdmissionCache):
            return CacheUse(fed, fed, size(fed), size(fed))
        by_head = self.cache.head_lengths()
        if by_head is not None:
            mean = float(by_head.float().mean())
            return CacheUse(round(mean), fed, round(mean * size(fed) / fed), size(fed), "in a head of a layer")
        held = torch.stack([slots.open_lengths()[0] for slots in self.cache.groups]).tolist()
        return CacheUse(held[-1], fed, size([held[group] for group in self.cache.group_of]), size(fed))


class _Steps:
    """What `generate` takes for a streamer: `put` gets the prompt once, then each new token after it was chosen.

    By then the cache holds the decision about the token before.
    """

    def __init__(
        self,
        use: Callable[[int], CacheUse],
        prompt_tokens: int,
        cache: AdmissionCache | None,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.tokens: list[int] = []
        self._make_use, self._prompt_tokens, self._cache, self._on_step = use, prompt_tokens, cache, on_step
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, N), or a new token (1,)."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.tokens.append(int(value))
        if self._on_step is not None:
            self._on_step(Step(self.tokens[-1], self._decision(), self.use()))

    def end(self) -> None:
        """Nothing is held back."""

    def use(self) -> CacheUse:
        """Return how full the cache is: without the last token, which has not been fed."""
        return self._make_use(self._prompt_tokens + len(self.tokens) - 1)

    def _decision(self) -> bool | None:
        if len(self.tokens) < 2:
            return None
        return True if self._cache is None else bool(self._cache.decisions.latest()[0])


class _Stop:
    """What `generate` takes for a stopping criterion: ends the answer between two steps, with the cache in order."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._asked(), dtype=torch.bool, device=input_ids.device)


def check_settings(max_new_tokens: int, temperature: float) -> None:
    """Raise ValueError for settings that no conversation can have."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not possible; give 1 or more")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative; 0 is greedy, 1 samples as the model predicts")


def _readable(count: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
