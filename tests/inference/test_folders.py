from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from textok_fast import DiT, DiTConfig, InputError, TexTok
from textok_fast.data import load_dataset, write_shards
from textok_fast.data.files import FileDataset
from textok_fast.inference import Plan
from textok_fast.inference.folders import decode_folder, encode_folder, sample_to_folder

Make = Callable[..., TexTok]
Format = Literal["safetensors", "webdataset"]
FORMATS: list[Format] = ["safetensors", "webdataset"]


@pytest.fixture
def model(make_tokenizer: Make, loads_fake_text: Any, tmp_path: Path) -> str:
    return str(make_tokenizer(bottleneck="vq").save_pretrained(tmp_path / "model"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven captioned pictures, one of them in a subfolder, beside three that cannot be used."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(7):
        place = folder / "sub" if i == 6 else folder
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"picture.{i}.png")
        (place / f"picture.{i}.txt").write_text(f"caption number {i}")
    (folder / "corrupt.png").write_bytes(b"\x89PNG not really")
    (folder / "corrupt.txt").write_text("a caption")
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(folder / f"{name}.png")
    (folder / "b.txt").write_text("  \n")
    return folder


def read(out: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in out.glob("*.png")}


@pytest.mark.parametrize("format", FORMATS)
def test_a_tokenizer_without_text_takes_pictures_without_captions(
    make_tokenizer: Make, pictures: Path, tmp_path: Path, format: Format
) -> None:
    tokenizer = make_tokenizer(text="none")
    model = str(tokenizer.save_pretrained(tmp_path / "plain"))
    report = encode_folder(model, str(pictures), tmp_path / "tokens", format)
    assert report["pictures"] == 9 and report["skipped"] == {"corrupt image": 1}  # those with captions, and two without
    assert decode_folder(model, tmp_path / "tokens", tmp_path / "back")["new"] == 9
    found = read(tmp_path / "back")
    picture = torch.from_numpy(np.array(Image.open(pictures / "a.png"))).unsqueeze(0)
    wanted = tokenizer.decode(tokenizer.encode(picture), output="uint8")[0].numpy()
    assert np.array_equal(found["a.png"], wanted)
    for file in pictures.rglob("*.txt"):
        file.unlink()
    (pictures / "captions.jsonl").write_text('{"file_name": "a.png", "caption": "", "label": "7"}\n')
    assert encode_folder(model, str(pictures), tmp_path / "listed", format)["pictures"] == 9  # those that are not listed too
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(pictures / "a.png", "a.png")
    assert encode_folder(model, str(tmp_path / "shard.tar"), tmp_path / "of-shard", format)["pictures"] == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_becomes_tokens_and_comes_back(model: str, pictures: Path, tmp_path: Path, format: Format) -> None:
    seen: list[tuple[int, int]] = []
    report = encode_folder(
        model, str(pictures), tmp_path / "tokens", format, 2, 3, progress=lambda done, total: seen.append((done, total))
    )
    assert (report["pictures"], report["tokens"], report["shards_reused"]) == (7, [3, 4], 0)
    assert sum(report["skipped"].values()) == 3
    assert report["skipped"]["missing caption"] == 2
    assert seen[-1] == (7, 7)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    back = decode_folder(model, tmp_path / "tokens", tmp_path / "back", batch_size=2)
    assert (back["pictures"], back["new"]) == (7, 7)
    found = read(tmp_path / "back")
    assert len(found) == 7
    # Each file is what the tokenizer itself makes of its picture and caption, whatever the batch.
    tokenizer = TexTok.from_pretrained(model)
    wanted = []
    for i in range(7):
        picture = Image.open(next(pictures.rglob(f"picture.{i}.png")))
        tokens = tokenizer.encode(picture, [f"caption number {i}"])
        wanted.append(tokenizer.decode(tokens, [f"caption number {i}"], output="uint8")[0].numpy())
    for picture in wanted:
        assert min(int(np.abs(picture.astype(int) - other).max()) for other in found.values()) <= 1


@pytest.mark.parametrize("format", FORMATS)
def test_each_caption_has_its_tokens_and_the_first_is_decoded(
    model: str, pictures: Path, tmp_path: Path, format: Format
) -> None:
    for i in range(7):
        file = next(pictures.rglob(f"picture.{i}.txt"))
        file.write_text(f"caption number {i}\nanother of {i}\n" if i % 2 else f"caption number {i}")
    report = encode_folder(model, str(pictures), tmp_path / "all", format, 2, 3)
    assert report["pictures"] == 7
    with pytest.raises(InputError, match="captions differ"):
        encode_folder(model, str(pictures), tmp_path / "all", format, 2, 3, captions=1)
    encode_folder(model, str(pictures), tmp_path / "first", format, 2, 3, captions=1)
    for name in ("all", "first"):
        assert decode_folder(model, tmp_path / name, tmp_path / f"{name}-back", batch_size=2)["new"] == 7
    first, every = read(tmp_path / "first-back"), read(tmp_path / "all-back")
    assert first.keys() == every.keys() and all(np.array_equal(first[name], every[name]) for name in first)
    if format == "webdataset":
        members: dict[str, bytes] = {}
        for path in sorted((tmp_path / "all").glob("*.tar")):
            with tarfile.open(path) as archive:
                members |= {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        told = {name[:-4]: text.decode().split("\n") for name, text in members.items() if name.endswith(".txt")}
        assert sorted(len(captions) for captions in told.values()) == [1] * 4 + [2] * 3
        rows = {key: [f"{key}.{k}.npy" if k else f"{key}.npy" for k in range(len(captions))] for key, captions in told.items()}
        assert {name for name in members if name.endswith(".npy") and "indices" not in name} == {*chain(*rows.values())}
        found = [
            (caption, torch.from_numpy(np.load(io.BytesIO(members[name]))))
            for key in told
            for caption, name in zip(told[key], rows[key], strict=True)
        ]
    else:
        found = []
        for path in sorted((tmp_path / "all").glob("*.safetensors")):
            with safe_open(path, "pt") as shard:
                found += zip(json.loads(shard.metadata()["captions"]), shard.get_tensor("tokens"), strict=True)
    assert len(found) == 10
    tokenizer = TexTok.from_pretrained(model)
    for caption, tokens in found:
        number = caption.split()[-1]
        wanted = tokenizer.encode(Image.open(next(pictures.rglob(f"picture.{number}.png"))), [caption])
        torch.testing.assert_close(tokens, wanted.as_subclass(torch.Tensor)[0])


def test_both_formats_hold_the_same(model: str, pictures: Path, tmp_path: Path) -> None:
    encode_folder(model, str(pictures), tmp_path / "a", "safetensors", shard_size=4)
    encode_folder(model, str(pictures), tmp_path / "b", "webdataset", shard_size=4)
    tensors = [load_file(path) for path in sorted((tmp_path / "a").glob("*.safetensors"))]
    tokens = torch.cat([shard["tokens"] for shard in tensors]).numpy()
    indices = torch.cat([shard["indices"] for shard in tensors]).numpy()
    members: dict[str, bytes] = {}
    for path in sorted((tmp_path / "b").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                members[member.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    keys = [name[:-4] for name in members if name.endswith(".txt")]
    assert len(keys) == 7
    for row, key in enumerate(keys):
        (tmp_path / "x.npy").write_bytes(members[f"{key}.npy"])
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), tokens[row])
        (tmp_path / "x.npy").write_bytes(members[f"{key}.indices.npy"])
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), indices[row])
        assert members[f"{key}.cls"] == b"0"
    for name in ("a", "b"):
        decode_folder(model, tmp_path / name, tmp_path / f"{name}-back")
    a, b = read(tmp_path / "a-back"), read(tmp_path / "b-back")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("format", FORMATS)
def test_both_directions_go_on_where_they_stopped(
    model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Format
) -> None:
    tokens, out = tmp_path / "tokens", tmp_path / "back"

    def stop_after(limit: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if done >= limit:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        encode_folder(model, str(pictures), tokens, format, 3, 3, progress=stop_after(6))
    with pytest.raises(KeyboardInterrupt):
        encode_folder(model, str(pictures), tokens, format, 2, 3, progress=stop_after(7))
    kept = {path: path.stat().st_mtime_ns for path in tokens.glob("tokens-*")}
    assert kept
    report = encode_folder(model, str(pictures), tokens, format, 3, 3)
    assert report["shards_reused"] == len(kept)
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert not [path for path in tokens.iterdir() if path.name.startswith(".")]

    with pytest.raises(KeyboardInterrupt):
        decode_folder(model, tokens, out, batch_size=2, progress=stop_after(4))
    assert len(read(out)) == 4
    assert decode_folder(model, tokens, out)["new"] == 3
    assert decode_folder(model, tokens, out)["new"] == 0
    assert len(read(out)) == 7


def test_one_thread_reads_each_picture_once_and_stops(
    model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_by: list[tuple[str, str]] = []
    usual = FileDataset.fetch

    def noted(self: FileDataset, indices: Any) -> Any:
        examples = usual(self, indices)
        read_by.extend((threading.current_thread().name, example.key) for example in examples if example is not None)
        return examples

    monkeypatch.setattr(FileDataset, "fetch", noted)
    encode_folder(model, str(pictures), tmp_path / "tokens", batch_size=2, shard_size=3)
    assert len({key for _, key in read_by}) == len(read_by) == 7
    assert {name for name, _ in read_by} == {"textok-read_0"}

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_folder(model, str(pictures), tmp_path / "stopped", batch_size=1, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("textok-")]


def test_captions_can_be_left_out_when_decoding(model: str, pictures: Path, tmp_path: Path) -> None:
    encode_folder(model, str(pictures), tmp_path / "tokens")
    decode_folder(model, tmp_path / "tokens", tmp_path / "with")
    decode_folder(model, tmp_path / "tokens", tmp_path / "without", with_captions=False)
    a, b = read(tmp_path / "with"), read(tmp_path / "without")
    assert a.keys() == b.keys()
    assert any(not np.array_equal(a[name], b[name]) for name in a)


def test_shards_of_pictures_are_read_too(model: str, tmp_path: Path, train_config: Any) -> None:
    dataset = load_dataset(train_config(tmp_path).data, "train", length=5)
    write_shards(dataset, tmp_path / "shards", shard_size=3)
    pattern = str(tmp_path / "shards" / sorted(path.name for path in (tmp_path / "shards").glob("*.tar"))[0])
    assert encode_folder(model, pattern, tmp_path / "tokens")["pictures"] == 3
    assert encode_folder(model, str(tmp_path / "shards"), tmp_path / "all")["pictures"] == 5
    # Pictures beside an archive make it a folder of pictures.
    Image.new("RGB", (16, 16)).save(tmp_path / "shards" / "a.png")
    (tmp_path / "shards" / "a.txt").write_text("a caption")
    assert encode_folder(model, str(tmp_path / "shards"), tmp_path / "one")["pictures"] == 1


@pytest.mark.parametrize("format", FORMATS)
def test_another_tokenizer_is_refused(model: str, pictures: Path, make_tokenizer: Make, tmp_path: Path, format: Format) -> None:
    other = str(make_tokenizer(seed=5, bottleneck="vq").save_pretrained(tmp_path / "other"))
    encode_folder(model, str(pictures), tmp_path / "tokens", format)
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
    with pytest.raises(InputError, match="made by another tokenizer"):
        decode_folder(other, tmp_path / "tokens", tmp_path / "back")
    with pytest.raises(InputError, match="tokens made otherwise"):
        encode_folder(other, str(pictures), tmp_path / "tokens", format)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == before


def test_mistakes_are_named(model: str, pictures: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "notokens").mkdir()
    (tmp_path / "notokens" / "index.json").write_text("[")
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: encode_folder(model, str(tmp_path / "none"), tmp_path / "t"), "no folder"),
        (lambda: encode_folder(model, str(empty), tmp_path / "t"), "empty"),
        (lambda: encode_folder(str(empty), str(pictures), tmp_path / "t"), "config.json"),
        (lambda: encode_folder(model, str(pictures), tmp_path / "t", batch_size=0), "batch-size must be at least 1"),
        (lambda: encode_folder(model, str(pictures), tmp_path / "t", shard_size=0), "shard-size"),
        (lambda: decode_folder(model, tmp_path / "none", tmp_path / "t"), "no directory"),
        (lambda: decode_folder(model, empty, tmp_path / "t"), "index.json"),
        (lambda: decode_folder(model, tmp_path / "notokens", tmp_path / "t"), "cannot read"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_shard_is_named(model: str, pictures: Path, tmp_path: Path, format: Format) -> None:
    encode_folder(model, str(pictures), tmp_path / "tokens", format)
    (shard,) = (tmp_path / "tokens").glob("tokens-*")
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(InputError, match=f"{shard.name}.*remove it and encode again"):
        decode_folder(model, tmp_path / "tokens", tmp_path / "back")
    shard.unlink()
    with pytest.raises(InputError, match="no token shards"):
        decode_folder(model, tmp_path / "tokens", tmp_path / "back")
    assert json.loads((tmp_path / "tokens" / "index.json").read_text())["count"] == 7


@pytest.mark.parametrize("format", FORMATS)
def test_half_an_encode_is_not_decoded(model: str, pictures: Path, tmp_path: Path, format: Format) -> None:
    encode_folder(model, str(pictures), tmp_path / "tokens", format, shard_size=3)
    next((tmp_path / "tokens").glob("tokens-*1.*")).unlink()
    with pytest.raises(InputError, match="4 of 7 pictures"):
        decode_folder(model, tmp_path / "tokens", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    encode_folder(model, str(pictures), tmp_path / "tokens", format, shard_size=3)
    assert decode_folder(model, tmp_path / "tokens", tmp_path / "back")["new"] == 7


def test_pictures_of_other_tokens_are_neither_kept_nor_overwritten(model: str, pictures: Path, tmp_path: Path) -> None:
    encode_folder(model, str(pictures), tmp_path / "tokens")
    decode_folder(model, tmp_path / "tokens", tmp_path / "back")
    before = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    with pytest.raises(InputError, match="not decoded from these tokens"):
        decode_folder(model, tmp_path / "tokens", tmp_path / "back", with_captions=False)
    (pictures / "picture.0.txt").write_text("another caption")
    encode_folder(model, str(pictures), tmp_path / "others")
    with pytest.raises(InputError, match="not decoded from these tokens"):
        decode_folder(model, tmp_path / "others", tmp_path / "back")
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == before
    (tmp_path / "mine").mkdir()
    name = next(name for name in before if name.endswith(".png"))
    (tmp_path / "mine" / name).write_bytes(b"mine")
    with pytest.raises(InputError, match="not decoded from these tokens"):
        decode_folder(model, tmp_path / "tokens", tmp_path / "mine")
    assert (tmp_path / "mine" / name).read_bytes() == b"mine"


@pytest.fixture
def by_class(make_tokenizer: Make, loads_fake_text: Any, tmp_path: Path) -> str:
    """A generator of the classes "10" (0), "2" (1) and "cow" (2)."""
    directory = tmp_path / "pipeline"
    torch.manual_seed(1)
    dit = DiT(DiTConfig(num_tokens=3, in_channels=4, width=32, depth=1, heads=2, num_classes=3))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    dit.save_pretrained(directory / "generator")
    make_tokenizer().save_pretrained(directory / "tokenizer")
    about = {"objective": "gaussian", "prediction": "epsilon", "label_names": ["10", "2", "cow"], "captions": {"0": ["ten"]}}
    (directory / "pipeline.json").write_text(json.dumps(about))
    return str(directory)


def test_sampling_goes_on_where_it_stopped(by_class: str, tmp_path: Path) -> None:
    def sampled(out: str, **options: Any) -> dict[str, Any]:
        given = {"count": 3, "steps": 2, "batch_size": 2, "seed": 5, **options}
        return sample_to_folder(by_class, [], ["2", "cow"], tmp_path / out, **given)

    whole = sampled("whole")
    assert (whole["new"], [item["seed"] for item in whole["samples"]]) == (6, [5, 6, 7, 8, 9, 10])

    def stop(done: int, total: int) -> None:
        if done > 2 * 2:  # in the third batch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled("parts", progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.png")}
    assert len(kept) == 4
    assert load_file(tmp_path / "parts" / "tokens.safetensors")["tokens"].shape == (4, 3, 4)
    for options in ({"seed": 6}, {"steps": 3}, {"count": 4}, {"guidance": 2.0}, {"plan": Plan("bf16")}):
        with pytest.raises(InputError, match="made otherwise"):
            sampled("parts", **options)
    assert sampled("parts")["new"] == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    a, b = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert a.keys() == b.keys()
    assert all(np.abs(a[name].astype(int) - b[name]).max() <= 1 for name in a)
    tokens = [load_file(tmp_path / out / "tokens.safetensors")["tokens"] for out in ("whole", "parts")]
    torch.testing.assert_close(tokens[0], tokens[1], atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "parts" / "samples.json").read_text())["samples"] == whole["samples"]

    listing = json.loads((tmp_path / "parts" / "samples.json").read_text())
    assert (listing.pop("precision"), listing.pop("step_cache")) == ("fp32", None)  # a listing of a version without plans
    (tmp_path / "parts" / "samples.json").write_text(json.dumps(listing))
    (tmp_path / "parts" / "00004.png").unlink()
    assert sampled("parts")["new"] == 2
    assert sampled("parts")["new"] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="did not make"):
        sampled("mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["00000.png"]


def test_a_class_by_name_before_index_and_prompts_for_its_decoder(by_class: str, tmp_path: Path) -> None:
    def sampled(prompts: list[str], labels: list[str], out: str, **options: Any) -> dict[str, np.ndarray]:
        sample_to_folder(by_class, prompts, labels, tmp_path / out, steps=1, **options)
        return read(tmp_path / out)

    by_name, by_index = sampled([], ["2"], "a")["00000.png"], sampled([], ["1"], "b")["00000.png"]
    assert np.array_equal(by_name, by_index)  # "2" is the name of class 1, and no class is called "1"
    said = sampled(["a red cow", "a star"], ["2", "cow"], "c", count=2)
    assert not np.array_equal(said["00000.png"], by_name)
    listed = json.loads((tmp_path / "c" / "samples.json").read_text())["samples"]
    assert [item["caption"] for item in listed] == ["a red cow", "a red cow", "a star", "a star"]
    mistakes = [(["a"], ["2", "cow"], "one --prompt for each --label"), (["a"], [], "--label, not --prompt"), ([], ["²"], "²")]
    for prompts, labels, message in mistakes:
        with pytest.raises(InputError, match=message):
            sampled(prompts, labels, "d")
