"""A function over the samples of a LLaVA-format file, in worker processes and in the order of the file."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from dynamic_llava.config import DataConfig
from dynamic_llava.data.json_stream import stream_list

CHUNK_SAMPLES = 256
"""Samples that a worker takes at a time."""
PARALLEL_BYTES = 8 << 20
"""Smaller files are done before worker processes have started."""

Indexed = list[tuple[int, Any]]
Result = TypeVar("Result")


def map_samples(function: Callable[[Indexed], Result], config: DataConfig, title: str) -> Iterator[Result | ValueError]:
    """Yield `function` of every chunk of (index, raw sample), in file order; last a ValueError if the file is broken.

    Every worker reads the whole file and keeps the chunks that are its own: decoding JSON is cheap beside what is done
    with it, and sending it to the workers is not. `title` names the progress bar, which appears after three seconds.
    Raises FileNotFoundError when there is no such file or image folder, and ChildProcessError when a worker is killed.
    """
    path = Path(config.json)
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}; give a LLaVA-format JSON file")
    if not Path(config.image_folder).is_dir():
        raise FileNotFoundError(f"there is no image folder {config.image_folder}; set data.image_folder")
    size, workers = path.stat().st_size, worker_count(config.workers)
    loader = DataLoader(
        _Chunks(function, path),
        batch_size=None,
        num_workers=workers if size >= PARALLEL_BYTES and workers > 1 else 0,
        collate_fn=_unchanged,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # or else the global one would be advanced, by the first run only
    )
    seconds = 1 if sys.stderr.isatty() else 60
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, delay=3, mininterval=seconds, leave=False) as bar:
        try:
            for result, place in loader:
                bar.update(place - bar.n)
                yield result
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                f"{title}: a worker process was killed, perhaps for want of memory ({' '.join(str(error).split())}); "
                "run the same command again, with fewer data.workers"
            ) from None


def worker_count(wanted: int) -> int:
    """Return `wanted` processes, or for 0 as many as this process may use cores, at most 16."""
    if wanted:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


class _Chunks(IterableDataset[tuple[Any, int]], Generic[Result]):
    """Pairs of a chunk's result and the bytes of the file read so far."""

    def __init__(self, function: Callable[[Indexed], Result], path: Path) -> None:
        self.function, self.path = function, path

    def __iter__(self) -> Iterator[tuple[Result | ValueError, int]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        with self.path.open("rb") as file:
            for number, chunk in enumerate(_chunks(stream_list(file, str(self.path)))):
                if number % workers == worker:
                    yield chunk if isinstance(chunk, ValueError) else self.function(chunk), file.tell()


def _chunks(samples: Iterator[Any]) -> Iterator[Indexed | ValueError]:
    chunk: Indexed = []
    broken = None
    try:
        for pair in enumerate(samples):
            chunk.append(pair)
            if len(chunk) == CHUNK_SAMPLES:
                yield chunk
                chunk = []
    except ValueError as error:
        broken = error
    if chunk:
        yield chunk
    if broken is not None:
        yield broken


def _one_thread(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker would start a thread per core for single texts


def _unchanged(value: Any) -> Any:
    return value
