"""Instruction tuning, reward models and PPO on QLoRA adapters, on one machine."""

import logging
import os

# On CPUs with AVX512-BF16 bitsandbytes asks at import for a kernel from a hub, and warns where there is none.
# Nothing here wants it: `models.load.disable_nf4_repacking` keeps its inputs away.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# TRL's trainers report their use to the hub unless this is set before it is imported. Nothing calls out unasked.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
