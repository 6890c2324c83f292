"""What models and people wrote, as HTML that does nothing."""

import time

import pytest

from annotate.web.markup import PLAIN_ABOVE, compared, rendered, visible
from annotate.web.words import STATIC, WORDS


def test_markdown_is_rendered_but_for_what_leads_somewhere():
    assert rendered("**a** `b`\n\n- c") == "<p><strong>a</strong> <code>b</code></p>\n<ul>\n<li>c</li>\n</ul>\n"
    assert rendered("[a](http://x.example)") == "<p>[a](http://x.example)</p>\n"
    assert rendered("![a](http://x.example/y.png)") == "<p>![a](http://x.example/y.png)</p>\n"
    assert rendered("<http://x.example>") == "<p>&lt;http://x.example&gt;</p>\n"
    assert rendered("<b onclick=x>") == "<p>&lt;b onclick=x&gt;</p>\n"


def test_what_an_entity_would_hide_stands_as_it_was_written():
    assert rendered("a &#x202E;b &ZeroWidthSpace; &amp;") == "<p>a &amp;#x202E;b &amp;ZeroWidthSpace; &amp;amp;</p>\n"


def test_a_very_long_text_is_all_there():
    text = "<b>" + "x" * PLAIN_ABOVE
    assert rendered(text) == f"<pre>&lt;b&gt;{'x' * PLAIN_ABOVE}</pre>"


@pytest.mark.parametrize(
    "unseen", ["\u202e", "\u2066", "\u200b", "\ufeff", "\x00", "\x1b", "\x7f", "\xad", "\u3164", "\U000e0041"]
)
def test_what_cannot_be_seen_is_named(unseen):
    assert visible(f"a{unseen}b") == f"a⟨U+{ord(unseen):04X}⟩b"
    assert f"U+{ord(unseen):04X}" in rendered(f"a{unseen}b")
    assert visible("tab\tand\r\nlines\r") == "tab\tand\nlines\n"


def test_words_that_differ_are_marked_and_escaped():
    assert compared("the cat <b>", "the dog <b>") == "the <del>cat</del><ins>dog</ins> &lt;b&gt;"
    assert compared("same", "same") == "same"
    assert "4000 words were compared" in compared("a " * 5000, "b")


def test_texts_of_few_words_do_not_take_minutes():
    started = time.monotonic()
    compared("a " * 4000, "a b " * 2000)
    assert time.monotonic() - started < 10


def test_every_word_that_the_page_says_is_in_the_one_file():
    import re

    script = "".join(path.read_text(encoding="utf-8") for path in STATIC.glob("*.js"))
    pages = [path.read_text(encoding="utf-8") for path in STATIC.parent.glob("*.py")]
    said = set(re.findall(r'say\("(\w+)"', script))
    assert said
    named = {word for page in pages for word in re.findall(r'(?:WORDS|words)\[["\'](\w+)["\']\]', page)}
    assert said | named <= WORDS.keys()
    families = re.findall(r"say\(`(\w+_)\$\{", script)
    families += [name for page in pages for name in re.findall(r'WORDS\[f["\'](\w+_)\{', page)]
    grown = {word for word in WORDS if any(word.startswith(family) for family in families)}
    # Named where they are used: of fields in the script, of forms at the door.
    fields = {word for word in WORDS if f'"{word}"' in script}
    forms = {word for word in WORDS for page in pages if f'"{word}"' in page}
    assert WORDS.keys() == said | named | grown | fields | forms
