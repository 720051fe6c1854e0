"""Long runs in one process: flat memory, a cache of the size that its formula says, eight threads, bfloat16."""

import gc
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import StoppingCriteria

from dynamic_llava.costs import decoder_shape, kv_bytes
from tests.builders import IMAGE_TOKEN, build_model, fixed_rows, prompts

MINUTES, SHARDS = 8, 1
TOKENS, CALLS, THREADED = 10_000, 1_000, 400
FLAT = 0.02
"""Share of the resident memory by which it may grow."""
ONE_GENERATION = f"{TOKENS:,} tokens in one generation: memory flat within 2 %, cache bytes as by formula"
MANY_CALLS = f"{CALLS:,} generations in one process: memory flat within 2 %"
EIGHT_THREADS = "eight threads give what one gives, bit by bit"
DRIFT = "bfloat16 beside float32, no pass or fail"
NO_IMAGE_TOKEN = {"suppress_tokens": [IMAGE_TOKEN]}
"""Random weights would answer with it, and a dense step without a cache would look for the image, as transformers'."""
MODES = ("both", "image", "output", "none")


def planned(shard):
    """Return check -> cases: a generation, calls, calls, a comparison."""
    return {ONE_GENERATION: 1, MANY_CALLS: CALLS, EIGHT_THREADS: THREADED, DRIFT: 1}


def run(ledger, shard, seed, folder):
    """Run the four checks, dearest last."""
    torch.set_num_threads(1)
    again = "from tests.soak import long_runs\n\nlong_runs."
    with ledger.case(DRIFT, f"{again}drift({seed})"):
        ledger.checks[DRIFT].note = drift(seed)
    _counted(ledger, EIGHT_THREADS, f"{again}eight_threads({THREADED}, {seed})", eight_threads(THREADED, seed))
    _counted(ledger, MANY_CALLS, f"{again}many_calls({CALLS}, {seed})", many_calls(CALLS, seed))
    if ledger.left() > 0:
        with ledger.case(ONE_GENERATION, f"{again}one_generation({TOKENS}, {seed})"):
            ledger.checks[ONE_GENERATION].note = one_generation(TOKENS, seed)


def _counted(ledger, name, reproduction, cases):
    """Count every turn of a generator that checks something; the first failure ends it."""
    try:
        for _ in cases:
            ledger.passed(name)
            if ledger.left() < 0:
                return
    except AssertionError as error:
        ledger.failed(name, error, f"list({reproduction})")


def resident():
    """Return the bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Watch(StoppingCriteria):
    """Notes the resident memory after a tenth of the tokens, and never stops a generation."""

    def __init__(self, at):
        self.at, self.noted = at, None

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.at:
            self.noted = resident()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def one_generation(tokens, seed):
    """Generate many tokens for two ragged rows; return what was measured in words."""
    model, inputs = (
        build_model(kv_heads=2, layers=3, seed=seed % 100),
        prompts(fixed_rows(seed=seed % 1000, output=0)[:2]),
    )
    start = inputs["input_ids"].shape[1]
    watch = Watch(start + tokens // 10)
    out = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=True, return_dict_in_generate=True, stopping_criteria=[watch]
    )
    assert out.sequences.shape[1] == start + tokens
    after, cache, block = resident(), out.cache, model.config.sparsity.cache_block

    def rounded(count):
        return -(-count // block) * block

    lengths, dense = out.sparsity.cache_lengths.tolist(), out.sparsity.dense_cache_lengths.tolist()
    kept = sum(int(one.sum()) for one in out.sparsity.output_decisions)
    assert 0.1 < kept / (2 * tokens) < 0.9, f"{kept} of {2 * tokens} tokens were kept: nothing was tried"
    shape = decoder_shape(model.config)
    sizes = {"sparse_layer": model.config.sparsity.sparse_layer, "bytes_per_value": 4, "batch": 2}
    # A token needs a slot while it is computed, whether it stays or not.
    last = [int(one[-1]) for one in out.sparsity.output_decisions]
    needed = max(length - stayed + 1 for length, stayed in zip(lengths, last, strict=True))
    formula = kv_bytes(shape, rounded(max(dense)), kept=rounded(needed), **sizes)
    assert cache.allocated_bytes() == formula, f"{cache.allocated_bytes()} bytes in the cache, {formula} by the formula"
    grown = after - watch.noted - formula * 9 // 10
    assert grown < FLAT * after, f"{grown / 1e6:.1f} MB more than the cache's growth, at {after / 1e6:.0f} MB"
    return f"{formula / 1e6:.1f} MB of cache as by formula, {max(0, grown) / 1e6:.1f} MB of other growth"


def many_calls(calls, seed):
    """Generate again and again; fail when the memory at the end exceeds that after a fifth of the calls."""
    model, first = build_model(kv_heads=2, layers=3, seed=seed % 100), None
    for number in range(calls):
        inputs = prompts(fixed_rows(seed=(seed + number) % 1000, output=0))
        model.generate(
            **inputs, max_new_tokens=5, do_sample=number % 3 == 0, sparsity=MODES[number % 4], **NO_IMAGE_TOKEN
        )
        if number == calls // 5:
            first = resident()
        yield number
    grown = resident() - first
    assert grown < FLAT * first, f"{grown / 1e6:.1f} MB more after {calls} calls, at {first / 1e6:.0f} MB"


def eight_threads(calls, seed):
    """Give the same calls to one thread and to eight; fail where a logit differs."""
    model = build_model(kv_heads=2, layers=3, seed=seed % 100)
    jobs = [(prompts(fixed_rows(seed=(seed + n) % 1000, output=0)), MODES[n % 4], n % 2 == 0) for n in range(calls)]

    def answer(job):
        inputs, mode, cached = job
        with torch.no_grad():
            out = model.generate(
                **inputs, sparsity=mode, use_cache=cached, max_new_tokens=6, do_sample=False, output_logits=True,
                return_dict_in_generate=True, **NO_IMAGE_TOKEN,
            )  # fmt: skip
        return out.sequences, torch.stack(out.logits)

    with ThreadPoolExecutor(8) as pool:
        for number, together in enumerate(pool.map(answer, jobs)):
            alone = answer(jobs[number])
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), f"call {number} differs"
            yield number


@torch.no_grad()
def drift(seed, tokens=256):
    """Return in words how far bfloat16 is from float32 on answers of float32: logits, best tokens, decisions."""
    model, inputs = build_model(kv_heads=2, seed=seed % 100), prompts(fixed_rows(seed=seed % 1000, output=0))
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
    start, real = inputs["input_ids"].shape[1], torch.nn.functional.pad(inputs["attention_mask"], (0, tokens), value=1)
    output = torch.arange(start + tokens)[None] >= start
    batch = {
        "input_ids": out.sequences, "attention_mask": real, "output_mask": output.expand_as(out.sequences),
        "pixel_values": inputs["pixel_values"], "labels": out.sequences,
    }  # fmt: skip
    exact = model(**batch)
    half = model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    rounded = half(**batch)
    given = half(**batch, keep_mask=exact.sparsity.keep_mask)
    where, scale = real.bool(), exact.logits[real.bool()].abs().max()
    differences = (given.logits.float() - exact.logits)[where].abs() / scale
    best = (given.logits.argmax(-1) == exact.logits.argmax(-1))[:, start:].float().mean()
    decided = (rounded.sparsity.keep_mask.bool() == exact.sparsity.keep_mask.bool())[where].float().mean()
    return (
        f"with the same decisions logits differ by {100 * differences.mean():.2f} % of their scale on average and "
        f"{100 * differences.max():.1f} % at most, {100 * best:.1f} % of the best tokens agree; {100 * decided:.1f} % "
        "of the decisions agree"
    )
