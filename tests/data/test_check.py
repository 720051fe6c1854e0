"""`python -m dynamic_llava.data check`: every kind of finding, counted, with its first examples; nothing stops it."""

import json

import pytest
import yaml

from dynamic_llava.config import DataConfig, SparsityConfig
from dynamic_llava.data import SftDataset, chunks
from dynamic_llava.data.__main__ import main
from dynamic_llava.data.check import ERRORS, NOTES, WARNINGS, check
from tests.sft_builders import conversation, picture, tiny_processor

ANSWER = "It shows a cat."


def entry(number, question="<image>\nWhat?", answer=ANSWER, image="good.png", **changes):
    return {"id": f"n{number}", "image": image, "conversations": conversation(question, answer), **changes}


@pytest.fixture
def folder(tmp_path):
    """A folder with one good and one cut picture, its processor, and a writer of data and configuration."""
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "good.png")
    data = (tmp_path / "images" / "good.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(data[: len(data) // 2])
    tiny_processor().save_pretrained(tmp_path / "base")
    return tmp_path


def write(folder, entries, text=None, **data):
    (folder / "data.json").write_text(json.dumps(entries) if text is None else text)
    values = {
        "model": {"base": str(folder / "base")},
        "data": {"json": str(folder / "data.json"), "image_folder": str(folder / "images"), "max_length": 300, **data},
        "sparsity": {"output_min_length": 12},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def report_of(folder, entries, **options):
    write(folder, entries)
    config = DataConfig(json=str(folder / "data.json"), image_folder=str(folder / "images"), max_length=300)
    return check(config, tiny_processor(), SparsityConfig(output_min_length=12), **options)


EVERY_KIND = {
    "missing or wrong field": entry(0, conversations=3),
    "role out of order": entry(1, conversations=conversation()[::-1]),
    "images and <image> places differ": entry(2, question="What?"),
    "image path leaves the folder": entry(3, image="../outside.png"),
    "missing image": entry(4, image="nothing.png"),
    "unreadable image": entry(5, image="cut.png"),
    "blank answer": entry(6, answer=" "),
    "image would be cut": entry(7, question="x" * 400 + " <image> <image>", image=["good.png"] * 2),
    "text behind max_length": entry(8, answer="x" * 400),
    "nothing to learn": entry(9, question="<image>\n" + "x" * 400),
    "text-only": {"id": "n10", "conversations": conversation("Who?", "I.")},
    "role/content messages": {
        "id": "n11",
        "images": ["good.png"],
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": ANSWER}],
    },
    "repeated id": entry(0),
}


def test_every_kind_is_found_counted_and_shown(folder):
    good = entry("good")
    report = report_of(folder, [good, *EVERY_KIND.values(), entry("fine", answer="No.")])
    counts = report.findings.counts
    side_effects = {"nothing to learn": 2, "text behind max_length": 2}  # the blank answer; the question of n9
    assert counts == {**dict.fromkeys(EVERY_KIND, 1), **side_effects}
    for number, kind in enumerate(EVERY_KIND, start=1):
        shown = report.findings.examples[kind]
        assert any(example.startswith(f"index {number}, id 'n{(number - 1) % 12}': ") for example in shown), kind
    assert report.errors == 6 and report.warnings == 6
    elsewhere = {"broken file", "nothing to train on", "chat template has a way of its own"}
    assert set(ERRORS) | set(WARNINGS) | set(NOTES) == {*EVERY_KIND, *elsewhere}
    text = str(report)
    assert "15 samples, 7 can be trained on" in text and "training would fail (6 errors)" in text
    assert "3 of each" not in text and f"{counts['missing image']:,}" in text


def test_what_is_found_is_what_training_meets(folder):
    """The samples that the check would train on are those of the dataset; each error alone makes it fail."""
    good = [entry("good"), *(EVERY_KIND[kind] for kind in (*WARNINGS, *NOTES))]
    report = report_of(folder, good)
    config = DataConfig(json=str(folder / "data.json"), image_folder=str(folder / "images"), max_length=300)
    dataset = SftDataset(config, tiny_processor())
    assert dataset.lengths.tolist() == report.findings.lengths["tokens"] and report.errors == 0
    for kind in set(EVERY_KIND) & set(ERRORS):
        assert report_of(folder, [entry("good"), EVERY_KIND[kind]]).findings.counts == {kind: 1}
        with pytest.raises((ValueError, FileNotFoundError)):
            dataset = SftDataset(config, tiny_processor())
            [dataset[number] for number in range(len(dataset))]


def test_one_sample_may_have_many_faults(folder):
    bad = entry(0, conversations=conversation()[::-1], image=["cut.png", "nothing.png", "../x.png"])
    report = report_of(folder, [bad])
    found = {"role out of order", "unreadable image", "missing image", "image path leaves the folder"}
    assert set(report.findings.counts) == {*found, "nothing to train on"}


def test_images_need_not_be_decoded(folder):
    report = report_of(folder, [entry(0, image="cut.png")], images="stat")
    assert report.errors == 0


def test_only_the_first_examples_are_kept(folder):
    report = report_of(folder, [entry(n, image="nothing.png") for n in range(9)], examples=2)
    assert report.findings.counts["missing image"] == 9
    assert [line.split(",")[0] for line in report.findings.examples["missing image"]] == ["index 0", "index 1"]


def test_the_length_table_and_the_share_of_short_answers(folder):
    report = report_of(folder, [entry(0), entry(1, answer="No."), entry(2), entry(3, answer="Yes.")])
    lengths = report.findings.lengths
    assert lengths["images"] == [1] * 4 and lengths["output tokens"] == [len(ANSWER) + 2, 5, len(ANSWER) + 2, 6]
    assert "50.0% of the answers are below LEN_OT = 12" in str(report)
    row = next(line for line in str(report).split("\n") if line.startswith("tokens"))
    assert row.split()[1:] == [f"{min(lengths['tokens']):.0f}", *row.split()[2:5], f"{max(lengths['tokens']):.0f}"]


def test_workers_find_the_same(folder, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SAMPLES", 4)
    monkeypatch.setattr(chunks, "PARALLEL_BYTES", 0)
    reports = []
    for workers in (1, 2):
        write(folder, [*EVERY_KIND.values()] * 3)
        config = DataConfig(str(folder / "data.json"), str(folder / "images"), max_length=300, workers=workers)
        reports.append(str(check(config, tiny_processor(), SparsityConfig())))
    assert reports[0] == reports[1]


def test_the_command(folder, capsys):
    assert main(["check", str(write(folder, [entry(0)]))]) == 0
    assert "training can start" in capsys.readouterr().out
    config = write(folder, [entry(0), EVERY_KIND["text behind max_length"]])
    assert main(["check", str(config)]) == 0 and main(["check", str(config), "--strict"]) == 1
    assert main(["check", str(config), "--strict", "--data.max-length", "2048"]) == 0
    capsys.readouterr()
    config = write(folder, [entry(0), EVERY_KIND["unreadable image"]])
    assert main(["check", str(config)]) == 1
    assert "index 1, id 'n5': " in capsys.readouterr().out
    assert main(["check", str(config), "--images", "stat"]) == 0


def test_mistakes_of_the_command_are_named(folder, capsys):
    config = write(folder, [entry(0)])
    for arguments, message in (
        ([], "usage:"),
        (["chekc"], "usage:"),
        (["check", str(folder / "none.yaml")], "no configuration file"),
        (["check", str(config), "--data.json", ""], "data.json is not set"),
        (["check", str(config), "--data.json", "none.json"], "no data file none.json"),
        (["check", str(config), "--data.image-folder", "none"], "no image folder none"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # tyro's own way
        main(["check", str(config), "--examples", "-1"])
    assert "examples=-1 must be 0 or more" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "first-batch" in capsys.readouterr().out


def test_first_batch(folder, capsys):
    config = write(folder, [entry(number) for number in range(5)])
    assert main(["first-batch", str(config), "--train.batch-size", "4"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["samples"] == 5 and answer["batch"]["pixel_values"] == [4, 3, 56, 56]
    assert answer["peak_resident_bytes"] > 50e6
