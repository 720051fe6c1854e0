"""The same command twice on one machine: the same bits, whatever else the machine does."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.soak.jobs import JOBS, Bench

MINUTES, SHARDS = 4, 1
TWICE = ("training", "training on two processes", "checkpointing", "evaluation", "world building")
PAIRS = 2


def planned(shard):
    """Return job -> pairs of runs."""
    return {f"{name}, twice": PAIRS for name in TWICE}


def run(ledger, shard, seed, folder):
    """Run every job some times, each time in an empty folder."""
    for name in TWICE:
        check, first = f"{name}, twice", None
        if not ledger.wants(check):
            continue
        bench = Bench(JOBS[name], folder / name.replace(" ", "-"))
        for _ in range(1 + PAIRS):
            if first is not None and not ledger.wants(check):
                break
            found = bench.undisturbed()[0] | states(bench.work)
            if first is not None:
                differing = sorted(key for key in first if first[key] != found.get(key))
                with ledger.case(check, " ".join(["python", *bench.job.arguments])):
                    assert not differing, f"differs between two runs: {differing}"
            first = first or found
        bench.remove(bench.folder)


def states(work: Path):
    """Return checkpoint's file -> a digest of every tensor in it: weights, the optimizer's moments, random states."""
    found = {}
    for path in sorted(work.glob("runs/*/checkpoint-*/*")):
        if path.suffix == ".safetensors":
            found[str(path)] = values(load_file(path))
        elif path.suffix == ".pt":
            found[str(path)] = values(torch.load(path, weights_only=True))
    return found


def values(state):
    """Return nested tensors and numbers as what can be compared."""
    if isinstance(state, torch.Tensor):
        return state.dtype, tuple(state.shape), state.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(state, dict):
        return [(str(key), values(one)) for key, one in sorted(state.items(), key=lambda pair: str(pair[0]))]
    return [values(one) for one in state] if isinstance(state, list | tuple) else state
