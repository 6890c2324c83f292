"""Texts of models and people are rendered as HTML without links, images or scripts."""

import html
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.annotate.web.markup import (
    MAX_MARKDOWN_LENGTH,
    name_invisible_characters,
    render_as_written,
    render_difference,
    render_markdown,
)
from align.annotate.web.templating import STATIC, UI_TEXTS


def test_markdown_is_rendered_but_for_what_leads_somewhere():
    assert render_markdown("**a** `b`") == "<p><strong>a</strong> <code>b</code></p>\n"
    assert render_markdown("11. a") == '<ol start="11">\n<li><span class="marker">11.</span> <div>a</div></li>\n</ol>\n'
    assert render_markdown("| a |\n|---|\n| 1 |").startswith("<table>")
    assert render_markdown("~~a~~ *b*") == "<p><s>a</s> <em>b</em></p>\n"
    assert render_markdown("[a](http://x.example)") == "<p>[a](http://x.example)</p>\n"
    assert render_markdown("![a](http://x.example/y.png)") == "<p>![a](http://x.example/y.png)</p>\n"
    assert render_markdown("<http://x.example>") == "<p>&lt;http://x.example&gt;</p>\n"
    assert render_markdown("<b onclick=x>") == "<p>&lt;b onclick=x&gt;</p>\n"


def test_what_an_entity_would_hide_stands_as_it_was_written():
    assert (
        render_markdown("a &#x202E;b &ZeroWidthSpace; &amp;")
        == "<p>a &amp;#x202E;b &amp;ZeroWidthSpace; &amp;amp;</p>\n"
    )


def test_a_very_long_text_is_all_there():
    text = "<b>" + "x" * MAX_MARKDOWN_LENGTH
    assert render_markdown(text) == render_as_written(text) == f"<pre>\n&lt;b&gt;{'x' * MAX_MARKDOWN_LENGTH}</pre>"


def get_visible_text(text: str) -> str:
    """Return the text that a reader of the page sees, in one line."""
    return " ".join(html.unescape(re.sub("<[^>]*>", "", render_markdown(text))).split())


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("11. it is 9", "11. it is 9"),
        ("2025. was good", "2025. was good"),
        ("7. a\n7. b\n12. c", "7. a 7. b 12. c"),  # Markdown alone counts 7, 8, 9
        ("1) a\n2) b", "1) a 2) b"),
        ("- 5", "- 5"),  # minus five, perhaps
        ("+ 5\n+ 6", "+ 5 + 6"),
        ("2*3*4 = 24", "2*3*4 = 24"),
        ("x**2 + y**2", "x**2 + y**2"),
        ("(a)*(b)*(c)", "(a)*(b)*(c)"),
        (r"\(x\_1\) and \[y\]", r"\(x\_1\) and \[y\]"),
        (r"\*a\*", r"\*a\*"),
        ("a\\\nb", "a\\ b"),
        ("x\n===", "x ==="),
        ("12\n---", "12"),  # a line is drawn
        ("***", "***"),
        ("#", "#"),
        ("> ", ">"),
        ("```python 3\nx = 1\n```", "python 3 x = 1"),
        ("| a |\n|---|\n| 1 | 2 |", "| a | |---| | 1 | 2 |"),  # the 2 has no column
        ("a | b\n-|-\n1\\|2 | 3", "a | b -|- 1\\|2 | 3"),
        (">" * 30 + " deep", ">" * 30 + " deep"),
        ("- " * 12 + "deep", "- " * 12 + "deep"),
        ("a <!-- b --> c", "a <!-- b --> c"),
        ("[r]: http://x.example 'y'", "[r]: http://x.example 'y'"),
        ("<a@b.example> &#49;", "<a@b.example> &#49;"),
        ("snake_case and __init__", "snake_case and init"),  # bold: `v` shows the underscores
    ],
)
def test_nothing_that_was_said_is_swallowed(text: str, read: str):
    assert get_visible_text(text) == read


PIECES = [*"*_~`#>|:-+.)\\![]()<&=;1a\n\t ", "11. ", "- ", "> ", "```", "|---|", "| a | b |\n|-|-|\n", "\n\n", "    "]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map("".join))
def test_of_any_text_nothing_but_marks_is_missing(text: str):
    def remove_marks(text: str) -> str:
        return re.sub(r"[\s*_~`#>|:-]", "", text)

    assert remove_marks(html.unescape(re.sub("<[^>]*>", "", render_markdown(text)))) == remove_marks(
        name_invisible_characters(text)
    )
    assert remove_marks(name_invisible_characters(text)) or render_markdown(text) == render_as_written(
        text
    )  # a text of marks alone is shown


def test_as_it_was_written_every_character_stands():
    text = "\n 11. **a**  <b>\\\n\n| x |\n"
    assert (
        render_as_written(text) == "<pre>\n\n 11. **a**  &lt;b&gt;\\\n\n| x |\n</pre>"
    )  # browsers drop the first line feed


@pytest.mark.parametrize("text", ["*a " * 16_000, "1. " * 16_000, "a*b(" * 12_000, "\\*" * 24_000, "| a " * 12_000])
def test_looking_for_what_is_missing_takes_no_time(text: str):
    started = time.monotonic()
    render_markdown(text)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "unseen", ["\u202e", "\u2066", "\u200b", "\ufeff", "\x00", "\x1b", "\x7f", "\xad", "\u3164", "\U000e0041"]
)
def test_what_cannot_be_seen_is_named(unseen):
    assert name_invisible_characters(f"a{unseen}b") == f"a⟨U+{ord(unseen):04X}⟩b"
    assert f"U+{ord(unseen):04X}" in render_markdown(f"a{unseen}b")
    assert name_invisible_characters("tab\tand\r\nlines\r") == "tab\tand\nlines\n"


def test_words_that_differ_are_marked_and_escaped():
    assert render_difference("the cat <b>", "the dog <b>") == "the <del>cat</del><ins>dog</ins> &lt;b&gt;"
    assert render_difference("same", "same") == "same"
    assert "4000 words were compared" in render_difference("a " * 5000, "b")


def test_texts_of_few_words_do_not_take_minutes():
    started = time.monotonic()
    render_difference("a " * 4000, "a b " * 2000)
    assert time.monotonic() - started < 10


def test_every_word_that_the_page_says_is_in_the_one_file():
    import re

    script = "".join(path.read_text(encoding="utf-8") for path in STATIC.glob("*.js"))
    sources = [*STATIC.parent.glob("*.py"), *STATIC.parent.glob("templates/*.html")]
    pages = [path.read_text(encoding="utf-8") for path in sources]
    script_words = set(re.findall(r'getText\("(\w+)"', script))
    assert script_words
    page_words = {word for page in pages for word in re.findall(r'(?:UI_TEXTS|words)\[["\'](\w+)["\']\]', page)}
    page_words |= {word for page in pages for word in re.findall(r"\bwords\.(\w+)", page)}
    assert script_words | page_words <= UI_TEXTS.keys()
    families = re.findall(r"getText\(`(\w+_)\$\{", script)
    families += [name for page in pages for name in re.findall(r'UI_TEXTS\[f["\'](\w+_)\{', page)]
    family_words = {word for word in UI_TEXTS if any(word.startswith(family) for family in families)}
    # Words that are quoted where they are used: fields in the script, forms in the pages.
    fields = {word for word in UI_TEXTS if f'"{word}"' in script}
    forms = {word for word in UI_TEXTS for page in pages if f'"{word}"' in page}
    assert UI_TEXTS.keys() == script_words | page_words | family_words | fields | forms
