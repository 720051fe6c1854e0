"""Random models, methods and conversations hold every law: a few here, many with --all, thousands in the soak."""

from collections import Counter
from contextlib import suppress

import torch

from tests.properties import few_or_many, for_all
from tests.world_laws import QUICK_LAWS, Laws
from tests.worlds import Unjudged, worlds


@few_or_many
def test_random_worlds_hold_every_law(examples):
    judged = Counter()

    @for_all(examples, worlds())
    @torch.no_grad()
    def check(world):
        with suppress(Unjudged):
            judged.update(Laws(world).check())

    assert all(judged[law] >= examples // 4 for law in QUICK_LAWS), f"too few worlds were judged: {judged}"
