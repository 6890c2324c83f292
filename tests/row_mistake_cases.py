"""Mistakes in rows of data files, one case a line, in the form of `mistake_cases`."""

from __future__ import annotations

import json

from mistake_cases import (
    ANSWER,
    DEEP,
    HALF,
    OTHER,
    USER,
    build_answers_row,
    build_chat_row,
    build_file_case,
    build_pair_row,
    build_turns,
)

CASES = [
    # --- Files that hold no rows
    *(
        build_file_case(command, content, "rows.jsonl", message)
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
        build_file_case(command, content, "rows.jsonl", message)
        for command in ("sft", "reward")
        for content, message in (
            (b'[{"text": "a"}', "no JSON after row 1"),
            (b'[{"text": "a"}, 3]', "row 2"),
            (b"prompt,completion,note\na,b,c\nd,e\n", "row 2"),
            (b'prompt,note\na,b\nc,"d\n', "quoted"),
        )
    ),
    # --- Rows to imitate
    build_file_case("sft", {"asked": "a", "said": "b"}, "row 2, columns=asked, said", "no row of a supported shape"),
    build_file_case("sft", {"mesages": []}, "row 2, columns=mesages", "which also needs `messages`"),
    build_file_case("sft", {"question": "a"}, "row 2, columns=question", "no answer", "answer"),
    build_file_case("sft", {"question": "a", "answer": 3}, "row 2, answer=3"),
    build_file_case("sft", {"question": "a", "answer": "b", "response": "c"}, "row 2, question=a", "several answers"),
    build_file_case("sft", {"query": "a", "response": ""}, "row 2, response=''", "empty"),
    build_file_case(
        "sft",
        {"prompt": "a", "completion": "b", "label": False},
        "row 2, label=False",
        "supervised training imitates every answer",
    ),
    build_file_case(
        "sft", {"message_id": "1", "parent_id": "0", "role": "prompter", "text": "a"}, "row 2, parent_id=0"
    ),
    build_file_case("sft", {"message_id": "1", "parent_id": None, "role": "bot", "text": "a"}, "row 2, role=bot"),
    build_file_case(
        "sft", {"prompt": {"role": "prompter", "text": "", "replies": []}}, "row 2, prompt.text=''", "empty"
    ),
    build_file_case(
        "sft", {"conversations": [{"from": "narrator", "value": "a"}]}, "row 2, conversations[0].role=narrator"
    ),
    build_file_case(
        "sft", {"conversations": [{"from": "human", "value": "a"}, {"value": "b"}]}, "row 2, conversations[1]"
    ),
    build_file_case(
        "sft",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
        "row 2, conversations[1].value=''",
        "empty",
    ),
    build_file_case(
        "sft",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "4"}]},
        "row 2, conversations[1].role=tool",
        "no call comes before it",
    ),
    build_file_case("sft", {"instruction": 3, "output": "b"}, "row 2, instruction=3"),
    build_file_case("sft", {"instruction": "a", "output": " "}, "row 2, output=' '", "empty"),
    build_file_case("sft", {"instruction": "a", "output": "b", "history": [["q"]]}, "row 2, history[0]"),
    build_file_case("sft", {"messages": []}, "row 2, messages=[]"),
    build_file_case("sft", {"messages": "a"}, "row 2, messages=a"),
    build_file_case("sft", {"messages": ["a", "b"]}, "row 2, messages[0]"),
    build_file_case("sft", {"messages": [{"content": "a"}]}, "row 2, messages[0].role"),
    build_file_case("sft", {"messages": [{"role": "human", "content": "a"}]}, "row 2, messages[0].role=human", "user"),
    build_file_case("sft", {"messages": [{"role": "user"}]}, "row 2, messages[0].content", "missing"),
    build_file_case("sft", build_chat_row("a", None), "row 2, messages[1].content", "missing"),
    build_file_case("sft", build_chat_row("a", 3), "row 2, messages[1].content=3"),
    build_file_case("sft", build_chat_row("a", ""), "row 2, messages[1].content=''", "empty"),
    build_file_case("sft", build_chat_row("", "b"), "row 2, messages[0].content=''", "empty"),
    build_file_case(
        "sft", build_chat_row("a", "<think>\nHm"), "row 2, messages[1].content='<think>", "without its end"
    ),
    build_file_case("sft", build_chat_row("a", "<think>Hm</think>"), "row 2, messages[1].content=", "reasoning alone"),
    build_file_case(
        "sft", build_chat_row([{"type": "image_url"}], "b"), "row 2, messages[0].content[0]=image_url", "parts"
    ),
    build_file_case("sft", build_chat_row("a", [{"type": "text"}]), "row 2, messages[1].content[0]", "parts"),
    build_file_case("sft", build_chat_row("a", "b", tool_calls=[{"id": "1"}]), "row 2, messages[1].tool_calls", "tool"),
    build_file_case(
        "sft", {"messages": [*USER, {"role": "tool", "content": "4"}]}, "row 2, messages[1].role=tool", "no call"
    ),
    build_file_case("sft", build_chat_row("a", "b", weight=0.5), "row 2, messages[1].weight=0.5", "0 or 1"),
    build_file_case("sft", build_chat_row("a", "b", weight="1"), "row 2, messages[1].weight=1"),
    build_file_case("sft", build_chat_row("a", "b", train=True, weight=0), "row 2, messages[1]", "contradicts"),
    build_file_case("sft", {"messages": [{**USER[0], "train": True}, *ANSWER]}, "row 2, messages[0].train"),
    build_file_case("sft", build_chat_row("a", "b", reasoning_content=3), "row 2, messages[1].reasoning_content=3"),
    build_file_case(
        "sft", build_chat_row("a", "<think>x</think>b", reasoning_content="y"), "row 2, messages[1].reasoning_content=y"
    ),
    build_file_case("sft", {**build_chat_row("a", "b"), "tools": [{"type": "f"}]}, "row 2, tools[0]"),
    build_file_case("sft", {**build_chat_row("a", "b"), "images": ["a.png"]}, "row 2, images"),
    build_file_case("sft", {**build_chat_row("a", "b"), "weight": 0.5}, "row 2, weight=0.5"),
    build_file_case("sft", {**build_chat_row("a", "b"), "system": 3}, "row 2, system=3"),
    build_file_case(
        "sft",
        {"messages": [{"role": "system", "content": "A"}, *build_turns("a", "b")], "system": "B"},
        "row 2, system=B",
    ),
    build_file_case(
        "sft",
        {**build_chat_row("a", "b"), "chat_template_kwargs": {"x": 1}},
        "row 2, chat_template_kwargs",
        "template_kwargs",
    ),
    build_file_case(
        "sft", {"prompt": "a", "answer": "b"}, "row 2, answer=b", "has the name of an answer", "completion: answer"
    ),
    build_file_case("sft", {"prompt": "a", "completion": "b", "response": "c"}, "row 2, prompt"),
    build_file_case("sft", {"prompt": "", "completion": "b"}, "row 2, prompt=''", "empty"),
    build_file_case("sft", {"prompt": 3, "completion": "b"}, "row 2, prompt=3"),
    build_file_case("sft", {"prompt": "a", "completion": 3}, "row 2, completion=3"),
    build_file_case("sft", {"prompt": "a", "completion": ""}, "row 2, completion=''", "empty"),
    build_file_case("sft", {"text": ""}, "row 2, text"),
    build_file_case("sft", {"text": ["a"]}, "row 2, text"),
    build_file_case("sft", build_chat_row(f"a{HALF}", "b"), "row 2", "half a character", "U+D83D"),
    build_file_case("sft", build_chat_row("a" * 100, "b") | {HALF: 1}, "row 2", "half a character"),
    build_file_case("sft", '{"messages": 1, "messages": 2}\n', "row 2", "messages"),
    build_file_case(
        "sft", "".join(json.dumps(build_chat_row(f"only asks {i}")) + "\n" for i in range(40)), "nothing to train on"
    ),
    # --- Pairs, for a reward model, for DPO and for KTO
    *(
        build_file_case(command, row, *says)
        for command in ("reward", "dpo", "kto")
        for row, says in (
            (build_chat_row("a", "b"), ("row 2, chosen", "missing")),
            ({"prompt": "a", "chosen": "b"}, ("row 2", "rejected")),
            ({"prompt": "a", "rejected": "b"}, ("row 2", "chosen")),
            ({"chosen": "b", "rejected": "c"}, ("row 2",)),
            (build_pair_row(prompt=3), ("row 2, prompt=3",)),
            (build_pair_row(prompt=""), ("row 2, prompt=''", "question")),
            (build_pair_row(prompt=None), ("row 2, prompt",)),
            (build_pair_row(chosen=3), ("row 2, chosen=3",)),
            (build_pair_row(chosen=None), ("row 2, chosen",)),
            (build_pair_row(USER, "b", OTHER), ("row 2",)),
            (build_pair_row(USER, [], OTHER), ("row 2, chosen",)),
            (build_pair_row(USER, USER, OTHER), ("row 2, chosen",)),
            (build_pair_row(ANSWER, ANSWER, OTHER), ("row 2, prompt",)),
            (build_pair_row(USER, [{"role": "robot", "content": "b"}], OTHER), ("row 2, chosen[0].role=robot",)),
            (build_pair_row(USER, [{**ANSWER[0], "tool_calls": [1]}], OTHER), ("row 2, chosen[0].tool_calls",)),
            (build_pair_row(margin="wide"), ("row 2, margin=wide",)),
            (build_pair_row(chosen=f"b{HALF}"), ("row 2", "half a character")),
            ({"question": 3, "chosen": "b", "rejected": "c"}, ("row 2, question=3",)),
            ({"question": "a", "chosen": "b"}, ("row 2, rejected", "missing", "which also needs `rejected`")),
            ({"prompt": "a", "response": "b", "helpfulness": "high"}, ("row 2, helpfulness=high",)),
            ({"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c"}]}, ("row 2, answers", "rank")),
            ({"context": USER, "response1": "b", "response2": "c", "overall_preference": 9}, ("overall_preference=9",)),
        )
    ),
    # --- Items for annotators
    build_file_case("import", build_chat_row("a", "b"), "row 2", "prompt"),
    build_file_case("import", {"prompt": "a"}, "row 2", "answers"),
    build_file_case("import", build_answers_row(prompt=3), "row 2, prompt=3"),
    build_file_case("import", build_answers_row(prompt=""), "row 2", "empty"),
    build_file_case("import", build_answers_row(answers="b"), "row 2, answers=b"),
    build_file_case("import", build_answers_row(answers=["b"]), "row 2, answers", "2"),
    build_file_case("import", build_answers_row(answers=[str(i) for i in range(10)]), "row 2, answers", "9"),
    build_file_case("import", build_answers_row(answers=["b", 3]), "row 2, answers"),
    build_file_case("import", build_answers_row(answers=[{"txt": "b"}, "c"]), "row 2, answers"),
    build_file_case(
        "import", build_answers_row(prompt=[{"role": "robot", "content": "a"}]), "row 2, prompt[0].role=robot"
    ),
    build_file_case("import", build_answers_row(answers=["b", f"c{HALF}"]), "row 2", "half a character"),
]
