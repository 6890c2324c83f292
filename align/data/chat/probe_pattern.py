"""Script that runs the regular expressions of a tokenizer on texts.

A pattern may take practically for ever on some texts, and a thread cannot interrupt it. So `align.data.chat.template`
runs this script in a process with a time limit. Its input is JSON `{normalizer, pre_tokenizer, texts}`, with the steps
as the library `tokenizers` serialises them.
"""

import json
import sys

from tokenizers import Tokenizer

GAVE_UP = 3
"""Exit status if the library gave up on a text, which it does after too many retries."""


def main() -> int:
    """Run a tokenizer's normalizer and pre-tokenizer on test texts, all read as JSON from standard input. Returns exit
    status 0, or `GAVE_UP` if the library fails on a text."""
    request = json.load(sys.stdin)
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    steps = {"normalizer": request["normalizer"], "pre_tokenizer": request["pre_tokenizer"]}
    empty = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps({**empty, **steps, "decoder": None, "model": model}))
    for text in request["texts"]:
        try:
            tokenizer.encode(text)
        except BaseException as error:  # a panic of the library is not an Exception
            print(f"{error}", file=sys.stderr)
            return GAVE_UP
    return 0


if __name__ == "__main__":
    sys.exit(main())
