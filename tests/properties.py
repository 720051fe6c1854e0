"""Run one property over few random cases in the fast set and over many in the slow one."""

import pytest
from hypothesis import given, settings

few_or_many = pytest.mark.parametrize(
    "examples", [pytest.param(15, id="few"), pytest.param(200, id="many", marks=pytest.mark.slow)]
)
"""Gives a test its argument `examples`."""


def for_all(examples, *strategies):
    """Run the decorated check at once over `examples` draws of the strategies; the first failing draw is shrunk."""

    def run(check):
        settings(max_examples=examples)(given(*strategies)(check))()

    return run
