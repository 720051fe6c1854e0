"""Configuration files and command lines: what is understood, and what is said about a mistake."""

import pytest

from dynamic_llava.cli import load_config, read_yaml
from dynamic_llava.config import SparsityConfig
from dynamic_llava.tiny.job.config import JobConfig
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import write_config


def load(*arguments):
    return load_config(RunConfig, [str(argument) for argument in arguments], "train", "Train.")


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / "a.yaml"

    return write


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(file):
    path = file("name: mine\nsparsity: {image_keep_rate: 0.3}\ntrain: {learning_rate: 1e-5, seed: 3}\n")
    config = load(path, "--train.learning-rate", "2e-5", "--sparsity.mask-grad-clip", "0.1", "--train.bf16")
    assert (config.name, config.sparsity.image_keep_rate, config.train.seed) == ("mine", 0.3, 3)
    assert (config.train.learning_rate, config.sparsity.mask_grad_clip, config.train.bf16) == (2e-5, 0.1, True)
    assert config.train.predictor_learning_rate == RunConfig().train.predictor_learning_rate


def test_short_flags(file):
    arguments = [str(file("tiny: {questions: 100}")), "--seed", "4", "--seeds", "5", "--full"]
    config = load_config(JobConfig, arguments, "job", "The job.")
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
        ("train: {learning_rate: fast}", r"train\.learning_rate: Value 'fast'"),
        ("train: {sparsity_mode: images}", "train.sparsity_mode: Invalid value 'images'"),
        ("sparsity: {image_keep_rate: 1.5}", r"image_keep_rate=1\.5 is not a keep rate"),
        ("train: {batch_size: 0}", r"train\.batch_size=0 is below its least value 1"),
        ("train: {warmup_ratio: 1.5}", "share of the steps"),
        ("name: a/b", "name='a/b' must be a plain folder name"),
        ("- 1\n- 2", "holds a list"),
        ("train: {", "a.yaml"),
        ("train: {learning_rate: 1e400}", r"train\.learning_rate=inf is no finite number"),
        ("train: {predictor_learning_rate: .nan}", r"train\.predictor_learning_rate=nan is no finite number"),
        ("train: {projector_learning_rate: -.inf}", r"train\.projector_learning_rate=-inf is no finite number"),
        ("train: {max_grad_norm: .nan}", r"train\.max_grad_norm=nan is no finite number"),
        ("train: {epochs: .inf}", r"train\.epochs=inf is no finite number"),
        ("sparsity: {keep_rate_weight: .nan}", "keep_rate_weight=nan is no finite number"),
        ("sparsity: {mask_grad_clip: .inf}", "mask_grad_clip=inf is no finite number"),
        ("sparsity: {output_threshold: .nan}", "output_threshold=nan is no finite number"),
        ("train: {tune: lora}\nlora: {alpha: .inf}", r"lora\.alpha=inf is no finite number"),
        ("just a word", "unknown key just a word"),
        ("data: 0", "a.yaml: data is 0; lines of settings are due there: json, image_folder"),
        ("sparsity: [a]", r"a.yaml: sparsity is \['a'\]; lines of settings are due there"),
        ("train: {tune: " + 5000 * "x" + "}", "^.{,1200}$"),
        ("name: [1]", "a.yaml: name: Cannot convert 'ListConfig' to string: '\\[1\\]'$"),
        ("3.5", "Invalid loaded object type: float"),
        ('"yes"', "holds a single word"),
        ("'7'", "holds a single word"),
        ("{" * 3000, "is no valid YAML"),
        ('train: {learning_rate: "${nothing}"}', "nothing"),
        ("name: caf\udce9".encode("utf-8", "surrogateescape"), "is not written in UTF-8 .byte 9"),
        ("name: x".encode("utf-16"), "is not written in UTF-8 .byte 0"),
    ],
)
def test_mistakes_in_a_file_are_named(file, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(RunConfig, file(text))
    assert type(error.value) is ValueError and str(error.value).count("a.yaml:") <= 1 and "a.yaml" in str(error.value)


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
    assert "--seed = --train.seed" in shown and "--tiny." not in shown


def test_the_written_configuration_reads_as_the_same(tmp_path, file):
    files = {"train: {max_steps: 3}": RunConfig, "tiny: {seeds: 2}\nsparsity: {mask_grad_clip: 0.05}": JobConfig}
    for text, kind in files.items():
        config = read_yaml(kind, file(text))
        write_config(config, tmp_path / "written.yaml")
        assert read_yaml(kind, tmp_path / "written.yaml") == config


def test_a_users_mistake_is_one_line_and_exit_code_2(file, capsys):
    assert main([str(file("train: {learning_rat: 1}"))]) == 2
    assert main([str(file("model: {base: nowhere}"))]) == 2
    errors = capsys.readouterr().err
    assert "error: " in errors and "did you mean train.learning_rate?" in errors
    assert "data.json is not set" in errors and "Traceback" not in errors


def write(folder, **texts):
    """Write files given as name=text, a double underscore standing for a folder; return the last one's path."""
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def test_a_file_extends_another_key_by_key(tmp_path):
    path = write(
        tmp_path,
        root="name: r\ntrain: {learning_rate: 1e-5, seed: 3}\ntiny: {questions: 99}\nsparsity: {mask_grad_clip: 0.1}",
        more__middle="extends: ../root.yaml\ntrain: {seed: 4}\ntiny: null",
        more__deep__leaf="extends: ../middle.yaml\nname: leaf\nsparsity: {mask_grad_clip: null, sparse_layer: 4}",
    )
    config = load(path, "--train.bf16")
    assert (config.name, config.train.learning_rate, config.train.seed, config.train.bf16) == ("leaf", 1e-5, 4, True)
    assert config.sparsity == SparsityConfig(sparse_layer=4)
    assert read_yaml(JobConfig, tmp_path / "root.yaml").tiny.questions == 99


def test_extending_and_adding_nothing_is_the_same_configuration(tmp_path):
    path = write(tmp_path, root="name: root\ntrain: {seed: 3}", leaf="extends: root.yaml")
    assert read_yaml(RunConfig, path) == read_yaml(RunConfig, tmp_path / "root.yaml")


def test_the_written_configuration_of_an_extending_file_stands_alone(tmp_path):
    config = read_yaml(RunConfig, write(tmp_path, root="train: {seed: 3}", leaf="extends: root.yaml\nname: leaf"))
    write_config(config, tmp_path / "elsewhere.yaml")
    assert "extends" not in (tmp_path / "elsewhere.yaml").read_text()
    (tmp_path / "root.yaml").unlink()
    assert read_yaml(RunConfig, tmp_path / "elsewhere.yaml") == config


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"root": "train: {learning_rat: 1}", "leaf": "extends: root.yaml"}, r"root\.yaml: .* train\.learning_rat;"),
        ({"root": "{}", "leaf": "extends: root.yaml\nsparsitty: {}"}, r"leaf\.yaml: unknown key sparsitty"),
        ({"root": "train: {learning_rate: fast}", "leaf": "extends: root.yaml"}, r"root\.yaml: train\.learning_rate"),
        ({"root": "{}", "leaf": "extends: root.yaml\ntrain: {seed: x}"}, r"leaf\.yaml: train\.seed: Value 'x'"),
        ({"root": "- 1", "leaf": "extends: root.yaml"}, r"root\.yaml holds a list"),
        ({"root": "a: {", "leaf": "extends: root.yaml"}, r"root\.yaml is no valid YAML"),
        ({"leaf": "extends: leaf.yaml"}, r"leaf\.yaml extends .*leaf\.yaml: a circle"),
        (
            {"a": "extends: leaf.yaml", "leaf": "extends: a.yaml"},
            r"leaf\.yaml extends .*a\.yaml extends .*leaf",
        ),
        ({"leaf": "extends:"}, r"leaf\.yaml: extends=None must be the name of one file"),
        ({"leaf": "extends: [a.yaml, b.yaml]"}, "extends=.* must be the name of one file"),
        ({"leaf": f"extends: {5000 * 'x'}"}, r"^(?=.{,1500}$).*is no configuration file .*too long.; .*leaf\.yaml"),
        ({"leaf": f"? {5000 * 'x'}\n: 1"}, r"^.*leaf\.yaml: unknown key (?=.{,2000}$)x+ \.\.\. x+;"),
        ({"root": "{}", "leaf": "train: {extends: root.yaml}"}, r"unknown key train\.extends"),
    ],
)
def test_mistakes_in_extending_files_are_named_with_their_file(tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        read_yaml(RunConfig, write(tmp_path, **texts))


def test_a_missing_file_that_is_extended_is_named_with_who_wants_it(tmp_path):
    path = write(tmp_path, more__leaf="extends: ../nothing.yaml")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/nothing\.yaml; .*leaf\.yaml extends it"):
        read_yaml(RunConfig, path)
