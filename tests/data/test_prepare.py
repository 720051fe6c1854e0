"""Preparation: worker processes change nothing, several processes prepare once, what is killed does not count."""

import importlib
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from dynamic_llava.config import DataConfig
from dynamic_llava.data import SftDataset, chunks, prepare
from tests.sft_builders import conversation, picture, tiny_processor, write_data


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def many(tmp_path):
    """More samples than a few chunks hold, every fifth text-only, over two pictures."""
    (tmp_path / "images").mkdir()
    for name in "ab":
        picture(ord(name)).save(tmp_path / "images" / f"{name}.png")
    entries = [
        {"id": f"{n}", "image": f"{'ab'[n % 2]}.png", "conversations": conversation("<image>\nWhat?", "y" * (n % 9))}
        for n in range(150)
    ]
    for entry in entries[::5]:
        del entry["image"]
        entry["conversations"] = conversation("Who?", "I.")
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def config(folder, **changes):
    return DataConfig(json=str(folder / "data.json"), image_folder=str(folder / "images"), max_length=400, **changes)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SAMPLES", 16)
    monkeypatch.setattr(chunks, "PARALLEL_BYTES", 0)


def rows(dataset):
    return [dataset.rows[number] for number in range(len(dataset))], dataset.counts


def test_worker_processes_change_nothing(many, processor, small_chunks, monkeypatch, tmp_path):
    found = []
    for workers in (1, 2, 3):
        monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / f"cache{workers}"))
        found.append(rows(SftDataset(config(many, workers=workers), processor)))
    assert found[0] == found[1] == found[2]
    assert [row["index"] for row in found[0][0]] == [n for n in range(150) if n % 5]
    assert (found[0][1].total, found[0][1].used, found[0][1].text_only_skipped) == (150, 120, 30)


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_samples_of_all_workers_are_counted_in_order(many, processor, small_chunks, workers):
    (many / "images" / "b.png").unlink()
    with pytest.raises(ValueError) as error:
        SftDataset(config(many, workers=workers), processor)
    lines = str(error.value).split("\n")
    assert "60 of 150 samples cannot be used" in lines[0]
    assert [line.split(",")[0] for line in lines[1:6]] == [f"  index {n}" for n in (1, 3, 7, 9, 11)]
    assert lines[6] == "  ... and 55 more"


@pytest.mark.parametrize("workers", [1, 3])
def test_a_cut_file_is_named_by_whichever_worker_meets_it(many, processor, small_chunks, workers):
    file = many / "data.json"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"^[^\n]*data\.json is no valid JSON at item 149, byte \d[^\n]*cut off\?$"):
        SftDataset(config(many, workers=workers), processor)


def test_torchs_generator_is_left_alone(many, processor):
    """Otherwise the first run, which prepares, would draw other weights than the next one."""
    import torch

    before = torch.get_rng_state()
    SftDataset(config(many), processor)
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_that_start_at_once_prepare_once(many, processor, monkeypatch):
    calls, original = [], prepare._write_rows

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.3)
        return original(*arguments)

    monkeypatch.setattr(prepare, "_write_rows", slow)
    lengths = []
    threads = [
        threading.Thread(target=lambda: lengths.append(len(SftDataset(config(many), processor)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [120] * 4 and len(calls) == 1


def _killed_while_writing(many, processor):
    original = prepare._write_rows

    def dying(*arguments):
        original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    prepare._write_rows = dying
    SftDataset(config(many), processor)


def test_what_is_killed_while_writing_does_not_count(many, processor, own_cache):
    process = multiprocessing.get_context("fork").Process(target=_killed_while_writing, args=(many, processor))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(own_cache.glob("sft/*.part"))) == 1, "it died in the middle"
    assert len(SftDataset(config(many), processor)) == 120, "and does not hold the lock any more"
    assert not list(own_cache.glob("sft/*.part"))


def test_what_cannot_be_prepared_is_named(tmp_path, processor):
    file, images = write_data(tmp_path, samples=3)
    with pytest.raises(FileNotFoundError, match="no data file"):
        SftDataset(DataConfig(json=str(tmp_path / "none.json"), image_folder=str(images)), processor)
    with pytest.raises(FileNotFoundError, match=r"no image folder .*none; set data\.image_folder"):
        SftDataset(DataConfig(json=str(file), image_folder=str(tmp_path / "none")), processor)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds an empty list"):
        SftDataset(DataConfig(json=str(file), image_folder=str(images)), processor)


def kill_this_worker(samples, **settings):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_clear_line(many, processor, small_chunks, monkeypatch, own_cache):
    """As the system does that runs out of memory; nothing is left that counts."""
    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module("dynamic_llava.data.prepare"), "_encode_chunk", kill_this_worker)
        with pytest.raises(ChildProcessError, match=r"preparing samples: a worker process was killed, .*fewer"):
            SftDataset(config(many, workers=2), processor)
    assert not list((own_cache / "sft").glob("*.part"))
    assert len(SftDataset(config(many, workers=2), processor)) > 0
