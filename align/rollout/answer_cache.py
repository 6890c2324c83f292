"""Answers that were made once, and log-likelihoods. Each is named by all that decides it, so that scoring it again
computes nothing.

The store is `answers.db` among the runs, one SQLite file that any run of `stage=eval` reads and adds to. It can be
thrown away at any time: answers are then made again."""

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
MADE = "CREATE TABLE IF NOT EXISTS {table} (id TEXT PRIMARY KEY, asked TEXT, answer TEXT) WITHOUT ROWID"
TABLES = ("answers", "likelihoods")
"""Of which each store has one or both."""
AT_ONCE = 500
"""Ids that are looked up by one statement."""
BUSY_S = 60.0
"""How long another process may be writing."""
REMEDY = "Move the file away: answers are then made again."


@dataclass(frozen=True, slots=True)
class Asked:
    """The key of an answer: all that decides it.

    Attributes:
        base, adapter: digests; the adapter's is empty where the base answers by itself.
        method, dtype: how the base is kept, and what is computed in.
        tokenizer: digest of the tokenizer, its chat template among it.
        prompt: the token ids of the rendered prompt.
        max_new_tokens, temperature, stop_ids: how tokens are drawn; at temperature 0 each is the likeliest one.
        seed: of the draws.
        engine: what draws: its name, the device and the versions of what computes.
        stops: texts that end the answer, which is cut before the first of them.
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
        """SHA-256 of all of it."""
        return json_digest(asdict(self))


@dataclass(frozen=True, slots=True)
class Question:
    """A request to a model behind a server: all of what decides its answer that is known here.

    Attributes:
        url: of the server, up to its `/v1`.
        body: the model's name, the messages, and how tokens are drawn.
        draw: which answer to this very request it is, from 0. The server is not told.
    """

    url: str
    body: Mapping[str, Any]
    draw: int = 0

    @property
    def id(self) -> str:
        """SHA-256 of all of it."""
        return json_digest(asdict(self))


class Token(NamedTuple):
    """A token as a server shows it.

    Attributes:
        likely: the likeliest tokens at its place, itself included, with their logprobs in nats.
    """

    text: str
    likely: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, as it is kept.

    Attributes:
        ids: the tokens that were drawn, the one that ended the answer included; none of a server.
        text: the same without it; of one that a text ended what stands before that.
        ended: False where the answer was cut.
        last: the last tokens, where a server was asked for their logprobs and gave them.
        usage: tokens of the prompt and of the answer, as a server counts them; zeros if it does not.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    last: tuple[Token, ...] = ()
    usage: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Answer:
        """The inverse of `asdict`. Raises: KeyError, TypeError, ValueError: it is none."""
        ids = tuple(int(id) for id in record["ids"])
        text = str(record["text"])
        ended = bool(record["ended"])
        last = (Token(str(said), {**likely}) for said, likely in record["last"])
        prompt_tokens, completion_tokens = record["usage"]
        return cls(ids, text, ended, tuple(last), (int(prompt_tokens), int(completion_tokens)))


@dataclass(frozen=True, slots=True)
class Weighed:
    """The key of a row's log-likelihood: all that decides how likely its scored tokens are.

    Attributes:
        base, adapter, method, dtype: see `Asked`.
        row: SHA-256 of its tokens and of which are scored.
        engine: what computes: the device and the versions of what computes on it.
    """

    base: str
    adapter: str
    method: str
    dtype: str
    row: str
    engine: str

    @property
    def id(self) -> str:
        """SHA-256 of all of it."""
        return json_digest(asdict(self))


class AnswerStore:
    """A store of what the runs of a folder made: answers, or records of another kind.

    Args:
        path: of the file; it is made by the first record.
        kind: of the records, a dataclass with `of`, the inverse of `asdict`.
        table: that they stand in.
    """

    def __init__(self, path: Path, kind: Any = Answer, table: str = "answers") -> None:
        self.path = path
        self.kind = kind
        self.table = table

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            refuse_foreign_database(self.path, "answers", TABLES, REMEDY)
            with convert_os_errors(self.path), closing(sqlite3.connect(self.path, timeout=BUSY_S)) as db:
                db.execute(MADE.format(table=self.table))
                yield db
        except sqlite3.OperationalError as error:
            remedy = "Free space, make it writable, or move it away: answers are then made again."
            raise StorageError("answers", str(self.path), f"cannot be used ({error})", remedy) from error
        except sqlite3.DatabaseError as error:
            raise CorruptFile("answers", str(self.path), f"is no store of answers ({error})", REMEDY) from error

    def found(self, ids: Iterable[str]) -> dict[str, Any]:
        """Return those of these records that are there.

        Raises:
            CorruptFile: the file is damaged.
        """
        unique_ids = [*dict.fromkeys(ids)]
        if not self.path.exists():
            return {}
        records = {}
        with self._open() as db:
            for first in range(0, len(unique_ids), AT_ONCE):
                part = unique_ids[first : first + AT_ONCE]
                marks = ", ".join("?" * len(part))
                for id, text in db.execute(f"SELECT id, answer FROM {self.table} WHERE id IN ({marks})", part):
                    records[id] = self._read(id, text)
        return records

    def _read(self, id: str, text: str) -> Any:
        try:
            return self.kind.of(json.loads(text))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile("answers", f"{self.path}, {id[:12]}", f"is no answer ({error})", REMEDY) from error

    def add(self, answers: Sequence[tuple[Asked | Question | Weighed, Any]]) -> None:
        """Keep records, all of them or none. One that is there already stays.

        Raises:
            StorageError: the file cannot be written.
        """
        with convert_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [(asked.id, json.dumps(asdict(asked)), json.dumps(asdict(answer))) for asked, answer in answers]
        with self._open() as db, db:
            db.executemany(f"INSERT OR IGNORE INTO {self.table} VALUES (?, ?, ?)", rows)
