"""How does another process drive the fake's Batch API?

``GET /_batches`` tells: ``jobs`` (id, status, input_file_id, metadata, lines, run, tokens),
``pending`` and ``landed``, and ``billed_twice``: how many texts were billed more than once.

``POST /_batches`` does what it is sent, in this order, and tells the same:

- ``{"set": {"progress": {"polls": 2}, "quirks": {"bom": true}, …}}``: fields of ``BatchSettings``;
- ``{"advance": seconds}``: the service's clock; ``{"land": true}``: all that is late happens;
- ``{"fail_lines": [{"marker": "BAD", "status": 500, …}]}``: the arguments of ``fail_lines``;
- ``{"jobs": [{"id": …, "do": "finish", "done": 3}, …]}``: a method of ``BatchService`` for a job
  and its arguments; without ``id`` it is the newest job. There are step, finish, expire, cancel,
  end_cancel, fail, vanish, vanish_output and swap_outputs (with ``other``, a job's id).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from embedcore.testing.api import ApiError, json_reply
from embedcore.testing.batches import BatchService
from embedcore.testing.batchsettings import change
from embedcore.testing.wire import HttpReply, HttpRequest

PATH = "/_batches"
_PARTS = {"set", "advance", "land", "fail_lines", "jobs"}


def control_batches(request: HttpRequest, service: BatchService) -> HttpReply:
    """The reply to a request to ``/_batches``."""
    try:
        if request.method == "POST":
            drive(service, request.json())
        elif request.method != "GET":
            return json_reply({"error": "there are GET and POST /_batches"}, status=405)
    except (TypeError, ValueError, ApiError) as error:
        return json_reply({"error": str(error)}, status=400)
    service.refresh()
    return json_reply(told(service))


def told(service: BatchService) -> dict[str, object]:
    return {
        "jobs": [
            {
                "id": job.id,
                "status": job.status,
                "input_file_id": job.input_file_id,
                "metadata": job.metadata,
                "lines": len(job.lines),
                "run": len(job.results),
                "tokens": job.billed_tokens,
            }
            for job in service.jobs
        ],
        "pending": service.pending,
        "landed": service.landed,
        "billed_twice": len(service.meter.billed_twice),
    }


def drive(service: BatchService, script: object) -> None:
    """Do what a script says; raises ``ValueError`` or ``TypeError`` for one without sense."""
    if not isinstance(script, dict):
        raise TypeError("a JSON object was expected")
    unknown = sorted(set(script) - _PARTS)
    if unknown:
        raise ValueError(f"no part {unknown[0]!r} in a script; there are {sorted(_PARTS)}")
    change(service.settings, script.get("set", {}))
    service.clock.advance(float(script.get("advance", 0)))
    if script.get("land"):
        service.land()
    for rule in script.get("fail_lines", []):
        service.fail_lines(**rule)
    for deed in script.get("jobs", []):
        _do(service, deed)


def _do(service: BatchService, deed: Mapping[str, object]) -> None:
    arguments = cast(dict[str, Any], {**deed})
    jobs = service.jobs
    job_id = arguments.pop("id", jobs[-1].id if jobs else "")
    name = arguments.pop("do", None)
    deeds: dict[object, Callable[..., object]] = {
        "step": service.step,
        "finish": service.finish,
        "expire": service.expire,
        "cancel": service.cancel,
        "end_cancel": service.end_cancel,
        "fail": service.fail,
        "vanish": service.vanish,
        "vanish_output": service.vanish_output,
        "swap_outputs": service.swap_outputs,
    }
    if name not in deeds:
        raise ValueError(f"no deed {name!r}; there are {', '.join(map(str, deeds))}")
    deeds[name](job_id, **arguments)
