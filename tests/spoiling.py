"""Files spoilt where their structure is or where their bytes are; a reader may read them, or refuse them by name."""

import copy
import json

import yaml

from dynamic_llava.eval.tasks import TASKS, get_task

TEXT_FILES = {".json", ".jsonl", ".tsv", ".csv", ".txt"}
HOSTILE = (
    None, True, False, 0, -1, 7, 3.5, 10**30, float("inf"), float("nan"), "", " ", "A", "yes", "7", "\ud800", "\0",
    "a\nb\tc", "../x", "x" * 5000, [], {}, [[]], [None], {"a": 1}, ["a", 1], [1.5, 2],
)  # fmt: skip
OF_ANSWERS = (
    "no question", "no answer to", "without an answer", "missing are", "not in the question file's order", "odd number",
    "no pair", "twice", "more than once",
)  # fmt: skip
"""What is said of answers that no longer belong to the questions: `score_file` puts their file before it."""
SPOILS = ("replace", "delete", "twice", "bytes", "cut", "mark", "utf-16")


def nodes(value):
    """Return (container, key) of everything inside a JSON value, itself excluded."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [one for key, below in list(inside) for one in ((value, key), *nodes(below))]


def spoil_structure(content, how, place, hostile):
    """Change one node of a JSON value and return it."""
    content = copy.deepcopy(content)
    found = nodes(content)
    if not found:
        return hostile
    owner, key = found[place % len(found)]
    if how == "replace":
        owner[key] = copy.deepcopy(hostile)
    elif how == "delete":
        del owner[key]
    elif isinstance(owner, list):
        owner.append(owner[key])
    return content


def spoil(data, ending, how, place, hostile):
    """Return the bytes of a file, spoilt."""
    if how == "cut":
        return data[: place % (len(data) + 1)]
    if how == "mark":
        return b"\xef\xbb\xbf" + data
    if how == "utf-16":
        return data.decode().encode("utf-16")
    if how == "bytes":
        at = place % (len(data) + 1)
        return data[:at] + bytes([place % 256, 0xFF, 0x00, 0x22][: 1 + place % 4]) + data[at + place % 3 :]
    if ending not in (*TEXT_FILES, ".yaml"):
        return spoil(data, ending, ("bytes", "cut")[place % 2], place // 2, hostile)
    if ending == ".jsonl" or (ending == ".json" and b"}\n{" in data):
        lines = [json.loads(line) for line in data.splitlines()]
        return "".join(json.dumps(line) + "\n" for line in spoil_structure(lines, how, place, hostile)).encode()
    if ending == ".yaml":  # JSON is YAML
        return json.dumps(spoil_structure(yaml.safe_load(data), how, place, hostile)).encode()
    if ending == ".json":
        return json.dumps(spoil_structure(json.loads(data), how, place, hostile)).encode()
    mark = {".tsv": "\t", ".csv": ","}.get(ending, "\t")
    rows = [line.split(mark) for line in data.decode().split("\n")]
    rows = spoil_structure(rows, how, place, hostile)
    cells = [row if isinstance(row, list) else [row] for row in rows]
    return "\n".join(mark.join(map(str, row)) for row in cells).encode(errors="surrogatepass")


def readings(made, answers, root):
    """Everything that a task reads its files for, as functions without arguments."""
    own = get_task(made.task)
    for split in own.splits or (None,):
        task = TASKS[own.name](split)
        yield lambda task=task: [one.image.path() for one in task.questions(root) if hasattr(one.image, "path")]
        yield lambda task=task: task.submission(answers, root, root / "out")
    for task in (own, TASKS[own.name]()):
        yield lambda task=task: task.can_score(answers, root)
    if made.best is not None:
        yield lambda: own.score(answers, root)
        yield lambda: own.score(answers, root, part=True)


def checked(reading, names):
    """Run a reading; fail unless it ends well, or in an error of a user's that names one of the files."""
    try:
        reading()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), repr(error)
        assert any(name in text for name in names), f"names no file: {text[:300]}"
        assert len(text) < 3000 and text.encode()
    return True
