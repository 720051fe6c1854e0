"""Shared by every test: one thread, fixed seeds, no network, loggers as new ones, and new memory filled with NaN."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.clip_folders import published_is_tiny
from tests.isolation import forget_what_was_said, loggers_of_its_own

torch.set_num_threads(1)
settings.register_profile("laws", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("laws")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Give every test the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loggers():
    """Let every test see what is logged, whatever earlier ones have been told, and have set."""
    forget_what_was_said()
    with loggers_of_its_own():
        yield


@pytest.fixture(autouse=True)
def published_clip():
    """Let every test over the registry run the methods that read CLIP's text tower."""
    with published_is_tiny():
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty returns with NaN, so that reading memory nobody wrote fails loudly."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def unchanged_global_state():
    """Fail a test that leaves torch's default dtype or gradient mode changed behind."""
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
