"""Does the contract of a batch strategy pass the fake's, and catch broken children of it?"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from embedcore.errors import (
    EmbeddingError,
    InvalidResponse,
    OutcomeUnknown,
    ProviderError,
    ProviderUnavailable,
    RemoteGone,
)
from embedcore.provider.batch_files import MARK, FilesBatch
from embedcore.provider.batch_options import BatchOptions
from embedcore.provider.batchstates import is_known
from embedcore.provider.http_embedder import HttpEmbedder, Key
from embedcore.provider.types import BatchItem
from embedcore.testing import BatchContract
from embedcore.testing.batch_service import (
    FakeBatchService,
    Job,
    ServiceBatchContract,
    StoredFile,
)
from embedcore.testing.fakes.batch import FakeBatch, batch_embedder
from embedcore.testing.openai.batch_settings import BatchSettings, Progress
from embedcore.testing.service import Refused


class Driven(BatchContract):
    """The contract with every hook, over the class that ``Kind`` names."""

    Kind: type[FakeBatch] = FakeBatch

    def another_strategy(self) -> FakeBatch:
        return self.Kind(self.service, counts_rows=True)

    def make_strategy(self) -> FakeBatch:
        self.service = batch_embedder(settings=BatchSettings(progress=Progress())).batch.service
        self.service.fail_lines("forbidden")
        made = self.Kind(self.service, counts_rows=True)
        self.faults = made.faults
        return made

    def finish_jobs(self) -> None:
        for job in self.service.jobs:
            if job.status == "cancelling":
                self.service.end_cancel(job.id)
            elif not job.ended:
                self.service.finish(job.id)

    def server_jobs(self) -> list[str]:
        return [job.id for job in self.service.jobs]

    def uploaded_bytes(self) -> int:
        return max(int(str(file["bytes"])) for file in self.service.files()["data"])  # type: ignore[attr-defined]

    def lose_next_answer(self) -> bool:
        self.faults.push("create", "after")
        return True

    def fill_pages(self) -> bool:
        from embedcore.testing.contract.batches import items_of

        other = FakeBatch(self.service, model="fake-embedding")
        for number in range(130):
            key = f"{number:032x}"
            other.create(other.upload(items_of(["another"]), key=key), key=key)
        return True

    def cut_results(self) -> bool:
        self.faults.push("results", "before", at=3)
        return True

    def shorten_results(self) -> bool:
        self.service.settings.quirks.late = "first line"
        return True

    def delay_results(self) -> bool:
        self.service.settings.quirks.late = "no file"
        return True

    def swap_results(self) -> bool:
        self.service.swap_outputs(*(job.id for job in self.service.jobs))
        return True

    def say_state(self, word: str) -> bool:
        self.service.settings.quirks.status_word = word
        return True

    def expire_jobs(self) -> bool:
        for job in self.service.jobs:
            self.service.expire(job.id, done=0)
        return True

    def fail_next_create(self) -> bool:
        self.faults.push("create", "after", error=OutcomeUnknown("HTTP 502", status=502))
        return True

    def refused_text(self) -> str:
        return "forbidden"

    def server_bill(self) -> int:
        return self.service.meter.billed_tokens


class TestFakeBatch(Driven):
    pass


class SizesOfTexts(FakeBatch):
    def sizes(self, items: Any) -> list[int]:
        return [len(item.text.encode()) for item in items]


class ReadsTwice(FakeBatch):
    def upload(self, items: Any, *, key: str) -> str:
        return super().upload(items[:], key=key)


class HidesErrorsOfItems(FakeBatch):
    def upload(self, items: Any, *, key: str) -> str:
        taken: list[BatchItem] = []
        try:
            taken.extend(items)
        except Exception as error:
            raise ProviderUnavailable("no upload", billed="no") from error
        return super().upload(taken, key=key)


class InOrderOfItems(FakeBatch):
    """Gives the ids in the order of the ids, whatever line a vector came from."""

    def results(self, job_id: str) -> Iterator[Any]:
        found = list(super().results(job_id))
        ids = sorted(each.id for each in found)
        vectors = sorted((each.vector for each in found), key=lambda vector: float(vector[0]))
        for name, vector in zip(ids, vectors, strict=True):
            yield dataclasses.replace(found[0], id=name, vector=vector)


class ResultsOfTheFirstJob(FakeBatch):
    def results(self, job_id: str) -> Iterator[Any]:
        return super().results(self.service.jobs[0].id)


class ReadsOnce(FakeBatch):
    read = False

    def results(self, job_id: str) -> Iterator[Any]:
        if not self.read:
            yield from super().results(job_id)
        self.read = True


class CreatesAgain(FakeBatch):
    def create(self, input_ref: str, *, key: str) -> str:
        try:
            return super().create(input_ref, key=key)
        except ProviderError:
            super().create(input_ref, key=key)
            raise


class FindsNothing(FakeBatch):
    def find(self, **_: Any) -> list[Any]:
        return []


class FindsOnTheFirstPage(FakeBatch):
    def find(self, **asked: Any) -> list[Any]:
        first = {entry["id"] for entry in self.service.batches(limit=20)["data"]}  # type: ignore[attr-defined]
        return [job for job in super().find(**asked) if job.id in first]


class FindsAnything(FakeBatch):
    def find(self, **asked: Any) -> list[Any]:
        from embedcore.provider.types import FoundJob

        return [FoundJob(id=job.id) for job in self.service.jobs]


class EndsQuietly(FakeBatch):
    def results(self, job_id: str) -> Iterator[Any]:
        try:
            yield from super().results(job_id)
        except ProviderUnavailable:
            return


class GoneIsUnavailable(FakeBatch):
    def poll(self, job_id: str) -> Any:
        try:
            return super().poll(job_id)
        except RemoteGone as error:
            raise ProviderUnavailable("later", status=404) from error


class DiscardsOnce(FakeBatch):
    def discard(self, input_ref: str) -> None:
        if input_ref not in repr(self.service.files()):
            raise RemoteGone("no such file", billed="no")
        super().discard(input_ref)


class CancelsOnce(FakeBatch):
    asked = False

    def cancel(self, job_id: str) -> None:
        if self.asked:
            raise ProviderUnavailable("it was told already", billed="no")
        self.asked = True
        super().cancel(job_id)


class AllAreOrphans(FakeBatch):
    def orphans(self, *, before: Any) -> Iterator[str]:
        for file in self.service.files()["data"]:  # type: ignore[attr-defined]
            yield str(file["id"])


class KeepsTheJobOfAPoll(FakeBatch):
    latest = ""

    def poll(self, job_id: str) -> Any:
        self.latest = job_id
        return super().poll(job_id)

    def results(self, job_id: str) -> Iterator[Any]:
        return super().results(self.latest or job_id)


class KnowsItsItemsByPlace(FakeBatch):
    """Numbers its lines, and keeps in itself which item each of them is."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.names: dict[str, str] = {}

    def upload(self, items: Any, *, key: str) -> str:
        lines = []
        for item in items:
            number = f"{key}-{len(lines)}"
            self.names[number] = item.id
            lines.append(dataclasses.replace(item, id=number))
        return super().upload(lines, key=key)

    def results(self, job_id: str) -> Iterator[Any]:
        for each in super().results(job_id):
            yield dataclasses.replace(each, id=self.names.get(each.id, ""))


class EndsEarly(FakeBatch):
    """Takes a job for complete that was asked for three times."""

    polls = 0

    def poll(self, job_id: str) -> Any:
        self.polls += 1
        found = super().poll(job_id)
        return found if self.polls < 3 else dataclasses.replace(found, state="completed")


class CancelsNothing(FakeBatch):
    def cancel(self, job_id: str) -> None:
        self.service.job(job_id)


class OrphansOfTheFirstPage(FakeBatch):
    def orphans(self, *, before: Any) -> Iterator[str]:
        first = {entry["id"] for entry in self.service.files(limit=20)["data"]}  # type: ignore[attr-defined]
        return (name for name in super().orphans(before=before) if name in first)


BROKEN: dict[str, type[FakeBatch]] = {
    "test_sizes_are_those_of_the_upload": SizesOfTexts,
    "test_upload_reads_its_items_once": ReadsTwice,
    "test_upload_passes_on_an_error_of_its_items": HidesErrorsOfItems,
    "test_outcomes_belong_to_their_items": InOrderOfItems,
    "test_outcomes_are_of_one_job": ResultsOfTheFirstJob,
    "test_outcomes_are_of_the_job_that_is_asked_for": KeepsTheJobOfAPoll,
    "test_another_process_goes_on": KnowsItsItemsByPlace,
    "test_a_job_that_goes_on_is_running": EndsEarly,
    "test_a_cancelled_job_is_cancelled": CancelsNothing,
    "test_orphans_are_on_every_page": OrphansOfTheFirstPage,
    "test_results_can_be_read_again": ReadsOnce,
    "test_create_is_sent_once": CreatesAgain,
    "test_find_has_the_job_whose_answer_was_lost": FindsNothing,
    "test_find_reads_every_page": FindsOnTheFirstPage,
    "test_find_gives_no_job_of_others": FindsAnything,
    "test_broken_results_raise": EndsQuietly,
    "test_what_is_not_there_is_gone": GoneIsUnavailable,
    "test_discard_may_be_called_twice": DiscardsOnce,
    "test_cancel_may_be_called_twice": CancelsOnce,
    "test_orphans_are_inputs_that_no_job_uses": AllAreOrphans,
}


KEY = "acme-0123456789abcdef"


class FakeAcme(FakeBatchService):
    def take_job(self, asked: dict[str, Any]) -> str:
        self.take(asked, {"file": str, "metadata?": (dict, type(None))})
        return str(asked["file"])

    def run_line(self, job: Job, line: dict[str, Any]) -> dict[str, Any]:
        texts = self.strings(line["text"])
        if texts == ["forbidden"]:
            raise self.wrong_body("forbidden")
        (row,) = self.vectors(texts, 16)
        body = {"data": [{"embedding": row}], "usage": {"total_tokens": self.bill(texts)}}
        return {"custom_id": line["id"], "response": {"status_code": 200, "body": body}}

    def error_row(self, job: Job, line: dict[str, Any], refused: Refused) -> dict[str, Any]:
        return super().error_row(job, {"custom_id": line["id"]}, refused)

    def job_document(self, job: Job) -> dict[str, Any]:
        return {
            "id": job.id,
            "status": job.state,
            "input_file_id": job.file,
            "metadata": job.asked.get("metadata"),
            "created_at": job.created.timestamp(),
            "request_counts": {"completed": len(job.good), "failed": len(job.bad)},
            "output_file_id": job.output,
            "error_file_id": job.errors,
        }

    def file_document(self, file: StoredFile) -> dict[str, Any]:
        return {"id": file.id, "filename": file.name, "created_at": file.created.timestamp()}


class AcmeOptions(BatchOptions):
    api_key: Key = None
    base_url: str = "https://acme.example/v1"


class Acme(FilesBatch):
    def line(self, item: BatchItem) -> Any:
        return {"id": item.id, "text": item.text}

    def job(self, file: str, mark: str, note: str) -> Any:
        return {"file": file, "metadata": {MARK: mark}}


class DrivenAcme(ServiceBatchContract):
    def strategy_of(self, server: Any) -> Acme:
        return Acme(acme_embedder(server))

    def refused_text(self) -> str:
        return "forbidden"


class TestAcme(DrivenAcme):
    @pytest.fixture
    def server(self, acme: FakeAcme) -> FakeAcme:
        return acme


def acme_embedder(server: FakeAcme) -> HttpEmbedder:
    return HttpEmbedder("v1", AcmeOptions(base_url=f"{server.url}/v1", api_key=KEY))


@pytest.fixture
def acme() -> Iterator[FakeAcme]:
    with FakeAcme(key=KEY) as fake:
        yield fake


class RepeatsAfterAnError(Acme):
    def create(self, input_ref: str, *, key: str) -> str:
        try:
            return super().create(input_ref, key=key)
        except ProviderError:
            return super().create(input_ref, key=key)


class CallsItFree(Acme):
    def create(self, input_ref: str, *, key: str) -> str:
        try:
            return super().create(input_ref, key=key)
        except ProviderError as error:
            error.billed = "no"
            raise


class FindsOneJob(Acme):
    def find(self, **asked: Any) -> list[Any]:
        return super().find(**asked)[:1]


class FindsTheLatestFirst(Acme):
    def find(self, **asked: Any) -> list[Any]:
        return super().find(**asked)[::-1]


class FindsByInputOnly(Acme):
    def find(self, **asked: Any) -> list[Any]:
        return super().find(**{**asked, "key": "none"})


class SaysNothingOfMissingRows(Acme):
    def results(self, job_id: str) -> Iterator[Any]:
        with contextlib.suppress(InvalidResponse):
            yield from super().results(job_id)


class RemembersResults(Acme):
    """Looks once, and takes what was there for all that there is."""

    seen: ClassVar[dict[str, list[Any]]] = {}

    def results(self, job_id: str) -> Iterator[Any]:
        if job_id not in self.seen:
            self.seen[job_id] = []
            self.seen[job_id] += super().results(job_id)
        yield from self.seen[job_id]


class JoinsByPlace(Acme):
    """Gives the ids of the items that were uploaded, in their order, to the lines as they come."""

    uploaded: ClassVar[list[list[str]]] = []

    def upload(self, items: Any, *, key: str) -> str:
        items = list(items)
        self.uploaded.append([item.id for item in items])
        return super().upload(items, key=key)

    def results(self, job_id: str) -> Iterator[Any]:
        ids = self.uploaded[list(self.server_jobs()).index(job_id) - len(self.server_jobs())]
        for name, outcome in zip(ids, super().results(job_id), strict=False):
            yield dataclasses.replace(outcome, id=name)

    def server_jobs(self) -> list[str]:
        listed = [each.found for page in self._jobs() for each in page.entries]
        return [found.id for found in reversed(listed)]


class NumbersItsItems(Acme):
    """Writes the number of an item for its id, which is that of an item of every other job."""

    names: ClassVar[list[str]] = []

    def line(self, item: BatchItem) -> Any:
        self.names.append(item.id)
        return {"id": str((len(self.names) - 1) % 3), "text": item.text}

    def results(self, job_id: str) -> Iterator[Any]:
        at = 0 if job_id.startswith("batch-3") else 3
        for outcome in super().results(job_id):
            yield dataclasses.replace(outcome, id=self.names[at + int(outcome.id)])


class GivesUpWhatIsUnknown(Acme):
    def poll(self, job_id: str) -> Any:
        found = super().poll(job_id)
        known = is_known(found.detail)
        return found if known else dataclasses.replace(found, state="failed")


class LooksForPartsOfWords(Acme):
    def poll(self, job_id: str) -> Any:
        found = super().poll(job_id)
        ended = "complet" in found.detail.lower()
        return dataclasses.replace(found, state="completed") if ended else found


class CallsItFailed(Acme):
    def poll(self, job_id: str) -> Any:
        found = super().poll(job_id)
        return dataclasses.replace(found, state="failed") if found.state == "expired" else found


class WantsAFile(Acme):
    def results(self, job_id: str) -> Iterator[Any]:
        found = self.calls.results(job_id)
        assert found is not None
        yield from self._outcomes(found.files[0], job_id)


class HidesRefusals(Acme):
    def results(self, job_id: str) -> Iterator[Any]:
        return (each for each in super().results(job_id) if each.vector is not None)


class GivesZerosForRefusals(Acme):
    def results(self, job_id: str) -> Iterator[Any]:
        for each in super().results(job_id):
            zeros = np.zeros(16, np.float32)
            yield each if each.error is None else dataclasses.replace(each, vector=zeros)


class CountsCharacters(Acme):
    def results(self, job_id: str) -> Iterator[Any]:
        for each in super().results(job_id):
            yield dataclasses.replace(each, tokens=1)


class CutsIds(Acme):
    def line(self, item: BatchItem) -> Any:
        return {"id": item.id[:36], "text": item.text}


class LowersIds(Acme):
    def line(self, item: BatchItem) -> Any:
        return {"id": item.id.lower(), "text": item.text}


BROKEN_FILES: dict[str, list[type[Acme]]] = {
    "test_create_is_not_repeated_after_an_error_of_the_server": [RepeatsAfterAnError, CallsItFree],
    "test_find_gives_every_job_of_a_key_the_earliest_first": [FindsOneJob, FindsTheLatestFirst],
    "test_find_has_a_job_of_the_input_whatever_its_key": [FindsByInputOnly],
    "test_results_short_of_the_count_raise": [SaysNothingOfMissingRows],
    "test_results_that_are_late_come": [SaysNothingOfMissingRows, RemembersResults],
    "test_results_of_another_job_keep_their_ids": [JoinsByPlace, NumbersItsItems],
    "test_an_unknown_state_runs_on": [GivesUpWhatIsUnknown, LooksForPartsOfWords],
    "test_an_expired_job_without_results_is_expired": [CallsItFailed, WantsAFile],
    "test_a_refused_item_has_an_error_and_no_vector": [HidesRefusals, GivesZerosForRefusals],
    "test_tokens_are_those_that_are_billed": [CountsCharacters],
    "test_ids_come_back_as_they_are": [CutsIds, LowersIds],
}


@pytest.mark.parametrize("test", BROKEN)
def test_a_broken_strategy_is_caught(test: str) -> None:
    class Contract(Driven):
        Kind = BROKEN[test]

    made = Contract()
    with pytest.raises((AssertionError, EmbeddingError, TypeError)):
        getattr(made, test)(made.make_strategy())


@pytest.mark.parametrize(("test", "kind"), [(t, k) for t, ks in BROKEN_FILES.items() for k in ks])
def test_a_broken_child_of_the_base_class_is_caught(
    test: str, kind: type[Acme], acme: FakeAcme
) -> None:
    made = DrivenAcme()
    made.server = acme
    with pytest.raises(AssertionError):
        getattr(made, test)(kind(acme_embedder(acme)))


@pytest.mark.parametrize("test", BROKEN_FILES)
def test_a_sound_child_of_the_base_class_passes(test: str, acme: FakeAcme) -> None:
    made = DrivenAcme()
    made.server = acme
    getattr(made, test)(Acme(acme_embedder(acme)))


def test_every_test_of_a_strategy_can_fail() -> None:
    assert BROKEN.keys() | BROKEN_FILES.keys() == {
        name for name in dir(BatchContract) if name.startswith("test_")
    }


def test_vectors_of_another_type_are_caught() -> None:
    class Wide(FakeBatch):
        def results(self, job_id: str) -> Iterator[Any]:
            for each in super().results(job_id):
                yield dataclasses.replace(each, vector=np.float64(each.vector))

    class Contract(Driven):
        Kind = Wide

    made = Contract()
    with pytest.raises(AssertionError, match="must be float32"):
        made.test_outcomes_belong_to_their_items(made.make_strategy())


def test_without_a_hook_a_test_names_it() -> None:
    class Bare(BatchContract):
        def make_strategy(self) -> FakeBatch:
            return batch_embedder().batch

    made = Bare()
    with pytest.raises(pytest.skip.Exception, match=r"define cut_results\(\)"):
        made.test_broken_results_raise(made.make_strategy())
