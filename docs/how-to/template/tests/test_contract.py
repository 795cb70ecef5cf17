"""The contract, against a stand-in for Acme's service on a local port."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from embedcore_acme.plugin import AcmeEmbedder, AcmeOptions

from embedcore.testing.contract import EmbedderContract
from embedcore.testing.vectors import tokens_of, vectors_of

KEY = "acme-0123456789abcdef"


class Acme(BaseHTTPRequestHandler):
    """Vectors that are a function of the text, and a bill that is known."""

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = self.headers["Authorization"] == f"Bearer {KEY}" and self.path == "/embed"
        texts = question["texts"]
        answer = {
            "model": question["model"],
            "vectors": vectors_of(texts, 16).tolist(),
            "tokens": sum(map(tokens_of, texts)),
        }
        body = json.dumps(answer if right else {}).encode()
        self.send_response(200 if right else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Quiet."""


@pytest.fixture(scope="module")
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Acme) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class TestAcme(EmbedderContract):
    secret = KEY

    @pytest.fixture
    def embedder(self, url):
        return AcmeEmbedder("v1", AcmeOptions(base_url=url, api_key=KEY))

    def make_broken_embedder(self):
        return AcmeEmbedder("v1", AcmeOptions(base_url="http://127.0.0.1:9", api_key=KEY))
