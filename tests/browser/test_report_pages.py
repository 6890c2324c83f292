"""Reports of real runs of every stage in a browser: on a phone and a desktop, in the light and the dark scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from free_ports import pick_free_port

from align.__main__ import main
from align.config.stages import WITH_RUNS
from align.registry.comparison_page import write_sweep_page
from align.report import live
from align.stages import serve

pytestmark = pytest.mark.slow
FEW = ("stage.batch_size=8", "data.allow_simulated=true", "stage.held_out=0.3", "stage.log_every=1")
PPO = ("stage.updates=2", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=16", "stage.eval_every=1")
LINES: dict[str, tuple[str, ...]] = {
    "data": (
        "stage.clean=[unicode, {pii: {action: report}}]",
        "reward=sentiment",
        "stage.score.by=reward",
        "stage.score.keep=[0.1, 0.9]",
    ),
    "sft": ("stage.batch_size=8", "stage.epochs=10", "stage.log_every=1"),  # enough steps for a smoothed curve
    "full": ("stage.max_steps=1",),
    "sample": ("stage.prompts=24",),
    "annotate": ("stage.action=simulate",),
    "reward": (*FEW, "stage.micro_batch=8"),
    "dpo": FEW,
    "kto": FEW,
    "ppo": (*PPO, "stage.eval_prompts=4", "stage.shown=2"),
    "eval": ("stage.prompts=8",),
    "export": (),
    "verify": ("stage.rows=4", "stage.micro_batch=2", "rollout.max_new_tokens=6"),
    "serve": (),
}
COLOURS = ["color-contrast", "link-in-text-block"]
"""Rules of axe that depend on the colour scheme."""
FROM_FILE = ("sft", "full", "sample", "ppo", "eval")
COMPARED = ("compared", "a sweep's")
"""Pages of several runs."""
FROM_NOTHING = ("sft", "full", "data")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> dict[str, Path]:
    """Stage → its report; `… running` → a report during the run; `… failed` → that of a failed run."""
    root = tmp_path_factory.mktemp("reports") / "runs"
    early_reports = tmp_path_factory.mktemp("earlier")
    data = ["data=jsonl", f"data.path={chats}", "data.held_out=0.25", "data.max_length=128"]
    report_paths: dict[str, Path] = {}
    write = live.Report.write

    def write_and_copy(report: live.Report, path: Path) -> Path:
        if report.refresh:
            stage = path.parent.parent.name
            report_paths[f"{stage} running"] = write(report, early_reports / f"{stage}.html")
        return write(report, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live.Report, "write", write_and_copy)
        patch.setattr(live, "MAX_TIME_SHARE", float("inf"))
        patch.setattr(
            serve, "serve_app", lambda app, host, port, ready, *_: ready()
        )  # the server exits when it is ready
        for stage, options in LINES.items():
            # PPO's page is written at every step, with curves.
            patch.setattr(live, "WRITE_INTERVAL_S", 0.0 if stage == "ppo" else 20.0)
            line = [f"stage={stage}", "rollout.max_new_tokens=12", *options, "device=cpu", f"run.root={root}"]
            line += data if stage in FROM_FILE else []
            line += data[:3] if stage == "data" else []
            line += [f"stage.port={pick_free_port()}", "stage.adapters={tuned: ppo:latest}"] if stage == "serve" else []
            line += ["model=hub", f"model.path={tiny_model}"] if stage in FROM_NOTHING else []
            assert main([*line, "run.name=a"]) == 0, line
            report_paths[stage] = root / stage / "a" / "report.html"
            if stage == "sft":
                assert main([*line, "stage.lr=1e30", "run.name=b"]) == 2
                report_paths["sft failed"] = root / "sft" / "b" / "report.html"
    report_paths["compared"] = early_reports / "compared.html"  # runs of several stages, one of which failed
    overrides = ["stage.where={stage: [sft, reward, ppo]}", f"stage.html={report_paths['compared']}"]
    assert main(["stage=registry", "stage.action=compare", f"run.root={root}", *overrides]) == 0
    report_paths["a sweep's"] = write_sweep_page([root / "sft" / "a", root / "full" / "a"]) or Path()
    return report_paths


@pytest.mark.parametrize("width", [390, 1280])
def test_every_report_is_fit_to_read(browser: Any, pages: dict[str, Path], width: int) -> None:
    """The dark scheme changes colours only, so that only their rules run again."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    assert pages.keys() >= {*WITH_RUNS}
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    for name, path in pages.items():
        page.goto(path.as_uri())
        # The page of a running run refreshes itself on purpose.
        rules = {"rules": {"meta-refresh": {"enabled": False}}} if "running" in name else {}
        for scheme, options in (("light", rules), ("dark", {"runOnly": COLOURS})):
            page.emulate_media(color_scheme=scheme)
            over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert over == 0, (name, width, scheme)
            faults = axe.run(page, options=options).response["violations"]
            assert [(f["id"], f["nodes"][0]["html"]) for f in faults] == [], (name, scheme)
    context.close()


def test_what_a_report_holds(page: Any, pages: dict[str, Path]) -> None:
    for name, path in pages.items():
        page.goto(path.as_uri())
        is_finished = " " not in name
        assert page.locator('meta[http-equiv="refresh"]').count() == ("running" in name), name
        assert page.locator(".verdict").inner_text().endswith("."), name
        assert page.locator("h1").count() == 1
        cells = page.locator("td, th, dt, dd, figcaption, p, h2")
        blank = cells.evaluate_all("found => found.filter(cell => !cell.innerText.trim()).length")
        assert blank == 0, name
        plots = page.locator("figure.plot img")
        assert all(len(alt) > 20 for alt in plots.evaluate_all("found => found.map(img => img.alt)")), name
        assert plots.evaluate_all("found => found.every(img => img.complete && img.naturalWidth > 100)"), name
        assert page.locator("dt", has_text="Command").count() == (name not in COMPARED)
        if is_finished:
            labels = page.locator(".scroll").first.locator("td:first-child").all_inner_texts()
            assert len(labels) == len(set(labels)), name
    page.goto(pages["sft"].as_uri())
    assert page.locator("figure.plot").count() == 3
    assert "held out" in page.locator("figure.plot img").first.get_attribute("alt")
    page.goto(pages["data"].as_uri())
    pictures = page.locator("figure.plot img").evaluate_all("found => found.map(img => img.alt)")
    assert [alt.partition(" ")[0] for alt in pictures] == ["Bars", "Bars", "Bars", "Histogram", "Histogram"]
    assert "are dropped" in pictures[-1]
    for name in ("sft", "sft failed", "full", "reward", "dpo", "kto", "data"):
        page.goto(pages[name].as_uri())
        assert page.locator(".tokens mark").count() >= 2, name
        line = page.locator(".tokens mark").first.evaluate("mark => getComputedStyle(mark).borderBottomWidth")
        assert line == "2px", name
    page.goto(pages["ppo"].as_uri())
    page.get_by_role("link", name="reward:a").click()  # the policy that forbids scripts lets links through
    assert page.locator("h1").inner_text() == "Reward model"


def test_plots_are_dark_in_the_dark(browser: Any, pages: dict[str, Path]) -> None:
    """The corner of a plot has the colour of the page behind it, in either scheme."""
    for scheme, dark in (("light", False), ("dark", True)):
        context = browser.new_context(viewport={"width": 390, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.goto(pages["sft"].as_uri())
        shot = page.locator("figure.plot img").first.screenshot()
        assert (brightness(shot) < 60) == dark
        assert (brightness(shot) > 220) != dark
        context.close()


def ground_and_drawn(png: bytes) -> tuple[float, float]:
    """Return the brightness of a picture's background and of its most distinct colour, 0 to 255."""
    import io

    import numpy as np
    from matplotlib.image import imread

    grey = 255 * np.asarray(imread(io.BytesIO(png), format="png"))[..., :3].mean(-1)
    background = float(np.median(grey))
    return background, float(grey.flat[np.abs(grey - background).argmax()])


def brightness(png: bytes) -> float:
    """Return a picture's mean brightness, 0 to 255."""
    import io

    import numpy as np
    from matplotlib.image import imread

    return 255 * float(np.asarray(imread(io.BytesIO(png), format="png"))[..., :3].mean())
