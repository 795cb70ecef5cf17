"""Today's tokens: exact keys and meanings, one ledger for all, and a dictionary as the model."""

from __future__ import annotations

import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from embedcore import Config, ConfigurationError, EmbeddingClient, TokenBudgetExceeded, TokenTracker
from embedcore.testing import FakeEmbedder

KEYS = {"tokens_used", "requests", "remaining", "limit"}


@pytest.fixture
def tracker():
    tracker = TokenTracker(daily_limit=100)
    yield tracker
    tracker.close()


def test_a_new_day(tracker):
    assert tracker.get_usage_today() == {
        "tokens_used": 0,
        "requests": 0,
        "remaining": 100,
        "limit": 100,
    }


def test_there_is_no_default_limit():
    tracker = TokenTracker()
    tracker.record_usage(10**12)
    assert tracker.get_usage_today() == {
        "tokens_used": 10**12,
        "requests": 1,
        "remaining": None,
        "limit": None,
    }
    assert tracker.check_budget(10**15)
    tracker.close()


def test_recording_is_unconditional(tracker):
    tracker.record_usage(60)
    tracker.record_usage(60)
    assert tracker.get_usage_today() == {
        "tokens_used": 120,
        "requests": 2,
        "remaining": 0,
        "limit": 100,
    }
    assert not tracker.check_budget(1)
    assert tracker.check_budget(0)


def test_reset_begins_the_day_again(tracker):
    tracker.record_usage(60)
    tracker.reset()
    assert tracker.get_usage_today()["tokens_used"] == 0
    assert tracker.get_usage_today()["requests"] == 0
    assert tracker.check_budget(100)
    tracker.record_usage(7)
    assert tracker.get_usage_today()["remaining"] == 93


def test_reset_leaves_other_scopes_and_the_month_alone():
    month = {"budget": {"monthly_token_limit": 100}}
    one, other = TokenTracker(scope="one", config=month), TokenTracker(scope="other")
    one.record_usage(60)
    other.record_usage(5)
    one.reset()
    assert one.get_usage_today()["tokens_used"] == 0
    assert other.get_usage_today()["tokens_used"] == 5
    assert one.check_budget(40)
    assert not one.check_budget(41)
    one.close()
    other.close()


@pytest.mark.fault(93)
@pytest.mark.parametrize("value", [-1, True, 1.5, float("nan"), float("inf"), "7", b"7", [7]])
def test_tokens_are_a_whole_number(tracker, value):
    for call in (tracker.record_usage, tracker.check_budget, TokenTracker):
        with pytest.raises(ConfigurationError, match="whole number"):
            call(value)
    with pytest.raises(ConfigurationError):
        tracker.record_usage(None)
    assert tracker.get_usage_today()["requests"] == 0


def test_an_amount_that_cannot_be_right_is_refused(tracker):
    with pytest.raises(ConfigurationError):
        tracker.record_usage(2**70)
    assert not tracker.check_budget(2**70)


@pytest.mark.fault(138)
@pytest.mark.parametrize("scope", ["", "*", "a b", "x'; DROP TABLE attempt; --"])
def test_a_scope_has_a_plain_name(scope):
    with pytest.raises(ConfigurationError, match="scope"):
        TokenTracker(scope=scope)


def test_the_tightest_limit_holds():
    config = {"budget": {"daily_token_limit": 50, "monthly_token_limit": 30}}
    for own, limit in ((10, 10), (50, 50), (90, 50), (None, 50)):
        tracker = TokenTracker(own, config=config)
        assert tracker.get_usage_today()["limit"] == limit
        assert tracker.check_budget(min(limit, 30))
        assert not tracker.check_budget(min(limit, 30) + 1)
        tracker.close()


def test_a_limit_over_all_scopes_counts_what_others_spend():
    config = {"budget": {"daily_token_limit": 80, "all_scopes": {"daily_token_limit": 100}}}
    one, other = (TokenTracker(scope=name, config=config) for name in ("one", "other"))
    other.record_usage(70)
    today = one.get_usage_today()
    assert today == {"tokens_used": 0, "requests": 0, "remaining": 30, "limit": 100}
    assert one.check_budget(30)
    assert not one.check_budget(31)
    one.close()
    other.close()


def test_what_is_kept_for_queries_is_not_there_for_embed_texts():
    config = {"budget": {"daily_token_limit": 100, "query_share": 0.4}}
    tracker = TokenTracker(config=config)
    assert tracker.get_usage_today()["remaining"] == 60
    assert tracker.check_budget(60)
    assert not tracker.check_budget(61)
    with EmbeddingClient(embedder=FakeEmbedder(), config=config) as client:
        with pytest.raises(TokenBudgetExceeded):
            client.embed_texts(["x" * 4 * 61])
        client.embed_texts(["x" * 4 * 60])
        client.embed_query("x" * 4 * 40)
    assert tracker.get_usage_today()["remaining"] == 0
    tracker.close()


def test_money_is_no_matter_of_tokens():
    tracker = TokenTracker(config={"budget": {"daily_cost_limit": 0}})
    assert tracker.get_usage_today()["limit"] is None
    assert tracker.check_budget(10)
    tracker.close()


def test_a_client_and_a_tracker_keep_the_same_ledger():
    fake = FakeEmbedder()
    tracker = TokenTracker(daily_limit=100)
    with EmbeddingClient(embedder=fake, config={"budget": {"daily_token_limit": 100}}) as client:
        client.embed_texts(["x" * 40])
        tracker.record_usage(85)
        assert tracker.get_usage_today()["tokens_used"] == 95
        assert tracker.get_usage_today()["requests"] == 2
        assert tracker.check_budget(5)
        assert not tracker.check_budget(6)
        with pytest.raises(TokenBudgetExceeded) as caught:
            client.embed_texts(["y" * 24])
        assert caught.value.spent == 95
        assert client.embed_texts(["y" * 20])
        tracker.reset()
        assert client.embed_texts(["z" * 400])
    assert fake.billed_tokens == 10 + 5 + 100
    tracker.close()


def test_the_default_tracker_is_that_of_the_default_client():
    config = {"model": "p", "profiles": {"p": {"model": "hashing:64", "scope": "mine"}}}
    assert TokenTracker(config=config).scope == EmbeddingClient(config=config).scope == "mine"


def test_what_is_held_is_not_left(tracker):
    started, go_on = [], []

    def script(request, number):
        started.append(tracker.get_usage_today())
        go_on.append(tracker.check_budget(91))

    fake = FakeEmbedder(script=script)
    with EmbeddingClient(embedder=fake, config={"budget": {"daily_token_limit": 100}}) as client:
        client.embed_texts(["x" * 40])
    assert started[0]["tokens_used"] == 0
    assert started[0]["requests"] == 1
    assert started[0]["remaining"] in (60, 90), "40 bytes or 10 tokens are held"
    assert go_on == [False]


def test_many_threads_and_trackers():
    trackers = [TokenTracker() for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: trackers[n % 4].record_usage(n), range(80)))
    for tracker in trackers:
        today = tracker.get_usage_today()
        assert (today["tokens_used"], today["requests"]) == (sum(range(80)), 80)
        tracker.close()


def test_many_processes(forks):
    program = (
        "from embedcore import TokenTracker as T\nt = T()\nfor n in range(20): t.record_usage(n)"
    )
    running = [forks(program) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    tracker = TokenTracker()
    assert tracker.get_usage_today()["tokens_used"] == 3 * sum(range(20))
    tracker.close()


def test_a_closed_tracker_opens_again(tracker):
    tracker.close()
    tracker.record_usage(1)
    tracker.close()
    tracker.close()
    assert tracker.get_usage_today()["tokens_used"] == 1


@pytest.mark.fault(131)
def test_a_tracker_pickles_without_handles_and_keys(canary):
    config = Config(
        options={"openai": {"api_key": canary}},
        profiles={"p": {"model": "m", "options": {"api_key": canary}}},
        budget={"daily_token_limit": 9},
    )
    tracker = TokenTracker(config=config, scope="s")
    tracker.record_usage(4)
    pickled = pickle.dumps(tracker)
    assert canary.encode() not in pickled
    assert canary not in repr(vars(tracker))
    copy = pickle.loads(pickled)
    assert copy.get_usage_today() == tracker.get_usage_today()
    assert (copy.scope, copy.get_usage_today()["remaining"]) == ("s", 5)
    tracker.close()
    copy.close()


def warnings_of(caplog):
    return [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_warning_at_nine_tenths_and_only_one(tracker, caplog):
    tracker.record_usage(89)
    assert warnings_of(caplog) == []
    tracker.record_usage(1)
    tracker.record_usage(9)
    (warning,) = warnings_of(caplog)
    assert "90 %" in warning.getMessage()
    other = TokenTracker(daily_limit=100)
    other.record_usage(1)
    assert len(warnings_of(caplog)) == 1, "nor by another one"
    other.close()


class Model(RuleBasedStateMachine):
    """Two trackers of one scope and one of another, against plain sums."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 1000
        self.trackers = [TokenTracker(self.limit, scope="a"), TokenTracker(self.limit, scope="a")]
        self.other = TokenTracker(scope="b")
        for tracker in (*self.trackers, self.other):
            tracker.reset()
        self.month = {"a": 0, "b": 0}
        self.tokens = {"a": 0, "b": 0}
        self.requests = {"a": 0, "b": 0}

    def tracker(self, which: int) -> TokenTracker:
        return self.other if which == 2 else self.trackers[which]

    @rule(which=st.integers(0, 2), tokens=st.integers(0, 700))
    def record(self, which, tokens):
        tracker = self.tracker(which)
        tracker.record_usage(tokens)
        self.tokens[tracker.scope] += tokens
        self.requests[tracker.scope] += 1

    @rule(which=st.integers(0, 2))
    def reset(self, which):
        tracker = self.tracker(which)
        tracker.reset()
        self.tokens[tracker.scope] = self.requests[tracker.scope] = 0

    @rule(which=st.integers(0, 2), tokens=st.integers(0, 1500))
    def check(self, which, tokens):
        tracker = self.tracker(which)
        left = max(self.limit - self.tokens["a"], 0)
        assert tracker.check_budget(tokens) == (tracker is self.other or tokens <= left)

    @rule(which=st.integers(0, 2))
    def close(self, which):
        self.tracker(which).close()

    @invariant()
    def agree(self):
        left = max(self.limit - self.tokens["a"], 0)
        for tracker in self.trackers:
            assert tracker.get_usage_today() == {
                "tokens_used": self.tokens["a"],
                "requests": self.requests["a"],
                "remaining": left,
                "limit": self.limit,
            }
        assert set(self.other.get_usage_today()) == KEYS
        assert self.other.get_usage_today() == {
            "tokens_used": self.tokens["b"],
            "requests": self.requests["b"],
            "remaining": None,
            "limit": None,
        }

    def teardown(self) -> None:
        for tracker in (*self.trackers, self.other):
            tracker.close()


Model.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestModel = Model.TestCase
