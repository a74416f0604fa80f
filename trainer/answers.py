"""How an answer compares with its reference."""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_equal(answer: str, reference: str) -> bool:
    """Whether they are the same text, ends trimmed."""
    return answer.strip() == reference.strip()


def word_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, 0 to 1, as SQuAD 1.1's script has it (arXiv:1606.05250).

    Case, punctuation and English articles do not count. Two texts without a word are alike.
    """
    found, wanted = _words(answer), _words(reference)
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
