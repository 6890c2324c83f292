"""The model card: what it says, and what it must not let through."""

from __future__ import annotations

import pytest

from align.errors import InputError
from align.export.card import licence_in, render_card
from align.export.verdicts import Check
from align.ops.divergence import Divergence

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


def front_matter(card: str) -> dict:
    yaml = pytest.importorskip("yaml")
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_card_says_what_it_is_where_from_and_how_good():
    card = render_card(FACTS)
    assert front_matter(card) == {
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
    merged, gap = Divergence(9.1e-5, 0.995, 0.0625, 4096), Divergence(0.34, 0.74, 9.0, 4096)
    rows = [
        Check("transformers", "merged", "nf4-dequantised", "bfloat16", "5", merged, ("kl", 0.01)),
        Check("transformers", "adapter", "original", "bfloat16", "5", gap),
        Check("vLLM", note="it is | not there"),
    ]
    licences = [("base org/tiny", "mit"), ("data mine.jsonl", "")]
    card = render_card(facts | {"receipt": rows, "licences": licences})
    assert front_matter(card)["library_name"] == "transformers"
    assert "| 0.062 | 9.1e-05 | 99.5% | pass (kl ≤ 0.01) |" in card
    assert r"not checked: it is \| not there" in card
    assert "KL 0.34 nats a token from what was trained, the same top token on 74.0% of 4,096" in card
    assert front_matter(card)["license"] == "mit"
    assert "| data mine.jsonl | not stated: ask whoever gave it |" in card
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
    """And says where a base that is linked stays behind when the folder is copied."""
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


def test_card_takes_urls_and_refuses_unknown_facts():
    assert "https://example.org/a/b" in render_card(FACTS | {"notes": "See https://example.org/a/b and [/INST]."})
    with pytest.raises(ValueError, match="'stages'"):
        render_card(FACTS | {"stages": []})
    with pytest.raises(ValueError, match="is none of adapter, merged, gguf"):
        render_card(FACTS | {"kind": "onnx"})
    with pytest.raises(ValueError, match="needs 'base'"):
        render_card({"name": "x", "kind": "adapter"})


def test_card_cannot_be_broken_out_of():
    name = 'x"\n---\n| `a` <b>'
    card = render_card(FACTS | {"name": name, "license": 'mit"\nevil: true'})
    assert front_matter(card)["license"] == 'mit"\nevil: true'
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
    assert licence_in(tmp_path) == licence


def test_a_card_of_gguf_says_which_base_is_in_it_and_how_to_run_it():
    facts = FACTS | {"kind": "gguf", "served": "ppo-x", "modelfile": True, "into": "nf4-dequantised"}
    card = render_card(facts)
    assert "A model and its LoRA adapter as GGUF for chat" in card
    assert "The base here is that one dequantised" in card
    assert "`sh launch/llama-server.sh`" in card
    assert "`ollama create ppo-x -f Modelfile && ollama run ppo-x`" in card
    matter = front_matter(card)
    assert "gguf" in matter["tags"]
    assert "library_name" not in matter
    original = render_card(facts | {"into": "original", "receipt": [Check("llama.cpp", note="not there")]})
    assert "on which it is measurably another model" in original
    assert "|\n\nMade of the original weights" in original  # and is no row of the table
    assert "launch/" not in render_card(facts | {"served": ""})
    assert "ollama" not in render_card(facts | {"modelfile": False})
