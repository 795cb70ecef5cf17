"""Does the testing package stay light, and its strategies mean what they say?"""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

import embedcore.testing
from embedcore.testing.strategies import (
    ODD_TEXTS,
    nasty_texts,
    outcomes,
    text_lists,
    texts,
    token_counts,
)


def there_is(strategy, trait):
    """Some value has the trait; no need to look for the simplest one."""
    quick = settings(
        phases=[Phase.generate], max_examples=2000, database=None, suppress_health_check=HealthCheck
    )
    find(strategy, trait, settings=quick)


def loaded_by(code):
    command = f"import sys; {code}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_package_loads_nothing_until_a_name_is_used():
    heavy = {
        "numpy",
        "pytest",
        "hypothesis",
        "embedcore.testing.openai.server",
        "embedcore.testing.fakes.embedder",
    }
    assert not heavy & loaded_by("import embedcore.testing")
    assert not {"pytest", "hypothesis"} & loaded_by("from embedcore.testing import FakeOpenAI")
    assert not {"pytest", "hypothesis"} & loaded_by("from embedcore.testing import FakeEmbedder")
    assert "hypothesis" in loaded_by("from embedcore.testing import EmbedderContract")


def test_every_name_is_there():
    for name in embedcore.testing.__all__:
        assert getattr(embedcore.testing, name).__name__ == name
    with pytest.raises(AttributeError, match="nonesuch"):
        embedcore.testing.nonesuch  # noqa: B018


@given(texts())
def test_texts_are_valid_and_not_empty(text):
    assert text.encode().decode() == text != ""


@pytest.mark.parametrize(
    "trait",
    [
        lambda text: "\x00" in text,
        lambda text: text.isspace(),
        lambda text: "<|endoftext|>" in text,
        lambda text: "\r\n" in text,
        lambda text: "\u200d" in text,
        lambda text: any("\u4e00" <= mark <= "\u9fff" for mark in text),
        lambda text: any(ord(mark) > 0xFFFF for mark in text),
        lambda text: len(text) > 1000,
    ],
)
def test_texts_come_in_every_kind(trait):
    there_is(texts(), trait)


@given(nasty_texts())
def test_nasty_texts_have_no_bytes(text):
    with pytest.raises(UnicodeEncodeError):
        text.encode()


def test_lists_have_duplicates_and_counts_reach_the_edges():
    there_is(text_lists(), lambda found: len(set(found)) < len(found))
    there_is(text_lists(), lambda found: len(set(found)) > 3)
    for edge in (0, 1, 9_999, 10_000):
        there_is(token_counts(), lambda found, edge=edge: found == edge)


@given(outcomes())
def test_outcomes_bill_as_their_errors_say(outcome):
    billed = getattr(outcome.error, "billed", None)
    if billed in ("yes", "no"):
        assert outcome.is_billed == (billed == "yes")


def test_outcomes_come_in_every_kind():
    there_is(outcomes(), lambda found: found.error is None)
    for wanted in (("no", False), ("yes", True), ("unknown", True), ("unknown", False)):
        there_is(outcomes(), lambda found, wanted=wanted: _bill(found) == wanted)


def _bill(outcome):
    return getattr(outcome.error, "billed", None), outcome.is_billed


def test_odd_texts_are_valid_and_distinct():
    assert len(set(ODD_TEXTS.values())) == len(ODD_TEXTS)
    assert all(text.encode() for text in ODD_TEXTS.values())
