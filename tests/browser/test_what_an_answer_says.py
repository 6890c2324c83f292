"""Answers are shown in full: Markdown drops no character, nothing is clipped, and the source text can be shown."""

from __future__ import annotations

import re
from typing import Any

import pytest
from annotation_app import read_question, send_vote

from align.annotate.web.markup import MAX_NESTING

pytestmark = pytest.mark.slow

WIDE_TABLE = "\n".join(("|" + " a |" * 40, "|" + "-|" * 40, "|" + " 1 |" * 40))
ANSWERS = (
    "11. it is 9",
    "2025. a year\n2024. another\n\n    1234567890. deep",
    "7. a\n7. b\n\n12) c\n13) d",
    "1. a\n   - b\n     123. c\n\n       more of c",
    "- 5\n+ 6\n* 7",
    "> " * (MAX_NESTING - 2) + "quoted",
    "- " * (MAX_NESTING // 2 - 1) + "nested",
    "- " * 30 + "too deep",
    "2*3*4 = 24, x**2, \\(a_1\\) \\* \\# b\\\nc",
    "<!-- a --> <b>c</b> &amp; &#49; <x@y.example>",
    "[r]: http://x.example 'y'\n\n[a](http://y.example) ![b](z.png)",
    "| a | b |\n|---|:-:|\n| 1 | 2 |",
    "| a |\n|---|\n| 1 | lost |",
    WIDE_TABLE,
    "```python 3\n    x = 1\n```\n\n    indented\n\t\ttabbed",
    "a  \nb\\\nc   d \n\n\n\n e",
    "12\n---\nx\n===\n***\n",
    "***",
    "# a ##\n###### b",
    "w" * 3000,
    "1" * 9 + ". " + "w" * 3000,
)
# Words drawn beyond the box that clips them (spaces at a line's end may hang over). A folded text unfolds.
CLIPPED = """texts => texts.flatMap(text => {
  const box = text.getBoundingClientRect(), range = document.createRange(), found = [];
  const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    for (const word of node.data.matchAll(/\\S+/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const out = [...range.getClientRects()].some(r => r.left < box.left - 1 || r.right > box.right + 1);
      if (out) found.push(word[0].slice(0, 40));
    }
  }
  return found;
})"""


def strip_marks(text: str) -> str:
    """Remove marks, which formatting may replace."""
    return re.sub(r"[\s*_~`#>|:-]", "", text)


@pytest.mark.parametrize("width", [390, 1280])
def test_no_character_is_swallowed_or_clipped(serve: Any, page: Any, width: int) -> None:
    app = serve([(answer, "no") for answer in ANSWERS])
    page.set_viewport_size({"width": width, "height": 900})
    app.open(page)
    for _ in ANSWERS:
        answer = ANSWERS[int(read_question(page).split()[1])]
        texts = page.locator(".answer .text")
        index = next(i for i in range(2) if texts.nth(i).inner_text().strip() != "no")
        assert strip_marks(texts.nth(index).inner_text()) == strip_marks(answer)
        assert texts.evaluate_all(CLIPPED) == [], answer[:60]
        page.keyboard.press("v")
        assert texts.nth(index).inner_text() == answer
        assert texts.evaluate_all(CLIPPED) == [], answer[:60]
        page.keyboard.press("v")
        page.keyboard.press("4")
        send_vote(page)
    assert app.errors == []


def test_as_written_is_remembered_and_holds_for_every_text(serve: Any, page: Any) -> None:
    app = serve([("**a** 1", "1. b"), ("**c**", "d")])
    app.open(page)
    assert page.locator(".answer strong").count() == 1 or read_question(page) == "Question 1"
    button = page.get_by_role("button", name="As written")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert page.locator(".text").count() == page.locator(".text > pre:only-child").count() == 4
    assert button.get_attribute("aria-pressed") == "true"
    page.keyboard.press("4")  # after the click, keys still judge answers
    send_vote(page)
    assert page.locator(".text > pre").count() == 4
    page.reload()
    page.wait_for_selector(".answer")
    assert page.locator(".text > pre").count() == 4
    assert page.get_by_role("button", name="As written").get_attribute("aria-pressed") == "true"
    page.keyboard.press("v")
    assert page.locator(".text > pre").count() == 0


def test_what_fits_no_more_after_the_window_was_made_narrow_is_not_cut_off(serve: Any, page: Any) -> None:
    table = "\n".join(("|" + " a |" * 20, "|" + "-|" * 20, "|" + " 1 |" * 20))
    app = serve([(table, "word " * 200)])
    page.set_viewport_size({"width": 1800, "height": 900})
    app.open(page)
    assert page.locator(".answer table").count() == 1
    assert page.locator(".unfold").count() == 0
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_function("document.querySelectorAll('.answer table').length === 0")
    assert page.locator(".unfold").count() == 1  # the narrow text is longer than its fold
    assert page.locator(".answer .text").evaluate_all(CLIPPED) == []
