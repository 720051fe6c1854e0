"""A LLaVA from a language model and a tower: the language model stays the source's, whatever family and file it has."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.checkpoints.__main__ import main
from dynamic_llava.checkpoints.assemble import assemble
from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.model.weight_files import WeightFiles
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run
from tests.base_folders import CHATML, TEXT, TOWER, byte_tokenizer
from tests.builders import TINY_SPARSITY
from tests.sft_builders import picture, write_data

FAMILIES = {
    "llama": LlamaConfig(**TEXT, num_key_value_heads=2),
    "llama, tied": LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=16),
}
"""Language models that are carried, in the shapes that the hub has them in."""


def language_model(folder, config, seed=0):
    """Write a random language model with a byte-level tokenizer and ChatML, whose every row is a word; return it."""
    tokenizer = byte_tokenizer("<|im_end|>", CHATML, size=400)
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def vision_tower(folder):
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**TOWER, projection_dim=32)).save_pretrained(folder)
    return folder


def same_language(loaded, source):
    """Assert that a text's logits are the language model's own; words that are new have no higher ones."""
    rows = source.config.vocab_size
    assert loaded.config.text_config.vocab_size == -(-(rows + 1) // 64) * 64 > rows, "<pad> is a new word"
    ids = torch.randint(6, rows, (2, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = source(input_ids=ids).logits, loaded(input_ids=ids, sparsity="none").logits
    torch.testing.assert_close(found[..., :rows], wanted, rtol=0, atol=1e-6)
    assert (found[..., rows:] < wanted.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_gets_the_logits_of_the_language_model(tmp_path, family):
    source = language_model(tmp_path / "language", FAMILIES[family])
    tower, lines = vision_tower(tmp_path / "tower"), []
    folders = [tmp_path / "once", tmp_path / "again"]
    for folder in folders:
        assert assemble(tmp_path / "language", folder, vision_tower=tower, say=lines.append) == folder
    once, again = map(WeightFiles.of_folder, folders)
    assert all(torch.equal(once.read(name), again.read(name)) for name in once.heads), "another one each time"
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(folders[0]).eval()
    assert type(AutoModelForImageTextToText.from_pretrained(folders[0])) is type(loaded)
    assert loaded.config.text_config.model_type == source.config.model_type
    same_language(loaded, source)
    assert any("head: a copy" in line for line in lines) is bool(source.config.tie_word_embeddings)
    assert not torch.equal(loaded.lm_head.weight[0], loaded.lm_head.weight[1])
    assert loaded.lm_head.weight.data_ptr() != loaded.get_input_embeddings().weight.data_ptr()
    processor = DynamicLlavaProcessor.from_pretrained(folders[0])
    assert processor.chat_template == CHATML
    inputs = processor(images=picture(), text="<|im_start|>user\n<image>\nWhat?<|im_end|>\n", return_tensors="pt")
    assert int((inputs["input_ids"] == loaded.config.image_token_id).sum()) == loaded.model.tokens_per_image == 16
    assert loaded(**inputs, sparsity="none").logits.isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "language", "once", "tower"]


def test_projector_and_number_format_are_those_asked_for(tmp_path):
    language_model(tmp_path / "language", FAMILIES["llama"])
    tower = vision_tower(tmp_path / "tower")

    def made(name, **settings):
        assemble(tmp_path / "language", tmp_path / name, vision_tower=tower, say=lambda line: None, **settings)
        return DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / name)

    first, second, other = made("a"), made("b", seed=1), made("c", projector="resampler", dtype="bfloat16")
    weights = [model.model.multi_modal_projector.linear_1.weight for model in (first, second)]
    assert not torch.equal(*weights)
    same = [model.model.language_model.layers[0].mlp.up_proj.weight for model in (first, second)]
    assert torch.equal(*same)
    assert other.config.projector == "resampler" and {p.dtype for p in other.lm_head.parameters()} == {torch.bfloat16}


def test_text_alone_needs_no_tower_and_is_generated_sparsely(tmp_path):
    source, lines = language_model(tmp_path / "language", FAMILIES["llama"]), []
    for folder in ("once", "again"):
        assemble(tmp_path / "language", tmp_path / folder, text_only=True, say=lines.append)
    once, again = WeightFiles.of_folder(tmp_path / "once"), WeightFiles.of_folder(tmp_path / "again")
    assert all(torch.equal(once.read(name), again.read(name)) for name in once.heads)
    assert any("a random one stands in, for text alone" in line for line in lines)
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "once").eval()
    same_language(loaded, source)
    assert sum(p.numel() for p in loaded.model.vision_tower.parameters()) < 40_000
    processor = DynamicLlavaProcessor.from_pretrained(tmp_path / "once")
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = loaded.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert len(out.sparsity.rows[0].output_decisions) == 5


def test_the_first_stage_trains_on_it(tmp_path):
    language_model(tmp_path / "language", FAMILIES["llama"])
    base = assemble(
        tmp_path / "language", tmp_path / "base", vision_tower=vision_tower(tmp_path / "tower"), say=lambda line: None
    )
    file, images = write_data(tmp_path / "data", samples=4)
    trained = run(
        RunConfig(
            output_folder=str(tmp_path / "run"),
            model=ModelConfig(base=str(base)),
            data=DataConfig(json=str(file), image_folder=str(images), max_length=400, template="plain"),
            sparsity=TINY_SPARSITY,
            train=TrainConfig(
                tune="predictors", sparsity_mode="none", projector_learning_rate=1e-2, batch_size=4, max_steps=2
            ),
        )
    )
    before, after = WeightFiles.of_folder(base), WeightFiles.of_folder(trained.folder)
    moved = {name for name in before.heads if not torch.equal(before.read(name), after.read(name))}
    assert moved == {name for name in before.heads if "multi_modal_projector" in name}


REFUSED = {
    "no tower": ({}, "neither was given: say --vision-tower"),
    "both": ({"vision_tower": "tower", "text_only": True}, "both were given: say --vision-tower"),
    "unknown projector": ({"text_only": True, "projector": "lens"}, "lens"),
    "no such tower": ({"vision_tower": "nowhere/at/all"}, "there is no folder nowhere/at/all"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_does_not_fit_is_named_and_nothing_is_left(tmp_path, way):
    language_model(tmp_path / "language", FAMILIES["llama"])
    settings, words = REFUSED[way]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        assemble(tmp_path / "language", tmp_path / "new", say=lambda line: None, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["language"]


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already and not empty"):
        assemble(tmp_path / "language", tmp_path / "there", text_only=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "notes.txt"]


def test_a_window_in_a_language_model_is_refused(tmp_path):
    language_model(tmp_path / "language", MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=8))
    with pytest.raises(ValueError, match="sliding window"):
        assemble(tmp_path / "language", tmp_path / "new", text_only=True, say=lambda line: None)


def test_the_command_says_what_it_does_and_how_to_mend_a_mistake(tmp_path, capsys):
    language_model(tmp_path / "language", FAMILIES["llama"])
    words = ["assemble", "--language-model", str(tmp_path / "language"), str(tmp_path / "new")]
    assert main(words) == 2 and "--text-only" in capsys.readouterr().err
    assert main([*words, "--text-only", "--seed", "3"]) == 0
    assert f"{tmp_path / 'new'}: complete" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "dynamic_llava"
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF and nothing behind it")
    assert main(["assemble", "--language-model", str(tmp_path / "none.gguf"), str(tmp_path / "x"), "--text-only"]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert (
        main(["assemble", "--language-model", str(tmp_path / "damaged.gguf"), str(tmp_path / "x"), "--text-only"]) == 2
    )
    assert "damaged.gguf gives no language model" in capsys.readouterr().err


def test_a_gguf_file_is_a_language_model(tmp_path):
    """Written here tensor by tensor with the format's own package, read back by transformers."""
    gguf = pytest.importorskip("gguf", reason="the package gguf comes with the extra smol")
    source = language_model(tmp_path / "language", FAMILIES["llama, tied"])
    write_gguf(gguf, tmp_path / "model.gguf", source, byte_tokenizer("<|im_end|>", CHATML, size=400))
    assemble(tmp_path / "model.gguf", tmp_path / "new", text_only=True, say=lambda line: None)
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "new").eval()
    same_language(loaded, source)
    tokenizer = DynamicLlavaProcessor.from_pretrained(tmp_path / "new").tokenizer
    text = "<|im_start|>user\nWhat is it? A red circle.<|im_end|>"
    wanted = byte_tokenizer("<|im_end|>", CHATML, size=400)(text, add_special_tokens=False).input_ids
    assert tokenizer(text, add_special_tokens=False).input_ids == wanted
    assert tokenizer.eos_token == "<|im_end|>" and loaded.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language", "model.gguf", "new"]


def write_gguf(gguf, path, model, tokenizer):
    """Write a Llama as llama.cpp's converter does: its names, rotary halves interleaved, a byte-level vocabulary."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    for name, value in {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps, "rope_freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    known = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in known])
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    writer.add_token_types([kinds[word not in special] for word, _ in known])
    writer.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
