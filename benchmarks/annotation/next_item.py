"""How long it takes from the key that sends a vote until the next item stands on the screen, in Chromium.

    python benchmarks/annotation/next_item.py [--votes 100] [--chromium /usr/bin/chromium]

One annotator, a server of `stage=annotate`, a store of 10,000 pairs of 80 words. Measured in the page: from the keydown
of Enter to the first frame after another prompt is there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from crowd import filled, free_port, hired, percentile, serving
from playwright.sync_api import sync_playwright

WATCH = """() => {
  window.took = [];
  let began = null, before = "";
  const prompt = () => document.querySelector(".prompt")?.innerText ?? "";
  addEventListener("keydown", (e) => { if (e.key === "Enter") { began = e.timeStamp; before = prompt(); } }, true);
  new MutationObserver(() => {
    if (began === null || prompt() === before || !prompt()) return;
    const start = began;
    began = null;
    requestAnimationFrame(() => took.push(performance.now() - start));
  }).observe(document.body, { childList: true, subtree: true });
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=100)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as running:
        url, port = f"sqlite:///{folder}/annotations.db", free_port()
        with filled(url, 10_000) as store:
            session = hired(store, 1)["annotator 0"]
        with serving(Path(folder), port, f"store.url={url}"):
            browser = running.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
            context = browser.new_context()
            here = f"http://127.0.0.1:{port}"
            context.add_cookies([{"name": f"align_session_{port}", "value": session, "url": here}])
            page = context.new_page()
            page.goto(here)
            page.wait_for_selector(".answer", timeout=60_000)
            page.evaluate(WATCH)
            for vote in range(given.votes):
                page.keyboard.press("27"[vote % 2])
                page.wait_for_timeout(600)  # a draft is saved meanwhile
                page.keyboard.press("Enter")
                page.wait_for_function(f"took.length > {vote}")
            took = page.evaluate("took")
            browser.close()
    print(f"{len(took)} votes: p50 {percentile(took, 0.5):.0f} ms, p95 {percentile(took, 0.95):.0f} ms")


if __name__ == "__main__":
    main()
