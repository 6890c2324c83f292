"""Adapter pools: the adapter of a digest answers as it does by itself, and its weights never change."""

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
from tiny_roles import PAD, PROMPTS, STOPS, World
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
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters with different answers: the policy's initial adapter and two changed copies."""
    parent = tmp_path_factory.mktemp("adapters")
    roles = world.roles()
    paths = [world.init]
    for name in ("b", "c"):
        shake(roles.parameters_of("policy"))
        roles.actor("policy").save(parent / name, world.base)
        paths.append(parent / name)
    return paths


@torch.no_grad()
def shake(weights: list[Any]) -> None:
    for weight in weights:
        weight.add_(0.1 * torch.randn_like(weight))


def compute_logprobs(actor: Actor, rollout: Rollout) -> Tensor:
    with actor.use() as model, torch.no_grad():
        return compute_response_logprobs(model, rollout, 1.0)[0]


def generate_pool_answers(actor: Actor | list[Actor]) -> list[list[int]]:
    return extract_response_ids(ENGINE.generate(PROMPTS, actor, SEEDS))


def test_each_adapter_answers_as_it_does_alone_on_its_base(world: World, folders: list[Path]):
    pool = AdapterPool(world.load())
    digests = [pool.add(folder) for folder in folders]
    assert digests == [adapter_digest(folder) for folder in folders]
    all_answers = []
    for digest, folder in zip([*digests, None], [*folders, None], strict=True):
        single_model = world.load() if folder is None else PeftModel.from_pretrained(world.load(), str(folder)).eval()
        expected = generate_pool_answers(ModelActor(single_model, None if folder is None else "default"))
        rollout = ENGINE.generate(PROMPTS, pool.actor(digest), SEEDS)
        assert extract_response_ids(rollout) == expected
        torch.testing.assert_close(
            compute_logprobs(pool.actor(digest), rollout), rollout.logprobs_BT, rtol=1e-4, atol=1e-4
        )
        all_answers.append(expected)
    assert all(a != b for i, a in enumerate(all_answers) for b in all_answers[:i])


def test_each_row_is_answered_by_its_own_adapter(world: World, folders: list[Path]):
    """Rows of one call, in any order, get the answers that their adapter or the base gives by itself."""
    pool = AdapterPool(world.load())
    actors = [pool.actor(pool.add(folder)) for folder in folders]
    actors = [*actors, pool.actor()]
    single_answers = [generate_pool_answers(actor) for actor in actors]
    for shift in range(4):
        row_actors = [actors[(row * 3 + shift) % 4] for row in range(len(PROMPTS))]
        mixed = ENGINE.generate(PROMPTS, row_actors, SEEDS)
        assert extract_response_ids(mixed) == [
            single_answers[actors.index(actor)][row] for row, actor in enumerate(row_actors)
        ]
        assert mixed.logprobs_BT is not None
        for row, actor in enumerate(row_actors):
            expected = compute_logprobs(actor, mixed)[row]
            torch.testing.assert_close(mixed.logprobs_BT[row], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="2 actors for 6 prompts"):
        ENGINE.generate(PROMPTS, actors[:2], SEEDS)
    assert group_rows_by_actor([actors[1], actors[0], actors[1]], 3) == {actors[1]: [0, 2], actors[0]: [1]}


def test_who_is_not_in_the_pool_does_not_answer(world: World, folders: list[Path]):
    pool = AdapterPool(world.load())
    with pytest.raises(InputError, match=r"^adapter=abc: is not loaded\. Name one that is: none\."):
        pool.actor("abc")
    first, second = (pool.add(folder) for folder in folders[:2])
    removed_actor = pool.actor(first)
    loaded_actor = pool.actor(second)
    answers_before = generate_pool_answers(loaded_actor)
    pool.remove(first)
    for call in (lambda: generate_pool_answers(removed_actor), lambda: pool.actor(first), lambda: pool.remove(first)):
        with pytest.raises(InputError, match=rf"^adapter={first}: "):
            call()
    assert generate_pool_answers(loaded_actor) == answers_before
    with pytest.raises(InputError, match=f"^adapter={first}: "):  # rows of a loaded adapter do not hide the removed one
        generate_pool_answers([loaded_actor, removed_actor] * 3)
    pool.remove(second)
    base_answers = generate_pool_answers(ModelActor(world.load()))
    assert generate_pool_answers(pool.actor()) == base_answers != answers_before
    assert pool.add(folders[0]) == first
    assert generate_pool_answers(removed_actor) == generate_pool_answers(pool.actor(first)) != base_answers


def test_a_name_that_means_other_weights_by_now_is_another_adapter(
    world: World, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = shutil.copytree(folders[1], tmp_path / "production")
    pool = AdapterPool(world.load())
    old_actor = pool.actor(pool.add(folder))
    old_answers = generate_pool_answers(old_actor)
    reads: list[Path] = []
    attach = pool_module.attach_adapter
    monkeypatch.setattr(pool_module, "attach_adapter", lambda m, f, n, **k: reads.append(f) or attach(m, f, n, **k))
    assert pool.actor(pool.add(folder)) == old_actor
    assert pool.actor(pool.add(folders[1])) == old_actor
    assert not reads
    shutil.copytree(folders[2], folder, dirs_exist_ok=True)
    new_actor = pool.actor(pool.add(folder))
    assert new_actor != old_actor
    # A running request keeps the old adapter.
    assert generate_pool_answers(old_actor) == old_answers != generate_pool_answers(new_actor)


def test_files_that_change_while_they_are_read_are_not_taken(
    world: World, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter_folder = shutil.copytree(folders[1], tmp_path / "written")
    attach = pool_module.attach_adapter

    def attach_and_overwrite(model: Any, folder: Path, name: str, **options: Any) -> Any:
        model_with_adapter = attach(model, folder, name, **options)
        shutil.copytree(folders[2], folder, dirs_exist_ok=True)
        return model_with_adapter

    pool = AdapterPool(world.load())
    monkeypatch.setattr(pool_module, "attach_adapter", attach_and_overwrite)
    with pytest.raises(CorruptFile, match="changed while it was read"):
        pool.add(adapter_folder)
    monkeypatch.undo()
    for folder in folders[1:]:
        with pytest.raises(InputError, match="is not loaded"):
            pool.actor(adapter_digest(folder))
    assert pool.actor(pool.add(adapter_folder)).is_bare_base is False


def test_a_snapshot_is_what_the_policy_was_and_stays_so(world: World, tmp_path: Path):
    """Training changes no snapshot. Equal weights have one snapshot, however they were saved."""
    roles = world.roles()
    policy = roles.actor("policy")
    shake(roles.parameters_of("policy"))
    first_snapshot = save_snapshot(policy, world.base, tmp_path)
    assert save_snapshot(policy, world.base, tmp_path) == first_snapshot
    save_adapter(roles.model, tmp_path / "saved", world.base, "policy")
    assert first_snapshot.name == adapter_digest(first_snapshot) == adapter_digest(tmp_path / "saved")
    pool = AdapterPool(world.load())
    actor = pool.actor(pool.add(first_snapshot))
    policy_answers = generate_pool_answers(policy)
    assert generate_pool_answers(actor) == policy_answers
    shake(roles.parameters_of("policy"))
    assert generate_pool_answers(actor) == policy_answers != generate_pool_answers(policy)
    second_snapshot = save_snapshot(policy, world.base, tmp_path)
    assert second_snapshot != first_snapshot
    assert generate_pool_answers(pool.actor(pool.add(second_snapshot))) == generate_pool_answers(policy)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first_snapshot.name, second_snapshot.name, "saved"])


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
    base_answers = generate_pool_answers(ModelActor(world.load()))
    good_answers = generate_pool_answers(load_alone(world, folders[2]))
    for bad_folder in (stray, lacking, misfit):
        pool = AdapterPool(world.load())
        for _ in range(2):
            with pytest.raises(CorruptFile):
                pool.add(bad_folder)
            assert generate_pool_answers(pool.actor()) == base_answers
        good_actor = pool.actor(pool.add(folders[2]))
        with pytest.raises(CorruptFile):
            pool.add(bad_folder)
        assert generate_pool_answers(good_actor) == good_answers
        assert generate_pool_answers(pool.actor()) == base_answers
        assert len(pool.model.peft_config) == 1
        assert not any(p.requires_grad for p in pool.model.parameters())


def load_alone(world: World, folder: Path) -> Actor:
    """Load an adapter with PEFT on a base of its own."""
    return ModelActor(PeftModel.from_pretrained(world.load(), str(folder)).eval(), "default")


def test_each_thread_is_answered_by_whom_it_asked(world: World, folders: list[Path]):
    pool = AdapterPool(world.load())
    actors = [pool.actor(pool.add(folder)) for folder in folders[1:]] + [pool.actor()]
    rollout = ENGINE.generate(PROMPTS, actors[0], SEEDS)
    expected = [compute_logprobs(actor, rollout) for actor in actors]
    with ThreadPoolExecutor(3) as threads:
        matches = list(
            threads.map(lambda i: torch.equal(compute_logprobs(actors[i % 3], rollout), expected[i % 3]), range(60))
        )
    assert all(matches)


def test_a_whole_model_in_training_has_snapshots_too(world: World, tmp_path: Path):
    policy = world.load("full")
    roles = Roles(world.load("lora"), None, [world.reward], Lora(4, 8), "own", policy)
    actor = roles.actor("policy")
    first_snapshot = save_snapshot(actor, world.base, tmp_path)
    assert save_snapshot(actor, world.base, tmp_path) == first_snapshot
    shake(roles.parameters_of("policy"))
    second_snapshot = save_snapshot(actor, world.base, tmp_path)
    assert second_snapshot != first_snapshot
    saved_model = AutoModelForCausalLM.from_pretrained(second_snapshot)
    assert generate_pool_answers(ModelActor(saved_model.eval())) == generate_pool_answers(actor)


def test_several_that_write_one_snapshot_at_once_all_have_it(world: World, folders: list[Path], tmp_path: Path):
    actor = load_alone(world, folders[1])
    with ThreadPoolExecutor(8) as threads:
        snapshots = list(threads.map(lambda _: save_snapshot(actor, world.base, tmp_path), range(24)))
        assert len(set(snapshots)) == 1
        assert list(tmp_path.iterdir()) == [snapshots[0]]
        assert adapter_digest(snapshots[0]) == snapshots[0].name
        (snapshots[0] / WEIGHTS_FILE).write_bytes(b"cut")  # every thread sees the damaged file
        snapshots = list(threads.map(lambda _: save_snapshot(actor, world.base, tmp_path), range(24)))
    assert list(tmp_path.iterdir()) == [snapshots[0]]
    assert adapter_digest(snapshots[0]) == snapshots[0].name


def test_a_snapshot_that_a_crash_cut_is_written_anew(world: World, folders: list[Path], tmp_path: Path):
    actor = load_alone(world, folders[1])
    snapshot = save_snapshot(actor, world.base, tmp_path)
    (snapshot / WEIGHTS_FILE).write_bytes((snapshot / WEIGHTS_FILE).read_bytes()[:100])
    assert save_snapshot(actor, world.base, tmp_path) == snapshot
    assert adapter_digest(snapshot) == snapshot.name
    assert list(tmp_path.iterdir()) == [snapshot]


def test_a_snapshot_that_fails_leaves_nothing(world: World, tmp_path: Path):
    class Failing(ModelActor):
        def save(self, folder: Path, base: Any) -> None:
            (folder / "adapter_config.json").write_text("{")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space"):
        save_snapshot(Failing(None), world.base, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_promised_to_one_adapter_serves_no_other(world: World, folders: list[Path]):
    pool = AdapterPool(world.load(), is_only_adapter=True)
    assert pool.actor().is_bare_base
    digest = pool.add(folders[0])
    assert pool.add(folders[0]) == digest
    with pytest.raises(ValueError, match="loaded for one adapter only"):
        pool.add(folders[1])
    with pytest.raises(ValueError, match="the base cannot be used beside an adapter"):
        pool.actor()
    assert generate_pool_answers(pool.actor(digest)) == generate_pool_answers(load_alone(world, folders[0]))
