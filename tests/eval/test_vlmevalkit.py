"""The model in VLMEvalKit, on a stand-in of the part of it that is used: base class, tables, prompts, run.py."""

import sys
from types import ModuleType

import pytest

from dynamic_llava.eval import vlmevalkit
from dynamic_llava.eval.tasks.base import LETTER
from tests.sft_builders import picture, write_checkpoint


class BaseModel:
    """As vlmeval/vlm/base.py (0c4ef1b): `generate` checks a message and hands it to `generate_inner`."""

    INTERLEAVE = False
    allowed_types = ("text", "image")

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, function):
        self.dump_image_func = function

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        return self.chat_inner(messages, dataset)


@pytest.fixture
def kit(monkeypatch):
    """Put a VLMEvalKit of four modules into the process; return its table of models."""
    modules = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.vlm", "vlmeval.config", "vlmeval.dataset")}
    modules["vlmeval.vlm.base"] = ModuleType("vlmeval.vlm.base")
    modules["vlmeval.vlm.base"].BaseModel = BaseModel
    modules["vlmeval.config"].supported_VLM = {"theirs": object}
    modules["vlmeval.dataset"].DATASET_TYPE = {"MMStar": "MCQ", "MME": "Y/N", "OCRBench": "VQA"}.get
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    return modules["vlmeval.config"].supported_VLM


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, and two pictures as files."""
    folder = tmp_path_factory.mktemp("kit")
    for number in range(2):
        picture(number, (40, 24)).save(folder / f"{number}.png")
    return folder, str(write_checkpoint(folder / "model"))


def test_a_registered_model_answers_as_generate_does(kit, world):
    folder, checkpoint = world
    made = vlmevalkit.register("sparse", pretrained=checkpoint, max_new_tokens=5, device="cpu")
    assert sys.modules["vlmeval.vlm"].DynamicLlava is made and issubclass(made, BaseModel) and made.INTERLEAVE
    model = kit["sparse"]()
    picture_parts = [{"type": "image", "value": str(folder / f"{number}.png")} for number in range(2)]
    answer = model.generate([*picture_parts, {"type": "text", "value": "Which one?"}], dataset="OCRBench")
    inputs = model.processor(
        text=model.processor.conversation_prompt([("<image> <image>\nWhich one?", None)]),
        images=[[picture(number, (40, 24)) for number in range(2)]],
    )
    sequences = model.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert answer == model.processor.decode(sequences[0, inputs["input_ids"].shape[1] :]).strip() != ""
    dense = made(checkpoint, max_new_tokens=5, device="cpu", sparsity="none")
    assert dense.method.is_dense and not model.method.is_dense
    talk = [
        {"role": "user", "content": [{"type": "text", "value": "Hello"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "Yes?"}]},
        {"role": "user", "content": [*picture_parts[:1], {"type": "text", "value": "What is it?"}]},
    ]
    assert isinstance(model.chat(talk, dataset="MMDU"), str)


def test_random_methods_draw_by_the_sample(kit, world, monkeypatch):
    """VLMEvalKit gives no index: prompt and files of images tell samples apart, and one sample is always itself."""
    folder, checkpoint = world
    model = vlmevalkit.register()(checkpoint, device="cpu", method="random", image_keep_rate=0.25, max_new_tokens=2)
    keys, answer = [], model.answer
    monkeypatch.setattr(model, "answer", lambda *given: (keys.append(given[3]), answer(*given))[1])
    for number, question in ((0, "What?"), (1, "What?"), (0, "Who?"), (0, "What?")):
        picture_part = {"type": "image", "value": str(folder / f"{number}.png")}
        model.generate([picture_part, {"type": "text", "value": question}], dataset="MME")
    assert keys[0] == keys[3] and len(set(map(tuple, keys))) == 3


def test_multiple_choice_is_asked_in_llavas_form(kit, world):
    model = vlmevalkit.register()(world[1], device="cpu")
    assert [model.use_custom_prompt(name) for name in ("MMStar", "MME", "OCRBench")] == [True, False, False]
    model.set_dump_image(lambda line: [f"{line['index']}.png"])
    row = {"index": 7, "question": "Which?", "hint": float("nan"), "A": "red", "B": "blue", "C": float("nan")}
    assert model.build_prompt(row, "MMStar") == [
        {"type": "image", "value": "7.png"},
        {"type": "text", "value": "Which?\nA. red\nB. blue" + LETTER},
    ]
    assert model.build_prompt(row | {"hint": "Look."}, "MMStar")[1]["value"].startswith("Look.\nWhich?")


def test_run_py_sees_the_class_and_its_own_arguments(kit, tmp_path, capsys, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nimport vlmeval.vlm\nassert __name__ == '__main__'\n"
        "print(vlmeval.vlm.DynamicLlava.__name__, sys.argv[1:])\n"
    )
    before = sys.argv
    assert vlmevalkit.main([str(script), "--config", "run.json"]) == 0
    assert capsys.readouterr().out == "DynamicLlava ['--config', 'run.json']\n" and sys.argv is before


def test_mistakes_say_what_to_do(kit, world, tmp_path, capsys, monkeypatch):
    made = vlmevalkit.register()
    for arguments, message in (
        ({"keep_rate": 0.2}, r"\['keep_rate'\].*max_new_tokens and device"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not possible"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9'"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            made(world[1], **arguments)
    with pytest.raises(ValueError, match="a model 'theirs' already"):
        vlmevalkit.register("theirs")
    assert vlmevalkit.main([str(tmp_path / "none.py"), "--config", "x"]) == 2
    assert "give VLMEvalKit's run.py, then its arguments" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        vlmevalkit.main([])
    assert "RUN.PY" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", None)
    (tmp_path / "run.py").write_text("")
    assert vlmevalkit.main([str(tmp_path / "run.py")]) == 2
    assert "git clone https://github.com/open-compass/VLMEvalKit" in capsys.readouterr().err
