"""What a saved checkpoint says about itself: the model card, and predictors that nobody has trained."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from transformers.utils import hub

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, get_method
from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.methods import Dynamic
from dynamic_llava.model import card
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run
from tests.builders import (
    TINY_SPARSITY,
    build_model,
    collate,
    dense_twin,
    fixed_rows,
    prompts,
    shared_model,
    tiny_config,
)
from tests.sft_builders import write_checkpoint, write_data
from tests.toys.linear import Linear

PREDICTORS = Dynamic().parts

WARNING = "sparse inference with newly initialised predictors"


@pytest.fixture(scope="module")
def from_dense(tmp_path_factory):
    """Return a model whose predictors are newly initialised beside a dense checkpoint."""
    folder = tmp_path_factory.mktemp("dense")
    dense_twin(shared_model()).save_pretrained(folder)
    return DynamicLlavaForConditionalGeneration.from_pretrained(folder, sparsity=TINY_SPARSITY.to_dict()).eval()


def front_matter(text):
    return yaml.safe_load(text.split("---")[1])


def test_a_saved_folder_has_a_card_with_its_settings(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    head = front_matter(text)
    assert head["library_name"] == "dynamic-llava" and head["pipeline_tag"] == "image-text-to-text"
    assert "license" not in head and "base_model" not in head
    for name, value in model.config.sparsity.to_dict().items():
        assert f"| `{name}` | {'none' if value is None else value} |" in text
    assert "Not trained yet" not in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_card_of_a_learned_method_of_ones_own_is_about_it(tmp_path):
    name = f"{Linear.__module__}:{Linear.__name__}"
    method = {"name": name, "image_keep_rate": 0.4}
    DynamicLlavaForConditionalGeneration(tiny_config(method=method)).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"`{name} (layer 2, image_keep_rate 0.4)`" in text and f"\nimport {Linear.__module__}  #" in text
    assert "predictor admits" not in text and 'sparsity="image"' not in text and '`sparsity="none"`' in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_somebody_elses_text_is_never_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    build_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_only_the_main_process_writes_it(tmp_path):
    build_model().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_hub_name_is_the_base_model_and_a_folder_is_not(tmp_path):
    config = tiny_config()
    config._name_or_path = "llava-hf/llava-1.5-7b-hf"
    assert front_matter(card.model_card(config))["base_model"] == "llava-hf/llava-1.5-7b-hf"
    for name in (str(tmp_path), "runs/tiny/model", ""):
        config._name_or_path = name
        assert "base_model" not in front_matter(card.model_card(config)), name


@pytest.mark.parametrize("remote", [None, "---\nlicense: mit\n---\nTheirs."])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_push_uploads_our_card_or_keeps_the_repositorys(tmp_path, monkeypatch, way, remote):
    """transformers puts an empty form in the place of the card just before it uploads."""
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})()

    def create_and_tag_model_card(repo_id, tags=None, token=None):
        from huggingface_hub import ModelCard, ModelCardData

        if remote is not None:
            return ModelCard(remote)
        words = "This is the model card of a transformers model. This model card has been automatically generated."
        return ModelCard.from_template(ModelCardData(), model_description=words)

    def upload(self, working_dir, *args, **kwargs):
        uploaded.update({path.name: path.read_text("utf-8", "replace") for path in Path(working_dir).iterdir()})

    import transformers.modeling_utils as modeling

    for module in (hub, modeling):
        monkeypatch.setattr(module, "create_and_tag_model_card", create_and_tag_model_card)
        if hasattr(module, "hf_api"):
            monkeypatch.setattr(module, "hf_api", Hub)
        if hasattr(module, "create_repo"):
            monkeypatch.setattr(module, "create_repo", Hub().create_repo)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = build_model()
    if way == "push_to_hub":
        model.push_to_hub("me/sparse")
    else:
        model.save_pretrained(tmp_path / "sparse", push_to_hub=True, repo_id="me/sparse")
    if remote is None:
        assert uploaded["README.md"] == card.model_card(model.config)
    else:
        assert "Theirs." in uploaded["README.md"]


def test_transformers_still_writes_the_form_that_is_replaced():
    import inspect

    assert card._GENERIC in inspect.getsource(hub.create_and_tag_model_card)


def test_a_dense_checkpoint_has_untrained_predictors_until_training_says_otherwise(from_dense, tmp_path):
    assert from_dense.config.untrained_predictors == list(PREDICTORS)
    from_dense.save_pretrained(tmp_path)
    assert "Not trained yet: image_predictor and output_predictor" in (tmp_path / "README.md").read_text("utf-8")
    again = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.untrained_predictors == list(PREDICTORS), "saving them does not train them"
    again.config.untrained_predictors = []
    again.save_pretrained(tmp_path)
    assert DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path).config.untrained_predictors == []


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="may only name image_predictor and output_predictor"):
        DynamicLlavaConfig(untrained_predictors=["projector"])


CALLS = {
    "both": ({}, PREDICTORS),
    "image": ({"sparsity": "image"}, PREDICTORS[:1]),
    "output": ({"sparsity": "output"}, PREDICTORS[1:]),
    "none": ({"sparsity": "none"}, ()),
    "random": ({"method": "random"}, ()),
    "an object": ({"method": get_method("dynamic")}, PREDICTORS),
}


@pytest.mark.parametrize(("switches", "named"), CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_a_generation_with_untrained_predictors_warns_once(from_dense, caplog, switches, named):
    with caplog.at_level(logging.WARNING):
        from_dense.generate(**prompts(fixed_rows(output=0)), **switches, max_new_tokens=3, do_sample=False)
    warnings = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    assert len(warnings) == bool(named)
    if named:
        assert f"({', '.join(named)})" in warnings[0] and "sparsity='none'" in warnings[0]


@torch.no_grad()
def test_a_forward_pass_warns_once_for_a_sequence(from_dense, caplog):
    inputs = prompts(fixed_rows(output=0))
    with caplog.at_level(logging.WARNING):
        first = from_dense(**inputs, use_cache=True)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        from_dense(input_ids=first.logits[:, -1:].argmax(-1), attention_mask=mask, cache=first.cache)
        from_dense(**inputs, sparsity="none")
        from_dense(**inputs, keep_mask=torch.ones_like(inputs["input_ids"]))
    assert caplog.text.count(WARNING) == 1


def test_training_and_trained_predictors_do_not_warn(from_dense, caplog):
    inputs = collate(fixed_rows(), "right")
    labels = torch.where(inputs["output_mask"], inputs["input_ids"], -100)
    with caplog.at_level(logging.WARNING):
        from_dense.train()(**inputs, labels=labels)
        from_dense.eval()
        with torch.no_grad():
            shared_model().generate(**prompts(fixed_rows(output=0)), max_new_tokens=2)
    assert WARNING not in caplog.text


@pytest.mark.parametrize(("mode", "left"), [("both", []), ("image", ["output_predictor"]), ("none", list(PREDICTORS))])
def test_a_run_marks_what_it_has_trained(mode, left, tmp_path):
    """The dense control trains no predictor, and its checkpoint goes on saying so."""
    file, images = write_data(tmp_path / "data", samples=4)
    config = RunConfig(
        name="run",
        output_folder=str(tmp_path / "runs"),
        model=ModelConfig(base=str(write_checkpoint(tmp_path / "base", dense=True))),
        data=DataConfig(json=str(file), image_folder=str(images)),
        sparsity=TINY_SPARSITY,
        train=TrainConfig(max_steps=1, batch_size=2, sparsity_mode=mode),
    )
    saved = run(config).run_folder / "model"
    assert DynamicLlavaConfig.from_pretrained(saved).untrained_predictors == left
    assert ("Not trained yet" in (saved / "README.md").read_text("utf-8")) == bool(left)
