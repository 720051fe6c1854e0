"""Every registered method, and training, on a device as on the CPU: the same decisions, tokens and gradients.

The methods' own laws are tested on a CPU; on a device what is left to go wrong is a tensor that was made elsewhere, an
order that sorting does not promise, and arithmetic of lower precision than float32. Rows are ragged, one has no image.
Methods that read the question's text are left out: a random model has no tokenizer that says it, and no CLIP. So are
those with weights of their own, which a model of Dynamic-LLaVA does not hold.
Shape suffixes: B rows, N tokens.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from dynamic_llava.methods import CLIP_EVIDENCE, METHODS, Dynamic, Method
from dynamic_llava.profile.laws import Laws, assert_equal
from dynamic_llava.profile.presets import Preset
from dynamic_llava.profile.step_laws import PRESET, ragged_prompt, random_model
from dynamic_llava.profile.workload import IMAGE_TOKEN

LAYERS, VISION_LAYERS, TOKENS = 6, 3, 12
CPU = torch.device("cpu")


def method_laws(device: torch.device) -> Laws:
    """Return the laws by name: one for every method that can decide in a random model, and one for training."""
    found: Laws = {"a training step on the device is one on the CPU": partial(trains_alike, device)}
    for name, kind in METHODS.items():
        foreign = kind.build not in (Method.build, Dynamic.build)
        if not (foreign or any(cut.sees & CLIP_EVIDENCE for cut in kind().cuts(LAYERS))):
            found[f"{name} on the device is {name} on the CPU"] = partial(answers_alike, device, name)
    return found


@torch.no_grad()
def answers_alike(device: torch.device, name: str) -> None:
    """A prefill and some steps of a ragged batch: tokens, decisions, lengths and logits are the CPU's."""
    given = ragged_prompt(_model(CPU), 1)
    there, here = (_answer(place, name, given) for place in (device, CPU))
    assert torch.equal(there.sequences.cpu(), here.sequences), "other tokens"
    if here.sparsity is not None:
        for told in ("keep_mask", "cache_lengths", "dense_cache_lengths"):
            assert torch.equal(getattr(there.sparsity, told).cpu(), getattr(here.sparsity, told)), f"other {told}"
    logits = [torch.stack(each.logits).double().cpu() for each in (there, here)]
    assert_equal(logits[:1], logits[1:], 1e-4, ["logits"])


def trains_alike(device: torch.device) -> None:
    """Loss, decisions and every gradient of one step with MaskedSoftmax and Gumbel noise are the CPU's."""
    given = ragged_prompt(_model(CPU), 2)
    image = given["input_ids"] == IMAGE_TOKEN
    labels_BN = given["input_ids"].masked_fill((given["attention_mask"] == 0) | image, -100)
    labels_BN[:, : PRESET.prompt - PRESET.text // 2] = -100
    there, here = (_trained(place, given | {"labels": labels_BN}) for place in (device, CPU))
    assert torch.equal(there["keep_mask"], here["keep_mask"]), "other decisions"
    assert here.keys() == there.keys() and len(here) > 2, "other parameters have gradients"
    assert_equal([*there.values()], [*here.values()], 1e-4, [*here])


def _trained(device: torch.device, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the loss, the decisions and the gradients by name, on the CPU and in float64."""
    model = random_model(device, torch.float32, 0.04, _preset()).train().requires_grad_(True)
    there = {key: value.to(device) for key, value in given.items()}
    out = model(**there, sample_key=torch.arange(PRESET.batch, device=device), use_cache=False)
    out.loss.backward()
    found = {"loss": out.loss.detach()[None], "keep_mask": out.sparsity.keep_mask.detach()}
    found |= {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {name: tensor.double().cpu() for name, tensor in found.items()}


def _answer(device: torch.device, name: str, given: dict[str, torch.Tensor]) -> Any:
    there = {key: value.to(device) for key, value in given.items()}
    keys = torch.arange(PRESET.batch, device=device)
    wanted = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return _model(device).generate(**there, **wanted, method=name, sample_key=keys)


@cache
def _model(device: torch.device) -> Any:
    return random_model(device, torch.float32, preset=_preset())


def _preset() -> Preset:
    shape = PRESET.shape
    shape = replace(shape, vision=replace(shape.vision, layers=VISION_LAYERS))
    return replace(PRESET, shape=shape).with_layers(LAYERS)
