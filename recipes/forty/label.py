"""Rank answers on the annotation page with Chromium, by the keys that a person would press. Warm answers are preferred.

Usage: python recipes/forty/label.py PROJECT RUN_ROOT [--items 40] [KEY=VALUE …]

The script starts `stage=annotate stage.demo=true`, opens the printed link, reads the answers on the screen, presses
keys, and stops the server as Ctrl+C does. The store cannot tell these votes from
a person's: use the script for demonstrations only.
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
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further settings of the stage")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_intermixed_args()
    settings = [f"project={options.project}", f"run.root={options.root}", *options.settings]
    with run_server(["stage=annotate", "stage.demo=true", *settings]) as link, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(link)
        ranked = rank_items(page, options.items)
        browser.close()
    print(f"{ranked} items ranked in the browser")


@contextmanager
def run_server(settings: Sequence[str]) -> Iterator[str]:
    """Start the server and yield the link that it prints. At the end, stop it by SIGINT and print its last lines."""
    command = [sys.executable, "-m", "align", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if link := re.search(r"open (http\S+)", line):
                    yield link[1]
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            server.send_signal(signal.SIGINT)
            print(server.stdout.read(), end="")


def rank_items(page: Page, items: int) -> int:
    """Rank up to so many items by keyboard. Returns the number of ranked items."""
    score_sentiment = load_sentiment_scorer()
    for ranked in range(items):
        page.wait_for_selector(".answer, #align-app p:not([id])", timeout=WAIT_MS)
        texts = page.evaluate(TEXTS)
        if not texts:
            return ranked
        form = page.query_selector("form")
        for key in choose_keys([score_sentiment(text) for text in texts]):
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        page.wait_for_function("before => document.querySelector('form') !== before", arg=form, timeout=WAIT_MS)
    return items


def choose_keys(scores: Sequence[float]) -> list[str]:
    """Return the keys that rank answers by their scores, which are in the order of the page.

    Two answers take one key, from 1 (the left one is much better) to 7. More answers take one key each, their rank; the
    page moves to the next answer by itself.
    """
    if len(scores) == 2:
        gap = scores[1] - scores[0]
        limits = (0.0, 0.3, 0.8)
        strength = 0 if gap == 0 else sum(abs(gap) >= limit for limit in limits)
        return [str(4 + (strength if gap > 0 else -strength))]
    best_first = sorted(set(scores), reverse=True)
    return [str(best_first.index(score) + 1) for score in scores]


if __name__ == "__main__":
    main()
