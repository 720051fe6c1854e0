"""The notebook runs from a bare set-up, shows what it says it shows, and is committed as it ran."""

import base64
import io
import re
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebooks" / "quickstart.ipynb"


def outputs(notebook):
    """Return all that was printed and shown as text, and the pictures, in order."""
    texts, pictures = [], []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            texts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
            if "image/png" in output.get("data", {}):
                pictures.append(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))))
    return "\n".join(texts), pictures


def assert_it_shows_what_it_says(notebook):
    text, pictures = outputs(notebook)
    assert re.search(r"'date': '\d{4}-\d\d-\d\d', 'torch': '2\.\d+", text), "provenance"
    assert len(re.findall(r"row \d: kept 12 of 64 tokens per image; kept \d+ of \d+ output tokens; cache", text)) == 4
    found = re.search(r"objects with a kept patch: \{'learned': (\d+), 'random': (\d+)\} of (\d+)", text)
    learned, by_chance, objects = map(int, found.groups())
    assert by_chance < learned <= objects, found[0]
    assert re.search(r"^dense: \d+ tokens, cache: [\d.]+ [KM]iB, (\d+) tokens in every layer", text, re.MULTILINE)
    shares = [
        int(re.search(rf"^{title}: \d+ tokens, cache: .* dense \((\d+) %\)", text, re.MULTILINE)[1])
        for title in ("image tokens dropped", "image and output tokens dropped")
    ]
    assert 100 > shares[0] > shares[1], shares
    fed = int(re.search(r"\| (\d+) tokens fed", text)[1])
    assert fed < 20, "the second turn fed more than its question"
    assert len(pictures) == 3
    for picture in pictures:
        assert min(picture.size) > 300 and np.asarray(picture.convert("L")).std() > 5


def test_the_committed_notebook_was_run_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert_it_shows_what_it_says(notebook)
    assert NOTEBOOK.stat().st_size < 1 << 20, "keep the pictures small"
    assert not re.search(r"/(root|home|work|tmp|Users)/", NOTEBOOK.read_text(encoding="utf-8")), "a path of one machine"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """From its source alone, in a kernel of its own, with a cache folder that is empty."""
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert_it_shows_what_it_says(notebook)
