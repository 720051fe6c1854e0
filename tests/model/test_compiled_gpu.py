"""The compiled step is the eager one on a GPU: two generations, each across two growths of every storage and more.

The laws are plain functions that the benchmark runs too, where there may be no test runner; on a CPU they run here.
"""

import shutil

import pytest
import torch

from dynamic_llava.profile import step_laws

GPU = "an NVIDIA GPU, and torch finds none"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAWS = step_laws.step_laws(DEVICE)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cpu", reason=f"needs {GPU}")
@pytest.mark.parametrize("name", LAWS)
def test_on_a_gpu(name):
    LAWS[name]()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", step_laws.step_laws(torch.device("cpu")))
def test_on_a_cpu(name):
    step_laws.step_laws(torch.device("cpu"))[name]()


@pytest.mark.parametrize("name", LAWS)
def test_a_law_notices_a_compiled_step_that_differs(monkeypatch, name):
    """In place of compiling, a step whose hidden states are off; then one whose decisions are."""
    from dynamic_llava.engine.step import decode_step

    def off(*given, **switches):
        hidden_B1D, admit_B = decode_step(*given, **switches)
        return hidden_B1D + 0.1, admit_B

    monkeypatch.setattr("dynamic_llava.engine.decoder.compiled_step", off)
    with pytest.raises(AssertionError, match=r"of its scale|off by|other tokens"):
        step_laws.step_laws(torch.device("cpu"))[name]()

    def forgets(*given, **switches):
        hidden_B1D, admit_B = decode_step(*given, **switches)
        return hidden_B1D, torch.zeros_like(admit_B)

    if "generations" in name:
        monkeypatch.setattr("dynamic_llava.engine.decoder.compiled_step", forgets)
        with pytest.raises(AssertionError, match="other keep_mask"):
            step_laws.step_laws(torch.device("cpu"))[name]()


def test_the_laws_need_growths(monkeypatch):
    """Storages that are large from the start would show nothing, and the law says so."""
    from dynamic_llava.engine.step import decode_step

    monkeypatch.setattr("dynamic_llava.engine.decoder.compiled_step", decode_step)
    monkeypatch.setattr(step_laws, "GROWTHS", 6)
    with pytest.raises(AssertionError, match=r"storages grew from \d+ to \d+ slots only"):
        step_laws.generates_as_eager(torch.device("cpu"), step_laws.METHODS["random decisions"])
