"""Four roles on one NF4 base: each trains only its own weights, and none changes the others."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import modules as bnb_modules
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_roles import CPU, EOS, FP32, PAD, PROMPTS, STOPS, World, add_noise, build_ragged_rollout
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TrainerCallback

from align.core.errors import CorruptFile
from align.core.types import Conversation, Message, Rollout
from align.models.adapters import SCORE_KEY, WEIGHTS_FILE, add_new_adapter, save_adapter
from align.models.forward import compute_response_logprobs
from align.models.load import disable_nf4_repacking, load_classifier, load_tokenizer
from align.models.lora import Lora
from align.models.roles import Roles, find_adapter_name
from align.ops.losses import policy_loss, value_loss
from align.reward.learned import LearnedReward, score_rows
from align.rollout.engine import derive_row_seeds, extract_response_ids
from align.rollout.hf import HfEngine
from align.trainers import common
from align.trainers.common import Training
from align.trainers.reward import Ranking, build_reward_trainer, copy_adapter_weights, find_score_head

ROLES = ("policy", "reference", "reward", "value")


@pytest.fixture
def roles(world: World) -> Roles:
    return world.roles()


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return build_ragged_rollout()


def find_gradients(roles: Roles) -> set[str]:
    """Return the names of the adapters and heads that have a gradient."""
    heads = [("value_head", roles.value_head.weight), ("score_head", roles.score_heads[0].weight)]
    reached = set()
    for name, parameter in [*roles.model.named_parameters(), *heads]:
        if parameter.grad is not None and parameter.grad.abs().sum() > 0:
            reached.add(next((r for r in ROLES if f".{r}." in name), name))
    return reached


def compute_losses(roles: Roles, rollout: Rollout) -> tuple[Tensor, Tensor]:
    mask = rollout.response_mask_BT
    unit_weights = torch.ones(mask.shape)
    logprobs, _, states = roles.logprobs("policy", rollout, 1.0, train=True)
    policy = policy_loss(logprobs, logprobs.detach(), unit_weights, mask, 0.2, float(mask.sum())).loss
    policy.backward()
    values = roles.values(rollout, train=True, policy_states_BTD=states)
    value = value_loss(values, unit_weights, unit_weights, mask, float(mask.sum())).loss
    value.backward()
    return policy, value


# Trained weights.


@pytest.mark.parametrize("fresh", [False, True])
def test_what_trains_in_each_role(world: World, fresh: bool):
    roles = world.roles(fresh=fresh)
    assert roles.count_quantised_layers() == 14  # seven in each of two layers
    for role in (*ROLES, "value", "policy", "reference"):
        for train in (True, False) if role in ("policy", "value") else (False,):
            with roles.use(role, train):
                trained = {n for n, p in roles.model.named_parameters() if p.requires_grad}
                assert len(trained) == (28 if train else 0)
                assert all(f".{role}." in n for n in trained)
                assert roles.value_head.weight.requires_grad == (train and role == "value")
                assert not roles.score_heads[0].weight.requires_grad


def test_an_optimiser_of_a_role_holds_its_own(roles: Roles):
    names = {id(p): n for n, p in roles.model.named_parameters()}
    policy = roles.parameters_of("policy")
    value = roles.parameters_of("value")
    assert len(policy) == 28
    assert all(".policy." in names[id(p)] for p in policy)
    assert value[-1] is roles.value_head.weight
    assert len(value) == 29
    assert all(".value." in names[id(p)] for p in value[:-1])
    assert all(p.dtype == torch.float32 for p in policy + value)


def test_the_policy_loss_reaches_the_policy_adapter_only(roles: Roles, rollout: Rollout):
    logprobs, entropy, states = roles.logprobs("policy", rollout, 1.0, train=True)
    logprobs.sum().backward()
    assert find_gradients(roles) == {"policy"}
    assert not entropy.requires_grad
    assert not states.requires_grad


def test_the_value_loss_reaches_the_value_adapter_and_head_only(roles: Roles, rollout: Rollout):
    mask = rollout.response_mask_BT
    values = roles.values(rollout, train=True)
    value_loss(values, values.detach(), torch.ones_like(values), mask, float(mask.sum())).loss.backward()
    assert find_gradients(roles) == {"value", "value_head"}


def test_a_role_that_only_reads_makes_no_graph(roles: Roles, rollout: Rollout):
    assert not roles.logprobs("policy", rollout, 1.0)[0].requires_grad
    assert not roles.values(rollout).requires_grad
    assert not roles.scores(rollout).requires_grad


def test_the_value_role_starts_at_0_from_the_reward_adapter(world: World):
    roles = Roles(world.load(), world.init, [world.reward], Lora(4, 8))
    assert (roles.values(build_ragged_rollout()) == 0).all()
    tensors = dict(roles.model.named_parameters())
    pairs = [(n, n.replace(".value.", ".reward.")) for n in tensors if ".value." in n]
    assert len(pairs) == 28
    assert all(torch.equal(tensors[a], tensors[b]) for a, b in pairs)
    pairs = [(n, n.replace(".policy.", ".reference.")) for n in tensors if ".policy." in n]
    assert all(torch.equal(tensors[a], tensors[b]) for a, b in pairs)


@pytest.mark.parametrize(("backbone", "role"), [("policy", "policy"), ("frozen", "reward")])
def test_a_value_head_on_another_roles_backbone(world: World, rollout: Rollout, backbone: str, role: Any):
    roles = world.roles(backbone=backbone)
    assert not any(".value." in name for name, _ in roles.model.named_parameters())
    assert roles.parameters_of("value") == [roles.value_head.weight]
    states = roles.logprobs(role, rollout, 1.0).states_BTD
    expected = roles.value_head(states).squeeze(-1)
    assert torch.equal(roles.values(rollout), expected)
    assert torch.equal(roles.values(rollout, policy_states_BTD=states if backbone == "policy" else -states), expected)
    compute_losses(roles, rollout)
    assert find_gradients(roles) == {"policy", "value_head"}
    policy = [p.grad.clone() for p in roles.parameters_of("policy") if p.grad is not None]
    logprobs = roles.logprobs("policy", rollout, 1.0, train=True).logprobs_BT
    for parameter in roles.parameters_of("policy"):
        parameter.grad = None
    mask = rollout.response_mask_BT
    policy_loss(logprobs, logprobs.detach(), torch.ones(mask.shape), mask, 0.2, float(mask.sum())).loss.backward()
    alone = [p.grad for p in roles.parameters_of("policy") if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(policy, alone, strict=True))  # nothing of the value loss is in it


# Frozen roles.


@pytest.mark.parametrize("fresh", [False, True])
def test_reference_and_reward_are_the_same_bits_after_training(world: World, rollout: Rollout, fresh: bool):
    roles = world.roles(fresh=fresh)
    engine = HfEngine(STOPS, PAD, 6)
    optimiser = torch.optim.AdamW([*roles.parameters_of("policy"), *roles.parameters_of("value")], lr=1e-2)

    def compute_outputs() -> list[Tensor]:
        policy, reference = (roles.logprobs(role, rollout, 0.8)[0] for role in ("policy", "reference"))
        return [reference, roles.scores(rollout), policy, roles.values(rollout)]

    before = compute_outputs()
    assert torch.equal(before[0], before[2])  # the policy starts as the reference
    for number in range(3):
        engine.generate(PROMPTS, roles.actor("policy"), derive_row_seeds(range(len(PROMPTS)), number))
        compute_losses(roles, rollout)
        optimiser.step()
        optimiser.zero_grad()
    after = compute_outputs()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert (before[2] - after[2]).abs().max() > 1e-3
    assert (before[3] - after[3]).abs().max() > 1e-3


def test_the_policy_samples_as_the_policy(roles: Roles):
    """The engine samples from the adapter of the given role: reward and value give other responses."""
    engine = HfEngine(STOPS, PAD, 8, temperature=1e-5)
    responses = {}
    for role in ROLES:
        responses[role] = extract_response_ids(engine.generate(PROMPTS, roles.actor(role), range(len(PROMPTS))))
    assert responses["policy"] == responses["reference"] != responses["reward"] == responses["value"]


def test_the_reference_is_the_supervised_adapter(world: World, roles: Roles, rollout: Rollout):
    alone = PeftModel.from_pretrained(world.load(), str(world.init)).eval()
    expected, _ = compute_response_logprobs(alone, rollout, 1.0)
    assert_close(roles.logprobs("reference", rollout, 1.0)[0], expected, atol=1e-5, rtol=0)
    with torch.no_grad(), alone.disable_adapter():
        bare, _ = compute_response_logprobs(alone, rollout, 1.0)
    assert (bare - expected).abs().max() > 1e-2


def test_adapters_are_read_and_saved_without_asking_a_hub(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their base is named by an id, which PEFT would look up."""
    hosts: list[str] = []

    def note(host: str, *arguments: Any, **options: Any) -> Any:
        hosts.append(host)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", note)
    save_adapter(world.roles().model, tmp_path, world.base, "policy")
    assert not hosts
    assert load_file(tmp_path / WEIGHTS_FILE).keys() == load_file(world.init / WEIGHTS_FILE).keys()


def test_without_an_adapter_the_base_is_the_reference(world: World, rollout: Rollout):
    roles = world.roles(fresh=True)
    with torch.no_grad():
        bare, _ = compute_response_logprobs(world.load(), rollout, 1.0)
    assert_close(roles.logprobs("reference", rollout, 1.0)[0], bare, atol=1e-6, rtol=0)
    with torch.no_grad():
        for parameter in roles.parameters_of("policy"):
            parameter.add_(0.1)
    assert (roles.logprobs("policy", rollout, 1.0)[0] - bare).abs().max() > 1e-2
    assert_close(roles.logprobs("reference", rollout, 1.0)[0], bare, atol=1e-6, rtol=0)


# The reward, read where it was trained.


def load_as_classifier(world: World) -> Any:
    """Load the reward model with transformers and PEFT alone, as other users would."""
    model = AutoModelForSequenceClassification.from_pretrained(
        world.base.path,
        num_labels=1,
        dtype=FP32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=FP32,
            llm_int8_skip_modules=["score"],
        ),
    )
    disable_nf4_repacking(model)
    model = PeftModel.from_pretrained(model, str(world.reward)).eval()
    model.config.pad_token_id = PAD
    return model


def compute_logits(model: Any, rows: list[list[int]]) -> Tensor:
    """Compute the score of each row alone, without padding."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])


def test_scores_of_rows_that_end_with_the_pad_token(world: World, roles: Roles):
    """Pooling by `!= pad` would read such a row at the token before."""
    tokens = torch.tensor([[1, 40, 41, PAD], [1, 50, PAD, 7]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    scores = roles.scores(Rollout(tokens, mask, 2, torch.tensor([True, True])))
    model = load_as_classifier(world)
    model.config.pad_token_id = None
    expected = compute_logits(model, [[1, 40, 41, PAD], [1, 50, PAD]])
    assert_close(scores, expected, atol=1e-5, rtol=0)


def test_a_reward_without_a_head_is_refused(world: World, tmp_path: Path):
    folder = tmp_path / "headless"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((world.reward / "adapter_config.json").read_bytes())
    tensors = load_file(world.reward / WEIGHTS_FILE)
    del tensors[SCORE_KEY]
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(CorruptFile, match="no score head"):
        Roles(world.load(), world.init, [folder], Lora(4, 8))


def make_conversations() -> list[Conversation]:
    answers = ("yes!", "I like the rain when you are tired!", "no")
    return [Conversation((Message("user", f"Hello {i}?"), Message("assistant", a))) for i, a in enumerate(answers)]


def test_text_is_scored_as_the_trainer_scored_it(world: World):
    tokenizer = load_tokenizer(world.base)
    model = load_as_classifier(world)
    scorer = LearnedReward(model, model.get_base_model().score, tokenizer, (EOS,), batch_size=2)
    texts = [tokenizer.apply_chat_template(c.as_dicts(), tokenize=False) for c in make_conversations()]
    rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    assert all(row[-1] == EOS for row in rows)
    assert_close(scorer.score(make_conversations()), compute_logits(model, rows), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="does not end with an answer"):
        scorer.score([Conversation((Message("user", "Hello?"),))])


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_training_reads_the_score_where_scoring_reads_it(world: World, tmp_path: Path, pad_token: str):
    """If pad is EOS, transformers' own pooling takes the token before the EOS that ends the answer."""
    tokenizer = load_tokenizer(world.base)
    tokenizer.pad_token = pad_token
    model = add_new_adapter(load_classifier(world.base, "qlora", CPU, FP32), Lora(4, 8), is_reward_model=True)
    add_noise(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL rounds them to bf16 before training
            parameter.data = parameter.data.bfloat16().float()
    rankings = [
        Ranking([[1, 40 + i, 41, EOS], [1, 50 + i, 7] if i else [1, 50, EOS]], [(0, 1)], [1.0]) for i in range(4)
    ]
    training = Training(
        lr=1e-2,
        epochs=1,
        batch_size=4,
        micro_batch=4,
        warmup=0.0,
        schedule="constant",
        max_grad_norm=1.0,
        save_every=100,
        gradient_checkpointing="false",
        seed=0,
    )
    arguments = training.arguments(tmp_path, CPU, FP32, 1)
    rows = [row for ranking in rankings for row in ranking.texts]
    scores = dict(zip(map(tuple, rows), score_rows(model, find_score_head(model), rows, PAD).tolist(), strict=True))
    before = find_score_head(model).weight.detach().clone()
    scores_in_training: dict[tuple[int, ...], float] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Tensor], output: Any) -> None:
        for ids, mask, logit in zip(kwargs["input_ids"], kwargs["attention_mask"], output.logits[:, 0], strict=True):
            scores_in_training[tuple(ids[mask.bool()].tolist())] = logit.item()

    model.register_forward_hook(note, with_kwargs=True)
    common.train(lambda: build_reward_trainer(model, tokenizer, rankings, arguments), model, TrainerCallback())
    assert scores_in_training == pytest.approx(scores, abs=1e-5)
    assert not torch.equal(find_score_head(model).weight, before)


def test_a_reward_model_starts_from_the_supervised_adapter(world: World):
    model = add_new_adapter(load_classifier(world.base, "qlora", CPU, FP32), Lora(4, 8), is_reward_model=True)
    assert copy_adapter_weights(model, world.init) == 28
    assert (find_score_head(model).weight == 0).all()
    init_tensors = load_file(world.init / WEIGHTS_FILE)
    tensors = dict(model.named_parameters())
    assert all(torch.equal(t, tensors[n.replace(".weight", ".default.weight")]) for n, t in init_tensors.items())


# The trap of repacked weights.


def test_evaluation_does_not_repack_the_base(world: World, rollout: Rollout, monkeypatch: pytest.MonkeyPatch):
    """The first evaluation forward on a CPU with AVX512-BF16 repacked the weights and made gradients wrong by 99.9 %.

    The test reports AVX512-BF16 for every CPU.
    """
    monkeypatch.setattr(bnb_modules, "has_avx512bf16", lambda: True)

    def compute_gradient(roles: Roles) -> Tensor:
        compute_losses(roles, rollout)
        return torch.cat([p.grad.flatten() for p in roles.parameters_of("policy") if p.grad is not None])

    used = world.roles()
    unused = world.roles()
    layers = [m for m in used.model.modules() if isinstance(m, bnb_modules.Linear4bit)]
    assert layers
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    HfEngine(STOPS, PAD, 4).generate(PROMPTS, used.actor("policy"), range(len(PROMPTS)))
    used.scores(rollout)
    used.values(rollout)
    assert torch.equal(compute_gradient(used), compute_gradient(unused))
    # The base weights equal those that were loaded.
    plain = used.model.unload().dequantize()
    fresh = world.load().dequantize()
    weights = dict(fresh.named_parameters())
    assert len(weights) > 14
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_module_called_value_is_no_adapter():
    """Attention of BERT-like models has one."""
    assert find_adapter_name("base_model.model.layer.0.attention.self.value.lora_A.policy.weight") == "policy"
    assert find_adapter_name("base_model.model.layer.0.attention.self.query.lora_B.value.weight") == "value"
    assert find_adapter_name("base_model.model.layer.0.attention.self.value.base_layer.weight") is None
