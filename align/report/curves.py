"""Which curves each stage shows, and how they are read: declared here, once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curve:
    """A plot over a run's steps.

    Attributes:
        title: what is seen, in words.
        unit: at the axis.
        lines: key of a row of the metrics stream → what the legend calls it.
        span: the smallest range that the axis covers, so that noise looks like noise.
        reading: how to read it, below the plot.
        within: what the figure can be.
        smooth: False for what was set, and is no measurement.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    span: float
    reading: str
    within: tuple[float, float] = (-math.inf, math.inf)
    smooth: bool = True


SHARE = (0.0, 1.0)
POSITIVE = (0.0, math.inf)

LOSSES = {"loss": "training", "held_out_loss": "held out"}
LOSS = Curve("Loss", "nats a token", LOSSES, 0.5, "Lower is better.", POSITIVE)
RATE = Curve("Learning rate", "learning rate", {"lr": "rate"}, 0.0, "As it was scheduled.", POSITIVE, smooth=False)
GRADIENT = Curve(
    "Gradient norm", "norm", {"grad_norm": "norm"}, 1.0,
    "Before clipping. A rise by a factor of ten or more is training coming apart.", POSITIVE,
)  # fmt: skip
PAIR_LOSS = Curve("Loss", "nats a pair", LOSSES, 0.3, "A coin has 0.69; lower is better.", POSITIVE)
DIRECT_LOSS = Curve(
    "Loss", "loss of a pair", LOSSES, 0.3, "Lower is better; with stage.loss=sigmoid a coin has 0.69.", POSITIVE
)
PAIR_ACCURACY = Curve(
    "Accuracy in training", "share of the pairs", {"accuracy": "pairs"}, 0.3,
    "On the pairs that it trains on; the held-out share stands at the top. A coin has 0.5.", SHARE,
)  # fmt: skip
MARGIN = Curve("Margin", "score", {"margin": "margin"}, 0.5, "Score of the better answer less the worse one's.")
GAIN = Curve("Margin", "nats", {"margin": "margin"}, 0.5, "What the better answer gained on the worse one.")
LOGPROBS = Curve(
    "Logprobs of the answers", "nats an answer",
    {"chosen_logprob": "better answer", "rejected_logprob": "worse answer"}, 10.0,
    "Both may fall; what counts is that the worse one's falls faster.",
)  # fmt: skip
TOKEN_LOGPROBS = Curve(
    "Logprobs of the answers' tokens", "nats a token",
    {"chosen_token_logprob": "better answer", "rejected_token_logprob": "worse answer"}, 0.5,
    "Both may fall; what counts is that the worse one's falls faster.",
)  # fmt: skip
LABEL_LOSS = Curve(
    "Loss", "KTO's loss", LOSSES, 0.2, "0.5 at the start, times the weights of the labels; lower is better.", POSITIVE
)
REWARDS = Curve(
    "Rewards of the answers", "beta times nats", {"wanted_reward": "wanted", "unwanted_reward": "unwanted"}, 0.5,
    "Beside the start; what is wanted is to rise above what is not.",
)  # fmt: skip
KL_ESTIMATE = Curve(
    "KL from the start, estimated", "nats an answer", {"kl": "KL"}, 1.0,
    "What rewards are compared with: the reward of answers to other prompts, at least 0.", POSITIVE,
)  # fmt: skip
SCORE = Curve(
    "Score", "score", {"score": "score"}, 0.5,
    "What training optimises, standardised and less the penalty for answers that do not end.",
)  # fmt: skip
KL = Curve(
    "KL from the reference", "nats an answer", {"kl": "KL"}, 2.0,
    "How far the policy has moved; the price of it is stage.kl_coef.", POSITIVE,
)  # fmt: skip
HELD_OUT = Curve(
    "Held-out prompts", "score", {"held_out_score": "score", "held_out_objective": "score less the price of KL"}, 0.5,
    "On prompts that nothing trains on, the start's at update 0; the best objective behind it is published.",
)  # fmt: skip
LENGTH = Curve("Answer length", "tokens", {"length": "length"}, 4.0, "Mean of each update.", POSITIVE)
ENDED = Curve(
    "Answers that end by themselves", "share", {"eos_rate": "ended"}, 0.2,
    "The others were cut at rollout.max_new_tokens.", SHARE,
)  # fmt: skip
ENTROPY = Curve(
    "Entropy", "nats a token", {"entropy": "entropy"}, 0.5,
    "Near 0 the policy says the same whatever is drawn.", POSITIVE,
)  # fmt: skip
EXPLAINED = Curve(
    "Explained variance", "share", {"explained_variance": "explained variance"}, 0.5,
    "How well the value foresees the returns: 1 is perfect, 0 is no better than their mean.", (-math.inf, 1.0),
)  # fmt: skip
EQUAL = Curve(
    "Prompts that tell nothing", "share", {"equal_groups": "all answers earn the same"}, 0.2,
    "They do not say which answer is better; stage.max_draws asks others in their place.", SHARE,
)  # fmt: skip
CLIPPED = Curve(
    "Steps that were clipped", "share of the tokens", {"clip_fraction": "clipped"}, 0.1,
    "Much above 0.3 the steps are too large.", SHARE,
)  # fmt: skip
APPROX_KL = Curve(
    "KL of one update", "nats a token", {"approx_kl": "KL"}, 0.01, "How far each update moves the policy.", POSITIVE
)
SIGNS = Curve(
    "Signs of a gamed reward", "",
    {"score_length_correlation": "score follows length", "repetition": "repetition", "disagreement": "disagreement"},
    0.5, "Each is harmless near 0.",
)  # fmt: skip
EMPTY = Curve(
    "Empty answers", "share", {"empty_rate": "empty"}, 0.2,
    "They leave nothing to judge; with rollout.reasoning=hide, because their reasoning was never closed.", SHARE,
)  # fmt: skip
SAMPLED_LENGTH = Curve(
    "Answer length", "tokens", {"mean_length": "length"}, 4.0, "Mean over prompts answered together.", POSITIVE
)

CURVES: Mapping[str, tuple[Curve, ...]] = {
    "sft": (LOSS, RATE, GRADIENT),
    "full": (LOSS, RATE, GRADIENT),
    "reward": (PAIR_LOSS, PAIR_ACCURACY, MARGIN, RATE, GRADIENT),
    "dpo": (DIRECT_LOSS, PAIR_ACCURACY, LOGPROBS, TOKEN_LOGPROBS, GAIN, RATE, GRADIENT),
    "kto": (LABEL_LOSS, REWARDS, KL_ESTIMATE, RATE, GRADIENT),
    "ppo": (SCORE, KL, HELD_OUT, LENGTH, ENDED, EMPTY, ENTROPY, EXPLAINED, EQUAL, CLIPPED, APPROX_KL, SIGNS),
    "sample": (SAMPLED_LENGTH, ENDED),
}
UNITS = {"ppo": "update", "sample": "prompt", "data": "row"}
"""What a stage counts by; the others count steps."""
