"""The key is in the request and nowhere else: a small program with everything going wrong."""

from __future__ import annotations

import ast
import asyncio
import base64
import gc
import io
import logging
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest

import embedcore
from embedcore import Config, EmbeddingClient, EmbeddingError, TokenTracker, functions
from embedcore.assembly import _Secrets
from embedcore.testing import FakeOpenAI

TEXT = "a sentence that nobody but the server may read"
SDK_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")
QUICK = {"retry": {"first_wait": 0.0, "attempts": 2, "request_timeout": 1.0}}
PACKAGE = str(Path(embedcore.__file__).parent)

FAULTS = [
    *("echo_key", "html", "redirect", "reset", "truncated", "rate_limited", "quota_exhausted"),
    *("context_length", "bad_text", "status", "endless", "cut_json", "duplicate_keys", "hang"),
    *("fewer", "shuffled", "component", "wrong_width", "other_model", "close_silent"),
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, canary: str) -> Iterator[FakeOpenAI]:
    with FakeOpenAI(api_key=canary) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", canary)
        yield server


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[], str]]:
    """Everything that was logged, at the finest level, and everything that was printed."""
    for name in SDK_LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", logging.DEBUG)
    root.manager._clear_cache()  # type: ignore[attr-defined]
    root.addHandler(handler)
    yield lambda: stream.getvalue() + "".join(capfd.readouterr())
    root.removeHandler(handler)
    root.manager._clear_cache()  # type: ignore[attr-defined]


def chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        link = pending.pop()
        if link is not None and not any(link is one for one in found):
            found.append(link)
            pending += [link.__cause__, link.__context__]
            partial = getattr(link, "partial", None)
            pending += [] if partial is None else list(partial.errors.values())
    return found


def frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def as_a_debugger(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001 - whatever it is, a debugger goes on
        # An object whose construction failed has not all that its repr shows.
        return f"no repr: {error}"


def everything_in(error: BaseException) -> str:
    """Messages, attributes, tracebacks, and every local variable that a debugger would show."""
    parts = []
    for link in chain(error):
        parts += [str(link), repr(link), repr(vars(link))]
        parts += traceback.format_exception(link)
        for trace in frames(link.__traceback__):
            if trace.tb_frame.f_code.co_filename != __file__:
                parts += map(as_a_debugger, trace.tb_frame.f_locals.values())
    return "\n".join(parts)


def shows(canary: str, text: str) -> list[str]:
    """Pieces of the key, or of its base64 form, of at least eight characters."""
    encoded = base64.b64encode(canary.encode()).decode()
    pieces = {form[at : at + 8] for form in (canary[3:], encoded) for at in range(len(form) - 7)}
    return sorted(piece for piece in pieces if piece in text)


def files_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def core_objects() -> list[str]:
    """How every living object of ours shows itself."""
    shown = []
    known: dict[type, bool] = {}
    for one in gc.get_objects():
        kind = type(one)
        if kind not in known:
            known[kind] = is_ours(kind)
        if known[kind]:
            shown += [as_a_debugger(one), as_a_debugger(getattr(one, "__dict__", ""))]
    return shown


def is_ours(kind: type) -> bool:
    module = getattr(kind, "__module__", None)
    ours = isinstance(module, str) and module.startswith(("embedcore.", "embedcore_openai."))
    return ours and not module.startswith("embedcore.testing")


def quiet(work: Callable[[], object]) -> EmbeddingError | None:
    try:
        work()
    except EmbeddingError as error:
        return error
    return None


@pytest.mark.fault(131)
@pytest.mark.fault(132)
@pytest.mark.fault(52)
@pytest.mark.parametrize("mode", FAULTS)
def test_no_failure_of_the_wire_shows_the_key(
    server: FakeOpenAI, mode: str, canary: str, said: Callable[[], str]
) -> None:
    """Of the environment, with an error that is raised; and that was passed, with one that is
    kept."""
    with (
        EmbeddingClient(config=QUICK) as one,
        EmbeddingClient(config=QUICK, options={"api_key": canary}) as other,
    ):
        server.faults.push(mode, mode, mode)
        error = quiet(lambda: one.embed([TEXT]))
        server.faults.clear()
        asked = len(server.requests)
        server.faults.push(mode, mode, mode)
        kept = quiet(lambda: other.embed([TEXT + "."], on_error="keep"))
        shown = "\n".join(core_objects())
        for found in filter(None, (error, kept)):
            shown += everything_in(found)
            assert canary.encode() not in pickle.dumps(found)
        for client in (one, other):
            assert canary.encode() not in pickle.dumps(client)
    assert 0 < asked < len(server.requests)
    assert shows(canary, shown + said()) == []


def no_state_folder(home: Path) -> object:
    home.parent.mkdir(parents=True, exist_ok=True)
    home.write_text("a file where the folder should be")
    budget = {"daily_token_limit": 100}
    return EmbeddingClient(config=Config(home=home, budget=budget)).embed_text(TEXT)


def wrong_file(home: Path) -> object:
    home.mkdir(parents=True)
    (home / "state.db").write_bytes(b"not a database" * 100)
    return TokenTracker().get_usage_today()


def file_of_settings(text: str) -> Callable[[Path], object]:
    def work(home: Path) -> object:
        home.mkdir(parents=True)
        (home / "e.toml").write_text(text)
        return EmbeddingClient(config=home / "e.toml").embed_text(TEXT)

    return work


def awaited(home: Path) -> object:
    with EmbeddingClient(config={"budget": {"daily_token_limit": 1}}) as client:
        return asyncio.run(client.aembed_texts([TEXT]))


# Each raises an error of ours while a key is in the environment.
MISTAKES: dict[str, Callable[[Path], object]] = {
    "option": lambda _: EmbeddingClient(options={"timeout": -1}),
    "unknown option": lambda _: EmbeddingClient(options={"timeuot": 1}),
    "option of a file": file_of_settings("[options.openai]\ndimensions = -5\n"),
    "bad TOML": file_of_settings("[options.openai\n"),
    "unknown key": file_of_settings("modle = 5\n"),
    "reference": file_of_settings('[options.openai]\napi_key = "$NOT_SET"\n'),
    "model": lambda _: EmbeddingClient("openai:"),
    "provider": lambda _: EmbeddingClient("acme:m"),
    "dimensions": lambda _: EmbeddingClient(options={"dimensions": 9999}).embed_text(TEXT),
    "base URL": lambda _: EmbeddingClient(options={"base_url": "http://example.com"}),
    "scope": lambda _: EmbeddingClient(scope="a b"),
    "state folder": no_state_folder,
    "state file": wrong_file,
    "empty text": lambda _: EmbeddingClient().embed_text(""),
    "input type": lambda _: EmbeddingClient().embed([TEXT], input_type="image"),
    "budget": awaited,
    "fallback": lambda _: EmbeddingClient().batch_embed_texts([TEXT], fallback="error"),
    "tokens": lambda _: TokenTracker(-1),
}


@pytest.mark.fault(131)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_mistake_shows_the_key_of_the_environment(
    server: FakeOpenAI, mistake: str, canary: str, said: Callable[[], str], state_home: Path
) -> None:
    error = quiet(lambda: MISTAKES[mistake](state_home))
    assert error is not None
    assert shows(canary, everything_in(error) + said()) == []
    assert canary.encode() not in pickle.dumps(error)


@pytest.mark.fault(131)
@pytest.mark.parametrize("wrong", [{"timeout": -1}, {"timeuot": 1}, {"headers": {"a\nb": "c"}}])
@pytest.mark.parametrize("by", ["api_key", "options"])
def test_no_mistake_shows_a_key_that_was_passed(
    by: str, wrong: dict[str, object], canary: str, said: Callable[[], str]
) -> None:
    key = {"api_key": canary} if by == "api_key" else {}
    options = wrong if by == "api_key" else {**wrong, "api_key": canary}
    error = quiet(lambda: EmbeddingClient(options=options, **key))  # type: ignore[arg-type]
    assert error is not None
    assert shows(canary, everything_in(error) + said()) == []


@pytest.mark.fault(131)
def test_no_key_reaches_the_state_folder(
    server: FakeOpenAI, canary: str, state_home: Path, said: Callable[[], str]
) -> None:
    """Database and log, while they are open and when they are closed; and no text either."""
    for mode in ("echo_key", "status", "reset", "bad_text"):
        server.faults.push(mode)
    config = {**QUICK, "budget": {"daily_token_limit": 10_000, "daily_cost_limit": 1}}
    with EmbeddingClient(config=config) as client:
        for number in range(6):
            quiet(lambda n=number: client.embed_texts([f"{TEXT} {n}"]))  # type: ignore[misc]
        opened = files_below(state_home)
    assert b"settled" in opened
    for content in (opened, files_below(state_home)):
        assert canary.encode() not in content
        assert TEXT.encode() not in content
    assert TEXT not in said()


@pytest.mark.fault(131)
def test_a_working_program_shows_no_key(
    server: FakeOpenAI, canary: str, said: Callable[[], str]
) -> None:
    client = EmbeddingClient(config=QUICK)
    result = client.embed([TEXT], progress=True)
    functions.embed_texts([TEXT])
    settings = [repr(Config.load()), repr(Config.load().origins), str(Config.load())]
    mine = [repr(client), str(client), repr(vars(client)), repr(result), repr(client.info)]
    mine += [repr(client._engine), repr(client._choice), *settings, *core_objects()]
    assert shows(canary, "\n".join(mine) + said()) == []
    for one in (client, result, Config.load(), TokenTracker(), client.info):
        assert canary.encode() not in pickle.dumps(one)
    assert server.requests[0].headers["authorization"] == f"Bearer {canary}"
    client.close()


def imported(path: Path) -> set[str]:
    """The top-level names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.fault(136)
def test_nothing_that_is_stored_is_a_pickle() -> None:
    picklers = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    for path in Path(PACKAGE).rglob("*.py"):
        found = imported(path) & picklers
        if path.name == "observers.py":
            # It tries what can be pickled. Nothing is written, and nothing is ever read.
            assert set(re.findall(r"pickle\.(\w+)", path.read_text())) == {"dumps"}
            found -= {"pickle"}
        if path.parts[-3:] == ("testing", "contract", "instances.py"):
            # It reads what it has just written, to see whether a key is in it.
            found -= {"pickle"}
        assert not found, path


def test_secrets_show_how_many_they_are(canary: str) -> None:
    assert repr(_Secrets([canary, canary])) == "<2 secrets>"


def test_the_canary_is_seen_where_it_is(canary: str) -> None:
    """The test of the tests: each of these would be found."""
    leak = """
def leak(key):
    hidden = key
    raise EmbeddingError("without it")
"""
    space = {"EmbeddingError": EmbeddingError}
    exec(compile(leak, "<elsewhere>", "exec"), space)
    error = quiet(lambda: space["leak"](canary))  # type: ignore[operator]
    assert error is not None
    assert shows(canary, everything_in(error)) != []
    assert shows(canary, f"token {canary[4:16]}") != []
    assert shows(canary, base64.b64encode(canary.encode()).decode()) != []
