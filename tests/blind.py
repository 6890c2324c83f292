"""What tests of blind votes share: two systems whose answers are files, the app on their project, and voters."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import httpx
import pytest
from argon2 import PasswordHasher

from align.__main__ import main
from align.annotate.accounts import Accounts
from align.annotate.store import Store

NAMES = ("zebra", "okapi")
"""The systems, the first one first. Their answers end in `!` and in `.`."""
PASSWORD = "correct horse battery"
Choice = Callable[[str, str, str], int]
"""The prompt and both answers as they stand → 0 where the first one is better, 1 where the second one is, 2: a tie."""


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def evaluation(folder: Path, items: int, same: int = 0) -> list[str]:
    """The words of an evaluation of two files of answers by people.

    Args:
        same: how many of the items have the same answer of both.
    """
    prompts = [{"id": f"p{i}", "prompt": f"Question {i}?"} for i in range(items)]
    tasks = written(folder / "asked.jsonl", prompts)
    ends = dict(zip(NAMES, "!.", strict=True))
    files = {
        name: written(
            folder / f"{name}.jsonl",
            [{"id": f"p{i}", "answer": f"Reply {i}{'?' if i < same else end}"} for i in range(items)],
        )
        for name, end in ends.items()
    }
    systems = ", ".join(f"{name}: {{file: {path}}}" for name, path in files.items())
    return [
        "stage=eval", f"stage.systems={{{systems}}}", f"eval.tasks=[{{name: chat, path: {tasks}}}]",
        "stage.judge=people", f"run.root={folder / 'runs'}", "device=cpu",
    ]  # fmt: skip


def store_of(folder: Path) -> Store:
    return Store.open(f"sqlite:///{folder / 'runs' / 'annotations.db'}", create=False)


def quick(store: Store) -> Accounts:
    """Accounts whose passwords are hashed in no time."""
    return Accounts(store, hasher=PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


@contextmanager
def serving(store: Store, port: int) -> Iterator[Accounts]:
    """The app on a store, for people with accounts."""
    import uvicorn

    from align.annotate.web.access import AccountAuthenticator
    from align.annotate.web.server import build_app

    accounts = quick(store)
    authenticator = AccountAuthenticator(accounts, f"align_session_{port}")
    app = build_app(store, authenticator, [f"http://127.0.0.1:{port}"])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield accounts
    server.should_exit = True
    thread.join(20)


class Voter:
    """Somebody with an account, who votes over HTTP.

    Attributes:
        seen: every body that the server answered with.
    """

    def __init__(self, accounts: Accounts, port: int, project: str, name: str, role: str = "annotator") -> None:
        session = accounts.accept(accounts.invite(project, role), name, PASSWORD)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", cookies={f"align_session_{port}": session})
        self.seen = list[str]()
        self.http.headers["X-Align"] = "a page"
        self.http.headers["X-Align"] = self.ask("GET", "/api/projects")["projects"][0]["id"]

    def ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        answer = self.http.request(method, path, **more)
        self.seen.append(answer.text)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def votes(self, choice: Choice, most: int = 1000) -> int:
        """Judges what they are given, so many at most; how many that were."""
        step = self.ask("GET", "/api/task")
        for done in range(most):
            if step["task"] is None:
                return done
            step = self.ask("POST", "/api/vote", json=self.vote(step, choice))
        return most

    def vote(self, step: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
        task = step["task"]
        texts = [plain(answer["written"]) for answer in task["answers"]]
        tiers = ([[0], [1]], [[1], [0]], [[0, 1]])[choice(plain(task["prompt"][-1]["written"]), *texts)]
        said = {"tiers": tiers, "strength": 0 if len(tiers) == 1 else 2, "seconds": 3.0}
        return {"token": task["token"], "key": token_urlsafe(24), "terms": step["terms"], "said": said}


def plain(html: str) -> str:
    return unescape(re.sub("<[^>]*>", "", html)).strip()


def better(which: str) -> Choice:
    """Of each pair the answer with this in it; a tie where neither or both have it."""

    def choice(prompt: str, one: str, other: str) -> int:
        return 2 if (which in one) == (which in other) else int(which in other)

    return choice


class Bench:
    """Evaluations of two files of answers, and the store that they fill."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.said = self.project = ""

    def status(self, *words: str) -> int:
        status = main(list(words))
        printed = self.capsys.readouterr()
        self.said = printed.err + printed.out
        told = re.search(r"stage=annotate project=(\S+)", self.said)
        self.project = told[1] if told else self.project  # that the command told to serve
        return status

    def run(self, words: list[str], status: int = 0) -> Path:
        assert self.status(*words) == status, self.said
        return Path(self.said.strip().splitlines()[-1])

    def refuses(self, *words: str, says: str) -> None:
        """Assert that a command ends with status 2 and a message with this text."""
        assert self.status(*words) == 2, self.said
        assert says in self.said, self.said

    def annotate(self, action: str) -> list[str]:
        """The words of a command on the store."""
        return ["stage=annotate", f"stage.action={action}", f"run.root={self.folder / 'runs'}"]

    def served(self) -> Served:
        return Served(self.folder, self.project)


class Served:
    """The app on the bench's store while votes come in."""

    def __init__(self, folder: Path, project: str) -> None:
        self.folder, self.project = folder, project
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]

    def __enter__(self) -> Served:
        self.store = store_of(self.folder)
        self._app = serving(self.store, self.port)
        self.accounts = self._app.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._app.__exit__(None, None, None)
        self.store.close()

    def voter(self, name: str, role: str = "annotator") -> Voter:
        return Voter(self.accounts, self.port, self.project, name, role)


def artifact(run: Path, name: str) -> Any:
    return json.loads((run / "artifact" / name).read_text())


def verdicts(run: Path) -> list[dict[str, Any]]:
    path = run / "artifact" / "verdicts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def against(run: Path) -> Mapping[str, Any]:
    return artifact(run, "results.json")["tasks"]["chat"]["against"]
