"""The ranking page: by keys alone, by mouse and on a phone; its judgements, and the drafts that it keeps."""

from __future__ import annotations

import pytest
from annotation_app import read_question, send_vote, wait_for_next_item, wait_for_status

from align.annotate.store import publish_guidelines

pytestmark = pytest.mark.slow
PAIRS = [("yes", "no")] * 3


# Three journeys


def test_twenty_items_by_keyboard_alone(serve, page):
    answers = [("wonderful", "awful"), ("wonderful", "fine", "dull", "awful")] * 10
    app = serve(answers)
    app.open(page)
    order = {"wonderful": 0, "fine": 1, "dull": 2, "awful": 3}
    for _ in range(20):
        answer_texts = [text.strip() for text in page.locator(".answer .text").all_inner_texts()]
        if len(answer_texts) == 2:
            page.keyboard.press("1" if answer_texts[0] == "wonderful" else "7")
        else:
            for text in answer_texts:  # the focus moves to the next answer by itself
                page.keyboard.press(str(order[text] + 1))
        send_vote(page)
    assert "Nothing is left" in page.inner_text("#align-app")
    votes = app.votes
    assert len(votes) == 20
    texts = {c.id: c.text for item in app.store.items("p") for c in item.candidates}
    for vote in votes:
        ranked = [[texts[id] for id in tier] for tier in vote.tiers]
        assert ranked == [[text] for text in sorted((texts[id] for id in vote.display_order), key=order.__getitem__)]
        assert vote.strength == (3 if len(vote.display_order) == 2 else None)
        assert vote.seconds is not None
        assert 0 <= vote.seconds < 60
    firsts = [texts[vote.display_order[0]] for vote in votes if len(vote.display_order) == 2]
    assert firsts.count("wonderful") == 5  # counterbalanced
    app.store.verify()
    assert app.errors == []


def test_by_mouse_with_ties_ratings_flags_and_words(serve, page):
    app = serve([("a", "b", "c", "d")], attributes=["helpful", "honest"], scale=3)
    app.open(page)
    answer_texts = page.locator(".answer .text").all_inner_texts()
    for place in (1, 2, 2):
        page.locator(".place[data-place=''] .chip").first.drag_to(page.locator(f".place[data-place='{place}']"))
    page.get_by_role("region", name="Answer D").get_by_role("radio", name="4").check(force=True)
    page.get_by_role("region", name="Answer B").get_by_role("button", name="Harmful").click()
    page.get_by_role("button", name="The prompt is harmful").click()
    page.get_by_label("helpful").first.select_option("3")
    page.get_by_label("Why?").fill("It is kinder.")
    page.get_by_label("No answer is good").fill("This would be right.")
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("text=Nothing is left")
    (vote,) = app.votes
    texts = {c.id: c.text for item in app.store.items("p") for c in item.candidates}
    assert [sorted(texts[id] for id in tier) for tier in vote.tiers] == [
        [answer_texts[0].strip()],
        sorted(text.strip() for text in answer_texts[1:3]),
        [answer_texts[3].strip()],
    ]
    assert set(vote.flagged) == {vote.display_order[1], vote.item}
    assert vote.ratings == {vote.display_order[0]: {"helpful": 3}}
    assert (vote.rationale, vote.demonstration) == ("It is kinder.", "This would be right.")
    assert app.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(serve, browser, scheme):
    app = serve([("yes " * 200 + "x" * 300, "no"), ("a", "b", "c", "d", "e", "f", "g", "h", "i")])
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, color_scheme=scheme)
    page = app.open(context.new_page())
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        previous_question = read_question(page)
        if page.locator("input[name=strength]").count():
            page.locator("input[name=strength][value='-2']").tap()
        else:
            page.get_by_role("button", name="All bad").tap()
        page.get_by_role("button", name="Send").tap()
        wait_for_next_item(page, previous_question)
    context.close()
    assert sorted((vote.quality, vote.strength) for vote in app.votes) == [("", 2), ("bad", None)]


# Judgements and drafts


def test_good_bad_skip_and_undo(serve, page):
    app = serve(PAIRS)
    app.open(page)
    first = read_question(page)
    page.keyboard.press("g")
    send_vote(page)
    page.keyboard.press("s")
    page.keyboard.press("2")
    wait_for_status(page, "Saved")
    assert [(vote.quality, len(vote.tiers)) for vote in app.votes] == [("good", 1)]
    assert [vote.skipped for vote in app.store.skips("p")] == ["language"]
    page.wait_for_selector("text=Answer A")
    page.keyboard.press("u")
    wait_for_status(page, "Vote undone")
    page.keyboard.press("u")
    page.wait_for_function("first => document.querySelector('.prompt').textContent.includes(first)", arg=first)
    assert page.get_by_role("button", name="Both good").get_attribute("aria-pressed") == "true"  # as in the vote
    assert app.votes == app.store.skips("p") == []
    page.keyboard.press("5")
    send_vote(page)
    (vote,) = app.votes
    assert (vote.quality, vote.strength, vote.tiers[0]) == ("", 1, (vote.display_order[1],))
    app.store.verify()


def test_undo_after_a_reload_and_a_key_that_is_held_takes_one_back(serve, page):
    app = serve(PAIRS)
    app.open(page)
    for _ in range(2):
        page.keyboard.press("2")
        send_vote(page)
    page.reload()
    page.wait_for_selector("#align-app form")
    page.keyboard.down("u")
    for _ in range(5):
        page.keyboard.down("u")  # a held key repeats
    page.keyboard.up("u")
    wait_for_status(page, "Vote undone")
    page.wait_for_timeout(500)
    assert len(app.votes) == 1


def test_keys_judge_the_answer_that_has_the_focus(serve, page):
    app = serve([("a", "b", "c")])
    app.open(page)
    page.get_by_role("region", name="Answer C").get_by_role("button", name="Harmful").focus()
    page.keyboard.press("1")
    for place in ("2", "3"):
        page.keyboard.press(place)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Nothing is left")
    (vote,) = app.votes
    assert vote.tiers == tuple((id,) for id in (vote.display_order[2], vote.display_order[0], vote.display_order[1]))


def test_a_ranking_after_all_good_begins_anew(serve, page):
    app = serve([("a", "b", "c")])
    app.open(page)
    page.keyboard.press("g")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    wait_for_status(page, "Judge every answer first")
    assert app.votes == []
    page.keyboard.press("2")
    page.keyboard.press("3")
    page.keyboard.press("ArrowLeft")  # to the last answer; then all places again
    for place in ("1", "2", "3"):
        page.keyboard.press(place)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Nothing is left")
    (vote,) = app.votes
    assert (vote.quality, vote.tiers) == ("", tuple((vote.display_order[i],) for i in (2, 0, 1)))


def test_nothing_is_sent_before_all_is_judged(serve, page):
    app = serve([("a", "b", "c")])
    app.open(page)
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    wait_for_status(page, "Judge every answer first")
    assert app.votes == []


def test_a_reload_loses_nothing_that_was_said(serve, page):
    app = serve([("a", "b", "c")])
    app.open(page)
    page.keyboard.press("2")
    page.keyboard.press("r")
    page.keyboard.type("half a sentence")
    wait_for_status(page, "Draft saved")
    page.reload()
    page.wait_for_selector("#align-rationale")
    assert page.input_value("#align-rationale") == "half a sentence"
    assert page.locator("input[name=place-0][value='2']").is_checked()


def test_half_a_character_is_no_reason_to_lose_a_vote(serve, page):
    app = serve(PAIRS)
    app.open(page)
    page.keyboard.press("3")
    page.keyboard.press("r")
    page.evaluate(
        "t => { const f = document.activeElement; f.value = t; f.dispatchEvent(new Event('input')); }",
        "cut \ud83d ok \U0001f600",
    )
    previous_question = read_question(page)
    page.keyboard.press("Control+Enter")
    wait_for_next_item(page, previous_question)
    assert [vote.rationale for vote in app.votes] == ["cut \ufffd ok \U0001f600"]


def test_keys_in_a_text_field_are_text(serve, page):
    app = serve(PAIRS)
    app.open(page)
    page.keyboard.press("2")
    page.keyboard.press("r")
    page.keyboard.type("gsu17")
    assert page.input_value("#align-rationale") == "gsu17"
    previous_question = read_question(page)
    page.keyboard.press("Control+Enter")
    wait_for_next_item(page, previous_question)
    assert [(vote.rationale, vote.strength) for vote in app.votes] == [("gsu17", 2)]


def test_guidelines_keys_and_difference_are_one_key_away(serve, page):
    app = serve([("the cat sat", "the dog sat <b>")])
    publish_guidelines(app.store, "p", "# Be fair\n\nTo **all**.")
    app.open(page)
    page.keyboard.press("Escape")  # they were shown before the first item
    page.keyboard.press("h")
    assert "Be fair" in page.inner_text("dialog[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    page.wait_for_selector("dialog[open] ins")
    changed = {
        page.inner_text("dialog[open] del").strip(),
        *(t.strip() for t in page.locator("dialog[open] ins").all_inner_texts()),
    }
    assert {"cat", "dog"} <= changed or {"dog", "cat"} <= changed
    assert page.locator("dialog[open] b").count() == 0
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    help_text = page.inner_text("dialog[open]")
    assert all(key in help_text.split() for key in "ugbfpsdrwhx")


@pytest.mark.parametrize("answers", [("yes", "no"), ("a", "b", "c")])
def test_enter_sends_after_a_click_and_does_not_press_the_button_again(serve, page, answers):
    app = serve([answers, answers])
    app.open(page)
    page.locator("[data-answer='1'] [data-flag]").click()
    page.locator("[data-quality=bad]").click()
    assert page.evaluate("document.activeElement.dataset.answer") == "1"  # the card that was clicked
    previous_question = read_question(page)
    page.keyboard.press("Enter")
    wait_for_next_item(page, previous_question)
    (vote,) = app.votes
    assert (vote.quality, vote.flagged) == ("bad", (vote.display_order[1],))
    page.locator("[data-quality=good]").focus()
    page.keyboard.press("Enter")  # with the focus from the keyboard, Enter presses it
    page.wait_for_selector("[data-quality=good][aria-pressed=true]")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 700)])
def test_what_the_page_says_is_on_the_screen(serve, page, width, height):
    app = serve([["word " * 80] * 9])
    page.set_viewport_size({"width": width, "height": height})
    app.open(page)
    page.keyboard.press("Enter")
    wait_for_status(page, "Judge every answer first")
    box = page.locator("#said").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= height + 1


def test_long_guidelines_open_at_their_beginning(serve, page):
    app = serve(PAIRS)
    publish_guidelines(app.store, "p", "\n\n".join(f"Rule {n}" for n in range(80)))
    app.open(page)
    page.wait_for_selector("dialog[open]")
    assert page.evaluate("document.querySelector('dialog[open]').scrollTop") == 0
    assert page.evaluate("document.querySelector('dialog[open]').scrollHeight") > 800
    page.keyboard.press("Escape")


@pytest.mark.parametrize("broken", ["getItem", "setItem"])
def test_a_browser_that_keeps_nothing_still_sends(serve, page, broken):
    """If the storage is full or forbidden, the page sends the vote from its memory."""
    app = serve(PAIRS)
    page.add_init_script(
        f"Storage.prototype.{broken} = () => {{ throw new DOMException('no', 'QuotaExceededError'); }}"
    )
    app.open(page)
    page.keyboard.press("2")
    if broken == "setItem":
        page.wait_for_function("document.querySelector('#said').textContent.includes('cannot store drafts')")
    previous_question = read_question(page)
    page.keyboard.press("Enter")
    wait_for_next_item(page, previous_question)
    assert [vote.strength for vote in app.votes] == [2]
    assert app.errors == []


def test_an_item_that_was_judged_in_another_window_is_said_to_be(serve, page):
    app = serve(PAIRS)
    app.open(page)
    other_page = app.open(page.context.new_page())
    other_page.keyboard.press("1")
    previous_question = read_question(other_page)
    other_page.keyboard.press("Enter")
    wait_for_next_item(other_page, previous_question)
    page.keyboard.press("r")
    page.keyboard.type("my reasons")
    wait_for_status(page, "You judged this item in another window")
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    page.keyboard.press("Enter")
    page.click("text=Refused by the server: 1")
    assert "my reasons" in page.inner_text("dialog[open]")
    page.click("text=Delete these votes")
    assert page.locator("text=Refused by the server").count() == 0
    assert len(app.votes) == 1


def test_a_page_that_is_opened_anew_can_take_back_what_was_said_before(serve, page):
    app = serve(PAIRS)
    app.open(page)
    first = read_question(page)
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    wait_for_next_item(page, first)
    new_page = app.open(page.context.new_page())
    new_page.keyboard.press("u")
    wait_for_status(new_page, "Vote undone")
    assert read_question(new_page) == first
    assert app.votes == []


def test_the_last_page_counts_to_the_end(serve, page):
    app = serve(PAIRS[:2])
    app.open(page)
    for _ in range(2):
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
    page.wait_for_selector("text=Nothing is left to judge")
    assert "You: 2. Everyone: 2 of 2" in page.inner_text("header")


def test_keys_of_one_letter_can_be_turned_off(serve, page):
    app = serve(PAIRS)
    app.open(page)
    page.keyboard.press("?")
    page.uncheck("#align-letters")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector(".answer")
    for key in ("1", "h", "s", "?"):
        page.keyboard.press(key)
    assert page.locator("dialog[open], input:checked").count() == 0
    page.check("input[name=strength][value='-1']")
    previous_question = read_question(page)
    page.keyboard.press("Control+Enter")
    wait_for_next_item(page, previous_question)
    assert [vote.strength for vote in app.votes] == [1]
    page.click("button:has-text('Keys')")
    page.check("#align-letters")
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.wait_for_selector("[data-quality=good][aria-pressed=true]")
