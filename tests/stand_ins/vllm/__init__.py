"""Stand-in for vLLM in NumPy: `vllm serve` for Llama and LoRA, limited to what align uses. It shares no code with vLLM.

The environment variable `STAND_IN` names a fault that align must refuse, see `FAULTS` in `entrypoints/cli/main.py`.
"""

__version__ = "0.0"
