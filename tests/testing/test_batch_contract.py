"""Does the contract of a batch strategy pass the fake's, and catch broken children of it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from embedcore.errors import EmbeddingError, ProviderError, ProviderUnavailable, RemoteGone
from embedcore.provider.types import BatchItem
from embedcore.testing import BatchContract
from embedcore.testing.fakes.batch import FakeBatch, batch_embedder


class Driven(BatchContract):
    """The contract with every hook, over the class that ``Kind`` names."""

    Kind: type[FakeBatch] = FakeBatch

    def make_strategy(self) -> FakeBatch:
        self.service = batch_embedder().batch.service
        made = self.Kind(self.service)
        self.faults = made.faults
        return made

    def finish_jobs(self) -> None:
        for job in self.service.jobs:
            if job.status not in ("completed", "cancelled"):
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


BROKEN: dict[str, type[FakeBatch]] = {
    "test_sizes_are_those_of_the_upload": SizesOfTexts,
    "test_upload_reads_its_items_once": ReadsTwice,
    "test_upload_passes_on_an_error_of_its_items": HidesErrorsOfItems,
    "test_outcomes_belong_to_their_items": InOrderOfItems,
    "test_outcomes_are_of_one_job": ResultsOfTheFirstJob,
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


@pytest.mark.parametrize("test", BROKEN)
def test_a_broken_strategy_is_caught(test: str) -> None:
    class Contract(Driven):
        Kind = BROKEN[test]

    made = Contract()
    with pytest.raises((AssertionError, EmbeddingError, TypeError)):
        getattr(made, test)(made.make_strategy())


def test_every_test_of_a_strategy_can_fail() -> None:
    assert set(BROKEN) == {name for name in dir(BatchContract) if name.startswith("test_")}


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
