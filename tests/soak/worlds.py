"""Random worlds: thousands of random models, calls and conversations, each held against every law."""

import time
from contextlib import suppress

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.clip_folders import published_is_tiny
from tests.soak.ledger import Ledger
from tests.world_laws import DEAR_LAWS, QUICK_LAWS, Laws
from tests.worlds import Unjudged, worlds

MINUTES, SHARDS = 40, 2
WORLDS, DEAR_WORLDS = 5000, 20
AT_ONCE = 250
"""Worlds that are drawn as one run of hypothesis."""
DEAR_EVERY = 40
"""Every so manieth world is judged by the dear laws as well, as long as they want."""
SHRINKING = 120
"""Seconds that may be spent on making a failure small."""


def planned(shard):
    """Return law -> worlds."""
    return {law.replace("_", " "): (DEAR_WORLDS if law in DEAR_LAWS else WORLDS) // SHARDS for law in LAWS}


LAWS = (*QUICK_LAWS, *DEAR_LAWS)


class TimeIsUp(BaseException):
    """Ends a run of hypothesis."""


def each_world(seed, examples, check, *phases):
    """Call `check` with random worlds."""
    quiet = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": False}
    with suppress(TimeIsUp), torch.no_grad():
        settings(max_examples=examples, phases=phases, print_blob=False, report_multiple_bugs=False, **quiet)(
            seeded(seed)(given(worlds())(check))
        )()


def run(ledger, shard, seed, folder):
    """Draw worlds until every law has judged as many as are planned."""
    torch.set_num_threads(1)
    seen, number = set(), 0

    def judge(world):
        if not any(ledger.wants(law.replace("_", " ")) for law in LAWS):
            raise TimeIsUp
        if world not in seen:
            seen.add(world)
            with suppress(Unjudged):
                _judge(ledger, world, Laws(world), dear=len(seen) % DEAR_EVERY == 0, seed=seed * 10**4 + number)

    with published_is_tiny():
        while any(ledger.wants(law.replace("_", " ")) for law in LAWS):
            number += 1
            each_world(seed * 10**4 + number, AT_ONCE, judge, Phase.generate)


def _judge(ledger: Ledger, world, laws, *, dear, seed):
    for law in LAWS if dear else QUICK_LAWS:
        name = law.replace("_", " ")
        if not ledger.wants(name):
            continue
        try:
            getattr(laws, law)()
        except Unjudged:
            continue
        except Exception as error:
            entry = ledger.failed(name, f"{type(error).__name__}: {error}", reproduction(world, law))
            shrink(entry, world, law, seed, min(SHRINKING, ledger.left()))
            ledger.save()
        else:
            ledger.passed(name)


def reproduction(world, law):
    """Return code that shows a failure."""
    imports = [("clip_folders", "published_is_tiny"), ("world_laws", "Laws"), ("worlds", "Shape, World")]
    lines = "\n".join(f"from tests.{module} import {names}" for module, names in imports)
    return f"{lines}\n\nworld = {world!r}\nwith published_is_tiny():\n    Laws(world).{law}()"


def shrink(entry, world, law, seed, seconds):
    """Look for the smallest world that fails as well; put it into the ledger's entry.

    The run that met the world is repeated for this law alone, and hypothesis makes its first failure small.
    """
    end, smallest = time.monotonic() + seconds, world

    def fails(other):
        nonlocal smallest
        if time.monotonic() > end:
            raise TimeIsUp
        try:
            getattr(Laws(other), law)()
        except Unjudged:
            return
        except Exception as error:
            if len(repr(other)) < len(repr(smallest)):
                smallest = other
                entry.update(what=f"{type(error).__name__}: {error}", reproduction=reproduction(other, law))
            raise

    with suppress(Exception):
        each_world(seed, AT_ONCE, fails, Phase.generate, Phase.shrink)
