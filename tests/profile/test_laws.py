"""The profiler's laws hold for what runs here, and each of them notices an implementation that breaks it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynamic_llava.methods import METHODS
from dynamic_llava.profile import laws, method_laws
from dynamic_llava.profile.laws import kernel_laws, kernel_on

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LAWS = kernel_laws(CPU)
DEVICE_LAWS = method_laws.method_laws(CPU)
COMPILING = [name for name in LAWS if "compiled once" in name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in COMPILING else n for n in LAWS])
def test_laws_hold(name):
    LAWS[name]()


def near(actual, **_):
    """Off by a thousandth, everywhere."""
    return actual * 1.001


def leaking(actual, value, **_):
    """A little of the last value in every row."""
    last = value[:, :, -1:].repeat_interleave(actual.shape[1] // value.shape[1], 1)
    return actual + 1e-3 * last


class Shaky:
    """Another last place in every second call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, actual, **_):
        self.calls += 1
        return actual * (1 + self.calls % 2 * torch.finfo(actual.dtype).eps)


@pytest.mark.parametrize("name", [name for name in LAWS if name not in COMPILING])
def test_laws_notice_what_breaks_them(monkeypatch, name):
    """Each law beside an implementation that is wrong in its point; the reference stays what it is."""
    break_it = leaking if "leaks" in name else Shaky() if "bit by bit" in name else near
    if "bfloat16" in name or "float16" in name:
        break_it = lambda actual, **_: actual * 1.1  # noqa: E731
    right, ragged = laws.masked_softmax_attention, laws.ragged_attention

    def masked(query, key, value, keep, *, implementation, **given):
        actual = right(query, key, value, keep, implementation=implementation, **given)
        compared = query.dtype == torch.float32 and "several tiles" in name
        return actual if implementation == "reference" or compared else break_it(actual, value=value)

    monkeypatch.setattr(laws, "masked_softmax_attention", masked)
    monkeypatch.setattr(
        laws, "ragged_attention", lambda *inputs, **given: break_it(ragged(*inputs, **given), value=None)
    )
    with pytest.raises(AssertionError):
        LAWS[name]()


def test_an_accelerator_without_triton_is_an_error_and_no_other_kernel(monkeypatch):
    monkeypatch.setattr(laws, "triton_obstacle", lambda *given: "triton is not installed")
    assert kernel_on(CPU, "chunked") == "chunked"
    with pytest.raises(RuntimeError, match="cannot run on meta: triton is not installed"):
        kernel_on(torch.device("meta"), "chunked")


@pytest.mark.slow
def test_laws_of_triton_in_its_interpreter():
    """The same functions as on a GPU, on the same kernels."""
    pytest.importorskip("triton")
    code = (
        "import torch; from dynamic_llava.profile.laws import kernel_laws\n"
        "for name, law in kernel_laws(torch.device('cpu')).items():\n"
        "    assert 'triton' in name, name\n"
        "    if 'compiled' not in name: law(); print(name)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("triton") == len(LAWS) - len(COMPILING)


@pytest.mark.parametrize("name", DEVICE_LAWS)
def test_methods_and_training_are_themselves(name):
    DEVICE_LAWS[name]()


@pytest.mark.parametrize("name", [one for one in METHODS if f"{one} on the device is {one} on the CPU" in DEVICE_LAWS])
def test_a_law_notices_a_method_that_is_another_on_the_device(monkeypatch, name):
    """The device, under another name of the CPU, has a model whose weights are a little off."""
    device, model = torch.device("cpu", 0), method_laws._model
    other = method_laws.random_model(CPU, torch.float32, 0.151, method_laws._preset())
    monkeypatch.setattr(method_laws, "_model", lambda place: other if place == device else model(place))
    with pytest.raises(AssertionError, match=r"other|logits"):
        method_laws.answers_alike(device, name)


def test_a_law_notices_another_gradient(monkeypatch):
    device, trained = torch.device("cpu", 0), method_laws._trained

    def off(place, given):
        found = trained(place, given)
        last = [*found][-1]
        return found if place == CPU else found | {last: found[last] + 1e-3}

    monkeypatch.setattr(method_laws, "_trained", off)
    with pytest.raises(AssertionError, match="of its scale"):
        method_laws.trains_alike(device)
