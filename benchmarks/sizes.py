"""The estimates of docs/sizes.md: memory of one process by model and method, from the shapes alone.

Usage: python benchmarks/sizes.py
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9
TOKENS = 4096  # of one micro-batch in training
ROWS, CONTEXT = 32, 512  # of one rollout batch
RANK = 16
CHUNK = 128  # rows of logits that our own logprobs hold at once
TILE = 32_768  # columns of logits that TRL holds at once, of every token of a micro-batch


@dataclass(frozen=True)
class Shape:
    """A Llama-like model: width, layers, MLP width, key-value width, vocabulary, tied embeddings."""

    name: str
    width: int
    layers: int
    mlp: int
    kv: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> int:
        """Weights of the linear layers."""
        return self.layers * (2 * self.width**2 + 2 * self.width * self.kv + 3 * self.width * self.mlp)

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def adapter(self) -> int:
        """Weights of LoRA on every linear layer."""
        ends = 4 * self.width + 2 * (self.width + self.kv) + 3 * (self.width + self.mlp)
        return self.layers * RANK * ends


SHAPES = (
    Shape("0.5B (Qwen2.5)", 896, 24, 4864, 128, 151_936, True),
    Shape("1.5B (Qwen2.5)", 1536, 28, 8960, 256, 151_936, True),
    Shape("7B (Llama-2)", 4096, 32, 11_008, 4096, 32_000, False),
    Shape("8B (Llama-3)", 4096, 32, 14_336, 1024, 128_256, False),
    Shape("13B (Llama-2)", 5120, 40, 13_824, 5120, 32_000, False),
)


def weights(s: Shape, method: str) -> float:
    """Bytes of the base: NF4 with double quantisation is 4.127 bits a weight; embeddings stay in bf16."""
    if method == "full":
        return 4.0 * (s.linear + s.embeddings)  # fp32 masters under bf16 autocast
    return (4.127 / 8 if method == "qlora" else 2.0) * s.linear + 2.0 * s.embeddings


def trained(count: int) -> float:
    """Bytes of fp32 weights, fp32 gradients and two 8-bit moments."""
    return (4 + 4 + 2) * count


def activations(s: Shape) -> float:
    """Bytes with gradient checkpointing: each layer's input, one layer's inside."""
    kept = 2 * s.layers * s.width * TOKENS
    inside = 2 * TOKENS * (8 * s.width + 4 * s.mlp)
    return kept + inside


def cache(s: Shape) -> float:
    """Bytes of keys and values in bf16."""
    return 2 * 2 * s.layers * s.kv * ROWS * CONTEXT


def sft(s: Shape, method: str) -> float:
    """TRL holds logits and their gradient in bf16, a tile of each."""
    passing = activations(s) + 2 * 2 * TOKENS * min(TILE, s.vocabulary)
    if method == "full":
        return weights(s, method) + (4 + 2) * (s.linear + s.embeddings) + passing
    return weights(s, method) + trained(s.adapter) + passing


def ppo(s: Shape, method: str) -> float:
    """Two adapters train (fp32 weights, gradients and AdamW moments), two are frozen in fp32. Activations, of one of
    the two at a time with two chunks of fp32 logits, and the cache do not live at once."""
    passing = activations(s) + 2 * 4 * CHUNK * s.vocabulary
    return weights(s, method) + 2 * 16 * s.adapter + 2 * 4 * s.adapter + max(passing, cache(s))


def main() -> None:
    print("| model | qlora SFT | lora SFT | full SFT | qlora PPO | four bf16 models, weights alone |")
    print("|---|---|---|---|---|---|")
    for s in SHAPES:
        row = (sft(s, "qlora"), sft(s, "lora"), sft(s, "full"), ppo(s, "qlora"), 4 * weights(s, "lora"))
        print(f"| {s.name} | " + " | ".join(f"{bytes_ / GB:.1f} GB" for bytes_ in row) + " |")


if __name__ == "__main__":
    main()
