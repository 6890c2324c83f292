"""Loading folders of random weights in real architectures, and the errors of folders that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file

from align.core.errors import CorruptFile, InputError
from align.data.chat.encode import IGNORE_INDEX, EncodedRow
from align.evals.held_out import compute_held_out_loss
from align.models.base import find_base
from align.models.load import (
    choose_device,
    choose_dtype,
    get_context_length,
    load_base,
    load_classifier,
    load_tokenizer,
)

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Small windows, caps and scales, so that code that ignores them gets another loss.
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {"use_sliding_window": False},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 8, "final_logit_softcapping": 0.3, "query_pre_attn_scalar": 32},
    "Gemma3": {"sliding_window": 8, "query_pre_attn_scalar": 32},
    "Phi3": {},
}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a random model, saved at its first call."""
    import transformers

    folders: dict[str, Path] = {}

    def get_folder(name: str) -> Path:
        if name not in folders:
            torch.manual_seed(1)
            stem = f"{name}Text" if name == "Gemma3" else name
            config = getattr(transformers, f"{stem}Config")(**(SHAPE | ARCHITECTURES[name]))
            folders[name] = tmp_path_factory.mktemp("models") / name
            getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folders[name])
        return folders[name]

    return get_folder


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "mon modèle (1)"))


def find_base_at(folder: Path) -> Any:
    return find_base(path=str(folder))


def build_rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 24, 17, 11):
        ids = torch.randint(3, 320, (length,), generator=generator).tolist()
        rows.append(EncodedRow(ids, [IGNORE_INDEX if i < 3 else t for i, t in enumerate(ids)]))
    return rows


def compute_transformers_loss(model: Any, rows: list[EncodedRow]) -> float:
    """Compute the mean of the model's own loss over trained tokens, a row at a time."""
    total = count = 0
    for row in rows:
        tokens = torch.tensor([row.input_ids])
        with torch.no_grad():
            loss = model(input_ids=tokens, labels=torch.tensor([row.labels])).loss
        total = total + float(loss) * row.trained
        count = count + row.trained
    return total / count


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_load_and_their_loss_is_the_models_own(
    architecture: Callable[[str], Path], name: str, method: str
) -> None:
    model = load_base(find_base_at(architecture(name)), method, CPU, torch.float32)
    packed: list[Any] = [m for m in model.modules() if isinstance(m, Linear4bit)]
    plain = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not isinstance(m, Linear4bit)}
    if method == "qlora":
        assert plain == {"lm_head"}
        assert all(m.weight.quant_type == "nf4" and m.weight.quant_state.nested for m in packed)
    else:
        assert not packed
    assert all(m.support_avx512bf16_for_cpu is False for m in packed)
    assert {p.requires_grad for p in model.parameters()} == {method == "full"}
    assert not model.training

    rows = build_rows()
    loss = compute_held_out_loss(model, rows, pad_id=0, batch_size=3)
    assert loss.tokens == sum(r.trained for r in rows)
    assert loss.mean == pytest.approx(compute_transformers_loss(model, rows), abs=2e-5)
    assert loss.sizes == [r.trained for r in rows]  # in the order of the rows, however they are batched
    row_losses = [compute_held_out_loss(model, [row], pad_id=0).mean * row.trained for row in rows]
    assert loss.by_row == pytest.approx(row_losses, abs=1e-4)


def test_an_evaluation_forward_changes_neither_gradients_nor_weights(architecture: Callable[[str], Path]) -> None:
    """Bitsandbytes repacks a `Linear4bit` on some CPUs at its first evaluation forward unless this is disabled."""
    from bitsandbytes.functional import dequantize_4bit

    base = find_base_at(architecture("Llama"))
    tokens = torch.tensor([[5, 6, 7, 8]])
    used, fresh = (load_base(base, "qlora", CPU, torch.float32) for _ in range(2))
    with torch.no_grad():
        used(input_ids=tokens)
    gradients = []
    for model in (used, fresh):
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=tokens).loss.backward()
        gradients.append(embedded.grad)
    assert torch.equal(gradients[0], gradients[1])
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (used, fresh)]
    assert torch.equal(*(dequantize_4bit(w.data, w.quant_state) for w in weights))


def test_a_classifier_keeps_the_base_and_has_one_score(tiny_model: Path) -> None:
    base = find_base_at(tiny_model)
    scorer = load_classifier(base, "qlora", CPU, torch.float32)
    plain = load_base(base, "qlora", CPU, torch.float32)
    assert tuple(scorer.score.weight.shape) == (1, 64)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = [m.model(input_ids=tokens).last_hidden_state for m in (scorer, plain)]
    assert torch.equal(*hidden)


# Folders that cannot be loaded.


def get_refusal(kind: type[InputError], folder: Path, load: Callable[[Any], Any] | None = None) -> InputError:
    load = load or (lambda base: load_base(base, "lora", CPU, torch.float32))
    with pytest.raises(kind) as caught:
        load(find_base_at(folder))
    assert caught.value.exit_status == 2
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


@pytest.mark.parametrize("left", [0, 4, 2000, -1])
def test_truncated_weights_are_corrupt(copy: Path, left: int) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    error = get_refusal(CorruptFile, copy)
    assert "corrupt" in error.problem
    assert str(copy) in str(error)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    assert "does not load" in get_refusal(InputError, copy).problem


def test_folders_without_a_model(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in get_refusal(InputError, tmp_path / "empty").problem
    assert "no such folder" in get_refusal(InputError, tmp_path / "absent").problem
    (copy / "config.json").write_text("{")
    assert "not JSON" in get_refusal(CorruptFile, copy).problem


def test_an_unknown_architecture_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    assert "does not load" in get_refusal(InputError, copy).problem


def test_pickled_weights_are_never_read(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    error = get_refusal(InputError, copy)
    assert "no safetensors" in error.problem
    assert "pickled" in error.remedy


def test_a_missing_tokenizer_is_said(copy: Path) -> None:
    for path in (*copy.glob("tokenizer*"), *copy.glob("chat_template*")):
        path.unlink()
    assert "tokenizer" in get_refusal(InputError, copy, load_tokenizer).problem


def test_a_tokenizer_without_a_pad_token_gets_one(tiny_model: Path) -> None:
    assert load_tokenizer(find_base_at(tiny_model)).pad_token == "<pad>"


def test_a_tokenizer_may_pad_with_its_eos(copy: Path) -> None:
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(find_base_at(copy))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


# Identity.


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_digest_changes_with_any_byte_that_matters(copy: Path, tiny_model: Path, name: str) -> None:
    before = find_base_at(copy).digest
    assert before == find_base_at(tiny_model).digest  # the path does not matter
    (copy / "README.md").write_text("words")
    assert find_base_at(copy).digest == before
    raw = bytearray((copy / name).read_bytes())
    raw[-1:] = b" " if name != "model.safetensors" else bytes([raw[-1] ^ 1])
    (copy / name).write_bytes(raw if name != "config.json" else (copy / name).read_bytes() + b" ")
    assert find_base_at(copy).digest != before


# The hub.


@pytest.mark.parametrize(
    ("raised", "problem", "remedy"),
    [
        ("GatedRepoError", "gates", "hf auth login"),
        ("RepositoryNotFoundError", "no such repository", "Check the id"),
        ("LocalEntryNotFoundError", "cannot be reached", "give the folder"),
        ("HFValidationError", "neither a folder", "ORG/NAME"),
    ],
)
def test_what_the_hub_refuses_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, raised: str, problem: str, remedy: str
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot_download(*_: Any, **__: Any) -> str:
        kind = getattr(errors, raised)
        raise kind.__new__(kind, "no")  # some of them want a response that only the hub's client can make

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=problem) as caught:
        find_base(path="org/name")
    assert (caught.value.field, caught.value.value) == ("model.path", "org/name")
    assert remedy in caught.value.remedy


def test_a_proxy_that_refuses_is_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client raises its HTTP library's errors unchanged, and they are no OSError."""
    import httpx
    import huggingface_hub

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise httpx.ProxyError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"cannot be reached.*give the folder"):
        find_base(path="org/name")


def test_an_offline_hub_without_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable of that name, read at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be reached and no copy is cached.*give the folder"):
        find_base(path="org/surely-not-there")


def test_only_safetensors_and_text_are_downloaded(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    import huggingface_hub

    request: dict[str, Any] = {}

    def snapshot_download(repo: str, **more: Any) -> str:
        request.update(more, repo=repo)
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    base = find_base(path="org/name", revision="abc")
    assert (request["repo"], request["revision"], base.id) == ("org/name", "abc", "org/name")
    assert not any(pattern.endswith(("bin", "pt", "pth", "*", "py")) for pattern in request["allow_patterns"])


# Devices.


@pytest.mark.parametrize("native", [True, False])
def test_a_processor_that_would_crawl_in_bf16_is_named(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("align.models.load.has_bf16_products", lambda: native)
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert ("float32 is many times faster" in capsys.readouterr().out) is not native
    for dtype, device in (("auto", CPU), ("float32", CPU), ("bfloat16", torch.device("cuda"))):
        choose_dtype(dtype, device)
        assert capsys.readouterr().out == ""


def test_devices_and_dtypes() -> None:
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_device("cpu") == CPU
    with pytest.raises(InputError, match=r"device=quantum: is no device"):
        choose_device("quantum")
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU
        with pytest.raises(InputError, match="no CUDA device"):
            choose_device("cuda:0")


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 131_072, "rope_parameters": LONG}, 4096),
        ({"max_position_embeddings": 131_072, "rope_parameters": {"full_attention": LONG}}, 4096),
        (
            {
                "max_position_embeddings": 131_072,
                "original_max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "longrope"},
            },
            4096,
        ),
        ({"max_position_embeddings": 131_072, "rope_parameters": LONG | {"rope_type": "yarn"}}, 131_072),
        ({"max_position_embeddings": 131_072, "rope_parameters": {"rope_type": "default"}}, 131_072),
        ({"max_position_embeddings": 2000}, 2000),
        ({}, 2048),
    ],
)
def test_positions_end_where_a_rotary_embedding_changes_for_the_whole_row(config: dict[str, Any], positions: int):
    assert get_context_length(SimpleNamespace(config=SimpleNamespace(**config))) == positions
