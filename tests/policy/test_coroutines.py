"""Does work in threads come back to its coroutine, and end before the loop and the program do?"""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import threading

import pytest

from embedcore.policy.coroutines import in_thread
from embedcore.policy.threads import Stopped

NAME = contextvars.ContextVar("NAME", default="nobody")


def test_it_gives_back_what_the_work_returns_in_the_callers_context():
    async def main():
        NAME.set("the caller")
        return await in_thread(lambda: (NAME.get(), threading.current_thread()))

    name, thread = asyncio.run(main())
    assert name == "the caller"
    assert thread is not threading.current_thread()


@pytest.mark.parametrize("error", [ValueError("no"), Stopped(), KeyboardInterrupt()])
def test_it_raises_what_the_work_raises(error):
    def work():
        raise error

    async def main():
        with pytest.raises(type(error)) as caught:
            await in_thread(work)
        assert caught.value is error

    asyncio.run(main())


def test_a_future_takes_no_stop_iteration():
    async def main():
        with pytest.raises(RuntimeError, match="StopIteration"):
            await in_thread(lambda: next(iter(())))

    asyncio.run(main())


def test_the_threads_of_the_event_loop_are_left_to_the_program():
    """All of them are busy, and ours go on."""
    go = threading.Event()

    async def main():
        loop = asyncio.get_running_loop()
        busy = [loop.run_in_executor(None, go.wait, 120) for _ in range(64)]
        assert await in_thread(lambda: 7) == 7
        go.set()
        await asyncio.gather(*busy)

    asyncio.run(main())


def test_a_cancelled_caller_is_free_at_once_and_the_loop_ends_after_its_work():
    began, go, ended, stop = (threading.Event() for _ in range(4))

    def work():
        began.set()
        assert stop.wait(120)
        assert go.wait(120)
        ended.set()

    async def main():
        call = asyncio.create_task(in_thread(work, stop=stop))
        while not began.is_set():
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert stop.is_set()
        assert not ended.is_set()
        # Only once the loop has begun to end.
        asyncio.get_running_loop().call_later(0.05, go.set)

    asyncio.run(main())
    assert ended.is_set()


PROGRAM = """
import asyncio, threading
from embedcore.policy.coroutines import in_thread

began, stop = threading.Event(), threading.Event()

def work():
    began.set()
    stop.wait(120)
    print("accounted for", flush=True)

async def main():
    asyncio.ensure_future(in_thread(work, stop=stop))
    while not began.is_set():
        await asyncio.sleep(0.001)

# A loop that is left as it is.
asyncio.new_event_loop().run_until_complete(main())
print("over", flush=True)
"""


def test_the_program_ends_after_the_work_that_a_loop_left_behind(forks):
    process = forks(PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, _ = process.communicate(timeout=120)
    assert said.split("\n")[:2] == ["over", "accounted for"]
    assert process.returncode == 0
