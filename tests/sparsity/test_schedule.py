import math

import pytest

from dynamic_llava.sparsity import temperature


def test_decays_exponentially_between_its_ends():
    assert temperature(0, 100) == 1.0
    assert temperature(100, 100) == pytest.approx(0.1, rel=1e-12)
    assert temperature(50, 100) == pytest.approx(math.sqrt(0.1), rel=1e-12)
    ratios = [temperature(t + 1, 40, start=2.0, end=0.5) / temperature(t, 40, start=2.0, end=0.5) for t in range(40)]
    assert ratios == pytest.approx([ratios[0]] * 40, rel=1e-12)


@pytest.mark.parametrize("arguments", [(-1, 10), (11, 10), (0, 0), (0, 10, 0.0, 0.1), (0, 10, 1.0, -0.1)], ids=str)
def test_refuses_what_has_no_temperature(arguments):
    with pytest.raises(ValueError, match=r"give 0 <= step|must be positive"):
        temperature(*arguments)
