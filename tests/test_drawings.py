"""What docs/architecture.md draws of a running model is what runs."""

import re
import traceback
from pathlib import Path

import pytest

import dynamic_llava
from dynamic_llava.methods import Dynamic
from tests.builders import build_model, fixed_rows, prompts

PACKAGE = Path(dynamic_llava.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
FRAME = r"(\w+/\w+\.py) +(\w+)"


def drawn():
    """Return, for each of the drawing's two columns, how many frames its head promises, and the frames it lists."""
    drawing = PAGE.split("## From generate() to a decision")[1].split("```")[1].strip().splitlines()
    counts = [int(count) for count in re.findall(r"(\d+) frames", drawing[0])]
    middle = drawing[0].index("a step on the cache")
    columns = [line[:middle] for line in drawing[1:]], [line[middle:] for line in drawing[1:]]
    frames = [[match.groups() for line in lines if (match := re.match(FRAME, line))] for lines in columns]
    return list(zip(counts, frames, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_frames_from_generate_to_a_decision(use_cache, monkeypatch):
    found = {"keep_image": [], "keep_output": []}

    def watched(hook):
        decide = getattr(Dynamic, hook)

        def decided(*args):
            stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
            found[hook].append([(Path(one.filename).relative_to(PACKAGE).as_posix(), one.name) for one in stack])
            return decide(*args)

        monkeypatch.setattr(Dynamic, hook, decided)

    for hook in found:
        watched(hook)
    inputs = {key: value for key, value in prompts(fixed_rows()).items() if key != "output_mask"}
    build_model().eval().generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=use_cache)
    (pass_count, pass_frames), (step_count, step_frames) = drawn()
    assert (pass_count, step_count) == (len(pass_frames), len(step_frames))
    assert found["keep_image"][0] == pass_frames
    assert found["keep_output"][-1] == (step_frames if use_cache else pass_frames)
