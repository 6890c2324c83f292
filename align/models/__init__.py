"""Loading models, LoRA adapters, forward passes, and the model roles of PPO on one base."""
