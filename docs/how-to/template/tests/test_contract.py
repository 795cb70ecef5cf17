"""The contract, against a stand-in for Acme's service on a local port."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from embedcore_acme.plugin import AcmeEmbedder, AcmeOptions, embedcore_provider

from embedcore.testing import EmbedderContract, ProviderContract, tokens_of, vectors_of

KEY = "acme-0123456789abcdef"


class Acme(BaseHTTPRequestHandler):
    """Vectors that are a function of the text, and a bill that is known.

    Below ``/broken`` it is down, and repeats all it was sent, as some services do; below ``/slow``
    it does not answer.
    """

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests += 1
        if self.path == "/broken/embed":
            self.reply(503, bytes(self.headers) + sent)
        elif self.path == "/slow/embed":
            time.sleep(5)
        elif self.path != "/embed" or self.headers["Authorization"] != f"Bearer {KEY}":
            self.reply(401, b"{}")
        else:
            self.reply(200, self.answer(json.loads(sent)))

    def answer(self, question):
        tokens = sum(map(tokens_of, question["texts"]))
        with self.server.lock:
            self.server.billed_tokens += tokens
            self.server.texts += question["texts"]
        vectors = vectors_of(question["texts"], 16).tolist()
        answer = {"model": question["model"], "vectors": vectors, "tokens": tokens}
        return json.dumps(answer).encode()

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Quiet."""


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Acme) as server:
        server.lock, server.daemon_threads, server.texts = threading.Lock(), True, []
        server.requests, server.billed_tokens = 0, 0
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


class TestAcme(EmbedderContract):
    secret = KEY

    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.server = server
        self.url = f"http://127.0.0.1:{server.server_port}"

    def make_embedder(self):
        return self.make_variant()

    def make_broken_embedder(self):
        return self.make_variant(base_url=f"{self.url}/broken")

    def make_slow_embedder(self):
        return self.make_variant(base_url=f"{self.url}/slow")

    def make_variant(self, **options):
        return AcmeEmbedder("v1", AcmeOptions(**{"base_url": self.url, "api_key": KEY, **options}))

    def server_bill(self):
        return self.server.billed_tokens

    def server_requests(self):
        return self.server.requests

    def server_texts(self):
        return self.server.texts


class TestAcmeProvider(ProviderContract):
    provider = embedcore_provider()
    model = "v1"
