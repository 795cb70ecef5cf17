"""Where the requests of a provider go, and the key that goes with them."""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

from embedcore.errors import AuthenticationFailed, ConfigurationError, EmbeddingError

if TYPE_CHECKING:
    from pydantic import SecretStr

Reach: TypeAlias = Literal["loopback", "private", "public"]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_PRIVATE_SUFFIXES: Final = (".local", ".internal", ".lan", ".home.arpa", ".localdomain")
_UNSAFE: Final = re.compile(r"[\x00-\x20\x7f-\x9f\\]")
_CARRIER_NETWORK: Final = ipaddress.ip_network("100.64.0.0/10")

_log = logging.getLogger("embedcore.http")
_warned: set[str] = set()


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """A base URL that was checked: ``url`` has no credentials, no query and no final slash."""

    url: str
    host: str
    plaintext: bool
    reach: Reach


def parse(base_url: str, *, such_as: str) -> Endpoint:
    """Check and normalise a base URL; equal servers get equal texts. ``such_as``: a good one.

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
            f"base_url must be an http:// or https:// address, such as {such_as}"
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
            "base_url contains a user name or password: a key belongs in api_key or, where the "
            'provider has that option, in headers (Authorization = "$VARIABLE"), where it stays '
            "out of logs"
        )
    if parts.query or parts.fragment:
        raise ConfigurationError(
            "base_url contains a query or fragment: a key belongs in api_key, and parameters in "
            'the option query, where the provider has one, as in query = {"api-version" = "…"}'
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


def refuse_plaintext(endpoint: Endpoint, *, allowed: bool) -> None:
    """Texts and key go unencrypted to no public host. Raises ``ConfigurationError``."""
    if endpoint.plaintext and endpoint.reach == "public" and not allowed:
        raise ConfigurationError(
            f"base_url uses http:// to the public host {endpoint.host}: texts and key would "
            "travel unencrypted. Use https://, or set allow_plaintext = true"
        )


def warn_of_readers(endpoint: Endpoint, *, verified: bool) -> None:
    """Say once for each address that others can read what is sent there. ``verified``: its
    certificate is checked."""
    if endpoint.url in _warned:
        return
    if endpoint.plaintext and endpoint.reach == "private":
        why = "is not encrypted: anyone on that network"
    elif not verified and not endpoint.plaintext and endpoint.reach != "loopback":
        why = "is not checked (verify = false): a program that answers in its place"
    else:
        return
    _warned.add(endpoint.url)
    _log.warning("%s %s can read texts and key", endpoint.url, why)


def key_of(
    given: SecretStr | Callable[[], str] | None,
    endpoint: Endpoint,
    *,
    variable: str,
    keys_at: str,
) -> str | None:
    """The key for one request; None where none is sent.

    ``given``, and what it raises: as for ``given_key``. ``variable``: of the environment, where it
    comes from. ``keys_at``: where keys are made. Without a key only servers on loopback or private
    addresses are called; for others it raises ``ConfigurationError``.
    """
    key = given_key(given, where=variable)
    if key is None and endpoint.reach == "public":
        raise ConfigurationError(
            f"no API key for {endpoint.url}: set the environment variable {variable} "
            f"(export {variable}=…), or the option api_key. Keys are made at {keys_at}"
        )
    return key


def given_key(given: SecretStr | Callable[[], str] | None, *, where: str) -> str | None:
    """The key that an option holds; None where that is nothing, or blank.

    A callable is asked. ``where``: the place that a key which cannot be one is to be mended in.
    Raises ``AuthenticationFailed`` where the callable fails, and ``ConfigurationError``; the key
    is in neither.
    """
    key: object = given
    if callable(given):
        try:
            key = given()
        except EmbeddingError:
            raise
        except Exception as error:
            raise AuthenticationFailed(
                f"the callable given as api_key failed with {type(error).__name__}"
            ) from error
    if hasattr(key, "get_secret_value"):
        key = key.get_secret_value()
    if key is not None and not isinstance(key, str):
        raise ConfigurationError(f"api_key gave a {type(key).__name__} instead of a string")
    if not key or not key.strip():
        return None
    if not all("!" <= character <= "~" for character in key):
        raise ConfigurationError(
            "the API key contains white space, line breaks or characters beyond ASCII: "
            f"copy it again, without a line end, into {where}"
        )
    return key
