"""The Triton kernels without a GPU: their laws in Triton's interpreter, and compiled for two generations of GPUs."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
TESTED = "masked_softmax", "masked_softmax_gradients", "masked_softmax_memory", "window"
FILES = [f"test_{name}.py" for name in TESTED]
FEW = "2-131-left or 64-16 or ragged and 200 or within_the_window"
"""Grouped heads, padding, several tiles and splits, poisoned slots."""

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes a program may use, by compute capability. 8.6 and 8.9 run what 8.0 runs, and have 99 KiB instead of 163."""
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
NUMBERS = {"query", "key", "value", "keys", "values", "out", "grad_out", "grad_query", "grad_key", "grad_value"}
INTEGERS = {"order": "i32", "kept_before": "i32", "counts": "i32", "lengths": "i64", "step": "i32", "until": "i32"}
FLOATS, COUNTS = {"scale", "score_scale", "cap"}, {"tokens", "slots_each", "splits"}
KEYS_VARIANTS = {
    "kept": {"WHICH": 1, "WITH_KEYS": True, "WITH_KEEP": True},
    "dropped": {"WHICH": 2, "WITH_KEYS": True, "WITH_KEEP": True},
    "mask alone": {"WHICH": 0, "WITH_KEYS": False, "WITH_KEEP": True},
    "frozen mask": {"WHICH": 1, "WITH_KEYS": True, "WITH_KEEP": False},
}


def interpreted(expression, least):
    """Run the tests of both operations that match, in a process where Triton interprets its kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", expression]
    files = [str(HERE / name) for name in (*FILES, "test_ragged_attention.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command + files, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least, run.stdout


def test_laws_in_the_interpreter():
    interpreted(f"triton and ({FEW})", least=5)


@pytest.mark.slow
def test_every_law_in_the_interpreter():
    interpreted("triton", least=90)


def signature(kernel, dtype, constants):
    """The types of a kernel's arguments, and that pointers and strides are multiples of 16, as they are in practice."""
    types, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in FLOATS:
            types[name] = "fp32"
        elif name in COUNTS:
            types[name] = "i32"
        else:
            stride = re.search(r"_[bhnw]$", name)
            pointed = TYPES[dtype] if name in NUMBERS else INTEGERS.get(name, "fp32")
            types[name] = "i32" if stride else f"*{pointed}"
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, attributes


def compiled(kernel, dtype, constants, warps, stages, capability):
    """Compile a kernel; returns (bytes of shared memory, registers, bytes of spilled registers) of a program."""
    types, attributes = signature(kernel, dtype, constants)
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    result = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    return result.metadata.shared, int(registers), int(stack)


def check_masked(kernel_name, dtype, size, capability, **variant):
    from dynamic_llava.sparsity.kernels import triton_attention, triton_masked
    from dynamic_llava.sparsity.kernels.triton_common import padded

    variant = {"WITH_BAND": False, **variant}
    blocks = triton_attention.blocks_of(kernel_name, dtype, size, variant["WITH_BAND"])
    sizes = {
        "GROUPS": 1, "SIZE": size, "WIDTH": padded(size), "ROWS": blocks.rows, "KEYS": blocks.keys, **variant,
    }  # fmt: skip
    kernel = getattr(triton_masked, f"{kernel_name}_kernel")
    shared, registers, stack = compiled(kernel, dtype, sizes, blocks.warps, blocks.stages, capability)
    print(f"{kernel_name} {variant} {dtype} size {size} sm_{capability}: {shared} B, {registers} registers, {stack} B")
    assert shared <= SHARED_MEMORY[capability]
    assert registers * blocks.warps * 32 <= 65536
    if dtype != torch.float32:
        assert stack <= 128, "registers spill into memory: choose smaller blocks"


def check_ragged(dtype, size, capability):
    from dynamic_llava.sparsity.kernels import triton_ragged
    from dynamic_llava.sparsity.kernels.triton_common import padded

    sizes = {"GROUPS": 4, "SIZE": size, "WIDTH": padded(size)}
    split = {**sizes, "GROUPS_PADDED": padded(4), "SLOTS": triton_ragged.SLOTS[dtype.itemsize]}
    kernels = triton_ragged.split_kernel, triton_ragged.combine_kernel
    for kernel, constants, warps in zip(kernels, (split, sizes), (triton_ragged.WARPS, 1), strict=True):
        shared, registers, _ = compiled(kernel, dtype, constants, warps, triton_ragged.STAGES, capability)
        print(f"{kernel.fn.__name__} {dtype} size {size} sm_{capability}: {shared} B, {registers} registers")
        assert shared <= SHARED_MEMORY[capability]


needs_compiler = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")


@needs_compiler
def test_kernels_compile_for_the_usual_training():
    check_masked("forward", torch.bfloat16, 128, 80)
    check_masked("queries", torch.bfloat16, 128, 80)
    check_masked("keys", torch.bfloat16, 128, 80, **KEYS_VARIANTS["kept"])
    check_ragged(torch.bfloat16, 128, 80)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("dtype", "size", "variants"),
    [
        pytest.param(torch.bfloat16, 64, KEYS_VARIANTS, id="bfloat16-64"),
        pytest.param(torch.bfloat16, 80, ("kept",), id="bfloat16-80"),
        pytest.param(torch.bfloat16, 128, KEYS_VARIANTS, id="bfloat16-128"),
        pytest.param(torch.float16, 128, ("kept",), id="float16-128"),
        pytest.param(torch.float32, 64, ("kept", "dropped"), id="float32-64"),
        pytest.param(torch.float32, 128, ("kept",), id="float32-128"),
    ],
)
def test_every_kernel_compiles_and_fits(dtype, size, variants, capability):
    for banded in (False, True):
        check_masked("forward", dtype, size, capability, WITH_BAND=banded)
        check_masked("queries", dtype, size, capability, WITH_BAND=banded)
        for variant in variants:
            check_masked("keys", dtype, size, capability, WITH_BAND=banded, **KEYS_VARIANTS[variant])
    check_ragged(dtype, size, capability)


@needs_compiler
def test_the_kernel_of_inner_products_compiles():
    from dynamic_llava.sparsity.kernels import triton_attention, triton_masked

    sizes = {"SIZE": 80, "WIDTH": 128, "ROWS": triton_attention.INNER_ROWS}
    assert compiled(triton_masked.inner_kernel, torch.bfloat16, sizes, 4, 3, 90)[0] <= SHARED_MEMORY[90]
