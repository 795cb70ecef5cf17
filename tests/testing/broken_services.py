"""Providers of a service with one defect each, and the test that must catch it.

Not collected by itself: ``test_contract.py`` runs this file and looks at what fails.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import decimal
import gc
import locale
import logging
import os
import random
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.request
import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field, SecretStr

from embedcore import errors
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.hookspecs import FromEnvironment, KeepsVectors
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price
from embedcore.testing import EmbedderContract, vectors_of

KEY = "acme-0123456789abcdef"
WIDTH = 16

log = logging.getLogger("embedcore.acme")


class Service:
    """What is on the other side: it counts, bills by bytes, and may be down or slow."""

    def __init__(self, *, down: bool = False, busy: bool = False, seconds: float = 0.0) -> None:
        self.down, self.busy, self.seconds = down, busy, seconds
        self.lock = threading.Lock()
        self.bill, self.requests = 0, 0
        self.texts: list[str] = []

    def post(self, texts, kind, key, *, width=WIDTH, flavour="plain", timeout=None):
        if key != KEY:
            return 401, f"wrong key {key}"
        with self.lock:
            self.requests += 1
        if self.down:
            return 503, f"down: {key} {texts!r}"
        if self.busy:
            return 429, "again in 7 seconds"
        if self.seconds and timeout is not None:
            time.sleep(min(self.seconds, timeout))
            raise TimeoutError
        tokens = sum(len(text.encode()) for text in texts)
        with self.lock:
            self.bill += tokens
            self.texts += texts
        vectors = vectors_of(texts, width, salt=f"{kind} {flavour}")
        return 200, {"vectors": vectors, "tokens": tokens, "model": "v1"}


class Options(BaseModel, extra="forbid", frozen=True):
    api_key: Annotated[SecretStr, FromEnvironment("ACME_API_KEY")] = SecretStr("")
    dimensions: int | None = None
    flavour: Literal["plain", "spiced"] = "plain"
    timeout: Annotated[float, Field(gt=0), KeepsVectors()] = 30.0


class Sound(BaseEmbedder):
    """Nothing is wrong with it: what the others are compared with."""

    def __init__(self, service: Service, options: Options) -> None:
        self.service, self.options = service, options
        self.info = ModelInfo(
            provider="acme",
            model="v1",
            price=Price(),
            endpoint="acme",
            dimensions=options.dimensions or WIDTH,
            max_texts_per_request=64,
            input_types=("query", "document"),
            default_input_type="document",
        )

    def embed(self, request: EmbedRequest) -> EmbedReply:
        status, answer = self.send(request)
        if status != 200:
            raise self.failure(status, answer)
        return self.reply(answer, request)

    def send(self, request: EmbedRequest) -> tuple[int, Any]:
        return self.post(self.texts(request), request)

    def texts(self, request: EmbedRequest) -> list[str]:
        return [self.text(text) for text in request.texts]

    def text(self, text: str) -> str:
        return text

    def post(self, texts: list[str], request: EmbedRequest) -> tuple[int, Any]:
        try:
            return self.service.post(
                texts,
                request.input_type or "document",
                self.options.api_key.get_secret_value(),
                width=self.options.dimensions or WIDTH,
                flavour=self.options.flavour,
                timeout=self.time_for(request),
            )
        except TimeoutError:
            raise self.late() from None

    def time_for(self, request: EmbedRequest) -> float:
        return min(self.options.timeout, request.timeout or 3600)

    def late(self) -> Exception:
        return errors.TimedOut("acme did not answer in time")

    def failure(self, status: int, answer: Any) -> Exception:
        if status == 401:
            return errors.AuthenticationFailed("check ACME_API_KEY", status=status)
        if status == 429:
            return errors.RateLimited("too fast for acme", status=status, retry_after=7.0)
        return errors.ProviderUnavailable(f"acme answered {status}", billed="no", status=status)

    def reply(self, answer: Any, request: EmbedRequest) -> EmbedReply:
        return EmbedReply(vectors=answer["vectors"], tokens=answer["tokens"], model=answer["model"])


class Checked(EmbedderContract):
    """The contract with every hook, over the class that ``Kind`` names."""

    Kind: ClassVar[type[Sound]] = Sound
    Choices: ClassVar[type[Options]] = Options
    caught_by: ClassVar[str] = ""
    secret = KEY
    examples = 5

    @pytest.fixture(autouse=True)
    def _services(self):
        self.up, self.down, self.slow = Service(), Service(down=True), Service(seconds=8)
        self.busy = Service(busy=True)

    def make_embedder(self):
        return self.make_variant()

    def make_broken_embedder(self):
        return self.Kind(self.down, self.Choices(api_key=KEY))

    def make_slow_embedder(self):
        return self.Kind(self.slow, self.Choices(api_key=KEY))

    def make_limited_embedder(self):
        return self.Kind(self.busy, self.Choices(api_key=KEY))

    def make_variant(self, **options):
        return self.Kind(self.up, self.Choices(**{"api_key": KEY, **options}))

    def server_bill(self):
        return self.up.bill + self.down.bill + self.slow.bill

    def server_requests(self):
        return sum(one.requests for one in (self.up, self.down, self.slow, self.busy))

    def server_texts(self):
        return self.up.texts


class ByVectors(Checked):
    """As one who cannot ask the server for the texts."""

    def server_texts(self):
        return None


class TestSound(Checked):
    pass


# What is sent


class TestLowers(Checked):
    caught_by = "test_text_is_sent_as_it_is[letter case]"

    class Kind(Sound):
        def text(self, text):
            return text.lower()


class TestLowersUnseen(ByVectors):
    caught_by = "test_text_is_sent_as_it_is[letter case]"
    Kind = TestLowers.Kind


class TestStripsTheEnd(ByVectors):
    caught_by = "test_text_is_sent_as_it_is[white space at the edges]"

    class Kind(Sound):
        def text(self, text):
            return text.rstrip() or text


class TestJoinsWhiteSpace(Checked):
    caught_by = "test_text_is_sent_as_it_is[white space inside]"

    class Kind(Sound):
        def text(self, text):
            return " ".join(text.split()) or text


class TestLineBreaksBecomeSpaces(ByVectors):
    caught_by = "test_text_is_sent_as_it_is[line breaks]"

    class Kind(Sound):
        def text(self, text):
            return text.replace("\n", " ")


class TestDropsWhatIsNotAscii(Checked):
    caught_by = "test_text_is_sent_as_it_is[letters beyond ASCII]"

    class Kind(Sound):
        def text(self, text):
            return text.encode("ascii", "ignore").decode() or "?"


class TestQuestionMarks(ByVectors):
    caught_by = "test_text_is_sent_as_it_is[other scripts]"

    class Kind(Sound):
        def text(self, text):
            return text.encode("latin-1", "replace").decode("latin-1")


class TestNormalizes(ByVectors):
    caught_by = "test_text_is_sent_as_it_is[composed characters (NFC)]"

    class Kind(Sound):
        def text(self, text):
            return unicodedata.normalize("NFC", text)


class TestNormalizesMore(Checked):
    caught_by = "test_text_is_sent_as_it_is[compatibility characters (NFKC)]"

    class Kind(Sound):
        def text(self, text):
            return unicodedata.normalize("NFKC", text)


class TestDropsControls(ByVectors):
    caught_by = "test_text_is_sent_as_it_is[control characters]"

    class Kind(Sound):
        def text(self, text):
            return "".join(each for each in text if each >= " " or each in "\r\n\t") or text


class TestCutsAtManyCharacters(ByVectors):
    caught_by = "test_long_text_is_not_cut"

    class Kind(Sound):
        def text(self, text):
            return text[:30_000]


class TestCutsTheMiddle(Checked):
    caught_by = "test_long_text_is_not_cut"

    class Kind(Sound):
        def text(self, text):
            return text if len(text) < 1000 else f"{text[:450]} … {text[-450:]}"


class TestOnlyTheFirstLine(ByVectors):
    caught_by = "test_text_is_sent_as_it_is[what follows the first line]"

    class Kind(Sound):
        def text(self, text):
            return text.split("\n")[0] or text


class TestPrefixForSome(Checked):
    caught_by = "test_text_is_sent_as_it_is[punctuation]"

    class Kind(Sound):
        def text(self, text):
            return f"passage: {text}" if "?" in text else text


class TestCaches(Checked):
    caught_by = "test_every_call_reaches_the_server"

    class Kind(Sound):
        def send(self, request):
            known = vars(self).setdefault("known", {})
            key = (*request.texts, request.input_type)
            if key not in known:
                known[key] = super().send(request)
            return copy.deepcopy(known[key])


class TestSplitsFullRequests(Checked):
    caught_by = "test_one_call_is_one_request"

    class Kind(Sound):
        def embed(self, request):
            if len(request.texts) <= 50:
                return super().embed(request)
            halves = (request.texts[:50], request.texts[50:])
            parts = [
                super(TestSplitsFullRequests.Kind, self).embed(
                    dataclasses.replace(request, texts=half, into=None)
                )
                for half in halves
            ]
            return EmbedReply(
                vectors=np.concatenate([part.vectors for part in parts]),
                tokens=sum(part.tokens for part in parts),
                model="v1",
            )


class TestTokensOfTheFirstText(Checked):
    caught_by = "test_tokens_are_those_of_the_whole_request"

    class Kind(Sound):
        def reply(self, answer, request):
            tokens = len(request.texts[0].encode())
            return dataclasses.replace(super().reply(answer, request), tokens=tokens)


# What fails


class TestBillsAndSaysNo(Checked):
    caught_by = "test_unbilled_failure_was_not_billed"

    class Kind(Sound):
        def failure(self, status, answer):
            self.service.bill += 7
            return super().failure(status, answer)


class TestFallsBackToAnotherModel(Checked):
    caught_by = "test_failure_is_not_hidden"

    class Kind(Sound):
        def embed(self, request):
            try:
                return super().embed(request)
            except errors.ProviderUnavailable:
                vectors = vectors_of(request.texts, WIDTH, salt="smaller")
                return EmbedReply(vectors=vectors, model="v1")


class TestTriesAnotherAddress(Checked):
    caught_by = "test_failed_request_is_sent_once"

    class Kind(Sound):
        def failure(self, status, answer):
            self.service.post(["again"], "document", KEY)
            return super().failure(status, answer)


class TestWaitsBeforeItFails(Checked):
    caught_by = "test_failed_request_does_not_wait"

    class Kind(Sound):
        def failure(self, status, answer):
            time.sleep(0.3)
            return super().failure(status, answer)


class TestIgnoresTheTime(Checked):
    caught_by = "test_time_out_is_kept"

    class Kind(Sound):
        def time_for(self, request):
            return self.options.timeout


class TestTimeOutIsFree(Checked):
    caught_by = "test_time_out_may_have_been_billed"

    class Kind(Sound):
        def late(self):
            return errors.TimedOut("acme did not answer in time", billed="no")


class TestTimeOutIsFinal(Checked):
    caught_by = "test_time_out_is_typed"

    class Kind(Sound):
        def late(self):
            return errors.RequestRejected("acme did not answer in time", billed="unknown")


class TestRetryAfterIsADate(Checked):
    caught_by = "test_retry_after_is_seconds"

    class Kind(Sound):
        def failure(self, status, answer):
            return errors.RateLimited("slower", retry_after=time.time() + 7, status=429)


class TestSwallowsInterrupts(Checked):
    caught_by = "test_interrupt_is_not_swallowed"

    class Kind(Sound):
        def embed(self, request):
            try:
                return super().embed(request)
            except errors.EmbeddingError:
                raise
            except BaseException as error:
                raise errors.OutcomeUnknown("acme failed") from error


class TestIgnoresInterruptsOfFailures(Checked):
    caught_by = "test_interrupt_of_a_failing_request_is_not_swallowed"

    class Kind(Sound):
        def failure(self, status, answer):
            try:
                message = str(answer)[:4]
            except BaseException:  # noqa: BLE001 - it is the defect
                message = "none"
            return errors.ProviderUnavailable(message, billed="no", status=status)


# What is beside it


class TestLogsTexts(Checked):
    caught_by = "test_texts_are_not_logged"

    class Kind(Sound):
        def texts(self, request):
            log.log(3, "sending %s", [text[:24] for text in request.texts])
            return super().texts(request)


class TestPrintsTexts(Checked):
    caught_by = "test_texts_are_not_printed"

    class Kind(Sound):
        def texts(self, request):
            sys.stderr.write(f"sending {request.texts[0]}\n")
            return super().texts(request)


class TestWarnsWithTexts(Checked):
    caught_by = "test_texts_are_not_printed"

    class Kind(Sound):
        def texts(self, request):
            warnings.warn(f"long text: {request.texts[0]}", stacklevel=2)
            return super().texts(request)


class TestLogsTheAnswerOfAFailure(Checked):
    caught_by = "test_texts_of_a_failed_request_are_not_told"

    class Kind(Sound):
        def failure(self, status, answer):
            log.debug("answer: %s", answer.replace(KEY, "***"))
            return super().failure(status, answer)


class TestKeyAfterAName(Checked):
    caught_by = "test_secret_is_not_in_errors"

    class Kind(Sound):
        def failure(self, status, answer):
            import base64

            basic = base64.b64encode(f"me:{KEY}".encode()).decode()
            return errors.ProviderUnavailable(f"Basic {basic}", billed="no", status=status)


class TestSetsTheEnvironment(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"


class TestHandlesSignals(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


class TestSetsTheTimeOfSockets(Checked):
    caught_by = "test_request_leaves_the_process_alone"

    class Kind(Sound):
        def texts(self, request):
            socket.setdefaulttimeout(9 if socket.getdefaulttimeout() != 9 else 8)
            return super().texts(request)


class TestSetsTheLocale(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            now = locale.setlocale(locale.LC_CTYPE)
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, "C" if now != "C" else "C.UTF-8")


class TestSeedsTheNumbers(Checked):
    caught_by = "test_request_leaves_the_process_alone"

    class Kind(Sound):
        def texts(self, request):
            random.seed(0)
            return super().texts(request)


class TestConnectsWhenItIsMade(Checked):
    caught_by = "test_nothing_is_sent_before_the_first_request"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", 9), timeout=1).close()


class TestAsksWhenItIsMade(Checked):
    caught_by = "test_nothing_is_sent_before_the_first_request"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            service.post(["warm"], "document", options.api_key.get_secret_value())


class TestLeavesAThread(Checked):
    caught_by = "test_no_thread_is_left"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            threading.Thread(target=threading.Event().wait, args=(30,), daemon=True).start()


class TestLeavesAFileOpen(Checked):
    caught_by = "test_no_file_or_socket_is_left"

    class Kind(Sound):
        opened: ClassVar[list[int]] = []

        def texts(self, request):
            self.opened.append(os.open(os.devnull, os.O_RDONLY))
            return super().texts(request)


class TestWritesTexts(Checked):
    caught_by = "test_no_file_is_written"

    class Kind(Sound):
        def texts(self, request):
            Path(tempfile.gettempdir(), "last-request.json").write_text(repr(request.texts))
            return super().texts(request)


# Several of them


class TestLastOptionsWin(Checked):
    caught_by = "test_embedders_do_not_share_options"

    class Kind(Sound):
        shared: ClassVar[dict[str, Options]] = {}

        def __init__(self, service, options):
            super().__init__(service, options)
            self.shared["options"] = options

        def send(self, request):
            self.options = self.options.model_copy(
                update={"flavour": self.shared["options"].flavour}
            )
            return super().send(request)


class TestLastKeyWins(Checked):
    caught_by = "test_embedders_do_not_share_a_key"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            service.key = options.api_key.get_secret_value()

        def post(self, texts, request):
            return self.service.post(texts, request.input_type or "document", self.service.key)


class TestKeyInTheAccount(Checked):
    caught_by = "test_embedders_do_not_share_a_key"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            account = str(len(options.api_key.get_secret_value()))
            self.info = dataclasses.replace(self.info, account=account)


class TestReadsTheEnvironment(Checked):
    caught_by = "test_key_of_the_options_is_used"

    class Kind(Sound):
        def __init__(self, service, options):
            key = os.environ.get("ACME_API_KEY") or options.api_key
            super().__init__(service, options.model_copy(update={"api_key": SecretStr(str(key))}))
            if key is options.api_key:
                self.options = options


class TestClosesForAll(Checked):
    caught_by = "test_closing_one_leaves_the_other"

    class Kind(Sound):
        closed: ClassVar[set[int]] = set()

        def close(self):
            self.closed.add(id(self.service))

        def send(self, request):
            if id(self.service) in self.closed:
                raise RuntimeError("the session is closed")
            return super().send(request)


class TestIgnoresAnOption(Checked):
    caught_by = "test_options_in_the_fingerprint_change_vectors"

    class Choices(Options, extra="forbid", frozen=True):
        normalize: bool = True


class TestIgnoresTheWidth(Checked):
    caught_by = "test_width_is_that_of_the_options"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options.model_copy(update={"dimensions": 8}))
            self.info = dataclasses.replace(self.info, dimensions=None)

        def post(self, texts, request):
            return self.service.post(texts, request.input_type or "document", KEY)


class TestMarksWhatChangesVectors(Checked):
    caught_by = "test_options_that_keep_vectors_keep_them"

    class Choices(Options, extra="forbid", frozen=True):
        flavour: Annotated[Literal["plain", "spiced"], KeepsVectors()] = "plain"


class TestFingerprintStays(Checked):
    caught_by = "test_fingerprint_changes_with_the_vectors"
    Choices = TestMarksWhatChangesVectors.Choices


class TestNewNameForEach(Checked):
    caught_by = "test_equal_embedders_are_equal"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            self.info = dataclasses.replace(self.info, variant=f"made at {time.time_ns()}")


class TestCopiesHalf(Checked):
    caught_by = "test_copy_is_whole_or_refused[deepcopy]"

    class Kind(Sound):
        def __deepcopy__(self, memo):
            twin = type(self)(self.service, Options(flavour="spiced", api_key=KEY))
            twin.options = self.options.model_copy(update={"flavour": "spiced"})
            return twin


class TestDrifts(Checked):
    caught_by = "test_earlier_requests_leave_no_trace"

    class Kind(Sound):
        sent = 0

        def reply(self, answer, request):
            self.sent += 1
            answer["vectors"][:, 0] += 0.2 * (self.sent // 20)
            return super().reply(answer, request)


class TestTypeSticks(Checked):
    caught_by = "test_input_type_does_not_stick"

    class Kind(Sound):
        latest = None

        def send(self, request):
            self.latest = request.input_type or self.latest
            return super().send(dataclasses.replace(request, input_type=self.latest))


class TestLengthInCompany(Checked):
    caught_by = "test_length_of_a_vector_depends_on_its_text_alone"

    class Kind(Sound):
        def reply(self, answer, request):
            answer["vectors"] /= np.linalg.norm(answer["vectors"])
            return super().reply(answer, request)


class TestNanInAFullRequest(Checked):
    caught_by = "test_numbers_are_finite"

    class Kind(Sound):
        def reply(self, answer, request):
            if len(request.texts) == self.info.max_texts_per_request:
                answer["vectors"][-1, 3] = np.nan
            return super().reply(answer, request)


class TestKeepsTheArray(Checked):
    caught_by = "test_array_to_write_into_is_not_kept"

    class Kind(Sound):
        into = None

        def reply(self, answer, request):
            self.into = request.into if request.into is not None else self.into
            if self.into is not None and self.into.shape == answer["vectors"].shape:
                self.into[:] = answer["vectors"]
            return super().reply(answer, request)


class TestWidthOfLargeRequests(Checked):
    caught_by = "test_width_agrees_with_info"

    class Kind(Sound):
        def reply(self, answer, request):
            if len(request.texts) > 20:
                answer["vectors"] = np.ascontiguousarray(answer["vectors"][:, :-1])
            return super().reply(answer, request)


class TooSmall(Sound):
    """Refuses requests of more than 6,000 bytes."""

    limit: ClassVar[str]

    def __init__(self, service, options):
        super().__init__(service, options)
        self.info = dataclasses.replace(self.info, **{self.limit: 9_000})

    def post(self, texts, request):
        if sum(len(text.encode()) for text in texts) > 6_000:
            return 413, "too large"
        return super().post(texts, request)


class TestTokensOfARequest(Checked):
    caught_by = "test_request_of_the_most_tokens_is_accepted"

    class Kind(TooSmall):
        limit = "max_tokens_per_request"


class TestBytesOfARequest(Checked):
    caught_by = "test_request_of_the_most_bytes_is_accepted"

    class Kind(TooSmall):
        limit = "max_bytes_per_request"


class TestUnavailableIsFinal(Checked):
    caught_by = "test_error_fits_its_status"

    class Kind(Sound):
        def failure(self, status, answer):
            return errors.RequestRejected("refused", billed="no", status=status)


class TestNoStatus(Checked):
    caught_by = "test_answered_failure_has_its_status"

    class Kind(Sound):
        def failure(self, status, answer):
            return errors.ProviderUnavailable("refused", billed="no")


class TestKeyInASlot(Checked):
    caught_by = "test_secret_is_not_in_plain_attributes"

    class Kind(Sound):
        class Session:
            __slots__ = ("key",)

        def __init__(self, service, options):
            super().__init__(service, options)
            self.session = self.Session()
            self.session.key = KEY


class TestClosesOnlyWhatWasUsed(Checked):
    caught_by = "test_close_without_a_request"

    class Kind(Sound):
        used = False

        def send(self, request):
            self.used = True
            return super().send(request)

        def close(self):
            if not self.used:
                raise AttributeError("session")


class TestGreets(Checked):
    caught_by = "test_nothing_is_printed"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            print("acme is ready")


class TestQuietensOthers(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            logging.getLogger("urllib3").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")


class TestHalfPrecision(Checked):
    caught_by = "test_numbers_have_full_precision"

    class Kind(Sound):
        def reply(self, answer, request):
            answer["vectors"] = answer["vectors"].astype(np.float16).astype(np.float32)
            return super().reply(answer, request)


class TestRounds(Checked):
    caught_by = "test_numbers_have_full_precision"

    class Kind(Sound):
        def reply(self, answer, request):
            answer["vectors"] = np.round(answer["vectors"], 3)
            return super().reply(answer, request)


class TestChecksNoCertificates(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            ssl._create_default_https_context = ssl._create_unverified_context


class TestMasked(Checked):
    caught_by = "test_vectors_are_float32_rows"

    class Kind(Sound):
        def reply(self, answer, request):
            answer["vectors"] = np.ma.masked_invalid(answer["vectors"])
            return super().reply(answer, request)


# What the service allows


class TestCallsALimitARefusal(Checked):
    caught_by = "test_rate_limit_is_named_as_one"

    class Kind(Sound):
        def failure(self, status, answer):
            if status == 429:
                return errors.RequestRejected("acme refuses it", billed="no", status=status)
            return super().failure(status, answer)


class TestCallsALimitAnOutage(Checked):
    caught_by = "test_rate_limit_is_named_as_one"

    class Kind(Sound):
        def failure(self, status, answer):
            if status == 429:
                status = 503
            return super().failure(status, answer)


class TestForgetsWhenToTryAgain(Checked):
    caught_by = "test_rate_limit_says_when_to_try_again"

    class Kind(Sound):
        def failure(self, status, answer):
            if status == 429:
                return errors.RateLimited("too fast", status=status)
            return super().failure(status, answer)


class TestTriesALimitAgain(Checked):
    caught_by = "test_rate_limited_request_is_sent_once"

    class Kind(Sound):
        def send(self, request):
            found = super().send(request)
            return super().send(request) if found[0] == 429 else found


class TestAnotherTypeIsTheDefault(Checked):
    caught_by = "test_default_input_type_is_what_is_sent_for_none"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            self.info = dataclasses.replace(self.info, default_input_type="query")


class TestCutsAndCallsItAnError(Checked):
    caught_by = "test_too_long_text_is_an_error_where_info_says_so"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            self.info = dataclasses.replace(self.info, truncation="error", max_input_tokens=500)

        def text(self, text):
            return text.encode()[:500].decode(errors="ignore")


class TestKeyInTheRequestId(Checked):
    caught_by = "test_secret_is_not_in_a_reply"

    class Kind(Sound):
        def reply(self, answer, request):
            return dataclasses.replace(super().reply(answer, request), request_id=f"r-{KEY}")


class TestDropsRepeatedLines(Checked):
    caught_by = "test_text_is_sent_as_it_is[repeated lines]"

    class Kind(Sound):
        def text(self, text):
            return "\n".join(dict.fromkeys(text.split("\n")))


class TestSharesAnswersAmongOptions(Checked):
    caught_by = "test_options_in_the_fingerprint_change_vectors"

    class Kind(Sound):
        def send(self, request):
            answers = self.service.__dict__.setdefault("answers", {})
            asked = (tuple(request.texts), request.input_type)
            if asked not in answers:
                answers[asked] = super().send(request)
            status, answer = answers[asked]
            return status, dict(answer) if status == 200 else answer


class TestHalvesTheTokens(Checked):
    caught_by = "test_tokens_are_those_of_the_whole_request"

    class Kind(Sound):
        def reply(self, answer, request):
            return super().reply({**answer, "tokens": answer["tokens"] // 2}, request)


class TestOneVectorForWhatDiffersInCase(ByVectors):
    caught_by = "test_text_is_sent_as_it_is[letter case]"

    class Kind(Sound):
        def send(self, request):
            first = {text.casefold(): text for text in request.texts}
            status, answer = self.post(list(first.values()), request)
            if status == 200:
                rows = {text: row for row, text in enumerate(first)}
                places = [rows[text.casefold()] for text in request.texts]
                answer = {**answer, "vectors": answer["vectors"][places]}
            return status, answer


class TestInstallsAnOpener(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            urllib.request.install_opener(urllib.request.build_opener())


class TestRoundsTheDecimals(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            decimal.getcontext().prec = 6


class TestCollectsSeldom(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            gc.set_threshold(50_000)


class TestOpensNewFilesToAll(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            os.umask(0)


class TestSwitchesSeldom(Checked):
    caught_by = "test_constructor_leaves_the_process_alone"

    class Kind(Sound):
        def __init__(self, service, options):
            super().__init__(service, options)
            sys.setswitchinterval(0.1)


class TestSortsLargeRequests(Checked):
    caught_by = "test_largest_request_is_accepted"

    class Kind(Sound):
        def texts(self, request):
            texts = super().texts(request)
            return sorted(texts, key=len) if len(texts) > 33 else texts


class TestMixesDuplicates(Checked):
    caught_by = "test_same_text_twice_in_a_request"

    class Kind(Sound):
        def reply(self, answer, request):
            vectors = answer["vectors"].copy()
            for place, text in enumerate(request.texts):
                if request.texts.index(text) != place:
                    vectors[place] += vectors[0]
            return super().reply({**answer, "vectors": vectors}, request)
