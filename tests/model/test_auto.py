"""transformers' Auto classes know us after `import dynamic_llava`, in every order of imports, and it loads nothing."""

import subprocess
import sys

import pytest

from tests.sft_builders import write_checkpoint

USE = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
assert type(AutoConfig.from_pretrained(folder)).__module__ == "dynamic_llava.model.configuration"
assert type(AutoConfig.for_model("dynamic_llava")).__module__ == "dynamic_llava.model.configuration"
assert type(AutoProcessor.from_pretrained(folder)).__module__ == "dynamic_llava.processing.processor"
assert type(AutoModelForImageTextToText.from_pretrained(folder)).__module__ == "dynamic_llava.model.llava"
"""
ORDERS = {
    # The model class of LLaVA loads half of transformers' Auto classes while it is itself only half loaded.
    "ours first": "import dynamic_llava; from transformers import LlavaForConditionalGeneration",
    "theirs first": "from transformers import AutoModelForImageTextToText, AutoProcessor; import dynamic_llava",
    "processor first": """
import dynamic_llava
from transformers import AutoProcessor
assert type(AutoProcessor.from_pretrained(folder)).__module__ == "dynamic_llava.processing.processor"
""",
    "our class first": "from dynamic_llava import DynamicLlavaForConditionalGeneration",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=() if order == "ours first" else pytest.mark.slow) for order in ORDERS]
)
def test_auto_classes_know_us(folder, order):
    script = f"folder = {str(folder)!r}\n{ORDERS[order]}\n{USE}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_auto_classes_are_found_where_the_registration_waits_for_them():
    """A later transformers that moves them would otherwise leave us unregistered without a word."""
    from transformers import AutoConfig, AutoProcessor

    from dynamic_llava.auto_classes import _REGISTRATIONS

    assert {AutoConfig.__module__, AutoProcessor.__module__} == set(_REGISTRATIONS)


def test_the_finder_finds_nothing_else():
    from dynamic_llava.auto_classes import _AfterLoading

    (finder,) = [finder for finder in sys.meta_path if isinstance(finder, _AfterLoading)]
    assert finder.find_spec("transformers", None) is None
    assert finder.find_spec("transformers.models.auto.modeling_auto", None) is None
