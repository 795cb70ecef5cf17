"""Presets: what is known of servers with OpenAI's API, as data. ``preset = "vllm"`` names a row.

A row gives options of the provider the values that fit the server; what is set beside it goes
over them. Nothing in a row is about prices: who runs a server decides that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final

from embedcore.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One kind of server.

    ``options``: of ``OpenAIOptions``. ``source``: where the row was read. ``address``: the form of
    a ``base_url`` that only its user knows; None where ``options`` has one. ``note``: what else to
    know.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    source: str
    address: str | None = None
    note: str = ""


_OPENAI_NAMES: Final = (
    "text-embedding-3-small",
    "text-embedding-3-large",
    "text-embedding-ada-002",
    "text-embedding-ada-002-v2",
)


def _row(
    base_url: str,
    max_texts: int,
    encoding: str,
    truncation: str,
    source: str,
    *,
    sent_as: str = "dimensions",
    note: str = "",
    **more: Any,
) -> Preset:
    """``base_url``: with ``{…}`` in it, it is a form that the user fills in."""
    form = "{" in base_url
    options = {
        **({} if form else {"base_url": base_url}),
        "max_texts_per_request": max_texts,
        "encoding": encoding,
        "truncation": truncation,
        "dimensions_field": sent_as,
        **more,
    }
    return Preset(options=options, source=source, address=base_url if form else None, note=note)


# Read in November 2026. "source": the server's own code or its machine-readable specification;
# "documents": the vendor's pages; "reports": of users, from live calls. A client's constant is one
# that the vendor's or LangChain's client sends.
PRESETS: Final[Mapping[str, Preset]] = {
    "other": _row(
        "{any address}",
        16,
        "omit",
        "unknown",
        "what every server takes that takes anything",
        note="for a server of which nothing is known",
    ),
    "azure-v1": _row(
        "https://{resource}.openai.azure.com/openai/v1",
        2048,
        "base64",
        "error",
        "documents; recordings of Foundry",
        reply_models=_OPENAI_NAMES,
        note="`base_model` names the model behind the deployment",
    ),
    "azure-classic": _row(
        "https://{resource}.openai.azure.com/openai/deployments/{deployment}",
        2048,
        "base64",
        "error",
        "documents; recordings of classic resources",
        query={"api-version": "2024-10-21"},
        reply_models=_OPENAI_NAMES,
        note='the key is a header: `headers = { api-key = "$…" }`',
    ),
    "gemini-openai": _row(
        "https://generativelanguage.googleapis.com/v1beta/openai",
        100,
        "omit",
        "unknown",
        "reports (base64 is refused, index 0 is left out)",
        note="the provider `gemini` knows more",
    ),
    "mistral": _row(
        "https://api.mistral.ai/v1",
        256,
        "float",
        "error",
        "its specification; reports (16,384 tokens in a request)",
        sent_as="output_dimension",
        max_tokens_per_request=16_384,
        note="the provider `mistral` knows more",
    ),
    "voyage": _row(
        "https://api.voyageai.com/v1",
        1000,
        "base64",
        "error",
        "its specification",
        sent_as="output_dimension",
        body={"truncation": False},
        note="the provider `voyage` knows more",
    ),
    "jina": _row(
        "https://api.jina.ai/v1",
        512,
        "omit",
        "error",
        "reports; documents",
        body={"truncate": False, "normalized": True},
    ),
    "openrouter": _row(
        "https://openrouter.ai/api/v1",
        64,
        "float",
        "unknown",
        "its specification; recordings",
        body={"provider": {"allow_fallbacks": False}},
        note="no other host of the same model is fallen back to",
    ),
    "together": _row(
        "https://api.together.xyz/v1", 32, "omit", "unknown", "its specification", sent_as="none"
    ),
    "fireworks": _row(
        "https://api.fireworks.ai/inference/v1",
        256,
        "omit",
        "error",
        "its specification (unknown fields are refused)",
    ),
    "deepinfra": _row(
        "https://api.deepinfra.com/v1/openai",
        1024,
        "float",
        "silent",
        "documents; a client's constant",
    ),
    "siliconflow": _row(
        "https://api.siliconflow.cn/v1",
        32,
        "float",
        "error",
        "documents (32 texts); reports (64)",
    ),
    "dashscope": _row(
        "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        10,
        "float",
        "error",
        "reports; documents",
    ),
    "zhipu": _row("https://open.bigmodel.cn/api/paas/v4", 64, "omit", "error", "documents"),
    "nvidia-nim": _row(
        "https://integrate.api.nvidia.com/v1",
        32,
        "float",
        "error",
        "documents; clients' constants (20 and 50 texts)",
        body={"truncate": "NONE"},
        note="some models also need `input_type`: write the whole `body`",
    ),
    "cloudflare": _row(
        "https://api.cloudflare.com/client/v4/accounts/{account}/ai/v1",
        100,
        "omit",
        "unknown",
        "reports of 2023 and 2024",
        sent_as="none",
    ),
    "databricks": _row(
        "https://{workspace}/serving-endpoints",
        150,
        "omit",
        "error",
        "documents; general knowledge (150 texts)",
        sent_as="none",
    ),
    "ollama": _row(
        "http://localhost:11434/v1",
        64,
        "base64",
        "silent",
        "its source of 2026-08-21",
        note="the provider `ollama` has long texts refused",
    ),
    "lmstudio": _row("http://localhost:1234/v1", 64, "float", "unknown", "reports", sent_as="none"),
    "llamacpp": _row(
        "http://localhost:8080/v1", 64, "base64", "error", "its source of 2026", sent_as="none"
    ),
    "vllm": _row(
        "http://localhost:8000/v1",
        256,
        "base64",
        "error",
        "its source (055e47c, 2026)",
        note="`dimensions` for matryoshka models only",
    ),
    "sglang": _row(
        "http://localhost:30000/v1",
        256,
        "float",
        "error",
        "reports",
        note="`dimensions` for matryoshka models only",
    ),
    "tei": _row(
        "http://localhost:8080/v1",
        32,
        "base64",
        "silent",
        "its specification, 1.9.3",
        note="its `/info` has `max_client_batch_size` and `auto_truncate`",
    ),
    "infinity": _row("http://localhost:7997", 2048, "base64", "silent", "its source, 0.0.78"),
    "xinference": _row(
        "http://localhost:9997/v1", 64, "float", "unknown", "its source of 2026-08-23"
    ),
    "localai": _row(
        "http://localhost:8080/v1",
        32,
        "base64",
        "unknown",
        "its source of 2026-08-22",
        sent_as="none",
    ),
    "gpustack": _row("http://{host}/v1", 16, "float", "unknown", "its source: the backend's rules"),
    "litellm-proxy": _row(
        "http://localhost:4000/v1",
        64,
        "omit",
        "unknown",
        "its source, 1.110.2: the upstream's rules",
    ),
}

NO_PRESETS: Final[Mapping[str, str]] = {
    "openai": "it needs none: leave preset out",
    "perplexity": "its vectors are int8, which this provider does not read",
}
"""Names that may be tried, and why there is no row for them."""

_NO_WORD: Final = re.compile(r"[^a-z0-9]")


def filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the preset that ``given`` names and has no value for itself.

    Raises ``ConfigurationError`` for an unknown preset, and for one whose address only the user
    knows, where there is none.
    """
    name = given.get("preset")
    if not isinstance(name, str):
        return {}
    preset = PRESETS.get(name)
    if preset is None:
        raise ConfigurationError(f"preset = {name!r} is not known: {_instead_of(name)}")
    # A variable that is exported and empty means that none was set.
    address = given.get("base_url")
    named = address is not None and not (isinstance(address, str) and not address.strip())
    if preset.address is not None and not named:
        raise ConfigurationError(
            f"preset = {name!r} needs base_url beside it, as in {preset.address}"
        )
    return {
        option: value
        for option, value in preset.options.items()
        if option not in given or (option == "base_url" and not named)
    }


def _instead_of(name: str) -> str:
    plain = _NO_WORD.sub("", name.lower())
    if plain in NO_PRESETS:
        return NO_PRESETS[plain]
    names = {_NO_WORD.sub("", one): one for one in PRESETS}
    near = [names[one] for one in get_close_matches(plain, names, n=3, cutoff=0.6)]
    inside = [one for short, one in names.items() if plain and (plain in short or short in plain)]
    meant = list(dict.fromkeys([*inside, *near]))
    if meant:
        return f"did you mean {' or '.join(map(repr, meant))}?"
    return f"known are {', '.join(PRESETS)}"
