"""Contract tests of vectors: order, shape, dtype."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np
import pytest

from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price, RateLimits
from embedcore.testing.contract.base import (
    PROBES,
    ContractBase,
    distance,
    embed,
    in_pieces,
    several,
)
from embedcore.testing.strategies import ODD_TEXTS, text_lists

if TYPE_CHECKING:
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import Vectors


_SMALL_REQUEST = 64
_FEW = 4  # texts that go alone where one request shows nearly as much
_MANY_NUMBERS = 4
_LARGEST_REQUEST = 1_000_000  # bytes
_POSITIVE = ("max_texts_per_request", "max_concurrency", "tokens_per_byte")
_POSITIVE_OR_NONE = (
    "dimensions",
    "max_input_tokens",
    "max_tokens_per_request",
    "max_bytes_per_request",
    "request_bytes_per_token",
)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class RepliesContract(ContractBase):
    """``info`` and ``embed``: form, order, odd texts."""

    def test_info_is_complete(self, embedder: Embedder) -> None:
        info = embedder.info
        assert isinstance(info, ModelInfo), f"info must be a ModelInfo, not {type(info).__name__}"
        for name in ("provider", "model"):
            value = getattr(info, name)
            assert isinstance(value, str), f"info.{name} must be a string, not {value!r}"
            assert value, f"info.{name} is empty: name it, it is part of every record and key"
        for name in _POSITIVE:
            value = getattr(info, name)
            assert _is_count(value, 1), f"info.{name} must be an int of at least 1, not {value!r}"
        for name in _POSITIVE_OR_NONE:
            value = getattr(info, name)
            assert value is None or _is_count(value, 1), (
                f"info.{name} must be None or an int of at least 1, not {value!r}"
            )
        overhead = info.overhead_tokens_per_text
        assert _is_count(overhead, 0), f"info.overhead_tokens_per_text is {overhead!r}"
        for name in ("input_types", "reply_models"):
            value = getattr(info, name)
            assert isinstance(value, tuple), f"info.{name} must be a tuple, not {value!r}"
            assert all(isinstance(each, str) for each in value), f"info.{name} must hold strings"

    def test_info_is_constant(self, embedder: Embedder) -> None:
        before = embedder.info
        embed(embedder, PROBES[:1])
        for each in fields(ModelInfo):
            one, other = getattr(before, each.name), getattr(embedder.info, each.name)
            assert one == other, f"info.{each.name} changed from {one!r} to {other!r} by a request"

    def test_price_has_a_source(self, embedder: Embedder) -> None:
        price = embedder.info.price
        if price is None:
            return  # unknown, and said to be: a limit in money then refuses the model
        assert isinstance(price, Price), f"info.price must be a Price or None, not {price!r}"
        assert isinstance(price.immediate, Decimal), "info.price.immediate must be a Decimal"
        assert price.free or price.source, (
            "info.price.source is empty: say where the price was read, so that it can be checked"
        )

    def test_reply_is_complete(self, embedder: Embedder) -> None:
        reply = embedder.embed(EmbedRequest(texts=[PROBES[0]]))
        assert isinstance(reply, EmbedReply), f"embed must return an EmbedReply, not {reply!r}"
        assert reply.tokens is None or _is_count(reply.tokens, 0), (
            f"EmbedReply.tokens must be an int of at least 0, or None, not {reply.tokens!r}"
        )
        for name in ("model", "request_id"):
            value = getattr(reply, name)
            assert value is None or (isinstance(value, str) and value), (
                f"EmbedReply.{name} must be a string with something in it, or None, not {value!r}"
            )
        assert reply.limits is None or isinstance(reply.limits, RateLimits), (
            f"EmbedReply.limits must be a RateLimits or None, not {reply.limits!r}"
        )

    def test_reply_names_the_model(self, embedder: Embedder) -> None:
        info, name = embedder.info, embedder.embed(EmbedRequest(texts=[PROBES[0]])).model
        allowed = {info.model, *info.reply_models}
        assert name is None or name in allowed or "*" in allowed, (
            f"the reply is from {name!r} and {info.model!r} was asked for: if that is the same "
            f"model under another name, list it in info.reply_models"
        )

    def test_vectors_are_float32_rows(self, embedder: Embedder) -> None:
        texts = PROBES[: embedder.info.max_texts_per_request]
        vectors = embed(embedder, texts)
        assert vectors.dtype == np.float32, (
            f"vectors are {vectors.dtype} and must be float32: np.asarray(..., dtype=np.float32)"
        )
        assert not isinstance(vectors, np.ma.MaskedArray), (
            "vectors are a masked array: give a plain one"
        )
        assert vectors.flags.c_contiguous, (
            "vectors are not C-contiguous (transposed or sliced?): np.ascontiguousarray(...)"
        )

    def test_width_agrees_with_info(self, embedder: Embedder) -> None:
        full = _fitting(embedder, [f"text number {n}" for n in range(_most(embedder))])
        rows = (in_pieces(embedder, PROBES), embed(embedder, [PROBES[0]]), embed(embedder, full))
        widths = {each.shape[1] for each in rows}
        assert len(widths) == 1, f"vectors of one model have different widths: {sorted(widths)}"
        said = embedder.info.dimensions
        assert said is None or widths == {said}, (
            f"info.dimensions is {said} and vectors have {widths.pop()} numbers"
        )

    def test_numbers_are_finite(self, embedder: Embedder) -> None:
        full = _fitting(embedder, [f"text number {n}" for n in range(_most(embedder))])
        for texts in (PROBES, *([text] for text in PROBES[:_FEW]), full):
            finite = np.isfinite(in_pieces(embedder, texts)).all(axis=1)
            row = int(np.argmin(finite))
            assert finite.all(), (
                f"the vector of {texts[row][:40]!r}, row {row} of {len(texts)}, holds NaN or "
                "infinity: that is for a text that the service gave no vector for; otherwise raise "
                "InvalidResponse"
            )

    def test_numbers_have_full_precision(self, embedder: Embedder) -> None:
        vectors = in_pieces(embedder, PROBES)
        whole = np.array_equal(vectors, np.round(vectors))  # a service of small integers
        if whole or vectors.shape[1] < _MANY_NUMBERS or not np.isfinite(vectors).all():
            return
        with np.errstate(over="ignore"):
            half = vectors.astype(np.float16).astype(np.float32)
        assert not np.array_equal(vectors, half), (
            "all numbers have the precision of float16: convert to float32 once, from what the "
            "service sent. If it sends no more, say so in known_failures"
        )
        assert not np.allclose(vectors, np.round(vectors, 3), rtol=0, atol=1e-7), (
            "all numbers have three decimals at most: do not round. If the service sends no more, "
            "say so in known_failures"
        )

    def test_length_of_a_vector_depends_on_its_text_alone(self, embedder: Embedder) -> None:
        texts = several(embedder)
        alone = np.concatenate([embed(embedder, [text]) for text in texts])
        one, other = (np.linalg.norm(rows, axis=1) for rows in (alone, embed(embedder, texts)))
        assert np.allclose(one, other, rtol=1e-3 + self.tolerance), (
            f"vectors of single texts have the lengths {one.round(3).tolist()} and in one "
            f"request {other.round(3).tolist()}: scale each row by itself, or none"
        )

    def test_different_texts_have_different_vectors(self, embedder: Embedder) -> None:
        vectors = in_pieces(embedder, PROBES)
        for place, one in enumerate(vectors):
            for other in range(place):
                assert distance(one, vectors[other]) > 10 * self.tolerance, (
                    f"{PROBES[place][:40]!r} and {PROBES[other][:40]!r} have nearly the same vector"
                )

    def test_row_i_belongs_to_text_i(self, embedder: Embedder) -> None:
        texts = several(embedder)
        orders = (texts, texts[::-1], texts[1:] + texts[:1], texts[::2] + texts[1::2])
        for kind in (None, *embedder.info.input_types):
            chosen = orders if kind is None else (texts[:_FEW][::-1],)
            alone = {text: embed(embedder, [text], kind)[0] for text in chosen[0]}
            for order in chosen:
                self._check_order(alone, order, embed(embedder, order, kind), kind)

    def _check_order(
        self, alone: dict[str, Vectors], order: list[str], rows: Vectors, kind: str | None
    ) -> None:
        of_kind = "" if kind is None else f' for input_type="{kind}"'
        for place, row in enumerate(rows):
            nearest = min(alone, key=lambda text: distance(row, alone[text]))
            assert nearest == order[place], (
                f"row {place} is the vector of another text of the request (text "
                f"{order.index(nearest)}){of_kind}: put rows in order by the reply's own index"
            )
            self.assert_same(
                row, alone[order[place]], f"text {place} has another vector in company{of_kind}"
            )

    def test_an_array_to_write_into_is_used_or_left_alone(self, embedder: Embedder) -> None:
        texts = several(embedder)
        plain = embed(embedder, texts)
        into = np.full_like(plain, np.nan)
        found = np.asarray(embedder.embed(EmbedRequest(texts=texts, into=into)).vectors)
        for place, text in enumerate(texts):
            self.assert_same(
                found[place],
                plain[place],
                f"with EmbedRequest.into, {text[:40]!r} has another vector: write row i for text "
                "i, or ignore it",
            )

    def test_no_input_type_is_accepted(self, embedder: Embedder) -> None:
        try:
            embed(embedder, PROBES[:1])
        except Exception as error:
            raise AssertionError(
                f"a request with input_type=None raised {type(error).__name__}: {error}. None must "
                f"be accepted, for callers that name no input type: if the service requires one, "
                f"send the one that suits texts which are stored"
            ) from error

    def test_input_types_make_a_difference(self, embedder: Embedder) -> None:
        by_kind = {kind: in_pieces(embedder, PROBES, kind) for kind in embedder.info.input_types}
        for (one, left), (other, right) in itertools.combinations(by_kind.items(), 2):
            apart = max(map(distance, left, right))
            assert apart > self.tolerance, (
                f"input types {one!r} and {other!r} of info.input_types give the same vectors: "
                f"send request.input_type to the service, or list only types that differ"
            )

    def test_one_text_or_many(self, embedder: Embedder) -> None:
        most = min(embedder.info.max_texts_per_request, 40)
        for count in sorted({1, 2, 3, 7, most - 1, most} & set(range(1, most + 1))):
            embed(embedder, [f"text number {number} of {count}" for number in range(count)])

    def test_largest_request_is_accepted(self, embedder: Embedder) -> None:
        # Of lengths in no order: what sorts them by that, to send them, is seen.
        many = [f"text number {n}{' and on' * (n * 7 % 5)}" for n in range(_most(embedder))]
        texts = _fitting(embedder, many)
        vectors = embed(embedder, texts)
        # Every so many-th text in one request: none keeps its place, unless it is the first.
        step = max(2, math.ceil(len(texts) / _SMALL_REQUEST))
        for first in range(min(step, len(texts))):
            again = embed(embedder, texts[first::step])
            for place, row in zip(range(first, len(texts), step), again, strict=True):
                self.assert_same(
                    vectors[place],
                    row,
                    f"row {place} of {len(texts)} is not what its text has in a smaller request",
                )

    def test_request_of_the_most_tokens_is_accepted(self, embedder: Embedder) -> None:
        if embedder.info.max_tokens_per_request is None:
            pytest.skip("info.max_tokens_per_request is None: no request has too many tokens")
        _check_limit(embedder, "max_tokens_per_request")

    def test_request_of_the_most_bytes_is_accepted(self, embedder: Embedder) -> None:
        if embedder.info.max_bytes_per_request is None:
            pytest.skip("info.max_bytes_per_request is None: no request is too large")
        _check_limit(embedder, "max_bytes_per_request")

    @pytest.mark.parametrize("name", ODD_TEXTS)
    def test_odd_text(self, embedder: Embedder, name: str) -> None:
        text = ODD_TEXTS[name]
        vector = embed(embedder, [text])[0]
        assert np.isfinite(vector).all(), f"{name}: the vector of {text[:40]!r} is not finite"
        assert vector.any(), (
            f"{name}: the vector of {text[:40]!r} is all zeros, which is near to nothing and far "
            f"from nothing; raise an error if there is none"
        )

    def test_any_list_of_texts(self, embedder: Embedder) -> None:
        most = min(embedder.info.max_texts_per_request, 6)

        def each_row_is_that_of_its_text(texts: list[str]) -> None:
            vectors = embed(embedder, texts)
            alone = embed(embedder, [texts[-1]])[0]
            self.assert_same(vectors[-1], alone, "the last text has another vector in company")
            for place, text in enumerate(texts):
                first = texts.index(text)
                self.assert_same(vectors[place], vectors[first], f"rows {first} and {place} differ")

        lists = text_lists(min_size=1, max_size=most)
        self.holds(each_row_is_that_of_its_text, lists, examples=math.ceil(self.examples / 3))

    def test_same_text_twice_in_a_request(self, embedder: Embedder) -> None:
        texts = several(embedder, (PROBES[0], PROBES[0], PROBES[1], PROBES[0], PROBES[1]))
        vectors = embed(embedder, texts)
        for place, text in enumerate(texts):
            alone = embed(embedder, [text])[0]
            self.assert_same(vectors[place], alone, f"row {place} of {texts} is wrong")

    def test_same_text_same_vector(self, embedder: Embedder) -> None:
        once, again = in_pieces(embedder, PROBES), in_pieces(embedder, PROBES)
        alone = [(embed(embedder, [text])[0], embed(embedder, [text])[0]) for text in PROBES[:_FEW]]
        pairs = [*zip(once, again, strict=True), *alone]
        for text, (one, other) in zip((*PROBES, *PROBES[:_FEW]), pairs, strict=True):
            self.assert_same(one, other, f"{text[:40]!r} has another vector the second time")

    def test_input_types_are_accepted(self, embedder: Embedder) -> None:
        for input_type in (None, *embedder.info.input_types):
            reply = embedder.embed(EmbedRequest(texts=[PROBES[0]], input_type=input_type))
            assert len(reply.vectors) == 1, f"input_type {input_type!r} gives no vector"

    def test_texts_may_be_a_tuple_and_the_time_limited(self, embedder: Embedder) -> None:
        reply = embedder.embed(EmbedRequest(texts=(PROBES[0],), timeout=30.0))
        assert len(reply.vectors) == 1, "a tuple of one text gives no vector"


def _check_limit(embedder: Embedder, limit: str) -> None:
    """A request that fills one limit, and keeps the others, is taken."""
    info = embedder.info
    # As few and as long texts as there may be, up to a megabyte.
    room = min(info.max_tokens_per_request or math.inf, info.max_bytes_per_request or math.inf)
    size = max(int(min(room, _LARGEST_REQUEST)) // info.max_texts_per_request, 1)
    text = "some words that fill a request " * (size // 31 + 1)
    if info.max_input_tokens is not None:
        text = embedder.tokenizer.prefix(text, info.max_input_tokens)
    texts = _fitting(embedder, [text[: 4 * size]] * _most(embedder))
    try:
        embed(embedder, texts)
    except Exception as error:
        raise AssertionError(
            f"a request that keeps within info.{limit} = {getattr(info, limit)} raised "
            f"{type(error).__name__}: lower it"
        ) from error


def _most(embedder: Embedder) -> int:
    return min(embedder.info.max_texts_per_request, 5000)


def _fitting(embedder: Embedder, texts: list[str]) -> list[str]:
    """The beginning of these texts that fits the model's other limits for one request."""
    info, tokens, size = embedder.info, 0, 0
    for place, (text, count) in enumerate(zip(texts, embedder.tokenizer.count(texts), strict=True)):
        size += len(text.encode())
        tokens += count + info.overhead_tokens_per_text
        gauge = max(tokens, size / (info.request_bytes_per_token or math.inf))
        too_many = gauge > (info.max_tokens_per_request or math.inf)
        if too_many or size > (info.max_bytes_per_request or math.inf):
            return texts[: max(place, 1)]
    return texts
