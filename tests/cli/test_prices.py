"""``embedcore models`` with prices that the user reads in, from a file or an address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedcore import prices
from embedcore.testing.openai.http import HttpReply, Listener

TABLE = """
as_of = 2099-01-02
source = "https://acme.example/prices"

[models."openai:text-embedding-3-small"]
price = 0.03

[models."openai:text-embedding-4"]
price = 0.3
batch_price = 0.15
"""


class Prices:
    """A server with one file."""

    def __init__(self, reply: HttpReply) -> None:
        self.reply = reply
        self.asked: list[str] = []

    def unread(self, head: Any) -> None:
        return None

    def spools(self, head: Any) -> bool:
        return False

    def answer(self, request: Any) -> HttpReply:
        self.asked.append(f"{request.path}?{request.query}")
        return self.reply


@pytest.fixture
def serve() -> Any:
    listeners = []

    def start(reply: HttpReply) -> tuple[str, Prices]:
        service = Prices(reply)
        listeners.append(Listener(service))
        return listeners[-1].url, service

    yield start
    for one in listeners:
        one.close()


def test_prices_of_a_file_are_shown_and_used(cli: Callable[..., Any]) -> None:
    Path("p.toml").write_text(TABLE)
    first = cli("models", "openai", "--prices", "p.toml")
    assert first.code == 0
    assert "2 prices from p.toml" in first.err
    assert "openai:text-embedding-4 " in first.out
    assert "2099-01-02, https://acme.example/prices" in first.out
    Path("p.toml").write_text(TABLE.replace("0.03", "0.04"))
    again = cli("models", "openai", "--prices", "p.toml", "--json")
    assert "openai:text-embedding-3-small: 0.03 → 0.04" in again.err
    found = {one["model"]: one["price"] for one in again.json["models"]}
    assert found["openai:text-embedding-3-small"]["dollars_per_million_tokens"] == "0.04"
    assert found["openai:text-embedding-4"]["dollars_per_million_tokens_in_batch"] == "0.15"
    Path("a.csv").write_text("text\n" + "a " * 1000 + "\n")
    plan = cli("embed", "a.csv", "-o", "v.jsonl", "--dry-run", "-m", "openai:text-embedding-4")
    assert "($0.3 per million tokens)" in plan.out


def test_prices_of_the_settings_are_shown(cli: Callable[..., Any]) -> None:
    Path("embedcore.toml").write_text('[models."hashing:7"]\nprice = 0.5\ndimensions = 7\n')
    (row,) = [one for one in cli("models", "--json").json["models"] if one["model"] == "hashing:7"]
    assert (row["dimensions"], row["price"]["dollars_per_million_tokens"]) == (7, "0.5")
    assert row["price"]["source"].endswith("embedcore.toml")
    explained = cli("config", "--explain").out
    assert any(
        "models.hashing:7.price" in line and "0.5" in line and "embedcore.toml" in line
        for line in explained.splitlines()
    )


def test_prices_of_an_address(cli: Callable[..., Any], serve: Any) -> None:
    url, service = serve(HttpReply(body=TABLE.encode()))
    assert cli("models", "--prices", f"{url}/a/prices.toml?v=1").code == 0
    assert service.asked == ["/a/prices.toml?v=1"]
    assert len(prices.kept()) == 2
    assert cli("models").code == 0
    assert len(service.asked) == 1, "never by itself"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (HttpReply(status=404), "answered 404"),
        (HttpReply(status=302, headers={"location": "/b"}), "a redirect is not followed"),
        (HttpReply(body=b"<html>"), "is no table of prices"),
    ],
)
def test_what_is_no_table_changes_nothing(
    cli: Callable[..., Any], serve: Any, reply: HttpReply, said: str
) -> None:
    Path("p.toml").write_text(TABLE)
    cli("models", "--prices", "p.toml")
    url, _ = serve(reply)
    failed = cli("models", "--prices", url)
    assert failed.code == 2
    assert said in failed.err
    assert len(prices.kept()) == 2


def test_no_table_is_read_without_encryption_from_elsewhere(cli: Callable[..., Any]) -> None:
    failed = cli("models", "--prices", "http://acme.example/prices.toml")
    assert failed.code == 2
    assert "unencrypted" in failed.err
    assert cli("models", "--prices", "nowhere.toml").code == 2
