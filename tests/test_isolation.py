"""A test that watches what is logged may run after any other: nothing that one leaves behind hides it."""

import ast
import logging
from pathlib import Path

import pytest
import transformers

from dynamic_llava.sparsity.kernels.choice import log_once
from tests.isolation import forget_what_was_said, loggers_of_its_own

PACKAGE = Path(__file__).resolve().parents[1] / "dynamic_llava"
OURS, THEIRS, NEW = "dynamic_llava.model.llava", "transformers.generation.utils", "dynamic_llava.nobody_asked_for_it"
logging.getLogger(OURS)
LEFT_BEHIND = {
    "everything is switched off": lambda: logging.disable(logging.CRITICAL),
    "the root lets errors through alone": lambda: logging.getLogger().setLevel(logging.ERROR),
    "our loggers are quiet": lambda: logging.getLogger("dynamic_llava").setLevel(logging.ERROR),
    "a logger is quiet": lambda: logging.getLogger(OURS).setLevel(logging.ERROR),
    "a logger is switched off": lambda: setattr(logging.getLogger(OURS), "disabled", True),
    "a logger is cut from the root": lambda: setattr(logging.getLogger(OURS), "propagate", False),
    "a logger is filtered": lambda: logging.getLogger(OURS).addFilter(lambda record: False),
    "a new logger is switched off": lambda: setattr(logging.getLogger(NEW), "disabled", True),
    "transformers is quiet": transformers.logging.set_verbosity_error,
}


@pytest.mark.parametrize("leave", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_loggers_are_set_back(leave, caplog):
    with loggers_of_its_own():
        leave()
    for name in (OURS, NEW, THEIRS):
        logging.getLogger(name).warning("seen of %s", name)
    assert caplog.messages == [f"seen of {name}" for name in (OURS, NEW, THEIRS)]


SAID_ONCE = {
    "our own": (log_once, "the first to say it"),
    "warning_once": (logging.getLogger(OURS).warning_once, "the first to warn"),
    "info_once": (logging.getLogger(OURS).info_once, "the first to tell"),
}


@pytest.mark.parametrize(("say", "message"), SAID_ONCE.values(), ids=SAID_ONCE)
def test_what_is_said_once_is_said_in_every_test(say, message, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        say(message)
    assert caplog.messages == [message]
    forget_what_was_said()
    say(message)
    assert caplog.messages == [message] * 2


def test_every_function_that_remembers_what_it_said_is_known():
    """A cached function that logs or warns says it once in a process, so the tests have to forget it."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("cache" in ast.unparse(each) for each in node.decorator_list):
                body = "\n".join(map(ast.unparse, node.body))
                if any(word in body for word in ("logger.", "log.", "logging.", "warnings.", "print(")):
                    found.add(node.name)
    assert found == {log_once.__name__}
