"""The data of many samples, at a thirtieth of LLaVA's size: what a process needs does not grow with the file."""

import json
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from dynamic_llava.data import SftDataset
from dynamic_llava.data.llava_json import is_text_only, read_samples
from dynamic_llava.profile import data as profiled
from dynamic_llava.profile.__main__ import main
from dynamic_llava.profile.data import SOURCES, first_batch, load_processor, shares, write_mixture
from tests.data.conftest import own_cache  # noqa: F401 - a fixture of every test here

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(profiled, "WORDS", 500)
    monkeypatch.setattr(profiled, "TEXT_WORDS", 40_000)
    monkeypatch.setattr(profiled, "VOCABULARY", 800)


def test_the_imitation_is_llava_data(tmp_path, small_vocabulary):
    assert dict(shares()) == {
        "coco": 364_100, "text only": 40_688, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "vg": 86_417,
    }  # fmt: skip
    assert sum(source.samples for source in SOURCES) == 665_298, "as many as in the published file"
    data = write_mixture(tmp_path, 120, 3, seed=0)
    samples = list(read_samples(data.json))
    text_only = sum(map(is_text_only, samples))
    dataset = SftDataset(data, load_processor(tmp_path))
    assert (dataset.counts.total, dataset.counts.used) == (120, 120 - text_only) and dataset.counts.blank_answers == 0
    row = dataset[0]
    assert row["pixel_values"].shape == (1, 3, 336, 336) and 576 < len(row["input_ids"]) < 2048
    assert {Image.open(path).format for path in Path(data.image_folder).rglob("*.jpg")} == {"JPEG"}


def test_the_same_seed_writes_the_same_file(tmp_path, small_vocabulary):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_mixture(tmp_path / name, 20, 1, seed)
        texts.append((tmp_path / name / "mixture.json").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def write_run(folder, data):
    file = folder / "run.yaml"
    section = {"json": data.json, "image_folder": data.image_folder}
    grouped = {"group_by_length": True, "batch_size": 4}
    values = {"model": {"base": str(folder / "processor")}, "data": section, "train": grouped}
    file.write_text(json.dumps(values))
    return file


@pytest.mark.slow
def test_memory_of_a_start_does_not_grow_with_the_data(tmp_path, small_vocabulary, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    peaks = []
    for samples in (200, 20_000):
        folder = tmp_path / str(samples)
        file = write_run(folder, write_mixture(folder, samples, 20, seed=0))
        first_batch(file)  # prepares
        peaks.append(first_batch(file)["peak_resident_bytes"])
    assert peaks[1] < 2 * 2**30
    assert peaks[1] - peaks[0] < 40e6, f"{(peaks[1] - peaks[0]) / 19_800:.0f} bytes per sample"


@pytest.mark.slow
def test_the_benchmark_measures_and_writes_a_page(tmp_path, small_vocabulary, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    sizes = ["--samples", "400", "--pictures", "8", "--throughput-samples", "48", "--workers", "2"]
    assert main(["data", "--folder", str(tmp_path / "made"), "--output", str(tmp_path / "out/data"), *sizes]) == 0
    numbers = json.loads((tmp_path / "out/data.json").read_text())
    rates = numbers["samples_per_second"]
    assert min(rates.values()) > 0, "which is the fastest is for a free machine to say"
    assert 0 <= numbers["padding_share_grouped"] < numbers["padding_share_random"] < 0.5
    assert numbers["samples"] == 400 > numbers["used"] > 300 and numbers["environment"]["torch"]
    text = (tmp_path / "out/data.md").read_text()
    assert "profile data --samples 400 --pictures 8" in text and f"{rates['batches']:.0f} samples/s" in text


@pytest.mark.parametrize("name", ["samples", "pictures", "throughput-samples"])
def test_nothing_is_removed_for_a_size_that_is_none(name, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("kept")
    assert main(["data", "--folder", str(tmp_path), f"--{name}", "0"]) == 2
    assert "must be 1 or more" in capsys.readouterr().err and (tmp_path / "own.txt").read_text() == "kept"


@pytest.mark.slow
def test_a_failing_process_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match=r"first-batch .* failed with exit code 2"):
        first_batch(tmp_path / "none.yaml")


def test_a_dataset_is_small_to_send_to_workers(tmp_path, small_vocabulary):
    """Where workers are not forked they get the dataset pickled; its rows stay in the file."""
    data = write_mixture(tmp_path, 1000, 2, seed=0)
    dataset = SftDataset(data, load_processor(tmp_path))
    assert (
        10 * len(pickle.dumps(dataset.rows))
        < next(Path(os.environ["DYNAMIC_LLAVA_CACHE"]).rglob("rows.arrow")).stat().st_size
    )
