"""Contract tests of a batch strategy, over a service that the author can drive."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from embedcore.errors import EmbeddingError, RemoteGone
from embedcore.provider.types import BatchItem, BatchOutcome
from embedcore.testing.contract.base import PROBES, KitBase

if TYPE_CHECKING:
    from embedcore.provider.protocol import BatchStrategy

_POLLS: Final = 50
_LOOKS: Final = 5
_ENDED: Final = ("completed", "failed", "expired", "cancelled")
_EARLY: Final = datetime(2020, 1, 1, tzinfo=UTC)


class BatchContract(KitBase):
    """Inherit, define ``make_strategy``, and run pytest.

    A test that needs another hook is skipped without it:

    - ``finish_jobs()``: let all jobs end; without it a job is polled until it has ended.
    - ``server_jobs()``: the ids of the jobs that the service has.
    - ``uploaded_bytes()``: the size of the input that was uploaded last, as the service limits it.
    - ``lose_next_answer()``: the service does what the next call asks, and its answer is lost.
    - ``fill_pages()``: the service gets so many other jobs that a list of them has two pages.
    - ``cut_results()``: the next results that are read break off in their middle.
    - ``shorten_results()``: they lack their last row, and nothing breaks.
    - ``delay_results()``: a job that has ended shows no results when it is looked at next.
    - ``swap_results()``: two jobs give each other's results from now on.
    - ``say_state(word)``: every job is said to be in this state.
    - ``expire_jobs()``: all jobs end because their time is over, with nothing done.
    - ``fail_next_create()``: the next job is made, and the answer is a 502.
    - ``refused_text()``: a text that the service refuses.
    - ``server_bill()``: the tokens billed so far.
    - ``another_strategy()``: one that another process would make.
    """

    keeps_inputs: bool = True
    """Whether the service has the input before there is a job."""

    def make_strategy(self) -> BatchStrategy:
        raise NotImplementedError(f"{type(self).__name__} must define make_strategy()")

    def finish_jobs(self) -> None:
        """Let all jobs of the service end. By default they end by being polled."""

    def server_jobs(self) -> Sequence[str] | None:
        """The ids of the jobs that the service has."""
        return None

    def uploaded_bytes(self) -> int | None:
        """The size of the input that was uploaded last, as ``limits.max_bytes`` counts it."""
        return None

    def lose_next_answer(self) -> bool | None:
        """Have the answer to the next call lost, and return True."""
        return None

    def fill_pages(self) -> bool | None:
        """Make other jobs, until a list of jobs has two pages, and return True."""
        return None

    def cut_results(self) -> bool | None:
        """Have the next results break off in their middle, and return True."""
        return None

    def shorten_results(self) -> bool | None:
        """Have the next results lack their last row, and return True."""
        return None

    def delay_results(self) -> bool | None:
        """Have a job that has ended show no results when it is looked at next; return True."""
        return None

    def swap_results(self) -> bool | None:
        """Have two jobs give each other's results, and return True."""
        return None

    def say_state(self, word: str) -> bool | None:  # noqa: ARG002
        """Have every job said to be in this state, and return True."""
        return None

    def expire_jobs(self) -> bool | None:
        """End all jobs because their time is over, with nothing done, and return True."""
        return None

    def fail_next_create(self) -> bool | None:
        """Have the next job made, and answered with 502; return True."""
        return None

    def refused_text(self) -> str | None:
        """A text that the service refuses."""
        return None

    def server_bill(self) -> int | None:
        """The tokens that the service billed so far."""
        return None

    def another_strategy(self) -> BatchStrategy | None:
        """One over the same service, as a process makes it that goes on after a crash."""
        return None

    @pytest.fixture
    def strategy(self) -> BatchStrategy:
        return self.make_strategy()

    def test_sizes_are_those_of_the_upload(self, strategy: BatchStrategy) -> None:
        items = items_of(PROBES)
        sizes = strategy.sizes(items)
        assert len(sizes) == len(items), f"{len(sizes)} sizes for {len(items)} items"
        strategy.upload(iter(items), key=new_key())
        uploaded = self._needed(self.uploaded_bytes(), "uploaded_bytes")
        assert sum(sizes) == uploaded, (
            f"sizes(items) gives {sum(sizes)} bytes and {uploaded} were uploaded: they decide how "
            "texts are cut into jobs"
        )

    def test_upload_reads_its_items_once(self, strategy: BatchStrategy) -> None:
        reference = strategy.upload((each for each in items_of(PROBES)), key=new_key())
        assert reference, f"upload gave {reference!r}, not a reference"

    def test_upload_passes_on_an_error_of_its_items(self, strategy: BatchStrategy) -> None:
        class Stopped(Exception):
            pass

        def stopping() -> Iterator[BatchItem]:
            yield from items_of(PROBES[:2])
            raise Stopped

        with pytest.raises(Stopped):
            strategy.upload(stopping(), key=new_key())

    def test_outcomes_belong_to_their_items(self, strategy: BatchStrategy) -> None:
        items = items_of(PROBES)
        found = self._outcomes(strategy, items)
        assert set(found) == {item.id for item in items}, (
            f"the items are {sorted(item.id for item in items)}, and outcomes came for "
            f"{sorted(found)}: give each outcome the id that its line carries"
        )
        again = items_of(PROBES[::-1])
        turned = self._outcomes(strategy, again)
        for item in items:
            twin = next(each for each in again if each.text == item.text)
            one, other = found[item.id].vector, turned[twin.id].vector
            assert one is not None, f"an item has no vector: {found[item.id].error}"
            assert other is not None, f"an item has no vector: {turned[twin.id].error}"
            assert one.dtype == np.float32, f"vectors are {one.dtype} and must be float32"
            assert np.allclose(one, other, atol=1e-3), (
                "a text has another vector where the items are in another order: join by id"
            )

    def test_outcomes_are_of_one_job(self, strategy: BatchStrategy) -> None:
        made = [items_of(PROBES[:3]), items_of(PROBES[3:6])]
        jobs = [self._started(strategy, items) for items in made]
        for job, items in zip(jobs, made, strict=True):
            self._ended(strategy, job)
            ids = {outcome.id for outcome in strategy.results(job)}
            assert ids == {item.id for item in items}, "a job's results hold another job's items"

    def test_outcomes_are_of_the_job_that_is_asked_for(self, strategy: BatchStrategy) -> None:
        made = [items_of(PROBES[:3]), items_of(PROBES[3:6])]
        jobs = [self._started(strategy, items) for items in made]
        for job in jobs:
            self._ended(strategy, job)
        for job, items in zip(jobs, made, strict=True):
            ids = {outcome.id for outcome in strategy.results(job)}
            assert ids == {item.id for item in items}, (
                "results(job) gives those of the job that was looked at last: keep nothing of a "
                "job in self"
            )

    def test_another_process_goes_on(self, strategy: BatchStrategy) -> None:
        other = self._needed(self.another_strategy(), "another_strategy")
        items, key = items_of(PROBES), new_key()
        reference = strategy.upload(iter(items), key=key)
        creator = other if self.keeps_inputs else strategy
        job = creator.create(reference, key=key)
        assert [one.id for one in other.find(key=key, input_ref=reference, since=_EARLY)] == [job]
        self._ended(other, job)
        found = {outcome.id: outcome.vector for outcome in other.results(job)}
        assert set(found) == {item.id for item in items}, (
            "another process reads other items from the results: a strategy lives as long as its "
            "process, and a job longer. Let each line carry its id"
        )
        assert all(vector is not None for vector in found.values()), (
            "another process reads no vectors from the results"
        )
        other.discard(reference)

    def test_a_job_that_goes_on_is_running(self, strategy: BatchStrategy) -> None:
        job = self._running(strategy)
        for _ in range(_LOOKS):
            state = strategy.poll(job).state
            assert state == "running", (
                f"a job that has not ended is {state}: what it has not done yet would be given up "
                "and paid for again"
            )
        early: list[BatchOutcome] = []
        self._error(lambda: early.extend(strategy.results(job)), "results of a job that goes on")
        assert not early, "a job that goes on has outcomes: they would be taken for all"

    def test_a_cancelled_job_is_cancelled(self, strategy: BatchStrategy) -> None:
        job = self._running(strategy)
        strategy.cancel(job)
        state = self._ended(strategy, job)
        assert state == "cancelled", (
            f"a job that was cancelled while it ran is {state}: it goes on, and is billed, though "
            "no batch waits for it"
        )

    def test_results_can_be_read_again(self, strategy: BatchStrategy) -> None:
        job = self._started(strategy, items_of(PROBES))
        self._ended(strategy, job)
        first, again = (sorted(each.id for each in strategy.results(job)) for _ in range(2))
        assert first == again, "a second reading of the results gives other items"

    def test_create_is_sent_once(self, strategy: BatchStrategy) -> None:
        before = len(self._needed(self.server_jobs(), "server_jobs"))
        reference = strategy.upload(items_of(PROBES), key=(key := new_key()))
        self._needed(self.lose_next_answer(), "lose_next_answer")
        error = self._error(lambda: strategy.create(reference, key=key), "a lost answer to create")
        made = len(self.server_jobs() or ()) - before
        assert made == 1, (
            f"create made {made} jobs, since its answer was lost: each is paid for. Never repeat "
            "create, and switch off the retries of an SDK"
        )
        assert error.billed != "no", (
            'the answer to create was lost, and the error has billed="no": that is proof of no '
            "job, and there is one"
        )

    def test_create_is_not_repeated_after_an_error_of_the_server(
        self, strategy: BatchStrategy
    ) -> None:
        before = len(self._needed(self.server_jobs(), "server_jobs"))
        reference = strategy.upload(items_of(PROBES), key=(key := new_key()))
        self._needed(self.fail_next_create(), "fail_next_create")
        error = self._error(lambda: strategy.create(reference, key=key), "a create answered by 502")
        made = len(self.server_jobs() or ()) - before
        assert made == 1, f"create made {made} jobs where the first was answered by 502"
        assert error.billed != "no", 'a 502 is no proof that there is no job: billed is not "no"'

    def test_find_gives_every_job_of_a_key_the_earliest_first(
        self, strategy: BatchStrategy
    ) -> None:
        key = new_key()
        made = []
        for _ in range(2):
            reference = strategy.upload(items_of(PROBES), key=key)
            made.append(strategy.create(reference, key=key))
        found = strategy.find(key=key, input_ref="none", since=_EARLY)
        assert {job.id for job in found} == set(made), (
            f"find gives {len(found)} jobs of a key that {len(made)} have: each of them is paid for"
        )
        times = [job.created_at for job in found if job.created_at is not None]
        assert times == sorted(times), "find does not give the earliest job first"

    def test_find_has_a_job_of_the_input_whatever_its_key(self, strategy: BatchStrategy) -> None:
        if not self.keeps_inputs:
            pytest.skip("keeps_inputs is False: a job has no input of its own")
        reference = strategy.upload(items_of(PROBES), key=(key := new_key()))
        job = strategy.create(reference, key=key)
        by_key = strategy.find(key=key, input_ref="none", since=_EARLY)
        by_input = strategy.find(key=new_key(), input_ref=reference, since=_EARLY)
        assert [each.id for each in by_key] == [job], "find does not give the job of a key"
        assert [each.id for each in by_input] in ([job], []), "find gives jobs of another input"

    def test_find_has_the_job_whose_answer_was_lost(self, strategy: BatchStrategy) -> None:
        reference = strategy.upload(items_of(PROBES), key=(key := new_key()))
        self._needed(self.lose_next_answer(), "lose_next_answer")
        self._error(lambda: strategy.create(reference, key=key), "a lost answer to create")
        found = strategy.find(key=key, input_ref=reference, since=_EARLY)
        assert len(found) == 1, f"find gives {len(found)} jobs, and there is one with this key"
        assert strategy.poll(found[0].id).state in ("running", *_ENDED)
        assert found[0].created_at is None or found[0].created_at.tzinfo is not None, (
            "FoundJob.created_at has no time zone: give UTC"
        )

    def test_find_reads_every_page(self, strategy: BatchStrategy) -> None:
        reference = strategy.upload(items_of(PROBES), key=(key := new_key()))
        job = strategy.create(reference, key=key)
        self._needed(self.fill_pages(), "fill_pages")
        found = [each.id for each in strategy.find(key=key, input_ref=reference, since=_EARLY)]
        assert found == [job], (
            f"find gives {len(found)} jobs where the list has several pages, and one is ours: read "
            "every page, or raise an error. What is not found is sent again"
        )

    def test_find_gives_no_job_of_others(self, strategy: BatchStrategy) -> None:
        self._started(strategy, items_of(PROBES))
        reference = strategy.upload(items_of(PROBES), key=(key := new_key()))
        found = strategy.find(key=key, input_ref=reference, since=_EARLY)
        assert found == [], f"find gives {len(found)} jobs for a key that no job has"

    def test_broken_results_raise(self, strategy: BatchStrategy) -> None:
        items = items_of(PROBES)
        job = self._started(strategy, items)
        self._ended(strategy, job)
        self._needed(self.cut_results(), "cut_results")
        seen: list[BatchOutcome] = []
        self._error(lambda: seen.extend(strategy.results(job)), "results that break off")
        assert {each.id for each in seen} <= {item.id for item in items}, (
            "an outcome was made of half a line"
        )

    def test_results_short_of_the_count_raise(self, strategy: BatchStrategy) -> None:
        items = items_of(PROBES)
        job = self._started(strategy, items)
        self._ended(strategy, job)
        self._needed(self.shorten_results(), "shorten_results")
        seen: list[BatchOutcome] = []
        self._error(
            lambda: seen.extend(strategy.results(job)),
            f"results with {len(items) - 1} rows of a job that counts {len(items)} done",
        )
        assert {each.id for each in strategy.results(job)} == {item.id for item in items}, (
            "the results are whole again, and rows are missing"
        )

    def test_results_that_are_late_come(self, strategy: BatchStrategy) -> None:
        items = items_of(PROBES)
        job = self._started(strategy, items)
        self._ended(strategy, job)
        self._needed(self.delay_results(), "delay_results")
        early: list[BatchOutcome] = []
        self._error(
            lambda: early.extend(strategy.results(job)),
            "results of a job that counts its rows done and shows none",
        )
        assert not early, "outcomes came where there were no results yet"
        found = {each.id for each in strategy.results(job)}
        assert found == {item.id for item in items}, "results that came late are not read"

    def test_results_of_another_job_keep_their_ids(self, strategy: BatchStrategy) -> None:
        made = [items_of(PROBES[:3]), items_of(PROBES[3:6])]
        jobs = [self._started(strategy, items) for items in made]
        for job in jobs:
            self._ended(strategy, job)
        self._needed(self.swap_results(), "swap_results")
        for job, items in zip(jobs, made, strict=True):
            try:
                found = {each.id for each in strategy.results(job) if each.vector is not None}
            except EmbeddingError:
                # Refused: as good.
                continue
            assert not found & {item.id for item in items}, (
                "a job's results were another job's, and an item has a vector of them: give each "
                "outcome the id that its line carries, not one by place"
            )

    def test_an_unknown_state_runs_on(self, strategy: BatchStrategy) -> None:
        job = self._started(strategy, items_of(PROBES))
        for word in ("a-word-of-tomorrow", "COMPLETING", "not_failed"):
            self._needed(self.say_state(word), "say_state")
            state = strategy.poll(job).state
            assert state == "running", (
                f"the state {word!r} is taken for {state}: a job that has not ended would be "
                "given up and paid for again"
            )

    def test_an_expired_job_without_results_is_expired(self, strategy: BatchStrategy) -> None:
        job = self._started(strategy, items_of(PROBES))
        self._needed(self.expire_jobs(), "expire_jobs")
        state = strategy.poll(job).state
        assert state == "expired", f"a job whose time is over is {state}"
        try:
            found = list(strategy.results(job))
        except EmbeddingError:
            return
        except Exception as error:
            raise AssertionError(
                f"a job that expired without results raised {type(error).__name__}, which is none "
                "of embedcore's errors"
            ) from error
        assert not [each for each in found if each.vector is not None or each.billed == "yes"], (
            "a job that expired with nothing done has vectors, or was billed"
        )

    def test_a_refused_item_has_an_error_and_no_vector(self, strategy: BatchStrategy) -> None:
        bad = self._needed(self.refused_text(), "refused_text")
        items = items_of([*PROBES[:3], bad])
        found = self._outcomes(strategy, items)
        for item in items[:-1]:
            assert found[item.id].vector is not None, "one refused text costs others their vectors"
        outcome = found.get(items[-1].id)
        assert outcome is not None, "a refused item has no outcome: the error that it has is lost"
        assert outcome.vector is None, "a refused item has a vector"
        assert outcome.error, "a refused item has no reason"

    def test_tokens_are_those_that_are_billed(self, strategy: BatchStrategy) -> None:
        before = self._needed(self.server_bill(), "server_bill")
        items = items_of(PROBES)
        job = self._started(strategy, items)
        self._ended(strategy, job)
        told = [each.tokens for each in strategy.results(job)]
        billed = self._needed(self.server_bill(), "server_bill") - before
        whole = strategy.poll(job).tokens
        assert whole in (None, billed), f"the job says {whole} tokens, and {billed} were billed"
        known = [tokens for tokens in told if tokens is not None]
        assert len(known) < len(told) or sum(known) == billed, (
            f"its rows say {sum(known)} tokens, and {billed} were billed"
        )

    def test_ids_come_back_as_they_are(self, strategy: BatchStrategy) -> None:
        names = ("A" * 32 + "-0000007", f"{uuid.uuid4().hex}-7", "a-B-0")
        items = [BatchItem(id=name, text=f"text {name}") for name in names]
        assert set(self._outcomes(strategy, items)) == set(names), "ids are altered on their way"

    def test_what_is_not_there_is_gone(self, strategy: BatchStrategy) -> None:
        job = self._started(strategy, items_of(PROBES))
        other = job[:-4] + ("0000" if job[-4:] != "0000" else "1111")
        for what, call in (
            ("poll", lambda: strategy.poll(other)),
            ("results", lambda: list(strategy.results(other))),
        ):
            error = self._error(call, f"{what} of a job that is not there")
            assert isinstance(error, RemoteGone), (
                f"{what} of a job that is not there raised {type(error).__name__}: raise RemoteGone"
            )

    def test_discard_may_be_called_twice(self, strategy: BatchStrategy) -> None:
        reference = strategy.upload(items_of(PROBES), key=(key := new_key()))
        strategy.discard(reference)
        strategy.discard(reference)
        self._error(lambda: strategy.create(reference, key=key), "create of an input that is gone")

    def test_cancel_may_be_called_twice(self, strategy: BatchStrategy) -> None:
        job = self._started(strategy, items_of(PROBES))
        strategy.cancel(job)
        strategy.cancel(job)
        self._ended(strategy, job)
        strategy.cancel(job)

    def test_orphans_are_inputs_that_no_job_uses(self, strategy: BatchStrategy) -> None:
        if not self.keeps_inputs:
            assert list(strategy.orphans(before=datetime.now(UTC))) == []
            pytest.skip("keeps_inputs is False: there is nothing to delete")
        unused = strategy.upload(items_of(PROBES), key=new_key())
        used = strategy.upload(items_of(PROBES), key=(key := new_key()))
        strategy.create(used, key=key)
        later = datetime.now(UTC) + timedelta(days=1)
        found = list(strategy.orphans(before=later))
        assert unused in found, "orphans leaves out an input that no job uses"
        assert used not in found, "orphans gives an input that a job uses: it would be deleted"
        assert unused not in list(strategy.orphans(before=_EARLY)), (
            "orphans gives an input that was uploaded after the time that was asked for"
        )

    def test_orphans_are_on_every_page(self, strategy: BatchStrategy) -> None:
        if not self.keeps_inputs:
            pytest.skip("keeps_inputs is False: there is nothing to delete")
        self._started(strategy, items_of(PROBES))
        unused = strategy.upload(items_of(PROBES), key=new_key())
        self._needed(self.fill_pages(), "fill_pages")
        later = datetime.now(UTC) + timedelta(days=1)
        assert unused in list(strategy.orphans(before=later)), (
            "orphans leaves out an input that is not on the first page of the list: read every page"
        )

    def _running(self, strategy: BatchStrategy) -> str:
        """A job that goes on until ``finish_jobs()``."""
        if type(self).finish_jobs is BatchContract.finish_jobs:
            pytest.skip("define finish_jobs() to have this tested")
        return self._started(strategy, items_of(PROBES))

    def _started(self, strategy: BatchStrategy, items: Sequence[BatchItem]) -> str:
        key = new_key()
        job = strategy.create(strategy.upload(iter(items), key=key), key=key)
        assert job, f"create gave {job!r}, not the id of a job"
        return job

    def _ended(self, strategy: BatchStrategy, job: str) -> str:
        self.finish_jobs()
        for _ in range(_POLLS):
            state = strategy.poll(job).state
            if state in _ENDED:
                return state
        raise AssertionError(
            f"the job has not ended after {_POLLS} polls: define finish_jobs(), or map the "
            "service's words for the end"
        )

    def _outcomes(
        self, strategy: BatchStrategy, items: Sequence[BatchItem]
    ) -> dict[str, BatchOutcome]:
        job = self._started(strategy, items)
        state = self._ended(strategy, job)
        assert state == "completed", f"a job of good texts ended as {state}"
        return {outcome.id: outcome for outcome in strategy.results(job)}

    def _needed(self, value: Any, hook: str) -> Any:
        if value is None:
            pytest.skip(f"define {hook}() to have this tested")
        return value

    def _error(self, call: Any, what: str) -> EmbeddingError:
        try:
            call()
        except EmbeddingError as error:
            return error
        except Exception as error:
            raise AssertionError(
                f"{what} raised {type(error).__name__}, which is none of embedcore's errors"
            ) from error
        raise AssertionError(f"{what} raised nothing")


_NUMBERS = itertools.count()


def items_of(texts: Sequence[str]) -> list[BatchItem]:
    """Items whose ids no item had before."""
    return [BatchItem(id=f"kit-{next(_NUMBERS)}", text=text) for text in texts]


def new_key() -> str:
    """A mark for one job."""
    return uuid.uuid4().hex
