"""Short Markdown tables of what the benchmarks measured: ``python benchmarks/summary.py FILE.json ...``

Reads the JSON of pytest-benchmark, of ``textok-fast bench`` (speedup, steps, peers, parity, profile), of ``python -m
textok_fast.ops.report`` and of a former merge. ``--merge OUT.json`` writes all of it into one file: {"machine", "written",
"parts", "ops", "kernels", "speedup" (bench steps), "studies" (the others of bench, with their own tables)}. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STUDIES = ("peers", "parity", "profile")  # written as NAME.json with NAME.md beside it
FIRST = ("eager", "sdpa", "cublas")  # baselines stand first, the floor last
LAST = ("chosen", "copy")


def empty() -> dict[str, Any]:
    return {"machine": {}, "written": "", "parts": [], "ops": [], "kernels": [], "speedup": [], "studies": []}


def read(paths: Iterable[Path]) -> dict[str, Any]:
    """All files in one; one that cannot be read is named among the parts as failed."""
    merged = empty()
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            merged["parts"].append({"part": path.stem, "status": f"unreadable: {error}"})
            continue
        if "benchmarks" in values:  # pytest-benchmark
            machine = values.get("machine_info", {}).get("textok_fast", {})
            rows = [row_of(benchmark, machine) for benchmark in values["benchmarks"]]
            merged["ops"] += [row for row in rows if row is not None]
            merged["machine"] = merged["machine"] or machine
        elif values.get("benchmark") == "speedup" or path.stem in STUDIES:
            name = "speedup" if path.stem not in STUDIES else path.stem
            beside = path.with_suffix(".md")
            text = beside.read_text(encoding="utf-8") if beside.exists() else ""
            merged["studies"].append({"study": name, "table": text, "result": values})
            merged["machine"] = merged["machine"] or values.get("machine", {})
        elif "ratios" in values:  # bench steps
            merged["speedup"].append(values)
            merged["machine"] = merged["machine"] or values.get("machine", {})
        elif "problems" in values and "rows" in values:  # textok_fast.ops.report
            merged["kernels"].append(values)
        elif "parts" in values:  # a former merge
            for key in ("parts", "ops", "kernels", "speedup", "studies"):
                merged[key] += values.get(key, [])
            merged["machine"] = merged["machine"] or values.get("machine", {})
    return merged


def row_of(benchmark: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any] | None:
    """What benchmarks/alternating.py measured in one test; None for a benchmark that compares nothing."""
    extra = benchmark.get("extra_info", {})
    if "contenders" not in extra:
        return None
    return {"test": benchmark["name"], "commit": machine.get("git_commit"), **extra}


# -- tables -------------------------------------------------------------------------------------------------------------------


def tables(merged: Mapping[str, Any]) -> str:
    lines: list[str] = []
    machine = merged["machine"]
    if machine:
        gpus = ", ".join(gpu["name"] for gpu in machine.get("gpus", []))
        lines += [
            f"Machine: {machine['cpu']}, {machine['threads']} threads{', ' + gpus if gpus else ''}; torch {machine['torch']}"
        ]
        lines[-1] += f", Python {machine['python']}, commit {machine['git_commit'] or 'unknown'}."
        lines += [
            "",
            "Medians; in brackets replayed from a CUDA graph, or on a CPU processor time of all threads. The columns from",
        ]
        lines[-1] += " 'x baseline' on are of 'chosen'; the copy ceiling is the machine's measured bandwidth from memory."
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in merged["ops"]:
        groups.setdefault((row["operation"], row["device"]), []).append(row)
    for (operation, device), rows in groups.items():
        lines += ["", f"### {operation} ({device})", "", *operation_table(rows)]
    for report in merged["kernels"]:
        rows = report["rows"]
        compiled = sum(not row["skipped"] and not row["error"] for row in rows)
        lines += [
            "",
            f"Kernels ahead of time (Triton {report['triton']}): {compiled} compiled, {len(report['problems'])} problems.",
        ]
        lines += [f"- {problem}" for problem in report["problems"]]
    for result in merged["speedup"]:
        lines += ["", "### One step of DiT, many tokens against few", "", *speedup_table(result)]
    for study in merged["studies"]:
        # Its plots lie elsewhere, and its headings go below ours.
        text = [line for line in study["table"].splitlines() if not line.startswith("![")]
        lines += ["", *(f"##{line}" if line.startswith("#") else line for line in text)]
    if merged["parts"]:
        lines += ["", "| part | ended | seconds |", "|---|---|---:|"]
        lines += [f"| {part['part']} | {part['status']} | {part.get('seconds', '')} |" for part in merged["parts"]]
    return "\n".join(lines).strip() + "\n"


def operation_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Microseconds a call: issued by Python, and in brackets replayed from a CUDA graph; on a CPU wall and processor time. The
    last columns are of ``chosen``: the graph's time where there is one, else the wall time."""
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    names.sort(key=lambda name: (name in LAST, LAST.index(name) if name in LAST else 0, name not in FIRST))
    heads = [
        "case",
        "dtype",
        "inputs from",
        *(f"{name} us" for name in names),
        "x baseline (p10 .. p90)",
        "GB/s",
        "of copy ceiling",
    ]
    flops = any(row["flops"] for row in rows)
    processor = any("processor" in entry for row in rows for entry in row["contenders"].values())
    heads += ["TFLOP/s"] * flops + ["x baseline in processor time"] * processor
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|" + "---:|" * (len(heads) - 3)]
    for row in rows:
        case = ", ".join(f"{key} {value}" for key, value in row["shape"].items())
        cells = [case, row["dtype"], row["inputs"], *(time_cell(row["contenders"].get(name)) for name in names)]
        chosen = row["contenders"].get("chosen", {})
        best = chosen.get("graph") or chosen.get("launch")
        if best:
            cells.append(f"{figures(best['ratio'])} ({figures(best['ratio_p10'])} .. {figures(best['ratio_p90'])})")
            cells.append(figures(best["bytes_per_s"] / 1e9) if "bytes_per_s" in best else "")
            cells.append(f"{100 * best['copy_share']:.0f} %" if "copy_share" in best else "")
            cells += [figures(best["flops_per_s"] / 1e12) if "flops_per_s" in best else ""] * flops
            cells += [figures(chosen["processor"]["ratio"]) if "processor" in chosen else ""] * processor
        cells += [""] * (len(heads) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def time_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or "launch" not in entry:
        return "failed" if entry is not None and "error" in entry else "-"
    text = figures(1e6 * entry["launch"]["median"])
    second = entry.get("graph") or entry.get("processor")
    return f"{text} ({figures(1e6 * second['median'])})" if second else text


def speedup_table(result: Mapping[str, Any]) -> list[str]:
    lines = ["| dtype | batch | tokens | ms a step | of peak | x slower than the fewest |", "|---|---:|---:|---:|---:|---:|"]
    ratios = {(ratio["dtype"], ratio["batch"], ratio["tokens"]): ratio["wall"] for ratio in result["ratios"]}
    for row in result["rows"]:
        ratio = ratios.get((row["dtype"], row["batch"], row["tokens"]), 1.0)
        wall, share = figures(1e3 * row["wall"]["median"]), f"{100 * row['peak_share']:.0f} %"
        lines.append(f"| {row['dtype']} | {row['batch']} | {row['tokens']:,} | {wall} | {share} | {figures(ratio)} |")
    return lines


def figures(value: float) -> str:
    """Three significant figures."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# -- files --------------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def part_of(text: str) -> dict[str, Any]:
    """``NAME:SECONDS:STATUS``, as on_gpu.sh says how each part ended."""
    name, _, rest = text.partition(":")
    seconds, _, status = rest.partition(":")
    return {"part": name, "status": status, "seconds": int(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--merge", type=Path, metavar="OUT.json", help="also write everything into one file")
    parser.add_argument(
        "--part", action="append", default=[], metavar="NAME:SECONDS:STATUS", help="how a part of a session ended"
    )
    parser.add_argument("--commit", help="of the tree that was measured, where that is a copy without .git")
    args = parser.parse_args()
    merged = read(args.files)
    if args.commit and merged["machine"] and not merged["machine"].get("git_commit"):
        merged["machine"]["git_commit"] = args.commit
    merged["parts"] += [part_of(text) for text in args.part]
    merged["written"] = datetime.now(UTC).isoformat(timespec="seconds")
    if args.merge is not None:
        write(args.merge, json.dumps(merged, indent=1) + "\n")
    print(tables(merged), end="")


if __name__ == "__main__":
    main()
