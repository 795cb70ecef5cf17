"""Which window does money belong to, in every zone and with every clock?"""

from __future__ import annotations

import zoneinfo
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, strategies as st

from embedcore.errors import ConfigurationError, TokenBudgetExceeded
from embedcore.storage import usage
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.calendar import (
    MICROSECONDS,
    PERIODS,
    Period,
    window_end,
    window_start,
    zone_named,
)
from embedcore.storage.ledger import Ledger

DAY = 86_400
ZONES = sorted(zoneinfo.available_timezones() - {"localtime", "Factory"})
# Zones whose clocks went back over midnight, so that a day came twice, did so before 2012.
MOMENTS = st.datetimes(datetime(2012, 1, 1), datetime(2037, 12, 31), timezones=st.just(UTC))


def microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * MICROSECONDS)


@pytest.mark.fault(89)
@given(zone=st.sampled_from(ZONES), moment=MOMENTS, period=st.sampled_from(["day", "month"]))
def test_a_window_lasts_until_its_end_and_not_a_moment_longer(
    zone: str, moment: datetime, period: Period
) -> None:
    now = microseconds(moment)
    start, end = window_start(period, now, zone), window_end(period, now, zone)
    assert end is not None
    assert end > moment.replace(microsecond=0)
    assert window_start(period, microseconds(end) - 1, zone) == start
    assert window_start(period, microseconds(end), zone) > start


@pytest.mark.fault(89)
@given(zone=st.sampled_from(ZONES), moment=MOMENTS)
def test_the_window_is_the_local_date(zone: str, moment: datetime) -> None:
    local = moment.astimezone(zoneinfo.ZoneInfo(zone)).date()
    now = microseconds(moment)
    assert [window_start(period, now, zone) for period in PERIODS] == [
        local.isoformat(),
        f"{local:%Y-%m}",
        "",
    ]
    assert window_end("total", now, zone) is None


@pytest.mark.fault(89)
@pytest.mark.parametrize(
    ("zone", "day", "hours", "following"),
    [
        ("UTC", "2026-03-29", 24, "2026-03-30"),
        ("Europe/Berlin", "2026-03-29", 23, "2026-03-30"),
        ("Europe/Berlin", "2026-10-25", 25, "2026-10-26"),
        ("America/Sao_Paulo", "2018-11-03", 24, "2018-11-04"),  # its next midnight is missing
        ("America/Sao_Paulo", "2018-11-04", 23, "2018-11-05"),
        ("Pacific/Apia", "2011-12-29", 24, "2011-12-31"),  # the day after it is missing
        ("Australia/Lord_Howe", "2026-04-05", 24.5, "2026-04-06"),
    ],
)
def test_days_of_odd_lengths(zone: str, day: str, hours: float, following: str) -> None:
    noon = datetime.fromisoformat(f"{day}T12:00:00").replace(tzinfo=zoneinfo.ZoneInfo(zone))
    end = window_end("day", microseconds(noon), zone)
    before = noon - timedelta(days=1)
    start = window_end("day", microseconds(before), zone)
    assert start is not None
    assert end is not None
    assert end - start == timedelta(hours=hours)
    assert window_start("day", microseconds(end), zone) == following


@pytest.mark.parametrize("name", ["", "Mars/Olympus", "../etc/passwd", "Europe", "a\0b", "/UTC"])
def test_an_unknown_zone_is_a_configuration_error(
    name: str, open_ledger: Callable[..., Ledger]
) -> None:
    with pytest.raises(ConfigurationError):
        zone_named(name)
    if name:
        with pytest.raises(ConfigurationError):
            open_ledger(zone=name).record("s", Amount())


def test_the_zone_belongs_to_the_file_from_its_first_use(
    open_ledger: Callable[..., Ledger], clock: Any
) -> None:
    clock.now = datetime(2026, 1, 15, 23, 30, tzinfo=UTC).timestamp()
    open_ledger(zone="Europe/Berlin").record("s", Amount(tokens=1))
    other = open_ledger()
    assert usage.of_scope(other, "s").start == date(2026, 1, 16).isoformat()
    other.record("s", Amount(tokens=1))
    with pytest.raises(ConfigurationError, match="Europe/Berlin"):
        open_ledger(zone="UTC").record("s", Amount(tokens=1))
    assert usage.of_scope(other, "s").spent == Amount(tokens=2)


def test_a_file_counts_in_utc_unless_told_otherwise(
    ledger: Ledger, open_ledger: Callable[..., Ledger]
) -> None:
    ledger.record("s", Amount())
    assert ledger.moment().zone == "UTC"
    with pytest.raises(ConfigurationError, match="UTC"):
        open_ledger(zone="Asia/Tokyo").moment()


LAST_SECONDS = datetime(2026, 1, 31, 23, 59, 50, tzinfo=UTC).timestamp()


def days(ledger: Ledger) -> dict[str, Amount]:
    with ledger.database.read() as connection:
        rows = connection.execute(
            "SELECT start, tokens_spent FROM window WHERE scope = 's' AND period = 'day'"
        )
        return {start: Amount(tokens=spent) for start, spent in rows.fetchall()}


@pytest.mark.case("C4")
@pytest.mark.fault(88)
def test_midnight_during_a_call(ledger: Ledger, clock: Any) -> None:
    """What leaves after it counts there, and with it all that is left of the grant."""
    clock.now = LAST_SECONDS
    limits = [Limit(scope="s", period="day", unit="tokens", amount=100)]
    grant = ledger.hold("s", Amount(tokens=100), limits)
    first = ledger.send(grant, Amount(tokens=50))
    clock.now += 20
    ledger.renew(grant)
    assert usage.of_scope(ledger, "s").held == Amount(), "nothing moves before it is sent"
    second = ledger.send(grant, Amount(tokens=30))
    assert usage.of_scope(ledger, "s").held == Amount(tokens=50)
    ledger.settle(first, Amount(tokens=40))
    ledger.settle(second, Amount(tokens=30), close=True)
    assert days(ledger) == {"2026-01-31": Amount(tokens=40), "2026-02-01": Amount(tokens=30)}
    with pytest.raises(TokenBudgetExceeded):
        ledger.hold_and_send("s", Amount(tokens=71), limits)
    other = ledger.hold_and_send("s", Amount(tokens=70), limits)
    ledger.settle(other, Amount(tokens=70))
    day, month, total = usage.windows_now(ledger, "s")
    assert (day.spent.tokens, month.spent.tokens, total.spent.tokens) == (100, 100, 140)
    assert {day.held, month.held, total.held} == {Amount()}


@pytest.mark.case("C4")
@pytest.mark.fault(88)
@pytest.mark.parametrize("lane", ["all", "query"])
def test_what_does_not_fit_the_new_day_is_held_nowhere(
    ledger: Ledger, clock: Any, lane: Any
) -> None:
    clock.now = LAST_SECONDS
    limits = [
        Limit(scope="s", period="day", unit="tokens", amount=100),
        Limit(scope="s", period="total", unit="tokens", amount=150),
    ]
    grant = ledger.hold("s", Amount(tokens=90, cost=5), limits, lane=lane)
    sent = ledger.send(grant, Amount(tokens=20))
    clock.now += 20
    ledger.settle(ledger.hold_and_send("s", Amount(tokens=31), limits), Amount(tokens=31))
    with pytest.raises(TokenBudgetExceeded) as refusal:
        ledger.send(grant, Amount(tokens=1))
    assert (refusal.value.asked, refusal.value.held, refusal.value.period) == (70, 0, "day")
    for usage_now in usage.windows_now(ledger, "s"):
        assert usage_now.held == Amount(tokens=20 if usage_now.period == "total" else 0)
    # What is under way counts where it left; what comes back of it belongs to nobody.
    assert not ledger.give_back(sent)
    assert usage.of_scope(ledger, "s", "total").held == Amount()
    ledger.close(ledger.hold("s", Amount(tokens=69), limits))
    ledger.close(grant)
    assert usage.of_scope(ledger, "s", "total").held == Amount()


@pytest.mark.case("C4")
def test_in_total_it_is_held_already(ledger: Ledger, clock: Any) -> None:
    """Another limit, or a bill beyond the bound, may have used it up: that is no reason."""
    clock.now = LAST_SECONDS
    limits = [
        Limit(scope="s", period=period, unit="tokens", amount=100)  # type: ignore[arg-type]
        for period in ("day", "month", "total")
    ]
    grant = ledger.hold("s", Amount(tokens=60), limits)
    ledger.record("s", Amount(tokens=90))
    clock.now += 20
    ledger.settle(ledger.send(grant, Amount(tokens=60)), Amount(tokens=60), close=True)
    assert usage.of_scope(ledger, "s", "total").spent == Amount(tokens=150)


@pytest.mark.case("C4")
def test_the_money_of_a_batch_stays_on_its_day(ledger: Ledger, clock: Any) -> None:
    clock.now = LAST_SECONDS
    limits = [Limit(scope="s", period="day", unit="tokens", amount=100)]
    grant = ledger.hold("s", Amount(tokens=60), limits, leased=False)
    clock.now += 20
    ledger.settle(ledger.hold_and_send("s", Amount(tokens=90), limits), Amount(tokens=90))
    ledger.settle(ledger.send(grant, Amount(tokens=60)), Amount(tokens=60))
    assert days(ledger) == {"2026-01-31": Amount(tokens=60), "2026-02-01": Amount(tokens=90)}


@pytest.mark.case("C4")
def test_what_was_sent_with_its_hold_is_timely_until_midnight(ledger: Ledger, clock: Any) -> None:
    clock.now = LAST_SECONDS
    attempt = ledger.hold_and_send("s", Amount(tokens=60))
    clock.now += 9.9
    assert ledger.is_timely(attempt)
    clock.now += 0.1
    assert not ledger.is_timely(attempt)


@pytest.mark.fault(88)
def test_what_is_held_today_gets_nothing_back_from_yesterday(ledger: Ledger, clock: Any) -> None:
    clock.now = LAST_SECONDS
    grant = ledger.hold("s", Amount(tokens=50))
    yesterday = ledger.send(grant, Amount(tokens=10))
    clock.now += 20
    assert ledger.give_back(ledger.send(grant, Amount(tokens=5)))
    assert not ledger.give_back(yesterday)
    day, _, total = usage.windows_now(ledger, "s")
    assert (day.held.tokens, total.held.tokens) == (40, 40)
    ledger.close(grant)
    assert usage.of_scope(ledger, "s", "total").held == Amount()


@pytest.mark.fault(90)
def test_a_clock_that_goes_back_reopens_no_window(ledger: Ledger, clock: Any) -> None:
    ledger.record("s", Amount(tokens=10))
    grant = ledger.hold("s", Amount(tokens=5))
    clock.now -= 3 * DAY
    ledger.record("s", Amount(tokens=20))
    ledger.renew(grant)
    assert days(ledger) == {"2026-01-15": Amount(tokens=30)}
    clock.now += 3 * DAY + 61
    ledger.hold("t", Amount())
    assert usage.of_scope(ledger, "s").held == Amount(), "no lease was prolonged by going back"


@pytest.mark.fault(91)
def test_a_jump_of_a_month_can_be_repaired(ledger: Ledger, clock: Any) -> None:
    limits = [Limit(scope="s", period="month", unit="tokens", amount=100)]
    ledger.record("s", Amount(tokens=90))
    real = clock.now
    clock.now += 31 * DAY
    wrong = ledger.hold("s", Amount(tokens=100), limits)  # its owner dies
    ledger.hold_and_send("s", Amount(tokens=3), [])  # and this one's
    clock.now = real + 5
    assert usage.of_scope(ledger, "s", "month").start == "2026-02"
    before, after = ledger.repair_clock()
    assert (before, after) == (real + 31 * DAY, real + 5)
    month = usage.of_scope(ledger, "s", "month")
    assert (month.start, month.spent) == ("2026-01", Amount(tokens=90))
    clock.now += 661
    ledger.hold("t", Amount())
    total = usage.of_scope(ledger, "s", "total")
    assert (total.spent, total.held) == (Amount(tokens=93), Amount())
    ledger.close(wrong)
    notes = [row["note"] for row in usage.audit(ledger) if row["state"] == "clock"]
    assert len(notes) == 1
    assert "by repair" in notes[0]
