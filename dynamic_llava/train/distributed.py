"""One process among several: joining the others before any weight exists, and what the first does for all.

DeepSpeed is imported only for runs that use it.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from dynamic_llava.files import Lock

log = logging.getLogger(__name__)

Value = TypeVar("Value")

SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "fp16", "bf16",
    "amp", "activation_checkpointing", "aio", "autotuning", "checkpoint", "comms_logger", "compression_training",
    "csv_monitor", "curriculum_learning", "data_efficiency", "data_types", "elasticity", "flops_profiler",
    "hybrid_engine", "inference", "nebula", "tensor_parallel", "tensorboard", "wandb",
)  # fmt: skip
"""Places of a DeepSpeed file that hold an object of settings."""
NUMBERS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "steps_per_print", "zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size",
    "zero_optimization.sub_group_size", "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold", "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
)  # fmt: skip
"""Places that hold a number."""


def join(arguments: dict[str, Any]) -> TrainingArguments:
    """Return the TrainingArguments, with the process group up; comes before any model is built.

    From here on a ZeRO-3 run builds and loads models in parts, as long as the returned object lives. Raises ValueError
    when DeepSpeed was asked for without a launcher, and when fewer processes found one another than were started.
    """
    uses_deepspeed = arguments.get("deepspeed") is not None
    if uses_deepspeed:
        _prepare_deepspeed()
    joined = TrainingArguments(**arguments)
    expected, found = int(os.environ.get("WORLD_SIZE", "1")), joined.world_size
    if uses_deepspeed:
        import deepspeed

        # On the CPU accelerate starts torch's process group but not DeepSpeed's view of it, which ZeRO-3 asks for the
        # number of processes; where it is up already, this changes nothing.
        deepspeed.init_distributed(dist_backend="gloo" if joined.use_cpu else None)
    if found != expected:
        raise ValueError(
            f"WORLD_SIZE is {expected} but this process found {found}: each would train alone. Start with "
            "scripts/train.sh, torchrun or the deepspeed launcher"
        )
    return joined


def read_deepspeed(path: str) -> dict[str, Any]:
    """Return a DeepSpeed file's settings.

    Raises FileNotFoundError, and ValueError that names the file and the place for what is no JSON object, holds a
    section or number of another type than DeepSpeed reads there, has no ZeRO stage 1 - 3, or brings an optimizer
    or a schedule of its own, which would silently replace the run's learning rates.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no DeepSpeed file {path} (train.deepspeed); see configs/deepspeed")
    try:
        settings = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # broken JSON, other encodings, numbers of thousands of digits
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {_shown(settings)}; a DeepSpeed file is a JSON object, see configs/deepspeed")
    _check_types(path, settings)
    stage = (settings.get("zero_optimization") or {}).get("stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3) or not isinstance(stage, int):
        raise ValueError(
            f"{path} sets no zero_optimization.stage of 1, 2 or 3 (it is {_shown(stage)}); see configs/deepspeed"
        )
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ValueError(
                f"{path} has a section {section!r}, which would replace the run's own with its learning rate per part; "
                "remove it"
            )
    if stage == 3 and settings["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ValueError(
            f"{path}: ZeRO-3 needs zero_optimization.stage3_gather_16bit_weights_on_model_save: true, or no model that "
            "loads without DeepSpeed could be saved"
        )
    return settings


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    """Return the ZeRO stage of DeepSpeed settings; 0 without any."""
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def on_main(function: Callable[[], Value]) -> Value:
    """Run `function` on the first process and return its value, or raise its exception, on every one of them."""
    state = PartialState()
    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]  # type: ignore[no-any-return]


def anywhere(condition: bool) -> bool:
    """Whether `condition` holds in any process; every one of them calls it."""
    state = PartialState()
    if state.num_processes == 1:
        return condition
    flag = torch.tensor(float(condition), device=state.device)
    torch.distributed.all_reduce(flag)
    return bool(flag)


@contextmanager
def together(lock: Lock) -> Iterator[None]:
    """Hold a lock from the first process on for all of them: as long as one of them lives, nobody else can take it."""
    state = PartialState()
    on_main(lambda: _take(lock, shared=state.num_processes > 1))
    try:
        if not state.is_main_process:
            lock.join()
        yield
    finally:
        lock.release()


@contextmanager
def whole(*parameters: torch.nn.Parameter) -> Iterator[None]:
    """Let parameters be written, which ZeRO-3 keeps in parts: what the first process writes holds in all of them."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
        yield


def wait_for_all() -> None:
    """Return when every process has come here."""
    PartialState().wait_for_everyone()


def leave() -> None:
    """Take the process group down, if one is up; the process trains nothing any more."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_types(path: str, settings: dict[str, Any]) -> None:
    """Raise ValueError for a value of another type than transformers, accelerate and DeepSpeed read without asking."""

    def value_at(place: str) -> Any:
        outer, _, inner = place.partition(".")
        return (settings.get(outer) or {}).get(inner) if inner else settings.get(outer)

    for place in SECTIONS:
        section = value_at(place)
        if section is not None and not isinstance(section, dict):
            raise ValueError(f"{path}: {place} is {_shown(section)}; it must be a JSON object of settings")
        device = (section or {}).get("device")
        if device is not None and not isinstance(device, str):
            raise ValueError(f'{path}: {place}.device is {_shown(device)}; it must be "cpu", "nvme" or "none"')
    for place in NUMBERS:
        value = value_at(place)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
        if not (value is None or value == "auto" or number):
            raise ValueError(f'{path}: {place} is {_shown(value)}; it must be a number of at least 0, or "auto"')


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _take(lock: Lock, *, shared: bool) -> None:
    lock.take()
    if shared:
        lock.share()


def _prepare_deepspeed() -> None:
    """Check that DeepSpeed can work in this process, and keep it from compiling what a CPU run does not need."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ValueError(
            f"train.deepspeed needs a launcher ({', '.join(missing)} is not set): start with bash scripts/train.sh, or "
            "with torchrun even for one process"
        )
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"train.deepspeed is set but DeepSpeed cannot be imported ({error}); install it") from error
    if on_cpu:
        # The extension that speeds up collectives within a machine takes two minutes to build; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
