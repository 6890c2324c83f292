"""Options of TRL, LLaMA-Factory, axolotl and servers get the right key as a suggestion, or none, never a wrong one.

The lists are the options of their own examples: TRL's scripts, LLaMA-Factory's `llama3_lora_ppo.yaml` and
`qwen3_lora_dpo.yaml`, axolotl's `qlora-1b.yml` and `instruct-dpo-lora-8b.yml`.
"""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from align.config.compose import Composer, build_config, compose_tree
from align.config.options import parse_arguments
from align.config.schemas import import_all_schemas
from align.config.synonyms import ABSENT, WORDS, find_settings_by_synonym
from align.config.values import iter_dotted_keys
from align.core.errors import InputError

TRL = {
    "model_name_or_path=Qwen/Qwen2.5-0.5B": "model.path",
    "model_revision=main": "model.revision",
    "dataset_name=trl-lib/Capybara": "data.path",
    "learning_rate=2e-4": "stage.lr or method.lr",
    "num_train_epochs=1": "stage.epochs",
    "per_device_train_batch_size=2": "stage.micro_batch",
    "gradient_accumulation_steps=8": "stage.gradient_accumulation",
    "warmup_ratio=0.1": "stage.warmup",
    "warmup_steps=10": "stage.warmup",
    "lr_scheduler_type=cosine": "stage.schedule",
    "weight_decay=0": "stage.weight_decay",
    "logging_steps=25": "stage.log_every",
    "save_steps=100": "stage.save_every",
    "output_dir=out": "run.root",
    "run_name=a": "run.name",
    "report_to=wandb": "track",
    "bf16=true": "dtype=bfloat16",
    "bf16=false": "dtype",
    "fp16=true": "dtype=float16",
    "torch_dtype=bfloat16": "dtype",
    "use_cpu=true": "device=cpu",
    "max_length=2048": "data.max_length",
    "max_seq_length=2048": "data.max_length",
    "use_peft=true": "method=lora",
    "load_in_4bit=true": "method=qlora",
    "lora_r=32": "method.r",
    "lora_alpha=16": "method.alpha",
    "lora_dropout=0.05": "method.dropout",
    "lora_target_modules=[q_proj]": "method.targets",
    "use_rslora=true": "method.rslora",
    "use_dora=true": "method.dora",
    "optim=adamw_torch": "stage.optimiser",
    "eval_dataset=a": "data.eval_path",
    "truncation_mode=keep_end": "data.too_long",
    "resume_from_checkpoint=true": "resume",
    "max_grad_norm=1": "stage.max_grad_norm",
    "max_steps=3": "stage.max_steps",
    "chat_template_path=a": None,
    "dataset_num_proc=4": None,
    "attn_implementation=sdpa": None,
    "packing=true": "stage.packing",
    "gradient_checkpointing=true": "stage.gradient_checkpointing",
    "trust_remote_code=true": ABSENT["trust_remote_code"],
    "push_to_hub=true": ABSENT["push_to_hub hub_model_id"],
}
TRL_GRPO = {
    "num_iterations=4": "stage.epochs",
    "generation_batch_size=64": "stage.batch_size",
    "reward_clip_range=[-1,1]": "stage.score_clip",
    "test_split_size=0.1": "data.held_out",
    "use_vllm=true": "rollout=vllm",
    "use_vllm=false": "rollout",
    "vllm_server_base_url=a": "rollout.urls",
    "vllm_server_timeout=240": "rollout.start_s",
    "vllm_gpu_memory_utilization=0.3": "rollout.args",
    "vllm_tensor_parallel_size=2": "rollout.args",
    "vllm_importance_sampling_clip_max=3": "stage.importance_cap",
}
LLAMA_FACTORY = {
    "finetuning_type=lora": "method",
    "lora_rank=8": "method.r",
    "lora_target=all": "method.targets",
    "default_system=a": "data.system",
    "cutoff_len=2048": "data.max_length",
    "dataset=identity": "data.path",
    "dataset_dir=data": "data.path",
    "max_samples=1000": "data.limit",
    "val_size=0.1": "data.held_out",
    "eval_strategy=steps": "stage.eval_every",
    "load_best_model_at_end=true": "stage.publish",
    "quantization_bit=4": "method=qlora",
    "adapter_name_or_path=a": "init",
    "template=chatml": "data.template",
    "export_dir=out": "run.root",
    "overwrite_output_dir=true": "resume=never",
    "enable_thinking=false": "data.template_kwargs",
    "preprocessing_num_workers=16": None,
    "plot_loss=true": None,
    "do_train=true": ABSENT["do_train"],
    "overwrite_cache=true": None,
}
LLAMA_FACTORY_PPO = {
    "reward_model=saves/reward": "reward.ref",
    "max_new_tokens=512": "rollout.max_new_tokens",
    "top_p=0.9": ABSENT["top_p top_k min_p repetition_penalty"],
    "learning_rate=1e-5": "stage.lr",
    "ppo_epochs=4": "stage.epochs",
    "eval_steps=500": "stage.eval_every",
}
LLAMA_FACTORY_DPO = {"pref_beta=0.1": "stage.beta", "pref_loss=sigmoid": "stage.loss"}
AXOLOTL = {
    "base_model=NousResearch/Llama-3.2-1B": "model.path",
    "sequence_len=2048": "data.max_length",
    "datasets=a": "data.path",
    "val_set_size=0.1": "data.held_out",
    "adapter=qlora": "method or init or artifact",
    "sample_packing=true": "stage.packing",
    "lora_model_dir=a": "init",
    "lora_target_linear=true": "method.targets=all-linear",
    "optimizer=adamw_torch": "stage.optimiser",
    "micro_batch_size=2": "stage.micro_batch",
    "num_epochs=1": "stage.epochs",
    "lr_scheduler=cosine": "stage.schedule",
    "wandb_project=a": "track.project",
    "wandb_name=a": "run.name",
    "saves_per_epoch=1": "stage.save_every",
    "chat_template=llama3": "data.template",
    "tf32=false": None,
    "rl=dpo": "stage",
    "hub_model_id=a": ABSENT["push_to_hub hub_model_id"],
    "special_tokens=a": None,
    "flash_attention=true": None,
}
SERVERS = {  # vLLM's, TGI's and llama-server's
    "max-num-seqs=64": "stage.slots",
    "max-model-len=4096": "stage.max_length",
    "max-loras=8": "stage.resident",
    "max-lora-rank=64": "stage.max_rank",
    "lora-modules=[a]": "stage.adapters",
    "served-model-name=a": "stage.adapters",
    "api-key=a": "stage.keys",
    "host=0.0.0.0": "stage.host",
    "port=8000": "stage.port",
    "enable-prefix-caching=true": "stage.prefix_cache_mb",
    "tensor-parallel-size=2": "serve.args",
    "gpu-memory-utilization=0.9": "serve.args",
    "enable-lora=true": ABSENT["enable_lora"],
    "ssl-keyfile=a": ABSENT["ssl_keyfile ssl_certfile ssl_key_file ssl_cert_file"],
    "model-id=a": "model.path",
    "hostname=a": "stage.host",
    "max-total-tokens=4096": "stage.max_length",
    "max-concurrent-requests=128": "stage.queue",
    "lora-adapters=a": "stage.adapters",
    "ctx-size=4096": "stage.max_length",
    "parallel=8": "stage.slots",
}
TABLE = [
    (stage, word, suggestion)
    for stage, words in (
        ("sft", TRL),
        ("ppo", TRL_GRPO),
        ("sft", LLAMA_FACTORY),
        ("ppo", LLAMA_FACTORY_PPO),
        ("dpo", LLAMA_FACTORY_DPO),
        ("sft", AXOLOTL),
        ("serve", SERVERS),
    )
    for word, suggestion in words.items()
]


GIVEN = [
    (prefix, stage, word, suggestion)
    for prefix in ("", "stage.")
    for stage, word, suggestion in TABLE
    if f"{prefix}{word.partition('=')[0]}" != suggestion  # the same name in this project
]


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


@pytest.mark.parametrize(("put", "stage", "word", "meant"), GIVEN, ids=[f"{put}{word}" for put, _, word, _ in GIVEN])
def test_an_option_of_another_framework(composer: Composer, put: str, stage: str, word: str, meant: object):
    key = f"{put}{word}"
    with pytest.raises(InputError) as caught:
        composer.compose([f"stage={stage}", key])
    error = caught.value
    assert f"{error.field}={error.value}" == key
    if isinstance(meant, tuple):
        assert (error.problem, error.remedy) == meant
    elif meant is None:
        assert error.remedy == f"`python -m align stage={stage} --cfg job` shows every key."
    else:
        assert error.remedy == f"Did you mean {meant}?"


@pytest.mark.parametrize(("typed", "meant"), [("rm", "reward"), ("pt", "sft"), ("sfft", "sft")])
def test_a_stage_of_another_framework(composer: Composer, typed: str, meant: str):
    with pytest.raises(InputError, match=f"Did you mean stage={meant}[?]"):
        composer.compose([f"stage={typed}"])


def test_every_synonym_leads_to_a_key_of_some_stage_and_every_value_is_taken() -> None:
    trees = [OmegaConf.to_container(compose_tree([f"stage={stage}"])) for stage in import_all_schemas()["stage"]]
    valid_keys = {key for tree in trees for key in iter_dotted_keys(tree)}  # pyright: ignore[reportArgumentType]
    valid_keys |= {"reward.fn"}  # a key of another choice of the reward group
    assert {key.partition("=")[0] for key in WORDS} <= valid_keys
    assert not {word for words in (*WORDS.values(), *ABSENT) for word in words.split()} & valid_keys
    for key in WORDS:
        if "=" in key:
            build_config(
                compose_tree([*(["stage=sft"] if not key.startswith("stage=") else []), *NEEDS.get(key, []), key])
            )


NEEDS = {"stage=reward": ["data=annotations"]}


def test_a_word_counts_in_any_spelling():
    assert find_settings_by_synonym("Lora-R") == find_settings_by_synonym("lora_r") == ["method.r"]


def test_an_option_with_dashes_names_the_key():
    with pytest.raises(InputError, match=r"is not an option\. Write method\.r, without dashes"):
        parse_arguments(["stage=sft", "--lora_r", "8"])
    with pytest.raises(InputError, match=r"Write stage\.slots, without dashes"):
        parse_arguments(["stage=serve", "--max-num-seqs=64"])
    with pytest.raises(InputError, match=r"--ssl-keyfile: does not exist: the server has no TLS"):
        parse_arguments(["stage=serve", "--ssl-keyfile", "key.pem"])
    with pytest.raises(InputError, match=r"Write stage\.lr or method\.lr, without dashes"):
        parse_arguments(["stage=sft", "--learning-rate=1e-4"])
