"""Configuration files and command lines: what is understood, and what is said about a mistake."""

import pytest

from dynamic_llava.cli import load_config, read_yaml
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import write_config


def load(*arguments):
    return load_config(RunConfig, [str(argument) for argument in arguments], "train", "Train.")


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "a.yaml").write_text(text)
        return tmp_path / "a.yaml"

    return write


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(file):
    path = file("name: mine\nsparsity: {image_keep_rate: 0.3}\ntrain: {learning_rate: 1e-5, seed: 3}\n")
    config = load(path, "--train.learning-rate", "2e-5", "--sparsity.mask-grad-clip", "0.1", "--train.bf16")
    assert (config.name, config.sparsity.image_keep_rate, config.train.seed) == ("mine", 0.3, 3)
    assert (config.train.learning_rate, config.sparsity.mask_grad_clip, config.train.bf16) == (2e-5, 0.1, True)
    assert config.train.predictor_learning_rate == RunConfig().train.predictor_learning_rate
    assert config.tiny is None


def test_short_flags(file):
    config = load(file("tiny: {questions: 100}"), "--seed", "4", "--seeds", "5", "--full")
    assert (config.train.seed, config.tiny.seeds, config.tiny.untrained_base) == (4, 5, True)
    assert config.tiny.questions == 100


def test_no_file_gives_the_defaults():
    assert load() == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", r"unknown key train\.learning_rat; did you mean train\.learning_rate\?"),
        ("sparsitty: {}", "unknown key sparsitty; did you mean sparsity"),
        ("zzz: 1", "unknown key zzz; the known ones are name, output_folder"),
        ("tiny: {questionss: 1}", r"did you mean tiny\.questions"),
        ("train: {learning_rate: fast}", r"train\.learning_rate: Value 'fast'"),
        ("train: {sparsity_mode: images}", "train.sparsity_mode: Invalid value 'images'"),
        ("sparsity: {image_keep_rate: 1.5}", r"image_keep_rate=1\.5 is not a keep rate"),
        ("train: {batch_size: 0}", r"train\.batch_size=0 is below its least value 1"),
        ("train: {warmup_ratio: 1.5}", "share of the steps"),
        ("name: a/b", "name='a/b' must be a plain folder name"),
        ("- 1\n- 2", "holds a list"),
        ("train: {", "a.yaml"),
    ],
)
def test_mistakes_in_a_file_are_named(file, text, message):
    with pytest.raises(ValueError, match=message):
        read_yaml(RunConfig, file(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*nothing\.yaml"):
        read_yaml(RunConfig, tmp_path / "nothing.yaml")


def test_a_mistyped_flag_is_answered_with_the_right_one(capsys):
    with pytest.raises(SystemExit):
        load("--train.learning-rat", "1")
    assert "--train.learning-rate" in capsys.readouterr().err


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    assert "--train.predictor-learning-rate FLOAT Peak learning rate of the predictors." in shown
    assert "--seeds = --tiny.seeds" in shown


def test_the_written_configuration_reads_as_the_same(tmp_path, file):
    for text in ("train: {max_steps: 3}", "tiny: {seeds: 2}\nsparsity: {mask_grad_clip: 0.05}"):
        config = read_yaml(RunConfig, file(text))
        write_config(config, tmp_path / "written.yaml")
        assert read_yaml(RunConfig, tmp_path / "written.yaml") == config


def test_a_users_mistake_is_one_line_and_exit_code_2(file, capsys):
    assert main([str(file("train: {learning_rat: 1}"))]) == 2
    assert main([str(file("model: {base: nowhere}"))]) == 2
    errors = capsys.readouterr().err
    assert "error: " in errors and "did you mean train.learning_rate?" in errors
    assert "data.json is not set" in errors and "Traceback" not in errors
