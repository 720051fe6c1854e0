"""What the compiled decoding step has to keep on any device: it is the eager one, generation after generation.

Each law raises AssertionError where it does not hold. A model of three layers with weights large enough for decided
answers; ragged rows, one of them without an image; decisions of every row mixed; blocks of 8 slots, so that both groups
of layers outgrow their storages more than once.
Shape suffixes: B rows, N tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dynamic_llava.engine.cache import CACHE
from dynamic_llava.methods import Method, get_method
from dynamic_llava.model import cache_of
from dynamic_llava.profile.laws import Laws, assert_equal
from dynamic_llava.profile.presets import Preset, small_shape
from dynamic_llava.profile.workload import IMAGE_TOKEN, build_model, method_of, random_ids

SHAPE = small_shape(64, 3, 256)
PRESET = Preset(
    "laws",
    replace(SHAPE, vision=replace(SHAPE.vision, patches=16), tokens_per_image=16),
    batch=3,
    outputs=(40,),
    about="for laws: hidden 64, 3 layers",
    text=9,
    sparse_layer=1,
)
BLOCK, TOKENS, GROWTHS = 8, 40, 2
"""Slots by which a storage grows; generated tokens; how often each storage has to grow at least."""
METHODS: dict[str, Method] = {
    "random decisions": get_method("random", layer=1, image_keep_rate=0.25, output_keep_rate=0.5),
    "predictors and every second token": method_of(PRESET, "both"),
}


def step_laws(device: torch.device) -> Laws:
    """Return the laws of the compiled step by name; they compile, which takes most of their time."""
    found: Laws = {}
    for name, method in METHODS.items():
        law = partial(generates_as_eager, device, method)
        found[f"two generations across {GROWTHS} and more growths are the eager ones: {name}"] = law
    found["bfloat16 steps are as near to float32 as eager ones"] = partial(rounds_as_eager, device)
    return found


def random_model(device: torch.device, dtype: torch.dtype, spread: float = 0.15, preset: Preset = PRESET) -> Any:
    """Return the model of the laws: the same weights in every dtype; a spread of 0.15 sets logits far apart."""
    torch.manual_seed(0)  # biases are drawn where they are made
    model = build_model(preset, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread, generator=generator)
    model.config.sparsity = replace(model.config.sparsity, cache_block=BLOCK)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.to(device, dtype)


def ragged_prompt(model: Any, seed: int) -> dict[str, Tensor]:
    """Return the inputs of three rows, left padded: two with an image and texts of two lengths, one of text alone."""
    torch.manual_seed(seed)
    ids_BN = random_ids(model, PRESET.batch, PRESET.prompt)
    mask_BN = torch.ones_like(ids_BN)
    image = PRESET.shape.tokens_per_image
    ids_BN[0, 2 : 2 + image] = IMAGE_TOKEN
    ids_BN[1, 5 : 5 + image] = IMAGE_TOKEN
    mask_BN[1, :3] = mask_BN[2, : image + 2] = 0
    side = PRESET.shape.vision.patch * round(PRESET.shape.vision.patches**0.5)
    pixels = torch.randn(2, 3, side, side).to(model.device, model.dtype)
    ids_BN = ids_BN.masked_fill(mask_BN == 0, 0)
    return {"input_ids": ids_BN, "attention_mask": mask_BN, "pixel_values": pixels}


@torch.no_grad()
def generates_as_eager(device: torch.device, method: Method) -> None:
    """Two generations with one model: tokens, decisions, lengths and logits are the eager ones; one graph, no break."""
    torch._dynamo.reset()
    counters.clear()
    model = random_model(device, torch.float32)
    for seed in (1, 2):
        given = {**ragged_prompt(model, seed), "method": method, "sample_key": torch.arange(3, device=device)}
        opened = cache_of(model(**given, use_cache=True, logits_to_keep=1))
        before = opened.dense.capacity, opened.sparse.capacity
        wanted = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        eager, compiled = (model.generate(**given, **wanted, compile=flag) for flag in (False, True))
        assert torch.equal(compiled.sequences, eager.sequences), f"generation {seed}: other tokens"
        for name in ("keep_mask", "cache_lengths", "dense_cache_lengths"):
            mine, theirs = getattr(compiled.sparsity, name), getattr(eager.sparsity, name)
            assert torch.equal(mine, theirs), f"generation {seed}: other {name}"
        logits = [torch.stack(each.logits).double().cpu() for each in (compiled, eager)]
        assert_equal(logits[:1], logits[1:], 1e-4, [f"logits of generation {seed}"])
        after = compiled.cache.dense.capacity, compiled.cache.sparse.capacity
        for group, small, large in zip(("dense", "sparse"), before, after, strict=True):
            assert large - small >= GROWTHS * BLOCK, f"the {group} storages grew from {small} to {large} slots only"
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert (graphs, breaks) == (1, 0), f"{graphs} graphs and {breaks} breaks"


@torch.no_grad()
def rounds_as_eager(device: torch.device) -> None:
    """Fed the same tokens, compiled bfloat16 logits are off float32's by at most twice what eager ones are."""
    torch._dynamo.reset()
    method = METHODS["random decisions"]
    # Small weights: large ones blow rounding up to a size at which every answer looks near.
    exact, rounded = (random_model(device, dtype, 0.04) for dtype in (torch.float32, torch.bfloat16))
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "float32": _steps(exact, method),
        "eager": _steps(rounded, method),
        "compiled": _steps(rounded, method, compile=True),
    }
    errors: dict[str, list[Tensor]] = {"eager": [], "compiled": []}
    for _ in range(TOKENS):
        token_B1 = random_ids(exact, PRESET.batch, 1)
        logits = {name: run(token_B1).double() for name, run in runs.items()}
        for name, error in errors.items():
            error.append((logits[name] - logits["float32"]).abs().max() / logits["float32"].abs().max())
    eager, compiled = (torch.stack(errors[name]).mean().item() for name in ("eager", "compiled"))
    assert compiled <= 2 * eager, f"off by {compiled:.2e} of the logits' scale, eager ones by {eager:.2e}"


def _steps(model: Any, method: Method, **more: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that feeds one token per row to a generation of its own and returns the logits (B, 1, V)."""
    given, switches = ragged_prompt(model, 3), {"method": method, "sample_key": torch.arange(3, device=model.device)}
    cache = cache_of(model(**given, **switches, use_cache=True, logits_to_keep=1))
    state = {"mask": given["attention_mask"]}

    def step(token_B1: Tensor) -> Tensor:
        state["mask"] = torch.nn.functional.pad(state["mask"], (0, 1), value=1)
        seen = {"attention_mask": state["mask"], CACHE: cache, "use_cache": True}
        return model(input_ids=token_B1, **seen, **switches, **more).logits.clone()

    return step
