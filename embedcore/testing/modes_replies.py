"""How does the fake answer 200 and yet not get its reply across?

All of these bill: the work was done.
"""

from __future__ import annotations

import gzip
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from embedcore.testing import wire
from embedcore.testing.modes import Exchange, mode

if TYPE_CHECKING:
    from embedcore.testing.wire import HttpReply

_MEGABYTE = 1 << 20


# The way it travels


@mode(bills=True, options=("seconds",))
def late(exchange: Exchange) -> HttpReply:
    """The honest reply after ``seconds`` (1)."""
    return exchange.honest(deliver=wire.late(exchange.number("seconds", 1)))


@mode(bills=True, options=("seconds",))
def slow(exchange: Exchange) -> HttpReply:
    """The honest reply after ``seconds`` (0.05) for each text."""
    seconds = exchange.number("seconds", 0.05) * len(exchange.answer.texts)
    return exchange.honest(deliver=wire.late(seconds))


@mode(bills=True, options=("interval",))
def drip(exchange: Exchange) -> HttpReply:
    """The honest reply with ``interval`` seconds (1) before every byte of its body."""
    return exchange.honest(deliver=wire.drip(exchange.number("interval", 1)))


@mode(bills=True, options=("share",))
def truncated(exchange: Exchange) -> HttpReply:
    """A ``share`` (0.5) of the body that content-length announced, then the end."""
    return exchange.honest(deliver=wire.cut_off(exchange.number("share", 0.5)))


@mode(bills=True, options=("share",))
def short_chunk(exchange: Exchange) -> HttpReply:
    """As ``truncated``, inside a chunk of a chunked body."""
    return exchange.honest(deliver=wire.cut_off(exchange.number("share", 0.5), chunked=True))


@mode(bills=True, options=("limit",))
def endless(exchange: Exchange) -> HttpReply:
    """The honest body, then white space without end (``limit`` bytes, 4 GB, end the fake's)."""
    return exchange.honest(deliver=wire.endless(int(exchange.number("limit", 1 << 32))))


@mode(bills=True)
def close_after(exchange: Exchange) -> HttpReply:
    """The honest reply, then the connection ends unannounced: the next call finds it closed."""
    return exchange.honest(deliver=wire.whole_then_close)


# The body as bytes


@mode(bills=True, options=("body", "status", "content_type"))
def raw(exchange: Exchange) -> HttpReply:
    """``body`` to the letter, with ``status`` (200) and ``content_type``."""
    return exchange.replied(
        exchange.text("body", "").encode("utf-8", "surrogatepass"),
        status=int(exchange.number("status", 200)),
        headers={"content-type": exchange.text("content_type", "application/json")},
    )


@mode(bills=True, options=("share",))
def cut_json(exchange: Exchange) -> HttpReply:
    """A whole reply whose JSON stops after a ``share`` (0.5)."""
    body = exchange.body()
    return exchange.rewritten(body[: int(len(body) * exchange.number("share", 0.5))])


@mode(bills=True)
def broken_json(exchange: Exchange) -> HttpReply:
    """Honest but for a bracket in the wrong place."""
    return exchange.rewritten(exchange.body().replace(b"]", b"}", 1))


@mode(bills=True)
def html(exchange: Exchange) -> HttpReply:
    """The page of a proxy, with status 200, the request's key in it."""
    key = exchange.request.headers.get("authorization", "")
    page = f"<!doctype html><title>Welcome</title><p>{key}</p>" + "<p>please log in</p>" * 200
    return exchange.replied(page.encode(), headers={"content-type": "text/html"})


@mode(bills=True, options=("content_type",))
def wrong_type(exchange: Exchange) -> HttpReply:
    """The honest reply called ``content_type`` (text/plain); "" leaves the header out."""
    reply = exchange.honest()
    media = exchange.text("content_type", "text/plain")
    headers = {name: value for name, value in reply.headers.items() if name != "content-type"}
    headers |= {"content-type": media} if media else {}
    return replace(reply, headers=headers)


@mode(bills=True, options=("size",))
def gzip_bomb(exchange: Exchange) -> HttpReply:
    """The honest reply behind ``size`` bytes (256 MB) of white space, compressed a thousandfold."""
    size = int(exchange.number("size", 256 * _MEGABYTE))
    body = _compressed_space(size) + gzip.compress(exchange.body())
    return exchange.rewritten(body, **{"content-encoding": "gzip"})


@cache
def _compressed_space(size: int) -> bytes:
    # Members of a gzip stream may follow one another, so one block is compressed and repeated.
    whole, rest = divmod(size, _MEGABYTE)
    return gzip.compress(b" " * _MEGABYTE) * whole + gzip.compress(b" " * rest)


@mode(bills=True)
def leading_space(exchange: Exchange) -> HttpReply:
    """The honest reply behind white space, as keep-alive padding puts it there."""
    return exchange.rewritten(b" \n" * 6 + exchange.body())


@mode(bills=True)
def duplicate_keys(exchange: Exchange) -> HttpReply:
    """An ``index`` twice in one object; a reader that takes the last one finds nothing amiss."""
    return exchange.rewritten(exchange.body().replace(b'"index":0', b'"index":1,"index":0', 1))
