"""A random base, adapters on it, and the divergence of two models' logits, for tests of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from align.export.adapter import write_adapter
from align.export.merged import write_merged_model
from align.ops.divergence import Divergence, kl_between
from align.run.atomic import publish_folder

BASE = {"id": "org/tiny", "revision": "abc123", "digest": "sha256:00ff"}
TOKENS = torch.arange(3, 67).reshape(4, 16)


def make_base(path: Path) -> Path:
    """Save a random Llama whose linear layers are all multiples of 64 (NF4's block), with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,  # wide enough for quantisation and merging errors to be visible
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def load_base_model(path: Path, nf4: bool = True, dtype: torch.dtype = torch.float32):
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    kwargs = {"quantization_config": quantised, "device_map": {"": "cpu"}} if nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """Draw an adapter's weights. A new `lora_B` is zero, and an adapter without effect merges right by any method."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def make_adapter(base: Path, path: Path, **options) -> Path:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_base_model(base), LoraConfig(**(defaults | options)))
    randomise(model)
    model.save_pretrained(path)
    return path


def compute_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def compute_adapter_logits(base: Path, adapter: Path) -> torch.Tensor:
    return compute_logits(PeftModel.from_pretrained(load_base_model(base), adapter).eval())


def measure_divergence(a: torch.Tensor, b: torch.Tensor) -> Divergence:
    return kl_between(a, b, torch.ones(a.shape[:-1], dtype=torch.bool))


def load_tokenizer_options(base: Path) -> dict[str, Any]:
    """Return the export arguments for a base's tokenizer and the files beside it."""
    return {"tokenizer": AutoTokenizer.from_pretrained(base), "base_folder": base}


def export_adapter(source: Path, target: Path, base: dict[str, str] = BASE, replace: bool = False, **more) -> Path:
    with publish_folder(target, replace) as folder:
        write_adapter(folder, source, base, **more)
    return target


def export_merged(model, target: Path, **more) -> Path:
    with publish_folder(target) as folder:
        write_merged_model(folder, model, BASE, **more)
    return target
