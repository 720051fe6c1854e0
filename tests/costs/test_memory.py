"""The calculated memory against real tensors: parameters and states exactly, activations and the peak of a step."""

import gc

import pytest
import torch

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.config import DistillConfig, LoraConfig, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.costs import LLAVA_SHAPES, llava_shape, parameter_counts
from dynamic_llava.costs.memory import BLOCK_ROWS, DIVERGENCE_PART, PART, Sharding, training_memory
from dynamic_llava.model import distillation
from dynamic_llava.sparsity.kernels import chunked
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.optimizer import build_optimizer, parts, prepare
from tests.builders import FIRST_WORD, IMAGE_SIZE, IMAGE_TOKEN, TINY_SPARSITY, TOKENS_PER_IMAGE, tiny_config
from tests.costs.counted import learned_of_run
from tests.live_memory import LiveMemory, measure_step

GIGA = 10**9
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
# hidden, inner width, layers, heads, vocabulary, batch, tokens
SMALL_VOCABULARY, LARGE_VOCABULARY = (128, 256, 4, 4, 97, 2, 256), (128, 352, 3, 2, 2000, 1, 300)


def run_of(tune, numbers, batch=1, lora=None, sparsity=TINY_SPARSITY, **train):
    """Return a run in float32, under autocast, or under autocast over frozen bfloat16 weights."""
    dtype = "bfloat16" if numbers == "frozen half" else "float32"
    settings = TrainConfig(tune=tune, bf16=numbers in ("autocast", "frozen half"), batch_size=batch, **train)
    lora = (lora or LORA) if tune == "lora" else None
    return RunConfig(model=ModelConfig(dtype=dtype), sparsity=sparsity, train=settings, lora=lora)


def model_of(size, run):
    """Return a random model of this size, prepared for the run, and its shape."""
    hidden, inner, layers, heads, vocabulary, _, _ = size
    config = tiny_config(heads)
    config.sparsity = run.sparsity
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": hidden // heads}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    model = DynamicLlavaForConditionalGeneration(config).to(getattr(torch, run.model.dtype))
    return prepare(model, run).train(), llava_shape(config)


def batch_of(size):
    """Return a batch without padding: one image per row, then an answer."""
    vocabulary, batch, tokens = size[-3:]
    ids = torch.randint(FIRST_WORD, vocabulary, (batch, tokens))
    ids[:, 2 : 2 + TOKENS_PER_IMAGE] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:, : 2 + TOKENS_PER_IMAGE] = -100
    pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def calculated(shape, run, size, **sharding):
    spread = Sharding(**sharding) if sharding else None
    return training_memory(
        shape, run.model, run.sparsity, learned_of_run(shape, run), run.train, run.lora,
        tokens=size[-1], sharding=spread,
    )  # fmt: skip


FULL = [("full", numbers) for numbers in ("float32", "autocast")]
FROZEN = [(tune, numbers) for tune in ("lora", "predictors") for numbers in ("float32", "autocast", "frozen half")]


@pytest.mark.parametrize(("tune", "numbers"), FULL + FROZEN)
def test_weights_gradients_and_states_are_exact(tune, numbers):
    run = run_of(tune, numbers, projector_learning_rate=1e-4)
    model, shape = model_of(SMALL_VOCABULARY, run)
    counts = parameter_counts(shape, learned_of_run(shape, run), run.lora)
    counted = {part: sum(p.numel() for p in found) for part, found in parts(model).items() if part != "replaced"}
    assert {part: count for part, count in counts.items() if count} == counted
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer = build_optimizer(model, run.train)
    optimizer.step()
    memory = calculated(shape, run, SMALL_VOCABULARY)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = [s for state in optimizer.state.values() for name, s in state.items() if name != "step"]
    assert memory.optimizer == sum(s.nbytes for s in states)


CASES = [(*FULL[0], SMALL_VOCABULARY), (*FULL[1], LARGE_VOCABULARY), (*FROZEN[2], SMALL_VOCABULARY),
         (*FROZEN[3], SMALL_VOCABULARY), (*FROZEN[5], LARGE_VOCABULARY)]  # fmt: skip
EVERY_CASE = [(*case, size) for case in FULL + FROZEN for size in (SMALL_VOCABULARY, LARGE_VOCABULARY)]
SLOW_CASES = [pytest.param(*case, marks=pytest.mark.slow) for case in EVERY_CASE if case not in CASES]


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("tune", "numbers", "size"), [*CASES, *SLOW_CASES])
def test_activations_and_peak_of_a_real_step(tune, numbers, size, recomputes):
    run = run_of(tune, numbers, batch=size[-2], gradient_checkpointing=recomputes)
    model, shape = model_of(size, run)
    kept, peak = measure_step(model, batch_of(size), autocast=run.train.bf16, tau=1.0)
    memory = calculated(shape, run, size)
    assert memory.activations == pytest.approx(kept, rel=0.1)
    ratio = (memory.activations + memory.buffers) / peak
    assert 0.95 < ratio < 1.2, f"calculated {ratio:.3f} of the measured peak"


@pytest.mark.parametrize("mode", ["image", "output", "none"])
@pytest.mark.parametrize("dropped", ["masked_softmax", "zero_vectors"])
def test_activations_of_other_modes(mode, dropped):
    sparsity = SparsityConfig(**{**TINY_SPARSITY.to_dict(), "dropped_tokens": dropped})
    for tune in ("full", "predictors"):
        run = run_of(tune, "float32", 2, sparsity=sparsity, sparsity_mode=mode, projector_learning_rate=1e-4)
        model, shape = model_of(SMALL_VOCABULARY, run)
        kept, _ = measure_step(model, batch_of(SMALL_VOCABULARY), autocast=False, tau=1.0, sparsity=mode)
        assert calculated(shape, run, SMALL_VOCABULARY).activations == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("tune", "numbers", "size"),
    [("predictors", "frozen half", LARGE_VOCABULARY), ("predictors", "float32", LARGE_VOCABULARY),
     ("full", "float32", SMALL_VOCABULARY), ("lora", "autocast", LARGE_VOCABULARY)],
)  # fmt: skip
def test_a_step_that_distils(tune, numbers, size, recomputes):
    """The dense pass keeps nothing; what is kept of its divergence from the sparse one is counted."""
    run = run_of(tune, numbers, size[-2], gradient_checkpointing=recomputes, distill=DistillConfig())
    model, shape = model_of(size, run)
    switches = {"autocast": run.train.bf16, "tau": 1.0, "distill": run.train.distill}
    kept, peak = measure_step(model, batch_of(size), **switches)
    memory = calculated(shape, run, size)
    assert memory.activations == pytest.approx(kept, rel=0.1)
    ratio = (memory.activations + memory.buffers) / peak
    assert 0.95 < ratio < 1.2, f"calculated {ratio:.3f} of the measured peak"


def test_dropped_inputs_of_adapters_are_kept():
    """On a CPU a dropout's mask has the input's format, on an accelerator it is a byte per value, as calculated."""
    run = run_of("lora", "float32", 2, lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1))
    model, shape = model_of(SMALL_VOCABULARY, run)
    kept, _ = measure_step(model, batch_of(SMALL_VOCABULARY), autocast=False, tau=1.0)
    hidden, inner, layers, *_, batch, tokens = SMALL_VOCABULARY
    masks = batch * tokens * layers * (6 * hidden + inner)
    assert calculated(shape, run, SMALL_VOCABULARY).activations + 3 * masks == pytest.approx(kept, rel=0.1)


def test_the_measurement_sees_what_lives_and_what_passes():
    with LiveMemory() as memory:
        first = torch.zeros(1000)
        second = (first + 1) * 2
        assert memory.live == 8000 and memory.peak == 12000
        del first, second
        gc.collect()
    assert memory.live == 0


def test_zero_spreads_states_then_gradients_then_weights():
    shape, settings = LLAVA_SHAPES["7b"], {"bf16": True, "batch_size": 8, "gradient_checkpointing": True}
    run = RunConfig(model=ModelConfig(dtype="bfloat16"), train=TrainConfig(deepspeed="zero.json", **settings))
    counts = parameter_counts(shape, learned_of_run(shape, run))
    total, frozen = sum(counts.values()), counts["vision_tower"] + counts["projector"]
    learning = total - frozen
    for stage in (0, 1, 2, 3):
        memory = calculated(shape, run, (2048,), gpus=8, deepspeed=True, zero_stage=stage)
        shares = [8 if stage >= needed else 1 for needed in (1, 2, 3)]
        assert memory.optimizer == -(-12 * learning // shares[0])
        assert memory.gradients == -(-2 * learning // shares[1])
        assert memory.weights == -(-2 * total // shares[2])
    assert memory.host == 0
    moved = calculated(shape, run, (2048,), gpus=8, deepspeed=True, zero_stage=3, offload_optimizer=True)
    assert moved.host == memory.optimizer + memory.gradients and moved.optimizer == moved.gradients == 0
    assert moved.total < memory.total - moved.host + 1
    without = RunConfig(train=TrainConfig(**settings))
    alone = calculated(shape, without, (2048,))
    assert alone.weights + alone.gradients + alone.optimizer == 4 * total + 12 * learning
    assert calculated(shape, without, (2048,), gpus=2).buffers - alone.buffers == alone.gradients


def test_what_fits_where():
    """The recipes for one 24 GB GPU and for eight of 80 GB, at the longest samples (2048 tokens)."""
    whole = SparsityConfig()
    half = {"bf16": True, "gradient_checkpointing": True, "deepspeed": "zero3.json"}
    longest = (2048,)
    predictors = run_of("predictors", "frozen half", 4, sparsity=whole, gradient_checkpointing=True)
    memory = calculated(LLAVA_SHAPES["7b"], predictors, longest)
    assert memory.weights / GIGA == pytest.approx(14.17, abs=0.01) and memory.total < 24 * GIGA
    adapters = run_of("lora", "frozen half", 2, lora=LoraConfig(), sparsity=whole, gradient_checkpointing=True)
    assert calculated(LLAVA_SHAPES["7b"], adapters, longest).total < 24 * GIGA
    for shape in LLAVA_SHAPES.values():
        full = RunConfig(model=ModelConfig(dtype="bfloat16"), train=TrainConfig(batch_size=8, **half))
        spread = {"gpus": 8, "deepspeed": True, "zero_stage": 3}
        assert calculated(shape, full, longest, **spread).total < 80 * GIGA
        assert calculated(shape, full, longest, **{**spread, "gpus": 1}).total > 80 * GIGA


def test_the_kernels_blocks_are_the_ones_that_are_counted():
    assert (BLOCK_ROWS, PART) == (chunked.BLOCK_ROWS, chunked.DEVICE_PART)
    assert distillation.PART == DIVERGENCE_PART


def test_refuses_impossible_settings():
    run = run_of("full", "float32")
    with pytest.raises(ValueError, match="tokens=0"):
        calculated(LLAVA_SHAPES["7b"], run, (0,))
    with pytest.raises(ValueError, match="zero_stage=4"):
        Sharding(gpus=8, deepspeed=True, zero_stage=4)
    with pytest.raises(ValueError, match="without DeepSpeed"):
        Sharding(gpus=8, zero_stage=2)
