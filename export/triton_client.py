"""Asks a Triton Inference Server with textok-fast's models for pictures: pip install "tritonclient[http]" pillow

python client.py "a red circle on green" --steps 20 --guidance-scale 4 --out circle.png
python client.py --label 207 --seed 0 --count 4

Needs nothing else of textok-fast. Give it an environment of its own: tritonclient holds ml_dtypes below what onnx brings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton  # type: ignore[import-not-found]

TYPES = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "label": "INT64",
    "seed": "INT64",
    "steps": "INT32",
    "guidance_scale": "FP32",
}
NUMPY = {"BYTES": np.object_, "INT64": np.int64, "INT32": np.int32, "FP32": np.float32}


def generate(client: Any, count: int = 1, **given: Any) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Pictures (count, S, S, 3) uint8 and the seeds they were drawn from.

    ``given``: any of :data:`TYPES`, one value for all samples or a list of one each; None is left to the server.
    """
    inputs = []
    for name, value in given.items():
        if value is None:
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if name == "seed" and not isinstance(value, (list, tuple)):
            values = [value + i for i in range(count)]
        tensor = triton.InferInput(name, [count, 1], TYPES[name])
        column = [each.encode() for each in values] if TYPES[name] == "BYTES" else values
        tensor.set_data_from_numpy(np.array(column, NUMPY[TYPES[name]]).reshape(count, 1))
        inputs.append(tensor)
    outputs = [triton.InferRequestedOutput(name) for name in ("image", "seed")]
    result = client.infer("generate", inputs, outputs=outputs)
    return result.as_numpy("image"), result.as_numpy("seed")[:, 0].tolist()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--label", type=int)
    parser.add_argument("--seed", type=int, help="sample i is drawn from seed + i")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    options = vars(parser.parse_args(arguments))
    url, out, count = options.pop("url"), options.pop("out"), options.pop("count")

    from PIL import Image

    pictures, seeds = generate(triton.InferenceServerClient(url, network_timeout=600), count, **options)
    for i, (picture, seed) in enumerate(zip(pictures, seeds, strict=True)):
        path = out if count == 1 else out.with_stem(f"{out.stem}-{i}")
        Image.fromarray(picture).save(path)
        print(f"{path} (seed {seed})")


if __name__ == "__main__":
    main()
