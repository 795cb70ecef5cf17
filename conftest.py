"""What holds for the tests of the core and of every provider."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# What a shell runs in the background ignores interrupts, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine draws an example as slowly as it does everything else: that is no failure.
settings.register_profile(
    "lean", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50
)
# Twenty times the examples, for `make campaign`. A test that needs more names them as a multiple of
# ``settings.default.max_examples``; it has a number of its own only where an example is slow.
settings.register_profile("wide", settings.get_profile("lean"), max_examples=1_000)
settings.load_profile("lean")


def pytest_collection_finish() -> None:
    # The tests themselves are there to the end: no collection of garbage need look through them.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No certificate of the machine: nothing asks the world, and each client reads all of them."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("SSL_CERT_FILE", raising=False)
        environment.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("certificates")))
        yield
