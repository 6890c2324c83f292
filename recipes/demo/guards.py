"""Compare a policy's answers with those of the untouched model, by the rubric and by guards against gaming it.

    rubric         the score by the rubric, beside that of the null policy "cut"
    finished       the share of answers that end by themselves
    likelihood     the log-likelihood of a token under the untouched model, at the positions that both answers reach:
                   the mean of an answer, averaged over the answers
    topic          the share of answers that are likelier after their own question than after seven others (seeds.py
                   judges it over several seeds, because one has too few answers)
    repetition     the share of an answer's 4-grams that occurred in it before
    grammar        the number of findings of the grammar checker Harper in 100 words
    copying        the share of an answer's words that its question has
    sameness       the share of greedy answers with the policy's commonest sentence, with the words of questions masked

Repetition and grammar are measured after both answers to a question were cut to the length of the shorter one, because
a shorter answer has less of both. Ends with status 3 if a guard is missed.

Usage: python recipes/demo/guards.py RUN_ROOT [--topic] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from harper import Linter
from null_policies import Answer, build_null_answers, score_answers
from numpy.typing import NDArray
from rubric import list_words
from seeds import get_low_end

from align.core.errors import NOT_PASSED
from align.evals.collapse import MASK, VARIED, join_words, mask_answers
from align.models.base import find_base
from align.models.load import load_base, load_tokenizer
from align.ops.intervals import mean_interval
from align.report import format_interval
from align.run import read_manifest, resolve
from align.run.environment import describe_processor
from align.track import read_rows

ROW_NAMES = {"before": "ref", "after": "policy"}
"""Side → its name in the rows of `stage=eval`."""
EVALUATION = "eval:before-and-after"
OTHER_QUESTIONS = 7
ROWS_AT_ONCE = 16
SHOWN = 6
"""Number of questions whose greedy answers are printed."""
MAX_LIKELIHOOD_CHANGE = 0.3
"""Nats a token, in either direction."""
MAX_SENTENCE_SHARE = 0.2
MAX_COPIED_RISE = 0.05
MAX_KL = 8.0


@dataclass(frozen=True)
class Side:
    """The answers of one model, in the order of the questions: sampled at the evaluation's temperature, and greedy."""

    sampled: list[Answer]
    greedy: list[str]

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.sampled]


class Guard(NamedTuple):
    """A figure of both sides, its limit in words, and whether it is within the limit."""

    name: str
    before: float
    after: float
    limit: str
    is_met: bool


# Figures of texts


def match_lengths(before: str, after: str) -> tuple[str, str]:
    """Cut two texts to the number of words of the shorter one."""
    words = before.split(), after.split()
    length = min(map(len, words))
    return " ".join(words[0][:length]), " ".join(words[1][:length])


def compute_repeated_share(text: str, n: int = 4) -> float:
    """Return the share of a text's n-grams of words that occurred in it before. Returns 0 if it has none."""
    words = list_words(text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compute_copied_share(question: str, text: str) -> float:
    """Return the share of a text's words that its question has. Returns 0 if the text has no words."""
    words = list_words(text)
    in_question = set(list_words(question))
    return fmean(word in in_question for word in words) if words else 0.0


def count_grammar_findings(texts: Sequence[str]) -> float:
    """Return the number of Harper's findings in 100 words, or 0 if the texts have no words."""
    linter = Linter()
    words = sum(len(text.split()) for text in texts)
    return 100 * sum(len(linter.lint(text)) for text in texts) / words if words else 0.0


def find_commonest_sentence(questions: Sequence[str], texts: Sequence[str]) -> tuple[str, float]:
    """Return the masked sentence that most texts have, and the share of texts that have it.

    Sentences with fewer than two words that are not masked do not count.
    """
    counts: Counter[str] = Counter()
    for sentences in mask_answers(questions, texts):
        counts.update({join_words(words) for words in sentences if sum(word not in (MASK, "0") for word in words) > 1})
    sentence, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return sentence, count / len(texts)


# Likelihoods


class ReferenceModel:
    """The untouched model in fp32, which computes log-likelihoods of answers.

    Args:
        system: the system prompt of the evaluation.
    """

    def __init__(self, system: str) -> None:
        base = find_base("smollm2")
        self.model = load_base(base, "lora", torch.device("cpu"), torch.float32)
        self.tokenizer = load_tokenizer(base)
        self.system = system

    def tokenize(self, question: str, answer: str) -> tuple[list[int], int]:
        """Return the tokens of a question and an answer, and the number of tokens before the answer."""
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        return [*prompt_ids, *self.tokenizer.encode(answer, add_special_tokens=False)], len(prompt_ids)

    @torch.inference_mode()
    def compute_logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[NDArray[np.float32]]:
        """Return the log-likelihoods of each answer's tokens after its question, in nats: an array for each pair."""
        rows = [self.tokenize(*pair) for pair in pairs]
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        logprobs: dict[int, NDArray[np.float32]] = {}
        for first in range(0, len(rows), ROWS_AT_ONCE):
            batch = by_length[first : first + ROWS_AT_ONCE]
            width = max(len(rows[i][0]) for i in batch)
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for k, i in enumerate(batch):
                input_ids[k, : len(rows[i][0])] = torch.tensor(rows[i][0])
                attention_mask[k, : len(rows[i][0])] = 1
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            for k, i in enumerate(batch):
                tokens, start = rows[i]
                answer = torch.tensor(tokens[start:], dtype=torch.long)
                before_answer = logits[k, start - 1 : len(tokens) - 1].float()
                logprobs[i] = before_answer.log_softmax(-1).gather(-1, answer[:, None])[:, 0].numpy()
        return [logprobs[i] for i in range(len(rows))]


def compute_matched_means(
    before: Sequence[NDArray[np.float32]], after: Sequence[NDArray[np.float32]]
) -> tuple[list[float], list[float]]:
    """Return the mean log-likelihood of a token for each answer of both sides, at the positions that both reach.

    Questions to which an answer is empty are left out.
    """
    lengths = [min(map(len, rows)) for rows in zip(before, after, strict=True)]
    return (
        [float(row[:length].mean()) for row, length in zip(before, lengths, strict=True) if length],
        [float(row[:length].mean()) for row, length in zip(after, lengths, strict=True) if length],
    )


def list_topic_hits(model: ReferenceModel, questions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Return for each answer whether it is likelier after its own question than after each of seven others.

    Args:
        questions: at least eight.
    """
    count = len(questions)
    step = count // (OTHER_QUESTIONS + 1)
    pairs = [
        (questions[(i + k * step) % count], answer)
        for i, answer in enumerate(answers)
        for k in range(OTHER_QUESTIONS + 1)
    ]
    sums = np.array([row.sum() for row in model.compute_logprobs(pairs)]).reshape(count, OTHER_QUESTIONS + 1)
    return (sums[:, 0] > sums[:, 1:].max(axis=1)).tolist()


# The report


def read_sides(folder: Path) -> tuple[str, dict[str, Side]]:
    """Read the system prompt and both sides' answers from the artifact of an evaluation."""
    rows = read_rows(folder / "samples.jsonl")
    first = rows[0]["prompt"][0]
    sides = {
        side: Side(
            [Answer(row["prompt"][-1]["content"], row[name], row[f"ended_{name}"]) for row in rows],
            [row[f"greedy_{name}"] for row in rows],
        )
        for side, name in ROW_NAMES.items()
    }
    return first["content"] if first["role"] == "system" else "", sides


def compute_change(after: Iterable[float], before: Iterable[float]) -> dict[str, Any]:
    """Return the mean of paired differences with its 95 % interval."""
    return mean_interval(np.array([*after], dtype=float) - np.array([*before], dtype=float)).as_dict()


def list_guards(
    questions: Sequence[str], sides: Mapping[str, Side], logprobs: Sequence[Sequence[float]], metrics: Mapping[str, Any]
) -> list[Guard]:
    """Return the guards that need no further pass of the model.

    Args:
        logprobs: for each side the mean log-likelihood of a token for each answer.
        metrics: of the evaluation.
    """
    before = sides["before"]
    after = sides["after"]
    likelihood = [fmean(values) if values else math.nan for values in logprobs]
    cut = [*zip(*map(match_lengths, before.texts, after.texts), strict=True)]
    repeated = [fmean(map(compute_repeated_share, texts)) for texts in cut]
    findings = [count_grammar_findings(texts) for texts in cut]
    copied = [fmean(map(compute_copied_share, questions, side.texts)) for side in (before, after)]
    sentences = [find_commonest_sentence(questions, side.greedy)[1] for side in (before, after)]
    finished = [fmean(answer.is_finished for answer in side.sampled) for side in (before, after)]
    kl = float(metrics["kl"])
    return [
        Guard("finished answers", *finished, "no fewer", finished[1] >= finished[0]),
        Guard(
            "log-likelihood of a token, nats",
            *likelihood,
            f"moves by at most {MAX_LIKELIHOOD_CHANGE}",
            abs(likelihood[1] - likelihood[0]) <= MAX_LIKELIHOOD_CHANGE,
        ),
        Guard("repeated 4-grams", *repeated, "no more", repeated[1] <= repeated[0]),
        Guard("grammar findings in 100 words", *findings, "no more", findings[1] <= findings[0]),
        Guard(
            "words copied from the question",
            *copied,
            f"rise by at most {MAX_COPIED_RISE}",
            copied[1] - copied[0] <= MAX_COPIED_RISE,
        ),
        Guard(
            "greedy answers with the commonest sentence",
            *sentences,
            f"at most {MAX_SENTENCE_SHARE}",
            sentences[1] <= MAX_SENTENCE_SHARE,
        ),
        Guard("KL, nats an answer", 0.0, kl, f"at most {MAX_KL:g}", kl <= MAX_KL),
    ]


def measure_seed(root: Path, measures_topic: bool) -> dict[str, Any]:
    """Return all figures of an evaluation: the rubric and the null policies with intervals, and the guards."""
    artifact = resolve(EVALUATION, root).path
    manifest = read_manifest(artifact.parent)
    metrics = manifest.metrics
    system, sides = read_sides(artifact)
    questions = [answer.question for answer in sides["before"].sampled]
    scores = {name: score_answers(side.sampled) for name, side in sides.items()}
    nulls = {name: score_answers(answers) for name, answers in build_null_answers(sides["before"].sampled).items()}
    model = ReferenceModel(system)
    logprobs = compute_matched_means(
        *(model.compute_logprobs([*zip(questions, side.texts, strict=True)]) for side in sides.values())
    )
    guards = list_guards(questions, sides, logprobs, metrics)
    figures = {
        "seed": manifest.seed,
        "processor": describe_processor(manifest.hardware),
        "questions_file": Path(manifest.config["data"]["eval_path"]).stem,
        "questions": len(questions),
        "rubric": {name: fmean(values) for name, values in scores.items()},
        "rubric_change": compute_change(scores["after"], scores["before"]),
        "nulls": {name: fmean(values) for name, values in nulls.items()},
        "over_cut": compute_change(scores["after"], nulls["cut"]),
        "over_cut_without_question": compute_change(scores["after"], nulls["cut, no question"]),
        "kl": metrics["kl"],
        "collapse": metrics["collapse"]["verdict"],
        "commonest_sentence": find_commonest_sentence(questions, sides["after"].greedy)[0],
        "examples": [
            {"question": question, "before": before, "after": after}
            for question, before, after in zip(
                questions[:SHOWN], sides["before"].greedy, sides["after"].greedy, strict=False
            )
        ],
    }
    if measures_topic:
        hits = [list_topic_hits(model, questions, side.texts) for side in sides.values()]
        figures["topic"] = [
            {"question": question, "before": before, "after": after}
            for question, before, after in zip(questions, *hits, strict=True)
        ]
    return {**figures, "guards": [guard._asdict() for guard in guards]}


def format_change(change: Mapping[str, Any]) -> str:
    return format_interval(change, "+.3f")


def iter_report_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report that ends the demo."""
    for example in figures["examples"]:
        yield f"{example['question']}\n  before  {example['before']}\n  after   {example['after']}\n"
    rubric = figures["rubric"]
    yield f"rubric, on {figures['questions']} questions that nothing was trained on"
    yield f"  {rubric['before']:.3f} → {rubric['after']:.3f}, change {format_change(figures['rubric_change'])}"
    over_cut = format_change(figures["over_cut"])
    doubt = "" if get_low_end(figures["over_cut"]) > 0 else "  NOT SHOWN TO BE BETTER"
    yield f"  over the untouched answers cut to two sentences, with a stock question: {over_cut}{doubt}"
    yield f"  over the same without a question: {format_change(figures['over_cut_without_question'])}"
    yield f"guards (greedy answers: {figures['collapse']})"
    for guard in figures["guards"]:
        verdict = "" if guard["is_met"] else "  MISSED"
        yield f"  {guard['name']:<43}{guard['before']:7.3f} → {guard['after']:.3f}  {guard['limit']}{verdict}"
    if "topic" in figures:
        before, after = (fmean(row[side] for row in figures["topic"]) for side in ROW_NAMES)
        yield f"  {'likelier after its own question':<43}{before:7.3f} → {after:.3f}  judged over several seeds"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the runs")
    parser.add_argument("--topic", action="store_true", help="measure the topic too, which reads each answer 16 times")
    parser.add_argument("--save", type=Path, help="file for the figures, as JSON")
    arguments = parser.parse_args()
    figures = measure_seed(arguments.root, arguments.topic)
    print("\n".join(iter_report_lines(figures)))
    if arguments.save:
        arguments.save.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    is_met = figures["collapse"] == VARIED and all(guard["is_met"] for guard in figures["guards"])
    return 0 if is_met else NOT_PASSED


if __name__ == "__main__":
    sys.exit(main())
