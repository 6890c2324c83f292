"""How responses are sampled, and by whom."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from align.config.settings import Settings, defaults_of, setting
from align.config.vllm_args import check_args, words_of
from align.errors import require

OF_VLLM = ("python", "urls", "replicas", "dtype", "args", "start_s", "max_gap")
DECIDED = {
    "model": "model=", "tokenizer": "model=", "served-model-name": "model=", "generation-config": "each request",
    "host": "align, at a socket", "port": "align, at a socket", "uds": "align", "api-key": "align, at a socket",
    "dtype": "rollout.dtype", "enable-lora": "method=", "lora-modules": "the policy", "max-lora-rank": "method.r",
    "lora-target-modules": "model=", "logprobs-mode": "the policy's loss", "max-logprobs": "each request",
    "trust-remote-code": "model=, whose code is never run", "max-loras": "the policy and its reference",
    "max-num-seqs": "rollout.batch_size", "max-model-len": "data.max_length and rollout.max_new_tokens",
    "enable-prefix-caching": "align: answers shall not depend on earlier ones", "config": "rollout.args",
}  # fmt: skip
"""Arguments of `vllm serve` → what decides them here."""


@dataclass
class RolloutConfig(Settings):
    """How responses are sampled. There is no top-k, top-p or penalty, because samples must come from the distribution
    whose logprobs are used."""

    AT: ClassVar[str] = "rollout"

    engine: str = setting(
        "hf",
        "The engine that generates: `hf` samples from the training model itself; `bank` from a copy of the base that "
        "serves many adapters in one batch, on a CPU; `vllm` asks a vLLM server.",
        choices=("hf", "bank", "vllm"),
    )
    max_new_tokens: int = setting(256, "Longest response.", unit="tokens", above=0)
    temperature: float = setting(1.0, "Divides the logits before sampling.", above=0)
    batch_size: int = setting(128, "Number of responses that are generated together.", above=0)
    reasoning: str = setting(
        "keep",
        "Whether rewards, judges and annotators read the reasoning before an answer (`keep`), or only the answer "
        "(`hide`). With `hide`, train the reward model on answers only too: data.reasoning=hide.",
        choices=("keep", "hide"),
    )
    python: str = setting(
        "auto", "`vllm`: the Python that has vLLM, with which align starts the server. `auto`: this one.",
        identity=False,
    )  # fmt: skip
    urls: list[str] = setting(
        [], "`vllm`: servers that run already, such as [http://gpu1:8000]. They have to see the run's folder. Empty: "
        "align starts its own.", identity=False,
    )  # fmt: skip
    replicas: int = setting(
        1, "`vllm`: number of servers that align starts. Prompts are dealt to all servers by turns.", above=0,
        identity=False,
    )  # fmt: skip
    dtype: str = setting(
        "auto",
        "`vllm`: dtype that the server computes in. `auto`: the dtype of training. The dequantised base of "
        "method=qlora is written in it.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    args: Any = setting(
        None, "`vllm`: further arguments of `vllm serve`, a mapping such as {gpu-memory-utilization: 0.4}.",
        identity=False,
    )  # fmt: skip
    start_s: float = setting(
        900.0, "`vllm`: time that a server has to start, or a server of `rollout.urls` to answer again.",
        unit="seconds", above=0, identity=False,
    )  # fmt: skip
    max_gap: float | None = setting(
        None,
        "`vllm`: largest mean of |log π − log p| over an update's tokens, where p is what the server says it drew "
        "with. Beyond it the run stops. Empty: 0.001 with dtype=float32, 0.1 with bfloat16, 0.05 with float16.",
        unit="nats", above=0, identity=False,
    )  # fmt: skip

    def check_together(self) -> None:
        defaults = defaults_of(type(self))
        changed = [key for key in OF_VLLM if getattr(self, key) != defaults[key]]
        given = [] if self.engine == "vllm" else changed
        require(
            not given, f"rollout.{given[0] if given else ''}", getattr(self, given[0]) if given else None,
            "is a setting of rollout=vllm", "Add rollout=vllm, or drop it.",
        )  # fmt: skip
        check_args("rollout.args", self.args, DECIDED)
        for url in self.urls:
            require(
                is_address(url), "rollout.urls", url, "is no address of a server",
                "Write http://HOST:PORT, without a path or a password.",
            )  # fmt: skip
        plain = [url.rstrip("/") for url in self.urls]
        twice = next((url for url in plain if plain.count(url) > 1), None)
        require(twice is None, "rollout.urls", twice, "stands there twice", "Name each server once.")
        own = [key for key in changed if key in ("python", "replicas", "args")]
        require(
            not (self.urls and own), f"rollout.{own[0] if own else ''}", getattr(self, own[0]) if own else None,
            "is of servers that align starts, and rollout.urls names others", "Leave one of the two out.",
        )  # fmt: skip

    @property
    def words(self) -> Sequence[str]:
        """The further arguments, as a command line has them."""
        return words_of(self.args)


def is_address(url: str) -> bool:
    """Whether a URL is a server's, and nothing more."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # a port that is none, half an IPv6 address
        return False
    more = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc
    named = bool(parts.hostname) and re.search(r"[\s;,]", parts.netloc) is None
    return parts.scheme in ("http", "https") and named and not more and port != 0
