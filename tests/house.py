"""The size of the house: how much a newcomer has to read.

`python tests/house.py [FOLDER]` prints the table of docs/architecture.md.
FOLDER is another checkout to measure beside this one, for example that of an earlier commit.
"""

import ast
import sys
from pathlib import Path
from statistics import quantiles

ROOT = Path(__file__).resolve().parent.parent
IDEA = ("sparsity", "methods/base.py", "methods/dynamic.py")
"""Where the paper lives: what it adds to LLaVA, readable without the rest."""


def measure(root):
    """Return {what: number} of a checkout."""
    package = root / "dynamic_llava"
    files = sorted(package.rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    defined = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [node for node in defined if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    classes = [node for node in defined if isinstance(node, ast.ClassDef)]
    public = [node for node in functions + classes if not node.name.startswith("_")]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions)
    return {
        "files": len(files),
        "lines": sum(lines_of(path) for path in files),
        "rooms (modules and packages at the top)": len({path.relative_to(package).parts[0] for path in files}) - 1,
        "functions": len(functions),
        "lines of a function, median": quantiles(lengths, n=10)[4],
        "lines of a function, nine in ten have at most": quantiles(lengths, n=10)[8],
        "lines of a function, longest": lengths[-1],
        "public functions and classes with a docstring, %": round(100 * sum(map(has_docstring, public)) / len(public)),
        "words in the glossary": glossary_words(root / "docs" / "glossary.md"),
        "lines of the paper's idea (" + ", ".join(IDEA) + ")": sum(
            lines_of(path) for path in files if path.relative_to(package).as_posix().startswith(IDEA)
        ),
    }


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def has_docstring(node):
    return ast.get_docstring(node) is not None


def glossary_words(page):
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return len(rows) - 2  # the head of the table and its rule


def table(columns):
    """Return the measures of several checkouts as a table in Markdown."""
    names = list(columns)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for what in columns[names[0]]:
        lines.append(f"| {what} | {' | '.join(f'{columns[name][what]:,.0f}' for name in names)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    before = {Path(folder).name: measure(Path(folder)) for folder in sys.argv[1:]}
    print(table({**before, "now": measure(ROOT)}))
