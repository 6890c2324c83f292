"""A cache of answers and log-likelihoods in an SQLite file.

The key of each record covers everything that determines it, so that scoring again computes nothing.

The store is `answers.db` in the folder of runs, an SQLite file that every run of `stage=eval` reads and adds to. It can
be deleted at any time: answers are then generated again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import CorruptFile, StorageError
from align.core.outputs import refuse_foreign_database
from align.run import json_digest
from align.run.atomic import convert_os_errors

FILE = "answers.db"
CREATE = "CREATE TABLE IF NOT EXISTS {table} (id TEXT PRIMARY KEY, asked TEXT, answer TEXT) WITHOUT ROWID"
TABLES = ("answers", "likelihoods")
"""Names of the tables that a cache file may have; it has one or both."""
AT_ONCE = 500
"""Maximum number of ids in one SELECT statement."""
BUSY_S = 60.0
"""Seconds to wait while another process writes to the file."""
REMEDY = "Move the file away: answers are then made again."


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """The cache key of an answer generated here: everything that determines the answer.

    Attributes:
        base, adapter: digests; the adapter's is empty for the base alone.
        method, dtype: precision in which the base is stored, and dtype of the computation.
        tokenizer: digest of the tokenizer with its chat template.
        prompt: token ids of the rendered prompt.
        max_new_tokens, temperature, stop_ids: sampling parameters; temperature 0 is greedy.
        seed: seed of the sampling.
        engine: name of the engine, its device and the versions of its libraries.
        stops: stop strings; the answer is cut before the first of them.
    """

    base: str
    adapter: str
    method: str
    dtype: str
    tokenizer: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    seed: int
    engine: str
    stops: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """SHA-256 of all fields in hex, by which the record is stored."""
        return json_digest(asdict(self))


@dataclass(frozen=True, slots=True)
class ServerAnswerKey:
    """The cache key of an answer by a server: everything in the request that determines the answer.

    Attributes:
        url: the server's address, up to its `/v1`.
        body: body of the request: the model's name, the messages and the sampling parameters.
        draw: number of this answer among those to the same request, from 0. It is not sent to the server.
    """

    url: str
    body: Mapping[str, Any]
    draw: int = 0

    @property
    def id(self) -> str:
        """SHA-256 of all fields in hex, by which the record is stored."""
        return json_digest(asdict(self))


class ServerToken(NamedTuple):
    """A token of a server's response, with the likeliest alternatives at its position.

    Attributes:
        likely: token → logprob in nats of the likeliest tokens at this position, including this one.
    """

    text: str
    likely: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer as the cache stores it: its text, its token ids, and its end.

    Attributes:
        ids: sampled token ids including the stop token; empty for a server's answer.
        text: the answer as text, without the stop token, cut before a stop string.
        ended: False if the answer was cut at the length limit.
        last: the last tokens, if a server was asked for logprobs and returned them.
        usage: prompt and completion tokens as counted by a server; zeros if it does not count them.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    last: tuple[ServerToken, ...] = ()
    usage: tuple[int, int] = (0, 0)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CachedAnswer:
        """Rebuild an answer from its `asdict` form in the cache.

        Raises KeyError, TypeError or ValueError if it is malformed.
        """
        prompt_tokens, completion_tokens = record["usage"]
        return cls(
            ids=tuple(int(id) for id in record["ids"]),
            text=str(record["text"]),
            ended=bool(record["ended"]),
            last=tuple(ServerToken(str(text), {**likely}) for text, likely in record["last"]),
            usage=(int(prompt_tokens), int(completion_tokens)),
        )


@dataclass(frozen=True, slots=True)
class LikelihoodKey:
    """The cache key of a row's log-likelihood: everything that determines the value.

    Attributes:
        base, adapter, method, dtype: see `AnswerKey`.
        row: SHA-256 of the row's token ids and of the mask of scored tokens.
        engine: the device and the versions of the libraries.
    """

    base: str
    adapter: str
    method: str
    dtype: str
    row: str
    engine: str

    @property
    def id(self) -> str:
        """SHA-256 of all fields in hex, by which the record is stored."""
        return json_digest(asdict(self))


class AnswerStore:
    """A table of an SQLite file with cached answers, or records of another class, by the SHA-256 of their keys.

    Args:
        path: the SQLite file, which is created with the first record.
        kind: class of the records: a dataclass with a classmethod `from_record`, which rebuilds one from its `asdict`
            form.
        table: name of the table.
    """

    def __init__(self, path: Path, kind: Any = CachedAnswer, table: str = "answers") -> None:
        self.path = path
        self.kind = kind
        self.table = table

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            refuse_foreign_database(self.path, "answers", TABLES, REMEDY)
            with convert_os_errors(self.path), closing(sqlite3.connect(self.path, timeout=BUSY_S)) as db:
                db.execute(CREATE.format(table=self.table))
                yield db
        except sqlite3.OperationalError as error:
            remedy = "Free space, make it writable, or move it away: answers are then made again."
            raise StorageError("answers", str(self.path), f"cannot be used ({error})", remedy) from error
        except sqlite3.DatabaseError as error:
            raise CorruptFile("answers", str(self.path), f"is no store of answers ({error})", REMEDY) from error

    def find_records(self, ids: Iterable[str]) -> dict[str, Any]:
        """Return id → cached record; ids that are not in the cache are left out.

        Raises:
            CorruptFile: the file is damaged.
            StorageError: the file cannot be used.
        """
        unique_ids = [*dict.fromkeys(ids)]
        if not self.path.exists():
            return {}
        records = {}
        with self._open() as db:
            for first in range(0, len(unique_ids), AT_ONCE):
                batch = unique_ids[first : first + AT_ONCE]
                marks = ", ".join("?" * len(batch))
                for id, text in db.execute(f"SELECT id, answer FROM {self.table} WHERE id IN ({marks})", batch):
                    records[id] = self._read(id, text)
        return records

    def _read(self, id: str, text: str) -> Any:
        try:
            return self.kind.from_record(json.loads(text))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile("answers", f"{self.path}, {id[:12]}", f"is no answer ({error})", REMEDY) from error

    def add(self, answers: Sequence[tuple[AnswerKey | ServerAnswerKey | LikelihoodKey, Any]]) -> None:
        """Write (key, record) pairs to the cache in one transaction. A record that exists already is kept.

        Raises:
            StorageError: the file cannot be written.
        """
        with convert_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [(key.id, json.dumps(asdict(key)), json.dumps(asdict(answer))) for key, answer in answers]
        with self._open() as db, db:
            db.executemany(f"INSERT OR IGNORE INTO {self.table} VALUES (?, ?, ?)", rows)
