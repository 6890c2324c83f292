"""Cases of the battery whose mistake is in a file of rows. See `battery`."""

from __future__ import annotations

import json

from battery import ANSWER, DEEP, HALF, OTHER, USER, chat, file, item, pair, turns

CASES = [
    # --- Files that hold no rows
    *(
        file(command, content, "rows.jsonl", message)
        for command in ("sft", "reward", "import")
        for content, message in (
            (b"", "empty"),
            (b"\n\n", "empty"),
            (b"not json\n", "JSON"),
            (b'{"a": ', "JSON"),
            (b"[]\n", "empty"),
            (b"3\n", "object"),
            (b"\xff\xfe\x00", "UTF-8"),
            (b"\x00" * 64, "JSON"),
            (DEEP.encode(), "nested too deeply"),
            (b"PAR1\x15\x04", "damaged"),
            (b"ARROW1\0\0", "damaged"),
            (b"\xff\xff\xff\xff\x10\0\0\0", "damaged"),
            (b"PK\x03\x04", "zip"),
            (b"\x1f\x8b\x08", "unpacked"),
            (b"(\xb5/\xfd", "unpacked"),
            (b"BZh9", "cannot be unpacked"),
            (b"SQLite format 3\0", "database"),
            (b'{"a": 1, "a": 2}\n', "a key of this name stands twice"),
            (b'{"a": "\\u0000"}\n', "NUL"),
            (b'{"a": NaN}\n', "row 2"),
        )
    ),
    *(
        file(command, content, "rows.jsonl", message)
        for command in ("sft", "reward")
        for content, message in (
            (b'[{"text": "a"}', "no JSON after row 1"),
            (b'[{"text": "a"}, 3]', "row 2"),
            (b"prompt,completion,note\na,b,c\nd,e\n", "row 2"),
            (b'prompt,note\na,b\nc,"d\n', "quoted"),
        )
    ),
    # --- Rows to imitate
    file("sft", {"asked": "a", "said": "b"}, "row 2, columns=asked, said", "no row of a supported shape"),
    file("sft", {"mesages": []}, "row 2, columns=mesages", "which also needs `messages`"),
    file("sft", {"question": "a"}, "row 2, columns=question", "no answer", "answer"),
    file("sft", {"question": "a", "answer": 3}, "row 2, answer=3"),
    file("sft", {"question": "a", "answer": "b", "response": "c"}, "row 2, question=a", "several answers"),
    file("sft", {"query": "a", "response": ""}, "row 2, response=''", "empty"),
    file("sft", {"prompt": "a", "completion": "b", "label": False}, "row 2, label=False", "judged, not imitated"),
    file("sft", {"message_id": "1", "parent_id": "0", "role": "prompter", "text": "a"}, "row 2, parent_id=0"),
    file("sft", {"message_id": "1", "parent_id": None, "role": "bot", "text": "a"}, "row 2, role=bot"),
    file("sft", {"prompt": {"role": "prompter", "text": "", "replies": []}}, "row 2, prompt.text=''", "empty"),
    file("sft", {"conversations": [{"from": "narrator", "value": "a"}]}, "row 2, conversations[0].role=narrator"),
    file("sft", {"conversations": [{"from": "human", "value": "a"}, {"value": "b"}]}, "row 2, conversations[1]"),
    file(
        "sft",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
        "row 2, conversations[1].value=''",
        "empty",
    ),
    file(
        "sft",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "4"}]},
        "row 2, conversations[1].role=tool",
        "no call stands before it",
    ),
    file("sft", {"instruction": 3, "output": "b"}, "row 2, instruction=3"),
    file("sft", {"instruction": "a", "output": " "}, "row 2, output=' '", "empty"),
    file("sft", {"instruction": "a", "output": "b", "history": [["q"]]}, "row 2, history[0]"),
    file("sft", {"messages": []}, "row 2, messages=[]"),
    file("sft", {"messages": "a"}, "row 2, messages=a"),
    file("sft", {"messages": ["a", "b"]}, "row 2, messages[0]"),
    file("sft", {"messages": [{"content": "a"}]}, "row 2, messages[0].role"),
    file("sft", {"messages": [{"role": "human", "content": "a"}]}, "row 2, messages[0].role=human", "user"),
    file("sft", {"messages": [{"role": "user"}]}, "row 2, messages[0].content", "missing"),
    file("sft", chat("a", None), "row 2, messages[1].content", "missing"),
    file("sft", chat("a", 3), "row 2, messages[1].content=3"),
    file("sft", chat("a", ""), "row 2, messages[1].content=''", "empty"),
    file("sft", chat("", "b"), "row 2, messages[0].content=''", "empty"),
    file("sft", chat("a", "<think>\nHm"), "row 2, messages[1].content='<think>", "without its end"),
    file("sft", chat("a", "<think>Hm</think>"), "row 2, messages[1].content=", "reasoning alone"),
    file("sft", chat([{"type": "image_url"}], "b"), "row 2, messages[0].content[0]=image_url", "parts"),
    file("sft", chat("a", [{"type": "text"}]), "row 2, messages[1].content[0]", "parts"),
    file("sft", chat("a", "b", tool_calls=[{"id": "1"}]), "row 2, messages[1].tool_calls", "tool"),
    file("sft", {"messages": [*USER, {"role": "tool", "content": "4"}]}, "row 2, messages[1].role=tool", "no call"),
    file("sft", chat("a", "b", weight=0.5), "row 2, messages[1].weight=0.5", "0 or 1"),
    file("sft", chat("a", "b", weight="1"), "row 2, messages[1].weight=1"),
    file("sft", chat("a", "b", train=True, weight=0), "row 2, messages[1]", "contradicts"),
    file("sft", {"messages": [{**USER[0], "train": True}, *ANSWER]}, "row 2, messages[0].train"),
    file("sft", chat("a", "b", reasoning_content=3), "row 2, messages[1].reasoning_content=3"),
    file("sft", chat("a", "<think>x</think>b", reasoning_content="y"), "row 2, messages[1].reasoning_content=y"),
    file("sft", {**chat("a", "b"), "tools": [{"type": "f"}]}, "row 2, tools[0]"),
    file("sft", {**chat("a", "b"), "images": ["a.png"]}, "row 2, images"),
    file("sft", {**chat("a", "b"), "weight": 0.5}, "row 2, weight=0.5"),
    file("sft", {**chat("a", "b"), "system": 3}, "row 2, system=3"),
    file("sft", {"messages": [{"role": "system", "content": "A"}, *turns("a", "b")], "system": "B"}, "row 2, system=B"),
    file("sft", {**chat("a", "b"), "chat_template_kwargs": {"x": 1}}, "row 2, chat_template_kwargs", "template_kwargs"),
    file("sft", {"prompt": "a", "answer": "b"}, "row 2, answer=b", "named as an answer", "completion: answer"),
    file("sft", {"prompt": "a", "completion": "b", "response": "c"}, "row 2, prompt"),
    file("sft", {"prompt": "", "completion": "b"}, "row 2, prompt=''", "empty"),
    file("sft", {"prompt": 3, "completion": "b"}, "row 2, prompt=3"),
    file("sft", {"prompt": "a", "completion": 3}, "row 2, completion=3"),
    file("sft", {"prompt": "a", "completion": ""}, "row 2, completion=''", "empty"),
    file("sft", {"text": ""}, "row 2, text"),
    file("sft", {"text": ["a"]}, "row 2, text"),
    file("sft", chat(f"a{HALF}", "b"), "row 2", "half a character", "U+D83D"),
    file("sft", chat("a" * 100, "b") | {HALF: 1}, "row 2", "half a character"),
    file("sft", '{"messages": 1, "messages": 2}\n', "row 2", "messages"),
    file("sft", "".join(json.dumps(chat(f"only asks {i}")) + "\n" for i in range(40)), "nothing to train on"),
    # --- Pairs, for a reward model, for DPO and for KTO
    *(
        file(command, row, *says)
        for command in ("reward", "dpo", "kto")
        for row, says in (
            (chat("a", "b"), ("row 2, chosen", "missing")),
            ({"prompt": "a", "chosen": "b"}, ("row 2", "rejected")),
            ({"prompt": "a", "rejected": "b"}, ("row 2", "chosen")),
            ({"chosen": "b", "rejected": "c"}, ("row 2",)),
            (pair(prompt=3), ("row 2, prompt=3",)),
            (pair(prompt=""), ("row 2, prompt=''", "question")),
            (pair(prompt=None), ("row 2, prompt",)),
            (pair(chosen=3), ("row 2, chosen=3",)),
            (pair(chosen=None), ("row 2, chosen",)),
            (pair(USER, "b", OTHER), ("row 2",)),
            (pair(USER, [], OTHER), ("row 2, chosen",)),
            (pair(USER, USER, OTHER), ("row 2, chosen",)),
            (pair(ANSWER, ANSWER, OTHER), ("row 2, prompt",)),
            (pair(USER, [{"role": "robot", "content": "b"}], OTHER), ("row 2, chosen[0].role=robot",)),
            (pair(USER, [{**ANSWER[0], "tool_calls": [1]}], OTHER), ("row 2, chosen[0].tool_calls",)),
            (pair(margin="wide"), ("row 2, margin=wide",)),
            (pair(chosen=f"b{HALF}"), ("row 2", "half a character")),
            ({"question": 3, "chosen": "b", "rejected": "c"}, ("row 2, question=3",)),
            ({"question": "a", "chosen": "b"}, ("row 2, rejected", "missing", "which also needs `rejected`")),
            ({"prompt": "a", "response": "b", "helpfulness": "high"}, ("row 2, helpfulness=high",)),
            ({"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c"}]}, ("row 2, answers", "rank")),
            ({"context": USER, "response1": "b", "response2": "c", "overall_preference": 9}, ("overall_preference=9",)),
        )
    ),
    # --- Items for annotators
    file("import", chat("a", "b"), "row 2", "prompt"),
    file("import", {"prompt": "a"}, "row 2", "answers"),
    file("import", item(prompt=3), "row 2, prompt=3"),
    file("import", item(prompt=""), "row 2", "empty"),
    file("import", item(answers="b"), "row 2, answers=b"),
    file("import", item(answers=["b"]), "row 2, answers", "2"),
    file("import", item(answers=[str(i) for i in range(10)]), "row 2, answers", "9"),
    file("import", item(answers=["b", 3]), "row 2, answers"),
    file("import", item(answers=[{"txt": "b"}, "c"]), "row 2, answers"),
    file("import", item(prompt=[{"role": "robot", "content": "a"}]), "row 2, prompt[0].role=robot"),
    file("import", item(answers=["b", f"c{HALF}"]), "row 2", "half a character"),
]
