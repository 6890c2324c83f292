"""Answers that lm-eval's tasks ask systems to write, and the metrics that lm-eval computes from given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval_folder import write_task_folder

from align.core.errors import InputError
from align.data.chat.continuations import encode_context
from align.evals.suite.likelihoods import batch_by_length, decode_answer
from align.evals.suite.probes import LM_EVAL, CompletionRequest, HarnessTask, LikelihoodRequests, LMEvalReplies, Probe
from align.evals.suite.tasks import EvalItem, EvalTask
from align.rollout.answer_cache import AnswerKey

lm = pytest.importorskip("align.evals.suite.lm_eval", reason='needs lm-eval (pip install "align-rlhf[evals]")')
FILTERS = """filter_list:
  - {name: strict-match, filter: [{function: regex, regex_pattern: "#### (-?[0-9]+)"}, {function: take_first}]}
  - {name: flexible-extract, filter: [{function: regex, group_select: -1, regex_pattern: "(-?[0-9]+)"},
      {function: take_first}]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_task_folder(tmp_path / "tasks")


def load_items(folder: Path, name: str, metric: str = "") -> tuple[EvalTask, HarnessTask, Sequence[EvalItem], Any]:
    harness = HarnessTask(name, str(folder), metric)
    task = EvalTask(name, probe=Probe(LM_EVAL, harness=harness))
    return task, harness, lm.load_harness_items(task, harness), lm.build_tasks(harness, task.field)


def build_replies(items: Sequence[EvalItem], *texts: str) -> LMEvalReplies:
    """Build replies with these answers, one per item. The first of several choices is the likeliest."""
    replies = dict[tuple[Any, ...], Any]()
    remaining_texts = iter(texts)
    for item in items:
        if isinstance(item.probe, CompletionRequest):
            replies[item.probe.request] = next(remaining_texts)
        else:
            assert isinstance(item.probe, LikelihoodRequests)
            replies |= {text: (-1.0 - i, False) for i, text in enumerate(item.probe.texts)}
    return replies


def edit_task(folder: Path, name: str, old: str, new: str) -> None:
    yaml = folder / f"{name}.yaml"
    assert old in yaml.read_text()
    yaml.write_text(yaml.read_text().replace(old, new))


def test_an_item_asks_for_an_answer_as_its_task_says(folder: Path) -> None:
    _, _, items, _ = load_items(folder, "write")
    assert items[1].probe == CompletionRequest("write", 1, "What about the rain?", ("\n",), 8)
    assert items[1].prompt.messages[0].content == "What about the rain?"


@pytest.mark.parametrize(
    ("kwargs", "ending"),
    [
        ('{until: ["\\n", "", "a b"]}', (("\n", "a b"), 256)),
        ("{until: x, max_new_tokens: 3, do_sample: false, temperature: 0.0}", (("x",), 3)),
        ("{until: [], max_gen_toks: 5, top_p: 0.9}", ((), 5)),
        ("{max_gen_toks: 5}", (("\n\n",), 5)),
    ],
)
def test_what_ends_an_answer_is_what_lm_eval_ends_it_by(
    folder: Path, kwargs: str, ending: tuple[tuple[str, ...], int]
) -> None:
    edit_task(folder, "write", '{until: ["\\n"], max_gen_toks: 8}', kwargs)
    _, _, items, _ = load_items(folder, "write")
    assert isinstance(items[0].probe, CompletionRequest)
    assert items[0].probe.request[1:] == ending


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        (
            "{do_sample: true, temperature: 0.7}",
            r"generation_kwargs.do_sample=True: asks for sampling.*do_sample: false",
        ),
        ("{temperature: 0.7}", r"generation_kwargs.temperature=0.7: asks for sampling.*temperature: 0"),
        ("{do_sample: false, temperature: 1}", r"generation_kwargs.temperature=1.0: asks for sampling"),
        ("{num_beams: 4}", r"generation_kwargs.num_beams=4: is not known to greedy decoding"),
        ("{until: [7]}", r"generation_kwargs.until=7: is no text"),
        ("{until: 7}", r"generation_kwargs.until=7: is no text"),
        ("{max_gen_toks: 0}", r"generation_kwargs.max_gen_toks=0: is no number of tokens"),
        ("{max_gen_toks: many}", r"generation_kwargs.max_gen_toks=many: is no number of tokens"),
    ],
)
def test_what_is_not_greedy_is_refused_by_its_key(folder: Path, kwargs: str, said: str) -> None:
    edit_task(folder, "write", '{until: ["\\n"], max_gen_toks: 8}', kwargs)
    with pytest.raises(InputError, match=f"eval.tasks, write, write, {said}"):
        load_items(folder, "write")


def test_an_exact_match_by_hand_of_all_and_of_some(folder: Path) -> None:
    """The right answers are the first choices, such as `I like the rain.`"""
    task, harness, items, tasks = load_items(folder, "write")
    texts = ["I like my dog.", "I like the rain", " I like a good book.", "", "I like the old town.", "No."]
    for indices, right in ((range(6), [1, 0, 0, 0, 1, 0]), ((0, 4, 5), [1, 1, 0])):
        chosen_items = [items[i] for i in indices]
        outcome = lm.evaluate_items(
            task, harness, tasks, chosen_items, build_replies(chosen_items, *(texts[i] for i in indices))
        )
        assert [metrics["exact_match"] for metrics in outcome.metrics] == right
        assert outcome.results["results"]["write"]["exact_match,none"] == pytest.approx(sum(right) / len(right))
        assert lm.choose_scoring_metrics(task, harness, tasks, chosen_items, [outcome]) == {"write": "exact_match"}


def test_the_first_filter_scores_items_and_all_are_in_the_figures(folder: Path) -> None:
    edit_task(folder, "write", 'doc_to_target: "{{choices[0]}}"', 'doc_to_target: "7"')
    (folder / "write.yaml").write_text((folder / "write.yaml").read_text() + FILTERS)
    task, harness, items, tasks = load_items(folder, "write")
    texts = ["3 + 4 = 7\n#### 7", "It is 7", "#### 7 or 8", "#### 8, no, 7", "none", "#### 7"]
    outcome = lm.evaluate_items(task, harness, tasks, items, build_replies(items, *texts))
    assert [metrics["exact_match"] for metrics in outcome.metrics] == [1, 0, 1, 0, 0, 1]
    results: Mapping[str, float] = outcome.results["results"]["write"]
    assert results["exact_match,strict-match"] == pytest.approx(3 / 6)
    assert results["exact_match,flexible-extract"] == pytest.approx(4 / 6)


def test_repeats_of_a_greedy_answer_are_the_answer(folder: Path) -> None:
    (folder / "write.yaml").write_text((folder / "write.yaml").read_text() + "repeats: 3\n")
    task, harness, items, tasks = load_items(folder, "write")
    assert len(items) == 6
    outcome = lm.evaluate_items(task, harness, tasks, items, build_replies(items, "I like my dog.", *["No."] * 5))
    assert [metrics["exact_match"] for metrics in outcome.metrics] == [1, 0, 0, 0, 0, 0]


def test_tasks_of_a_group_without_a_metric_in_common_have_each_its_own(folder: Path) -> None:
    task, harness, items, tasks = load_items(folder, "mixed")
    outcome = lm.evaluate_items(task, harness, tasks, items, build_replies(items, "I like my dog.", *["No."] * 5))
    metric_by_task = {"choose": "acc", "write": "exact_match"}
    assert lm.choose_scoring_metrics(task, harness, tasks, items, [outcome]) == metric_by_task
    one_metric = HarnessTask("mixed", str(folder), "acc")
    with pytest.raises(InputError, match="metric=acc: scores no item by itself"):
        lm.choose_scoring_metrics(task, one_metric, tasks, items, [outcome])
    units = [{"exact_match": 0.5} if "exact_match" in metrics else metrics for metrics in outcome.metrics]
    with pytest.raises(InputError, match="scores no item by itself"):  # metrics of two units have no mean
        lm.choose_scoring_metrics(task, harness, tasks, items, [outcome._replace(metrics=units)])


def test_a_text_is_cut_before_the_first_stop_and_keeps_its_blanks(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.encode(" I am here. And you?", add_special_tokens=False)
    eos = tiny_tokenizer.eos_token_id
    assert decode_answer(tiny_tokenizer, [*ids, eos], ()) == " I am here. And you?"
    assert decode_answer(tiny_tokenizer, ids, ("you", ". A", "And")) == " I am here"
    assert decode_answer(tiny_tokenizer, ids, (" I",)) == ""


def test_a_context_is_kept_as_it_is_and_nothing_is_the_prefix_token(tiny_tokenizer: Any) -> None:
    assert encode_context(tiny_tokenizer, "I am ") == tiny_tokenizer.encode("I am ")
    assert encode_context(tiny_tokenizer, "") == [tiny_tokenizer.bos_token_id]


def test_batches_hold_answers_of_one_length_limit_in_order_of_their_prompts() -> None:
    rows = [(8, 3), (4, 9), (8, 1), (4, 2), (8, 2)]
    keys = [
        AnswerKey("b", "", "lora", "float32", "t", (5,) * size, max_tokens, 0.0, (2,), 0, "hf")
        for max_tokens, size in rows
    ]
    batches = [[(key.max_new_tokens, len(key.prompt)) for key in batch] for batch in batch_by_length(keys, 2)]
    assert batches == [[(4, 2), (4, 9)], [(8, 1), (8, 2)], [(8, 3)]]
