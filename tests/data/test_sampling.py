"""Every sample once per epoch on any number of processes, in an order of (seed, epoch); grouping saves padding."""

from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, prepare_data_loader, skip_first_batches
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from dynamic_llava.data import FILLER, EpochSampler
from dynamic_llava.data.sampling import padding_share
from tests.properties import few_or_many, for_all


def order_of(samples, step, seed=0, epoch=0, lengths=None):
    return list(EpochSampler(samples, step, seed, lambda: epoch, lengths))


def batches_of(rank, processes, batch, sampler):
    """Return the batches that a process gets, shared out by accelerate as the Trainer does."""
    return list(BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, rank))


@few_or_many
def test_every_sample_once_on_any_number_of_processes(examples):
    numbers = st.tuples(st.integers(1, 70), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))

    @for_all(examples, numbers, st.booleans(), st.integers(0, 5))
    def check(numbers, grouped, epoch):
        samples, processes, batch, accumulation = numbers
        lengths = np.random.default_rng(epoch).integers(1, 900, samples) if grouped else None
        sampler = EpochSampler(samples, batch * processes * accumulation, 3, lambda: epoch, lengths)
        shares = [batches_of(rank, processes, batch, sampler) for rank in range(processes)]
        counts = Counter(index for share in shares for one in share for index in one)
        filled = counts.pop(FILLER, 0)
        assert counts == Counter(range(samples))
        assert filled < batch * processes * accumulation
        sizes = {len(one) for share in shares for one in share}
        assert sizes == {batch} and len({len(share) for share in shares}) == 1
        assert len(shares[0]) % accumulation == 0, "the last step has all its batches, too"


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("samples", [64, 61])
def test_a_step_holds_the_same_samples_however_it_is_split(samples, grouped):
    lengths = np.arange(samples) % 17 if grouped else None
    wanted = None
    for processes, batch, accumulation in ((1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1)):
        sampler = EpochSampler(samples, 8, 5, lambda: 0, lengths)
        shares = [batches_of(rank, processes, batch, sampler) for rank in range(processes)]
        steps = [
            sorted(index for share in shares for one in share[start : start + accumulation] for index in one)
            for start in range(0, len(shares[0]), accumulation)
        ]
        wanted = steps if wanted is None else wanted
        assert steps == wanted


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_epoch_goes_on_where_it_was_left(processes):
    """In any epoch: accelerate does not tell a sampler the epoch once batches are skipped on several processes."""
    shares = []
    for rank in range(processes):
        sampler = EpochSampler(21, 4 * processes, 3, lambda: 2)
        loader = DataLoader([*range(21), FILLER], 4, sampler=sampler, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=rank)
        whole, rest = list(loader), list(skip_first_batches(loader, 2))
        assert rest == whole[2:] and len(whole) == len(loader)
        shares.append(whole)
    taken = [batch for together in zip(*shares, strict=True) for batch in together]
    assert [index for batch in taken for index in batch] == order_of(21, 4 * processes, seed=3, epoch=2)


def test_the_order_is_a_function_of_seed_and_epoch():
    assert order_of(50, 8) == order_of(50, 8)
    assert order_of(50, 8) != order_of(50, 8, seed=1) and order_of(50, 8) != order_of(50, 8, epoch=1)
    lengths = np.arange(50)
    assert order_of(50, 8, lengths=lengths) == order_of(50, 8, lengths=lengths)
    assert order_of(50, 8, lengths=lengths) != order_of(50, 8, epoch=1, lengths=lengths)


def test_the_order_is_that_of_accelerates_sampler():
    """So that numbers measured before the samples were filled up stay what they were."""
    theirs = SeedableRandomSampler(range(48), data_seed=11)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        assert list(theirs) == order_of(48, 8, seed=11, epoch=epoch)


def test_grouping_saves_padding_and_keeps_the_order_random():
    lengths = np.random.default_rng(0).integers(600, 2000, 3201)
    plain, grouped = (np.array(order_of(3201, 64, lengths=given)) for given in (None, lengths))
    assert padding_share(lengths, grouped, 8) < 0.1 * padding_share(lengths, plain, 8)
    means = lengths[grouped[:3200]].reshape(-1, 64).mean(1)
    assert abs(np.corrcoef(np.arange(50), means)[0, 1]) < 0.4, "long steps must not come all at one end"


def test_padding_is_counted_exactly():
    lengths = np.array([10, 20, 30])
    assert padding_share(lengths, np.array([0, 1, 2, FILLER]), 2) == pytest.approx(1 - 60 / 70)
    assert padding_share(lengths, np.array([0, 1, 2]), 1) == 0


def test_mistakes_are_named():
    for samples, step in ((0, 8), (8, 0)):
        with pytest.raises(ValueError, match=f"{samples} samples in steps of {step} make no epoch"):
            order_of(samples, step)
    with pytest.raises(ValueError, match="3 lengths were given for 4 samples"):
        order_of(4, 2, lengths=np.arange(3))
