"""MFU: the FLOPs of a batch, the peak by a device's name, and the share that a window's line shows."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch

from dynamic_llava.config import TrainConfig
from dynamic_llava.costs import TrainingFlops, llava_shape, training_flops
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.train.meter import Meter, batch_flops, peak_flops, peak_of
from tests.builders import IMAGE_SIZE, build_model, collate, fixed_rows
from tests.sft_builders import take_step, trainer_around

CPU = torch.device("cpu")


def test_a_batchs_flops_by_hand():
    flops = TrainingFlops(per_token=10, per_pair=3, per_image=1000, per_output_token=7, per_learned_token=50)
    outputs = torch.tensor([[1, 1], [1, 0]])
    labels = torch.tensor([[5, 5], [-100, 5]])  # what nothing stands before is not learned
    pictures = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    inputs = {"pixel_values": pictures, "output_mask": outputs, "labels": labels}
    found = batch_flops(flops, inputs, torch.tensor([4, 0]))
    assert found.item() == 10 * 4 + 3 * (1 + 2 + 3 + 4) + 1000 * 2 + 7 * 3 + 50 * 2
    nothing = {"output_mask": torch.zeros(1, 4), "labels": torch.full((1, 4), -100)}
    assert batch_flops(flops, nothing, torch.tensor([1])).item() == 10 + 3


def test_the_trainer_counts_real_tokens_of_real_samples(tmp_path):
    """Padding and filler rows are no work that counts."""
    model = build_model()
    trainer = trainer_around(model.train(), tmp_path, peak_tflops=1.0)
    batch = collate(fixed_rows())
    del batch["keep_mask"]
    batch["labels"] = torch.where(batch["output_mask"], batch["input_ids"], -100)
    batch["sample_ids"] = torch.tensor([0, -1, 1, 2])
    batch["output_mask"][1] = False
    take_step(trainer, [dict(batch), dict(batch)])
    shape, settings = llava_shape(model.config), model.config.sparsity
    flops = training_flops(shape, settings, learned_costs(settings, shape.decoder.hidden), TrainConfig())
    rows = [int(length) for place, length in enumerate(batch["attention_mask"].sum(1)) if place != 1]
    expected = sum(flops.per_token * n + flops.per_pair * n * (n + 1) // 2 for n in rows)
    expected += flops.per_image * len(batch["pixel_values"]) + flops.per_output_token * int(batch["output_mask"].sum())
    expected += flops.per_learned_token * int((batch["labels"][:, 1:] != -100).sum())
    assert trainer.meter.flops.item() == 2 * expected
    assert trainer.meter.tokens.item() == 2 * sum(rows)


def test_the_share_of_all_devices_peak():
    meter = Meter(started=time.perf_counter() - 2)
    meter.add_flops(torch.tensor(3e12))
    meter.add_flops(torch.tensor(1e12))
    world = SimpleNamespace(device=CPU, num_processes=4, reduce=lambda sums, reduction: sums)
    assert meter.collect(world, 1, peak=1e12)["mfu"] == pytest.approx(4 / (2 * 4), rel=0.05)
    assert "mfu" not in meter.collect(world, 1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA L40", None),
        ("A device of tomorrow", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_of(name) == peak


def test_what_is_set_counts_and_an_unknown_device_is_said(monkeypatch, caplog):
    assert peak_flops(TrainConfig(peak_tflops=2.5), CPU) == 2.5e12
    with caplog.at_level(logging.WARNING):
        assert peak_flops(TrainConfig(), CPU) is None
        assert not caplog.records, "a CPU is no surprise"
        for name, peak in (("NVIDIA A100-PCIE-40GB", 312e12), ("Newcomer 1", None)):
            module = SimpleNamespace(get_device_name=lambda device, name=name: name)
            monkeypatch.setattr(torch, "get_device_module", lambda device, module=module: module)
            assert peak_flops(TrainConfig(), torch.device("meta")) == peak
    assert [record.getMessage() for record in caplog.records] == [
        "the peak of 'Newcomer 1' is not known, so mfu is not logged; set train.peak_tflops to log it"
    ]
