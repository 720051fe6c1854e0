"""The fast tests of evaluation need no data of NLTK's: METEOR finds exact words and stems only."""

import pytest

from tests.eval.meteor_stub import stub_meteor


@pytest.fixture(scope="session", autouse=True)
def meteor_without_data():
    """Replace the METEOR that runs use; tests of the real one ask for it by its own name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynamic_llava.eval.generation.measure.nltk_meteor", stub_meteor)
        yield
