"""A dictionary from names of settings in TRL, transformers, PEFT, vLLM and others to the corresponding keys of align.

The others are LLaMA-Factory, axolotl, verl, OpenRLHF and the servers TGI and llama-server.

The group in front of a name does not matter: `lora_r`, `method.lora_r` and `stage.lora_r` all mean `method.r`.
"""

from __future__ import annotations

from typing import NamedTuple

WORDS = {
    "stage.lr": "lr learning_rate actor_learning_rate policy_lr",
    "method.lr": "lr learning_rate",
    "stage.value_lr": "critic_learning_rate critic_lr",
    "stage": "rl",
    "stage=sft": "pt pretrain finetune instruct",
    "stage=reward": "rm rw",
    "stage.epochs": "num_train_epochs num_epochs num_ppo_epochs ppo_epochs max_epochs n_epochs num_iterations",
    "stage.max_steps": "steps num_steps max_train_steps",
    "stage.updates": "steps num_steps total_episodes num_total_batches iterations",
    "stage.micro_batch": "per_device_train_batch_size micro_batch_size mini_batch_size per_device_batch_size "
    "micro_train_batch_size",
    "devices": "nproc_per_node num_processes num_gpus n_gpus n_gpus_per_node",
    "stage.minibatches": "mini_batch_size num_mini_batches",
    "stage.gradient_accumulation": "gradient_accumulation_steps grad_accum accumulate_grad_batches",
    "stage.optimiser": "optim optimizer",
    "stage.batch_size": "train_batch_size global_batch_size rollout_batch_size generation_batch_size",
    "stage.warmup": "warmup_ratio warmup_steps lr_warmup_ratio num_warmup_steps",
    "stage.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "stage.max_grad_norm": "clip_grad gradient_clipping",
    "stage.clip_range": "cliprange clip_ratio eps_clip epsilon",
    "stage.value_clip_range": "cliprange_value value_clip",
    "stage.beta": "beta pref_beta rl_beta dpo_beta",
    "stage.label_smoothing": "dpo_label_smoothing cdpo_label_smoothing",
    "stage.desirable_weight": "kto_desirable_weight kto_chosen_weight",
    "stage.undesirable_weight": "kto_undesirable_weight kto_rejected_weight",
    "stage.kl_coef": "beta init_kl_coef kl_penalty kl_beta",
    "stage.max_approx_kl": "target_kl",
    "stage.advantage": "adv_estimator advantage_estimator",
    "stage.group_size": "num_generations n_samples_per_prompt rloo_k rollouts_per_example",
    "stage.scale_rewards": "norm_adv_by_std_in_grpo normalize_advantages",
    "stage.clip_range_high": "epsilon_high clip_ratio_high eps_clip_high",
    "stage.loss_mean": "loss_agg_mode",
    "stage.importance_cap": "vllm_importance_sampling_cap vllm_importance_sampling_clip_max",
    "stage.max_draws": "dynamic_sampling dynamic_filtering filter_groups",
    "stage.kl_target": "target",
    "stage.kl_horizon": "horizon",
    "stage.lam": "lambda gae_lambda lambd",
    "stage.gamma": "discount",
    "stage.score_clip": "reward_clip cliprange_reward reward_clip_range",
    "stage.score_scale": "reward_scale",
    "stage.loss": "loss_type pref_loss",
    "stage.save_every": "save_steps saves_per_epoch save_strategy save_freq",
    "stage.eval_every": "eval_steps evals_per_epoch eval_strategy evaluation_strategy do_eval test_freq",
    "stage.publish": "load_best_model_at_end metric_for_best_model",
    "stage.patience": "early_stopping_patience early_stopping",
    "stage.log_every": "logging_steps log_interval logging_strategy",
    "stage.checkpoints": "save_total_limit",
    "stage.packing": "sample_packing packing_samples",
    "stage.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing",
    "stage.candidates": "num_generations n_samples_per_prompt num_return_sequences",
    "data.max_length": "max_length max_seq_length max_seq_len seq_length max_prompt_length cutoff_len sequence_len "
    "model_max_length",
    "data.path": "dataset datasets dataset_name dataset_path dataset_dir train_file data_path data_files",
    "data.eval_path": "eval_dataset eval_file validation_file val_files",
    "data.system": "system_prompt default_system",
    "data.too_long": "truncation truncation_mode truncation_side",
    "data.template": "chat_template",
    "data.template_kwargs": "chat_template_kwargs enable_thinking",
    "data.held_out": "test_size validation_split val_size val_set_size test_split_size",
    "data.limit": "max_samples max_train_samples",
    "method.r": "r rank lora_r lora_rank",
    "method.alpha": "alpha lora_alpha",
    "method.dropout": "lora_dropout",
    "method.targets": "target_modules lora_target_modules lora_target",
    "method.targets=all-linear": "lora_target_linear",
    "method.rslora": "use_rslora",
    "method.dora": "use_dora",
    "method": "finetuning_type adapter",
    "method=qlora": "load_in_4bit quantization quantization_bit qlora",
    "method=lora": "lora use_peft",
    "model.path": "model_name_or_path model_name model_path base_model base_model_name_or_path pretrained model_id",
    "model.revision": "model_revision",
    "init": "sft_model_path ref_model adapter adapter_name_or_path lora_model_dir checkpoint",
    "artifact": "adapter",
    "resume": "resume_from_checkpoint checkpoint",
    "resume=never": "overwrite_output_dir",
    "reward.ref": "reward_model reward_model_path",
    "reward.fn": "reward_fn reward_funcs",
    "rollout.max_new_tokens": "max_new_tokens max_tokens response_length max_completion_length generate_max_len",
    "rollout.temperature": "temperature temp",
    "rollout=vllm": "use_vllm",
    "rollout.urls": "vllm_server_base_url",
    "rollout.start_s": "vllm_server_timeout",
    "rollout.args": "vllm_gpu_memory_utilization vllm_tensor_parallel_size",
    "dtype=bfloat16": "bf16",
    "dtype=float16": "fp16",
    "dtype": "torch_dtype precision mixed_precision compute_dtype",
    "device": "device_map",
    "device=cpu": "use_cpu no_cuda",
    "seed": "random_seed data_seed",
    "run.root": "output_dir save_path save_dir export_dir",
    "run.name": "run_name exp_name experiment_name wandb_name wandb_run_id",
    "track": "report_to log_with",
    "track=wandb": "use_wandb",
    "track.project": "wandb_project",
    "store.url": "database_url db",
    "stage.host": "host hostname",
    "stage.port": "port",
    "stage.keys": "api_key api_key_file",
    "stage.adapters": "lora_modules lora_adapters lora served_model_name",
    "stage.roots": "lora_dir",
    "stage.slots": "max_num_seqs max_batch_size parallel",
    "stage.queue": "max_concurrent_requests",
    "stage.resident": "max_loras max_cpu_loras",
    "stage.max_rank": "max_lora_rank",
    "stage.max_length": "max_model_len max_total_tokens ctx_size",
    "stage.prefix_cache_mb": "enable_prefix_caching cache_ram",
    "serve.args": "tensor_parallel_size gpu_memory_utilization max_num_batched_tokens enforce_eager",
}
"""Key of align, or `key=value` for a switch → its names in other libraries, separated by spaces."""

ABSENT = {
    "top_p top_k min_p repetition_penalty": (
        "does not exist: samples are drawn from the distribution whose logprobs are used",
        "Use rollout.temperature.",
    ),
    "trust_remote_code": ("does not exist: no code of a model's repository is run", "Drop it."),
    "push_to_hub hub_model_id": ("does not exist: nothing is uploaded", "Drop it; stage=export writes a folder."),
    "enable_lora": ("is not needed: adapters are served where stage.adapters names some", "Drop it."),
    "enable_auto_tool_choice tool_call_parser": (
        "is not needed: calls of tools are read as the chat template writes them",
        "Drop it.",
    ),
    "ssl_keyfile ssl_certfile ssl_key_file ssl_cert_file": (
        "does not exist: the server has no TLS",
        "Put a proxy with TLS in front of it, and set stage.url.",
    ),
    "do_train": ("does not exist: the stage says what is done", "Drop it."),
}
"""Names of other libraries' settings that align does not have, separated by spaces → problem and remedy."""


def find_settings_by_synonym(word: str) -> list[str]:
    """Return the keys of align, or `key=value`, that correspond to a setting's name in TRL or another library."""
    name = word.replace("-", "_").lower()
    return [key for key, words in WORDS.items() if name in words.split()]


class Absence(NamedTuple):
    """The reason why align lacks a setting of another library, and a remedy, for an error message.

    Attributes:
        problem: the fact.
        remedy: what to write instead.
    """

    problem: str
    remedy: str


def explain_absence(word: str) -> Absence | None:
    """Return why a setting of another library, such as `top_p`, does not exist in align, and a remedy, or None.

    None means that the name is not in `ABSENT`.
    """
    name = word.replace("-", "_").lower()
    return next((Absence(*explanation) for words, explanation in ABSENT.items() if name in words.split()), None)
