"""Tests that the command line of a report builds the same configuration again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from align.config.command import format_command_line
from align.config.compose import build_config, compose_tree
from align.config.root import STORE_URL, to_plain_dict

LINES = [
    "stage=sft",
    "stage=sft model=hub model.path=ORG/NAME method=lora method.r=8 method.lr=3e-4 data=jsonl data.path=a.jsonl",
    "stage=sft stage.lr=1e-3 stage.max_steps=5 seed=3 dtype=bfloat16 run.name=mine run.root=elsewhere",
    "stage=sft stage.micro_batch=2 stage.gradient_accumulation=4 stage.optimiser=adafactor init=sft:a",
    "stage=sft method.dropout=0.1 method.dora=true 'method.targets=[q_proj,v_proj]'",
    "stage=full model=smollm2 data=jsonl 'data.path=my chats (v2), été.jsonl'",
    'stage=sft data.template=chatml "data.template_kwargs={enable_thinking: false, mood: \'a \\"b\\" c\', n: 2}"',
    "stage=sample project=p rollout.max_new_tokens=64 rollout.temperature=0.7 init=base",
    "stage=reward data.allow_simulated=true stage.held_out=0.2",
    "stage=reward data=jsonl data.path=pairs.jsonl",
    "stage=dpo stage.loss=ipo stage.beta=0.3",
    "stage=dpo stage.loss=simpo stage.beta=2.5 stage.simpo_gamma=1.4",
    "stage=kto stage.beta=0.2 stage.desirable_weight=1.33",
    "stage=ppo stage.lr=1e-4 stage.kl_control=adaptive stage.tripwires.kl=20 stage.first_ratio.bfloat16=0.1",
    "stage=ppo reward=rules \"reward.rules=[{rule: sentiment}, {rule: regex, pattern: '[aeiou], ', weight: 0.5}]\"",
    "stage=ppo reward=sum \"reward.parts=[{name: learned, ref: 'reward:a'}, {name: rules, rules: [{rule: json}]}]\"",
    "stage=ppo reward=ensemble \"reward.refs=['reward:a','reward:b']\" reward.combine=min",
    "stage=ppo reward=fn reward.fn=my_reward:score method=full init=full:latest",
    "stage=eval artifact=ppo:mine stage.prompts=32 stage.allow_proxy=true",
    "stage=eval reward=learned reward.ref=reward:a",
    "stage=export export=merged export.dtype=float32 'export.accept=[transformers/merged/original/float32]'",
    "stage=export export=check export.path=some/folder",
    "stage=verify model=hub model.path=DIR stage.rows=8",
    'stage=serve "stage.adapters={support: ppo:latest, chat: {support: 0.9, sft\\\\:next: 0.1}}" stage.roots=[a]',
    "stage=serve stage.action=key stage.tenant=acme stage.keys=/k 'stage.allow=[a,b]' stage.lift=[concurrency]",
    "stage=annotate stage.action=simulate stage.annotators=3 project=p",
    "stage=annotate stage.action=configure \"stage.settings={overlap: 2, note: 'yes, please'}\"",
]


@pytest.mark.parametrize("line", LINES)
def test_the_line_makes_the_same_configuration_again(line: str):
    config = to_plain_dict(build_config(compose_tree(shlex.split(line))))
    python, dash, module, *arguments = shlex.split(format_command_line(config, {}))
    assert (python, dash, module) == ("python", "-m", "align")
    assert to_plain_dict(build_config(compose_tree(arguments))) == config


def test_what_is_at_its_default_is_left_out():
    config = to_plain_dict(build_config(compose_tree(["stage=sample"])))
    assert format_command_line(config, {}) == "python -m align stage=sample"


def test_a_reward_that_nothing_was_scored_by_is_left_out():
    config = to_plain_dict(build_config(compose_tree(["stage=data", "stage.sources=[a.jsonl]", "reward=learned"])))
    assert "reward" not in format_command_line(config, {})
    scoring_config = to_plain_dict(
        build_config(compose_tree(["stage=data", "stage.sources=[a.jsonl]", "stage.score.by=reward"]))
    )
    assert "reward=learned reward.ref=reward:b" in format_command_line(scoring_config, {"reward": "reward:b"})


def test_latest_is_the_run_that_it_was():
    config = to_plain_dict(build_config(compose_tree(["stage=ppo", "reward.ref=reward:latest"])))
    command = format_command_line(config, {"init": "sft:a", "reward": "reward:b"})
    assert "init=sft:a" in command
    assert "reward.ref=reward:b" in command
    assert "latest" not in command


def test_no_secret_is_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(STORE_URL, "postgresql://me:hunter22@host/db")
    assert "hunter22" not in (
        command := format_command_line(to_plain_dict(build_config(compose_tree(["stage=sample"]))), {})
    )
    assert "store.url" not in command  # a URL with a masked password is of no use
