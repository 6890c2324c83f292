"""Adapters by digest: what answers is what was asked for, whatever else is in the pool, and is never changed."""

from __future__ import annotations

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_roles import PAD, PROMPTS, STOPS, World, make_world
from torch import Tensor
from transformers import AutoModelForCausalLM

from align.core.errors import CorruptFile, InputError, StorageError
from align.core.types import Rollout
from align.models import actors as pool_module
from align.models.actors import Actor, AdapterPool, ModelActor, save_snapshot
from align.models.adapters import WEIGHTS_FILE, save_adapter
from align.models.forward import compute_response_logprobs
from align.models.lora import Lora
from align.models.roles import Roles
from align.rollout.engine import extract_response_ids, group_rows_by_actor
from align.rollout.hf import HfEngine
from align.run.weights import adapter_digest

ENGINE = HfEngine(STOPS, PAD, 8)
SEEDS = range(len(PROMPTS))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters that say different things; they lie on top of what the policy starts from."""
    into = tmp_path_factory.mktemp("adapters")
    roles, made = world.roles(), [world.init]
    for name in ("b", "c"):
        shake(roles.parameters_of("policy"))
        roles.actor("policy").save(into / name, world.base)
        made.append(into / name)
    return made


@torch.no_grad()
def shake(weights: list[Any]) -> None:
    for weight in weights:
        weight.add_(0.1 * torch.randn_like(weight))


def logprobs(actor: Actor, rollout: Rollout) -> Tensor:
    with actor.use() as model, torch.no_grad():
        return compute_response_logprobs(model, rollout, 1.0)[0]


def answers(actor: Actor | list[Actor]) -> list[list[int]]:
    return extract_response_ids(ENGINE.generate(PROMPTS, actor, SEEDS))


def test_each_adapter_answers_as_it_does_alone_on_its_base(world: World, folders: list[Path]):
    pool = AdapterPool(world.load())
    digests = [pool.add(folder) for folder in folders]
    assert digests == [adapter_digest(folder) for folder in folders]
    said = []
    for digest, folder in zip([*digests, None], [*folders, None], strict=True):
        alone = world.load() if folder is None else PeftModel.from_pretrained(world.load(), str(folder)).eval()
        expected = answers(ModelActor(alone, None if folder is None else "default"))
        rollout = ENGINE.generate(PROMPTS, pool.actor(digest), SEEDS)
        assert extract_response_ids(rollout) == expected
        torch.testing.assert_close(logprobs(pool.actor(digest), rollout), rollout.logprobs_BT, rtol=1e-4, atol=1e-4)
        said.append(expected)
    assert all(a != b for i, a in enumerate(said) for b in said[:i])


def test_each_row_is_answered_by_its_own_adapter(world: World, folders: list[Path]):
    """In one call, in any order, an adapter and the base among them: row by row what each says by itself."""
    pool = AdapterPool(world.load())
    actors = [pool.actor(pool.add(folder)) for folder in folders]
    actors = [*actors, pool.actor()]
    alone = [answers(actor) for actor in actors]
    for shift in range(4):
        chosen = [actors[(row * 3 + shift) % 4] for row in range(len(PROMPTS))]
        mixed = ENGINE.generate(PROMPTS, chosen, SEEDS)
        assert extract_response_ids(mixed) == [alone[actors.index(actor)][row] for row, actor in enumerate(chosen)]
        assert mixed.logprobs_BT is not None
        for row, actor in enumerate(chosen):
            expected = logprobs(actor, mixed)[row]
            torch.testing.assert_close(mixed.logprobs_BT[row], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="2 actors for 6 prompts"):
        ENGINE.generate(PROMPTS, actors[:2], SEEDS)
    assert group_rows_by_actor([actors[1], actors[0], actors[1]], 3) == {actors[1]: [0, 2], actors[0]: [1]}


def test_who_is_not_in_the_pool_does_not_answer(world: World, folders: list[Path]):
    pool = AdapterPool(world.load())
    with pytest.raises(InputError, match=r"^adapter=abc: is not loaded\. Name one that is: none\."):
        pool.actor("abc")
    first, second = (pool.add(folder) for folder in folders[:2])
    gone, kept = pool.actor(first), pool.actor(second)
    before = answers(kept)
    pool.remove(first)
    for ask in (lambda: answers(gone), lambda: pool.actor(first), lambda: pool.remove(first)):
        with pytest.raises(InputError, match=rf"^adapter={first}: "):
            ask()
    assert answers(kept) == before
    with pytest.raises(InputError, match=f"^adapter={first}: "):  # nor do the rows beside it cover for it
        answers([kept, gone] * 3)
    pool.remove(second)
    base = answers(ModelActor(world.load()))
    assert answers(pool.actor()) == base != before
    assert pool.add(folders[0]) == first
    assert answers(gone) == answers(pool.actor(first)) != base


def test_a_name_that_means_other_weights_by_now_is_another_adapter(
    world: World, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = shutil.copytree(folders[1], tmp_path / "production")
    pool = AdapterPool(world.load())
    old = pool.actor(pool.add(place))
    said = answers(old)
    reads: list[Path] = []
    attach = pool_module.attach
    monkeypatch.setattr(pool_module, "attach", lambda m, f, n, **k: reads.append(f) or attach(m, f, n, **k))
    assert pool.actor(pool.add(place)) == old
    assert pool.actor(pool.add(folders[1])) == old
    assert not reads
    shutil.copytree(folders[2], place, dirs_exist_ok=True)
    new = pool.actor(pool.add(place))
    assert new != old
    assert answers(old) == said != answers(new)  # what is in flight goes on with the old one


def test_files_that_change_while_they_are_read_are_not_taken(
    world: World, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = shutil.copytree(folders[1], tmp_path / "written")
    attach = pool_module.attach

    def written_meanwhile(model: Any, folder: Path, name: str, **options: Any) -> Any:
        made = attach(model, folder, name, **options)
        shutil.copytree(folders[2], folder, dirs_exist_ok=True)
        return made

    pool = AdapterPool(world.load())
    monkeypatch.setattr(pool_module, "attach", written_meanwhile)
    with pytest.raises(CorruptFile, match="changed while it was read"):
        pool.add(place)
    monkeypatch.undo()
    for folder in folders[1:]:
        with pytest.raises(InputError, match="is not loaded"):
            pool.actor(adapter_digest(folder))
    assert pool.actor(pool.add(place)).base_alone is False


def test_a_snapshot_is_what_the_policy_was_and_stays_so(world: World, tmp_path: Path):
    """Training goes on outside; the same weights are one snapshot, whoever saved them."""
    roles = world.roles()
    policy = roles.actor("policy")
    shake(roles.parameters_of("policy"))
    first = save_snapshot(policy, world.base, tmp_path)
    assert save_snapshot(policy, world.base, tmp_path) == first
    save_adapter(roles.model, tmp_path / "saved", world.base, "policy")
    assert first.name == adapter_digest(first) == adapter_digest(tmp_path / "saved")
    pool = AdapterPool(world.load())
    actor = pool.actor(pool.add(first))
    said = answers(policy)
    assert answers(actor) == said
    shake(roles.parameters_of("policy"))
    assert answers(actor) == said != answers(policy)
    second = save_snapshot(policy, world.base, tmp_path)
    assert second != first
    assert answers(pool.actor(pool.add(second))) == answers(policy)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first.name, second.name, "saved"])


def test_a_refused_adapter_leaves_the_base_and_the_others_as_they_were(
    world: World, folders: list[Path], tmp_path: Path
):
    """PEFT puts its layers into the base before it looks at the tensors."""
    stray, lacking, misfit = (shutil.copytree(folders[1], tmp_path / name) for name in ("stray", "lacking", "misfit"))
    tensors = load_file(folders[1] / WEIGHTS_FILE)
    name = next(iter(tensors))
    save_file(tensors | {"base_model.model.score.weight": torch.ones(1, 64)}, stray / WEIGHTS_FILE)
    save_file({k: v for k, v in tensors.items() if k != name}, lacking / WEIGHTS_FILE)
    save_file(tensors | {name: torch.ones(3, 5)}, misfit / WEIGHTS_FILE)
    base, good = answers(ModelActor(world.load())), answers(alone(world, folders[2]))
    for refused in (stray, lacking, misfit):
        pool = AdapterPool(world.load())
        for _ in range(2):
            with pytest.raises(CorruptFile):
                pool.add(refused)
            assert answers(pool.actor()) == base
        kept = pool.actor(pool.add(folders[2]))
        with pytest.raises(CorruptFile):
            pool.add(refused)
        assert answers(kept) == good
        assert answers(pool.actor()) == base
        assert len(pool.model.peft_config) == 1
        assert not any(p.requires_grad for p in pool.model.parameters())


def alone(world: World, folder: Path) -> Actor:
    """An adapter with a base of its own, as PEFT loads it."""
    return ModelActor(PeftModel.from_pretrained(world.load(), str(folder)).eval(), "default")


def test_each_thread_is_answered_by_whom_it_asked(world: World, folders: list[Path]):
    pool = AdapterPool(world.load())
    actors = [pool.actor(pool.add(folder)) for folder in folders[1:]] + [pool.actor()]
    rollout = ENGINE.generate(PROMPTS, actors[0], SEEDS)
    expected = [logprobs(actor, rollout) for actor in actors]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda i: torch.equal(logprobs(actors[i % 3], rollout), expected[i % 3]), range(60)))
    assert all(found)


def test_a_whole_model_in_training_has_snapshots_too(world: World, tmp_path: Path):
    policy = world.load("full")
    roles = Roles(world.load("lora"), None, [world.reward], Lora(4, 8), "own", policy)
    actor = roles.actor("policy")
    first = save_snapshot(actor, world.base, tmp_path)
    assert save_snapshot(actor, world.base, tmp_path) == first
    shake(roles.parameters_of("policy"))
    second = save_snapshot(actor, world.base, tmp_path)
    assert second != first
    loaded = AutoModelForCausalLM.from_pretrained(second)
    assert answers(ModelActor(loaded.eval())) == answers(actor)


def test_several_that_write_one_snapshot_at_once_all_have_it(world: World, folders: list[Path], tmp_path: Path):
    actor = alone(world, folders[1])
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: save_snapshot(actor, world.base, tmp_path), range(24)))
        assert len(set(made)) == 1
        assert list(tmp_path.iterdir()) == [made[0]]
        assert adapter_digest(made[0]) == made[0].name
        (made[0] / WEIGHTS_FILE).write_bytes(b"cut")  # and all of them find it so
        made = list(threads.map(lambda _: save_snapshot(actor, world.base, tmp_path), range(24)))
    assert list(tmp_path.iterdir()) == [made[0]]
    assert adapter_digest(made[0]) == made[0].name


def test_a_snapshot_that_a_crash_cut_is_written_anew(world: World, folders: list[Path], tmp_path: Path):
    actor = alone(world, folders[1])
    made = save_snapshot(actor, world.base, tmp_path)
    (made / WEIGHTS_FILE).write_bytes((made / WEIGHTS_FILE).read_bytes()[:100])
    assert save_snapshot(actor, world.base, tmp_path) == made
    assert adapter_digest(made) == made.name
    assert list(tmp_path.iterdir()) == [made]


def test_a_snapshot_that_fails_leaves_nothing(world: World, tmp_path: Path):
    class Failing(ModelActor):
        def save(self, folder: Path, base: Any) -> None:
            (folder / "adapter_config.json").write_text("{")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space"):
        save_snapshot(Failing(None), world.base, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_promised_to_one_adapter_serves_no_other(world: World, folders: list[Path]):
    pool = AdapterPool(world.load(), alone=True)
    assert pool.actor().base_alone
    digest = pool.add(folders[0])
    assert pool.add(folders[0]) == digest
    with pytest.raises(ValueError, match="promised to one adapter alone"):
        pool.add(folders[1])
    with pytest.raises(ValueError, match="the base by itself is not asked"):
        pool.actor()
    assert answers(pool.actor(digest)) == answers(alone(world, folders[0]))
