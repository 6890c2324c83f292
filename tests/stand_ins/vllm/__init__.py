"""A stand-in for vLLM, in NumPy: `vllm serve` for Llama and LoRA, as far as align asks it. It shares no code with it.

The fault that `STAND_IN` names makes it one that must be refused, see `FAULTS` in `entrypoints/cli/main.py`.
"""

__version__ = "0.0"
