"""The rules of docs/architecture.md, read from the source: layers, packages in their rooms, sizes, forbidden words."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.house import measure

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dynamic_llava"
FILES = sorted(PACKAGE.rglob("*.py"))
# The public table of names at the top belongs to no layer.
LAYERED = [path for path in FILES if path != PACKAGE / "__init__.py"]

LAYER = {
    "cli": 0, "config": 0, "costs": 0, "files": 0, "layout": 0, "projectors": 0,
    "sparsity": 1, "provenance": 1,
    "methods": 2,
    "engine": 3,
    "model": 4,
    "processing": 5, "tiny/world": 5,
    "checkpoints": 6, "data": 6, "tiny/base": 6, "viz": 6,
    "train": 7, "eval": 7,
    "auto_classes": 8, "calibrate": 8, "chat": 8, "profile": 8, "tiny/job": 8,
    "apps": 9, "look": 9, "smol": 9, "sweep": 9, "tiny": 9,
    "__main__": 10, "report": 10,
}  # fmt: skip
"""A room, its `__main__.py` and other entry points counted with it, imports rooms of lower layers only."""

# Where a package from outside may be imported; "*" is every layer from L3 up.
UPPER = {room for room, layer in LAYER.items() if layer >= 3}
ROOMS = {
    "torch": set(LAYER),
    "transformers": {
        "engine", "model", "processing", "checkpoints", "tiny", "train", "eval", "profile", "auto_classes",
    },
    "safetensors": {"model", "checkpoints", "tiny", "train"},
    "huggingface_hub": {"checkpoints"},
    "tokenizers": {"processing", "profile", "tiny"},
    "numpy": UPPER,
    "tqdm": {"data", "tiny", "train", "eval", "profile", "cli"},
    "accelerate": {"train", "eval"}, "deepspeed": {"train"}, "peft": {"train"}, "wandb": {"train"},
    "omegaconf": {"cli"}, "tyro": {"cli"},
    "yaml": {"cli", "train", "viz"},
    "PIL": {"processing", "viz", "tiny", "profile", "eval", "look"},
    "datasets": {"data", "eval"}, "filelock": {"data"},
    "matplotlib": {"viz"},
    "nltk": {"eval"}, "openpyxl": {"eval"},
    "lmms_eval": {"eval"}, "vlmeval": {"eval"},
    "triton": {"sparsity"},
}  # fmt: skip

PUBLIC_TRANSFORMERS = {"transformers", "transformers.utils"}
"""Everything below these is an internal that may change between releases."""

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_NESTING = 400, 80, 4
PROTOCOL_NAMES = {
    "checkpoint_method", "Choice", "CLIP_EVIDENCE", "Cut", "Draw", "Evidence", "ImageTokens", "Method", "OutputTokens",
    "PromptTokens", "QUESTION_EVIDENCE", "QuestionTokens", "SlotEvidence", "Slots", "TOKEN_EVIDENCE", "TOWER_EVIDENCE",
}  # fmt: skip
METHOD_PROTOCOL = {"base", "eviction", "evidence", "grid", "outliers", "registry", "values"}
"""Modules of methods/ that concrete methods share; every other module there is one method."""


def name_of(path):
    return str(path.relative_to(ROOT))


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(path):
    return room_named(path.relative_to(PACKAGE).with_suffix("").parts)


def room_named(parts):
    """A room is a module or a package at the top; the tiny world has several."""
    inner = "/".join(parts[:2])
    return inner if inner in LAYER else parts[0]


def imported_modules(path):
    """Yield (line, dotted module) of every import, relative ones resolved, type-checking and lazy ones included."""
    package = ("dynamic_llava", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                # `from .decoder import f` names a function of a module, `from . import decoder` a module.
                inner = f"{module}.{alias.name}"
                yield node.lineno, inner if is_own_module(inner) or module == "dynamic_llava" else module


def is_own_module(dotted):
    path = ROOT / dotted.replace(".", "/")
    return dotted.startswith("dynamic_llava.") and (path.with_suffix(".py").is_file() or path.is_dir())


def own_imports(path):
    """Yield (line, parts below dynamic_llava) of the imports from this package."""
    for line, module in imported_modules(path):
        head, *rest = module.split(".")
        if head == "dynamic_llava":
            yield line, rest


def functions(path):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def nesting(node, depth=0):
    """Depth of the deepest block; `elif` continues its `if`, a nested function starts anew."""
    blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deeper = depth + (isinstance(child, blocks) and not is_elif)
        deepest = max(deepest, nesting(child, deeper))
    return deepest


def test_every_room_has_a_layer():
    unknown = sorted({room_of(path) for path in LAYERED} - set(LAYER))
    assert not unknown, f"give {unknown} a place in LAYER and in docs/architecture.md"


@pytest.mark.parametrize("path", LAYERED, ids=name_of)
def test_a_layer_imports_only_lower_layers(path):
    here, wrong = room_of(path), []
    for line, rest in own_imports(path):
        if not rest or rest[0].startswith("__"):
            continue
        target = room_named(rest)
        assert target in LAYER, f"{name_of(path)}:{line} imports {target}, which has no layer"
        peers_within_l0 = LAYER[here] == LAYER[target] == 0
        if not (target == here or LAYER[target] < LAYER[here] or peers_within_l0):
            wrong.append(f"line {line}: L{LAYER[here]} {here} imports L{LAYER[target]} {target}")
    assert not wrong, f"{name_of(path)}: {wrong}"


def circle_in(edges):
    """Return the first circle of a graph, node -> nodes, as a chain that ends where it began; empty without one."""
    done, active = set(), []

    def visit(node):
        if node in active:
            return [*active[active.index(node) :], node]
        if node in done:
            return []
        active.append(node)
        for target in sorted(edges[node]):
            if found := visit(target):
                return found
        active.pop()
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := visit(node))), [])


def test_packages_form_no_circle():
    """What lies in one folder at the top as one, entry points and the rooms of the tiny world with it."""
    edges = {}
    for path in LAYERED:
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        targets = {rest[0] for _, rest in own_imports(path) if rest and not rest[0].startswith("__")}
        edges.setdefault(here, set()).update(targets - {here})
    assert not circle_in(edges)
    assert circle_in(edges | {"data": {"train"}}) == ["data", "train", "data"]  # the test sees one


def test_the_size_of_the_house_is_measured():
    """Every row of the table in docs/architecture.md is one that tests/house.py still measures."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = measure(ROOT)
    assert all(f"| {what} | " in page for what in found)
    assert found["files"] == len(FILES) and found["lines of a function, longest"] <= MAX_FUNCTION_LINES


def test_modules_form_no_cycle():
    """Module by module, imports inside functions included: a cycle is a missing seam."""
    modules = {}
    for path in LAYERED:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[parts[:-1] if parts[-1] == "__init__" else parts] = path
    edges = {}
    for parts, path in modules.items():
        targets = set()
        for _, rest in own_imports(path):
            target = tuple(rest)
            while target and target not in modules:
                target = target[:-1]
            if target and target != parts:
                targets.add(target)
        edges[parts] = targets
    assert not circle_in(edges)


@pytest.mark.parametrize("path", LAYERED, ids=name_of)
def test_outside_packages_stay_in_their_rooms(path):
    room, wrong = path.relative_to(PACKAGE).with_suffix("").parts[0], []
    for line, module in imported_modules(path):
        head = module.split(".")[0]
        if head == "dynamic_llava" or head in sys.stdlib_module_names:
            continue
        if head not in ROOMS:
            wrong.append(f"line {line}: {head} has no room; name one in ROOMS, pyproject.toml and docs/architecture.md")
        elif room not in ROOMS[head]:
            wrong.append(f"line {line}: {head} may be imported in {sorted(ROOMS[head])} only")
        elif head == "transformers" and module not in PUBLIC_TRANSFORMERS and room not in ("engine", "model"):
            wrong.append(f"line {line}: {module} is an internal of transformers; only engine/ and model/ may use those")
        elif head == "triton" and (path.parent.name != "kernels" or not path.stem.startswith("triton")):
            wrong.append(f"line {line}: triton is imported in sparsity/kernels/triton*.py only")
    assert not wrong, f"{name_of(path)}: {wrong}"


def test_methods_do_not_see_each_other():
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        if path.stem in METHOD_PROTOCOL or path.stem == "__init__":
            continue
        seen = {rest[1] for _, rest in own_imports(path) if rest[0] == "methods" and len(rest) > 1}
        assert seen <= METHOD_PROTOCOL, f"{name_of(path)} imports {sorted(seen - METHOD_PROTOCOL)}"


def test_the_decoder_knows_the_protocol_and_no_concrete_method():
    """The engine serves every method."""
    for path in (PACKAGE / "engine").glob("*.py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dynamic_llava.methods"):
                names = {alias.name for alias in node.names}
                assert names <= PROTOCOL_NAMES, f"{name_of(path)}:{node.lineno}: {sorted(names - PROTOCOL_NAMES)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    wrong = [f"{lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            wrong.append(f"{function.name}: {length} lines, at most {MAX_FUNCTION_LINES}")
        if nesting(function) > MAX_NESTING:
            wrong.append(f"{function.name}: nesting {nesting(function)}, at most {MAX_NESTING}")
    assert not wrong, f"{name_of(path)}: {wrong}"


def test_device_names_stand_in_one_function():
    """Device and dtype come from tensors; at most one function decides a default and may say "cuda"."""
    places = set()
    for path in FILES:
        text = path.read_text(encoding="utf-8").lower().replace("cudagraph", "")  # torch's word for any device's graphs
        for number in (i for i, line in enumerate(text.split("\n"), 1) if "cuda" in line):
            inside = [f.name for f in functions(path) if f.lineno <= number <= f.end_lineno]
            places.add((name_of(path), inside[0] if inside else f"line {number}"))
    assert len(places) <= 1, f"'cuda' stands in {sorted(places)}"


def test_model_files_keep_real_annotations():
    """transformers reads `config: X` annotations as classes; postponed evaluation turns them into strings."""
    for path in sorted((PACKAGE / "model").rglob("*.py")):
        assert "__future__" not in {module for _, module in imported_modules(path)}, name_of(path)


def test_scripts_stay_short():
    for path in sorted((ROOT / "scripts").glob("*.sh")):
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines < 60, f"{name_of(path)}: {lines} lines; a script parses, calls and prints"


def legend():
    """Return letter -> what it counts, the bold words of docs/architecture.md's shape suffixes."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w) \| \*\*(.+?)\*\*", page.split("## Shape suffixes")[1].split("\n## ")[0], re.MULTILINE)
    assert len(rows) == len(dict(rows)) == len({words for _, words in rows}), "a letter or a meaning stands there twice"
    return dict(rows)


def local_letters(path):
    """Return (letter, meaning) of each that the docstring of a module lists behind "Shape suffixes:"."""
    text = " ".join((ast.get_docstring(tree_of(path)) or "").split())
    _, _, listed = text.partition("Shape suffixes: ")
    return re.findall(r"(?:^|[,;] )(\w) ([^,;.]*)", listed.split(". ")[0])


def suffixed(path):
    """Return the variables and arguments of a module that end in a shape, such as hidden_BND and keep_In."""
    nodes = list(ast.walk(tree_of(path)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    return sorted(name for name in names if re.fullmatch(r"_?[a-z_]+_(?=\w*[A-Z])[A-Za-z\d]{1,6}", name))


def test_shape_suffixes_are_those_of_the_legend():
    """One letter has one meaning in the whole package; a module may narrow it, and no letter waits for a use."""
    known, used = legend(), set()
    for path in FILES:
        listed = local_letters(path)
        for letter, meaning in listed:
            used.add(letter)
            assert letter in known, f"{name_of(path)}: {letter} ({meaning}) is not in the legend"
            assert f"{meaning} ".startswith(f"{known[letter]} "), f"{name_of(path)}: {letter} is {meaning!r} here"
        allowed = {letter for letter, _ in listed} or set(known)
        for name in suffixed(path) if "tiny" not in path.parts else ():  # the shipped base has legends of its own
            unlisted = set(name.rpartition("_")[2]) - allowed - set("0123456789")
            assert not unlisted, f"{name_of(path)}: {name} has {sorted(unlisted)}, which the docstring does not list"
    assert used == set(known), f"nobody uses {sorted(set(known) - used)}; take them out of the legend"


COMMON_WORDS = (
    "Answer", "Batch", "Column", "Evaluation", "Generation", "Key", "Kind", "Plan", "Prefilled", "Question", "Record",
    "Report", "Row", "Source", "Step", "Target",
)  # fmt: skip


@pytest.mark.parametrize("word", COMMON_WORDS)
def test_a_common_word_names_one_class(word):
    """The next plan, row or column says which one it is, so that a reader who searches for it finds it."""
    named = [name_of(path) for path in FILES for node in tree_of(path).body if word in names_made_by(node)]
    assert len(named) <= 1, f"{word} is {len(named)} things: {named}; give each a name of its own"


def test_a_class_name_stands_for_one_class():
    """But for the stand-ins of auto_classes.py."""
    homes = {}
    for path in FILES:
        if path.stem != "auto_classes":
            for node in tree_of(path).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, []).append(name_of(path))
    doubled = {name: paths for name, paths in homes.items() if len(paths) > 1}
    assert not doubled, f"{doubled}; give each idea a word of its own (docs/glossary.md)"


def names_made_by(node):
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    made = [target.id for target in targets if isinstance(target, ast.Name)]
    return {node.name, *made} if isinstance(node, ast.ClassDef) else set(made)
