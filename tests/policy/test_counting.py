"""Does nothing but a typed error come out of a provider's tokenizer, and no nonsense?"""

from __future__ import annotations

import numpy as np
import pytest

from embedcore.errors import ConfigurationError, ProviderError
from embedcore.testing import FakeEmbedder, FakeTokenizer


class Odd(FakeTokenizer):
    """A tokenizer with one method that does as it is told."""

    def __init__(self, name, does):
        super().__init__()
        setattr(self, name, does)


def fails(*_):
    raise KeyError("a bug with sk-verysecretkey inside")


@pytest.mark.fault(124)
@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("count", fails),
        ("count", lambda texts: []),
        ("count", lambda texts: [-1] * len(texts)),
        ("count", lambda texts: ["many"] * len(texts)),
        ("count", lambda texts: None),
        ("count", lambda texts: 7),
        ("count", lambda texts: [float("nan")] * len(texts)),
        ("prefix", fails),
        ("prefix", lambda text, most: text[1:]),
        ("prefix", lambda text, most: text.upper()),
        ("prefix", lambda text, most: None),
        ("prefix", lambda text, most: text.encode()),
    ],
)
def test_a_broken_tokenizer_is_a_typed_error_and_nothing_is_sent(desk, name, does):
    embedder = FakeEmbedder(tokenizer=Odd(name, does))
    with desk(embedder, daily=100, secrets=("sk-verysecretkey",)) as one:
        with pytest.raises(ProviderError) as caught:
            # Too long for the model, and then too much for half of the budget.
            one.embed(["xyz" * 14_000])
        assert caught.value.billed == "no"
        assert "Nothing was sent" in str(caught.value)
        assert "verysecret" not in str(caught.value) + repr(caught.value.__cause__)
        assert embedder.meter.requests == 0
        one.check()


def test_a_tokenizer_may_count_in_any_integers(desk):
    counts = Odd("count", lambda texts: np.array([2] * len(texts)))
    with desk(FakeEmbedder(tokenizer=counts), daily=7) as one:
        rows = ["eight ch", "also 8 c"]
        one.right(one.embed(rows), rows)
        one.check()


def test_an_error_of_ours_passes(desk):
    def refuses(_):
        raise ConfigurationError("no vocabulary")

    with desk(FakeEmbedder(tokenizer=Odd("count", refuses)), daily=5) as one:
        with pytest.raises(ConfigurationError, match="no vocabulary"):
            one.embed(["eight ch"])
        one.check()
