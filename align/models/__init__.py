"""Models: loading, adapters, forward passes, and the roles of PPO on one base."""
