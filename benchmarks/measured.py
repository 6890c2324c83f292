"""What is asked of one architecture, and the answer as a row of the table.

The oracle is transformers alone: logits of one row without padding, its own `generate`. Nothing of ours is in it.
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
from small_models import VOCABULARY, small_config, small_model, variants_of
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from align.data.chat.encode import Encoded
from align.export.merged import merge_adapter
from align.models.actors import ModelActor
from align.models.adapters import save_adapter, with_new_adapter
from align.models.architectures import Route, deciding_settings
from align.models.base import pocket_folder
from align.models.fastpath import use_fast_path
from align.models.forward import decoder_of, hidden_states, pad, picked_logprobs, rollout_from_answers
from align.models.load import load_tokenizer
from align.models.lora import Lora
from align.models.roles import Roles
from align.ops.moments import Moments
from align.ppo.experience import Estimator, assemble_experience, compute_estimates, shape_scores
from align.ppo.update import Losses as PolicyLosses
from align.ppo.update import take_gradient_steps
from align.rollout.engine import response_ids, row_seeds
from align.rollout.hf import HfEngine
from align.run import Base
from align.trainers.common import Training, train
from align.trainers.sft import sft_trainer

CPU = torch.device("cpu")
NEW, PAD = 8, 0
PROMPTS = ((5, 21), (1, 9), (3, 14), (3, 16))
"""Length of each row's prompt, and of prompt and answer."""
CLOSE = 2e-3
"""Nats that a logprob may be off in fp32: orders of addition make 1e-6 to 1e-4 of it, and what is passed over more."""
ROUTES = {"fast": Route(True, True, True), "padded": Route(False, True, False), "alone": Route(False, False, False)}


class Asked(NamedTuple):
    """Rows, and what transformers says of them one at a time."""

    rows: list[list[int]]
    prompts: list[list[int]]
    logprobs: list[Tensor]
    states: list[Tensor]
    greedy: list[list[int]]


def oracle(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_rows() -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for _, n in PROMPTS]
    return rows, [row[:p] for row, (p, _) in zip(rows, PROMPTS, strict=True)]


@torch.no_grad()
def own_logprobs(model: Any, row: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(-1)


@torch.no_grad()
def own_states(model: Any, row: Sequence[int]) -> Tensor:
    return decoder_of(model)(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]


def own_greedy(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
    """What its own `generate` writes behind prompts of one length, and the logprobs that it chose by [B, T, V]."""
    ids = torch.tensor(prompts)
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, pad_token_id=PAD, output_logits=True, return_dict_in_generate=True
    )
    said = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return said.sequences[:, ids.shape[1] :].tolist(), torch.stack(said.logits, 1).float().log_softmax(-1)


def likeliest(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether each token is the likeliest by its own forward, or level with it: rounding decides between equals."""
    log_p = own_logprobs(model, [*prompt, *answer])[len(prompt) - 1 : -1]
    chosen = log_p.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return far(log_p.amax(-1), chosen) < CLOSE


class OutsideError(Exception):
    """Something that transformers itself does not do: no code of ours is in it."""


def asked_of(model: Any) -> Asked:
    """What transformers says.

    Raises:
        OutsideError: it contradicts itself.
    """
    rows, prompts = random_rows()
    logprobs = [own_logprobs(model, row) for row in rows]
    if not all(bool(x.isfinite().all()) for x in logprobs):
        raise OutsideError("its own logits are not finite")
    for row, found in zip(rows, logprobs, strict=True):
        if far(own_logprobs(model, row[:-3]), found[:-3]) > CLOSE:
            raise OutsideError("it reads ahead: what follows a token changes what is predicted there")
    try:
        written = [own_greedy(model, [prompt]) for prompt in prompts]
        two = own_greedy(model, prompts[2:])
    except Exception as error:
        raise OutsideError(f"transformers' own generate fails: {told(error)}") from error
    for prompt, (tokens, cached) in zip(prompts, written, strict=True):
        whole = own_logprobs(model, [*prompt, *tokens[0]])[len(prompt) - 1 : -1]
        if (off := far(cached[0], whole)) > CLOSE:
            raise OutsideError(f"transformers' own cache gives other logprobs than its forward ({off:.2g} nats)")
    for prompt, tokens, cached in zip(prompts[2:], *two, strict=True):
        whole = own_logprobs(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
        if (off := far(cached, whole)) > CLOSE:
            raise OutsideError(f"in transformers' own generate rows of one length change each other ({off:.2g} nats)")
    greedy = [tokens[0] for tokens, _ in written]
    try:
        states = [own_states(model, row) for row in rows]
    except Exception as error:
        raise OutsideError(f"its decoder cannot be asked for hidden states: {told(error)}") from error
    return Asked(rows, prompts, logprobs, states, greedy)


def far(found: Tensor, expected: Tensor) -> float:
    """Largest difference; infinite where it is no number."""
    return float((found - expected).abs().max().nan_to_num(torch.inf))


def told(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:110].replace("|", "/")
    return f"{type(error).__name__}: {line}"


def padded_logprobs(model: Any, row: Sequence[int], gap: int, filler: int) -> Tensor:
    """Its own forward on a row that is padded on the left, told by mask and positions."""
    mask = torch.tensor([[0] * gap + [1] * len(row)])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    ids = torch.tensor([[filler] * gap + list(row)])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[0, gap:].float().log_softmax(-1)


def honours_padding(model: Any, asked: Asked) -> bool:
    """Whether a padded row gets the logits of that row alone.

    Raises:
        OutsideError: the padding is masked, but shifts the positions, which are not those that it is told.
    """
    width = max(map(len, asked.rows))
    for row, right in zip(asked.rows, asked.logprobs, strict=True):
        try:
            found, other = (padded_logprobs(model, row, width - len(row), filler) for filler in (PAD, 11))
        except Exception:
            return False
        if far(found, right) > CLOSE:
            if far(found, other) < CLOSE:
                raise OutsideError("it ignores position ids: padding shifts what a row says")
            return False
    return True


def packs(model: Any, asked: Asked) -> bool:
    """Whether rows in one, told apart by positions that start again, give what each gives alone."""
    ids = torch.tensor([[i for row in asked.rows for i in row]])
    positions = torch.tensor([[i for row in asked.rows for i in range(len(row))]])
    try:
        with torch.no_grad():
            found = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float().log_softmax(-1)
    except Exception:
        return False
    return far(found, torch.cat(asked.logprobs)) < CLOSE


def on_route(folder: Path, route: Route) -> Any:
    model = oracle(folder).requires_grad_(False)
    model.align_route = route
    use_fast_path(model)
    return model


@torch.no_grad()
def gap_of(model: Any, asked: Asked) -> float:
    """How far our logprobs, entropies and states lie from transformers', in the layout of PPO."""
    rollout = rollout_from_answers(
        asked.prompts, [r[len(p) :] for r, p in zip(asked.rows, asked.prompts, strict=True)], PAD, CPU
    )
    worst = 0.0
    picked_BS = rollout.mask_BS & (rollout.mask_BS.cumsum(1) > 1)
    logprobs, entropies, _ = picked_logprobs(model, rollout.tokens_BS, rollout.mask_BS, picked_BS)
    right = [x[:-1].gather(1, torch.tensor(r)[1:, None])[:, 0] for x, r in zip(asked.logprobs, asked.rows, strict=True)]
    worst = max(worst, far(logprobs, torch.cat(right)))
    worst = max(worst, far(entropies, torch.cat([-(x.exp() * x).sum(-1)[:-1] for x in asked.logprobs])))
    states = hidden_states(model, rollout.tokens_BS, rollout.mask_BS)[rollout.mask_BS]
    expected = torch.cat(asked.states)
    return max(worst, far(states, expected) / float(expected.abs().max()))


def engine() -> HfEngine:
    return HfEngine(stop_ids=(), pad_id=PAD, max_new_tokens=NEW, temperature=1e-6)


def sampled(model: Any, asked: Asked) -> list[list[int]]:
    actor = ModelActor(model, model.active_adapter if isinstance(model, PeftModel) else None)
    return response_ids(engine().generate(asked.prompts, actor, range(len(asked.prompts))))


def greedy(model: Any, answers: list[list[int]], asked: Asked) -> bool:
    """Whether these are what transformers writes, ties apart."""
    rows = zip(asked.prompts, answers, asked.greedy, strict=True)
    return all(found == right or likeliest(model, prompt, found) for prompt, found, right in rows)


def chosen(folder: Path, asked: Asked, padded: bool) -> tuple[str, float, str]:
    """The first route that is right; how far off its logprobs are; and what keeps the fast one from being it."""
    why = ""
    for name, way in ROUTES.items():
        if way.padding and not way.fast and not padded:
            continue
        try:
            model = on_route(folder, way)
            off = gap_of(model, asked)
            if off > CLOSE:
                problem = f"hidden states and head apart are {off:.2g} off" if padded else "padding changes its logits"
            elif not greedy(oracle(folder), sampled(model, asked), asked):
                problem = "the reserved cache gives other tokens" if way.fast else "its generate depends on rows beside"
            else:
                return name, off, why
        except Exception as error:
            problem = f"the reserved cache does not fit ({told(error)})" if way.fast else told(error)
        why = why or problem
    return "", 0.0, problem


@torch.no_grad()
def own_loss(model: Any, asked: Asked) -> Tensor:
    """What its own forward says of the rows, padded on the right."""
    ids, labels = pad(asked.rows, PAD), pad(asked.rows, -100)
    mask = pad([[1] * len(row) for row in asked.rows], 0)
    return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss


class Losses(TrainerCallback):
    """The losses that a trainer logs."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        self.seen += [logs["loss"]] if "loss" in (logs or {}) else []


def one_step_of_sft(folder: Path, route: Route, asked: Asked, scratch: Path) -> str:
    """What is wrong with it; empty where nothing is."""
    model = with_new_adapter(on_route(folder, route), Lora(4, 8))
    training = Training(
        lr=1e-3, epochs=1, batch_size=4, micro_batch=4, warmup=0.0, schedule="constant", max_grad_norm=1.0,
        save_every=100, gradient_checkpointing="auto", seed=0, max_steps=1,
    )  # fmt: skip
    arguments = training.arguments(scratch / "sft", CPU, torch.float32, 1)
    losses = Losses()
    rows = [Encoded(row, [-100, *row[1:]]) for row in asked.rows]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    tokenizer = load_tokenizer(Base("pocket", str(pocket_folder()), None, ""))
    train(lambda: sft_trainer(model, tokenizer, rows, arguments, max_length=64, packing=False), model, losses)
    right = -torch.cat(
        [x[:-1].gather(1, torch.tensor(r)[1:, None])[:, 0] for x, r in zip(asked.logprobs, asked.rows, strict=True)]
    ).mean()
    if abs(losses.seen[0] - float(right)) > 1e-2:
        own = float(own_loss(oracle(folder).train(), asked))
        if abs(losses.seen[0] - own) < 1e-2:
            return f"its own forward in training has loss {own:.4f} on padded rows, {right:.4f} on each alone"
        return f"SFT's first loss is {losses.seen[0]:.4f}, its logits' {right:.4f}"
    save_adapter(model, scratch / "tuned", Base("small", str(folder), None, ""))
    moved = [not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before]
    finite = all(bool(p.isfinite().all()) for n, p in model.named_parameters() if n in before)
    return "" if any(moved) and finite else "a step of SFT moves no weight, or moves it out of bounds"


def one_update_of_ppo(folder: Path, route: Route, asked: Asked, scratch: Path) -> tuple[str, Roles]:
    """What is wrong with it; and the roles."""
    torch.manual_seed(0)
    roles = Roles(on_route(folder, route), scratch / "tuned", [], Lora(4, 8))
    with torch.no_grad():
        for parameter in (*roles.parameters_of("policy"), *roles.parameters_of("value")):
            parameter.add_(0.02 * torch.randn_like(parameter))
    hot = HfEngine(stop_ids=(7, 8, 9, 10), pad_id=PAD, max_new_tokens=NEW)
    rollout = hot.generate(asked.prompts, roles.actor("policy"), row_seeds(range(len(asked.prompts)), 1))
    scores = torch.tensor([0.5, -1.0, 1.0, 0.2])
    shaping = {"score_scale": 1.0, "score_clip": None, "missing_eos_penalty": 0.1}
    estimates, cached = compute_estimates(roles, rollout, temperature=1.0, micro_batch=2, minibatches=1)
    shaped = shape_scores(scores, rollout, Moments(1, 0.0, 1.0), **shaping)
    made, _ = assemble_experience(
        rollout, shaped, *estimates, estimator=Estimator(), kl_coef=0.05, kl_estimator="k1", kl_in_reward=True,
    )  # fmt: skip
    optimiser = torch.optim.AdamW([{"params": roles.parameters_of(r), "lr": 1e-3} for r in ("policy", "value")])
    learned = take_gradient_steps(
        roles, optimiser, made, cached, epochs=2, minibatch_count=1, max_grad_norm=1.0,
        generator=torch.Generator().manual_seed(0), micro_batch=1, temperature=1.0, losses=PolicyLosses(),
    )  # fmt: skip
    off = learned["first_log_ratio"]
    if off > 1e-3:
        return f"π_new/π_old of PPO's first update lies {off:.2g} nats a token from 1", roles
    if not learned["policy_grad_norm"] > 0 or not learned["value_grad_norm"] > 0:
        return "a gradient of PPO is 0", roles
    return "", roles


def merged_apart(folder: Path, roles: Roles, asked: Asked, scratch: Path) -> str:
    save_adapter(roles.model, scratch / "adapter", Base("small", str(folder), None, ""), "policy")
    whole = merge_adapter(oracle(folder), scratch / "adapter")
    beside = PeftModel.from_pretrained(oracle(folder), str(scratch / "adapter")).eval()
    weights = [m.weight for m in oracle(folder).modules() if type(m) is torch.nn.Linear]
    if len({id(w) for w in weights}) < len(weights):
        return "several layers share a weight, and merged the adapter of one changes the others"
    gaps = [far(own_logprobs(whole, row), own_logprobs(beside, row)) for row in asked.rows]
    return f"merged it is {max(gaps):.2g} off" if max(gaps) > CLOSE else ""


def measure(model_type: str) -> dict[str, Any]:
    """The row of a type."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        row = measured(lambda: small_config(model_type), Path(scratch), whole=True)
        if row["path"] not in ("fast", "plain"):
            return row
        proven = []
        for number, changes in enumerate(variants_of(model_type, row["path"])):
            build = partial(small_config, model_type, **changes)
            other = measured(build, Path(scratch) / str(number), whole=False)
            if all(other.get(k) == row[k] for k in ("path", "padding", "packing")):
                here, there = row["settings"], other["settings"]
                names = here.keys() | there.keys()
                change = {k: there.get(k, "a number") for k in names if here.get(k) != there.get(k)}
                if change and change not in proven:
                    proven.append(change)
        return {**row, "variants": proven} if proven else row


def measured(build: Callable[[], Any], scratch: Path, whole: bool) -> dict[str, Any]:
    """Return the row of one small configuration.

    Args:
        build: returns the configuration.
        scratch: a folder; the model is left in its `model`.
        whole: train it and merge it too; the forward of a variant is what differs.
    """
    folder = scratch / "model"
    try:
        small_model(build(), folder)
        model = oracle(folder)
        own_logprobs(model, [5, 6, 7])
    except Exception as error:
        return {"path": "unbuilt", "cause": f"does not build small: {told(error)}"}
    try:
        asked = asked_of(model)
        padded = honours_padding(model, asked)
    except OutsideError as error:
        return {"path": "refused", "cause": str(error)}
    name, off, why = chosen(folder, asked, padded)
    if not name:
        return {"path": "refused", "cause": why}
    if whole and (problem := trained(folder, ROUTES[name]._replace(why=why), asked, scratch)):
        return {"path": "refused", "cause": problem}
    return {
        "path": "fast" if name == "fast" else "plain", "padding": name != "alone",
        "packing": padded and packs(model, asked), "cause": why, "off": float(f"{off:.1e}"),
        "settings": deciding_settings(oracle(folder).config),
    }  # fmt: skip


def trained(folder: Path, route: Route, asked: Asked, scratch: Path) -> str:
    """What is wrong with training it and merging it; empty where nothing is."""
    try:
        problem = one_step_of_sft(folder, route, asked, scratch)
    except Exception as error:
        return f"a step of SFT fails: {told(error)}"
    if problem:
        return problem
    try:
        problem, roles = one_update_of_ppo(folder, route, asked, scratch)
    except Exception as error:
        return f"an update of PPO fails: {told(error)}"
    try:
        return problem or merged_apart(folder, roles, asked, scratch)
    except Exception as error:
        return f"a merge fails: {told(error)}"
