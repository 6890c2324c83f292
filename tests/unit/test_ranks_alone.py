"""Rank helpers tested in one process: checks of settings, exit statuses, error messages, a world size of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align import ranks
from align.__main__ import require_single_process
from align.cli import launch
from align.cli.launch import needs_ranks, report_failed_ranks
from align.config.export import ExportStageConfig
from align.config.ppo import PpoConfig
from align.config.root import Config, to_plain_dict
from align.config.sft import SftConfig
from align.config.training import require_divisible_batch
from align.core.errors import InputError
from align.ranks import LAUNCHED, RankFailed, split_into_buckets
from align.run import Base, Manifest, read_manifest
from align.run.folder import FollowerRun
from align.run.manifest import write_manifest


@pytest.mark.parametrize(
    ("batch", "micro", "world", "said"),
    [
        (16, 8, 2, None),
        (16, 4, 2, None),
        (16, 4, 4, None),
        (48, 8, 3, None),
        (16, 8, 3, "is not a multiple of the 3 ranks"),
        (16, 8, 4, "Use stage.micro_batch=4,"),
        (24, 8, 2, "Use stage.micro_batch=6,"),
        (14, 14, 2, "Use stage.micro_batch=7,"),
    ],
)
def test_a_step_is_divided_evenly(batch: int, micro: int, world: int, said: str | None):
    stage = SimpleNamespace(name="sft", batch_size=batch, micro_batch=micro)
    if said is None:
        require_divisible_batch(stage, world)
        return
    with pytest.raises(InputError, match=said):
        require_divisible_batch(stage, world)


def test_the_micro_batch_that_is_named_fits():
    for rows in range(1, 33):
        for micro in range(1, 33):
            for world in range(2, 6):
                stage = SimpleNamespace(name="sft", batch_size=rows, micro_batch=micro)
                try:
                    require_divisible_batch(stage, world)
                except InputError as error:
                    if error.field == "stage.micro_batch":
                        stage.micro_batch = int(error.remedy.partition("=")[2].partition(",")[0])
                        require_divisible_batch(stage, world)
                else:
                    assert rows % (min(micro, rows) * world) == 0


def test_ppo_divides_its_minibatches_and_one_process_anything():
    require_divisible_batch(PpoConfig(batch_size=64, minibatches=2, micro_batch=16), 2)
    with pytest.raises(InputError, match=r"the 32 rows .*stage\.batch_size / stage\.minibatches"):
        require_divisible_batch(PpoConfig(batch_size=64, minibatches=2, micro_batch=32), 2)
    require_divisible_batch(PpoConfig(batch_size=64, minibatches=2, micro_batch=32), 1)
    require_divisible_batch(SftConfig(batch_size=15, micro_batch=15), 1)


def make_failure(exitcode: int) -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode)


@pytest.mark.parametrize(
    ("codes", "spoken", "status", "said"),
    [
        ({1: 2}, "2", 2, ""),  # the rank has printed its error
        ({0: 1, 1: 2}, "2", 2, ""),
        (
            {1: -9},
            "",
            1,
            "align: rank 1 died (SIGKILL); its last position: update 7. Run the same command again to continue",
        ),
        ({0: -15, 1: -9}, "", 1, "align: rank 1 died (SIGKILL)"),  # rank 0 was terminated by the launcher
        ({0: -15, 1: 2}, "2", 2, ""),
        ({0: -11}, "", 1, "align: rank 0 died (SIGSEGV); its last position: before it started."),
        ({0: -70}, "", 1, "align: rank 0 died (signal 70)"),
        ({1: 130}, "", 130, "align: interrupted;"),
        ({1: 1}, "1", 1, ""),
    ],
)
def test_the_status_of_a_command(
    codes: dict[int, int], spoken: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "rank-1").write_text("update 7")
    if spoken:
        (tmp_path / ranks.SPOKEN).write_text(spoken)
    assert report_failed_ranks({rank: make_failure(code) for rank, code in codes.items()}, tmp_path) == status
    err = capsys.readouterr().err
    assert err.startswith(said) if said else err == ""


def test_why_a_killed_run_ended_is_written_into_its_manifest(tmp_path: Path):
    run = tmp_path / "x"
    run.mkdir()
    write_manifest(run, Manifest("sft", "x", 0, to_plain_dict(Config(stage=SftConfig())), {}, None, status="running"))
    (tmp_path / ranks.RUN).write_text(str(run))
    assert report_failed_ranks({0: make_failure(-9)}, tmp_path) == 1
    assert read_manifest(run).error.startswith("rank 0 died (SIGKILL)")
    write_manifest(
        run,
        Manifest(
            "sft", "x", 0, to_plain_dict(Config(stage=SftConfig())), {}, None, status="done", times={"finished": "x"}
        ),
    )
    assert report_failed_ranks({0: make_failure(-9)}, tmp_path) == 1
    assert read_manifest(run).status == "done"


@pytest.mark.parametrize(
    ("text", "late"),
    [
        ("[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242", False),
        ("Connection reset by peer", False),
        ("[...] Timed out waiting 4000ms for recv operation to complete", True),
        ("Watchdog caught collective operation timeout", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", None),
    ],
)
def test_what_an_error_of_a_message_means(text: str, late: bool | None):
    rank_lost = ranks.to_rank_lost(RuntimeError(text))
    assert (rank_lost and rank_lost.late) is late
    assert ranks.to_rank_lost(ValueError(text)) is None


def test_a_process_that_is_alone_does_nothing():
    assert (ranks.rank(), ranks.world_size(), ranks.local_rank(), ranks.is_alone(), ranks.is_main()) == (
        0,
        1,
        0,
        True,
        True,
    )
    assert ranks.select_own_share([1, 2, 3]) == ranks.gather_shares([1, 2, 3], 3) == [1, 2, 3]
    assert ranks.broadcast("x") == "x"
    assert ranks.gather_all("x") == ["x"]
    grad = torch.ones(2)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = grad
    ranks.sum_gradients([parameter])
    assert parameter.grad is grad
    error = RuntimeError("Connection closed by peer")
    assert ranks.find_first_cause(error) is error
    assert ranks.should_print_error(RankFailed("x", 2))
    ranks.record_position("nowhere")
    ranks.init_group("cpu", 1.0)
    ranks.destroy_group()


def test_no_torch_is_imported_for_ranks_that_there_are_not():
    code = (
        "import sys; from align import ranks; from align.cli import launch; "
        "ranks.connect(); ranks.init_group(); print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_half_an_environment_starts_no_ranks(given: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert ranks.read_launched_world_size() == 1


def test_a_rank_of_a_launcher_refuses_what_does_not_fit_the_launcher(monkeypatch: pytest.MonkeyPatch):
    for name, value in zip(LAUNCHED, ("0", "2", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    stage = SftConfig(batch_size=8, micro_batch=4)
    assert not needs_ranks(Config(stage=stage, devices=2))
    with pytest.raises(InputError, match="devices=3: a launcher has started 2 ranks on this machine"):
        needs_ranks(Config(stage=stage, devices=3))
    with pytest.raises(InputError, match="stage=export: works in one process, and 2 ranks are to run it"):
        needs_ranks(Config(stage=ExportStageConfig()))
    with pytest.raises(InputError, match="argument=--multirun: works in one process, and a launcher has started 2"):
        require_single_process("argument", "--multirun")


def test_other_machines_are_known_by_torchruns_variable(monkeypatch: pytest.MonkeyPatch):
    for value, several in ((None, False), ("1", False), ("1:1", False), ("2", True), ("1:4", True)):
        if value is None:
            monkeypatch.delenv(launch.NODES, raising=False)
        else:
            monkeypatch.setenv(launch.NODES, value)
        assert launch.is_multi_machine() is several


def test_gradients_travel_in_buckets_of_one_dtype(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "BUCKET", 10)
    sizes = [(4, torch.float32), (4, torch.float32), (4, torch.float32), (2, torch.bfloat16), (30, torch.bfloat16)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    buckets = list(split_into_buckets(tensors))
    assert [[tensor.numel() for tensor in bucket] for bucket in buckets] == [[4, 4], [4], [2], [30]]
    assert [tensor.data_ptr() for bucket in buckets for tensor in bucket] == [tensor.data_ptr() for tensor in tensors]


def test_what_follows_writes_nowhere_but_into_a_folder_that_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ranks.NOTES, str(tmp_path / "notes"))
    (tmp_path / "notes").mkdir()
    shared = tmp_path / "run"
    shared.mkdir()
    manifest = Manifest("sft", "x", 0, {"stage": {"name": "sft"}}, {}, Base("b", "/b", None, "d"))
    with FollowerRun(shared, manifest, resumed=True) as run:
        assert run.shared == shared
        assert (run.name, run.base.id, run.resumed) == ("x", "b", True)
        (run.artifact / "x").write_text("x")
        (run.checkpoints / "x").write_text("x")
        run.begin("x")
        run.fail(ValueError("x"))
        run.publish({})
        assert run.folder.parent == tmp_path / "notes"
    assert [path.name for path in (tmp_path / "notes").iterdir()] == [ranks.RUN]  # for the launcher
    assert not list(shared.iterdir())


def test_a_rank_number_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch):
    for name, value in zip(LAUNCHED, ("0", "two", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="WORLD_SIZE=two"):
        ranks.read_launched_world_size()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("2", "-1", "x", ""):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InputError, match="is no number from 0 to 1"):
            ranks.read_launched_world_size()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"PET_NNODES": "two"}, "PET_NNODES=two: is no number of machines"),
        ({"PET_NNODES": "2"}, r"PET_MASTER_ADDR=\(not set\): no rendezvous address is set for 2 machines"),
        ({"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d"}, r"PET_RDZV_ENDPOINT=\(not set\): is no HOST:PORT"),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "here"}, "PET_RDZV_ENDPOINT=here: is no HOST:PORT"),
    ],
)
def test_machines_that_cannot_meet_are_refused_before_torch(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        launch.require_machine_settings()
    for name, value in {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "[::1]:29400"}.items():
        monkeypatch.setenv(name, value)
    launch.require_machine_settings()
