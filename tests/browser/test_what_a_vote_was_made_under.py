"""Settings and guidelines change while pages are open: votes arrive, and name the versions that their author saw."""

from __future__ import annotations

import pytest
from annotation_app import LOST, read_question, send_vote

from align.annotate.store import Judgement, configure_project, publish_guidelines
from align.annotate.store.projects import read_settings_version

pytestmark = pytest.mark.slow
PAIRS = [("yes", "no")] * 4


def read_version(app) -> int:
    with app.store.reading() as db:
        return read_settings_version(db, "p")


def rate_all(page, mark: str) -> None:
    page.get_by_label("helpful").first.select_option(mark)


def test_an_attribute_that_is_removed_makes_no_vote_unsendable(serve, page):
    app = serve(PAIRS, attributes=["helpful"], scale=5)
    app.open(page)
    app.instead["/api/vote"] = LOST
    rate_all(page, "5")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#said').textContent.includes('does not answer')")
    old_version = read_version(app)
    configure_project(app.store, "p", {"attributes": ["honest"], "scale": 3})
    del app.instead["/api/vote"]
    page.wait_for_function("document.querySelector('header').textContent.includes('You: 1')")
    [vote] = app.votes
    assert (list(vote.ratings.values()), vote.project_version) == ([{"helpful": 5}], old_version)
    assert page.get_by_label("helpful").count() == 0  # the next item has the new attributes
    page.get_by_label("honest").first.select_option("3")
    page.keyboard.press("1")
    send_vote(page)
    assert (list(app.votes[1].ratings.values()), app.votes[1].project_version) == ([{"honest": 3}], read_version(app))
    assert page.locator("text=Refused by the server").count() == 0
    assert app.errors == []


@pytest.mark.parametrize("how", ["reload", "undo"])
def test_a_draft_with_a_rating_that_nobody_asks_for_any_more_can_be_sent(serve, page, how):
    app = serve(PAIRS, attributes=["helpful"], scale=5)
    app.open(page)
    rate_all(page, "5")
    page.keyboard.press("1")
    if how == "undo":
        send_vote(page)
    configure_project(app.store, "p", {"attributes": ["honest"]})
    if how == "undo":
        page.keyboard.press("u")
        page.wait_for_function("document.querySelector('#said').textContent.includes('Vote undone')")
    else:
        page.reload()
        page.wait_for_selector("#align-app form")
    page.keyboard.press("2")
    send_vote(page)
    [vote] = app.votes
    assert (vote.strength, vote.ratings, vote.project_version) == (2, {}, read_version(app))
    assert page.locator("text=Refused by the server").count() == 0


def test_a_vote_names_the_guidelines_that_its_author_had_and_new_ones_are_shown(serve, page):
    app = serve(PAIRS)
    publish_guidelines(app.store, "p", "# Be kind")
    app.open(page)
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    send_vote(page)  # the next item is on the screen
    publish_guidelines(app.store, "p", "# Be fair")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] h2:has-text('The guidelines have changed')")
    assert "Be fair" in page.inner_text("dialog[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    send_vote(page)
    assert [vote.guideline_version for vote in app.votes] == ["1", "1", "2"]
    publish_guidelines(app.store, "p", "# Be quick")
    page.reload()  # the item was given under version 2, and is judged under 3
    page.wait_for_selector("dialog[open] h2:has-text('The guidelines have changed')")
    assert "Be quick" in page.inner_text("dialog[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Nothing is left")
    assert app.votes[-1].guideline_version == "3"
    assert app.errors == []


@pytest.mark.parametrize("accounts", [False, True])
def test_whoever_never_saw_the_guidelines_reads_them_before_the_first_item(serve, browser, page, accounts):
    from test_people import accept

    app = serve(PAIRS, accounts=accounts)
    publish_guidelines(app.store, "p", "# Be kind")
    if accounts:
        accept(app.watch(page), f"{app.url}/invite?token={app.accounts.invite('p', 'annotator')}", "ann")
    else:
        app.open(page)
    page.wait_for_selector("dialog[open] h2:text-is('Guidelines')")
    assert "Be kind" in page.inner_text("dialog[open]")
    page.reload()  # nothing was judged yet
    page.wait_for_selector("dialog[open] h2:text-is('Guidelines')")
    page.wait_for_timeout(3000)
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    send_vote(page)
    assert page.locator("dialog[open]").count() == 0
    assert app.votes[0].guideline_version == "1"
    assert app.votes[0].seconds < 3  # the time to read guidelines does not count
    context = browser.new_context(storage_state=page.context.storage_state())
    second_page = context.new_page()
    second_page.goto(app.url)
    second_page.wait_for_selector("#align-app form")
    assert second_page.locator("dialog[open]").count() == 0  # their vote records that they saw them
    context.close()
    assert app.errors == []


def test_guidelines_that_do_not_arrive_are_waited_for(serve, page):
    app = serve(PAIRS)
    publish_guidelines(app.store, "p", "# Be kind")
    app.open(page)
    page.keyboard.press("Escape")
    publish_guidelines(app.store, "p", "# Be fair")
    app.instead["/api/guidelines"] = LOST
    first_question = read_question(page)
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#said').textContent.includes('does not answer')")
    assert read_question(page) == first_question  # no item is judged before its rules arrive
    del app.instead["/api/guidelines"]
    page.wait_for_selector("dialog[open] h2:has-text('The guidelines have changed')")
    assert len(app.votes) == 1


def test_what_waited_on_the_page_of_items_brings_no_item_to_the_page_of_reviews(serve, browser):
    from test_people import accept

    app = serve(PAIRS, accounts=True, overlap=3)
    item = next(app.store.items("p"))
    ids = [candidate.id for candidate in item.candidates]
    first = Judgement(((ids[0],), (ids[1],)), flagged=(ids[1], item.id), rationale="because", demonstration="do it so")
    app.store.record("p", item.id, first, annotator="ann", key="ann")
    app.store.record("p", item.id, Judgement(((ids[1],), (ids[0],)), strength=3), annotator="bob", key="bob")
    skip = Judgement(skipped="language", demonstration="so I would say")
    app.store.record("p", item.id, skip, annotator="cleo", key="cleo")
    context = browser.new_context()
    page = app.watch(context.new_page())
    page.set_default_timeout(20_000)
    accept(page, f"{app.url}/invite?token={app.accounts.invite('p', 'reviewer')}", "rev")
    app.instead["/api/vote"] = LOST
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#said').textContent.includes('does not answer')")
    page.goto(f"{app.url}/?project=p&review")
    page.wait_for_selector("#said:has-text('does not answer')")
    del app.instead["/api/vote"]
    page.wait_for_selector("text=Votes of the annotators")  # instead of an ordinary item
    review = page.inner_text("section[aria-label='Votes of the annotators']")
    for text in (
        "because",
        "do it so",
        "so I would say",
        "Not my language",
        "The prompt is harmful",
        "Harmful",
        "(3)",
    ):
        assert text in review
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Nothing is left to decide")
    assert [vote.purpose for vote in app.votes] == ["work", "work", "work", "review"]
    context.close()
    assert app.errors == []
