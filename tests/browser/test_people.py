"""Accounts in the browser: the first admin's link, two annotators at once, the pages of managers, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
from annotation_app import LOST, wait_for_status
from test_report_pages import ground_and_drawn

from align.annotate.store import Judgement
from align.annotate.store.projects import read_guidelines, read_settings, read_state

pytestmark = pytest.mark.slow
GOOD = "correct horse battery"


def accept(page: Any, link: str, name: str) -> None:
    """Open an invitation and choose a name and a password, by keys."""
    page.goto(link)
    if page.get_attribute("#name", "readonly") is None:
        page.fill("#name", name)
    page.fill("#password", GOOD)
    page.fill("#again", GOOD)
    page.keyboard.press("Enter")
    page.wait_for_selector("#align-app header", timeout=60_000)


def log_in(page: Any, url: str, name: str) -> None:
    page.goto(url)
    page.fill("#name", name)
    page.fill("#password", GOOD)
    page.keyboard.press("Enter")
    page.wait_for_selector("#align-app header", timeout=60_000)


def judge(page: Any, times: int) -> list[str]:
    """Prefer the left answer of so many items, and return their questions."""
    questions = []
    for _ in range(times):
        questions.append(page.inner_text(".prompt"))
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.wait_for_function("t => document.querySelector('.prompt')?.innerText !== t", arg=questions[-1])
    return questions


def manage(page: Any, tab: str) -> None:
    page.click("text=Manage")
    page.wait_for_selector(f"button[role=tab]:has-text('{tab}')", timeout=60_000)
    page.click(f"button[role=tab]:has-text('{tab}')")


def read_link(page: Any) -> str:
    values = "[...document.querySelectorAll('textarea, input')].map(e => e.value)"
    page.wait_for_function(f"{values}.some(v => v.includes('/invite?token='))")
    return page.evaluate(f"{values}.find(v => v.includes('/invite?token='))")


@pytest.fixture
def visitor(browser: Any):
    """A function that opens a page in a browser context of its own."""
    contexts = []

    def open_visitor_page(**options: Any) -> Any:
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        return page

    yield open_visitor_page
    for context in contexts:
        context.close()


def test_from_the_first_admins_link_to_two_annotators_at_once(serve, visitor):
    app = serve([("yes", "no")] * 6, accounts=True)
    admin, ann, bob = (app.watch(visitor()) for _ in range(3))
    accept(admin, f"{app.url}/invite?token={app.accounts.invite_first_admin('p')}", "root")
    manage(admin, "People")
    admin.wait_for_selector("td >> text=root")
    for page, name in ((ann, "ann"), (bob, "bob")):
        admin.click("button:has-text('Invite')")
        accept(page, read_link(admin), name)
        admin.reload()
        open_people_tab(admin)
    admin.wait_for_selector("td >> text=bob")
    first = ann.inner_text(".prompt"), bob.inner_text(".prompt")
    assert first[0] != first[1]
    questions = [*judge(ann, 2), *judge(bob, 2)]
    assert len(set(questions)) == 4
    assert {app.store.pseudonym("p", name) for name in ("ann", "bob")} == {vote.annotator for vote in app.votes}
    ann.click("text=Log out")
    ann.wait_for_selector("#password")
    log_in(ann, app.url, "ANN")
    assert "You: 2" in ann.inner_text("header")
    assert app.errors == []
    assert all(url.startswith(app.url) for url in app.requests)


def open_people_tab(page: Any) -> None:
    page.wait_for_selector("button[role=tab]:has-text('People')", timeout=60_000)
    page.click("button[role=tab]:has-text('People')")
    page.wait_for_selector("td >> text=root")


def test_settings_state_and_guidelines_are_an_admins_to_change(serve, visitor):
    app = serve([("yes", "no")] * 3, accounts=True)
    page = app.watch(visitor())
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'admin')}", "root")
    manage(page, "Project")
    # The settings are shown.
    page.wait_for_function("[...document.querySelectorAll('input')].some(e => e.value === '30')")
    page.get_by_label("Number of annotators who judge an item").fill("2")
    page.get_by_label("Attributes on which each answer is rated").fill("helpful, harmless")
    page.get_by_label("paused").check()
    page.click("button:has-text('Save')")
    page.wait_for_selector("text=Saved")
    page.get_by_label("Guidelines, in Markdown").fill("# Be fair")
    page.click("button:has-text('Publish')")
    page.wait_for_selector("text=Published as version 1")
    with app.store.reading() as db:
        settings = read_settings(db, "p")
        assert (settings.overlap, settings.attributes, read_state(db, "p")) == (2, ("helpful", "harmless"), "paused")
        assert read_guidelines(db, "p") == (1, "# Be fair")
    page.get_by_label("Highest rating").fill("99")
    page.click("button:has-text('Save')")
    page.wait_for_selector("text=Highest rating: 99: it cannot be shown")
    annotator_page = visitor()
    accept(annotator_page, f"{app.url}/invite?token={app.accounts.invite('p', 'annotator')}", "ann")
    annotator_page.wait_for_selector("text=This project is paused")


def test_a_reviewer_sees_figures_and_alarms_alone(serve, visitor):
    app = serve([("yes", "no")], accounts=True)
    page = app.watch(visitor())
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'reviewer')}", "rev")
    manage(page, "Figures")
    page.wait_for_selector("img[alt='Votes per day']")
    page.wait_for_timeout(1000)
    assert page.locator("button[role=tab]:visible").all_inner_texts() == ["Figures", "Alarms"]
    page.click("button[role=tab]:has-text('Alarms')")
    page.wait_for_selector("button:has-text('Look for alarms')")
    assert page.locator("button:visible:has-text('quarantine')").count() == 0
    assert page.locator("text=This page is for admins").count() == 0


def test_a_new_password_by_a_link_says_what_it_replaces(serve, visitor):
    app = serve([("yes", "no")], accounts=True)
    app.accounts.accept(app.accounts.invite("p", "annotator"), "ann", GOOD)
    page = visitor()
    page.goto(f"{app.url}/invite?token={app.accounts.invite('p', 'annotator', 'ann')}")
    assert "Choose a new password for ann" in page.inner_text("body")
    page.goto(f"{app.url}/manage")
    page.goto(f"{app.url}/api/task")
    assert page.inner_text("body") == "Log in."  # a sentence, as the address may have been typed


def test_a_link_is_taken_back(serve, visitor):
    app = serve([("yes", "no")], accounts=True)
    page = app.watch(visitor())
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'admin')}", "root")
    manage(page, "People")
    page.wait_for_selector("td >> text=root")
    page.get_by_label("For whom").fill("ann")
    page.click("button:has-text('Invite')")
    link = read_link(page)
    page.wait_for_selector("td >> text=ann")
    [out] = app.accounts.list_invitations("p")
    assert (out.name, out.made_by) == ("ann", "root")
    page.get_by_label("Link", exact=True).click()
    page.click(f"li[role=option]:has-text('{out.id}')")
    page.click("button:has-text('Revoke the link')")
    page.wait_for_selector("td >> text=ann", state="detached")
    annotator_page = visitor()
    annotator_page.goto(link)
    annotator_page.wait_for_selector("text=this invitation has expired or was used")
    assert app.errors == []


def test_what_was_typed_outlives_the_session(serve, visitor):
    app = serve([("yes", "no")], accounts=True)
    page = app.watch(visitor())
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'admin')}", "root")
    manage(page, "Project")
    page.wait_for_function("[...document.querySelectorAll('input')].some(e => e.value === '30')")
    page.get_by_label("Guidelines, in Markdown").fill("# Written for an hour")
    page.context.clear_cookies()
    page.click("button:has-text('Publish')")
    page.wait_for_selector("text=log in again in another tab")
    log_in(page.context.new_page(), app.url, "root")
    page.click("button:has-text('Publish')")
    page.wait_for_selector("text=Published as version 1")
    with app.store.reading() as db:
        assert read_guidelines(db, "p") == (1, "# Written for an hour")


NAMES = (
    "<img/src=x/onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "<script>alert(1)</script>",
    "${alert(1)}",
    "{{alert(1)}}",
)


def test_what_somebody_is_called_does_nothing_to_who_manages_them(serve, visitor):
    app = serve([("yes", "no")], accounts=True)
    for name in NAMES:
        app.accounts.accept(app.accounts.invite("p", "annotator"), name, GOOD)
    page = app.watch(visitor())
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'admin')}", "root")
    manage(page, "People")
    page.wait_for_selector("td >> text=root")
    for name in NAMES:
        assert any(name in row for row in page.locator("td").all_inner_texts()), name
        page.get_by_label("Name", exact=True).first.fill(name)
        page.click("button:has-text('Change a role')")
        page.wait_for_timeout(500)
        page.get_by_label("Name", exact=True).first.fill(f"{name}{name}")
        page.click("button:has-text('Change a role')")
        page.wait_for_function(
            "t => [...document.querySelectorAll('.toast-body')].some(e => e.innerText.includes(t))", arg=f"{name}{name}"
        )
        page.wait_for_selector("text=there is no member of that name")
        assert app.errors == [], name
        assert page.locator("td :is(a, img, script)").count() == 0, name


def test_who_logs_in_after_another_sends_nothing_of_theirs(serve, page):
    app = serve([("yes", "no")] * 4, accounts=True)
    app.watch(page)
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'annotator')}", "ann")
    app.instead["/api/vote"] = LOST
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    wait_for_status(page, "does not answer")
    del app.instead["/api/vote"]
    page.context.clear_cookies()
    wait_for_status(page, "log in again")
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'annotator')}", "bob")
    judge(page, 1)
    assert [vote.annotator for vote in app.votes] == [app.store.pseudonym("p", "bob")]
    page.click("text=Log out")
    page.wait_for_selector("#password")
    log_in(page, app.url, "ann")
    page.wait_for_function("document.querySelector('header').textContent.includes('You: 1')")
    assert {vote.annotator for vote in app.votes} == {app.store.pseudonym("p", name) for name in ("ann", "bob")}


def test_of_two_projects_one_is_chosen(serve, page):
    app = serve([("yes", "no")] * 2, accounts=True)
    from align.annotate.store import Candidate
    from align.core.types import Conversation, Message

    prompt = Conversation((Message("user", "elsewhere"),))
    app.store.add_item("q", "0", prompt, [Candidate("a"), Candidate("b")])
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'annotator')}", "ann")
    page.goto(f"{app.url}/invite?token={app.accounts.invite('q', 'annotator')}")
    page.click("text=Join as ann")
    page.wait_for_selector("text=Your projects")
    page.click("li >> text=q")
    page.wait_for_selector("text=elsewhere")
    page.goto(f"{app.url}/?project=nope")
    page.wait_for_selector("text=You are not in project nope")
    assert page.locator("li").all_inner_texts() == ["p", "q"]


def measure_background(page: Any) -> float:
    """Return the brightness of the page's background, 0 to 255."""
    return ground_and_drawn(page.screenshot())[0]


def test_axe_finds_nothing_wrong_at_the_door_or_with_the_managers(serve, visitor):
    """Pages follow a change of the colour scheme without a reload."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    app = serve([("yes", "no")], accounts=True)
    page = visitor(bypass_csp=True)
    token = app.accounts.invite("p", "admin")

    def check(page_name: str) -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(500)  # for transitions of colours
            assert (measure_background(page) < 80) == (scheme == "dark"), (page_name, scheme)
            violations = axe.run(page).response["violations"]
            assert violations == [], f"{page_name}, {scheme}: {[(v['id'], v['nodes'][0]['html']) for v in violations]}"

    page.goto(f"{app.url}/login")
    check("log in")
    page.fill("#name", "nobody")
    page.fill("#password", "x")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=alert]")
    check("refused")
    page.goto(f"{app.url}/invite?token={token}")
    check("invitation")
    accept(page, f"{app.url}/invite?token={token}", "root")
    check("an item")
    page.goto(f"{app.url}/password")
    check("password")
    page.goto(app.url)
    page.wait_for_selector("#align-app header")
    manage(page, "Figures")
    for tab in ("Figures", "People", "Project"):
        page.click(f"button[role=tab]:has-text('{tab}')")
        page.wait_for_timeout(1500)
        check(tab)


def test_the_figures_fit_a_phone_and_either_scheme(serve, visitor):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    app = serve([("yes", "no")] * 12, accounts=True, overlap=3)
    for annotator in ("ann", "bob", "cleo"):  # ten items each have a kappa, the longest value
        for n, item in enumerate(app.store.items("p")):
            tiers = tuple((f"{item.id}-{k}",) for k in ((0, 1) if n % 3 else (1, 0)))
            app.store.record(
                "p", item.id, Judgement(tiers, strength=2, seconds=9), annotator=annotator, key=f"{annotator}/{n}"
            )
    page = visitor(color_scheme="light", bypass_csp=True, viewport={"width": 390, "height": 900})
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'reviewer')}", "rev")
    manage(page, "Figures")
    page.wait_for_selector("img[alt='Votes per day']")
    page.wait_for_timeout(1500)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(500)
        assert axe.run(page).response["violations"] == []
        values = page.locator(".scroll").first.locator("td:nth-child(2), th:nth-child(2)")
        assert values.first.inner_text() == "Value"
        assert "–" in " ".join(values.all_inner_texts())
        assert all(box["x"] + box["width"] <= 390 for box in (value.bounding_box() for value in values.all()))
        for plot in page.locator(".row img").all():
            background, foreground = ground_and_drawn(plot.screenshot())
            assert (background < 40, background > 240) == (scheme == "dark", scheme == "light")
            assert abs(foreground - background) > 120  # with contrast


def test_a_reviewer_sees_the_figures_and_settles_what_two_disagree_on(serve, visitor):
    app = serve([("yes", "no")] * 3, accounts=True, overlap=2)
    for annotator, order in (("ann", (0, 1)), ("bob", (1, 0))):
        for item in app.store.items("p"):
            tiers = tuple((f"{item.id}-{k}",) for k in order)
            judgement = Judgement(tiers, strength=2, rationale="<img src=x onerror=alert(1)>", seconds=12)
            app.store.record("p", item.id, judgement, annotator=annotator, key=f"{annotator}/{item.id}")
    page = app.watch(visitor())
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'reviewer')}", "rev")
    manage(page, "Figures")
    page.wait_for_selector("img[alt='Votes per day']")
    rows = page.locator("tr").all_inner_texts()
    assert any("Krippendorff" in row and "-0." in row for row in rows)
    assert sum("ann" in row for row in rows) >= 1
    page.click("text=Back to the items")
    page.click("text=Decide disagreements")
    page.wait_for_selector("text=Votes of the annotators")
    assert "<img src=x" in page.inner_text("#align-app")
    for _ in range(3):
        prompt_text = page.locator(".prompt").first.inner_text()
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.wait_for_function("t => document.querySelector('.prompt')?.innerText !== t", arg=prompt_text)
    page.wait_for_selector("text=Nothing is left to decide")
    assert [vote.purpose for vote in app.votes].count("review") == 3
    assert app.errors == []
    assert all(url.startswith((app.url, "data:")) for url in app.requests)
