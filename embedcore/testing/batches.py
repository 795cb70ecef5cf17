"""A Files and Batch API without HTTP: which jobs are there, how far are they, what did they cost?

::

    service = BatchService(settings=BatchSettings(progress=Progress()))   # moves only by hand
    file = service.upload(b'{"custom_id": "0", ...}')
    job = service.create(file["id"], metadata={"mine": "1"})
    service.finish(job["id"], done=1)
    b"".join(service.content(service.retrieve(job["id"])["output_file_id"]).blocks())
    assert service.meter.billed_texts == ...

Behaves as OpenAI's published description, its recordings and its guide say as of November 2026.
Everything under ``settings`` may be changed at any time.
"""

from __future__ import annotations

from dataclasses import replace

from embedcore.testing import batchpages
from embedcore.testing.api import ApiError
from embedcore.testing.batchdriver import BatchDriver
from embedcore.testing.batchfiles import Content, Stored, StoredFile, missing
from embedcore.testing.batchjobs import Job
from embedcore.testing.batchoutput import OutputContent
from embedcore.testing.batchsettings import (
    NOT_READY,
    BatchSettings as BatchSettings,
    FileLimits as FileLimits,
    Listing as Listing,
    Progress as Progress,
    Quirks as Quirks,
)
from embedcore.testing.embeddings_api import EMBEDDINGS

LATE_ERROR = b'{"error": {"message": "The file is not there yet.", "code": "not_found"}}\n'


class BatchService(BatchDriver):
    """The API and the hands that drive it. Callable from several threads.

    - ``models``, ``count``, ``salt``, ``limits``: as for ``FakeOpenAI``.
    - ``settings``: how it behaves. ``clock``: advances by itself and by ``clock.advance``.
    - ``meter``: the bill. Every line that was run is one request of it, billed or rejected.

    The methods of the API return what is on the wire and raise ``ApiError``.
    """

    # Files

    def upload(
        self,
        content: Stored | bytes,
        *,
        filename: str = "batch.jsonl",
        purpose: str = "batch",
        expires_after: int | None = None,
    ) -> dict[str, object]:
        """Keep a file. ``expires_after``: seconds; 30 days for a batch's by default."""
        stored = Stored(content) if isinstance(content, bytes) else content
        with self._request():
            if not stored.size:
                raise ApiError(400, "The uploaded file is empty.", param="file")
            file = self._files.add(
                stored, filename=filename, purpose=purpose, expires_after=expires_after
            )
            return file.described(self._state_of(file) or "uploaded")

    def files(
        self, *, after: str | None = None, limit: int = 10_000, purpose: str | None = None
    ) -> dict[str, object]:
        """A page of the files, newest first."""
        with self._request():
            found = [one for one in self._files.newest_first(purpose) if self._state_of(one)]
            return batchpages.page(
                found,
                lambda file: file.described(self._state_of(file) or ""),
                after=after,
                limit=limit,
            )

    def file(self, file_id: str) -> dict[str, object]:
        with self._request():
            file = self._files.get(file_id)
            state = self._state_of(file)
            if state is None:
                raise missing(file_id, param="id", status=404)
            return file.described(state)

    def content(self, file_id: str) -> Content:
        """What is in a file; readable after the file is gone as well, as a running download is."""
        with self._request():
            content, quirks = self._files.get(file_id).content, self.settings.quirks
            for job in self._jobs.values():
                late = job.is_late_file(file_id, quirks) and job.is_late(quirks, self.clock())
                if late and quirks.late != "no file":
                    job.looks += 1
                    return self._instead(file_id, content)
            return content

    def _instead(self, file_id: str, content: Content) -> Content:
        """What is there as long as a result is late."""
        late = self.settings.quirks.late
        if late == "missing":
            raise missing(file_id, param="id", status=404)
        if late == "first line" and isinstance(content, OutputContent):
            return OutputContent(content.results[:1], content.quirks)
        if late == "half" and isinstance(content, OutputContent):
            return OutputContent(content.results, replace(content.quirks, cut=0.5))
        return Stored(b"" if late == "empty" else LATE_ERROR)

    def result_files(self, job_id: str) -> list[str]:
        """The files with what a job did, as far as its object names them."""
        with self._request():
            described = self._looked_at(self.job(job_id))
            named = (described["output_file_id"], described["error_file_id"])
            return [str(file) for file in named if file is not None]

    def delete(self, file_id: str) -> dict[str, object]:
        with self._request():
            self._files.delete(file_id)
            return {"object": "file", "id": file_id, "deleted": True}

    # Jobs

    def create(
        self,
        input_file_id: str,
        *,
        endpoint: str = EMBEDDINGS,
        completion_window: str = "24h",
        metadata: dict[str, str] | None = None,
        output_expires_after: int | None = None,
    ) -> dict[str, object]:
        """Start a job on an uploaded file; what is wrong inside that file shows only later."""
        with self._request():
            self._check_input(input_file_id)
            now = self.clock()
            window = self.settings.window
            job = Job(
                id=f"batch_{len(self._jobs) + 1:032x}",
                endpoint=endpoint,
                input_file_id=input_file_id,
                completion_window=completion_window,
                metadata=metadata,
                output_expires_after=output_expires_after,
                created_at=now,
                times={} if window is None else {"expires_at": int(now + window)},
            )
            self._jobs[job.id] = job
            return self._described(job)

    def retrieve(self, job_id: str) -> dict[str, object]:
        """The job now. Counts as a poll."""
        with self._request():
            job = self.job(job_id)
            job.polls += 1
            if not job.ended:
                self._catch_up(job)
            return self._looked_at(job)

    def batches(self, *, after: str | None = None, limit: int = 20) -> dict[str, object]:
        """A page of the jobs, newest first, as far as ``settings.listing`` shows them."""
        with self._request():
            listing = self.settings.listing
            found = batchpages.visible(self._jobs.values(), listing, after, self.clock())
            return batchpages.page(
                found,
                self._described,
                after=None if listing.repeats else after,
                limit=limit,
                has_more=True if listing.repeats and found else listing.has_more,
            )

    def cancel(self, job_id: str) -> dict[str, object]:
        with self._request():
            job = self.job(job_id)
            if job.ended:
                message = f"Cannot cancel a batch with status '{job.status}'."
                raise ApiError(409, message)
            if job.status != "cancelling":
                self._runner.begin_cancel(job)
            return self._described(job)

    def swap_outputs(self, one: str, other: str) -> None:
        """Two jobs that have ended: each names the output of the other from now on."""
        with self._request():
            first, second = self.job(one), self.job(other)
            first.output_file_id, second.output_file_id = (
                second.output_file_id,
                first.output_file_id,
            )

    def _state_of(self, file: StoredFile) -> str | None:
        """The file's own state; None: there seems to be none."""
        settings = self.settings
        waits = self.clock() < file.created_at + settings.not_ready_seconds
        if file.purpose == "batch" and (waits or file.refused < settings.not_ready_creates):
            return settings.not_ready_word
        return "processed"

    def _check_input(self, file_id: str) -> None:
        """Raises ``ApiError`` unless a job may read the file."""
        kept = self._files.once(file_id)
        if kept is not None and kept.gone and self.settings.accepts_deleted_input:
            return
        status = self.settings.missing_input_status
        file = self._files.get(file_id, param="input_file_id", status=status)
        state = self._state_of(file)
        if state != "processed":
            file.refused += 1
            message = f"The input file {file_id} is not in processed state (it is {state})."
            raise ApiError(
                self.settings.not_ready_status, message, param="input_file_id", code=NOT_READY
            )
        if file.purpose != "batch":
            message = f"The file {file_id} was not uploaded for the purpose 'batch'."
            raise ApiError(400, message, param="input_file_id")

    def _described(self, job: Job) -> dict[str, object]:
        quirks = self.settings.quirks
        hidden = quirks.late == "no file" and job.is_late(quirks, self.clock())
        return job.described(quirks, hidden=hidden)

    def _looked_at(self, job: Job) -> dict[str, object]:
        """The object, for somebody who looks whether its results are there."""
        described = self._described(job)
        job.looks += job.ended and self.settings.quirks.late == "no file"
        return described
