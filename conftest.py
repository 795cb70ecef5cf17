"""What holds for the tests of the core and of every provider."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# What a shell runs in the background ignores interrupts, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine draws an example as slowly as it does everything else: that is no failure.
settings.register_profile("lean", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Ten times the examples, for `make campaign`. A test with a number of its own names it as a share
# of ``settings.default.max_examples``, where more examples would find more.
settings.register_profile("wide", settings.get_profile("lean"), max_examples=1_000)
settings.load_profile("lean")
