"""The pictures of the registry's page in the docs, of the runs that `make demo-small` leaves.

python -m align stage=registry stage.action=serve &
python docs/registry_pictures.py [http://127.0.0.1:7862] [--chromium /usr/bin/chromium]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:7862")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 620})
        page.goto(given.url)
        page.wait_for_selector("#align-registry tbody tr")
        page.screenshot(path=HERE / "registry-runs.png")
        policy = page.locator("tbody th a", has_text="ppo:").first
        policy.click()
        page.wait_for_selector("figure.plot img", timeout=60_000)
        page.set_viewport_size({"width": 1360, "height": 1000})
        page.wait_for_timeout(500)
        page.screenshot(path=HERE / "registry-run.png")
        browser.close()


if __name__ == "__main__":
    main()
