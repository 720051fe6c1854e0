"""The generator: equal to a big-integer splitmix64, uniform, independent between streams, keys and places."""

import math

import pytest
import torch

from dynamic_llava.sparsity import fold_key, gumbel_noise, uniform_noise
from dynamic_llava.sparsity.noise import _mix

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
SAMPLES = 100_000


def mix_by_integers(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def fold_by_integers(*parts):
    key = 0
    for part in parts:
        key = mix_by_integers(key ^ mix_by_integers((part + GOLDEN) % WORD))
    return key


def uniform_by_integers(key, index, stream):
    row = fold_by_integers(key, stream)
    return ((mix_by_integers((row + (index + 1) * GOLDEN) % WORD) >> 41) + 0.5) / 2**23


def draw(keys=1, places=SAMPLES, stream=0, seed=7):
    return uniform_noise(fold_key(seed, torch.arange(keys)), torch.arange(places), stream)


def test_mixes_like_the_published_splitmix64():
    # First output of splitmix64 seeded with 0 (Vigna's reference code).
    golden = torch.tensor(GOLDEN - WORD)
    assert int(_mix(golden)) % WORD == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("parts", [(0,), (1, 2, 3), (-5, 2**63 - 1), (2**64 + 3, 10**30)], ids=str)
def test_equals_a_computation_on_unbounded_integers(parts):
    key = fold_key(*parts)
    assert int(key) % WORD == fold_by_integers(*parts)
    places = [0, 1, 5, 2047, 10**12]
    for stream in (0, 1, 9):
        expected = [uniform_by_integers(int(key) % WORD, place, stream) for place in places]
        assert uniform_noise(key, torch.tensor(places), stream)[0].tolist() == expected


def test_numbers_never_change_between_versions():
    noise = gumbel_noise(fold_key(42, 0, 7, torch.tensor([3, 4])), torch.arange(2))
    expected = [
        [[0.69864047, 0.43220469], [0.74074286, -0.09559425]],
        [[1.39720798, -0.91627002], [-0.12326531, 0.78957266]],
    ]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=0, atol=1e-6)


def test_keys_broadcast_ints_over_tensors_and_depend_on_order():
    samples = torch.tensor([5, 6, 7])
    keys = fold_key(1, samples, torch.tensor(2))
    assert keys.shape == (3,) and keys.dtype == torch.int64
    assert keys.tolist() == [int(fold_key(1, sample, 2)) for sample in (5, 6, 7)]
    assert torch.equal(fold_key(1, samples.to(torch.int32), 2), keys)
    assert int(fold_key(1, 2)) != int(fold_key(2, 1))
    assert len({int(fold_key(a, b)) for a in range(50) for b in range(50)}) == 2500


def test_a_row_draws_the_same_alone_and_in_any_batch():
    keys, places = fold_key(3, torch.arange(6)), torch.arange(20)
    together = gumbel_noise(keys, places)
    for row in range(6):
        assert torch.equal(gumbel_noise(keys[row : row + 1], places)[0], together[row])
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(gumbel_noise(keys[order], places), together[order])
    per_row = torch.stack([torch.roll(places, row) for row in range(6)])
    expected = torch.stack([torch.roll(together[row], row, dims=0) for row in range(6)])
    assert torch.equal(gumbel_noise(keys, per_row), expected)


@pytest.mark.parametrize(
    "sample",
    [
        lambda: draw().flatten(),
        lambda: draw(keys=SAMPLES, places=1).flatten(),
        lambda: draw(keys=300, places=300, stream=1).flatten(),
    ],
    ids=["over places", "over keys", "over both"],
)
def test_is_uniform(sample):
    values = sample().double()
    count = len(values)
    assert values.min() > 0 and values.max() < 1
    for power in (1, 2, 3, 4):
        spread = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs(values.pow(power).mean() - 1 / (power + 1)) < 4 * spread / math.sqrt(count)
    # Kolmogorov-Smirnov: the largest distance to the straight line; 1.95 / sqrt(n) has probability 0.001.
    steps = torch.arange(1, count + 1) / count
    assert (values.sort().values - steps).abs().max() < 1.95 / math.sqrt(count) + 1 / count
    # Chi-square over 256 cells.
    cells = torch.bincount((values * 256).long(), minlength=256)
    chi_square = ((cells - count / 256) ** 2 / (count / 256)).sum()
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


def test_stays_inside_the_open_interval_at_its_extremes():
    step = 2.0**-23
    extremes = (torch.tensor([0, 2**23 - 1]).float() + 0.5) * step
    assert extremes.tolist() == [step / 2, 1 - step / 2]
    assert torch.isfinite(-torch.log(-torch.log(extremes.double()))).all()


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def test_streams_keys_places_and_steps_are_independent():
    limit = 4.5 / math.sqrt(SAMPLES)
    first = draw()
    assert abs(correlation(first, draw(stream=1))) < limit
    assert abs(correlation(first, draw(seed=8))) < limit
    for lag in (1, 2, 16, 64):
        assert abs(correlation(first[0, :-lag], first[0, lag:])) < limit
    by_key = draw(keys=SAMPLES, places=2)
    assert abs(correlation(by_key[:-1, 0], by_key[1:, 0])) < limit
    assert abs(correlation(by_key[:, 0], by_key[:, 1])) < limit
    steps = [uniform_noise(fold_key(0, 0, step, torch.arange(400)), torch.arange(250)) for step in (10, 11)]
    assert abs(correlation(*steps)) < limit


def test_one_bit_of_the_key_changes_half_of_the_bits():
    base = fold_key(12, 34)
    flipped = [bin(int(_mix(base)) % WORD ^ int(_mix(base ^ (1 << bit))) % WORD).count("1") for bit in range(63)]
    assert 28 < sum(flipped) / len(flipped) < 36 and min(flipped) > 12


def test_gumbel_noise_has_gumbel_moments_and_independent_channels():
    noise = gumbel_noise(fold_key(5, torch.arange(10)), torch.arange(SAMPLES // 10)).double()
    assert noise.shape == (10, SAMPLES // 10, 2) and torch.isfinite(noise).all()
    for channel in (0, 1):
        values = noise[..., channel]
        assert values.mean() == pytest.approx(0.5772156649, abs=4 * 1.2825 / math.sqrt(SAMPLES))
        assert values.var() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert abs(correlation(noise[..., 0], noise[..., 1])) < 4.5 / math.sqrt(SAMPLES)
    assert gumbel_noise(fold_key(5), torch.arange(3), channels=4).shape == (1, 3, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_draw_the_same_numbers():
    keys, places = fold_key(9, torch.arange(64)), torch.arange(4096)
    on_gpu = fold_key(9, torch.arange(64, device="cuda"))
    assert torch.equal(on_gpu.cpu(), keys)
    assert torch.equal(uniform_noise(on_gpu, places.cuda()).cpu(), uniform_noise(keys, places))
    torch.testing.assert_close(gumbel_noise(on_gpu, places.cuda()).cpu(), gumbel_noise(keys, places), rtol=1e-6, atol=0)


@pytest.mark.parametrize("parts", [(), (1.5,), (True,), ("a",), (torch.ones(3),), (torch.zeros(2, 2).long(),)], ids=str)
def test_refuses_parts_that_are_no_integers(parts):
    with pytest.raises(ValueError, match=r"int or an integer tensor|integers of shape"):
        fold_key(*parts)


def test_refuses_unfit_keys_and_places():
    keys = fold_key(0, torch.arange(3))
    with pytest.raises(ValueError, match="fold_key makes"):
        uniform_noise(keys[0], torch.arange(4))
    with pytest.raises(ValueError, match="integers of shape"):
        uniform_noise(keys, torch.rand(4))
    with pytest.raises(ValueError, match="one row per key"):
        uniform_noise(keys, torch.zeros(2, 4).long())
