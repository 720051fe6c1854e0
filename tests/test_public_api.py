"""`import dynamic_llava` is cheap and loads nothing, and every public name is there and documented."""

import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest

import dynamic_llava

OPTIONAL = ("datasets", "accelerate", "matplotlib", "wandb", "deepspeed", "peft", "omegaconf", "tyro", "tqdm", "gradio")


def loaded_after(code):
    """Run `code` in a fresh interpreter; return the top-level modules it loaded."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(result.stdout.strip().split("\n")[-1]))


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import dynamic_llava; dynamic_llava.__version__; dir(dynamic_llava)")
    assert not loaded & {"torch", "transformers", "numpy", "PIL", *OPTIONAL}


def test_the_paper_alone_needs_only_torch():
    """L0-L2 are readable and usable without transformers; torch itself loads numpy and tqdm where it finds them."""
    code = "from dynamic_llava import SparsityConfig, TokenLayout, masked_softmax_attention, get_method"
    assert not loaded_after(code) & {"transformers", "PIL", *OPTIONAL} - {"tqdm"}


def test_every_public_name_loads_without_the_training_packages():
    code = "import dynamic_llava\nfor name in dynamic_llava.__all__: getattr(dynamic_llava, name)"
    # transformers itself looks whether these are installed, and loads none of them for a model.
    assert not loaded_after(code) & {"datasets", "matplotlib", "wandb", "deepspeed", "omegaconf", "tyro", "gradio"}


def test_loading_the_model_changes_no_attention_of_other_models():
    """Importing may add names to transformers' registries, never replace an entry."""
    code = """
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
before = dict(AttentionInterface._global_mapping), dict(masks._global_mapping)
import dynamic_llava
dynamic_llava.DynamicLlavaForConditionalGeneration
after = dict(AttentionInterface._global_mapping), dict(masks._global_mapping)
for old, new in zip(before, after):
    assert {name: new[name] for name in old} == old
"""
    loaded_after(code)


def test_the_package_alone_registers_two_stand_ins_and_loads_nothing_for_it():
    """The Auto classes must know us after the bare import (tests/model/test_auto.py); nothing else is registered.

    It was "registers nothing" once. What registers now are two names, at the end of the loading of transformers' own
    Auto classes, by whomever; the classes that they stand for are loaded when a checkpoint of ours is.
    """
    code = """
import dynamic_llava, sys
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert set(CONFIG_MAPPING.keys()) - set(CONFIG_MAPPING_NAMES) == {"dynamic_llava"}
assert [value.__name__ for value in PROCESSOR_MAPPING._extra_content.values()] == ["DynamicLlavaProcessor"]
assert not MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._extra_content
assert not any("gated" in name or "dynamic" in name for name in AttentionInterface._global_mapping)
own = {name for name in sys.modules if name.startswith("dynamic_llava.")}
assert own == {"dynamic_llava.auto_classes"}, own
"""
    loaded_after(code)


@pytest.mark.parametrize("name", dynamic_llava.__all__)
def test_public_names_exist_and_are_documented(name):
    value = getattr(dynamic_llava, name)
    assert name in dir(dynamic_llava)
    if inspect.isclass(value) or inspect.isfunction(value):
        # A dataclass without a docstring gets its signature as one.
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring"


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("dynamic_llava.apps", "dynamic_llava.chat.conversation"),
        ("dynamic_llava.tiny.dataset", "dynamic_llava.tiny.world.dataset"),
    ],
)
def test_documented_names_are_found_where_they_were(former, now):
    module, home = import_module(former), import_module(now)
    assert module.__all__ and all(getattr(module, name) is getattr(home, name) for name in module.__all__)


def test_an_unknown_name_says_which_exist():
    with pytest.raises(AttributeError, match="SparsityConfig"):
        dynamic_llava.SparseConfig  # noqa: B018


def test_version_is_the_installed_one():
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("dynamic-llava")
    except PackageNotFoundError:
        pytest.skip("dynamic-llava is imported from its folder, not installed")
    assert installed == dynamic_llava.__version__
