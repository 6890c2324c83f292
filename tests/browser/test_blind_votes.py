"""Two people judge two systems' answers in a browser, blind: forty votes become the win rate, and no page says whose
answer is whose."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from annotation_app import free_port
from blind import NAMES, PASSWORD, evaluation, serving, store_of, written

from align.__main__ import main
from align.run import read_manifest

pytestmark = pytest.mark.slow
TEXTS = ("text", "json", "javascript", "html", "css", "xml")


class Person:
    """Somebody in a browser of their own, and all that it sent and was sent.

    Attributes:
        left: how often the answer of each system stood first, by how it ends.
    """

    def __init__(self, browser: Any, link: str, name: str) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.exchanged = list[str]()
        self.left = Counter[str]()
        self.page.on("request", lambda request: self.exchanged.append(f"{request.url} {request.post_data or ''}"))
        self.page.on("response", self.keep)
        self.page.goto(link)
        self.page.fill("#name", name)
        self.page.fill("#password", PASSWORD)
        self.page.fill("#again", PASSWORD)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#align-app header", timeout=60_000)

    def keep(self, response: Any) -> None:
        """Also of what the browser keeps to itself, such as a redirect, the address and the headers."""
        self.exchanged.append(f"{response.url} {json.dumps(response.all_headers())}")
        if any(kind in response.headers.get("content-type", "") for kind in TEXTS) and response.status == 200:
            self.exchanged.append(response.body().decode("utf-8", "replace"))

    def vote(self, lost: set[str]) -> bool:
        """Prefers the answer that ends in `!`, but for these questions; whether there was one to judge."""
        if self.page.locator(".prompt").count() == 0:
            return False
        self.exchanged.append(self.page.content())
        question = re.search(r"Question \d+", self.page.inner_text(".prompt"))[0]  # pyright: ignore
        first, _ = (found.strip() for found in self.page.locator(".answer .text").all_inner_texts())
        self.left[first[-1]] += 1
        wins = (first[-1] == "!") == (question not in lost)
        self.page.keyboard.press("2" if wins else "6")
        self.page.keyboard.press("Enter")
        self.page.wait_for_function(
            "q => !document.querySelector('.prompt')?.textContent.includes(q + '?')", arg=question
        )
        return True


def ran(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    assert main(words) == 0
    out = capsys.readouterr().out
    return Path(out.strip().splitlines()[-1]), out


def test_forty_blind_votes_are_the_win_rate_that_they_say(
    browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold = [{"prompt": f"Question 9{i}?", "answers": ["Right!", "Wrong."], "expected": [[0], [1]]} for i in range(3)]
    words = [*evaluation(tmp_path, items=34), "stage.votes=40"]
    words += [f"stage.gold={written(tmp_path / 'gold.jsonl', gold)}"]
    first, out = ran(words, capsys)
    project = re.search(r"stage=annotate project=(\S+)", out)[1]  # pyright: ignore
    port, lost = free_port(), {f"Question {i}" for i in range(9)}
    with store_of(tmp_path) as store, serving(store, port) as accounts:
        links = [f"http://127.0.0.1:{port}/invite?token={accounts.invite(project, 'annotator')}" for _ in range(2)]
        people = [Person(browser, link, name) for link, name in zip(links, ("ann", "bob"), strict=True)]
        for _ in range(60):
            if not [person for person in people if person.vote(lost)]:
                break
        rankings = store.rankings(project)
        exchanged = "\n".join(text for person in people for text in person.exchanged)
        for person in people:
            person.context.close()
    work = [vote for vote in rankings if vote.purpose == "work"]
    assert len(work) == 40
    assert len({vote.annotator for vote in work}) == 2
    assert sum(person.left.total() for person in people) == len(rankings)

    second, out = ran(words, capsys)
    assert "people: 40 of 40 votes on 34 pairs, by 2 people" in out
    task = json.loads((second / "artifact" / "results.json").read_text())["tasks"]["chat"]
    assert task["against"]["okapi"]["win_rate"]["value"] == pytest.approx(25 / 34)
    rows = [json.loads(line) for line in (second / "artifact" / "verdicts.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    for row in rows:
        assert row["verdict"] == float(f"Question {row['prompt'][1:]}" not in lost)
    orders = Counter(row["order"] for row in rows)
    assert abs(orders["first"] - orders["second"]) <= 1
    shown = json.loads((second / "artifact" / "people.json").read_text())
    assert shown["agreement"]["raw"]["value"] == 1.0
    assert shown["gold"]["value"] == 1.0 or shown["gold_votes"] == 0

    private = [*NAMES, first.name, second.name, "eval/", ".jsonl", str(tmp_path), "stage.systems"]
    private += [read.digest[:12] for read in read_manifest(second).inputs.values()]
    assert [secret for secret in private if secret.lower() in exchanged.lower()] == []
    assert "Question 3?" in exchanged  # it was looked for where it would be
    assert project in exchanged
