"""What the ranking page shows: hidden and long answers, untrusted text, and to everyone."""

from __future__ import annotations

import os
import shutil

import pytest
from annotation_app import question, send

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
    page.get_by_role("button", name="Show all of it").click()
    assert "THE END" in page.inner_text(".answers")
    long = page.locator(".answer .text", has_text="THE END")
    assert long.evaluate("text => text.clientHeight === text.scrollHeight")


def test_after_an_upgrade_no_script_of_before_is_run(serve, page, tmp_path, monkeypatch):
    served, scripts = tmp_path / "static", sorted(path.name for path in STATIC.glob("*.js"))
    shutil.copytree(STATIC, served)
    monkeypatch.setattr("align.annotate.web.server.STATIC", served)
    app = serve([("yes", "no")])
    for version in (1, 2):
        for name in scripts:
            mark = f"\n(window.versions ??= {{}})['{name}'] = {version};\n"
            (served / name).write_text((STATIC / name).read_text(encoding="utf-8") + mark, encoding="utf-8")
            os.utime(served / name, (version, version))  # browsers think that what is old stays as it is
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
        page.wait_for_selector("dialog[open] h2:has-text('differs')", timeout=60_000)
        page.keyboard.press("Escape")
        assert page.evaluate("window.pwned") is None
        found = page.evaluate(
            "[...document.querySelectorAll('.text *')].flatMap(e => [e.tagName, ...e.getAttributeNames()])"
        )
        allowed = {
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
        assert set(found) <= allowed
        page.keyboard.press("4")
        send(page)
    assert len(app.votes) == len(PAYLOADS)
    assert [url for url in app.requests if not url.startswith((app.url, "data:", "blob:"))] == []
    assert app.errors == []


# For everyone


def test_a_dialog_stands_in_the_middle_and_its_heading_looks_like_one(serve, page):
    app = serve([("yes", "no")])
    app.open(page)
    for key in ("?", "s", "h"):
        page.keyboard.press(key)
        box = page.locator("dialog[open]").bounding_box()
        above, below = box["y"], 900 - box["y"] - box["height"]
        assert abs(above - below) <= 1
        assert above > 20
        heading = page.locator("dialog[open] h2")
        assert heading.evaluate("it => it === document.activeElement")  # whoever cannot see hears it first
        assert heading.evaluate("it => getComputedStyle(it).outlineStyle") == "none"
        page.keyboard.press("Escape")


def test_axe_finds_nothing_wrong(serve, browser):
    """In either scheme, which the page follows as it stands."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    app = serve([("yes", "no"), ("a", "b", "c")], attributes=["helpful"], blurred=True)
    publish_guidelines(app.store, "p", "# Be fair")
    context = browser.new_context(bypass_csp=True)
    page = app.open(context.new_page())

    def check(what: str) -> None:
        grounds = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(200)  # colours may pass over into each other
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            found = axe.run(page).response["violations"]
            assert found == [], f"{what}, {scheme}: {[(v['id'], v['nodes'][0]['html']) for v in found]}"
        assert grounds[0] != grounds[1]

    check("guidelines, before the first item")
    page.keyboard.press("Escape")
    for _ in range(2):
        check(question(page))
        page.keyboard.press("x")
        for key, what in (("h", "guidelines"), ("s", "reasons"), ("?", "keys")):
            page.keyboard.press(key)
            check(what)
            page.keyboard.press("Escape")
        page.keyboard.press("g")
        check("judged")
        send(page)
    check("the end")
    context.close()
    assert len(app.votes) == 2
