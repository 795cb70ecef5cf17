"""``embedcore batch resume``: whatever is due for every open batch, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedcore.cli.batchbooks import Clients, batch_books, books_of
from embedcore.cli.batchtext import change_text, code_of_all, report_fields
from embedcore.cli.exits import OK, code_of
from embedcore.cli.text import one_line, plural
from embedcore.config import Config
from embedcore.errors import ConfigurationError, EmbeddingError

if TYPE_CHECKING:
    from embedcore.cli.batchbooks import BatchBooks
    from embedcore.cli.screen import Screen
    from embedcore.storage.batchrecords import BatchRecord

_LONGEST = 500


def resume_all(
    screen: Screen, *, model: str | None, resubmit_lost: str | None, resubmit_cancelled: str | None
) -> int:
    """The code of what a person must mend; 0 if there is nothing."""
    if resubmit_lost is not None:
        _buy_again(screen, resubmit_lost, model)
    if resubmit_cancelled is not None:
        _send_again(screen, resubmit_cancelled, model)
    with batch_books(Config.load()) as books:
        if books is None:
            screen.answer({"batches": []})
            return OK
        return _resume(screen, books, model)


def _resume(screen: Screen, books: BatchBooks, model: str | None) -> int:
    before = {one.name: change_text(books.report(one)) for one in books.open}
    codes: list[int] = []
    with Clients(books=books, model=model) as clients:
        for record in _pools(books):
            try:
                problems = clients.of(record).resume_batches()
            except EmbeddingError as error:
                problems = [error]
            for problem in problems:
                codes.append(code_of(problem))
                screen.complain(f"Error: {record.asked_as}: {one_line(str(problem), _LONGEST)}")
    reports = [books.report(books.named(name)) for name in before]
    for report in reports:
        if change_text(report) != before[report.id]:
            screen.say(change_text(report))
    screen.answer({"batches": [report_fields(one) for one in reports]})
    return code_of_all(codes)


def _pools(books: BatchBooks) -> list[BatchRecord]:
    """One batch of each pool in which something may be due, also after its batches have ended."""
    newest = {record.pool: record for record in books.batches.all()}
    busy = {record.pool for record in books.open}
    return [
        record
        for pool, record in newest.items()
        if pool in busy or books.jobs.live(books.batches.pool_of(record))
    ]


def _buy_again(screen: Screen, name: str, model: str | None) -> None:
    with books_of(name) as (books, record), Clients(books=books, model=model) as clients:
        if record.has_ended:
            note = books.note(record)
            files = "FILE" if note is None else " ".join(note.files)
            raise ConfigurationError(
                f"batch {name} has ended: embedcore batch submit {files} --resubmit-lost buys what "
                "it lost, and nothing else of it"
            )
        texts = clients.job(record).resubmit_lost()
    screen.say(
        f"{name}: what is lost is bought again: {plural(texts, 'text')} now, and those of jobs "
        "that are gone as soon as these are looked at"
    )


def _send_again(screen: Screen, name: str, model: str | None) -> None:
    with books_of(name) as (books, record), Clients(books=books, model=model) as clients:
        if record.has_ended:
            note = books.note(record)
            files = "FILE" if note is None else " ".join(note.files)
            raise ConfigurationError(
                f"batch {name} has ended: embedcore batch submit {files} submits what is missing"
            )
        texts = clients.job(record).resubmit_cancelled()
    screen.say(f"{name}: {plural(texts, 'text')} whose job was cancelled will be sent again")
