"""Dynamic-LLaVA as a simple model of lmms-eval: plain questions and images in, answers out.

lmms-eval --model dynamic_llava --model_args pretrained=PATH,sparsity=both,image_keep_rate=0.2 --batch_size 16 ...
lmms-eval --model dynamic_llava --model_args pretrained=PATH,method=fastv,method.layer=3 --batch_size 16 ...
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from transformers import GenerationConfig

from dynamic_llava.config import nested_method
from dynamic_llava.eval.lmms.requests import cut_answer, plan_batches, read_generation, request_prompt
from dynamic_llava.eval.predict import progress, to_device
from dynamic_llava.methods import import_named
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.projectors import import_projector

DTYPES = ("auto", "float32", "bfloat16", "float16")
SWITCHES = ("sparsity", "method", "image_keep_rate", "output_threshold", "output_keep_rate")
"""Model arguments that go to `generate`, all optional: without them the checkpoint's own settings hold."""


class DynamicLlavaLMM(lmms):
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
        import_projector(projector)
        settings = [
            (name.removeprefix("method."), switches.pop(name)) for name in [*switches] if name.startswith("method.")
        ]
        unknown = sorted(set(switches) - set(SWITCHES))
        if unknown:
            raise ValueError(
                f"unknown model arguments {unknown}; the known ones are pretrained, dtype, projector, "
                f"{', '.join(SWITCHES)}, and lmms-eval's own --batch_size and --device"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(map(repr, DTYPES))}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} is not a positive number; nothing here finds one by itself")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is not None and self._world_size > 1:
            raise ValueError(f"device={device!r} was given to {self._world_size} processes; each chooses its own")
        self.device = self.accelerator.device if device is None else torch.device(device)
        if settings:
            named = [("name", switches["method"])] if "method" in switches else []
            switches["method"] = nested_method([*named, *settings])
        import_named(switches.get("method"))
        self.method = choose_method(DynamicLlavaConfig.from_pretrained(pretrained).sparsity, **switches)
        """The method that decides which tokens are kept."""
        self.processor = DynamicLlavaProcessor.from_pretrained(pretrained)
        model = DynamicLlavaForConditionalGeneration.load_for(self.method, pretrained, dtype=dtype)
        self.model = model.to(self.device).eval()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the answer to each request, in their order; requests with the same generation_kwargs share batches.

        An answer ends at its end token, at max_new_tokens, or before the task's `until` (see `read_generation`).
        """
        answers = [""] * len(requests)
        batches = plan_batches(requests, self.batch_size)
        for places in progress(batches, "answers" if self.rank == 0 else ""):
            batch = [requests[place] for place in places]
            for place, answer in zip(places, self._answer(batch), strict=True):
                answers[place] = answer
                self.cache_hook.add_partial("generate_until", requests[place].args[:2], answer)
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: lmms-eval cannot score what would be returned."""
        raise NotImplementedError(
            "lmms-eval (0.7.3) turns log-likelihoods into text before it scores them, so that no multiple_choice or "
            "loglikelihood task gets a score; take the generating variant of the task, such as seedbench for "
            "seedbench_ppl. For perplexities use python -m dynamic_llava.eval"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse: the rounds are made by code of the task, which no benchmark of the paper uses."""
        raise NotImplementedError(
            "tasks of several rounds are not offered through lmms-eval; the paper's one, multi-round LVIS-VQA, is a "
            "task of python -m dynamic_llava.eval"
        )

    def _answer(self, batch: Sequence[Instance]) -> list[str]:
        """Answer requests of one generation_kwargs in one call."""
        generation = read_generation(batch[0].args[1])
        images = [self._images(request) for request in batch]
        write = self.processor.conversation_prompt
        prompts = [request_prompt(request.args[0], len(row), write) for request, row in zip(batch, images, strict=True)]
        inputs = dict(self.processor(text=prompts, images=images, padding_side="left"))
        # Random methods draw by the document, whatever the batch.
        inputs["sample_key"] = torch.tensor([request.args[3] for request in batch])
        settings = GenerationConfig(**generation.settings, pad_token_id=self.processor.pad_token_id)
        sequences = self.model.generate(
            **to_device(inputs, self.device), generation_config=settings, method=self.method
        )
        answers = self.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :])
        return [cut_answer(answer, generation.stops) for answer in answers]

    def _images(self, request: Instance) -> list[Image.Image]:
        """The images of a request's document, none for a question of text alone."""
        _, _, doc_to_visual, doc_id, task, split = request.args
        visuals = list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())
        strange = sorted({type(visual).__name__ for visual in visuals if not isinstance(visual, Image.Image)})
        if strange:
            raise ValueError(
                f"document {doc_id} of task {task} shows {strange}; this model reads PIL images, no video and no sound"
            )
        return visuals
