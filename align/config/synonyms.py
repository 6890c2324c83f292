"""What settings are called elsewhere: names of TRL, transformers, PEFT, verl and OpenRLHF, and the keys here.

A name counts wherever it is put: `lora_r`, `method.lora_r` and `stage.lora_r` all mean `method.r`.
"""

from __future__ import annotations

WORDS = {
    "stage.lr": "lr learning_rate actor_learning_rate policy_lr",
    "method.lr": "lr learning_rate",
    "stage.value_lr": "critic_learning_rate critic_lr",
    "stage.epochs": "num_train_epochs num_epochs num_ppo_epochs ppo_epochs max_epochs n_epochs",
    "stage.max_steps": "steps num_steps",
    "stage.updates": "steps num_steps total_episodes num_total_batches iterations",
    "stage.micro_batch": "per_device_train_batch_size micro_batch_size mini_batch_size",
    "stage.minibatches": "mini_batch_size num_mini_batches",
    "stage.batch_size": "gradient_accumulation_steps train_batch_size global_batch_size rollout_batch_size",
    "stage.warmup": "warmup_ratio warmup_steps lr_warmup_ratio",
    "stage.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "stage.max_grad_norm": "clip_grad gradient_clipping",
    "stage.clip_range": "cliprange clip_ratio eps_clip epsilon",
    "stage.value_clip_range": "cliprange_value value_clip",
    "stage.beta": "beta",
    "stage.kl_coef": "beta init_kl_coef kl_penalty kl_beta",
    "stage.max_approx_kl": "target_kl",
    "stage.kl_target": "target",
    "stage.kl_horizon": "horizon",
    "stage.lam": "lambda gae_lambda lambd",
    "stage.gamma": "discount",
    "stage.score_clip": "reward_clip cliprange_reward",
    "stage.score_scale": "reward_scale",
    "stage.loss": "loss_type",
    "stage.save_every": "save_steps",
    "stage.eval_every": "eval_steps eval_strategy evaluation_strategy do_eval",
    "stage.publish": "load_best_model_at_end metric_for_best_model",
    "stage.patience": "early_stopping_patience early_stopping",
    "stage.log_every": "logging_steps",
    "stage.checkpoints": "save_total_limit",
    "stage.candidates": "num_generations n_samples_per_prompt num_return_sequences",
    "data.max_length": "max_length max_seq_length max_seq_len seq_length max_prompt_length cutoff_len",
    "data.path": "dataset dataset_name dataset_path train_file data_path",
    "data.template": "chat_template",
    "data.template_kwargs": "chat_template_kwargs enable_thinking",
    "data.held_out": "test_size validation_split",
    "data.limit": "max_samples max_train_samples",
    "method.r": "r rank lora_r lora_rank",
    "method.alpha": "alpha lora_alpha",
    "method": "load_in_4bit quantization qlora lora use_peft finetuning_type",
    "model.path": "model_name_or_path model_name model_path base_model pretrained",
    "model.revision": "model_revision",
    "init": "sft_model_path ref_model adapter adapter_name_or_path checkpoint",
    "artifact": "adapter",
    "resume": "resume_from_checkpoint checkpoint",
    "reward.ref": "reward_model reward_model_path",
    "reward.fn": "reward_fn reward_funcs",
    "rollout.max_new_tokens": "max_new_tokens max_tokens response_length max_completion_length generate_max_len",
    "rollout.temperature": "temperature temp",
    "dtype": "bf16 fp16 torch_dtype precision mixed_precision compute_dtype",
    "device": "device_map use_cpu no_cuda",
    "seed": "random_seed data_seed",
    "run.root": "output_dir save_path",
    "run.name": "run_name exp_name experiment_name",
    "track": "report_to use_wandb log_with",
    "track.project": "wandb_project",
    "store.url": "database_url db",
}
"""Key → words for it."""


def keys_for(word: str) -> list[str]:
    """The keys that the field's word for a setting may mean."""
    plain = word.replace("-", "_").lower()
    return [key for key, words in WORDS.items() if plain in words.split()]
