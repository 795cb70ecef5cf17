"""Presets fit the servers that they are named after, and what is set beside one goes over it."""

from __future__ import annotations

import logging
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedcore_openai.batch import OpenAIBatch
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from embedcore_openai.presets import NO_PRESETS, PRESETS, Preset
from hypothesis import given, strategies as st

from embedcore.errors import ConfigurationError, InputTooLong
from embedcore.provider.options import options_fingerprint
from embedcore.provider.types import BatchItem, EmbedRequest
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.embeddings import FakeModel
from embedcore.testing.openai.quirks import SERVERS
from embedcore.testing.vectors import vectors_of

MODEL = "acme/tiny"
MODELS = {MODEL: FakeModel(dimensions=24)}
DOCS = Path(__file__).parents[3] / "docs"
PAGE = DOCS / "reference" / "openai-presets.md"
NAMES = [name for name in PRESETS if name != "other"]


def written_out(preset: Preset, **more: Any) -> OpenAIOptions:
    """The options of a preset, each set by itself."""
    return OpenAIOptions(**{"base_url": "https://acme.example/v1", **preset.options, **more})


def fingerprint(options: OpenAIOptions) -> str:
    return options_fingerprint("openai", MODEL, options, create(MODEL, options).info)


def test_each_server_that_is_known_has_a_preset_and_a_fake() -> None:
    assert set(SERVERS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fits_its_server_at_the_first_request(name: str) -> None:
    quirks = SERVERS[name]
    with FakeOpenAI(api_key=None, models=MODELS, quirks=quirks) as server:
        embedder = create(MODEL, OpenAIOptions(preset=name, base_url=server.base_url))
        texts = [f"text {i}" for i in range(min(embedder.info.max_texts_per_request, 300))]
        reply = embedder.embed(EmbedRequest(texts=texts))
        embedder.close()
        sent = server.requests
    np.testing.assert_allclose(reply.vectors, vectors_of(texts, 24) * quirks.norm, rtol=1e-6)
    assert [one.status for one in sent] == [200]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_asks_for_a_width_as_its_server_has_it(name: str) -> None:
    quirks = SERVERS[name]
    width = 16 if quirks.width_field is not None else 24
    with FakeOpenAI(api_key=None, models=MODELS, quirks=quirks) as server:
        embedder = create(
            MODEL, OpenAIOptions(preset=name, base_url=server.base_url, dimensions=width)
        )
        reply = embedder.embed(EmbedRequest(texts=["one", "two"]))
        embedder.close()
    expected = vectors_of(["one", "two"], width) * quirks.norm
    np.testing.assert_allclose(reply.vectors, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if PRESETS[name].options["truncation"] == "error"]
)
def test_where_cuts_are_said_to_be_refused_they_are(name: str) -> None:
    with FakeOpenAI(api_key=None, models=MODELS, quirks=SERVERS[name]) as server:
        embedder = create(MODEL, OpenAIOptions(preset=name, base_url=server.base_url))
        with pytest.raises(InputTooLong):
            embedder.embed(EmbedRequest(texts=["long " * 10_000]))
        embedder.close()
    assert embedder.info.truncation == "error"


def test_no_preset_says_error_of_a_server_that_cuts() -> None:
    cutting = {name for name in NAMES if SERVERS[name].long_texts == "silent"}
    assert {name for name in NAMES if PRESETS[name].options["truncation"] == "silent"} == cutting


@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_what_is_set_beside_a_preset_goes_over_it(name: str, data: st.DataObject) -> None:
    own = {
        "base_url": "https://elsewhere.example/v1",
        "max_texts_per_request": 7,
        "encoding": "float",
        "truncation": "reported",
        "dimensions_field": "dimensions",
        "max_tokens_per_request": None,
        "reply_models": ("mine",),
        "query": {"version": "2"},
        "body": {"mine": 1},
    }
    chosen = data.draw(st.sets(st.sampled_from(sorted(set(own) - {"base_url"}))))
    given_options = {option: own[option] for option in {*chosen, "base_url"}}
    options = OpenAIOptions(preset=name, **given_options)
    for option, value in (dict(PRESETS[name].options) | given_options).items():
        assert getattr(options, option) == value or option == "base_url"
    assert options.base_url == "https://elsewhere.example/v1"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_counts_for_the_fingerprint_only_by_what_it_sets(name: str) -> None:
    written = written_out(PRESETS[name])
    by_name = OpenAIOptions(preset=name, base_url=written.base_url)
    assert fingerprint(by_name) == fingerprint(written)
    # Encoding, sizes and words about truncation make no other vectors.
    plain = OpenAIOptions(
        base_url=written.base_url, body=PRESETS[name].options.get("body"), query=written.query
    )
    assert fingerprint(by_name) == fingerprint(plain)


@pytest.mark.parametrize("name", PRESETS)
def test_an_address_that_only_its_user_knows_is_asked_for(name: str) -> None:
    if PRESETS[name].address is None:
        assert OpenAIOptions(preset=name).base_url == PRESETS[name].options["base_url"]
        assert OpenAIOptions(preset=name, base_url=" ").base_url.startswith("http")
    else:
        for blank in ({}, {"base_url": " "}):
            with pytest.raises(ConfigurationError, match="needs base_url"):
                OpenAIOptions(preset=name, **blank)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("vlm", "did you mean 'vllm'"),
        ("llama.cpp", "did you mean 'llamacpp'"),
        ("LM Studio", "did you mean 'lmstudio'"),
        ("azure", "'azure-v1' or 'azure-classic'"),
        ("gemini", "'gemini-openai'"),
        ("qwertz", "known are other, azure-v1"),
        ("", "known are other, azure-v1"),
        *NO_PRESETS.items(),
    ],
)
def test_an_unknown_preset_names_what_may_be_meant(wrong: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        OpenAIOptions(preset=wrong)


def test_a_preset_needs_no_key_in_what_it_says(canary: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        OpenAIOptions(preset="nothing like it", api_key=canary)
    assert canary not in str(caught.value)


def test_lines_of_a_batch_have_the_fields_of_requests() -> None:
    options = OpenAIOptions(preset="mistral", dimensions=16, batch=True, api_key="k" * 20)
    assert options.fields == {"output_dimension": 16}
    batch = create(MODEL, options).batch
    assert isinstance(batch, OpenAIBatch)
    line = batch._line(BatchItem(id="a", text="b"), "omit")
    assert line["body"]["output_dimension"] == 16
    assert "dimensions" not in line["body"]


def test_without_a_preset_nothing_is_different(caplog: pytest.LogCaptureFixture) -> None:
    """A server that no table knows is asked as before: base64 first, 32 texts."""
    with caplog.at_level(logging.WARNING):
        info = create(MODEL, OpenAIOptions(base_url="http://localhost:1/v1")).info
    assert (info.max_texts_per_request, info.truncation) == (32, "unknown")
    assert OpenAIOptions().encoding == "base64"


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), f"the table is now:\n{table()}"


@pytest.mark.parametrize(
    ("page", "count"), [(PAGE, 1), (DOCS / "how-to" / "use-a-compatible-server.md", 3)]
)
def test_the_settings_on_the_pages_work(page: Path, count: int) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```") / 2 == count
    for block in blocks:
        settings = tomllib.loads(block)
        provider, _, model = settings["model"].partition(":")
        assert create(model, OpenAIOptions(**settings["options"][provider])).info.price is not None


def table() -> str:
    """The presets as the page shows them."""
    lines = [
        "| Preset | Address | Texts | Encoding | Width sent as | Long texts | Also set | Source |",
        "| --- | --- | ---: | --- | --- | --- | --- | --- |",
    ]
    for name, preset in PRESETS.items():
        given_options = dict(preset.options)
        address = given_options.pop("base_url", None) or preset.address
        cells = [
            given_options.pop(option)
            for option in ("max_texts_per_request", "encoding", "dimensions_field", "truncation")
        ]
        given_options.pop("reply_models", None)
        also = ", ".join(f"`{option} = {_shown(value)}`" for option, value in given_options.items())
        also = "; ".join(part for part in (also, preset.note) if part)
        lines.append(
            f"| `{name}` | `{address}` | {' | '.join(map(str, cells))} | {also} | {preset.source} |"
        )
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_shown(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
