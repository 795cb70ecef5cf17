"""The contract that every batch strategy keeps, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create

from embedcore.provider.protocol import BatchStrategy
from embedcore.testing import BatchContract, FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

MODEL = "text-embedding-3-small"


class TestOpenAIBatch(BatchContract):
    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        settings = BatchSettings(progress=Progress())  # a job ends when the test says so
        with FakeOpenAI(api_key=None, batch=settings) as self._fake:
            options = OpenAIOptions(base_url=self._fake.base_url, batch=True)
            self._embedders = [create(MODEL, options) for _ in range(2)]
            yield
            for embedder in self._embedders:
                embedder.close()

    def make_strategy(self) -> BatchStrategy:
        batch = self._embedders[0].batch
        assert batch is not None
        return batch

    def another_strategy(self) -> BatchStrategy | None:
        return self._embedders[1].batch

    def finish_jobs(self) -> None:
        for job in self._fake.batches.jobs:
            if job.status not in ("completed", "cancelled", "cancelling"):
                self._fake.batches.finish(job.id)
            elif job.status == "cancelling":
                self._fake.batches.end_cancel(job.id)

    def server_jobs(self) -> list[str]:
        return [job.id for job in self._fake.batches.jobs]

    def uploaded_bytes(self) -> int:
        files = self._fake.batches.files()["data"]
        assert isinstance(files, list)
        return max(int(file["bytes"]) for file in files)

    def lose_next_answer(self) -> bool:
        self._fake.faults.push("reset_billed", path="/v1/batches")
        return True

    def fail_next_create(self) -> bool:
        self._fake.faults.push("status", status=502, path="POST /v1/batches", effect="after")
        return True

    def fill_pages(self) -> bool:
        service = self._fake.batches
        line = (
            b'{"custom_id": "0", "method": "POST", "url": "/v1/embeddings", '
            b'"body": {"model": "text-embedding-3-small", "input": "another"}}\n'
        )
        for number in range(130):
            reference = service.upload(line, filename=f"another-{number}.jsonl")
            service.create(str(reference["id"]), metadata={"number": str(number)})
        return True

    def cut_results(self) -> bool:
        for job in self._fake.batches.jobs:
            for file in self._fake.batches.result_files(job.id):
                self._fake.faults.push("truncated", path=f"/v1/files/{file}/content")
        return True

    def shorten_results(self) -> bool:
        # The file has its first line only, when it is read next.
        self._fake.batches.settings.quirks.late = "first line"
        return True

    def delay_results(self) -> bool:
        self._fake.batches.settings.quirks.late = "no file"
        return True

    def swap_results(self) -> bool:
        self._fake.batches.swap_outputs(*(job.id for job in self._fake.batches.jobs))
        return True

    def say_state(self, word: str) -> bool:
        self._fake.batches.settings.quirks.status_word = word
        return True

    def expire_jobs(self) -> bool:
        for job in self._fake.batches.jobs:
            self._fake.batches.expire(job.id, done=0)
        return True

    def refused_text(self) -> str:
        self._fake.batches.fail_lines("forbidden")
        return "forbidden"

    def server_bill(self) -> int:
        return self._fake.batches.meter.billed_tokens
