"""Dynamic-LLaVA as a model of lmms-eval: chat messages, or plain questions and images, in; answers and counts out.

lmms-eval --model dynamic_llava --model_args pretrained=PATH,sparsity=both,image_keep_rate=0.2 --batch_size 16 ...
lmms-eval --model dynamic_llava --model_args pretrained=PATH,method=fastv,method.layer=3 --batch_size 16 ...
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image

from dynamic_llava.eval.harness import Harness, chat_prompt
from dynamic_llava.eval.lmms.requests import cut_answer, plan_batches, read_generation, request_prompt
from dynamic_llava.eval.predict import Prediction, progress
from dynamic_llava.processing.image_processor import ImageInput

Asked = tuple[str, list[ImageInput]]
"""A finished prompt and its images."""


@dataclass
class KeptCounts(TokenCounts):
    """lmms-eval's own counts of an answer, from which its efficiency columns come, and what was kept of it.

    `input_tokens` is the whole prompt, image tokens included, and `output_tokens` the whole answer, end token included.
    """

    image_tokens: int = 0
    """Image tokens of the prompt."""
    kept_image_tokens: int = 0
    """Those of them that every layer sees."""
    kept_output_tokens: int = 0
    """Output tokens that every layer sees; the last one, which is never fed back, does not count."""
    cache_bytes: int = 0
    """Keys and values of the row when the last token is said."""

    def to_dict(self) -> dict[str, int | None]:
        """Return what lmms-eval logs with the sample."""
        kept = ("image_tokens", "kept_image_tokens", "kept_output_tokens", "cache_bytes")
        return {**super().to_dict(), **{name: getattr(self, name) for name in kept}}


class DynamicLlavaLMM(Harness, lmms):
    """A checkpoint that answers lmms-eval's requests; the arguments come from --model_args, --batch_size and --device.

    Args:
        pretrained: folder or hub name of a checkpoint (llava-hf layout, or saved by this library).
        batch_size: rows of one call; the answers do not depend on it (in half precision up to ties).
        device: where the model runs; by default accelerate's choice, in several processes one device each.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        projector: package.module:Class of one's own projector, where the checkpoint has one; it is imported.
        switches: sparsity ("both", "image", "output", "none"), method, image_keep_rate, output_threshold,
            output_keep_rate; and settings of the method, as method.layer=3. Spaces separate the values of a tuple:
            lmms-eval splits at commas.
    Raises ValueError for anything else, before any weight is read.
    """

    is_simple = True
    settings_at: ClassVar[int] = 1
    """Place of the generation_kwargs among a request's arguments."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        projector: str | None = None,
        **switches: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} is not a positive number; nothing here finds one by itself")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is not None and self._world_size > 1:
            raise ValueError(f"device={device!r} was given to {self._world_size} processes; each chooses its own")
        self.device = self.accelerator.device if device is None else torch.device(device)
        self.open(pretrained, self.device, dtype, projector, switches, "lmms-eval's own --batch_size and --device")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return the answer to each request with its counts, in order; requests of one generation_kwargs share batches.

        An answer ends at its end token, at max_new_tokens, or before the task's `until` (see `read_generation`). Times
        and what was kept, in the mean, go to lmms-eval's `log_metrics`.
        """
        found: list[GenerationResult | None] = [None] * len(requests)
        begun = time.perf_counter()
        for places in self._batches(requests):
            batch = [requests[place] for place in places]
            results = self._answer(batch, [self.asked(request) for request in batch])
            for place, result in zip(places, results, strict=True):
                found[place] = result
                told = requests[place].args[0], requests[place].args[self.settings_at]
                self.cache_hook.add_partial("generate_until", told, result.text)
        answers = [result for result in found if result is not None]
        _log([result.token_counts for result in answers], time.perf_counter() - begun)
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: lmms-eval cannot score what would be returned."""
        raise NotImplementedError(
            "lmms-eval (0.7.3) turns log-likelihoods into text before it scores them, so that no multiple_choice or "
            "loglikelihood task gets a score; take the generating variant of the task, such as seedbench for "
            "seedbench_ppl. For perplexities use python -m dynamic_llava.eval"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Refuse: rounds are the chat class' matter."""
        raise NotImplementedError("tasks of several rounds are asked as chats; leave out --force_simple")

    def asked(self, request: Instance) -> Asked:
        """Return the prompt and the images of a request's document; none for a question of text alone."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())
        strange = sorted({type(visual).__name__ for visual in visuals if not isinstance(visual, Image.Image)})
        if strange:
            raise ValueError(
                f"document {doc_id} of task {task} shows {strange}; this model reads PIL images, no video and no sound"
            )
        return request_prompt(context, len(visuals), self.processor.conversation_prompt), visuals

    def _batches(self, requests: Sequence[Instance]) -> Any:
        batches = plan_batches(requests, self.batch_size, self.settings_at)
        return progress(batches, "answers" if self.rank == 0 else "")

    def _answer(self, batch: Sequence[Instance], asked: Sequence[Asked]) -> list[GenerationResult]:
        """Answer requests of one generation_kwargs in one call."""
        generation = read_generation(batch[0].args[self.settings_at])
        prompts, images = [prompt for prompt, _ in asked], [pictures for _, pictures in asked]
        # Random methods draw by the document, whatever the batch.
        said = self.answer(prompts, images, generation.settings, [request.args[3] for request in batch])
        texts = [cut_answer(self.processor.decode(one.tokens), generation.stops) for one in said]
        return [GenerationResult(text, self._counts(one)) for text, one in zip(texts, said, strict=True)]

    def _counts(self, said: Prediction) -> KeptCounts:
        return KeptCounts(
            input_tokens=said.prompt_tokens,
            output_tokens=len(said.tokens),
            image_tokens=len(said.image_kept) * self.processor.tokens_per_image,
            kept_image_tokens=sum(map(len, said.image_kept)),
            kept_output_tokens=sum(said.output_kept),
            cache_bytes=self.cache_bytes(said),
        )


class DynamicLlavaChatLMM(DynamicLlavaLMM):
    """The same for lmms-eval's messages: several images anywhere, system texts, earlier turns, tasks of rounds."""

    is_simple = False
    settings_at = 2

    def asked(self, request: Instance) -> Asked:
        """Return the prompt and the images of the messages that the task makes of a request's document."""
        return self._written(request, request.args[1](self._document(request)))

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Return the answers of each request, one a round; the task makes a round's messages of the earlier answers.

        Without counts: lmms-eval 0.7.3 cannot store these with several texts.
        """
        found: list[list[str]] = [[] for _ in requests]
        for places in self._batches(requests):
            for place, answers in zip(places, self._rounds([requests[place] for place in places]), strict=True):
                found[place] = answers
        return found

    def _rounds(self, batch: Sequence[Instance]) -> list[list[str]]:
        answers: list[list[str]] = [[] for _ in batch]
        told: list[Any] = [None] * len(batch)
        waiting = {place: request.args[1](self._document(request)) for place, request in enumerate(batch)}
        while waiting:
            asked = [batch[place] for place in waiting]
            written = [self._written(request, waiting[place]) for place, request in zip(waiting, asked, strict=True)]
            for place, result in zip(waiting, self._answer(asked, written), strict=True):
                answers[place].append(result.text)
            following = {}
            for place in waiting:
                payload = batch[place].args[1](
                    self._document(batch[place]),
                    round_idx=len(answers[place]),
                    previous_output=list(answers[place]),
                    previous_round_info=told[place],
                )
                if not isinstance(payload, tuple) or len(payload) != 4:
                    continue  # the messages of a task without rounds
                messages, ended, _, told[place] = payload
                if not ended:
                    following[place] = messages
            waiting = following
        return answers

    def _document(self, request: Instance) -> Any:
        _, _, _, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _written(self, request: Instance, messages: Any) -> Asked:
        try:
            return chat_prompt(self.processor, messages)
        except ValueError as error:
            raise ValueError(f"document {request.args[3]} of task {request.args[4]}: {error}") from None


def _log(counts: Sequence[Any], seconds: float) -> None:
    """Tell lmms-eval the time of all answers, and what was kept of one in the mean; nothing where there are none."""
    if not counts:
        return
    tokens = sum(count.output_tokens for count in counts)
    kept = ("kept_image_tokens", "kept_output_tokens", "cache_bytes")
    means = {name: fmean(getattr(count, name) for count in counts) for name in kept}
    log_metrics(seconds, tokens, tokens / seconds, {"total_requests": len(counts), **means})
