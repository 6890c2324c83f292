"""The steps of a tokenizer that divide text by patterns, in a process of its own.

A pattern may take longer than a life for some texts, where nothing can end it. `align.data.chat.template` runs
this with `{normalizer, pre_tokenizer, texts}` as JSON on its input, the steps as tokenizers writes them.
"""

import json
import sys

from tokenizers import Tokenizer

GAVE_UP = 3
"""The exit status if the library gave up on a text: it counts how often it tries again."""


def main() -> int:
    """Divide every text as the tokenizer would."""
    given = json.load(sys.stdin)
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    steps = {"normalizer": given["normalizer"], "pre_tokenizer": given["pre_tokenizer"]}
    empty = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps({**empty, **steps, "decoder": None, "model": model}))
    for text in given["texts"]:
        try:
            tokenizer.encode(text)
        except BaseException as error:  # a panic of the library, which is no Exception
            print(f"{error}", file=sys.stderr)
            return GAVE_UP
    return 0


if __name__ == "__main__":
    sys.exit(main())
