"""Shards by URL: ranged reads, their failures, the cached index, and the order in which an epoch reads them."""

from __future__ import annotations

import http.server
import importlib.util
import io
import json
import pickle
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from textok_fast.config import DataConfig
from textok_fast.data import CaptionedImages, Draw, PackOptions, load_dataset, pack, storage
from textok_fast.data.shard_index import ShardIndex, scan, sidecar
from textok_fast.data.storage import Part, find_shards, is_url, read_parts
from textok_fast.data.webdataset import order_by_runs
from textok_fast.errors import InputError

pytest.importorskip("aiohttp")


class Server:
    """Serves a folder over HTTP with ranges, and notes the requests. ``fail`` of the next requests are answered with 503."""

    def __init__(self, root: Path) -> None:
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.fail, self.ranges = 0, True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, body: bool) -> None:
                wanted = self.headers.get("Range", "")
                outer.requests.append((self.command, self.path, wanted))
                if outer.fail and body:
                    outer.fail -= 1
                    return self.reply(503, b"", {})
                file = root / self.path.lstrip("/").split("?")[0]
                if not file.is_file():
                    return self.reply(404, b"", {})
                data = file.read_bytes()
                headers = {"ETag": f'"{hash(data)}"', "Accept-Ranges": "bytes"}
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
                if span and outer.ranges:
                    part = data[int(span[1]) : int(span[2]) + 1]
                    headers["Content-Range"] = f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(data)}"
                    return self.reply(206, part, headers, body)
                return self.reply(200, data, headers, body)

            def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    running = Server(tmp_path / "served")
    yield running
    running.http.shutdown()
    running.http.server_close()


def png(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, first: int, count: int, size: int = 8) -> Path:
    with tarfile.open(path, "w") as archive:
        for k in range(first, first + count):
            for name, data in (
                (f"{k:04d}.png", png(k, size)),
                (f"{k:04d}.json", json.dumps({"caption": [f"number {k}", "another"]}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def read(path: str, split: str = "all", **settings: Any) -> CaptionedImages:
    return load_dataset(DataConfig(**{"source": "webdataset", "path": path, "image_size": 8, **settings}), split)


def same(a: CaptionedImages, b: CaptionedImages) -> bool:
    assert len(a) == len(b)
    found, wanted = (data.__getitems__(range(len(data))) for data in (a, b))  # type: ignore[attr-defined]
    pairs = list(zip(found, wanted, strict=True))
    return all(np.array_equal(x.image, y.image) and x[1:] == y[1:] for x, y in pairs)


def test_shards_by_http_are_the_local_ones(server: Server, tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / "served" / f"s-{number:03d}.tar", 5 * number, 5)
    local = read(str(tmp_path / "served"))
    remote = read(f"{server.url}/s-{{000..002}}.tar")
    assert same(remote, local)
    assert [e.caption for e in remote] == [f"number {k}" for k in range(15)]
    assert remote.content_hash() == local.content_hash()
    # A batch of a shard is one request, its parts lie together; and the index is not made a second time.
    server.requests.clear()
    again = pickle.loads(pickle.dumps(read(f"{server.url}/s-{{000..002}}.tar")))
    assert [method for method, path, _ in server.requests if method == "GET" and path.endswith(".tar")] == []
    server.requests.clear()
    again.__getitems__([4, 0, 2, 7])
    gets = [(path, wanted) for method, path, wanted in server.requests if method == "GET"]
    assert sorted(path for path, _ in gets) == ["/s-000.tar", "/s-001.tar"] and all(wanted for _, wanted in gets)
    # A shard that was replaced is indexed anew.
    write_tar(tmp_path / "served" / "s-001.tar", 40, 4)
    assert len(read(f"{server.url}/s-{{000..002}}.tar")) == 14


def test_packed_shards_bring_their_index(server: Server, tmp_path: Path) -> None:
    write_tar(tmp_path / "source.tar", 0, 9, size=100)
    pack(read(str(tmp_path / "source.tar")), tmp_path / "served" / "set", PackOptions(shard_pictures=4))
    remote = read(f"{server.url}/set/index.json")
    wanted = [("GET", "/set/index.json", "")]
    assert [
        request for request in server.requests if request[2] or request[1] == "/set/index.json"
    ] == wanted  # no shard is read
    assert same(remote, read(str(tmp_path / "served" / "set")))
    assert find_shards(f"{server.url}/set/index.json") == [f"{server.url}/set/shard-{k:06d}.tar" for k in range(3)]
    (tmp_path / "served" / "other.json").write_text("{}")
    (tmp_path / "served" / "index.json").write_text('{"shards": [{"file": "../secret.tar"}]}')
    with pytest.raises(InputError, match="do not lie beside it"):
        read(f"{server.url}/index.json")


def test_a_passing_failure_is_not_a_corrupt_picture(server: Server, tmp_path: Path) -> None:
    write_tar(tmp_path / "served" / "a.tar", 0, 4)
    remote = read(f"{server.url}/a.tar")
    server.fail = 2
    assert remote[1].caption == "number 1" and remote.skipped == {}
    server.fail = 10**6
    with pytest.raises(InputError, match=r"cannot read .*a\.tar after 5 attempts"):
        remote[2]
    server.fail = 0
    assert remote[2].caption == "number 2" and remote.skipped == {}
    server.ranges = False
    with pytest.raises(InputError, match="no ranges"):
        remote[3]
    with pytest.raises(InputError, match=r"b\.tar cannot be read"):
        read(f"{server.url}/{{a,b}}.tar")
    (tmp_path / "served" / "text.tar").write_bytes(b"no tar at all" * 100)
    server.ranges = True
    with pytest.raises(InputError, match=r"text\.tar is no tar file"):
        read(f"{server.url}/text.tar")


def test_any_file_system_of_fsspec(tmp_path: Path) -> None:
    """fsspec's memory stands for S3, whose file system is called in the same way."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe_file(f"/bucket/set/{number}.tar", write_tar(tmp_path / f"{number}.tar", 3 * number, 3).read_bytes())
    local = read(str(tmp_path / "{0,1}.tar"))
    for path in ("memory://bucket/set", "memory://bucket/set/*.tar", "memory://bucket/set/{0..1}.tar"):
        assert same(read(path), local)
    assert is_url("s3://b/x.tar") and is_url("simplecache::s3://b/x.tar") and not is_url("/a/b.tar") and not is_url("a:b.tar")
    cached = read("simplecache::memory://bucket/set/{0..1}.tar")  # fsspec keeps whole files
    assert same(cached, local)
    memory.rm("/bucket", recursive=True)
    with pytest.raises(InputError, match="no .tar shard matches"):
        read("memory://bucket/set")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(InputError, match=r"pip install 'textok-fast\[data,s3\]'"):
            read("s3://bucket/x.tar")


def test_s3_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs against a server that answers as S3 does."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import boto3
    import s3fs

    local = [write_tar(tmp_path / f"{number}.tar", 40 * number, 40, size=32) for number in range(2)]
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
        for name, value in {**settings, "DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for file in local:
            client.upload_file(str(file), "bucket", f"set/{file.name}")
        asked: list[tuple[int, int]] = []
        usual = s3fs.S3FileSystem._cat_file

        async def cat_file(self: Any, path: str, version_id: Any = None, start: Any = None, end: Any = None) -> Any:
            asked.append((start, end))
            return await usual(self, path, version_id=version_id, start=start, end=end)

        wanted = read(str(tmp_path / "{0,1}.tar"))
        for path in ("s3://bucket/set", "s3://bucket/set/*.tar", "s3://bucket/set/{0..1}.tar"):
            assert same(read(path), wanted)
        dataset = read("s3://bucket/set")
        monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", cat_file)
        (example,) = dataset.fetch([57])
        assert example is not None and np.array_equal(example.image, wanted[57].image)
        ((start, end),) = asked
        assert 0 < end - start < local[1].stat().st_size / 10  # one request, of the picture alone
        client.delete_object(Bucket="bucket", Key="set/1.tar")
        with pytest.raises(InputError, match="can no longer be read"):
            dataset.fetch([58])
        with pytest.raises(InputError, match=r"no \.tar shard matches"):
            read("s3://bucket/other")
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_parts_are_joined_and_cut_again(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    data = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
    file.write_bytes(data)
    rng = np.random.default_rng(1)
    starts = rng.integers(0, 290_000, 50)
    parts = [
        Part(str(file), int(start), int(start) + int(size))
        for start, size in zip(starts, rng.integers(0, 9000, 50), strict=True)
    ]
    assert read_parts(parts) == [data[part.start : part.stop] for part in parts]


def test_an_index_is_read_back_and_a_wrong_one_is_not_used(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    index = scan(str(shard), shard.stat().st_size)
    back = ShardIndex.from_bytes(index.to_bytes())
    assert list(back.names) == [f"{k:04d}" for k in range(5)] and list(back.captions)[3] == "number 3\nanother"
    assert np.array_equal(back.offsets, index.offsets) and back.size == shard.stat().st_size
    for data in (b"", b"\0" * 64, index.to_bytes()[:-9]):
        with pytest.raises(ValueError):
            ShardIndex.from_bytes(data)
    Path(sidecar(str(shard))).write_bytes(index.to_bytes())
    write_tar(shard, 7, 2)  # another shard, its index stayed
    assert [example.caption for example in read(str(shard))] == ["number 7", "number 8"]


# -- the order of an epoch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "buffer", "streams"), [(8, 16, 4), (6, 50, 16), (5, 7, 1), (40, 1000, 8)])
def test_an_epoch_is_a_permutation_in_windows(batch: int, buffer: int, streams: int) -> None:
    bounds = np.cumsum([0, *np.random.default_rng(0).integers(5, 40, 12)])
    order = order_by_runs(bounds, np.random.default_rng(1), batch, buffer, streams)
    length = int(bounds[-1])
    assert len(order) == length // batch * batch and len(set(order.tolist())) == len(order)
    assert set(order.tolist()) <= set(range(length))
    assert not np.array_equal(order, order_by_runs(bounds, np.random.default_rng(2), batch, buffer, streams))


def test_each_stream_reads_few_shards_at_a_time() -> None:
    """Of 64 shards of 50 pictures, any 10 batches together open 4 streams x the shards of 10 x 8 / 4 + a window of pictures."""
    bounds = np.arange(0, 3201, 50)
    order = order_by_runs(bounds, np.random.default_rng(1), batch=8, buffer=100, streams=4).reshape(-1, 8)
    for start in range(0, len(order) - 10, 10):
        shards = {int(index) // 50 for index in order[start : start + 10].ravel()}
        assert len(shards) <= 4 * 4
    assert all(len({int(index) // 50 for index in batch}) >= 3 for batch in order)  # and a batch mixes them


def test_the_same_pictures_whatever_reads_them(tmp_path: Path) -> None:
    from textok_fast.training.loop import StepBatches

    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", 10 * number, 10)
    dataset = read(str(tmp_path), shuffle_buffer=6, read_streams=2)
    order = dataset.epoch_order

    def batches(start: int, batch: int, rank: int, world: int) -> list[list[int]]:
        return list(StepBatches(len(dataset), batch, 3, start, 12, rank, world, order=order))

    whole = batches(0, 8, 0, 1)
    assert batches(7, 8, 0, 1) == whole[7:]  # a continued run
    halves = [batches(0, 4, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    epochs = [sorted(chain(*whole[first : first + 5])) for first in (0, 5)]
    assert epochs[0] == epochs[1] == list(range(40)) and whole[:5] != whole[5:10]
    assert all(isinstance(index, Draw) and index.epoch == step // 5 for step, row in enumerate(whole) for index in row)


def test_captions_and_crops_are_drawn_by_seed_and_epoch(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", 0, 30, size=24)
    dataset = read(str(tmp_path / "a.tar"), "train", crop="random", crop_min=0.5, flip=True)
    draws = {epoch: [dataset[Draw(index, 1, epoch)] for index in range(len(dataset))] for epoch in (0, 1)}
    again = dataset.__getitems__([Draw(index, 1, 0) for index in reversed(range(len(dataset)))])[::-1]
    assert all(np.array_equal(a.image, b.image) and a[1:] == b[1:] for a, b in zip(draws[0], again, strict=True))
    captions = [[example.caption for example in draws[epoch]] for epoch in (0, 1)]
    assert captions[0] != captions[1] and {"another"} < {*captions[0]}
    assert 0.2 < np.mean([caption == "another" for caption in (*captions[0], *captions[1])]) < 0.8
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(*draws.values(), strict=True))
    assert all(dataset[index].caption.startswith("number") for index in range(len(dataset)))  # a plain index: the first
    # Another split has nothing random.
    held_out = read(str(tmp_path / "a.tar"), "validation", crop="random", flip=True)
    assert np.array_equal(held_out[Draw(0, 1, 0)].image, held_out[Draw(0, 1, 5)].image)


def test_a_slow_trainer_holds_the_readers_back(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """Readers stop at ``prefetch_factor`` batches a worker: memory does not grow with what the trainer has not taken."""
    import multiprocessing
    import time

    from torch.utils.data import DataLoader

    from textok_fast.data import collate

    write_tar(tmp_path / "a.tar", 0, 64)
    dataset = read(str(tmp_path / "a.tar"))
    counter = multiprocessing.get_context("fork").Value("i", 0)
    usual = dataset.fetch

    def counted(indices: Any) -> Any:
        with counter.get_lock():
            counter.value += len(indices)
        return usual(indices)

    dataset.fetch = counted  # type: ignore[method-assign]
    batches = [list(range(start, start + 2)) for start in range(0, 64, 2)]
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=2, multiprocessing_context="fork"))  # type: ignore[arg-type]
    next(loader)
    deadline = time.monotonic() + 60
    while counter.value < 2 * 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # time in which a reader without bounds would run to the end
    assert counter.value == 2 * (1 + 2 * 2)  # what was taken, and two batches for each of two workers
    assert sum(len(batch["keys"]) for batch in loader) == 62


def test_training_on_shards_by_url_continues_bit_for_bit(
    server: Server, tmp_path: Path, train_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random crops, several captions, windows and loader workers, stopped in the second epoch."""
    import os
    import signal

    from safetensors.torch import load_file

    from textok_fast.training import train_tokenizer
    from textok_fast.training.optim import ExponentialMovingAverage

    for number in range(3):
        write_tar(tmp_path / "served" / f"{number}.tar", 8 * number, 8, size=24)
    data = {"source": "webdataset", "path": f"{server.url}/{{0..2}}.tar", "crop": "random", "flip": True}
    data |= {"shuffle_buffer": 5, "read_streams": 2}

    def config(name: str) -> Any:
        return train_config(tmp_path / name, {"steps": 9, "workers": 1}, data)

    train_tokenizer(config("whole"), progress=False)
    update = ExponentialMovingAverage.update

    def interrupted(self: ExponentialMovingAverage, model: Any, step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        update(self, model, step)

    with monkeypatch.context() as patched:
        patched.setattr(ExponentialMovingAverage, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(config("parts"), progress=False)
    train_tokenizer(config("parts"), resume=True, progress=False)
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "parts"))
    assert all(np.array_equal(a[key], b[key]) for key in a)
