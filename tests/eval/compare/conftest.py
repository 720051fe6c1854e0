"""A benchmark whose score changes with any answer, a checkpoint, and the command on them."""

import pytest

from dynamic_llava.eval import tasks
from dynamic_llava.eval.compare import run as comparing
from dynamic_llava.eval.metrics.tally import tally_of_means
from tests.eval.run_builders import Toy, ragged_checkpoint, toy_data


class Worded(Toy):
    """Each answer is worth a number that its text makes, so that no two different files of answers score the same."""

    def score(self, answers, root, hub=None, *, part=False):
        """Return the mean of the answers' numbers; ValueError unless every question is answered once, in order."""
        found = super().score(answers, root, hub, part=part)
        values = [sum(map(ord, answer.text)) % 97 for answer in answers]
        metrics = {"accuracy": (sum(values) / len(values), "percent")}
        return self.result(metrics, found.counts, [], tallies={"accuracy": tally_of_means(values)})


class Stopped:
    """A clock on which every token takes a tenth of a second."""

    def __init__(self, model, batch, switches):
        self.rows = len(batch.inputs["input_ids"])

    def seconds(self, count):
        """Return the seconds of a prefill and of count new tokens."""
        return 0.1 * count


@pytest.fixture(autouse=True)
def worded(monkeypatch):
    """Register the benchmark; nothing is timed and no picture drawn, which takes longer than the rest."""
    monkeypatch.setattr(comparing, "Clock", Stopped)
    monkeypatch.setattr(comparing, "draw_quality_against_cost", lambda *given, **more: None)
    monkeypatch.setitem(tasks.TASKS, Worded.name, Worded)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint with predictors whose answers end early or not, and the questions of the benchmark beside it."""
    folder = ragged_checkpoint(tmp_path_factory.mktemp("model"))
    toy_data(folder, number=6)
    return folder
