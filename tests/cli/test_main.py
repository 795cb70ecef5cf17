"""Which command is meant, what does its end mean, and does it keep quiet about keys?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from embedcore import errors
from embedcore.cli import app, main, process as exits
from embedcore.cli.options import Group

COMMANDS = [*app.COMMANDS, *app.ALIASES]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_helps(cli, name):
    run = cli(name, "--help")
    assert run.code == 0, run.err
    assert run.out.startswith(f"Usage: embedcore {name}")


@pytest.mark.parametrize("name", app.COMMANDS)
def test_the_lines_of_help_are_true(name):
    command = app.group.get_command(None, name)
    assert command is not None
    assert command.name == name
    assert f"\n  {name} " in app.group.get_help(app.click.Context(app.group, info_name="embedcore"))


def groups(command, *path):
    """The names that lead to each group of commands, and the group."""
    if isinstance(command, click.Group):
        yield path, command
        for name in command.list_commands(None):
            yield from groups(command.get_command(None, name), *path, name)


# They are commands themselves.
SPEAKING = [("budget",), ("cache",)]


@pytest.mark.case("F8")
def test_a_group_without_a_command_shows_its_help(cli):
    found = dict(groups(app.group))
    assert {(), ("batch",)} <= found.keys() - SPEAKING
    for path, group in found.items():
        assert isinstance(group, Group)
        if path not in SPEAKING:
            run = cli(*path)
            assert (run.code, run.err) == (0, "")
            assert run.out == cli(*path, "--help").out
            assert run.out.startswith(" ".join(["Usage: embedcore", *path]))


@pytest.mark.case("F8")
def test_so_it_does_with_options_alone_and_one_level_further_down(cli):
    assert cli("--verbose").out == cli("--help").out

    @click.group(cls=Group)
    def outer():
        """Commands."""

    @outer.group("inner")
    @click.option("--loud", is_flag=True)
    def inner(loud):
        raise AssertionError("it has no command to prepare")

    assert isinstance(inner, Group)
    for path in ([], ["inner"], ["inner", "--loud"]):
        ran = CliRunner().invoke(outer, path)
        wanted = CliRunner().invoke(outer, [*path[:1], "--help"])
        assert (ran.exit_code, ran.stdout, ran.stderr) == (0, wanted.stdout, "")
    assert CliRunner().invoke(outer, ["nothing"]).exit_code == 2


def test_help_lists_every_exit_code(cli):
    shown = cli("--help").out
    for code, meaning in exits.MEANINGS.items():
        assert re.search(rf"^ +{code}  {re.escape(meaning)}$", shown, re.MULTILINE), code


def test_version(cli):
    run = cli("--version")
    assert run.code == 0
    assert re.fullmatch(r"embedcore \d+\.\d+\.\d+\S*\n", run.out)


def test_a_typing_mistake_gets_a_hint(cli):
    run = cli("emebd", "x.txt")
    assert run.code == 2
    assert "Did you mean 'embed'?" in run.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigurationError("x"), 2),
        (errors.UnknownProvider("x"), 2),
        (errors.InputTooLong("x"), 2),
        (errors.TokenBudgetExceeded("x"), 3),
        (errors.CostBudgetExceeded("x"), 3),
        (errors.RateLimited("x"), 4),
        (errors.ProviderUnavailable("x"), 4),
        (errors.OutcomeUnknown("x"), 4),
        (errors.AuthenticationFailed("x"), 1),
        (errors.QuotaExhausted("x"), 1),
        (errors.InvalidResponse("x"), 1),
        (errors.StorageBusy("x"), 5),
        (errors.StorageCorrupt("x"), 5),
        (RuntimeError("x"), 70),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_kind_of_error_has_its_code(cli, monkeypatch, error, code):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("embedcore.cli.models.found_providers", fail)
    run = cli("providers")
    assert run.code == code
    assert run.err.startswith("Error: ")
    assert "Traceback" not in run.err
    assert "Traceback" in cli("providers", "--verbose").err
    answer = cli("providers", "--json")
    assert answer.code == code
    assert answer.json["error"]["type"] == type(error).__name__


def test_every_error_of_ours_has_a_code():
    pending = [errors.EmbeddingError]
    while pending:
        kind = pending.pop()
        assert exits.code_of(kind("x")) in exits.MEANINGS
        pending += kind.__subclasses__()


@pytest.mark.parametrize(
    ("mode", "options", "code"),
    [
        ("status", {"status": 500}, 4),
        ("quota_exhausted", {}, 1),
        ("redirect", {}, 2),
    ],
)
def test_a_server_that_fails(cli, server, monkeypatch, mode, options, code):
    Path("embedcore.toml").write_text("[retry]\nattempts = 1\n")
    server.faults.always(mode, **options)
    run = cli("embed", "-c", "x", "--json")
    assert run.code == code, run.err
    assert run.json["error"]["message"]
    assert run.err.count("Error: ") == 1


@pytest.mark.fault(131)
@pytest.mark.fault(132)
@pytest.mark.parametrize("verbose", [[], ["--verbose"]], ids=["plain", "verbose"])
def test_a_key_is_never_shown(cli, server, monkeypatch, canary, verbose, state_home):
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    Path("t.txt").write_text("a\nb\n")
    server.faults.push("echo_key")
    shown = ""
    for command in (
        ["embed", "-c", "x"],
        ["embed", "t.txt", "-o", "o.npy"],
        ["embed", "t.txt", "-o", "o.npy", "--json"],
        ["config", "--explain"],
        ["config", "--json"],
        ["doctor"],
        ["doctor", "--json"],
        ["usage", "--audit"],
        ["models"],
        ["providers"],
        ["budget"],
        ["cache"],
    ):
        run = cli(*command, *verbose)
        shown += run.out + run.err
    shown += "".join(
        path.read_bytes().decode("latin-1") for path in state_home.rglob("*") if path.is_file()
    )
    assert canary not in shown
    assert canary[3:] not in shown
    assert "OPENAI_API_KEY" in shown


@pytest.mark.fault(131)
def test_a_key_in_a_fault_of_our_own_is_hidden(cli, monkeypatch, canary):
    monkeypatch.setenv("SOME_API_KEY", canary)

    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot parse {canary}")

    monkeypatch.setattr("embedcore.cli.models.found_providers", fail)
    for more in ([], ["--verbose"], ["--json"]):
        run = cli("providers", *more)
        assert run.code == 70
        assert canary not in run.out + run.err


def test_json_answers_are_one_object_on_standard_output(cli, server):
    for command in (
        ["models"],
        ["providers"],
        ["usage"],
        ["budget"],
        ["cache"],
        ["config"],
        ["doctor"],
    ):
        run = cli(*command, "--json")
        assert isinstance(run.json, dict), command
        assert run.err == ""
        json.dumps(run.json)


def test_main_may_be_called_outside_of_the_main_thread(capsys):
    import threading

    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["models"])))
    thread.start()
    thread.join()
    assert codes == [0]
