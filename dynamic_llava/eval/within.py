"""A budget of bytes for a whole evaluation: one threshold, by the longest prompt of its tasks."""

from collections.abc import Iterable, Sequence
from typing import Any

from dynamic_llava.eval.answering import Measuring, prompt_of
from dynamic_llava.eval.options import RunOptions
from dynamic_llava.eval.tasks import Question, Task, task_label
from dynamic_llava.methods import Dynamic, Method
from dynamic_llava.model.kv_budget import check_kv_budget, keep_rate_within
from dynamic_llava.model.switches import at_keep_rate
from dynamic_llava.processing import DynamicLlavaProcessor

ROWS = 256
"""Prompts that are counted at once."""


def method_within_budget(
    options: RunOptions, tasks: Iterable[Task], model: Any, processor: DynamicLlavaProcessor, method: Method
) -> Dynamic:
    """Return Dynamic-LLaVA with the threshold by which every answer of the tasks stays within options.kv_budget.

    The longest prompt decides for all, so that an answer does not depend on its batch. On average: one answer may keep
    more of its tokens than another. ValueError for a task that measures the model in its own way, and for a budget
    that is too small.
    """
    assert options.kv_budget is not None
    chosen = check_kv_budget(options.kv_budget, model.config, method)
    rates = []
    for task in tasks:
        if isinstance(task, Measuring):
            raise ValueError(
                f"kv_budget is for tasks that generate one answer, and {task_label(task)} asks in its own way; give "
                "output_keep_rate instead, or leave the task out"
            )
        questions = task.questions(options.data_root, options.hub(task))[: options.limit]
        longest = options.max_new_tokens or task.max_new_tokens
        for inputs in _prompts(questions, processor):
            size = model.dtype.itemsize
            rates.append(keep_rate_within(options.kv_budget, model.config, chosen, inputs, longest, size))
    return at_keep_rate(chosen, "output_keep_rate", min(rates), model.config.sparsity) if rates else chosen


def _prompts(questions: Sequence[Question], processor: DynamicLlavaProcessor) -> Iterable[dict[str, Any]]:
    for start in range(0, len(questions), ROWS):
        texts = [prompt_of(processor, one.text, one.image is not None) for one in questions[start : start + ROWS]]
        rows = [processor.encode_prompt(text) for text in texts]
        yield dict(processor.pad(rows))
