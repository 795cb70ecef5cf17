"""Providers with one defect each, under the contract that every one of them must fail.

Not collected by itself: ``test_contract.py`` runs this file and looks at what fails.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time

import numpy as np

from embedcore.errors import AuthenticationFailed, RequestRejected
from embedcore.provider.protocol import Tokenizer
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo
from embedcore.testing import EmbedderContract, FakeEmbedder, FakeTokenizer, tokens_of, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

SECRET = "canary-5d41402abc4b2a76"


INFO = dataclasses.replace(FAKE_INFO, input_types=("query", "document"))


class Sound(FakeEmbedder):
    """Nothing is wrong with it: what the others are compared with."""

    def __init__(self, *, info: ModelInfo = INFO, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(info=info, tokenizer=tokenizer)

    def vectors(self, request: EmbedRequest, honest: np.ndarray) -> np.ndarray:
        return honest

    def embed(self, request: EmbedRequest) -> EmbedReply:
        reply = super().embed(request)
        honest = vectors_of(request.texts, 32, salt=self.salt_of(request.input_type))
        return dataclasses.replace(reply, vectors=self.vectors(request, honest))

    def salt_of(self, input_type: str | None) -> str:
        return input_type or "document-by-default"


class Refusing(Sound):
    """A broken embedder that fails as it should."""

    requests = 0

    def send(self, request: EmbedRequest) -> None:
        self.requests += 1

    def embed(self, request: EmbedRequest) -> EmbedReply:
        self.send(request)
        raise AuthenticationFailed("the key is wrong: set ACME_KEY", status=401)


class Checked(EmbedderContract):
    """The contract, quick, over the class that ``Kind`` names."""

    Kind = Sound
    Broken = Refusing
    secret = SECRET
    examples = 5

    def make_embedder(self):
        return self.Kind()

    def make_broken_embedder(self):
        self.broken = self.Broken()
        return self.broken

    def server_requests(self):
        return getattr(self.broken, "requests", None)


class TestSound(Checked):
    pass


class TestSwappedRows(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return np.ascontiguousarray(honest[::-1])


class TestSwappedOnlyInLargeRequests(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return np.ascontiguousarray(honest[::-1]) if len(honest) > 50 else honest


class TestSwapsTwoRowsOfAFullRequest(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            if len(honest) == self.info.max_texts_per_request:
                honest[[3, 7]] = honest[[7, 3]]
            return honest


class TestSwapsTwoRowsOfEveryLongRequest(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            if len(honest) > 8:
                honest[[3, 7]] = honest[[7, 3]]
            return honest


class TestReversesWhatItWritesInto(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return honest if request.into is None else np.ascontiguousarray(honest[::-1])


class TestReversesQueries(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return np.ascontiguousarray(honest[::-1]) if request.input_type == "query" else honest


class TestIgnoresTheInputType(Checked):
    class Kind(Sound):
        def salt_of(self, input_type):
            return ""


class TestNeedsAnInputType(Checked):
    class Kind(Sound):
        def embed(self, request):
            if request.input_type is None:
                raise RequestRejected("input_type is required", status=400, billed="no")
            return super().embed(request)


class TestDoublePrecision(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return honest.astype(np.float64)


class TestWrongWidth(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return np.ascontiguousarray(honest[:, :-1])


class TestDropsAText(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return honest[: max(len(honest) - 1, 1)]


class TestDropsDuplicates(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return honest[: len(set(request.texts))]


class TestNotContiguous(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return np.asfortranarray(honest)


class TestFlat(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return honest.ravel()


class TestListOfLists(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return honest.tolist()


class TestNotANumber(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            vectors = honest.copy()
            vectors[0, 0] = np.nan
            return vectors


class TestZeroForWhiteSpace(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            blank = [not text.strip() for text in request.texts]
            return np.where(np.array(blank)[:, None], np.float32(0), honest)


class TestStripsWhiteSpaceAndFails(Checked):
    class Kind(Sound):
        def embed(self, request):
            if any(not text.strip("\x00 \n\t") for text in request.texts):
                raise ValueError("empty input")
            return super().embed(request)


class TestOneVectorForAll(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            return np.ones_like(honest)


class TestNotRepeatable(Checked):
    class Kind(Sound):
        numbers = itertools.count()

        def vectors(self, request, honest):
            honest[:, next(self.numbers) % 32] += 0.5
            return honest


class TestRowsInRandomOrder(Checked):
    class Kind(Sound):
        def vectors(self, request, honest):
            order = np.argsort(honest[:, 0])
            return np.ascontiguousarray(honest[order])


class TestSharedBuffer(Checked):
    class Kind(Sound):
        def __init__(self):
            super().__init__()
            self.buffer = np.zeros((64, 32), dtype=np.float32)

        def vectors(self, request, honest):
            self.buffer[: len(honest)] = honest
            return self.buffer[: len(honest)]


class TestNotThreadSafe(Checked):
    class Kind(Sound):
        def embed(self, request):
            self.current = request
            time.sleep(0.002)
            reply = super().embed(self.current)
            return dataclasses.replace(reply, vectors=reply.vectors.copy())


class TestNarrowRace(Checked):
    class Kind(Sound):
        def embed(self, request):
            self.reply = super().embed(request)
            return self.reply


class TestNarrowRaceBeforeSending(Checked):
    class Kind(Sound):
        def embed(self, request):
            self.request = request
            return super().embed(self.request)


class TestOwnedByOneThread(Checked):
    class Kind(Sound):
        def __init__(self):
            super().__init__()
            self.owner = threading.get_ident()

        def embed(self, request):
            if threading.get_ident() != self.owner:
                raise RuntimeError("used in another thread than it was made in")
            return super().embed(request)


class TestChangesTheTexts(Checked):
    class Kind(Sound):
        def embed(self, request):
            if isinstance(request.texts, list):
                request.texts[:] = [text.replace("\n", " ") + " " for text in request.texts]
            return super().embed(request)


class TestRefusesFullRequests(Checked):
    class Kind(Sound):
        def embed(self, request):
            if len(request.texts) > 50:
                raise AuthenticationFailed("too many texts", status=400)
            return super().embed(request)


class TestOtherModelAnswers(Checked):
    class Kind(Sound):
        def embed(self, request):
            return dataclasses.replace(super().embed(request), model="fake-embedding-v2")


class TestNamelessModel(Checked):
    class Kind(Sound):
        def __init__(self):
            super().__init__(info=ModelInfo(provider="fake", dimensions=32))


class TestUndercounts(Checked):
    class Kind(Sound):
        def __init__(self):
            super().__init__(tokenizer=EstimatingTokenizer(bytes_per_token=8))


class TestForgetsTheOverhead(Checked):
    class Kind(Sound):
        def cost(self, texts):
            return sum(map(tokens_of, texts)) + 2 * len(texts)


class TestCallsABoundExact(Checked):
    class Kind(Sound):
        class InFlightKeys(FakeTokenizer):
            def __init__(self):
                super().__init__(exact=True)

            def count(self, texts):
                return [len(text.encode()) for text in texts]

            def prefix(self, text, max_tokens):
                return text.encode()[:max_tokens].decode(errors="ignore")

        def __init__(self):
            super().__init__(tokenizer=self.InFlightKeys())


class TestCountsMoreThanItsBytes(Checked):
    class Kind(Sound):
        class Marks(FakeTokenizer):
            def count(self, texts):
                return [2 * len(text.encode()) for text in texts]

            def prefix(self, text, max_tokens):
                return text.encode()[: max_tokens // 2].decode(errors="ignore")

        def __init__(self):
            super().__init__(tokenizer=self.Marks(exact=False))


class TestLimitTwoTooHigh(Checked):
    class Kind(Sound):
        def embed(self, request):
            if max(map(tokens_of, request.texts)) > self.info.max_input_tokens - 2:
                raise RequestRejected("too long", status=400, billed="no")
            return super().embed(request)


class TestCutsInsideACharacter(Checked):
    class Kind(Sound):
        class Cuts(FakeTokenizer):
            def prefix(self, text, max_tokens):
                return text.encode()[: 4 * max_tokens].decode(errors="replace")

        def __init__(self):
            super().__init__(tokenizer=self.Cuts())


class TestCutsTooMuch(Checked):
    class Kind(Sound):
        class Cuts(FakeTokenizer):
            def prefix(self, text, max_tokens):
                return text[:max_tokens]

        def __init__(self):
            super().__init__(tokenizer=self.Cuts())


class TestCutsTooLittle(Checked):
    class Kind(Sound):
        class Cuts(FakeTokenizer):
            def prefix(self, text, max_tokens):
                return text[: 4 * max_tokens]

        def __init__(self):
            super().__init__(tokenizer=self.Cuts())


class TestKeyInRepr(Checked):
    class Kind(Sound):
        def __repr__(self):
            return f"Acme(key={SECRET!r})"


class TestKeyPrinted(Checked):
    class Kind(Sound):
        def embed(self, request):
            print("sending with", SECRET)
            return super().embed(request)


class TestKeyInError(Checked):
    class Broken(Sound):
        def embed(self, request):
            try:
                raise ValueError(f"401 for Bearer {SECRET}")
            except ValueError as error:
                raise AuthenticationFailed("the key is wrong", status=401) from error


class TestKeyInAnAttribute(Checked):
    class Kind(Sound):
        def __init__(self):
            super().__init__()
            self.key = SECRET


class TestKeyInTheSessionsHeaders(Checked):
    class Kind(Sound):
        class Session:
            def __init__(self):
                self.headers = {"Authorization": f"Bearer {SECRET}"}

        def __init__(self):
            super().__init__()
            self.session = self.Session()


class TestTextInError(Checked):
    class Broken(Refusing):
        def embed(self, request):
            self.send(request)
            raise RequestRejected(f"refused: {list(request.texts)}", status=400, billed="no")


class TestTextInTheCauseOfAnError(Checked):
    class Broken(Refusing):
        def embed(self, request):
            self.send(request)
            try:
                raise ValueError(f"the body was {request.texts[0]}")
            except ValueError as error:
                raise RequestRejected("refused", status=400, billed="no") from error


class TestRetries(Checked):
    class Broken(Refusing):
        def embed(self, request):
            for _ in range(2):
                self.send(request)
            return super().embed(request)


class TestRawError(Checked):
    class Broken(Sound):
        def embed(self, request):
            raise ValueError("Expecting value: line 1 column 1")


class TestHidesTheFailure(Checked):
    class Broken(Sound):
        def vectors(self, request, honest):
            return np.zeros_like(honest)


class TestClosesOnlyOnce(Checked):
    class Kind(Sound):
        def close(self):
            super().close()
            if self.times_closed == 2:
                raise RuntimeError("already closed")
