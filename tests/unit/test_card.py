"""The model card: its text, and content that it must refuse or escape."""

from __future__ import annotations

import pytest

from align.core.errors import InputError
from align.export.card import describe_folded_scale, read_licence, render_card
from align.export.history import (
    describe_data,
    describe_sampling,
    describe_settings,
    find_system_prompt,
    list_lineage_runs,
)
from align.export.receipt_rows import ReceiptCheck
from align.ops.divergence import Divergence
from align.run.lineage import LineageStep
from align.run.manifest import Input, Manifest

BASE = {"id": "org/tiny", "revision": "abc123", "digest": "sha256:00ff"}
FACTS = {
    "name": "support",
    "kind": "adapter",
    "base": BASE,
    "method": "qlora",
    "parents": [{"stage": "sft", "name": "a", "digest": "11aa"}, {"stage": "ppo", "name": "b"}],
    "seed": 17,
    "data": ["chitchat"],
    "judge": "vader",
    "metrics": {
        "win_rate": {"value": 0.8125, "low": 0.75, "high": 0.875, "n": 256},
        "gold": {"ref": 0.25, "policy": 0.78, "difference": {"value": 0.53, "low": 0.5, "high": 0.56, "n": 256}},
        "kl": 6.7,
        "kl_interval": {"value": 6.7, "low": 6.1, "high": 7.3, "n": 256},
        "length": {"ref": 14.0, "policy": 20.0},
        "distinct1": {"ref": 0.5, "policy": 0.4},
        "distinct2": {"ref": 0.88, "policy": 0.77},
        "eos_rate": {"ref": 0.9, "policy": 0.95},
    },
}


def parse_front_matter(card: str) -> dict:
    yaml = pytest.importorskip("yaml")
    _, yaml_text, _ = card.split("---\n", 2)
    return yaml.safe_load(yaml_text)


def test_card_says_what_it_is_where_from_and_how_good():
    card = render_card(FACTS)
    assert parse_front_matter(card) == {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["align", "lora", "sft", "ppo"],
    }
    for text in (
        "# support\n",
        "| base revision | abc123 |",
        "| base digest | sha256:00ff |",
        "| seed | 17 |",
        "1. Supervised fine-tuning: `sft/a`, sha256 `11aa`\n2. PPO against the reward model: `ppo/b`\n",
        "Data: chitchat.",
        "quantised to NF4",
        "on 256 held-out prompts",
        "| win rate | 0.8125 [0.75, 0.875] |",
        "| gold score by vader | 0.78 | 0.25 |",
        "6.7 [6.1, 7.3]",
        "| distinct-2 | 0.77 | 0.88 |",
    ):
        assert text in card, text
    assert "Receipt" not in card
    assert "Licences" not in card


def test_merged_card_states_its_distance_from_what_was_trained():
    facts = {k: v for k, v in FACTS.items() if k != "metrics"} | {"kind": "merged", "dtype": "bfloat16"}
    merged = Divergence(9.1e-5, 0.995, 0.0625, 4096)
    gap = Divergence(0.34, 0.74, 9.0, 4096)
    rows = [
        ReceiptCheck("transformers", "merged", "nf4-dequantised", "bfloat16", "5", merged, ("kl", 0.01)),
        ReceiptCheck("transformers", "adapter", "original", "bfloat16", "5", gap),
        ReceiptCheck("vLLM", note="it is | not there"),
    ]
    licences = [("base org/tiny", "mit"), ("data mine.jsonl", "")]
    card = render_card(facts | {"receipt": rows, "licences": licences})
    assert parse_front_matter(card)["library_name"] == "transformers"
    assert "| 0.062 | 9.1e-05 | 99.5% | pass (kl ≤ 0.01) |" in card
    assert r"not checked: it is \| not there" in card
    assert "KL 0.34 nats a token from the trained model, the same top token on 74.0% of 4,096" in card
    assert parse_front_matter(card)["license"] == "mit"
    assert "| data mine.jsonl | not stated: ask its provider |" in card
    assert "Merged into the original" in render_card(facts | {"into": "original"})
    assert "Merged into that base dequantised" in card
    assert "| weights | bfloat16 |" in card
    assert "BitsAndBytesConfig" not in card
    assert "Evaluation" not in card


def test_card_of_an_adapter_on_a_plain_base_does_not_quantise():
    card = render_card({"name": "x", "kind": "adapter", "base": BASE, "method": "lora", "precision": "bfloat16"})
    assert "NF4" not in card
    assert "BitsAndBytesConfig" not in card
    assert "in bfloat16, not quantised" in card


def build_manifest(stage: str, name: str, config: dict, metrics: dict | None = None, **inputs: Input) -> Manifest:
    return Manifest(stage, name, 0, {"data": {"name": "chitchat"}, **config}, inputs, None, metrics=metrics or {})


SYSTEM = "Be brief.\nSay `no` to /etc/passwd."
TRAINED = {"epochs": 2.0, "lr": 0.002, "schedule": "cosine", "warmup": 0.03, "batch_size": 8}
RSLORA = {"name": "lora", "r": 16, "alpha": 32, "dropout": 0.05, "targets": ["q_proj", "v_proj"], "rslora": True}
ROWS = {"name": "jsonl", "path": "/x/a.jsonl", "system": SYSTEM}
SFT = build_manifest(
    "sft", "a", {"stage": TRAINED, "method": RSLORA, "data": ROWS}, {"steps": 74, "published_step": 40}
)
FROM_SFT = Input("11aa", stage="sft", name="a", whole=False)
REWARD = build_manifest(
    "reward",
    "r",
    {"stage": TRAINED | {"max_steps": 9}, "method": {"name": "lora", "r": 16}},
    {"steps": 9},
    init=FROM_SFT,
)
PPO = build_manifest(
    "ppo",
    "p",
    {
        "stage": {"updates": 6, "epochs": 2, "lr": 5e-4, "batch_size": 16, "kl_coef": 0.05},
        "method": {"name": "lora"},
        "rollout": {"temperature": 0.2, "max_new_tokens": 24, "reasoning": "hide"},
    },
    {"published_update": 4},
    init=FROM_SFT,
)
LINEAGE = [
    LineageStep("full", "gone", "00aa"),
    LineageStep("sft", "a", "11aa", SFT),
    LineageStep("reward", "r", "22aa", REWARD),
    LineageStep("ppo", "p", "33aa", PPO),
]


def test_a_card_says_how_each_run_trained_and_by_which_system_prompt():
    system = find_system_prompt(LINEAGE, is_reward_model=False)
    assert system == {"text": SYSTEM, "run": "sft/a", "without": "ppo/p"}
    assert find_system_prompt(LINEAGE[:2], is_reward_model=False) == {"text": SYSTEM, "run": "sft/a"}
    assert find_system_prompt(LINEAGE[:3], is_reward_model=True) == {}  # the reward run had no system prompt
    card = render_card(
        FACTS | {"parents": list_lineage_runs(LINEAGE), "system": system, "folded": "Its scale is folded in."}
    )
    for text in (
        "1. Supervised fine-tuning of all weights: `full/gone`",
        "| run | learning rate | trained for | batch | weights | besides |\n",
        "| sft/a | 0.002, cosine, warm-up 3% | 2 epochs, 74 steps, of which step 40 is published | 8 | rsLoRA of rank",
        "| rsLoRA of rank 16, alpha 32, dropout 0.05, on q_proj, v_proj |  |\n",
        "| reward/r | 0.002, cosine, warm-up 3% | 9 steps | 8 | a copy of the adapter of sft/a, and a head of scores |",
        "| ppo/p | 0.0005 | 6 updates of 2 passes each, of which update 4 is published | 16 | the adapter of sft/a |",
        "| KL coefficient 0.05; answers sampled at temperature 0.2, at most 24 tokens, their reasoning hidden",
        "`sft/a` was trained with a system prompt, which the code below also uses; `ppo/p` was trained without one:",
        "> Be brief. Say 'no' to /etc/passwd.\n",
        '    {"role": "system", "content": "Be brief.\\nSay `no` to /etc/passwd."},\n    {"role": "user"',
        "Its scale is folded in.",
    ):
        assert text in card, text
    assert "| full/gone |" not in card  # its manifest is gone
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    reward_card = render_card(FACTS | {"system": system, "score": "<eos>", "metrics": {}})
    assert 'chat = [\n    {"role": "system"' in reward_card


def test_the_settings_of_other_runs():
    full_settings = describe_settings(
        build_manifest("full", "f", {"stage": TRAINED, "method": {"name": "full", "r": 16}})
    )
    assert (full_settings["weights"], full_settings["trained for"]) == ("all of the model", "2 epochs")
    ppo_settings = describe_settings(PPO)  # its parent is gone: its own manifest is all there is
    assert ppo_settings["weights"] == ""
    dpo = build_manifest(
        "dpo", "d", {"stage": {"beta": 0.1}, "method": {"name": "qlora", "r": 4, "alpha": 8, "dora": True}}
    )
    assert describe_settings(dpo)["weights"] == "DoRA on NF4 of rank 4, alpha 8, on all linear layers"
    assert describe_settings(dpo)["besides"] == "beta 0.1"


def test_a_card_says_on_what_and_how_it_was_measured():
    evaluation = build_manifest(
        "eval",
        "e",
        {
            "data": {"name": "jsonl", "path": "/mine/a.jsonl", "held_out": 0.1},
            "rollout": {"temperature": 0.2, "max_new_tokens": 96, "reasoning": "hide"},
        },
    )
    measurement = {"measured": describe_data(evaluation), "sampled": describe_sampling(evaluation.config)}
    card = render_card(FACTS | measurement)
    assert "on 256 held-out prompts (10% of a.jsonl, held out); ties" in card
    assert "Answers sampled at temperature 0.2, at most 96 tokens, their reasoning hidden from the reward." in card
    assert "| answers cut at the most tokens | 5% | 10% |" in card
    own_evaluation = build_manifest(
        "eval", "e", {"data": {"name": "jsonl", "path": "a.jsonl", "eval_path": "/mine/b.jsonl", "held_out": 0}}
    )
    assert describe_data(own_evaluation) == "b.jsonl"
    votes = build_manifest("reward", "r", {"data": {"name": "annotations"}}, data=Input("d", project="p"))
    assert describe_data(votes, 0.25) == "25% of annotations p, held out"
    assert describe_data(build_manifest("eval", "e", {})) == "the held-out part of chitchat"
    losses = {
        "loss_before": 6.58,
        "loss_after": 6.25,
        "perplexity_before": 720.5,
        "perplexity_after": 518.0,
        "held_out_rows": 41,
        "loss_change": {"value": -0.33, "low": -0.4, "high": -0.26, "n": 41},
    }
    imitation_card = render_card(
        {k: v for k, v in FACTS.items() if k != "metrics"} | {"losses": losses, "measured": "b.jsonl"}
    )
    assert (
        "On 41 held-out rows (b.jsonl), before and after supervised training. The loss changed by -0.33 ["
        in imitation_card
    )
    assert "| loss, nats a token | 6.25 | 6.58 |" in imitation_card


def test_a_card_says_that_a_model_collapsed_whatever_measured_it():
    reasons = ["on chat 90% of its greedy answers are alike: “see /home/me/answers.txt”"]
    collapse = {"verdict": "collapsed", "reasons": reasons}
    warning = f"**This model collapsed:** {reasons[0]}. A win rate is no evidence of its quality."
    card = render_card(FACTS | {"collapse": collapse})
    assert card.index("## Evaluation") < card.index(warning) < card.index("| win rate |")
    unmeasured = {key: value for key, value in FACTS.items() if key != "metrics"}
    assert "## Evaluation" not in render_card(unmeasured)
    card = render_card(unmeasured | {"collapse": collapse})
    assert card.index("## Evaluation") < card.index(warning)
    assert "collapsed" not in render_card(FACTS | {"collapse": {"verdict": "varied", "reasons": []}})


def test_a_base_that_no_hub_knows_is_linked_to_nobodys_repository():
    matter = parse_front_matter(render_card(FACTS | {"base": BASE | {"id": "model", "revision": ""}}))
    assert not any(key.startswith("base_model") for key in matter)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 16, "lora_alpha": 16}, ""),
        ({"r": 16, "lora_alpha": 4, "use_rslora": True}, ""),
        ({"r": 16, "lora_alpha": 32}, "Its scale, LoRA's 32/16, is folded"),
        ({"r": 16, "lora_alpha": 32, "use_rslora": True}, "Its scale, rsLoRA's 32/√16, is folded"),
        (
            {"r": 16, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}},
            "The scales of its layers, which differ, are folded",
        ),
    ],
)
def test_a_scale_that_was_folded_into_the_weights_is_said(config, said):
    assert describe_folded_scale(config).startswith(said)
    assert bool(describe_folded_scale(config)) == bool(said)


@pytest.mark.parametrize(
    ("facts", "loaded", "goes_along"),
    [
        ({"precision": "float32", "linked": "original"}, "dtype=torch.float32)", "a link to the base on the machine"),
        ({"precision": "bfloat16", "linked": "original"}, "dtype=torch.bfloat16)", "`cp -rL`"),
        (
            {"precision": "nf4", "computed": "float32", "linked": "nf4-dequantised"},
            'dtype="auto")',
            "dequantised base on",
        ),
        ({"precision": "nf4", "computed": "float32"}, "dtype=torch.float32, quantization_config=nf4)", ""),
    ],
)
def test_an_adapters_code_loads_the_numbers_of_its_receipt(facts, loaded, goes_along):
    """The card also says when a linked base stays behind if the folder is copied."""
    base = {"id": "mine", "revision": "", "digest": "sha256:00ff"}
    method = "qlora" if facts["precision"] == "nf4" else "lora"
    card = render_card({"name": "x", "kind": "adapter", "base": base, "method": method, **facts})
    assert card.count(loaded) == (2 if goes_along else 1)  # in the code, and for PEFT's own class
    assert goes_along in card
    assert ("brings the base\nalong" in card) == bool(goes_along)
    if "quantization" in loaded:
        assert "bnb_4bit_compute_dtype=torch.float32" in card


@pytest.mark.parametrize(
    "change",
    [
        {"parents": [{"stage": "sft", "name": "/home/me/runs/sft/a"}]},
        {"data": ["read from ~/data/x.jsonl"]},
        {"notes": "see file:///srv/x"},
        {"judge": "C:\\judge"},
    ],
)
def test_card_refuses_paths_of_this_machine(change):
    with pytest.raises(InputError, match="path of this machine"):
        render_card(FACTS | change)


def test_card_takes_urls():
    assert "https://example.org/a/b" in render_card(FACTS | {"notes": "See https://example.org/a/b and [/INST]."})


def test_card_cannot_be_broken_out_of():
    name = 'x"\n---\n| `a` <b>'
    card = render_card(FACTS | {"name": name, "license": 'mit"\nevil: true'})
    assert parse_front_matter(card)["license"] == 'mit"\nevil: true'
    assert "# x\" --- \\| 'a' &lt;b>\n" in card


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", "apache-2.0"),
        ("---\ntags: [a]\n---\n", ""),
        ("# no front matter\nlicense: mit", ""),
        ("---\nlicense: [\n---\n", ""),
        (None, ""),
    ],
)
def test_a_licence_is_what_the_models_own_card_states(tmp_path, text, licence):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_licence(tmp_path) == licence


def test_a_card_offers_aligns_own_server_first():
    card = render_card(FACTS | {"served": "ppo-x", "launch": ["align", "vllm", "vllm-resolver"]})
    assert "as `ppo-x`, over HTTP: `sh launch/align.sh` (align, on a CPU), or `sh launch/vllm.sh` (vLLM).\n" in card
    assert "(vLLM)" not in render_card(FACTS | {"served": "ppo-x", "launch": ["align"]})  # vLLM refuses the rank


def test_a_card_of_gguf_says_which_base_is_in_it_and_how_to_run_it():
    facts = FACTS | {"kind": "gguf", "served": "ppo-x", "modelfile": True, "into": "nf4-dequantised"}
    facts |= {"launch": ["llama-server"]}
    card = render_card(facts)
    assert "A model and its LoRA adapter as GGUF for chat" in card
    assert "The base here is that one dequantised" in card
    assert "`sh launch/llama-server.sh`" in card
    assert "`ollama create ppo-x -f Modelfile && ollama run ppo-x`" in card
    matter = parse_front_matter(card)
    assert "gguf" in matter["tags"]
    assert "library_name" not in matter
    original = render_card(facts | {"into": "original", "receipt": [ReceiptCheck("llama.cpp", note="not there")]})
    assert "on which it is measurably another model" in original
    assert "|\n\nMade with the original weights, it" in original  # a paragraph, not a row of the table
    assert "launch/" not in render_card(facts | {"served": "", "launch": []})
    assert "ollama" not in render_card(facts | {"modelfile": False})
