"""What the tests of the fakes share: a raw HTTP client, and the official API description."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from embedcore.testing import FakeOpenAI

SPEC = Path(__file__).parents[2].parent / "shared" / "spec" / "openai-cut.json"
SMALL = "text-embedding-3-small"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


class RawClient:
    """Speaks HTTP over one kept connection, and nothing of OpenAI."""

    def __init__(self, server: FakeOpenAI) -> None:
        self.server = server
        port = int(server.url.rpartition(":")[2])
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def send(self, method="POST", path="/v1/embeddings", *, body=None, key=None, headers=None):
        key = self.server.api_key if key is None else key
        sent = {"Authorization": f"Bearer {key}"} if key else {}
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        self.connection.request(method, path, content, {**sent, **(headers or {})})
        reply = self.connection.getresponse()
        found = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, found, reply.read())

    def embed(self, *texts, model=SMALL, encoding="float", dimensions=8, **more):
        body = {"model": model, "input": list(texts), "encoding_format": encoding, **more}
        if dimensions is not None:
            body["dimensions"] = dimensions
        return self.send(body=body)


@pytest.fixture
def connect():
    """``connect(**options)``: a client of a server of its own, which is ``client.server``."""
    with contextlib.ExitStack() as stack:

        def start(**options):
            client = RawClient(stack.enter_context(FakeOpenAI(**options)))
            stack.callback(client.connection.close)
            return client

        yield start


@pytest.fixture
def client(connect):
    return connect()


@pytest.fixture
def server(client):
    return client.server


@pytest.fixture(scope="session")
def conforms():
    """``conforms("Name", value)``: asserts that a value is what OpenAI publishes under that name.

    The description allows only numbers in an embedding although the API also writes base64, so
    that one place is widened.
    """
    if not SPEC.exists():
        pytest.skip("the official API description is not beside the repository")
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    components = copy.deepcopy(json.loads(SPEC.read_text())["components"])
    vector = components["schemas"]["Embedding"]["properties"]["embedding"]
    components["schemas"]["Embedding"]["properties"]["embedding"] = {
        "anyOf": [vector, {"type": "string"}]
    }

    def check(name: str, value: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": components}
        errors = list(jsonschema_rs.Draft202012Validator(schema).iter_errors(value))
        assert not errors, f"not a {name}: {errors[0].message}"

    return check
