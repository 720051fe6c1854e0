"""The temperature schedule of the Gumbel-Softmax (A.2)."""


def temperature(step: int, total: int, start: float = 1.0, end: float = 0.1) -> float:
    """Return tau at `step` of `total` optimizer steps: exponential decay start * (end / start) ** (step / total).

    Raises ValueError unless total >= 1, 0 <= step <= total, and start and end are positive.
    """
    if total < 1 or not 0 <= step <= total:
        raise ValueError(f"step={step} of total={total} does not exist; give 0 <= step <= total and total >= 1")
    if start <= 0 or end <= 0:
        raise ValueError(f"start={start} and end={end} must be positive temperatures; the paper runs from 1.0 to 0.1")
    return float(start * (end / start) ** (step / total))
