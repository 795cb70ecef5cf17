"""Requests that are signed, and a context of one's own for TLS."""

from __future__ import annotations

import hashlib
import hmac
import traceback
from collections.abc import Callable, Iterator, Mapping

import pytest
from wires import KEY, Peer, Server, asked, call, reply

from embedcore.errors import AuthenticationFailed, ConfigurationError, PermissionDenied
from embedcore.provider import http


def signed(unsigned: http.Unsigned) -> Mapping[str, str]:
    """As the services that want signatures have it: over the method, the address and the body."""
    told = f"{unsigned.method} {unsigned.url} {unsigned.headers['Accept']}".encode()
    mac = hmac.new(KEY.encode(), told + unsigned.body, hashlib.sha256)
    return {"authorization": f"Signature {mac.hexdigest()}", "X-Date": "now"}


@pytest.fixture
def server() -> Iterator[Server]:
    def script(peer: Peer) -> None:
        while peer.read() is not None:
            peer.write(reply(b"{}"))

    server = Server(script)
    yield server
    server.close()


def test_each_request_is_signed_as_it_is_sent(server: Server) -> None:
    session = http.Session(server.url, sign=signed)
    for body in (b"{}", b'{"input": ["a"]}'):
        session.send(call(body, query={"version": "1 2"}), asked()).release()
        head = server.heads[-1]
        told = f"POST {server.url}/embeddings?version=1+2 */*".encode() + body
        expected = hmac.new(KEY.encode(), told, hashlib.sha256).hexdigest()
        # In place of the one that the call has, whatever its case.
        assert f"authorization: Signature {expected}" in head
        assert "Bearer" not in head
        assert "X-Date: now" in head
    session.close()


def fails(unsigned: http.Unsigned) -> Mapping[str, str]:
    raise ValueError(KEY)


def refuses(unsigned: http.Unsigned) -> Mapping[str, str]:
    raise PermissionDenied("no role", billed="no")


@pytest.mark.parametrize(
    ("sign", "error"), [(fails, AuthenticationFailed), (refuses, PermissionDenied)]
)
def test_what_cannot_be_signed_is_not_sent(
    server: Server, sign: Callable[[http.Unsigned], Mapping[str, str]], error: type[Exception]
) -> None:
    session = http.Session(server.url, sign=sign)
    with pytest.raises(error) as caught:
        session.send(call(), asked())
    session.close()
    assert caught.value.billed == "no"  # type: ignore[attr-defined]
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert server.billed == 0


def test_a_body_in_pieces_is_not_signed(server: Server) -> None:
    session = http.Session(server.url, sign=signed)
    with pytest.raises(ConfigurationError, match="signed"):
        session.send(call(iter([b"{}"])), asked())
    session.close()
    assert server.billed == 0
