"""Files of weights: what is read, and what is refused without running anything in it."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from textok_fast import InputError
from textok_fast.interop import read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("nest", ["", "ema", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod."])
def test_nests_and_wrappers_come_off(tmp_path: Path, nest: str, prefix: str) -> None:
    state: Any = {prefix + key: value for key, value in STATE.items()}
    if nest:
        state = {nest: state, "epoch": 3, "opt": {"lr": 1e-4}}
    torch.save(state, tmp_path / "model.pt")
    assert same(read_weights(tmp_path / "model.pt").state) and same(read_weights(state).state)


def test_ema_comes_before_the_model(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}, tmp_path / "checkpoint.ckpt")
    assert read_weights(tmp_path / "checkpoint.ckpt").state["w"] == 1


@pytest.mark.parametrize("ema", [{}, {"step": 3, "decay": 0.999}, None])
def test_an_average_without_tensors_is_passed_over(tmp_path: Path, ema: Any) -> None:
    torch.save({"ema": ema, "model": STATE}, tmp_path / "checkpoint.pt")
    assert same(read_weights(tmp_path / "checkpoint.pt").state)


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"])
def test_several_files_with_an_index(tmp_path: Path, name: str) -> None:
    stem, suffix = name.split(".")
    places = {key: f"{stem}-0000{number}-of-00002.{suffix}" for number, key in enumerate(STATE, start=1)}
    for key, file in places.items():
        (save_file if suffix == "safetensors" else torch.save)({key: STATE[key]}, tmp_path / file)
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "config.json").write_text('{"sample_size": 8}')
    for source in (tmp_path, index):
        found = read_weights(source)
        assert same(found.state) and found.config == {"sample_size": 8}
    for changed, message in (
        ({**places, "more": places["a.bias"]}, "no file has more, which"),
        ({**places, "a.bias": "gone.bin"}, "lacks gone.bin, which"),
        ({**places, "a.bias": "../outside.bin"}, "names '../outside.bin', which is no file beside it"),
        ({**places, "a.bias": 3}, "does not say in which file|names 3, which is no file"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path)
    index.write_text("<html>")
    with pytest.raises(InputError, match="does not say in which file each tensor is"):
        read_weights(tmp_path)


def test_a_configuration_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(InputError, match=r"cannot read .*config.json, which is beside the weights: it is a web page"):
        read_weights(tmp_path)


def test_a_pipeline_of_our_own_names_its_part(tmp_path: Path) -> None:
    (tmp_path / "generator").mkdir()
    (tmp_path / "pipeline.json").write_text("{}")
    with pytest.raises(InputError, match="is a pipeline of this library: name one of its parts, such as .*/generator"):
        read_weights(tmp_path)


def test_directories_and_their_configuration(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"sample_size": 8}')
    found = read_weights(tmp_path)
    assert same(found.state) and found.config == {"sample_size": 8} and found.source.endswith("model.safetensors")
    torch.save(STATE, tmp_path / "other.pt")
    assert same(read_weights(tmp_path).state)  # the usual name first
    (tmp_path / "model.safetensors").unlink()
    assert same(read_weights(tmp_path).state)
    torch.save(STATE, tmp_path / "third.pt")
    with pytest.raises(InputError, match=r"found 2 of them \(other.pt, third.pt\): name one"):
        read_weights(tmp_path)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, old: bool) -> None:
    mark = tmp_path / "it-ran"
    torch.save({"a": torch.ones(1), "b": Bomb(mark)}, tmp_path / "model.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(InputError, match="something else than tensors, and nothing of it was run"):
        read_weights(tmp_path / "model.pt")
    assert not mark.exists()


def test_files_that_are_not_what_they_claim(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    torch.save(STATE, tmp_path / "whole.pt")
    save_file(STATE, tmp_path / "whole.safetensors")
    whole = {suffix: (tmp_path / f"whole.{suffix}").read_bytes() for suffix in ("pt", "safetensors")}
    page = b"<!DOCTYPE html><html>Sign in</html>"
    program = torch.jit.script(torch.nn.Linear(2, 2))
    program.save(str(tmp_path / "program.pt"))  # type: ignore[no-untyped-call]
    for path, message in (
        (write("page.pt", page), "it is a web page"),
        (write("marked.pt", b"\xef\xbb\xbf" + page), "it is a web page"),
        (write("head.pt", b"\n <head><title>Sign in</title>"), "it is a web page"),
        (write("answer.pt", b'{"error": "Unauthorized"}'), 'it is JSON, such as a server.s answer: {"error": "Unauthorized"}'),
        (write("raw.pt", pickle.dumps({"a": 1})), r"(?!.*weights_only).*nothing of it was run: it is no pickle of tensors"),
        (tmp_path / "program.pt", r"(?!.*weights_only).*it is a TorchScript program, which is not run"),
        (write("page.safetensors", page), "it is a web page"),
        (write("pointer.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "pointer of Git LFS"),
        (write("empty.pt", b""), "it is empty"),
        (write("empty.safetensors", b""), "it is empty"),
        (write("short.pt", whole["pt"][: len(whole["pt"]) // 2]), "is no file of torch.save"),
        (write("short.safetensors", whole["safetensors"][:-5]), "is no safetensors file"),
        (write("model.h5", b"x"), "wanted a .safetensors file"),
    ):
        with pytest.raises(InputError, match=message):
            read_weights(path)
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "not a model")
    with pytest.raises(InputError, match="is no file of torch.save"):
        read_weights(tmp_path / "archive.pt")
    for number, (content, message) in enumerate(
        (([1, 2], "holds a list"), ({"step": 3}, "no tensors by name; its entries: step"))
    ):
        torch.save(content, tmp_path / f"odd{number}.pt")
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path / f"odd{number}.pt")


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository, a folder of it, one file with the configuration beside it, one file without."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[str] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path / repository)

    def hf_hub_download(repository: str, name: str) -> str:
        if not (tmp_path / repository / name).exists():
            raise EntryNotFoundError(f"no {name}")
        asked.append(name)
        return str(tmp_path / repository / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    folder = tmp_path / "owner" / "name" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"sample_size": 8}')
    save_file({"weight": torch.ones(2)}, folder / "diffusion_pytorch_model.safetensors")
    torch.save({"weight": torch.zeros(2)}, folder.parent / "plain.pt")

    found = read_weights("owner/name/transformer")
    assert found.config == {"sample_size": 8} and asked[1] == "transformer/*.safetensors"
    asked.clear()
    found = read_weights("owner/name/transformer/diffusion_pytorch_model.safetensors")
    assert found.config == {"sample_size": 8} and asked[1] == "transformer/config.json"
    found = read_weights("owner/name/plain.pt")
    assert found.config == {} and not found.state["weight"].any()
    save_file({"weight": torch.ones(3)}, folder.parent / "model.safetensors")
    asked.clear()
    assert read_weights("owner/name").state["weight"].shape == (3,)
    files = ["config.json", "*.safetensors", "*.bin", "*.index.json", "model_index.json", "*/config.json"]
    assert asked == [*files, "scheduler/scheduler_config.json"]
    asked.clear()
    read_weights("owner/name/transformer")  # of a pipeline, which says how it was trained
    assert asked[-2:] == ["model_index.json", "scheduler/scheduler_config.json"]
    (folder.parent / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="owner/name is a pipeline of diffusers: name one of its parts, such as owner/name/tr"):
        read_weights("owner/name")


def test_a_training_checkpoint_with_its_arguments(tmp_path: Path) -> None:
    torch.save({"ema": STATE, "args": argparse.Namespace(model="DiT-XL/2")}, tmp_path / "0400000.pt")
    assert same(read_weights(tmp_path / "0400000.pt").state)


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no weights at /nowhere"):
        read_weights("/nowhere/model.pt")
    with pytest.raises(InputError, match="found none"):
        read_weights(tmp_path)
    for name in ("a/b/c/../d.pt", "a/..", "a/b//c.pt", "../a/b", "./a/b"):
        with pytest.raises(InputError, match="wanted a file, a directory, or a Hub id"):
            read_weights(name)
    for name in ("nobody/no-such-model", "nobody/no-such-model/weights.pt"):
        with pytest.raises(InputError, match="the Hub has none or cannot be reached"):
            read_weights(name)
