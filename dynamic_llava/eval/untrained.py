"""The untrained-base control: a base whose language model is random, everything before it kept."""

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from dynamic_llava.files import give_usual_modes
from dynamic_llava.processing import DynamicLlavaProcessor


def write_untrained_base(base: Path, folder: Path, seed: int) -> Path:
    """Write `base` with a newly initialised language model and head to `folder`, in llava-hf layout; returns it.

    Vision tower and projector stay as trained. The global random state is left as it was.
    """
    trained = LlavaForConditionalGeneration.from_pretrained(str(base), trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = LlavaForConditionalGeneration(trained.config)
    fresh.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    fresh.model.multi_modal_projector.load_state_dict(trained.model.multi_modal_projector.state_dict())
    fresh.generation_config = trained.generation_config
    fresh.save_pretrained(str(folder))
    DynamicLlavaProcessor.from_pretrained(base).save_pretrained(folder)
    give_usual_modes(folder)
    return folder
