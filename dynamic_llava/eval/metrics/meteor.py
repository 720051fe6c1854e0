"""METEOR as the paper's scripts compute it, NLTK's single_meteor_score over NLTK's words; where its data come from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

DATA = {"punkt_tab": "tokenizers/punkt_tab", "wordnet": "corpora/wordnet"}
"""NLTK's package -> where it lies below a data folder; Punkt splits sentences, WordNet finds synonyms."""
HOW = (
    "run `python -m nltk.downloader punkt_tab wordnet`; without access to NLTK's server run "
    "`bash scripts/nltk_data.sh DIR` and set NLTK_DATA=DIR"
)


@dataclass(frozen=True)
class Meteor:
    """The metric, alpha 0.9, beta 3, gamma 0.5, Porter stems; `words` and `wordnet` are NLTK's unless a test's."""

    words: Callable[[str], list[str]]
    """Text -> words."""
    wordnet: Any
    """Object whose synsets(word) gives the word's synonym sets."""

    def __call__(self, reference: str, hypothesis: str) -> float:
        """Return the score in 0..1: exact words first, then stems, then synonyms, less a penalty for broken order.

        The reference is stripped and lower-cased before it is cut into words, the hypothesis is not (case decides where
        sentences end); words are compared in lower case.
        """
        from nltk.translate.meteor_score import single_meteor_score

        reference_words = self.words(reference.strip().lower())
        return float(single_meteor_score(reference_words, self.words(hypothesis), wordnet=self.wordnet))


@lru_cache(maxsize=1)
def nltk_meteor() -> Meteor:
    """Return the metric on NLTK's own data, which is downloaded when it is not there.

    Raises ValueError that says what to do where NLTK or its data cannot be had: no other words or synonyms are used.
    """
    try:
        import nltk
    except ImportError:
        raise ValueError("METEOR needs nltk; run `pip install 'dynamic-llava[eval]'`") from None
    if missing_data():
        nltk.download(list(DATA), quiet=True)
    if missing := missing_data():
        raise ValueError(f"METEOR needs NLTK's data {', '.join(missing)}, which cannot be downloaded here; {HOW}")
    from nltk.corpus import wordnet

    wordnet.ensure_loaded()
    return Meteor(nltk.word_tokenize, wordnet)


def missing_data() -> list[str]:
    """Return which of NLTK's packages are in none of its data folders."""
    import nltk

    def is_there(place: str) -> bool:
        for name in (place, f"{place}.zip"):
            try:
                nltk.data.find(name)
            except LookupError:
                continue
            return True
        return False

    return [name for name, place in DATA.items() if not is_there(place)]
