"""Do ``doctor``, ``config`` and ``providers`` say what is there and what is wrong?"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from embedcore.cli.models import Found, _provider_row
from embedcore.provider import registry


@pytest.fixture
def broken_plugin(monkeypatch, tmp_path):
    """A distribution whose provider cannot be imported, beside the sound ones."""
    site = tmp_path / "site"
    info = site / "embedcore_bad-0.3.dist-info"
    info.mkdir(parents=True)
    (site / "embedcore_bad.py").write_text("import a_module_that_is_not_there\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: embedcore-bad\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[embedcore]\nbad = embedcore_bad\n")
    monkeypatch.syspath_prepend(str(site))
    registry._load.cache_clear()
    yield "embedcore-bad"
    registry._load.cache_clear()
    sys.modules.pop("embedcore_bad", None)


def findings(run):
    return {(one["section"], one["name"]): one for one in run.json["findings"]}


def test_a_sound_installation(cli):
    run = cli("doctor", "--json")
    assert run.code == 0, run.json
    found = findings(run)
    assert found["versions", "python"]["value"].startswith(".".join(map(str, sys.version_info[:3])))
    for name in ("embedcore", "embedcore-openai", "openai", "sqlite-utils", "numpy"):
        assert found["versions", name]["value"][0].isdigit()
    assert found["keys", "openai"]["value"] == "not set: OPENAI_API_KEY would set it"
    assert "SQLite" in {name for _, name in found}
    assert "no problem found" in cli("doctor").out
    assert not Path(os.environ["EMBEDCORE_HOME"]).exists(), "looking creates nothing"


@pytest.mark.parametrize(("model", "level"), [("hashing:256", "note"), ("parts:m", "problem")])
def test_what_a_provider_is_made_of_is_needed_by_who_uses_it(
    cli, name_settings, monkeypatch, tmp_path, model, level
):
    info = tmp_path / "site" / "embedcore_parts-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: embedcore-parts\nVersion: 0.3\nRequires-Dist: a-part>=1\n"
    )
    (info / "entry_points.txt").write_text("[embedcore]\nparts = embedcore_hashing.plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    name_settings(f'model = "{model}"\n')
    found = findings(cli("doctor", "--json"))["versions", "a-part"]
    assert (found["value"], found["level"]) == ("not installed", level)
    listed = {one["name"]: one["missing"] for one in cli("providers", "--json").json["providers"]}
    assert listed["parts"] == ["a-part"]


def test_a_provider_without_what_it_is_made_of_is_not_shown_as_sound():
    one = Found(name="a", distribution="embedcore-a", version="1", problem=None, missing=("b", "c"))
    assert _provider_row(one)[-1] == "without b, c"
    assert _provider_row(replace(one, problem="no"))[-1] == "broken"


def test_each_section_has_one_heading(cli, server):
    assert cli("embed", "-c", "one").code == 0
    headings = [line for line in cli("doctor").out.splitlines() if not line.startswith(" ")]
    assert "rate limits" in headings
    assert len(headings) == len(set(headings))


@pytest.mark.fault(111)
def test_an_old_sqlite_is_explained(cli, monkeypatch):
    monkeypatch.setattr("embedcore.cli.doctor.engine_version", lambda: "3.46.0")
    run = cli("doctor", "--json")
    assert "TRUNCATE" in findings(run)["state", "journal"]["value"]


@pytest.mark.fault(122)
def test_a_broken_plugin_is_named_and_disturbs_nothing_else(cli, broken_plugin):
    run = cli("providers", "--json")
    assert run.code == 1
    problems = {one["name"]: one["problem"] for one in run.json["providers"]}
    assert "a_module_that_is_not_there" in problems["bad"]
    assert problems["hashing"] is None
    assert "embedcore-bad" in cli("plugins").out
    doctor = cli("doctor", "--json")
    assert doctor.code == 1
    assert findings(doctor)["providers", "bad"]["level"] == "problem"
    models = cli("models")
    assert models.code == 0
    assert "hashing:512" in models.out
    assert "a_module_that_is_not_there" in models.err
    assert cli("embed", "-c", "x", "-m", "hashing:8").code == 0
    assert cli("models", "bad").code == 2


def test_no_provider_at_all_names_the_install_command(cli, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_LOAD_PLUGINS", "")
    for command in ("providers", "doctor"):
        assert re.search(r"pip install \S+providers/openai", cli(command).out)
    assert re.search(r"pip install \S+providers/openai", cli("models").err)


def test_models_of_one_provider(cli):
    run = cli("models", "openai", "--json")
    small = next(one for one in run.json["models"] if one["model"].endswith("-3-small"))
    assert small["dimensions"] == 1536
    assert small["max_input_tokens"] == 8191
    assert small["price"]["dollars_per_million_tokens"] == "0.02"
    assert small["price"]["dollars_per_million_tokens_in_batch"] == "0.01"
    assert small["price"]["source"].startswith("https://")
    assert all(one["model"].startswith("openai:") for one in run.json["models"])
    assert cli("models", "nosuch").code == 2


@pytest.mark.fault(141)
def test_proxies_and_certificates_are_shown_without_credentials(cli, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://someone:hunter2hunter2@proxy.local:3128")
    monkeypatch.setenv("NO_PROXY", "localhost,.internal")
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file.pem")
    run = cli("doctor", "--json")
    found = findings(run)
    assert found["network", "https proxy"]["value"] == "http://proxy.local:3128"
    assert found["network", "no proxy"]["value"] == "localhost,.internal"
    assert found["network", "SSL_CERT_FILE"]["level"] == "problem"
    assert "hunter2" not in run.out + cli("doctor").out


@pytest.mark.fault(129)
def test_a_wrong_setting_is_a_finding_here_and_an_error_elsewhere(cli):
    Path("embedcore.toml").write_text("modle = 'x'\n")
    run = cli("doctor", "--json")
    assert run.code == 1
    assert "'model'" in findings(run)["settings", "configuration"]["value"]
    other = cli("config")
    assert other.code == 2
    assert "embedcore.toml" in other.err
    assert "did you mean 'model'" in other.err


@pytest.mark.parametrize(
    "wrong", ["model = 'nosuch:x'", "[options.openai]\nbase_url = 'https://a.b'"]
)
def test_one_thing_that_is_wrong_is_one_finding(cli, wrong):
    Path("embedcore.toml").write_text(f"{wrong}\n")
    run = cli("doctor", "--json")
    (problem,) = [one["value"] for one in run.json["findings"] if one["level"] == "problem"]
    assert run.json["problems"] == 1
    assert run.out.count(json.dumps(problem)[1:-1]) == 1
    shown = cli("doctor").out
    assert "1 problem\n" in shown
    first, *more = problem.split("\n")
    assert first in shown
    assert all(f"   {line}" in shown for line in more)


def test_a_variable_that_nothing_reads_is_noticed(cli, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_DAYLY_TOKEN_LIMIT", "5")
    run = cli("doctor")
    assert run.code == 1
    assert "did you mean EMBEDCORE_DAILY_TOKEN_LIMIT" in run.out


@pytest.mark.fault(137)
@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_that_others_can_read_or_change_are_noticed(cli, server, state_home):
    Path("embedcore.toml").write_text('scope = "a"\n')
    Path("embedcore.toml").chmod(0o600)
    assert cli("embed", "-c", "x").code == 0
    assert cli("doctor").code == 0
    (state_home / "state.db").chmod(0o644)
    run = cli("doctor")
    assert run.code == 1
    assert "chmod 600" in run.out
    (state_home / "state.db").chmod(0o600)
    Path("embedcore.toml").chmod(0o620)
    assert "can be changed by its group  (note)" in cli("doctor").out
    Path("embedcore.toml").chmod(0o666)
    run = cli("doctor")
    assert run.code == 1
    assert "can be changed by everybody (chmod o-w)" in run.out


def test_a_damaged_state_file_is_a_finding(cli, state_home):
    state_home.mkdir()
    (state_home / "state.db").write_bytes(b"not a database" * 100)
    (state_home / "state.db").chmod(0o600)
    run = cli("doctor")
    assert run.code == 1
    assert "damaged" in run.out
    assert cli("usage").code == 5


def test_a_reference_to_a_variable_that_is_not_set(cli, monkeypatch, name_settings):
    name_settings('[options.openai]\napi_key = "$TEAM_KEY"\n')
    run = cli("doctor")
    assert run.code == 1
    assert "$TEAM_KEY, which is not set" in run.out
    assert "$TEAM_KEY (not set)" in cli("config").out
    monkeypatch.setenv("TEAM_KEY", "sk-CANARY-0123456789")
    assert "$TEAM_KEY (set)" in cli("config").out
    assert "CANARY" not in cli("config", "--explain").out + cli("doctor").out


def test_config_explains_where_each_value_comes_from(cli, monkeypatch, name_settings):
    name_settings(
        'model = "hashing:64"\n[profiles.p]\nmodel = "openai:x"\n[profiles.p.options]\n'
        'base_url = "https://user:secret@host/v1"\nheaders = { x-api = "$HEADER" }\n'
        "[budget]\ndaily_token_limit = 900\n"
    )
    monkeypatch.setenv("EMBEDCORE_SCOPE", "team")
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "800")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:password@other/v1")
    run = cli("config", "--json")
    found = {one["path"]: one for one in run.json["settings"]}
    assert found["model"]["value"] == "hashing:64"
    assert found["model"]["origin"].endswith("embedcore.toml")
    assert found["scope"]["origin"] == "environment EMBEDCORE_SCOPE"
    assert found["retry.attempts"]["origin"] == "default"
    assert found["budget.daily_token_limit"]["value"] == "800"
    assert found["budget.daily_token_limit"]["origin"] == "environment EMBEDCORE_DAILY_TOKEN_LIMIT"
    assert found["options.openai.base_url"]["value"] == "https://other/v1"
    assert found["profiles.p.options.base_url"]["value"] == "https://host/v1"
    shown = cli("config", "--explain").out
    assert "SET BY" in shown
    assert "secret" not in shown + run.out
    assert "password" not in shown + run.out
    assert "SET BY" not in cli("config").out


def test_options_of_a_provider_that_is_not_there_are_hidden(cli, name_settings):
    name_settings('[options.acme]\ntoken = "sk-CANARY-0123456789"\nsize = 3\n')
    run = cli("config", "--explain")
    assert run.code == 0
    assert "CANARY" not in run.out
    assert "options.acme.token" in run.out
