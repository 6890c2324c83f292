"""The ranking page's display: hidden and long answers, untrusted text, and accessibility."""

from __future__ import annotations

import os
import shutil

import pytest
from annotation_app import read_question, send_vote

from align.annotate.store import publish_guidelines
from align.annotate.web.templating import STATIC

pytestmark = pytest.mark.slow


def test_blurred_answers_are_shown_when_asked_for(serve, page):
    app = serve([("yes", "no")] * 3, blurred=True)
    app.open(page)
    assert page.locator(".answer.blurred").count() == 2
    page.keyboard.press("x")
    assert page.locator(".answer.blurred").count() == 0


def test_a_long_answer_folds_and_is_all_there(serve, page):
    app = serve([("word " * 4000 + "THE END", "no")])
    app.open(page)
    page.get_by_role("button", name="Show the whole answer").click()
    assert "THE END" in page.inner_text(".answers")
    long = page.locator(".answer .text", has_text="THE END")
    assert long.evaluate("text => text.clientHeight === text.scrollHeight")


def test_after_an_upgrade_no_script_of_before_is_run(serve, page, tmp_path, monkeypatch):
    static_folder = tmp_path / "static"
    scripts = sorted(path.name for path in STATIC.glob("*.js"))
    shutil.copytree(STATIC, static_folder)
    monkeypatch.setattr("align.annotate.web.server.STATIC", static_folder)
    app = serve([("yes", "no")])
    for version in (1, 2):
        for name in scripts:
            mark = f"\n(window.versions ??= {{}})['{name}'] = {version};\n"
            (static_folder / name).write_text((STATIC / name).read_text(encoding="utf-8") + mark, encoding="utf-8")
            os.utime(static_folder / name, (version, version))  # browsers cache old files for long
        app.open(page)
        assert page.evaluate("window.versions") == dict.fromkeys(scripts, version)
    assert app.errors == []


# Untrusted text

PAYLOADS = (
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "![x](http://203.0.113.9/x.png) <img src='http://203.0.113.9/y.png'>",
    "[click](javascript:window.pwned=1) <javascript:window.pwned=1> [x]: javascript:window.pwned=1",
    "<svg/onload=window.pwned=1><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "```html\n</code></pre><script>window.pwned = 1</script>\n```",
    "`</code><script>window.pwned = 1</script>`",
    "| a |\n|---|\n| <img src=x onerror=window.pwned=1> |",
    "</div></main><style>* { display: none }</style><form action=//203.0.113.9>",
    "${window.pwned = 1} {{window.pwned = 1}} <%= window.pwned = 1 %>",
    "a\u202eb\u2066c\u200bd" + "Z\u0351\u0352" * 2000,
    "\ufeff" + "w" * 1_000_000,
)


def test_what_a_model_wrote_does_nothing(serve, page):
    app = serve([(payload, "no") for payload in PAYLOADS])
    for payload in PAYLOADS:
        publish_guidelines(app.store, "p", payload)
    app.open(page)
    page.keyboard.press("Escape")  # the guidelines
    for _ in PAYLOADS:
        page.keyboard.press("h")
        page.keyboard.press("Escape")
        page.keyboard.press("d")
        page.wait_for_selector("dialog[open] h2:has-text('Differences')", timeout=60_000)
        page.keyboard.press("Escape")
        assert page.evaluate("window.pwned") is None
        tag_names = page.evaluate(
            "[...document.querySelectorAll('.text *')].flatMap(e => [e.tagName, ...e.getAttributeNames()])"
        )
        allowed_names = {
            "P",
            "PRE",
            "CODE",
            "BR",
            "STRONG",
            "EM",
            "TABLE",
            "THEAD",
            "TBODY",
            "TR",
            "TH",
            "TD",
            "DEL",
            "INS",
            "class",
        }
        assert set(tag_names) <= allowed_names
        page.keyboard.press("4")
        send_vote(page)
    assert len(app.votes) == len(PAYLOADS)
    assert [url for url in app.requests if not url.startswith((app.url, "data:", "blob:"))] == []
    assert app.errors == []


# Accessibility


def test_a_dialog_stands_in_the_middle_and_its_heading_looks_like_one(serve, page):
    app = serve([("yes", "no")])
    app.open(page)
    for key in ("?", "s", "h"):
        page.keyboard.press(key)
        box = page.locator("dialog[open]").bounding_box()
        space_above = box["y"]
        space_below = 900 - box["y"] - box["height"]
        assert abs(space_above - space_below) <= 1
        assert space_above > 20
        heading = page.locator("dialog[open] h2")
        assert heading.evaluate("it => it === document.activeElement")  # a screen reader reads it first
        assert heading.evaluate("it => getComputedStyle(it).outlineStyle") == "none"
        page.keyboard.press("Escape")


def test_axe_finds_nothing_wrong(serve, browser):
    """The page follows a change of the colour scheme without a reload."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    app = serve([("yes", "no"), ("a", "b", "c")], attributes=["helpful"], blurred=True)
    publish_guidelines(app.store, "p", "# Be fair")
    context = browser.new_context(bypass_csp=True)
    page = app.open(context.new_page())

    def check(page_part: str) -> None:
        grounds = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(200)  # for transitions of colours
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            violations = axe.run(page).response["violations"]
            assert violations == [], f"{page_part}, {scheme}: {[(v['id'], v['nodes'][0]['html']) for v in violations]}"
        assert grounds[0] != grounds[1]

    check("guidelines, before the first item")
    page.keyboard.press("Escape")
    for _ in range(2):
        check(read_question(page))
        page.keyboard.press("x")
        for key, page_part in (("h", "guidelines"), ("s", "reasons"), ("?", "keys")):
            page.keyboard.press(key)
            check(page_part)
            page.keyboard.press("Escape")
        page.keyboard.press("g")
        check("judged")
        send_vote(page)
    check("the end")
    context.close()
    assert len(app.votes) == 2
