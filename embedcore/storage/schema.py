"""Tables and migrations of the SQLite files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from sqlite_utils import Database

Migration: TypeAlias = "Callable[[Database], None]"


class Schema:
    """The tables of one kind of file, as migrations in their order: each is applied once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._migrations: list[Migration] = []

    def __call__(self, migration: Migration) -> Migration:
        """Add the next one: a decorator. Its name is kept in the files, and stays."""
        self._migrations.append(migration)
        return migration

    @property
    def version(self) -> int:
        """``PRAGMA user_version`` after the last migration."""
        return len(self._migrations)

    def apply(self, database: Database) -> None:
        """Apply those that this file does not have yet."""
        # Only here: importing it takes longer than opening a file that has them all.
        from sqlite_utils.migrations import Migrations

        migrations = Migrations(self._name)
        for migration in self._migrations:
            migrations()(migration)
        migrations.apply(database)


STATE: Final = Schema("embedcore.state")

VECTORS: Final = Schema("embedcore.vectors")
"""The cache as it was in one file, which is only read now."""

VECTOR_INDEX: Final = Schema("embedcore.vector_index")

RATES: Final = Schema("embedcore.rates")

MANIFEST: Final = Schema("embedcore.batch")
"""The file that each batch has."""


@STATE
def ledger(database: Database) -> None:
    """The ledger: windows count, grants reserve, attempts are what was sent."""
    for statement in (_BOOK, _WINDOW, _GRANT, _ATTEMPT, _WARNING, *_INDEXES):
        database.conn.execute(statement)


@STATE
def rates(database: Database) -> None:
    """The rate limits that providers named, for ``embedcore doctor``."""
    database.conn.execute(_RATE)


@STATE
def batches(database: Database) -> None:
    """Batches, the remote jobs that are their parts, and the texts that are on their way."""
    for statement in (_POOL, _BATCH, _PART, _ITEM, _WISH, *_BATCH_INDEXES):
        database.conn.execute(statement)


@STATE
def lines_of_jobs(database: Database) -> None:
    """Lines that name their part, results that are waited for, and what was cancelled elsewhere."""
    for statement in (*_LINES, _UNREAD):
        database.conn.execute(statement)


@STATE
def waits_of_jobs(database: Database) -> None:
    """Until when a provider asked to be left alone, apart from when embedcore would look again."""
    database.conn.execute(_NOT_BEFORE)


@STATE
def owners(database: Database) -> None:
    """Who sent an attempt, in which generation it was settled, and what was free by its status."""
    for statement in _OWNERS:
        database.conn.execute(statement)


@STATE
def proofs_of_batches(database: Database) -> None:
    """What was paid for and lost, jobs that are not found, and texts that are sent shortened."""
    for statement in _PROOFS:
        database.conn.execute(statement)


@STATE
def deliveries(database: Database) -> None:
    """Which batches have their vectors in an output."""
    database.conn.execute(_DELIVERED)


@RATES
def turns(database: Database) -> None:
    """What may leave to each endpoint, and which processes send there."""
    for statement in (_LINE, _BUCKET, _MEMBER):
        database.conn.execute(statement)


@MANIFEST
def manifest(database: Database) -> None:
    """The caller's rows of one batch, and its texts as they are sent."""
    for statement in (_TEXT, _ROW):
        database.conn.execute(statement)


@MANIFEST
def cut_by_the_server(database: Database) -> None:
    """What became of texts that were not counted, and that may be too long."""
    for statement in _LONG_TEXTS:
        database.conn.execute(statement)


@VECTORS
def vectors(database: Database) -> None:
    """Cached vectors, where they came from, and how often they were asked for."""
    for statement in (_ORIGIN, _VECTOR, _TALLY):
        database.conn.execute(statement)


@VECTOR_INDEX
def vector_index(database: Database) -> None:
    """Where the vector of each key lies in the segment files."""
    for statement in (_ORIGIN, _SEGMENT, _PLACE, _TALLY):
        database.conn.execute(statement)


@VECTOR_INDEX
def claims(database: Database) -> None:
    """Which keys a process is paying for at this moment."""
    for statement in (_CLAIMANT, _CLAIM):
        database.conn.execute(statement)


@VECTOR_INDEX
def beyond_the_cap(database: Database) -> None:
    """Which segments hold what only batches count on."""
    database.conn.execute(_BEYOND)


_BOOK = """
CREATE TABLE book (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    zone TEXT NOT NULL,                    -- IANA name; days and months are counted in it
    clock INTEGER NOT NULL,                -- the latest time ever seen, microseconds since 1970 UTC
    tight_until INTEGER NOT NULL DEFAULT 0 -- until then nobody holds more than it must
) STRICT"""

_WINDOW = """
CREATE TABLE window (
    id INTEGER PRIMARY KEY,
    scope TEXT NOT NULL,                   -- a project, or * for all of them
    lane TEXT NOT NULL CHECK (lane IN ('all', 'query')),
    period TEXT NOT NULL CHECK (period IN ('day', 'month', 'total')),
    start TEXT NOT NULL,                   -- 2026-11-23, 2026-11, or empty
    generation INTEGER NOT NULL DEFAULT 0, -- number of its latest reset, over all windows
    tokens_spent INTEGER NOT NULL DEFAULT 0 CHECK (tokens_spent >= 0),
    tokens_held INTEGER NOT NULL DEFAULT 0 CHECK (tokens_held >= 0),
    cost_spent INTEGER NOT NULL DEFAULT 0 CHECK (cost_spent >= 0),
    cost_held INTEGER NOT NULL DEFAULT 0 CHECK (cost_held >= 0),
    requests INTEGER NOT NULL DEFAULT 0 CHECK (requests >= 0),
    UNIQUE (scope, lane, period, start)
) STRICT"""

_GRANT = """
CREATE TABLE "grant" (
    id INTEGER PRIMARY KEY,                -- random: an id is never used again
    scope TEXT NOT NULL,
    windows TEXT NOT NULL,                 -- the window ids its money is charged to
    tokens INTEGER NOT NULL CHECK (tokens >= 0),
    cost INTEGER NOT NULL CHECK (cost >= 0),
    loose INTEGER NOT NULL CHECK (loose IN (0, 1)),
    lease INTEGER,                         -- microseconds; NULL: never expires
    owner TEXT NOT NULL,
    opened INTEGER NOT NULL
) STRICT"""

_ATTEMPT = """
CREATE TABLE attempt (
    id INTEGER PRIMARY KEY,
    "grant" INTEGER,                       -- NULL for what was recorded by hand
    scope TEXT NOT NULL,
    windows TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN
        ('sent', 'settled', 'charged', 'returned', 'recorded', 'reset', 'clock')),
    tokens INTEGER NOT NULL,               -- held for it
    cost INTEGER NOT NULL,                 -- picodollars held for it
    actual_tokens INTEGER,
    actual_cost INTEGER,
    loose INTEGER NOT NULL DEFAULT 0 CHECK (loose IN (0, 1)),
    reported INTEGER NOT NULL DEFAULT 0 CHECK (reported IN (0, 1)),
    generation INTEGER NOT NULL DEFAULT 0, -- latest of its windows', when it was charged
    lease INTEGER,
    model TEXT NOT NULL DEFAULT '',
    inputs INTEGER NOT NULL DEFAULT 0,
    request_id TEXT,
    note TEXT,
    sent INTEGER NOT NULL,
    ended INTEGER
) STRICT"""

_WARNING = """
CREATE TABLE warning (
    window INTEGER NOT NULL REFERENCES window (id),
    unit TEXT NOT NULL CHECK (unit IN ('tokens', 'cost')),
    amount INTEGER NOT NULL,
    PRIMARY KEY (window, unit, amount)
) STRICT, WITHOUT ROWID"""

_RATE = """
CREATE TABLE rate (
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER CHECK (requests >= 0), -- per minute; NULL: not named
    tokens INTEGER CHECK (tokens >= 0),
    named INTEGER NOT NULL,                 -- microseconds since 1970 UTC
    PRIMARY KEY (endpoint, model)
) STRICT, WITHOUT ROWID"""

# Times of these three are seconds of the monotonic clock that the key names.
_LINE = """
CREATE TABLE line (
    key TEXT PRIMARY KEY,                  -- clock, endpoint, account, model
    closed_until REAL NOT NULL,            -- nothing leaves before
    last_due REAL NOT NULL,                -- when the last one that is reserved may leave
    serial INTEGER NOT NULL                -- number of reservations so far
) STRICT, WITHOUT ROWID"""

_BUCKET = """
CREATE TABLE bucket (
    key TEXT NOT NULL,
    kind TEXT NOT NULL,                    -- requests or tokens; with a number: a rate that was set
    rate REAL NOT NULL,                    -- what comes in, per second
    size REAL NOT NULL,
    level REAL NOT NULL,                   -- less than nothing: reserved in the future
    at REAL NOT NULL,
    named REAL,                            -- limit per minute, as the server names it
    granted REAL NOT NULL,                 -- all that was ever reserved
    "window" REAL,                         -- seconds, where it fills all at once
    ends REAL,
    PRIMARY KEY (key, kind)
) STRICT, WITHOUT ROWID"""

_MEMBER = """
CREATE TABLE member (
    key TEXT NOT NULL,
    owner TEXT NOT NULL,                   -- a process, named as in a grant
    seen REAL NOT NULL,
    alone INTEGER NOT NULL CHECK (alone IN (0, 1)), -- it knew of no other then
    PRIMARY KEY (key, owner)
) STRICT, WITHOUT ROWID"""

_INDEXES = (
    "CREATE INDEX attempt_open ON attempt (lease) WHERE state = 'sent'",
    "CREATE INDEX attempt_sent ON attempt (sent)",
)

_ORIGIN = """
CREATE TABLE origin (
    id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,                   -- provider:model
    fingerprint TEXT NOT NULL,
    input_type TEXT NOT NULL,              -- empty: none
    answered_as TEXT NOT NULL,             -- the model's name in the latest reply, empty: none
    vectors INTEGER NOT NULL DEFAULT 0 CHECK (vectors >= 0),
    UNIQUE (model, fingerprint, input_type)
) STRICT"""

# The vector comes last: what lies behind it would have to be read past it.
_VECTOR = """
CREATE TABLE vector (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
    origin INTEGER NOT NULL REFERENCES origin (id),
    stored INTEGER NOT NULL,               -- day, counted from 1970-01-01 UTC
    keep_until INTEGER NOT NULL,           -- day; pruned only after it
    width INTEGER NOT NULL CHECK (width > 0),
    checksum INTEGER NOT NULL,
    data BLOB NOT NULL                     -- little-endian float32, or float16 where it is exact
) STRICT"""

# A number is never used twice: who looked up a place must not find another file there.
_SEGMENT = """
CREATE TABLE segment (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- its file is named after it
    tail INTEGER NOT NULL CHECK (tail > 0) -- what lies behind it belongs to nobody
) STRICT"""

_PLACE = """
CREATE TABLE vector (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
    origin INTEGER NOT NULL REFERENCES origin (id),
    segment INTEGER NOT NULL REFERENCES segment (id),
    offset INTEGER NOT NULL CHECK (offset > 0),
    width INTEGER NOT NULL CHECK (width > 0),
    itemsize INTEGER NOT NULL CHECK (itemsize IN (2, 4)), -- float16 where it is exact, else float32
    checksum INTEGER NOT NULL,
    zeros INTEGER NOT NULL CHECK (zeros IN (0, 1)),
    stored INTEGER NOT NULL,               -- day, counted from 1970-01-01 UTC
    keep_until INTEGER NOT NULL            -- day; pruned only after it
) STRICT"""

_BEYOND = (
    "ALTER TABLE segment ADD COLUMN beyond INTEGER NOT NULL DEFAULT 0 CHECK (beyond IN (0, 1))"
)

_CLAIMANT = """
CREATE TABLE claimant (
    id INTEGER PRIMARY KEY,                -- random: an id is never used again
    identity TEXT NOT NULL,                -- of the process
    until INTEGER NOT NULL                 -- its claims stand, microseconds since 1970 UTC
) STRICT"""

_CLAIM = """
CREATE TABLE claim (
    id INTEGER PRIMARY KEY,                -- random: an id is never used again
    claimant INTEGER NOT NULL REFERENCES claimant (id),
    keys BLOB NOT NULL CHECK (length(keys) % 8 = 0) -- the first 8 bytes of each, ascending
) STRICT"""

_TALLY = """
CREATE TABLE tally (
    day INTEGER PRIMARY KEY,
    hits INTEGER NOT NULL CHECK (hits >= 0),
    misses INTEGER NOT NULL CHECK (misses >= 0)
) STRICT"""

_POOL = """
CREATE TABLE pool (
    id INTEGER PRIMARY KEY,
    scope TEXT NOT NULL,
    model TEXT NOT NULL,                   -- provider:model
    fingerprint TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    account TEXT NOT NULL,
    queue INTEGER CHECK (queue > 0),       -- tokens that may be enqueued, learned; NULL: not known
    queue_until INTEGER NOT NULL DEFAULT 0, -- nothing is enqueued before, after a refusal
    refusals INTEGER NOT NULL DEFAULT 0,   -- for a full queue, in a row
    UNIQUE (scope, model, fingerprint, endpoint, account)
) STRICT"""

_BATCH = """
CREATE TABLE batch (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    pool INTEGER NOT NULL REFERENCES pool (id),
    input_type TEXT NOT NULL,              -- empty: none
    asked_as TEXT NOT NULL,                -- the model as the caller named it
    digest BLOB NOT NULL DEFAULT x'',      -- of its rows, once they are all there
    state TEXT NOT NULL CHECK (state IN
        ('preparing', 'open', 'cancelling', 'done', 'cancelled', 'abandoned')),
    rows INTEGER NOT NULL DEFAULT 0,
    texts INTEGER NOT NULL DEFAULT 0,      -- different ones
    reused INTEGER NOT NULL DEFAULT 0,     -- of these were bought before
    stored INTEGER NOT NULL DEFAULT 0,     -- the outcome, once it has ended
    failed INTEGER NOT NULL DEFAULT 0,
    resubmits_lost INTEGER NOT NULL DEFAULT 0 CHECK (resubmits_lost IN (0, 1)),
    deadline INTEGER,                      -- microseconds since 1970; NULL: none
    draining INTEGER NOT NULL DEFAULT 0 CHECK (draining IN (0, 1)), -- bought now, in no job
    drained_tokens INTEGER NOT NULL DEFAULT 0,
    drained_cost INTEGER NOT NULL DEFAULT 0,
    "grant" INTEGER,                       -- money for parts that are not cut yet
    blocked TEXT,                          -- why nothing new is sent
    retry INTEGER NOT NULL DEFAULT 0,      -- when that may have changed
    waiter TEXT,                           -- a call that is lost with its process
    waiter_until INTEGER,
    created INTEGER NOT NULL,
    ended INTEGER
) STRICT"""

_PART = """
CREATE TABLE part (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,              -- marks the remote job as ours
    pool INTEGER NOT NULL REFERENCES pool (id),
    batch INTEGER,                         -- whose file has its texts
    state TEXT NOT NULL CHECK (state IN
        ('planned', 'creating', 'fenced', 'lost', 'stray', 'submitted', 'collecting', 'done')),
    input_type TEXT NOT NULL,
    items INTEGER NOT NULL,
    tokens INTEGER NOT NULL,               -- held for it
    cost INTEGER NOT NULL,                 -- picodollars held for it
    price TEXT,                            -- dollars per million tokens when it was held
    "grant" INTEGER NOT NULL,
    attempt INTEGER,
    input TEXT,                            -- the provider's name for its input
    job TEXT,                              -- the provider's name for it
    jobs TEXT NOT NULL DEFAULT '',         -- further jobs of it that were cancelled
    asked INTEGER,                         -- when the job was to be created
    looks INTEGER NOT NULL DEFAULT 0,      -- times in a row that no such job was found, after it
    tries INTEGER NOT NULL DEFAULT 0,      -- errors in a row
    next INTEGER NOT NULL DEFAULT 0,       -- nothing is due before
    status TEXT NOT NULL DEFAULT '',       -- the provider's word for its state
    completed INTEGER,
    failed INTEGER,
    total INTEGER,
    trouble TEXT,                          -- what a person should look at
    owner TEXT,
    lease INTEGER,
    epoch INTEGER NOT NULL DEFAULT 0,      -- number of its owners so far
    created INTEGER NOT NULL,
    ended INTEGER
) STRICT"""

_ITEM = """
CREATE TABLE item (
    id INTEGER PRIMARY KEY,
    pool INTEGER NOT NULL,
    key BLOB NOT NULL CHECK (length(key) = 32),
    state TEXT NOT NULL CHECK (state IN ('open', 'stored', 'failed', 'lost')),
    part INTEGER,                          -- NULL: in none
    ordinal INTEGER,                       -- its place there
    tokens INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,      -- parts that ended without it
    reason TEXT,
    UNIQUE (pool, key)
) STRICT"""

_WISH = """
CREATE TABLE wish (
    batch INTEGER NOT NULL,
    item INTEGER NOT NULL,
    PRIMARY KEY (batch, item)
) STRICT, WITHOUT ROWID"""

_BATCH_INDEXES = (
    "CREATE INDEX item_part ON item (part, ordinal) WHERE part IS NOT NULL",
    "CREATE INDEX wish_item ON wish (item)",
    "CREATE INDEX part_live ON part (pool) WHERE state <> 'done'",
)

_LINES = (
    # Of parts that were there before: their inputs may be uploaded already.
    "ALTER TABLE part ADD COLUMN ids TEXT NOT NULL DEFAULT 'ordinal' "
    "CHECK (ids IN ('ordinal', 'key'))",
    "ALTER TABLE part ADD COLUMN since INTEGER",
    "ALTER TABLE part ADD COLUMN cancelled INTEGER NOT NULL DEFAULT 0 CHECK (cancelled IN (0, 1))",
    "ALTER TABLE item ADD COLUMN stopped INTEGER NOT NULL DEFAULT 0 CHECK (stopped IN (0, 1))",
    # Who asked for that was not written down: it was embedcore, as far as it can be known.
    "UPDATE part SET cancelled = 1 WHERE lower(status) LIKE '%cancel%'",
    # Measured with the shorter ids of then; 22 is the longest that there is for 50,000 texts.
    "UPDATE item SET bytes = bytes + 22 WHERE state = 'open' AND part IS NULL",
)

_NOT_BEFORE = "ALTER TABLE part ADD COLUMN not_before INTEGER NOT NULL DEFAULT 0"

_OWNERS = (
    "ALTER TABLE attempt ADD COLUMN owner TEXT",
    "ALTER TABLE attempt ADD COLUMN counted INTEGER",
    "ALTER TABLE attempt ADD COLUMN by_status INTEGER NOT NULL DEFAULT 0 "
    "CHECK (by_status IN (0, 1))",
    "CREATE INDEX attempt_by_status ON attempt (sent) WHERE by_status = 1",
)

_PROOFS = (
    "ALTER TABLE part ADD COLUMN missing INTEGER",
    "ALTER TABLE item ADD COLUMN paid INTEGER NOT NULL DEFAULT 0 CHECK (paid IN (0, 1))",
    # So much less of it is sent, in characters and tokens; under that key is its vector then.
    "ALTER TABLE item ADD COLUMN characters_cut INTEGER CHECK (characters_cut > 0)",
    "ALTER TABLE item ADD COLUMN sent_key BLOB CHECK (length(sent_key) = 32)",
    "ALTER TABLE item ADD COLUMN tokens_cut INTEGER",
    "ALTER TABLE unread ADD COLUMN sent_key BLOB CHECK (length(sent_key) = 32)",
    # What is lost, or is being embedded again and has been lost before.
    "UPDATE item SET paid = 1 WHERE state = 'lost' OR (state <> 'stored' AND (pool, key) IN "
    "(SELECT p.pool, u.key FROM unread u JOIN part p ON p.id = u.part))",
)

# Its output is complete: it counts no longer on vectors beyond the cap.
_DELIVERED = (
    "ALTER TABLE batch ADD COLUMN delivered INTEGER NOT NULL DEFAULT 0 CHECK (delivered IN (0, 1))"
)

_UNREAD = """
CREATE TABLE unread (
    part INTEGER NOT NULL,
    ordinal INTEGER NOT NULL,
    key BLOB NOT NULL CHECK (length(key) = 32),
    PRIMARY KEY (part, ordinal)
) STRICT, WITHOUT ROWID"""

_TEXT = """
CREATE TABLE text (
    id INTEGER PRIMARY KEY,                -- order of its first row
    key BLOB NOT NULL UNIQUE CHECK (length(key) = 32),
    first INTEGER NOT NULL,                -- number of its first row
    reused INTEGER NOT NULL DEFAULT 0 CHECK (reused IN (0, 1)),
    text TEXT                              -- as it is sent; NULL once the batch has ended
) STRICT"""

_ROW = """
CREATE TABLE "row" (
    number INTEGER PRIMARY KEY,
    text INTEGER,                          -- NULL: rejected
    key TEXT,                              -- the caller's name for the row, as JSON; NULL: none
    tokens_cut INTEGER NOT NULL DEFAULT 0,
    problem TEXT                           -- why it was rejected
) STRICT"""

_LONG_TEXTS = (
    # It may be longer than the model takes; its tokens are not counted.
    "ALTER TABLE text ADD COLUMN perhaps_long INTEGER NOT NULL DEFAULT 0 "
    "CHECK (perhaps_long IN (0, 1))",
    # It was refused, and so much was cut off until it was taken; under this key is the vector.
    "ALTER TABLE text ADD COLUMN sent_key BLOB CHECK (length(sent_key) = 32)",
    "ALTER TABLE text ADD COLUMN tokens_cut INTEGER",
    "ALTER TABLE text ADD COLUMN characters_cut INTEGER",
)
