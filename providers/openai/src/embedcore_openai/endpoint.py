"""May requests, and keys, go to this address?"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

from embedcore.errors import ConfigurationError

Reach: TypeAlias = Literal["loopback", "private", "public"]

DEFAULT_BASE_URL: Final = "https://api.openai.com/v1"

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_PRIVATE_SUFFIXES: Final = (".local", ".internal", ".lan", ".home.arpa", ".localdomain")
_UNSAFE: Final = re.compile(r"[\x00-\x20\x7f-\x9f\\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """A base URL that was checked: ``url`` has no credentials, no query and no final slash."""

    url: str
    host: str
    plaintext: bool
    reach: Reach

    @property
    def is_openai(self) -> bool:
        return self.host == "api.openai.com" or self.host.endswith(".api.openai.com")


def parse(base_url: str) -> Endpoint:
    """Check and normalise a base URL; equal servers get equal texts.

    Raises ``ConfigurationError``, which never quotes the address: it may contain a password.
    """
    if _UNSAFE.search(base_url):
        raise ConfigurationError("base_url contains white space, a backslash or control characters")
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError:
        raise ConfigurationError("base_url is not a valid URL") from None
    _refuse_secrets(parts)
    host = parts.hostname or ""
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise ConfigurationError(
            f"base_url must be an http:// or https:// address, such as {DEFAULT_BASE_URL}"
        )
    shown = f"[{host}]" if ":" in host else host
    where = shown if port in (None, _DEFAULT_PORTS[parts.scheme]) else f"{shown}:{port}"
    return Endpoint(
        url=f"{parts.scheme}://{where}{parts.path.rstrip('/')}",
        host=host,
        plaintext=parts.scheme == "http",
        reach=reach(host),
    )


def _refuse_secrets(parts: SplitResult) -> None:
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            "base_url contains a user name or password: pass them as a header "
            '(headers = {Authorization = "$VARIABLE"}), where they stay out of logs'
        )
    if parts.query or parts.fragment:
        raise ConfigurationError(
            "base_url contains a query or fragment: parameters belong in the option query, "
            'as in query = {"api-version" = "…"}, and a key in api_key or a header'
        )


def reach(host: str) -> Reach:
    """How far a host name goes, judged without asking the network.

    A name without a dot (a container's name) and the suffixes reserved for local networks count
    as private. Unusual spellings of an address, such as ``0x7f000001``, count as public.
    """
    if host == "localhost" or host.endswith(".localhost"):
        return "loopback"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        named = "." not in host and re.fullmatch(r"(?=.*[a-z])(?!0x)[a-z0-9_-]+", host)
        return "private" if named or host.endswith(_PRIVATE_SUFFIXES) else "public"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_loopback:
        return "loopback"
    shared = isinstance(address, ipaddress.IPv4Address) and address in _CARRIER_NETWORK
    return "private" if shared or address.is_private or address.is_link_local else "public"


_CARRIER_NETWORK: Final = ipaddress.ip_network("100.64.0.0/10")
