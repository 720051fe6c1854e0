"""Random models, methods and conversations hold every law: a few of them here, many with --all."""

import torch

from tests.properties import few_or_many, for_all
from tests.worlds import Laws, worlds


@few_or_many
def test_random_worlds_hold_every_law(examples):
    @for_all(examples, worlds())
    @torch.no_grad()
    def check(world):
        Laws(world).check()
