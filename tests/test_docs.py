"""README, docs and words: commands exist, links resolve, files that are named are there, one word per idea."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.builders import TOKENS_PER_IMAGE, fixed_rows, prompts, shared_model
from tests.tiny_pipeline import write_checkpoint, write_test_set

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
PATH_IN_CODE = re.compile(r"`((?:dynamic_llava|tests|scripts|configs|docs)/[\w./-]*)(?:::\w+)?`")

# Names that the published code and its relatives use for the keep mask, the predictors and the decisions.
FORBIDDEN = {"policy", "gate", "score_list", "indices_dict", "hard_keep_decision", "keep_decision", "score_predictor"}


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(page, language):
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.split("#")[0] for target in LINK.findall(text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing, f"{name_of(page)} links to {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    named = PATH_IN_CODE.findall(page.read_text(encoding="utf-8"))
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{name_of(page)} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    for line in "\n".join(blocks(page, "bash")).split("\n"):
        for script in re.findall(r"\bbash (\S+\.sh)", line):
            assert (ROOT / script).is_file(), f"{name_of(page)}: {line}"
        for module in re.findall(r"python -m (dynamic_llava[\w.]*)", line):
            target = ROOT / module.replace(".", "/")
            assert (target / "__main__.py").is_file() or target.with_suffix(".py").is_file(), f"{name_of(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_parse_and_import_real_names(page):
    import dynamic_llava

    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "dynamic_llava":
                unknown = [alias.name for alias in node.names if not hasattr(dynamic_llava, alias.name)]
                assert not unknown, f"{name_of(page)}: dynamic_llava has no {unknown}"


def test_the_first_example_of_the_readme_runs(tmp_path, capsys):
    """As it stands, with a random checkpoint and a picture in place of the trained one and of the tiny world's."""
    (tmp_path / "images").mkdir()
    write_test_set(tmp_path, images=1)
    (tmp_path / "0.png").rename(tmp_path / "images" / "test_000000.png")
    code = next(text for text in blocks(ROOT / "README.md", "python") if "apply_chat_template" in text)
    for written, here in (
        ('"runs/tiny/seed0/both/model"', repr(str(write_checkpoint(tmp_path / "model", seed=0)))),
        ("build_world()", f"Path({str(tmp_path)!r})"),
        ("max_new_tokens=120", "max_new_tokens=8"),
    ):
        assert written in code
        code = code.replace(written, here)
    made = {"Path": Path}
    exec(code, made)
    assert len(made["answer"].sparsity.rows[0].output_decisions) == 7
    assert "SparsityRecord of 1 x" in capsys.readouterr().out


def test_the_example_of_adding_a_method_is_a_method():
    """As the page has it: right for ragged rows, alone and together, cached and not."""
    made = {"__name__": "norm_method"}
    exec(blocks(ROOT / "docs/adding-a-method.md", "python")[0], made)
    model, method = shared_model(), made["Norm"](image_keep_rate=0.5)
    inputs = prompts(fixed_rows(seed=3, output=0))
    settings = {"method": method, "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    cached = model.generate(**inputs, **settings)
    assert cached.sequences.equal(model.generate(**inputs, **settings, use_cache=False).sequences)
    kept = [len(image) for row in cached.sparsity.rows for image in row.image_indices]
    assert kept and set(kept) == {TOKENS_PER_IMAGE // 2}
    assert all(all(row.output_decisions) for row in cached.sparsity.rows)


def test_pages_cited_in_the_code_exist():
    """A page that a docstring or message sends its reader to lies in the repository, under the name it has there."""
    cited = re.compile(r"(?<![\w/{}.*-])((?:docs/)?[\w-]+\.md)\b")
    written = {"table.md", "budgets.md", "summary.md", "compare.md", "README.md"}  # files that runs write
    for path in sorted((ROOT / "dynamic_llava").rglob("*.py")):
        names = set(cited.findall(path.read_text(encoding="utf-8"))) - written
        missing = [name for name in names if not (ROOT / name).is_file() and not (ROOT / "docs" / name).is_file()]
        assert not missing, f"{name_of(path)} cites {missing}"


def test_the_tree_in_the_readme_is_the_tree():
    tree = next(text for text in blocks(ROOT / "README.md", "") if text.startswith("dynamic_llava/"))
    missing = []
    for line in tree.strip().split("\n"):
        place = line.split()[0]
        path = ROOT / "dynamic_llava" / place if line.startswith("  ") else ROOT / place
        missing += [] if path.exists() else [place]
    assert not missing, f"the README's tree names {missing}"
    rooms = {p.name for p in (ROOT / "dynamic_llava").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    untold = sorted(room for room in rooms if f"  {room}/" not in tree)
    assert not untold, f"the README's tree lacks {untold}"


def test_paper_map_rows_name_code_and_test():
    lines = (ROOT / "docs/paper-map.md").read_text(encoding="utf-8").split("\n")
    rows = [line for line in lines if line.startswith("|")]
    body = [row.strip("|").split("|") for row in rows if not set(row) <= set("|- :")][1:]
    assert len(body) >= 15
    for cells in body:
        assert len(cells) == 4, cells
        assert "`dynamic_llava/" in cells[1] and "`tests/" in cells[2], f"row {cells[0].strip()!r} lacks code or test"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_that_is_named_exists(page):
    for path, test in re.findall(r"`(tests/[\w./]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {test}"


def identifiers(path):
    """Names in code; comments and strings excepted."""
    readline = io.StringIO(path.read_text(encoding="utf-8")).readline
    return {token.string for token in tokenize.generate_tokens(readline) if token.type == tokenize.NAME}


@pytest.mark.parametrize("path", sorted((ROOT / "dynamic_llava").rglob("*.py")), ids=name_of)
def test_one_word_per_idea(path):
    """No identifier has a forbidden word as one of its parts; Llama's own gate_proj is not ours to name."""
    found = set()
    for name in identifiers(path) - {"gate_proj"}:
        parts = "_".join(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", name)).lower()
        found |= {name for word in FORBIDDEN if f"_{word}_" in f"_{parts}_"}
    assert not found, f"{name_of(path)} uses {sorted(found)}; docs/glossary.md owns the words"


def test_the_glossary_names_real_code():
    import dynamic_llava

    lines = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").split("\n")
    names = {name for line in lines if line.startswith("|") for name in re.findall(r"`([A-Z]\w+)`", line.split("|")[3])}
    assert len(names) >= 6
    missing = sorted(name for name in names if not hasattr(dynamic_llava, name))
    assert not missing, f"the glossary names {missing}, which dynamic_llava does not have"
