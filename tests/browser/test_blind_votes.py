"""Two people compare two systems' answers blind in a browser: forty votes become the win rate, and no page names the
system of an answer."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from blind_voting import NAMES, PASSWORD, open_vote_store, serve_annotation_app, write_blind_evaluation
from free_ports import pick_free_port
from json_lines import write_rows

from align.__main__ import main
from align.run import read_manifest

pytestmark = pytest.mark.slow
TEXTS = ("text", "json", "javascript", "html", "css", "xml")


class Person:
    """An annotator with a browser context, and all text that was sent and received.

    Attributes:
        exchanged: addresses, headers and bodies of requests and responses.
        left: an answer's last character, which tells its system → how often it was shown first.
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
        """Keep a response's address and headers, of redirects too, and its text."""
        self.exchanged.append(f"{response.url} {json.dumps(response.all_headers())}")
        if any(kind in response.headers.get("content-type", "") for kind in TEXTS) and response.status == 200:
            self.exchanged.append(response.body().decode("utf-8", "replace"))

    def vote(self, lost: set[str]) -> bool:
        """Prefer the answer that ends in `!`, except for these questions. Returns whether there was an item."""
        if self.page.locator(".prompt").count() == 0:
            return False
        self.exchanged.append(self.page.content())
        question = re.search(r"Question \d+", self.page.inner_text(".prompt"))[0]  # pyright: ignore
        first, _ = (text.strip() for text in self.page.locator(".answer .text").all_inner_texts())
        self.left[first[-1]] += 1
        wins = (first[-1] == "!") == (question not in lost)
        self.page.keyboard.press("2" if wins else "6")
        self.page.keyboard.press("Enter")
        self.page.wait_for_function(
            "q => !document.querySelector('.prompt')?.textContent.includes(q + '?')", arg=question
        )
        return True


def run_and_capture(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    assert main(arguments) == 0
    stdout = capsys.readouterr().out
    return Path(stdout.strip().splitlines()[-1]), stdout


def test_forty_blind_votes_are_the_win_rate_that_they_say(
    browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold = [{"prompt": f"Question 9{i}?", "answers": ["Right!", "Wrong."], "expected": [[0], [1]]} for i in range(3)]
    arguments = [*write_blind_evaluation(tmp_path, items=34), "stage.votes=40"]
    arguments += [f"stage.gold={write_rows(tmp_path / 'gold.jsonl', gold)}"]
    first, stdout = run_and_capture(arguments, capsys)
    project = re.search(r"stage=annotate project=(\S+)", stdout)[1]  # pyright: ignore
    port = pick_free_port()
    lost_questions = {f"Question {i}" for i in range(9)}
    with open_vote_store(tmp_path) as store, serve_annotation_app(store, port) as accounts:
        links = [f"http://127.0.0.1:{port}/invite?token={accounts.invite(project, 'annotator')}" for _ in range(2)]
        people = [Person(browser, link, name) for link, name in zip(links, ("ann", "bob"), strict=True)]
        for _ in range(60):
            if not [person for person in people if person.vote(lost_questions)]:
                break
        rankings = store.rankings(project)
        exchanged = "\n".join(text for person in people for text in person.exchanged)
        for person in people:
            person.context.close()
    work = [vote for vote in rankings if vote.purpose == "work"]
    assert len(work) == 40
    assert len({vote.annotator for vote in work}) == 2
    assert sum(person.left.total() for person in people) == len(rankings)

    second, stdout = run_and_capture(arguments, capsys)
    assert "people: 40 of 40 votes on 34 pairs, by 2 people" in stdout
    task = json.loads((second / "artifact" / "results.json").read_text())["tasks"]["chat"]
    assert task["against"]["okapi"]["win_rate"]["value"] == pytest.approx(25 / 34)
    rows = [json.loads(line) for line in (second / "artifact" / "verdicts.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    for row in rows:
        assert row["verdict"] == float(f"Question {row['prompt'][1:]}" not in lost_questions)
    orders = Counter(row["order"] for row in rows)
    assert abs(orders["first"] - orders["second"]) <= 1
    people_report = json.loads((second / "artifact" / "people.json").read_text())
    assert people_report["agreement"]["raw"]["value"] == 1.0
    assert people_report["gold_votes"] == 0 or people_report["gold"]["value"] == 1.0

    secrets = [*NAMES, first.name, second.name, "eval/", ".jsonl", str(tmp_path), "stage.systems"]
    secrets += [source.digest[:12] for source in read_manifest(second).inputs.values()]
    assert [secret for secret in secrets if secret.lower() in exchanged.lower()] == []
    assert "Question 3?" in exchanged  # the text of pages was searched
    assert project in exchanged
