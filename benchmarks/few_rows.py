"""A DiT block over few rows on a GPU: the present path, the kernels of csrc/cuda/few_rows.h, and each kernel by itself.

Everything runs as a CUDA graph of as many blocks as the model has, each with weights of its own, which come from memory. Prints
JSON: "correct" (errors of a block against float64, both paths), "block_us" (a block: the present path, the new one with and
without overlapping launches, and the new one with single parts of the present path), "kernel_us" (each kernel, and what it
replaces, alone), "engine_ms" (a step of whole pictures), "tiles_us" (each product in every tile that fits). Needs compute
capability 9.0 and the native library with its CUDA part.

    python benchmarks/few_rows.py [--size XL] [--batch 2] [--tokens 32] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.diffusion import build_process
from textok_fast.evaluation.step_times import StepTimesConfig, build_networks
from textok_fast.inference import Engine, Plan
from textok_fast.inference.precision import FewRowsDiTBlock
from textok_fast.modeling.dit import DiTBlock
from textok_fast.ops.dispatch import use_backend

SIZES = {"S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24), "XL": (1152, 16, 28)}  # width, heads, blocks
PARTS = ("qkv", "attention", "proj", "fc1", "fc2")  # proj and fc2 with the gated LayerNorm after them
EPS = 1e-6
GROUPS = [0, 1] if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else [0]  # warpgroups or not


def switch(groups: int, overlap: int) -> None:
    """Of packed_block's kernels."""
    os.environ |= {"TEXTOK_WARPGROUPS": str(groups), "TEXTOK_OVERLAP": str(overlap)}


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(run: Callable[[], Any], count: int, replays: int = 20) -> float | str:
    """Of one of the ``count`` things that ``run`` does, as a CUDA graph: the median of single replays."""
    try:
        graph = capture(run)
        for _ in range(3):
            graph.replay()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
        for first, last in events:
            first.record()
            graph.replay()
            last.record()
        torch.cuda.synchronize()
    except RuntimeError as problem:  # of a capture, say: the rest is still worth knowing
        torch.cuda.synchronize()
        return str(problem).splitlines()[0][:100]
    times = sorted(first.elapsed_time(last) for first, last in events)
    return round(1000 * times[len(times) // 2] / count, 3)


class Case:
    def __init__(self, size: str, batch: int, tokens: int) -> None:
        self.width, self.heads, self.depth = SIZES[size]
        torch.manual_seed(0)
        self.blocks = [self._block() for _ in range(self.depth)]
        self.new = [self._new(block) for block in self.blocks]
        table = (0.3 * torch.randn(batch, 8 * self.width, device="cuda")).bfloat16()
        self.modulation, self.shift, self.scale = table.split([6 * self.width, self.width, self.width], dim=1)
        self.x = torch.randn(batch, tokens, self.width, device="cuda")
        self.hidden = torch.randn(batch, tokens, self.width, device="cuda").bfloat16()
        self.rows = batch * tokens

    def _block(self) -> DiTBlock:
        with torch.device("cuda"):
            block = DiTBlock(self.width, self.heads, 4.0)
        block.adaLN_modulation = torch.nn.Sequential()  # what it would give is given
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)
        return block.bfloat16().requires_grad_(False)

    def _new(self, block: DiTBlock) -> FewRowsDiTBlock:
        made = FewRowsDiTBlock.of(block)
        assert made is not None
        return made

    def chain(self, blocks: list[Any]) -> tuple[Tensor, Tensor]:
        x, hidden = self.x, self.hidden
        for block in blocks:
            x, hidden = block(x, hidden, self.modulation, (self.shift, self.scale))
        return x, hidden

    def mixed(self, parts: set[str], groups: bool = False, overlap: bool = True) -> tuple[Tensor, Tensor]:
        """All blocks, ``parts`` of each by the new kernels and the others as they are now."""
        self.groups, self.overlap = groups, overlap
        x, hidden = self.x, self.hidden
        _, _, gate1, shift2, scale2, gate2 = self.modulation.chunk(6, dim=1)
        for block in self.blocks:
            attn, mlp = block.attn, block.mlp
            qkv = self._linear(hidden, attn.qkv, "none", "qkv" in parts)
            if "attention" in parts:
                attended = torch.ops.textok_fast.few_rows_attention(qkv, self.heads, overlap)
            else:
                attended = ops.short_attention(qkv, self.heads)
            x, hidden = self._norm(x, attended, attn.proj, gate1, shift2, scale2, "proj" in parts)
            inner = self._linear(hidden, mlp.fc1, "gelu_tanh", "fc1" in parts)
            x, hidden = self._norm(x, inner, mlp.fc2, gate2, self.shift, self.scale, "fc2" in parts)
        return x, hidden

    def _linear(self, x: Tensor, layer: torch.nn.Linear, activation: str, new: bool) -> Tensor:
        if new:
            out = torch.ops.textok_fast.few_rows_linear(
                x.view(self.rows, -1), layer.weight, layer.bias, activation, False, 0, 0, 0, self.groups, self.overlap
            )
            return out.view(*x.shape[:2], -1)
        return layer(x) if activation == "none" else ops.linear_gelu(x, layer.weight, layer.bias, "tanh")

    def _norm(
        self,
        x: Tensor,
        branch: Tensor,
        layer: torch.nn.Linear,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        new: bool,
    ) -> tuple[Tensor, Tensor]:
        if not new:
            return ops.gated_residual_layer_norm_modulate(x, layer(branch), gate, shift, scale)
        parts = torch.ops.textok_fast.few_rows_linear(
            branch.view(self.rows, -1), layer.weight, None, "none", True, 0, 0, 0, self.groups, self.overlap
        )
        return torch.ops.textok_fast.few_rows_norm(x, parts, layer.bias, gate, shift, scale, EPS, self.overlap)

    def exact(self, block: DiTBlock) -> tuple[Tensor, Tensor]:
        """A block in float64."""
        x, hidden, modulation = self.x.double(), self.hidden.double(), self.modulation.double()
        _, _, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)

        def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
            return F.linear(x, layer.weight.double(), layer.bias.double())

        def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None].double()) + shift[:, None].double()

        q, k, v = linear(hidden, block.attn.qkv).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (B, N, H, d)
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        attended = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
        x = x + gate1[:, None] * linear(attended, block.attn.proj)
        inner = F.gelu(linear(norm(x, shift2, scale2), block.mlp.fc1), approximate="tanh")
        x = x + gate2[:, None] * linear(inner, block.mlp.fc2)
        return x, norm(x, self.shift, self.scale)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def correctness(case: Case) -> dict[str, Any]:
    wanted = case.exact(case.blocks[0])
    errors: dict[str, Any] = {"present": [relative(*pair) for pair in zip(case.chain(case.blocks[:1]), wanted, strict=True)]}
    with use_backend(packed_block="native"):
        for groups in GROUPS:
            name = f"new, warpgroups {groups}"
            switch(groups, 0)
            errors[name] = [relative(*pair) for pair in zip(case.chain(case.new[:1]), wanted, strict=True)]
            alone = [tensor.clone() for tensor in case.chain(case.new)]
            switch(groups, 1)
            found: list[tuple[Tensor, Tensor]] = []
            graph = capture(lambda: found.append(case.chain(case.new)))  # noqa: B023
            same = 0
            for _ in range(100):
                for tensor in found[-1]:
                    tensor.fill_(torch.nan)
                graph.replay()
                same += all(torch.equal(*pair) for pair in zip(found[-1], alone, strict=True))
            errors[f"{name}: of 100 replays equal to launches one by one"] = same
        chain = case.chain(case.blocks)
        errors["all blocks, new against present"] = [
            relative(*pair) for pair in zip(alone, [t.double() for t in chain], strict=True)
        ]
    return errors


def block_times(case: Case) -> dict[str, Any]:
    times: dict[str, Any] = {"present": microseconds(partial(case.chain, case.blocks), case.depth)}
    with use_backend(packed_block="native"):
        for groups in GROUPS:
            for overlap in (1, 0):
                switch(groups, overlap)
                times[f"new, warpgroups {groups}, overlap {overlap}"] = microseconds(partial(case.chain, case.new), case.depth)
    everything = set(PARTS)
    for groups in GROUPS:
        times[f"new, warpgroups {groups}, called one by one"] = microseconds(
            partial(case.mixed, everything, bool(groups)), case.depth
        )
    for part in PARTS:
        times[f"all new but {part}"] = microseconds(partial(case.mixed, everything - {part}), case.depth)
    for part in PARTS:
        times[f"only {part} new"] = microseconds(partial(case.mixed, {part}), case.depth)
    return times


def products(case: Case) -> dict[str, tuple[list[torch.nn.Linear], Tensor, str, bool]]:
    """Name -> a layer of each block, x, activation, and whether the sum's parts are what is wanted."""
    wide = torch.randn(case.rows, 4 * case.width, device="cuda").bfloat16()
    narrow = case.hidden.view(case.rows, -1)
    return {
        "qkv": ([block.attn.qkv for block in case.blocks], narrow, "none", False),
        "proj": ([block.attn.proj for block in case.blocks], narrow, "none", True),
        "fc1": ([block.mlp.fc1 for block in case.blocks], narrow, "gelu_tanh", False),
        "fc2": ([block.mlp.fc2 for block in case.blocks], wide, "none", True),
    }


def kernel_times(case: Case) -> dict[str, Any]:
    times: dict[str, Any] = {}
    library = torch.ops.textok_fast
    for name, (layers, x, activation, parts) in products(case).items():

        def new(
            groups: bool, overlap: bool, layers: Any = layers, x: Tensor = x, activation: str = activation, parts: bool = parts
        ) -> None:
            for layer in layers:
                bias = None if parts else layer.bias
                library.few_rows_linear(x, layer.weight, bias, activation, parts, 0, 0, 0, groups, overlap)

        def present(layers: Any = layers, x: Tensor = x, activation: str = activation) -> None:
            for layer in layers:
                layer(x) if activation == "none" else ops.linear_gelu(x, layer.weight, layer.bias, "tanh")

        for groups in GROUPS:
            for overlap in (1, 0):
                run = partial(new, bool(groups), bool(overlap))
                times[f"{name}, warpgroups {groups}, overlap {overlap}"] = microseconds(run, case.depth)
        times[f"{name}, present"] = microseconds(present, case.depth)
    qkv = torch.randn(*case.hidden.shape[:2], 3 * case.width, device="cuda").bfloat16()
    sums = torch.randn(2, case.rows, case.width, device="cuda")
    bias = case.blocks[0].attn.proj.bias
    arguments = (case.shift, case.shift, case.scale)

    def repeat(run: Callable[[], Any]) -> Callable[[], None]:
        def all_of_them() -> None:
            for _ in range(case.depth):
                run()

        return all_of_them

    for overlap in (True, False):
        attend = partial(library.few_rows_attention, qkv, case.heads, overlap)
        norm = partial(library.few_rows_norm, case.x, sums, bias, *arguments, EPS, overlap)
        times[f"attention, overlap {int(overlap)}"] = microseconds(repeat(attend), case.depth)
        times[f"norm, overlap {int(overlap)}"] = microseconds(repeat(norm), case.depth)
    times["attention, present"] = microseconds(repeat(partial(ops.short_attention, qkv, case.heads)), case.depth)
    present_norm = partial(ops.gated_residual_layer_norm_modulate, case.x, case.hidden, *arguments)
    times["norm, present"] = microseconds(repeat(present_norm), case.depth)
    return times


def tile_times(case: Case, deadline: float) -> dict[str, dict[str, Any]]:
    """Product -> "columns x cluster x splits" -> microseconds, the fastest first; as many as there is time for."""
    times: dict[str, dict[str, Any]] = {}
    linear = torch.ops.textok_fast.few_rows_linear
    for name, (layers, x, activation, parts) in products(case).items():
        found: dict[str, Any] = {}
        outputs, inputs = layers[0].weight.shape
        for columns in (144, 128, 112, 72, 64, 32):
            for cluster in (8, 4, 2, 1):
                for splits in (1, 2) if parts else (1,):
                    blocks = -(-outputs // columns) * cluster * splits
                    weights = -(-inputs // 32 // (cluster * splits)) * columns * 64
                    if weights > 90_000 or not 40 <= blocks <= 400 or time.monotonic() > deadline:
                        continue

                    for groups in GROUPS:
                        tile = (columns, cluster, splits, bool(groups), True)

                        def run(tile: Any = tile, layers: Any = layers, x: Any = x, activation: str = activation) -> None:
                            for layer in layers:
                                bias = None if parts else layer.bias  # noqa: B023
                                linear(x, layer.weight, bias, activation, parts, *tile)  # noqa: B023

                        name_of_tile = f"{columns}x{cluster}x{splits}" + groups * " by warpgroups"
                        found[name_of_tile] = microseconds(run, case.depth, replays=7)
        times[name] = dict(sorted(found.items(), key=lambda pair: (isinstance(pair[1], str), pair[1])))
    return times


def engine_times(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one of the 250 guided steps of a picture, and how far it is from the present one."""
    networks = StepTimesConfig(size=options.size, tokens=(options.tokens,))
    model: Any = build_networks(networks, torch.device("cuda"), torch.float32)[options.tokens].model
    process = build_process("gaussian", model.config.learn_sigma, "epsilon")
    found: dict[str, Any] = {}
    wanted: Tensor | None = None
    for name, groups in [("present", 0), *((f"new, warpgroups {groups}", groups) for groups in GROUPS)]:
        switch(groups, 1)
        chosen = {} if name == "present" else {"packed_block": "native"}
        try:
            engine = Engine(model, Plan.automatic("cuda", precision="bf16", batch=1, ops=chosen))
            times = []
            for _ in range(4):
                torch.cuda.synchronize()
                began = time.perf_counter()
                label = torch.tensor([1], device="cuda")
                sample = engine.sample(process, labels=label, seeds=[0], sampler="ddpm", steps=250, guidance_scale=4.0)
                torch.cuda.synchronize()
                times.append((time.perf_counter() - began) / 250 * 1000)
        except RuntimeError as problem:
            found[name] = str(problem).splitlines()[0][:100]
            continue
        wanted = sample.double() if wanted is None else wanted
        found[name] = {"ms": round(min(times[1:]), 4), "from the present": relative(sample, wanted)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="XL")
    parser.add_argument("--batch", type=int, default=2, help="samples: 2 is a guidance pair")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=50, help="after which no further tile is tried")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    deadline, failed = time.monotonic() + options.seconds, False
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        **{k: getattr(options, k) for k in ("size", "batch", "tokens")},
    }

    def say(**more: Any) -> None:
        """What is known so far is printed and written: a later part may fail."""
        result.update(more)
        print(json.dumps(more, indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with torch.inference_mode():
        case = Case(options.size, options.batch, options.tokens)
        say(gpu=result["gpu"])
        sections: dict[str, Callable[[], Any]] = {
            "correct": partial(correctness, case),
            "block_us": partial(block_times, case),
            "kernel_us": partial(kernel_times, case),
            "engine_ms": partial(engine_times, options),
            "tiles_us": partial(tile_times, case, deadline),
        }
        for name, measure in sections.items():
            try:
                say(**{name: measure()})
            except Exception as problem:  # the others are still worth knowing
                say(**{name: f"{type(problem).__name__}: {str(problem)[:300]}"})
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
