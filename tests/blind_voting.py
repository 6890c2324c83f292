"""Blind votes on two systems, for tests: an evaluation of answer files, the annotation app, and voters over HTTP."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import httpx
import pytest
from argon2 import PasswordHasher
from free_ports import pick_free_port
from json_lines import write_rows

from align.__main__ import main
from align.annotate.accounts import Accounts
from align.annotate.store import Store

NAMES = ("zebra", "okapi")
"""The names of the two systems, in their order. Their answers end in `!` and in `.`."""
PASSWORD = "correct horse battery"
Choice = Callable[[str, str, str], int]
"""The prompt and both answers as the page shows them → 0 if the first is better, 1 if the second is, 2 for a tie."""


def write_blind_evaluation(folder: Path, items: int, same: int = 0) -> list[str]:
    """Build the arguments of an evaluation in which people compare two files of answers.

    Args:
        same: the number of items to which both systems give the same answer.
    """
    prompts = [{"id": f"p{i}", "prompt": f"Question {i}?"} for i in range(items)]
    tasks = write_rows(folder / "asked.jsonl", prompts)
    ends = dict(zip(NAMES, "!.", strict=True))
    files = {
        name: write_rows(
            folder / f"{name}.jsonl",
            [{"id": f"p{i}", "answer": f"Reply {i}{'?' if i < same else end}"} for i in range(items)],
        )
        for name, end in ends.items()
    }
    systems = ", ".join(f"{name}: {{file: {path}}}" for name, path in files.items())
    return [
        "stage=eval",
        f"stage.systems={{{systems}}}",
        f"eval.tasks=[{{name: chat, path: {tasks}}}]",
        "stage.judge=people",
        f"run.root={folder / 'runs'}",
        "device=cpu",
    ]


def open_vote_store(folder: Path) -> Store:
    return Store.open(f"sqlite:///{folder / 'runs' / 'annotations.db'}", create_if_missing=False)


def build_fast_accounts(store: Store) -> Accounts:
    """Build accounts whose passwords are hashed fast."""
    return Accounts(store, hasher=PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


@contextmanager
def serve_annotation_app(store: Store, port: int) -> Iterator[Accounts]:
    """Serve the annotation app on a store while the block runs. Yields the accounts that may log in."""
    import uvicorn

    from align.annotate.web.access import AccountAuthenticator
    from align.annotate.web.server import build_app

    accounts = build_fast_accounts(store)
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
    """A person with an account, who votes over HTTP.

    Attributes:
        seen: the bodies of all responses of the server.
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
        """Vote on tasks until none is left, at most `most` of them. Returns the number of votes."""
        step = self.ask("GET", "/api/task")
        for count in range(most):
            if step["task"] is None:
                return count
            step = self.ask("POST", "/api/vote", json=self.vote(step, choice))
        return most

    def vote(self, step: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
        task = step["task"]
        texts = [strip_html(answer["written"]) for answer in task["answers"]]
        tiers = ([[0], [1]], [[1], [0]], [[0, 1]])[choice(strip_html(task["prompt"][-1]["written"]), *texts)]
        judgement = {"tiers": tiers, "strength": 0 if len(tiers) == 1 else 2, "seconds": 3.0}
        return {"token": task["token"], "key": token_urlsafe(24), "terms": step["terms"], "said": judgement}


def strip_html(html: str) -> str:
    return unescape(re.sub("<[^>]*>", "", html)).strip()


def prefer_answer_with(which: str) -> Choice:
    """Build a choice that prefers the answer containing a text. It is a tie if neither or both contain it."""

    def choice(prompt: str, one: str, other: str) -> int:
        return 2 if (which in one) == (which in other) else int(which in other)

    return choice


class BlindEvaluations:
    """Evaluations of two files of answers, and the store of their votes."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self.output = self.project = ""

    def status(self, *words: str) -> int:
        status = main(list(words))
        printed = self.capsys.readouterr()
        self.output = printed.err + printed.out
        match = re.search(r"stage=annotate project=(\S+)", self.output)
        # the project that the command asks the user to serve
        self.project = match[1] if match else self.project
        return status

    def run(self, words: list[str], status: int = 0) -> Path:
        assert self.status(*words) == status, self.output
        return Path(self.output.strip().splitlines()[-1])

    def refuses(self, *words: str, says: str) -> None:
        """Assert that a command ends with status 2 and a message that contains a text."""
        assert self.status(*words) == 2, self.output
        assert says in self.output, self.output

    def annotate(self, action: str) -> list[str]:
        """Build the arguments of a command on the store."""
        return ["stage=annotate", f"stage.action={action}", f"run.root={self.folder / 'runs'}"]

    def start_server(self) -> AnnotationServer:
        return AnnotationServer(self.folder, self.project)


class AnnotationServer:
    """The annotation app on the store of an evaluation's votes, served while the block runs."""

    def __init__(self, folder: Path, project: str) -> None:
        self.folder = folder
        self.project = project
        self.port = pick_free_port()

    def __enter__(self) -> AnnotationServer:
        self.store = open_vote_store(self.folder)
        self._app = serve_annotation_app(self.store, self.port)
        self.accounts = self._app.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._app.__exit__(None, None, None)
        self.store.close()

    def voter(self, name: str, role: str = "annotator") -> Voter:
        return Voter(self.accounts, self.port, self.project, name, role)


def read_artifact(run: Path, name: str) -> Any:
    return json.loads((run / "artifact" / name).read_text())


def read_verdicts(run: Path) -> list[dict[str, Any]]:
    path = run / "artifact" / "verdicts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_comparison(run: Path) -> Mapping[str, Any]:
    return read_artifact(run, "results.json")["tasks"]["chat"]["against"]
