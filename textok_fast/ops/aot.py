"""A Triton kernel compiled ahead of time, without a GPU, and what came out: registers, shared memory, spills, instructions.

Each module of :mod:`textok_fast.ops.triton_kernels` has a list ``AOT`` of :class:`AotCase`: its kernels in the configurations
that its launchers use. ``python -m textok_fast.ops.report`` compiles all of them and prints a table. The numbers are of
``cuobjdump`` and ``nvdisasm`` out of Triton's wheel.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes of shared memory that one block may have at most (CUDA programming guide, "Technical specifications per compute
# capability", opt-in). Triton compares only when it loads a kernel, on the GPU.
SHARED_LIMIT = {75: 65_536, 80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
SHARED_LIMIT |= {120: 101_376, 121: 101_376}

# Products on tensor cores: HMMA (16 bit, TF32), IMMA (int8), QMMA (FP8), their warp-group forms *GMMA of sm_90 and the
# UTC*MMA of sm_100, which tcgen05.mma becomes.
TENSOR_CORE = re.compile(r"\b(UTC[A-Z]*MMA|[HIQDO]G?MMA)\b")
LOCAL_ACCESS = re.compile(r"\b(LDL|STL)\b")  # loads and stores of local memory: spilled registers
RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration that a launcher really uses.

    Args:
        name: what tells this configuration from the kernel's others, such as "DiT-XL bf16".
        kernel: the ``@triton.jit`` function.
        signature: argument -> Triton's type, such as ``"*bf16"``, ``"fp32"``, ``"i32"``; all that ``constexprs`` lacks.
        constexprs: argument -> value. Also pointers that are None and integers that are 1, which Triton makes constants.
        needs: first architecture that can have it, such as 89 where FP8 is converted or multiplied.
        tensor_cores: it must contain tensor-core instructions.
        aligned: pointers and integers divisible by 16, as Triton finds them when it launches.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    needs: int = 80
    tensor_cores: bool = False
    aligned: tuple[str, ...] = ()

    @property
    def kernel_name(self) -> str:
        return str(getattr(self.kernel, "__name__", self.kernel))


@dataclass(frozen=True)
class AotResult:
    """What a kernel became for one architecture. Bytes are per block for ``shared``, per thread for ``stack`` and ``local``.

    ``spilled`` counts the instructions that load or store local memory; ``tensor_core`` maps the class of instruction, such as
    HGMMA, to how often it stands in the code. ``skipped`` and ``error`` are "" where the case was compiled.
    """

    kernel: str
    name: str
    arch: int
    registers: int = 0
    shared: int = 0
    stack: int = 0
    local: int = 0
    spilled: int = 0
    tensor_core: Mapping[str, int] = dataclasses.field(default_factory=dict)
    must_use_tensor_cores: bool = False
    num_warps: int = 0
    skipped: str = ""
    error: str = ""

    @property
    def spill_bytes(self) -> int:
        """Bytes of local memory a thread."""
        return self.stack + self.local

    @property
    def problems(self) -> list[str]:
        """Why this kernel would be slow or not run at all; empty when it is as it should be, or was skipped."""
        if self.skipped:
            return []
        if self.error:
            return [self.error]
        found = []
        if self.spill_bytes or self.spilled:
            found.append(f"spills {self.spill_bytes} bytes a thread ({self.spilled} instructions)")
        if self.must_use_tensor_cores and not self.tensor_core:
            found.append("no tensor-core instruction")
        limit = SHARED_LIMIT.get(self.arch)
        if limit is not None and self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {limit}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with ``problems``."""
        return dataclasses.asdict(self) | {"problems": self.problems}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AotResult:
        return cls(**{key: value for key, value in values.items() if key != "problems"})


def compile_case(case: AotCase, arch: int) -> AotResult:
    """Compiles ``case`` for an architecture such as 90 (sm_90). Raises what Triton raises; RuntimeError when interpreting."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    result = AotResult(case.kernel_name, case.name, arch, must_use_tensor_cores=case.tensor_cores, num_warps=case.num_warps)
    if case.needs > arch:
        return dataclasses.replace(result, skipped=f"needs sm_{case.needs}")
    arguments = getattr(case.kernel, "arg_names", None)
    if arguments is None or type(case.kernel).__name__ == "InterpretedFunction":
        raise RuntimeError(f"{case.kernel_name} is interpreted: TRITON_INTERPRET was set when its module was imported")
    _check_arguments(case, arguments)
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in arguments},
        constexprs=dict(case.constexprs),
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    found = inspect_cubin(compiled.asm["cubin"])
    return dataclasses.replace(result, **found, shared=int(compiled.metadata.shared))


def _check_arguments(case: AotCase, arguments: list[str]) -> None:
    given = [*case.signature, *case.constexprs]
    if sorted(given) != sorted(arguments):
        missing, extra = set(arguments) - set(given), set(given) - set(arguments)
        twice = set(case.signature) & set(case.constexprs)
        raise ValueError(
            f"{case.kernel_name}, {case.name}: signature and constexprs must name each argument once; "
            f"missing {sorted(missing)}, unknown {sorted(extra)}, given twice {sorted(twice)}"
        )
    if wrong := set(case.aligned) - set(case.signature):
        raise ValueError(f"{case.kernel_name}, {case.name}: aligned names {sorted(wrong)}, which the signature lacks")


def inspect_cubin(cubin: bytes) -> dict[str, Any]:
    """Fields of :class:`AotResult` that a compiled kernel tells: registers, stack, local, spilled, tensor_core."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        return parse_resources(_tool("cuobjdump", "--dump-resource-usage", path)) | parse_sass(_tool("nvdisasm", "-c", path))


def parse_resources(text: str) -> dict[str, int]:
    """registers, stack and local of what ``cuobjdump --dump-resource-usage`` printed: the largest of all its functions."""
    rows = [tuple(map(int, match)) for match in RESOURCES.findall(text)]
    if not rows:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text.strip()[:200]!r}")
    registers, stack, _, local = (max(column) for column in zip(*rows, strict=True))
    return {"registers": registers, "stack": stack, "local": local}


def parse_sass(text: str) -> dict[str, Any]:
    """spilled and tensor_core of what ``nvdisasm -c`` printed."""
    return {"spilled": len(LOCAL_ACCESS.findall(text)), "tensor_core": dict(Counter(TENSOR_CORE.findall(text)))}


def _tool(name: str, *arguments: str | Path) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed ({done.returncode}): {done.stderr.strip()[:300]}")
    return done.stdout
