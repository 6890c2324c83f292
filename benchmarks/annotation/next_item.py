"""Measure the time from the key that sends a vote to the next item on the screen, in Chromium.

    python benchmarks/annotation/next_item.py [--votes 100] [--chromium /usr/bin/chromium]

One annotator, a server of `stage=annotate`, and a store of 10,000 pairs of 80 words. The page measures from the keydown
of Enter to the first frame after the prompt has changed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from crowd import create_accounts, create_store, find_free_port, percentile, run_server
from playwright.sync_api import sync_playwright

WATCH = """() => {
  window.durations = [];
  let start = null, before = "";
  const prompt = () => document.querySelector(".prompt")?.innerText ?? "";
  addEventListener("keydown", (e) => { if (e.key === "Enter") { start = e.timeStamp; before = prompt(); } }, true);
  new MutationObserver(() => {
    if (start === null || prompt() === before || !prompt()) return;
    const keydown = start;
    start = null;
    requestAnimationFrame(() => durations.push(performance.now() - keydown));
  }).observe(document.body, { childList: true, subtree: true });
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=100)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        url = f"sqlite:///{folder}/annotations.db"
        port = find_free_port()
        with create_store(url, 10_000) as store:
            session = create_accounts(store, 1)["annotator 0"]
        with run_server(Path(folder), port, f"store.url={url}"):
            browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
            context = browser.new_context()
            address = f"http://127.0.0.1:{port}"
            context.add_cookies([{"name": f"align_session_{port}", "value": session, "url": address}])
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector(".answer", timeout=60_000)
            page.evaluate(WATCH)
            for vote in range(options.votes):
                page.keyboard.press("27"[vote % 2])
                page.wait_for_timeout(600)  # a draft is saved meanwhile
                page.keyboard.press("Enter")
                page.wait_for_function(f"durations.length > {vote}")
            durations = page.evaluate("durations")
            browser.close()
    print(f"{len(durations)} votes: p50 {percentile(durations, 0.5):.0f} ms, p95 {percentile(durations, 0.95):.0f} ms")


if __name__ == "__main__":
    main()
