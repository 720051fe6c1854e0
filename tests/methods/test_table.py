"""The table of docs/methods.md has a row for every registered method, and says of it what the class says."""

from pathlib import Path

import pytest

from dynamic_llava.methods import METHODS, Method
from tests.methods.test_references import STAGED

PAGE = Path(__file__).resolve().parents[2] / "docs/methods.md"
COLUMNS = ("method", "drops", "where", "evidence", "positions as published", "learns", "source", "traps")
LAYERS = 32


def rows():
    """Return the cells of each row of the page's table, by the name in the first."""
    lines = [line for line in PAGE.read_text("utf-8").split("\n") if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert all(len(one) == len(COLUMNS) for one in cells), [one[0] for one in cells if len(one) != len(COLUMNS)]
    return {one[0].strip("`"): dict(zip(COLUMNS, one, strict=True)) for one in cells}


def where(method):
    """Say where a method decides, as the page does."""
    if method.is_dense:
        return "nowhere"
    if method.evicts and not method.cuts(LAYERS):
        return "in every layer"
    cuts = method.cuts(LAYERS)
    deep = [str(cut.layer) for cut in cuts if cut.layer]
    places = ["before the projector" if cut.before_projector else "before the language model" for cut in cuts[:1]]
    places = [] if cuts[0].layer else places
    places += [f"layer{'s' if len(deep) > 1 else ''} {', '.join(deep)}"] if deep else []
    places += ["output tokens too"] if any(cut.output for cut in cuts) else []
    return ", ".join(places + (["in every layer"] if method.evicts else []))


def test_every_registered_method_has_its_row_and_no_other_has():
    found = [line.split("`")[1] for line in PAGE.read_text("utf-8").split("\n") if line.startswith("| `")]
    assert found == sorted(METHODS), "one row for each registered method, in the order of their names"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_row_says_what_the_class_says(name):
    row, method = rows()[name], METHODS[name]()
    assert all(row.values()), row
    if name == "mixed":
        assert row["drops"] == row["where"] == row["evidence"] == row["learns"] == "by its parts"
        return  # it decides nothing itself
    cuts = () if method.is_dense else method.cuts(LAYERS)
    evidence = sorted({*method.evict_sees, *(one for cut in cuts for one in cut.sees)})
    assert row["where"] == where(method)
    assert row["evidence"] == (", ".join(evidence) or "-")
    assert row["learns"] == ("yes" if type(method).build is not Method.build else "no")
    assert (row["learns"] == "no") == method.training_free
    dropped = row["drops"].split(", ")
    assert ("stored" in dropped) == method.evicts
    assert ("image" in dropped) == (type(method).keep_image is not Method.keep_image)
    assert ("output" in dropped) == any(cut.output for cut in cuts)


def test_only_methods_that_merge_are_said_to():
    """Whether a method merges is in the annotation of its decision: a Choice."""
    merging = {name for name, kind in METHODS.items() if "Choice" in str(kind.keep_image.__annotations__["return"])}
    merging -= {name for name, kind in METHODS.items() if kind.keep_image is Method.keep_image or name == "mixed"}
    assert {name for name, row in rows().items() if "merges" in row["drops"]} == merging
    assert merging <= {name.partition(",")[0] for name in STAGED}
