"""A scripted annotator at the real page: Chromium, the keyboard, and a taste for warm answers, written down here.

    python recipes/forty/label.py PROJECT RUN_ROOT [--items 40] [KEY=VALUE …]

It starts `stage=annotate stage.demo=true`, opens the link that this prints, reads what stands on the screen, presses
the keys that a person would press, and ends the server by Ctrl+C. The store takes its votes for a person's: this is a
stand-in for demonstrations, never for people.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from align.reward.rules import load_sentiment_scorer

WAIT_MS = 60_000
TEXTS = "[...document.querySelectorAll('.answer .text')].map(text => text.innerText)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project")
    parser.add_argument("root", type=Path)
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="further words of the command")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_intermixed_args()
    words = ["stage=annotate", "stage.demo=true", f"project={given.project}", f"run.root={given.root}", *given.more]
    with serving(words) as link, sync_playwright() as running:
        browser = running.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(link)
        done = label(page, given.items)
        browser.close()
    print(f"{done} items ranked in the browser")


@contextmanager
def serving(words: Sequence[str]) -> Iterator[str]:
    """The link that a server prints; it is asked to end as Ctrl+C asks it, and what it says then is shown."""
    command = [sys.executable, "-m", "align", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if found := re.search(r"open (http\S+)", line):
                    yield found[1]
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            server.send_signal(signal.SIGINT)
            print(server.stdout.read(), end="")


def label(page: Page, items: int) -> int:
    """Ranks items by keyboard until so many are done or none is left; how many."""
    warmth = load_sentiment_scorer()
    for done in range(items):
        page.wait_for_selector(".answer, #align-app p:not([id])", timeout=WAIT_MS)
        texts = page.evaluate(TEXTS)
        if not texts:
            return done
        form = page.query_selector("form")
        for key in keys([warmth(text) for text in texts]):
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        page.wait_for_function("before => document.querySelector('form') !== before", arg=form, timeout=WAIT_MS)
    return items


def keys(scores: Sequence[float]) -> list[str]:
    """What to press for answers with these scores, in the order in which they stand.

    Of two answers: 1 (the left is much better) to 7. Of more: each one's place; the page goes to the next by itself.
    """
    if len(scores) == 2:
        gap = scores[1] - scores[0]
        strength = 0 if gap == 0 else 1 if abs(gap) < 0.3 else 2 if abs(gap) < 0.8 else 3
        return [str(4 + (strength if gap > 0 else -strength))]
    best_first = sorted(set(scores), reverse=True)
    return [str(best_first.index(score) + 1) for score in scores]


if __name__ == "__main__":
    main()
