"""METEOR without NLTK's data: words by a plain pattern, no synonyms."""

import re

from dynamic_llava.eval.metrics.meteor import Meteor


class NoSynonyms:
    """A WordNet that knows no word."""

    def synsets(self, word):
        """Return nothing."""
        return []


def stub_meteor():
    """Return METEOR of exact words and stems alone."""
    return Meteor(lambda text: re.findall(r"\w+|[^\w\s]", text), NoSynonyms())
