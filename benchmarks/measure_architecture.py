"""Measure a small model of one architecture against transformers, and return its row of the table.

The oracle is transformers alone: logits of one row at a time without padding, and its own `generate`. It runs none of
align's code.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from small_models import VOCABULARY, build_small_config, build_variants, save_small_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from align.data.chat.encode import EncodedRow
from align.export.merged import merge_adapter
from align.models.actors import ModelActor
from align.models.adapters import add_new_adapter, save_adapter
from align.models.architectures import Route, select_deciding_settings
from align.models.base import find_pocket_folder
from align.models.fastpath import install_fast_path
from align.models.forward import (
    compute_hidden_states,
    compute_picked_logprobs,
    get_decoder,
    pad_rows,
    rollout_from_answers,
)
from align.models.load import load_tokenizer
from align.models.lora import Lora
from align.models.roles import Roles
from align.ops.moments import Moments
from align.ppo.experience import Estimator, assemble_experience, compute_estimates, shape_scores
from align.ppo.update import Losses as PolicyLosses
from align.ppo.update import take_gradient_steps
from align.rollout.engine import derive_row_seeds, extract_response_ids
from align.rollout.hf import HfEngine
from align.run import Base
from align.trainers.common import Training, train
from align.trainers.sft import build_sft_trainer

CPU = torch.device("cpu")
NEW_TOKENS = 8
PAD_ID = 0
ROW_LENGTHS = ((5, 21), (1, 9), (3, 14), (3, 16))
"""Tokens of each row's prompt, and of prompt and answer."""
TOLERANCE = 2e-3
"""Largest error of a logprob in fp32, in nats. Another order of additions changes it by 1e-6 to 1e-4, an ignored
setting by more."""
ROUTES = {"fast": Route(True, True, True), "padded": Route(False, True, False), "alone": Route(False, False, False)}


class OracleOutputs(NamedTuple):
    """Outputs of transformers on rows, one at a time.

    Attributes:
        rows: token ids of prompt and answer.
        prompts: token ids of each row's prompt.
        logprobs: of each row, [T, V].
        states: last hidden states of each row, [T, D].
        greedy: token ids that `generate` adds to each prompt.
    """

    rows: list[list[int]]
    prompts: list[list[int]]
    logprobs: list[Tensor]
    states: list[Tensor]
    greedy: list[list[int]]


def load_oracle(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def draw_rows() -> tuple[list[list[int]], list[list[int]]]:
    """Return random rows of `ROW_LENGTHS`, and their prompts."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for _, length in ROW_LENGTHS]
    prompts = [row[:prompt_length] for row, (prompt_length, _) in zip(rows, ROW_LENGTHS, strict=True)]
    return rows, prompts


@torch.no_grad()
def compute_oracle_logprobs(model: Any, row: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(-1)


@torch.no_grad()
def compute_oracle_states(model: Any, row: Sequence[int]) -> Tensor:
    return get_decoder(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]


def generate_greedily(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
    """Return the tokens that the model's own `generate` adds to prompts of one length, and the logprobs from which it
    chose them, [B, T, V]."""
    input_ids = torch.tensor(prompts)
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=PAD_ID,
        output_logits=True,
        return_dict_in_generate=True,
    )
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    answers = output.sequences[:, input_ids.shape[1] :].tolist()
    return answers, torch.stack(output.logits, 1).float().log_softmax(-1)


def is_likeliest(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Return whether each token has the largest logprob in the model's own forward, within the tolerance: rounding
    decides between equal ones."""
    logprobs = compute_oracle_logprobs(model, [*prompt, *answer])[len(prompt) - 1 : -1]
    answer_logprobs = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return max_difference(logprobs.amax(-1), answer_logprobs) < TOLERANCE


class OracleError(Exception):
    """A failure of transformers itself, without any of align's code."""


def collect_oracle_outputs(model: Any) -> OracleOutputs:
    """Return the outputs of transformers on random rows.

    Raises:
        OracleError: transformers fails, or its outputs contradict each other.
    """
    rows, prompts = draw_rows()
    logprobs = [compute_oracle_logprobs(model, row) for row in rows]
    if not all(bool(row_logprobs.isfinite().all()) for row_logprobs in logprobs):
        raise OracleError("its own logits are not finite")
    for row, row_logprobs in zip(rows, logprobs, strict=True):
        if max_difference(compute_oracle_logprobs(model, row[:-3]), row_logprobs[:-3]) > TOLERANCE:
            raise OracleError("it reads ahead: what follows a token changes what is predicted there")
    try:
        single_outputs = [generate_greedily(model, [prompt]) for prompt in prompts]
        pair_output = generate_greedily(model, prompts[2:])
    except Exception as error:
        raise OracleError(f"transformers' own generate fails: {describe_error(error)}") from error
    for prompt, (answers, cached_logprobs) in zip(prompts, single_outputs, strict=True):
        forward_logprobs = compute_oracle_logprobs(model, [*prompt, *answers[0]])[len(prompt) - 1 : -1]
        if (gap := max_difference(cached_logprobs[0], forward_logprobs)) > TOLERANCE:
            raise OracleError(f"transformers' own cache gives other logprobs than its forward ({gap:.2g} nats)")
    for prompt, answer, cached_logprobs in zip(prompts[2:], *pair_output, strict=True):
        forward_logprobs = compute_oracle_logprobs(model, [*prompt, *answer])[len(prompt) - 1 : -1]
        if (gap := max_difference(cached_logprobs, forward_logprobs)) > TOLERANCE:
            raise OracleError(f"in transformers' own generate rows of one length change each other ({gap:.2g} nats)")
    greedy_answers = [answers[0] for answers, _ in single_outputs]
    try:
        states = [compute_oracle_states(model, row) for row in rows]
    except Exception as error:
        raise OracleError(f"its decoder cannot be asked for hidden states: {describe_error(error)}") from error
    return OracleOutputs(rows, prompts, logprobs, states, greedy_answers)


def max_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference. NaN counts as infinite."""
    return float((actual - expected).abs().max().nan_to_num(torch.inf))


def describe_error(error: BaseException) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0][:110].replace("|", "/")
    return f"{type(error).__name__}: {first_line}"


def compute_padded_logprobs(model: Any, row: Sequence[int], padding: int, padding_id: int) -> Tensor:
    """Return the logprobs of a row that is padded on the left, by the model's own forward with mask and position
    ids."""
    mask = torch.tensor([[0] * padding + [1] * len(row)])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    input_ids = torch.tensor([[padding_id] * padding + list(row)])
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[0, padding:].float().log_softmax(-1)


def supports_padding(model: Any, oracle: OracleOutputs) -> bool:
    """Return whether padded rows get the same logits as single ones.

    Raises:
        OracleError: the model masks padding, but ignores position ids, so that padding shifts positions.
    """
    width = max(map(len, oracle.rows))
    for row, expected in zip(oracle.rows, oracle.logprobs, strict=True):
        padding = width - len(row)
        try:
            logprobs, other_logprobs = (
                compute_padded_logprobs(model, row, padding, padding_id) for padding_id in (PAD_ID, 11)
            )
        except Exception:
            return False
        if max_difference(logprobs, expected) > TOLERANCE:
            if max_difference(logprobs, other_logprobs) < TOLERANCE:
                raise OracleError("it ignores position ids: padding shifts what a row says")
            return False
    return True


def supports_packing(model: Any, oracle: OracleOutputs) -> bool:
    """Return whether rows that are packed into one get the same logits as single ones. Only position ids, which start
    again at 0, separate them."""
    input_ids = torch.tensor([[token_id for row in oracle.rows for token_id in row]])
    positions = torch.tensor([[position for row in oracle.rows for position in range(len(row))]])
    try:
        with torch.no_grad():
            logits = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
            logprobs = logits[0].float().log_softmax(-1)
    except Exception:
        return False
    return max_difference(logprobs, torch.cat(oracle.logprobs)) < TOLERANCE


def load_on_route(folder: Path, route: Route) -> Any:
    """Load a model without gradients, with align's forward for a route."""
    model = load_oracle(folder).requires_grad_(False)
    model.align_route = route
    install_fast_path(model)
    return model


def gather_row_logprobs(oracle: OracleOutputs) -> Tensor:
    """Return the logprob of each token but the first of its row, rows concatenated."""
    return torch.cat(
        [
            logprobs[:-1].gather(1, torch.tensor(row)[1:, None])[:, 0]
            for logprobs, row in zip(oracle.logprobs, oracle.rows, strict=True)
        ]
    )


@torch.no_grad()
def measure_gap(model: Any, oracle: OracleOutputs) -> float:
    """Return the largest difference between align's and transformers' logprobs, entropies and hidden states, in PPO's
    layout of rows. Differences of states are relative to the largest state."""
    answers = [row[len(prompt) :] for row, prompt in zip(oracle.rows, oracle.prompts, strict=True)]
    rollout = rollout_from_answers(oracle.prompts, answers, PAD_ID, CPU)
    picked_BS = rollout.mask_BS & (rollout.mask_BS.cumsum(1) > 1)
    logprobs, entropies, _ = compute_picked_logprobs(model, rollout.tokens_BS, rollout.mask_BS, picked_BS)
    expected_entropies = torch.cat([-(row.exp() * row).sum(-1)[:-1] for row in oracle.logprobs])
    states = compute_hidden_states(model, rollout.tokens_BS, rollout.mask_BS)[rollout.mask_BS]
    expected_states = torch.cat(oracle.states)
    return max(
        0.0,
        max_difference(logprobs, gather_row_logprobs(oracle)),
        max_difference(entropies, expected_entropies),
        max_difference(states, expected_states) / float(expected_states.abs().max()),
    )


def sample_greedily(model: Any, oracle: OracleOutputs) -> list[list[int]]:
    """Return align's answers to the prompts at a temperature near 0."""
    engine = HfEngine(stop_ids=(), pad_id=PAD_ID, max_new_tokens=NEW_TOKENS, temperature=1e-6)
    actor = ModelActor(model, model.active_adapter if isinstance(model, PeftModel) else None)
    return extract_response_ids(engine.generate(oracle.prompts, actor, range(len(oracle.prompts))))


def is_greedy(model: Any, answers: list[list[int]], oracle: OracleOutputs) -> bool:
    """Return whether these are transformers' greedy answers. Another token of equal logprob counts as the same."""
    rows = zip(oracle.prompts, answers, oracle.greedy, strict=True)
    return all(answer == expected or is_likeliest(model, prompt, answer) for prompt, answer, expected in rows)


def choose_route(folder: Path, oracle: OracleOutputs, has_padding: bool) -> tuple[str, float, str]:
    """Try the routes from the fastest on.

    Args:
        has_padding: of `supports_padding`.

    Returns:
        Name of the first correct route, its gap, and why the fast route is not correct, if it is not. If no route is
        correct, the name is empty, and the text is why the last one is not.
    """
    cause = ""
    for name, route in ROUTES.items():
        if route.can_pad and not route.has_fast_path and not has_padding:
            continue
        try:
            model = load_on_route(folder, route)
            gap = measure_gap(model, oracle)
            if gap > TOLERANCE:
                problem = (
                    f"hidden states and head apart are {gap:.2g} off" if has_padding else "padding changes its logits"
                )
            elif not is_greedy(load_oracle(folder), sample_greedily(model, oracle), oracle):
                problem = (
                    "the reserved cache gives other tokens"
                    if route.has_fast_path
                    else "its generate depends on rows beside"
                )
            else:
                return name, gap, cause
        except Exception as error:
            description = describe_error(error)
            problem = f"the reserved cache does not fit ({description})" if route.has_fast_path else description
        cause = cause or problem
    return "", 0.0, problem


@torch.no_grad()
def compute_padded_loss(model: Any, oracle: OracleOutputs) -> Tensor:
    """Return the loss of the rows, padded on the right, by the model's own forward."""
    input_ids = pad_rows(oracle.rows, PAD_ID)
    labels = pad_rows(oracle.rows, -100)
    mask = pad_rows([[1] * len(row) for row in oracle.rows], 0)
    return model(input_ids=input_ids, attention_mask=mask, labels=labels, use_cache=False).loss


class LossRecorder(TrainerCallback):
    """Records the losses that a trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def check_sft_step(folder: Path, route: Route, oracle: OracleOutputs, scratch: Path) -> str:
    """Run a step of SFT and save its adapter as `tuned`. Returns what is wrong with it, or an empty text."""
    model = add_new_adapter(load_on_route(folder, route), Lora(4, 8))
    training = Training(
        lr=1e-3,
        epochs=1,
        batch_size=4,
        micro_batch=4,
        warmup=0.0,
        schedule="constant",
        max_grad_norm=1.0,
        save_every=100,
        gradient_checkpointing="auto",
        seed=0,
        max_steps=1,
    )
    arguments = training.arguments(scratch / "sft", CPU, torch.float32, 1)
    recorder = LossRecorder()
    rows = [EncodedRow(row, [-100, *row[1:]]) for row in oracle.rows]
    weights_before = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    tokenizer = load_tokenizer(Base("pocket", str(find_pocket_folder()), None, ""))
    train(lambda: build_sft_trainer(model, tokenizer, rows, arguments, max_length=64, packing=False), model, recorder)
    loss = recorder.losses[0]
    expected_loss = -gather_row_logprobs(oracle).mean()
    if abs(loss - float(expected_loss)) > 1e-2:
        padded_loss = float(compute_padded_loss(load_oracle(folder).train(), oracle))
        if abs(loss - padded_loss) < 1e-2:
            return (
                f"its own forward in training has loss {padded_loss:.4f} on padded rows, "
                f"{expected_loss:.4f} on each alone"
            )
        return f"SFT's first loss is {loss:.4f}, its logits' {expected_loss:.4f}"
    save_adapter(model, scratch / "tuned", Base("small", str(folder), None, ""))
    trained_weights = {name: parameter for name, parameter in model.named_parameters() if name in weights_before}
    has_moved = any(not torch.equal(weight, weights_before[name]) for name, weight in trained_weights.items())
    is_finite = all(bool(weight.isfinite().all()) for weight in trained_weights.values())
    return "" if has_moved and is_finite else "a step of SFT moves no weight, or moves it out of bounds"


def check_ppo_update(folder: Path, route: Route, oracle: OracleOutputs, scratch: Path) -> tuple[str, Roles]:
    """Run an update of PPO on the adapter of `check_sft_step`. Returns what is wrong with it, or an empty text, and the
    roles."""
    torch.manual_seed(0)
    roles = Roles(load_on_route(folder, route), scratch / "tuned", [], Lora(4, 8))
    with torch.no_grad():
        for parameter in (*roles.parameters_of("policy"), *roles.parameters_of("value")):
            parameter.add_(0.02 * torch.randn_like(parameter))
    engine = HfEngine(stop_ids=(7, 8, 9, 10), pad_id=PAD_ID, max_new_tokens=NEW_TOKENS)
    rollout = engine.generate(oracle.prompts, roles.actor("policy"), derive_row_seeds(range(len(oracle.prompts)), 1))
    scores = torch.tensor([0.5, -1.0, 1.0, 0.2])
    estimates, cached = compute_estimates(roles, rollout, temperature=1.0, micro_batch=2, minibatches=1)
    shaped = shape_scores(
        scores, rollout, Moments(1, 0.0, 1.0), score_scale=1.0, score_clip=None, missing_eos_penalty=0.1
    )
    experience, _ = assemble_experience(
        rollout,
        shaped,
        *estimates,
        estimator=Estimator(),
        kl_coef=0.05,
        kl_estimator="k1",
        kl_in_reward=True,
    )
    optimiser = torch.optim.AdamW([{"params": roles.parameters_of(role), "lr": 1e-3} for role in ("policy", "value")])
    figures = take_gradient_steps(
        roles,
        optimiser,
        experience,
        cached,
        epochs=2,
        minibatch_count=1,
        max_grad_norm=1.0,
        generator=torch.Generator().manual_seed(0),
        micro_batch=1,
        temperature=1.0,
        losses=PolicyLosses(),
    )
    log_ratio = figures["first_log_ratio"]
    if log_ratio > 1e-3:
        return f"π_new/π_old of PPO's first update lies {log_ratio:.2g} nats a token from 1", roles
    if not figures["policy_grad_norm"] > 0 or not figures["value_grad_norm"] > 0:
        return "a gradient of PPO is 0", roles
    return "", roles


def check_merge(folder: Path, roles: Roles, oracle: OracleOutputs, scratch: Path) -> str:
    """Compare the merged policy with base and adapter. Returns what is wrong with it, or an empty text."""
    save_adapter(roles.model, scratch / "adapter", Base("small", str(folder), None, ""), "policy")
    merged = merge_adapter(load_oracle(folder), scratch / "adapter")
    unmerged = PeftModel.from_pretrained(load_oracle(folder), str(scratch / "adapter")).eval()
    weights = [module.weight for module in load_oracle(folder).modules() if type(module) is torch.nn.Linear]
    if len({id(weight) for weight in weights}) < len(weights):
        return "several layers share a weight, and merged the adapter of one changes the others"
    gap = max(
        max_difference(compute_oracle_logprobs(merged, row), compute_oracle_logprobs(unmerged, row))
        for row in oracle.rows
    )
    return f"merged it is {gap:.2g} off" if gap > TOLERANCE else ""


def measure_type(model_type: str) -> dict[str, Any]:
    """Return the row of a type, with the variants that are proven like it."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        row = measure_config(lambda: build_small_config(model_type), Path(scratch), with_training=True)
        if row["path"] not in ("fast", "plain"):
            return row
        proven_variants = []
        for number, changes in enumerate(build_variants(model_type, row["path"])):
            build_config = partial(build_small_config, model_type, **changes)
            variant = measure_config(build_config, Path(scratch) / str(number), with_training=False)
            if any(variant.get(key) != row[key] for key in ("path", "padding", "packing")):
                continue
            settings = row["settings"]
            variant_settings = variant["settings"]
            difference = {
                name: variant_settings.get(name, "a number")
                for name in settings.keys() | variant_settings.keys()
                if settings.get(name) != variant_settings.get(name)
            }
            if difference and difference not in proven_variants:
                proven_variants.append(difference)
        return {**row, "variants": proven_variants} if proven_variants else row


def measure_config(build_config: Callable[[], Any], scratch: Path, with_training: bool) -> dict[str, Any]:
    """Return the row of one small configuration.

    Args:
        build_config: returns the configuration.
        scratch: a folder; the model is left in its `model`.
        with_training: train and merge the model too. Variants differ only in the forward.
    """
    folder = scratch / "model"
    try:
        save_small_model(build_config(), folder)
        model = load_oracle(folder)
        compute_oracle_logprobs(model, [5, 6, 7])
    except Exception as error:
        return {"path": "unbuilt", "cause": f"does not build small: {describe_error(error)}"}
    try:
        oracle = collect_oracle_outputs(model)
        has_padding = supports_padding(model, oracle)
    except OracleError as error:
        return {"path": "refused", "cause": str(error)}
    route_name, gap, cause = choose_route(folder, oracle, has_padding)
    if not route_name:
        return {"path": "refused", "cause": cause}
    if with_training:
        problem = check_training(folder, ROUTES[route_name]._replace(why=cause), oracle, scratch)
        if problem:
            return {"path": "refused", "cause": problem}
    return {
        "path": "fast" if route_name == "fast" else "plain",
        "padding": route_name != "alone",
        "packing": has_padding and supports_packing(model, oracle),
        "cause": cause,
        "off": float(f"{gap:.1e}"),
        "settings": select_deciding_settings(load_oracle(folder).config),
    }


def check_training(folder: Path, route: Route, oracle: OracleOutputs, scratch: Path) -> str:
    """Train a model by SFT and PPO and merge it. Returns what is wrong with it, or an empty text."""
    try:
        problem = check_sft_step(folder, route, oracle, scratch)
    except Exception as error:
        return f"a step of SFT fails: {describe_error(error)}"
    if problem:
        return problem
    try:
        problem, roles = check_ppo_update(folder, route, oracle, scratch)
    except Exception as error:
        return f"an update of PPO fails: {describe_error(error)}"
    try:
        return problem or check_merge(folder, roles, oracle, scratch)
    except Exception as error:
        return f"a merge fails: {describe_error(error)}"
