"""One checkpoint on the tiny world's test set: the numbers of one row, without the main job's comparisons."""

import json
import statistics
from pathlib import Path
from typing import Any

from dynamic_llava.costs import decoder_shape
from dynamic_llava.eval import predict
from dynamic_llava.eval.efficiency import prefill_costs
from dynamic_llava.eval.identity import method_settings
from dynamic_llava.eval.writing import write_text
from dynamic_llava.methods import Method
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.provenance import environment
from dynamic_llava.tiny.job import asking
from dynamic_llava.tiny.job.config import TinyJobConfig
from dynamic_llava.tiny.job.evaluation import RowOutput, quality
from dynamic_llava.tiny.job.testset import TestSet


def measure(checkpoint: Path, test: TestSet, method: Method) -> dict[str, float]:
    """Return accuracy, perplexity, recall, realised keep rates and costs of a checkpoint, by the main job's names."""
    model = DynamicLlavaForConditionalGeneration.load_for(method, checkpoint)
    processor = DynamicLlavaProcessor.from_pretrained(checkpoint)
    settings, switches = TinyJobConfig(), {"method": method}
    forced = asking.likelihood(
        model,
        asking.answer_batches(processor, test.descriptions, settings.batch_size),
        switches=switches,
        title="perplexity",
    )
    output = RowOutput(
        *(
            predict.generate_answers(
                model,
                processor,
                asking.prompt_batches(processor, queries, settings.batch_size),
                max_new_tokens=most,
                switches=switches,
                title=title,
            )
            for queries, most, title in (
                (test.questions, settings.answer_tokens, "questions"),
                (test.descriptions, settings.description_tokens, "descriptions"),
            )
        )
    )
    costs = prefill_costs(
        decoder_shape(model.config),
        model.config.sparsity,
        output.descriptions,
        processor.tokens_per_image,
        method=method,
    )
    return {
        "ppl": asking.perplexity(forced.nll, forced.tokens),
        "keep_image": forced.image_keep_rate,
        "keep_output_forced": forced.output_keep_rate,
        **quality(output, test),
        **costs,
        "kv_kib": statistics.fmean(said.cache_bytes for said in output.descriptions) / 1024,
    }


def write_measures(checkpoint: Path, test: TestSet, folder: Path, **switches: Any) -> Path:
    """Measure a checkpoint and write <folder>/summary.json, whole or not at all; returns its path.

    `switches` are `sparsity` and `method` as `choose_method` takes them. ValueError, before any weight is read, for a
    method that is not known, or one that decides by weights which the checkpoint lacks.
    """
    config = DynamicLlavaConfig.from_pretrained(checkpoint).sparsity
    method = choose_method(config, **switches)
    summary = {
        "model": str(checkpoint),
        **method_settings(method, config),
        "questions": len(test.questions),
        "descriptions": len(test.descriptions),
        "metrics": measure(checkpoint, test, method),
        "environment": environment(),
    }
    return write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
