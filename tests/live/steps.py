"""The steps of a run: a handful of small calls, and a batch where the provider has one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import numpy as np

from embedcore import EmbeddingClient, errors, money
from embedcore.events import Event, RequestFailed, Throttled
from embedcore.policy.planning import priced
from embedcore.provider.types import BatchItem, Price
from embedcore.storage import usage
from live.assumptions import ALIKE, Seen
from live.wire import Wire, tokens_in

LIMIT: Final = Decimal("0.05")
# A step whose price could be more than this part of the limit is left out.
SHARE: Final = 5
TEXTS: Final = [
    "A black cat sleeps on the warm roof.",
    "Le café est fermé, à bientôt.",
    "黒い猫が屋根で眠る。",
    "def add(a, b):\n    return a + b\n",
    "  White   space,\ttabs and ÅÖ  ",
    "<|endoftext|> and other marks </s> [SEP]",
    "🐈‍⬛ sleeps; €1,234.50",
    "0123456789 abcdef",
]
BATCH_TEXTS: Final = [f"Paragraph {number} of a page about the tides." for number in range(20)]
# Where the default model takes texts so long that one of them would cost too much.
LONG_MODELS: Final = {"cohere": "embed-english-v3.0"}
_TOO_LONG: Final = 1.3
_SAME: Final = 0.99999
_MOST_TEXTS: Final = 300
_LISTED_WITHIN: Final = 600.0
# Each request is rounded up to a picodollar.
_ROUNDED: Final = Decimal("1e-9")
_WRONG_KEY: Final = "not-a-key-0000000000"


@dataclass(kw_only=True)
class Run:
    """One run: what it was asked for, and what it has found so far.

    ``spent``: the ledger's total; ``billed``: what the answers say, by price. ``problems``: steps
    that failed, with the error. ``checks``: promises of embedcore itself → whether each was kept.
    """

    provider: str
    model: str
    options: Mapping[str, Any]
    state: Path
    limit: Decimal = LIMIT
    poll: float = 30.0
    say: Callable[[str], None] = print
    wire: Wire = field(default_factory=Wire)
    seen: Seen = field(default_factory=Seen)
    checks: dict[str, bool] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    batch: str | None = None
    batch_state: str | None = None
    beginnings: list[list[float]] = field(default_factory=list)

    def client(self, *, cache: bool = True, model: str | None = None, **options: Any) -> Any:
        """A client of this run's state folder and its limit."""
        given = {**self.options, **options}
        return EmbeddingClient(
            f"{self.provider}:{model or self.model}",
            config={
                "home": self.state,
                "cache": cache,
                "budget": {"total_cost_limit": str(self.limit), "wait": 0},
                "retry": {"attempts": 3},
            },
            options=given,
            scope="live",
            observers=[self._hear],
        )

    def _hear(self, event: Event) -> None:
        if isinstance(event, Throttled):
            self.seen.rate_waits += 1
        if isinstance(event, RequestFailed):
            said = f"HTTP {event.status}, billed {event.billed}: {event.error}"
            if said not in self.failed:
                self.failed.append(said)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step, whose failure ends no other but where the budget or the key ends all."""
        self.say(name)
        try:
            yield
        except (errors.BudgetExceeded, errors.AuthenticationFailed, errors.ConfigurationError):
            raise
        except errors.EmbeddingError as error:
            self.problems[name] = f"{type(error).__name__}: {error}"

    def affords(self, tokens: int, price: Price | None) -> bool:
        return priced(tokens, price).dollars <= self.limit / SHARE


def immediate(run: Run) -> None:
    """What single requests can show."""
    with run.client() as client:
        info = client.info
        run.seen.model, run.seen.reply_models = info.model, list(info.reply_models)
        run.seen.most_texts = info.max_texts_per_request
        with run.step("texts together, and each alone"):
            _together(run, client)
        with run.step("the same again, from the cache"):
            before = len(run.wire.answered)
            again = client.embed(TEXTS)
            run.checks["what was paid for is not sent again"] = (
                bool(again.reused.all()) and len(run.wire.answered) == before
            )
        if info.max_texts_per_request <= _MOST_TEXTS:
            with run.step("as many texts as a request may have"):
                client.embed([f"n{number}" for number in range(info.max_texts_per_request)])
        with run.step("the longest text"):
            _longest(run, client)
    with run.step("a text that is too long"):
        _too_long(run)
    if not (info.local or (info.price is not None and info.price.free)):
        with run.step("a wrong key"):
            _wrong_key(run)
    run.seen.models = sorted({each.model for each in run.wire.answered if each.model})
    run.seen.largest_request = max((each.rows for each in run.wire.answered), default=0)


def _together(run: Run, client: Any) -> None:
    start = len(run.wire.answered)
    together = client.embed(TEXTS)
    tokens = [each.tokens for each in run.wire.answered[start:]]
    if all(each is not None for each in tokens):
        run.seen.tokens = sum(each or 0 for each in tokens)
    run.seen.byte_count = sum(len(text.encode()) for text in TEXTS)
    plan = client.plan(TEXTS)
    tokenizer = client._engine.tokenizer
    if tokenizer.exact:
        run.seen.counted = sum(tokenizer.count(TEXTS))
    run.checks["a plan of cached texts costs nothing"] = plan.to_embed == 0
    run.beginnings = [[round(float(x), 6) for x in row[:8]] for row in together.vectors[:3]]
    lengths = np.linalg.norm(together.vectors, axis=1)
    run.checks["vectors are finite"] = bool(np.isfinite(lengths).all())
    with run.client(cache=False) as alone:
        single = np.vstack([alone.embed([text]).vectors for text in TEXTS[:4]])
    run.seen.order = alike(together.vectors[:4], single)
    run.checks["a text has the same vector alone"] = run.seen.order >= ALIKE


def alike(some: Any, others: Any) -> float:
    """The smallest cosine of rows at the same place."""
    norms = np.linalg.norm(some, axis=1) * np.linalg.norm(others, axis=1)
    return round(float(np.min(np.sum(some * others, axis=1) / norms)), 6)


def _longest(run: Run, client: Any) -> None:
    """A text of exactly as many tokens as it may have, where they can be counted."""
    info, tokenizer = client.info, client._engine.tokenizer
    most = info.max_input_tokens
    if most is None or not tokenizer.exact or not run.affords(most, info.price):
        return
    text = " tide" * most
    if tokenizer.count([text]) != [most]:
        return
    result = client.embed([text], on_error="keep")
    run.seen.longest_taken = bool(result.ok.all()) and not result.cuts
    taken = "taken whole" if run.seen.longest_taken else "cut or refused"
    run.seen.longest = f"a text of {most:,} tokens was {taken}"


def _too_long(run: Run) -> None:
    """A text that is longer than the model takes, sent whole."""
    model = LONG_MODELS.get(run.provider, run.model)
    with run.client(model=model) as client:
        info = client.info
    most = info.max_input_tokens
    words = int((most or 0) * _TOO_LONG)
    # It may be sent twice and be shortened a few times, if refusals are billed after all.
    if most is None or info.local or not run.affords(4 * words, info.price):
        return
    start, refused = len(run.wire.answered), len(run.wire.refused)
    with run.client(model=model, max_input_tokens=8 * most) as client, run.wire.named(model):
        result = client.embed([" tide" * words], on_error="keep")
        same_end = ""
        if len(run.wire.refused) == refused and result.ok.all():
            other = client.embed([" tide" * most + " volcano" * (words - most)], on_error="keep")
            cut = other.ok.all() and alike(result.vectors, other.vectors) > _SAME
            same_end = f"; with another end {'the same vector: it was cut' if cut else 'another'}"
    answers, refusals = run.wire.answered[start:], run.wire.refused[refused:]
    run.seen.too_long_refused = bool(refusals)
    said = ", ".join(f"HTTP {each.status}" for each in refusals[:3]) or "not refused"
    end = "and has failed" if not result.ok.all() else "and was cut" if result.cuts else ""
    tokens = ", ".join(str(each.tokens) for each in answers) or "none"
    run.seen.too_long = f"a text of {words:,} words: {said} {end}; tokens billed: {tokens}"
    run.seen.too_long += same_end


def _wrong_key(run: Run) -> None:
    with run.client(cache=False, api_key=_WRONG_KEY) as client:
        try:
            client.embed(["a wrong key"])
        except (errors.AuthenticationFailed, errors.PermissionDenied) as error:
            kept = error.billed == "no" and _WRONG_KEY not in str(error)
        except errors.EmbeddingError:
            kept = False
        else:
            # A server of one's own may want no key.
            return
    run.checks["a wrong key is named as one"] = kept


def submit(run: Run, client: Any) -> None:
    """A batch of a few texts, and whether the service lists it."""
    with run.step("a batch"):
        job = client.submit_batch(BATCH_TEXTS)
        run.batch = job.id
        run.batch_state = job.status().state
    with run.step("the list of batches"):
        _listed(run, client, job)


def _listed(run: Run, client: Any, job: Any) -> None:
    context = client._running.batch_context()
    parts = [each for each in context.jobs.of_batch(job.record) if each.job and each.input]
    if not parts:
        return
    (part,) = parts
    # It is asked for with each job of OpenAI's, unless the option says no.
    if run.provider == "openai" and run.options.get("batch_output_expiry", True):
        run.seen.expiry_taken = True
    strategy, since = context.strategy, datetime(2000, 1, 1, tzinfo=UTC)
    began = time.monotonic()
    while not strategy.find(key=part.key, input_ref=part.input, since=since):
        if time.monotonic() - began > _LISTED_WITHIN:
            run.seen.listed = "it was not in the list after ten minutes"
            return
        time.sleep(min(run.poll, 10.0))
    seconds = time.monotonic() - began
    ways = {
        "by our mark": strategy.find(key=part.key, input_ref="none", since=since),
        "by its file": strategy.find(key="none", input_ref=part.input, since=since),
    }
    run.seen.listed_marked = any(ways.values())
    found = " and ".join(way for way, jobs in ways.items() if jobs) or "by neither way alone"
    run.seen.listed = f"in the list after {seconds:.0f} s, found {found}"


def follow(run: Run, client: Any, seconds: float) -> bool:
    """Wait for the batch; False if it has not ended after so many seconds."""
    job = client.batch_job(run.batch)
    with run.step("waiting for the batch"):
        report = job.wait(timeout=seconds, poll_interval=run.poll)
        run.batch_state = report.state
        if not report.has_ended:
            return False
        _collect(run, client, job, report)
    with run.step("a job of a file that was deleted"):
        _deleted(run, client)
    return True


def _collect(run: Run, client: Any, job: Any, report: Any) -> None:
    result = job.result(on_error="keep")
    run.seen.batch_whole = bool(result.ok.all())
    run.problems |= {f"row {row} of the batch": str(error) for row, error in result.errors.items()}
    lines = itertools.chain.from_iterable(run.wire.results.values())
    run.seen.batch_forms = sorted({line.form for line in lines})
    counts = [(each.total, each.completed, each.failed) for each in report.jobs]
    run.seen.batch_counts = f"total, completed and failed of each job: {counts}"
    run.seen.batch_counts_agree = all(
        total == (completed or 0) + (failed or 0) for total, completed, failed in counts
    )
    rows = np.flatnonzero(result.ok)[:4]
    if len(rows):
        with run.client(cache=False) as alone:
            single = alone.embed([BATCH_TEXTS[row] for row in rows]).vectors
        run.seen.batch_order = alike(result.vectors[rows], single)
        run.checks["a batch gives the vectors of single requests"] = run.seen.batch_order >= ALIKE


def _deleted(run: Run, client: Any) -> None:
    """Whether a job can be made of a file that was deleted; reserved as if it could."""
    context, engine = client._running.batch_context(), client._engine
    account, strategy = engine.account, context.strategy
    item = BatchItem(id="live-0", text="x", input_type=engine.info.default_input_type)
    most = priced(16, engine.info.price)
    attempt = account.ledger.hold_and_send(
        account.scope, most, account.limits, loose=True, model=engine.label, inputs=1
    )
    created = None
    key = f"live-{time.time_ns()}"
    try:
        reference = strategy.upload([item], key=key)
        strategy.discard(reference)
        created = strategy.create(reference, key=key)
        strategy.cancel(created)
    except errors.EmbeddingError as error:
        run.seen.deleted = f"{type(error).__name__}: {error}"
        if created is None:
            run.seen.deleted_refused = error.billed == "no"
    if created is not None:
        run.seen.deleted_refused, run.seen.deleted = False, "a job was created; it was cancelled"
    spent = priced(0, engine.info.price) if run.seen.deleted_refused else most
    account.ledger.settle(attempt, spent, reported=False, close=True)


@dataclass(kw_only=True)
class Bill:
    """Tokens as the answers say and as the ledger has them; None: not every answer named them."""

    immediate: int | None
    batch: int | None
    cost: Decimal | None
    ledger_tokens: int
    ledger_cost: Decimal
    unconfirmed: int = 0

    @property
    def agrees(self) -> bool | None:
        if self.immediate is None or self.batch is None:
            return None
        if self.immediate + self.batch != self.ledger_tokens:
            return False
        return self.cost is None or abs(self.cost - self.ledger_cost) < _ROUNDED


def bill(run: Run, answers: Mapping[str, int | None], lines: Iterable[int | None]) -> Bill:
    """``answers``: model → tokens, of resumed runs as well; ``lines``: tokens of a batch's."""
    with run.client() as client:
        ledger, price = client._engine.account.ledger, client.info.price
        whole = [each for each in usage.windows_now(ledger, "live") if each.period == "total"]
        models = [each for each in usage.by_model(ledger) if each.period == "total"]
    batch = _sum(lines)
    costs = [None if batch is None or price is None else price.picodollars(batch, batch=True)]
    for model, count in answers.items():
        with run.client(model=model) as other:
            rate = other.info.price
        costs.append(None if count is None or rate is None else rate.picodollars(count))
    cost = _sum(costs)
    return Bill(
        immediate=_sum(answers.values()),
        batch=batch,
        cost=None if cost is None else money.in_dollars(cost),
        ledger_tokens=sum(each.spent.tokens for each in whole),
        ledger_cost=sum((each.spent.dollars for each in whole), Decimal(0)),
        unconfirmed=sum(each.unconfirmed.tokens for each in models),
    )


def _sum(tokens: Iterable[int | None]) -> int | None:
    total = 0
    for each in tokens:
        if each is None:
            return None
        total += each
    return total


def batch_lines(wire: Wire) -> list[int | None]:
    """The tokens of each line of the results; where lines name none, those that jobs name."""
    lines = [line.tokens for each in wire.results.values() for line in each if line.form != "none"]
    if lines and None not in lines:
        return list(lines)
    jobs = {
        str(each.document.get("id") or each.path): tokens_in(each.document)
        for each in wire.exchanges
        if each.method == "GET" and "status" in each.document
    }
    named = [tokens for tokens in jobs.values() if tokens]
    return list(named) if named else list(lines)
