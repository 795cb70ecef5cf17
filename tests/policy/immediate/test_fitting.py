"""Is nearly all found that fits, in few tries, whatever is the unit of the limit?"""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from embedcore.policy.immediate.shortening import Fitting
from embedcore.testing.strategies import texts

# What the server counts of a text; none falls with a longer text.
UNITS = {
    "characters": len,
    "bytes": lambda text: len(text.encode()),
    "words": lambda text: len(text.split()),
    "utf-16": lambda text: len(text.encode("utf-16-le")) // 2,
    "fours": lambda text: -(-len(text.encode()) // 4),
    "odd": lambda text: sum(min(1 + ord(letter) % 3, len(letter.encode())) for letter in text),
}


def found(text, fits, *, suggestions=(), **how):
    """The prefix that is found, and how many tries it took."""
    how = {"start": None, "step": 0.85, "floor": 1, **how}
    fitting, tries, passed = Fitting(text, **how), 0, []
    told = iter(suggestions)
    while (prefix := fitting.next()) is not None:
        tries += 1
        assert text.startswith(prefix)
        assert 0 < len(prefix) < len(text)
        if fits(prefix):
            assert len(prefix) > len(fitting.kept or "")
            passed.append(prefix)
            fitting.passed(prefix)
        else:
            fitting.refused(prefix, next(told, None))
    assert fitting.kept == (passed[-1] if passed else None)
    return fitting.kept, tries, len(passed)


def longest(text, fits):
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
    return text[:low]


@settings(max_examples=2 * settings.default.max_examples, deadline=None)
@given(
    st.lists(texts(min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(20, 400),
    st.sampled_from(sorted(UNITS)),
    st.floats(0.001, 0.999),
    st.none() | st.floats(0.0, 1.2),
    st.sampled_from([0.85, 0.97]),
    st.lists(st.floats(0.0, 1.5), max_size=3),
)
def test_at_least_80_percent_of_what_would_fit_is_kept(
    parts, times, unit, share, start, step, suggestions
):
    text = "".join(part * times for part in parts)
    measure = UNITS[unit]
    limit = measure(text) * share

    def fits(prefix):
        return measure(prefix) <= limit

    whole = longest(text, fits)
    begin = None if start is None else text[: int(len(text) * start)]
    hints = [text[: int(len(text) * one)] for one in suggestions]
    kept, tries, passed = found(text, fits, start=begin, step=step, suggestions=hints)
    assert tries <= 20
    if len(whole) < 20:
        return
    assert kept is not None
    assert len(kept) >= 0.8 * len(whole)
    assert len(kept.encode()) >= 0.8 * len(whole.encode())
    # What passes and is not kept has been paid for.
    assert passed <= 9


def test_ten_times_too_long_takes_few_requests():
    text = "many words and more " * 5000
    for share in (0.09, 0.1, 0.11, 0.3, 0.5, 0.9, 0.99):
        limit = len(text) * share
        kept, tries, _ = found(text, lambda prefix, limit=limit: len(prefix) <= limit)
        assert len(kept) >= 0.8 * limit
        assert tries <= 9


def test_what_begins_near_it_is_found_in_three():
    text = "a" * 100_000
    for start in (0.85, 0.9, 0.95, 1.0, 1.05):
        begin = text[: int(9_000 * start)]
        kept, tries, _ = found(text, lambda prefix: len(prefix) <= 9_000, start=begin)
        assert len(kept) >= 0.8 * 9_000
        assert tries <= 3


def test_nothing_below_the_floor_is_tried():
    sizes = []
    text = "x" * 1000
    kept, _, _ = found(text, lambda prefix: sizes.append(len(prefix)), floor=250)
    assert kept is None
    assert min(sizes) == 250


def test_what_is_trusted_ends_it():
    text = "x" * 1000
    fitting = Fitting(text, start=text[:100], step=0.85, floor=1)
    prefix = fitting.next()
    fitting.passed(prefix, trusted=True)
    assert fitting.next() is None
    assert fitting.kept == text[:100]


def test_what_is_known_of_the_room_makes_it_quicker():
    text = "x" * 100_000
    fitting = Fitting(text, start=text[:3_000], step=0.85, floor=1)
    tries = 0
    while (prefix := fitting.next()) is not None:
        tries += 1
        if len(prefix) <= 9_000:
            fitting.passed(prefix, room=9_000 / len(prefix))
        else:
            fitting.refused(prefix)
    assert len(fitting.kept) > 8_500
    assert tries == 3
