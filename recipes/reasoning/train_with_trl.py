"""Train TRL's GRPOTrainer for some minutes on the prompts of a `stage=ppo` run, in their order, and answer the held-out
questions greedily.

Usage: python recipes/reasoning/train_with_trl.py RUN_ROOT TASKS --seed SEED [--minutes M] [--lr LR] [--dtype DTYPE]

TASKS is the setting `data.tasks`. The model to start from is the newest `stage=full` run of RUN_ROOT. RUN_ROOT/trl gets
the held-out questions with their checks (`questions.jsonl`), TRL's answers (`answers.jsonl`), and the number of updates
and the minutes (`training.json`).

TRL is used as its documentation shows it, with a new LoRA adapter. What align's run sets is set here too, and the rest
is TRL's default, such as its loss.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from align.core.types import Conversation
from align.data.sources import DataSource, read_divided_prompts
from align.models.load import choose_device, choose_dtype
from align.ppo.rollouts import choose_prompt_indices
from align.reward.check import CheckReward
from align.run import resolve

HELD_OUT = 0.25
"""Share of the questions that nothing is trained on: `data.held_out` of the recipe."""
GROUP_SIZE = 8
ANSWERS = 128
"""Answers to an update."""
MICRO_BATCH = 32
MAX_NEW_TOKENS = 8
MAX_UPDATES = 1000
"""More updates than fit into the minutes."""


class StopAfter(TrainerCallback):
    """Stop training at the end of the update in which the minutes pass.

    Attributes:
        seconds: time since the beginning of training, measured after the last update.
        updates: number of updates.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.started = self.seconds = 0.0
        self.updates = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.monotonic() - self.started
        self.updates = state.global_step
        print(f"trl {self.updates}  {self.seconds:.0f} s", flush=True)
        control.should_training_stop = self.seconds >= 60 * self.minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("tasks")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    folder = options.root / "trl"
    start = resolve("full:latest", options.root).path
    source = DataSource("reasoning_gym", tasks=yaml.safe_load(options.tasks), held_out=HELD_OUT)
    questions = read_divided_prompts(source, options.seed)
    stop = StopAfter(options.minutes)
    trainer = build_trainer(str(start), list_in_training_order(questions.train, options.seed), options, stop)
    trainer.train()
    answers = generate_greedy_answers(trainer, questions.test)
    question_rows = [
        {"id": prompt.id, "prompt": prompt.messages[-1].content, **prompt.columns} for prompt in questions.test
    ]
    write_rows(folder / "questions.jsonl", question_rows)
    answer_rows = [{"id": prompt.id, "answer": answer} for prompt, answer in zip(questions.test, answers, strict=True)]
    write_rows(folder / "answers.jsonl", answer_rows)
    training = {
        "updates": stop.updates,
        "minutes": stop.seconds / 60,
        "lr": options.lr,
        "rewards": [row["reward"] for row in trainer.state.log_history if "reward" in row],
    }
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def list_in_training_order(prompts: Sequence[Conversation], seed: int) -> list[Conversation]:
    """Return the prompts in the order in which align's updates use them, for as many updates as fit into the time."""
    groups = ANSWERS // GROUP_SIZE
    return [
        prompts[index]
        for update in range(MAX_UPDATES)
        for index in choose_prompt_indices(update, groups, len(prompts), seed)
    ]


def build_trainer(
    start: str, prompts: Sequence[Conversation], options: argparse.Namespace, stop: StopAfter
) -> GRPOTrainer:
    dtype = choose_dtype(options.dtype, choose_device("auto"))
    arguments = GRPOConfig(
        output_dir=str(options.root / "trl"),
        model_init_kwargs={"dtype": dtype},
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ANSWERS // MICRO_BATCH,
        max_completion_length=MAX_NEW_TOKENS,
        max_steps=MAX_UPDATES,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=dtype == torch.bfloat16,
        seed=options.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    reward = CheckReward()

    def score_answers(completions: Sequence[Any], number: Sequence[int], **columns: Any) -> list[float]:
        answered = [
            prompts[index].with_answer(completion[-1]["content"])
            for index, completion in zip(number, completions, strict=True)
        ]
        return reward.score(answered).tolist()

    rows = [{"prompt": build_messages(prompt), "number": number} for number, prompt in enumerate(prompts)]
    return GRPOTrainer(
        model=start,
        reward_funcs=score_answers,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start, padding_side="left"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[stop],
    )


def build_messages(prompt: Conversation) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


@torch.no_grad()
def generate_greedy_answers(trainer: GRPOTrainer, questions: Sequence[Conversation]) -> list[str]:
    """Return the trained model's likeliest answers, one to each question."""
    tokenizer = trainer.processing_class
    model = trainer.model.eval()
    answers: list[str] = []
    for first in range(0, len(questions), MICRO_BATCH):
        batch = tokenizer.apply_chat_template(
            [build_messages(question) for question in questions[first : first + MICRO_BATCH]],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


if __name__ == "__main__":
    main()
