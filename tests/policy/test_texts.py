"""Does intake take exactly the caller's texts, each once, and say what is wrong with the rest?"""

from __future__ import annotations

import enum
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import InputRejected
from embedcore.policy.texts import take_in
from embedcore.testing.strategies import nasty_texts, text_lists, texts

BAD_ROWS = st.sampled_from([None, 7, 1.5, float("nan"), b"bytes", True, [1, 2, 3], ("a",), object])


@pytest.mark.fault(12)
@pytest.mark.fault(6)
@settings(deadline=None)
@given(text_lists())
def test_each_text_once_in_the_order_of_its_first_row(given_texts):
    taken = take_in(given_texts, keep_empty=False, keep=False)
    assert [taken.texts[index] for index in taken.rows] == given_texts
    assert taken.texts == list(dict.fromkeys(given_texts))
    assert taken.sizes == [len(text.encode()) for text in taken.texts]
    assert not taken.rejected
    for index, text in enumerate(taken.texts):
        assert taken.first_row(index) == given_texts.index(text)


@pytest.mark.fault(3)
@pytest.mark.fault(14)
@settings(deadline=None)
@given(text_lists(max_size=6), BAD_ROWS, st.integers(0, 6))
def test_what_is_no_text_is_refused_with_its_position_and_type(given_texts, bad, place):
    place = min(place, len(given_texts))
    rows = [*given_texts[:place], bad, *given_texts[place:]]
    with pytest.raises(InputRejected) as caught:
        take_in(rows, keep_empty=False, keep=False)
    assert caught.value.position == place
    assert type(bad).__name__ in str(caught.value)
    assert caught.value.billed == "no"

    kept = take_in(rows, keep_empty=False, keep=True)
    assert kept.rows[place] == -1
    assert set(kept.rejected) == {place}
    others = [index for row, index in enumerate(kept.rows) if row != place]
    assert [kept.texts[index] for index in others] == given_texts


@pytest.mark.fault(5)
@settings(deadline=None)
@given(nasty_texts(), texts())
def test_a_lone_surrogate_is_refused_without_its_text(nasty, good):
    with pytest.raises(InputRejected) as caught:
        take_in([good, nasty], keep_empty=True, keep=False)
    assert caught.value.position == 1
    assert "surrogate" in caught.value.reason
    str(caught.value).encode()


@pytest.mark.fault(1)
def test_an_empty_text_is_an_error_by_default_and_a_failed_row_on_request():
    with pytest.raises(InputRejected, match="row 1 is an empty text") as caught:
        take_in(["a", ""], keep_empty=False, keep=False)
    assert caught.value.position == 1
    taken = take_in(["a", "", "b", ""], keep_empty=True, keep=False)
    assert taken.rows == [0, -1, 1, -1]
    assert set(taken.rejected) == {1, 3}
    with pytest.raises(InputRejected) as caught:
        take_in(["", None], keep_empty=True, keep=False)
    assert caught.value.position == 1


@pytest.mark.fault(1)
def test_keeping_empty_texts_asks_nothing_of_what_is_no_text():
    with pytest.raises(InputRejected) as caught:
        take_in([np.array(["", "x"])], keep_empty=True, keep=False)
    assert caught.value.position == 0


@pytest.mark.fault(2)
@pytest.mark.fault(13)
def test_nothing_is_stripped_or_normalised():
    rows = [" ", "\t", "é", unicodedata.normalize("NFD", "é"), "a\nb", "a\r\nb", "\ufeffa", "a"]
    taken = take_in(rows, keep_empty=False, keep=False)
    assert taken.texts == rows


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    "given",
    [
        "one text",
        b"bytes",
        bytearray(b"bytes"),
        None,
        7,
        1.5,
        {"a": 1},
        {"a", "b"},
        frozenset({"a"}),
        object(),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_list_of_texts_is_refused(given):
    with pytest.raises(InputRejected) as caught:
        take_in(given, keep_empty=False, keep=True)
    assert "list" in str(caught.value)
    assert type(given).__name__ in str(caught.value)


def test_any_ordered_iterable_of_texts_will_do():
    for rows in (("a", "b"), iter(["a", "b"]), (one for one in "ab"), np.array(["a", "b"])):
        assert take_in(rows, keep_empty=False, keep=False).texts == ["a", "b"]
    assert take_in({"a": 1, "b": 2}.keys(), keep_empty=False, keep=False).texts == ["a", "b"]


@pytest.mark.fault(18)
def test_an_empty_list_is_an_empty_intake():
    taken = take_in([], keep_empty=False, keep=False)
    assert (taken.texts, taken.rows) == ([], [])


class Colour(str, enum.Enum):  # noqa: UP042 - StrEnum prints as its value
    RED = "red"


class Liar(str):
    """A text that says it equals everything, is empty and reads otherwise."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return hash("a")

    def __len__(self):
        return 0

    def __str__(self):
        return "something else"


@pytest.mark.parametrize("text", [Colour.RED, Liar("red"), np.str_("red")], ids=type)
def test_a_subclass_of_str_counts_as_the_characters_it_holds(text):
    taken = take_in(["a", text, "red"], keep_empty=False, keep=False)
    assert taken.texts == ["a", "red"]
    assert [type(each) for each in taken.texts] == [str, str]
    assert taken.rows == [0, 1, 1]
    assert taken.sizes == [1, 3]


@pytest.mark.fault(19)
def test_the_list_may_change_while_it_is_read():
    class Emptying(str):
        """Empties the caller's list when it is looked at."""

        def __eq__(self, other):
            rows.clear()
            return False

        def __hash__(self):
            rows.clear()
            return 0

    rows = [Emptying("a"), "b", "c"]
    rows_before = [str.__str__(row) for row in rows]
    taken = take_in(rows, keep_empty=False, keep=False)
    assert [taken.texts[index] for index in taken.rows] == rows_before


@pytest.mark.fault(9)
def test_an_error_of_the_callers_generator_is_the_callers():
    def texts():
        yield "a"
        raise LookupError("the caller's own")

    with pytest.raises(LookupError):
        take_in(texts(), keep_empty=False, keep=True)
