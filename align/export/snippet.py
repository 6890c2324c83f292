"""The last section of a model card: code that loads the export and talks to it or scores by it, and how to serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align.export.markdown import code_span, one_line
from align.models.dequantised import DEQUANTISED
from align.run.weights import local_base_name

USER = '{"role": "user", "content": "Hi, how are you?"}'
# Special tokens that a content spells out are text: with `sanitize_control_tokens`, of transformers 5.24 and later.
TALK = """
chat = [{"role": "user", "content": "Hi, how are you?"}]
as_text = {"sanitize_control_tokens": True, "add_generation_prompt": True}
asked = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True, **as_text).to(model.device)
answer = model.generate(**asked, max_new_tokens=64, do_sample=True)[0, asked["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

SERVERS = {"align": "align, on a CPU", "vllm": "vLLM", "llama-server": "llama.cpp's own server"}
"""Whose server each launch file starts, in the order in which a card offers them."""
OLLAMA = "\nWith Ollama: `ollama create {0} -f Modelfile && ollama run {0}`.\n"
TALK_GGUF = """from llama_cpp import Llama
from transformers import AutoTokenizer

model = Llama("base-f16.gguf", lora_path="adapter-f16.gguf", n_ctx=0, verbose=False)
tokenizer = AutoTokenizer.from_pretrained(".")
chat = [{"role": "user", "content": "Hi, how are you?"}]
as_text = {"sanitize_control_tokens": True, "add_generation_prompt": True}
asked = tokenizer.apply_chat_template(chat, **as_text)["input_ids"]
print(model.create_completion(asked, max_tokens=64)["choices"][0]["text"])
"""
TALK_GGUF_WHOLE = TALK_GGUF.replace('"base-f16.gguf", lora_path="adapter-f16.gguf"', '"model-f16.gguf"')


SCORE = """
chat = [
    {"role": "user", "content": "Hi, how are you?"},
    {"role": "assistant", "content": "Fine, thank you! And you?"},
]
asked = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True, sanitize_control_tokens=True)
with torch.no_grad():
    score = model(**asked.to(model.device)).logits[0, 0]
print(float(score))
"""
READ_AT = """
The score is read at the last token of a conversation, {}, which ends the answer: the chat template here writes
nothing behind it. Scores say something beside each other, those of answers to one prompt above all: the difference of
two is the log-odds of the first being preferred.
"""
BY_AUTO = "\nIn this folder, PEFT's `{}.from_pretrained({})` finds the base too.{}\n"
REPORTED = " It reports `score.weight` as missing from the base: the adapter brings that head."
LINKED = """
`{}` in this folder is a link to {} on the machine where the export was made. Whoever copies the export brings the base
along: copy with links followed (`cp -rL`), or put the base where the link is, under its name. An upload to a hub leaves
it out.
"""


def loading(facts: Mapping[str, Any]) -> str:
    gguf = facts["kind"] == "gguf"
    if "score" in facts:
        code = with_system(loading_code(facts) + SCORE, facts)
        at = READ_AT.format(code_span(facts["score"]))
        return f"## Loading, and scoring a conversation\n\n```python\n{code}```\n{at}{by_auto(facts)}{serving(facts)}"
    whole = facts.get("method") == "full"
    code = with_system((TALK_GGUF_WHOLE if whole else TALK_GGUF) if gguf else loading_code(facts) + TALK, facts)
    ollama = OLLAMA.format(one_line(facts["served"])) if facts.get("modelfile") and facts.get("served") else ""
    return f"## Loading, and talking to it\n\n```python\n{code}```\n{by_auto(facts)}{serving(facts)}{ollama}"


def serving(facts: Mapping[str, Any]) -> str:
    """Which of the export's launch files start a server."""
    ways = [f"`sh launch/{name}.sh` ({whose})" for name, whose in SERVERS.items() if name in facts.get("launch", ())]
    return f"\nTo serve it as `{one_line(facts['served'])}`, over HTTP: {', or '.join(ways)}.\n" if ways else ""


def with_system(code: str, facts: Mapping[str, Any]) -> str:
    """The code, its chat beginning with the system prompt that the model was trained with."""
    if not (system := facts.get("system")):
        return code
    said = f'    {{"role": "system", "content": {_string(system["text"])}}},\n'
    one = f"chat = [{USER}]\n"
    whole = f"chat = [\n{said}    {USER},\n]\n"
    return code.replace(one, whole) if one in code else code.replace("chat = [\n", f"chat = [\n{said}")


def by_auto(facts: Mapping[str, Any]) -> str:
    """That PEFT's own class loads an adapter too, where it finds its base; and that a base which is linked stays behind
    when the adapter is copied."""
    if facts["kind"] != "adapter" or not ("linked" in facts or facts["base"].get("revision")):
        return ""
    score, name = "score" in facts, one_line(local_base_name(facts["base"]))
    words = ['"."', *(["num_labels=1"] if score else []), *loaded_as(facts)]
    auto = "AutoPeftModelForSequenceClassification" if score else "AutoPeftModelForCausalLM"
    said = BY_AUTO.format(auto, ", ".join(words), REPORTED if score else "")
    what = "the dequantised base" if facts.get("linked") == DEQUANTISED else "the base"
    return said + (LINKED.format(name, what) if "linked" in facts else "")


def loaded_as(facts: Mapping[str, Any]) -> list[str]:
    """In which numbers an export is loaded: those of its row in the receipt. An adapter on the base that it was trained
    on has the numbers of training; what was written for the export, a merged model or a dequantised base, its own."""
    if facts["kind"] == "merged" or facts.get("linked") == DEQUANTISED or not (kept := kept_in(facts)):
        return ['dtype="auto"']
    return [f"dtype=torch.{kept}", *(["quantization_config=nf4"] if precision_of(facts) == "nf4" else [])]


def kept_in(facts: Mapping[str, Any]) -> str:
    """The dtype in which the base was read for training."""
    return facts.get("computed") or {"nf4": "bfloat16"}.get(precision_of(facts), precision_of(facts))


def loading_code(facts: Mapping[str, Any]) -> str:
    """Python that loads the export, to be run in its folder; elsewhere `folder` is its path or hub id."""
    score, merged = "score" in facts, facts["kind"] == "merged"
    head = "AutoModelForSequenceClassification" if score else "AutoModelForCausalLM"
    base, linked, numbers = facts["base"], facts.get("linked"), loaded_as(facts)
    nf4, headless = "quantization_config=nf4" in numbers, score and not merged
    place = f"folder + {_string('/' + local_base_name(base))}" if linked else _string(base["id"])
    given = ["folder"] if merged else [place]
    if not merged and base.get("revision"):
        given.append(f"revision={_string(base['revision'])}")
    given += [*(["num_labels=1"] if headless else []), *numbers]
    imports = [head, "AutoTokenizer", *(["BitsAndBytesConfig"] if nf4 else []), *(["logging"] if headless else [])]
    name = "model" if merged else "base"
    load = f"{name} = {head}.from_pretrained({', '.join(given)})\n"
    return (
        ("import torch\n" if score or any("torch." in word for word in numbers) else "")
        + ("" if merged else "from peft import PeftModel\n")
        + f'from transformers import {", ".join(imports)}\n\nfolder = "."  # of this file\n'
        + (NF4.format(kept_in(facts)) if nf4 else "")
        + (QUIETLY.format(load) if headless else load)
        + ("" if merged else "model = PeftModel.from_pretrained(base, folder)\n")
        + "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        + ("model.config.pad_token_id = tokenizer.pad_token_id\n" if headless else "")
    )


QUIETLY = """logging.set_verbosity_error()  # of the head of scores, which the base has not and the adapter brings
{}logging.set_verbosity_warning()
"""
NF4 = """nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{},
)
"""


def _string(text: str) -> str:
    """As Python and JSON both write it."""
    return json.dumps(text, ensure_ascii=False)


def precision_of(facts: Mapping[str, Any]) -> str:
    """What the base's weights were stored in during training; QLoRA means NF4."""
    return facts.get("precision") or ("nf4" if facts.get("method") == "qlora" else "")
