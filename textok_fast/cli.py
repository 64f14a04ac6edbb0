"""The ``textok-fast`` command.

A caller's mistake ends with one line on stderr and status 2, Ctrl-C with status 130; whatever was finished stays on the disk.
torch and everything that needs it is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import inspect
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textok_fast import __version__
from textok_fast.config import (
    GENERATOR_SIZES,
    DataConfig,
    GeneratorTrainConfig,
    TokenizerTrainConfig,
    load_config,
    recipe_about,
    recipe_names,
    recipe_path,
    recipe_sections,
)
from textok_fast.errors import InputError

if TYPE_CHECKING:
    from textok_fast.data import CaptionedImages
    from textok_fast.inference.plan import Plan
    from textok_fast.inference.precision import Precision
    from textok_fast.training.loop import TrainResult

# Of a plan, and what chooses a precision by the machine.
PRECISIONS = ("fp32", "bf16", "fp8", "int8", "auto")
# Of interop.KINDS, which a test compares.
WEIGHT_KINDS = ("dit", "diffusers-dit", "dit-1d", "sit-1d", "titok", "tatitok", "softvq", "maetok", "sd-vae")
# Of textok_fast.export, which a test compares.
EXPORT_WHAT = ("encoder", "decoder", "generator", "text", "all")
EXPORT_TARGETS = ("onnx", "aoti", "tensorrt", "tensorrt-rtx", "triton-server")
EXPORT_PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
COMPILE_MODES = ("none", "default", "max-autotune")

# What a command returns is what --json prints; None where another process of the run prints it.
Handler = Callable[[argparse.Namespace], dict[str, Any] | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for a caller's mistake, 130 for Ctrl-C."""
    args = _parse(argv)
    args.command_line = shlex.join(["textok-fast", *(sys.argv[1:] if argv is None else argv)])
    try:
        _load_libraries(args)
        # With --json stdout belongs to the JSON, whoever prints.
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            result = args.handler(args)
        if args.json and result is not None:
            print(json.dumps(result, indent=2, ensure_ascii=False))
        sys.stdout.flush()
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted: what was written so far is kept (training goes on with --resume)", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nothing to tell anyone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ConnectionError as error:  # of another process of the run, or of the network
        from textok_fast.training.parallel import leave

        return leave(_fail(str(error)))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(
                f"the disk is full{f' ({error.filename})' if error.filename else ''}: free some space and run it again"
            )
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; settings (key=value) may stand before and behind options, which argparse does not allow by itself."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _load_libraries(args: argparse.Namespace) -> None:
    """What the commands need anyway, and then the usual Ctrl-C (see :mod:`textok_fast.__main__`)."""
    import numpy  # noqa: F401

    if args.handler not in (run_data_fetch, run_data_preview, run_data_make, run_data_pack, run_recipes):
        import torch  # noqa: F401
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


# -- the parser -----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="textok-fast",
        description="Text-conditioned image tokenization and generation over few tokens, fast.",
        epilog=_epilog("textok-fast demo --out runs/demo"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"textok-fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", run_demo, "train, compare, generate and measure on real pictures; ends with report.html",
        "textok-fast demo --out runs/demo")  # fmt: skip
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory of the report (default: %(default)s)")
    demo.add_argument(
        "--source", choices=("emoji", "stamps", "shapes"), default="emoji", help="the pictures (default: %(default)s)"
    )
    demo.add_argument("--steps", type=int, default=None, help="training steps of the tokenizers (default: the recipe's)")
    demo.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs (about two minutes)")

    kinds = _group(commands, "data", "fetch and look at captioned pictures",
        "textok-fast data preview --out sheet.png source=emoji")  # fmt: skip
    fetch = _command(kinds, "fetch", run_data_fetch, "fetch pictures into the cache, without root, and say their licence",
        "textok-fast data fetch emoji")  # fmt: skip
    fetch.add_argument("source", choices=("emoji", "stamps", "shapes"))
    fetch.add_argument("--force", action="store_true", help="fetch again even if they are there")
    preview = _command(kinds, "preview", run_data_preview, "write one sheet of example pictures and captions",
        "textok-fast data preview --out sheet.png source=emoji image_size=128")  # fmt: skip
    preview.add_argument("--out", type=Path, default=Path("sheet.png"))
    preview.add_argument("--count", type=int, default=16)
    _data_options(preview)
    make = _command(kinds, "make", run_data_make, "write pictures with captions as PNG and text files",
        "textok-fast data make --count 100 --out scenes source=emoji image_size=64")  # fmt: skip
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--count", type=int, default=100)
    _data_options(make)

    pack = _command(kinds, "pack", run_data_pack, "write captioned pictures as WebDataset shards; resumable",
        "textok-fast data pack --images photos --out shards")  # fmt: skip
    pack.add_argument("--images", help="folder of captioned pictures, or shards; other sources are settings")
    pack.add_argument("--out", type=Path, required=True)
    pack.add_argument("--shard-pictures", type=int, default=10_000, help="at most so many a shard (default: %(default)s)")
    pack.add_argument("--shard-mb", type=int, default=256, help="at most so many MiB a shard (default: %(default)s)")
    pack.add_argument("--resize", type=int, default=0, metavar="PIXELS",
        help="bring the short side of larger pictures to this (default: every file stays as it is)")  # fmt: skip
    pack.add_argument("--quality", type=int, default=95, help="of JPEGs that --resize writes (default: %(default)s)")
    pack.add_argument("--captioned-only", action="store_true", help="leave out pictures without a caption")
    pack.add_argument("--split", default="all", help="for files train, validation or all (default: %(default)s)")
    pack.add_argument("--count", type=int, help="of generated scenes, how many")
    pack.add_argument("overrides", nargs="*", metavar="key=value",
        help="settings: source=huggingface path=owner/name huggingface.streaming=true")  # fmt: skip

    kinds = _group(commands, "train", "train a tokenizer or a generator; resumable",
        "textok-fast train tokenizer --recipe demo run.output_dir=runs/tok")  # fmt: skip
    tokenizer = _command(kinds, "tokenizer", run_train_tokenizer, "train a TexTok tokenizer",
        "textok-fast train tokenizer --recipe demo run.output_dir=runs/tok model.num_tokens=8")  # fmt: skip
    _config_options(tokenizer, TokenizerTrainConfig)
    generator = _command(kinds, "generator", run_train_generator, "train a DiT over a tokenizer's tokens",
        "textok-fast train generator --recipe demo tokenizer=runs/tok/final run.output_dir=runs/dit")  # fmt: skip
    _config_options(generator, GeneratorTrainConfig)

    recipes = _command(commands, "recipes", run_recipes, "list the recipes of `train`, or print one with its comments",
        "textok-fast recipes textok-32-256")  # fmt: skip
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print this one, to copy and change")

    encode = _command(commands, "encode", run_encode, "write the tokens of a folder of captioned pictures; resumable",
        "textok-fast encode --model runs/tok/final --images photos --out tokens")  # fmt: skip
    encode.add_argument("--model", required=True, help="tokenizer: a directory or a Hub id")
    encode.add_argument(
        "--images",
        help="folder with captions (.txt beside, captions.jsonl, .csv, .parquet) or .tar shards, or shards/{000..009}.tar, or "
        "a URL; a tokenizer whose encoder reads no text needs no captions",
    )
    encode.add_argument("--out", type=Path, required=True)
    encode.add_argument("--format", choices=("safetensors", "webdataset"), default="safetensors")
    encode.add_argument("--batch-size", type=int, default=32)
    encode.add_argument("--shard-size", type=int, default=1024, help="pictures a shard (default: %(default)s)")
    encode.add_argument("--captions", type=int, default=0, metavar="N",
        help="of a picture with several so many are encoded, each with tokens of its own (default: all)")  # fmt: skip
    encode.add_argument("--workers", type=int,
        help="processes, on this machine's GPUs in turn (default: 1); with --ray actors (default: as it has room)")  # fmt: skip
    encode.add_argument(
        "--ray", metavar="ADDRESS", help="on a Ray cluster: its address, auto or local; its machines all see --out"
    )
    _plan_options(encode)
    encode.add_argument("overrides", nargs="*", metavar="key=value",
        help="settings of the data: crop=adm, or instead of --images source=huggingface path=owner/name")  # fmt: skip

    decode = _command(commands, "decode", run_decode, "turn tokens that `encode` wrote back into pictures; resumable",
        "textok-fast decode --model runs/tok/final --tokens tokens --out pictures")  # fmt: skip
    decode.add_argument("--model", required=True, help="tokenizer: a directory or a Hub id")
    decode.add_argument("--tokens", type=Path, required=True, help="directory that `encode` wrote")
    decode.add_argument("--out", type=Path, required=True)
    decode.add_argument("--no-captions", action="store_true", help="decode with the null caption instead of the stored ones")
    decode.add_argument("--batch-size", type=int, default=32)
    _plan_options(decode)

    sample = _command(commands, "sample", run_sample, "generate pictures from captions or classes; resumable",
        'textok-fast sample --model runs/dit/final --prompt "cow top left; red background" --out samples')  # fmt: skip
    sample.add_argument(
        "--model", required=True, help="directory that `train generator` (its final/) or `convert --tokenizer` wrote"
    )
    sample.add_argument("--prompt", action="append", default=[],
        help="a caption; repeat for several. With --label: what the decoder reads, one for each label")  # fmt: skip
    sample.add_argument("--prompts", type=Path, help="a file with one caption a line")
    sample.add_argument("--label", action="append", default=[], help="a class, by name or index; repeat for several")
    sample.add_argument("--images", metavar="FOLDER",
        help="small pictures for a generator of super-resolution, with captions or without; --prompt replaces these, one each",
    )  # fmt: skip
    sample.add_argument(
        "--count", type=int, default=1, help="pictures for each prompt, label or small picture (default: %(default)s)"
    )
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--steps", type=int, default=50)
    sample.add_argument("--sampler", default="",
        help="ddpm, ddim, dpmpp_2m or unipc; for a flow euler, heun or sde (default: the first of them)")  # fmt: skip
    sample.add_argument(
        "--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1 is none (default: %(default)s)"
    )
    sample.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide only where LOW <= t <= HIGH"
    )
    sample.add_argument("--guided-channels", type=int, metavar="N",
        help="guide a sample's first N channels (default: as the generator's config says)")  # fmt: skip
    sample.add_argument("--out", type=Path, required=True)
    _plan_options(sample)
    sample.add_argument("--split", action="store_true", help="run a batch that does not fit into memory in parts")

    convert = _command(commands, "convert", run_convert, "write other people's weights in this library's format",
        "textok-fast convert --from sit-1d --weights SoftVQVAE/sit-xl_softvq-l-32-512 "
        "--tokenizer SoftVQVAE/softvq-l-32-512 --out runs/sit")  # fmt: skip
    convert.add_argument("--from", dest="kind", choices=WEIGHT_KINDS, help="what it is (default: guessed from its tensors)")
    convert.add_argument(
        "--weights", required=True, help="a file, a directory, or a Hub id: owner/name, or with /folder or /file.pt"
    )
    convert.add_argument(
        "--tokenizer",
        help="weights of a generator's tokenizer, an SD-VAE for a DiT over 2-D latents: --out becomes a pipeline for `sample`",
    )
    convert.add_argument("--out", type=Path, required=True)
    convert.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="what shapes do not tell: heads=4, guided_channels=4, schedule=linear, tokenizer.heads=4, image_size=512",
    )

    export = _command(commands, "export", run_export, "write models for deployment, compared with PyTorch before they count",
        "textok-fast export --model runs/dit/final --to onnx --precision int8 --images photos --out deploy")  # fmt: skip
    export.add_argument(
        "--model", required=True, help="a tokenizer, a generator (directory or Hub id) or a pipeline's directory"
    )
    export.add_argument("--what", choices=EXPORT_WHAT, default="all", help="(default: all that there is)")
    export.add_argument("--to", choices=EXPORT_TARGETS, default="onnx", help="(default: %(default)s)")
    export.add_argument("--precision", choices=EXPORT_PRECISIONS, default="fp32",
        help="fp8 and int8 quantize the products, calibrated on the pictures (default: %(default)s)")  # fmt: skip
    export.add_argument("--images", type=Path, metavar="FOLDER",
        help="captioned pictures to calibrate and compare on (default: scenes of emoji, or of drawn shapes)")  # fmt: skip
    export.add_argument("--pictures", type=int, default=8, help="how many of them (default: %(default)s)")
    export.add_argument("--calibration", choices=("max", "percentile", "mse"), help="of fp8 and int8 (default: percentile)")
    export.add_argument(
        "--tolerance", type=float, help="what an output may differ by (default: by precision, in docs/export.md)"
    )
    export.add_argument("--opset", type=int, help="of the ONNX files, 20 to 25 (default: 20; from 23 on with Attention)")
    export.add_argument("--device", help="that packages of aoti are for: cpu, cuda or cuda:N (default: cpu)")
    export.add_argument("--targets", nargs="+", metavar="SM",
        help="GPUs that engines of tensorrt-rtx are for, as sm_89 (default: the one here, or sm_80, 86, 89, 120)")  # fmt: skip
    for name, what in (("batch", "samples"), ("text-length", "tokens of a caption")):
        export.add_argument(
            f"--{name}", nargs=3, type=int, metavar=("LEAST", "USUAL", "MOST"), help=f"{what} that engines serve"
        )
    export.add_argument("--timing-cache", type=Path, metavar="FILE", help="of tensorrt: kernel times, read and written")
    export.add_argument("--profile", action="append", nargs="+", metavar="NAME=LEAST,USUAL,MOST",
        help="sizes that engines serve, as batch=1,8,32 text_length=1,16,77; once a profile, narrow ones first")  # fmt: skip
    export.add_argument("--refit", action="store_true", default=None, help="engines whose weights can be replaced later")
    export.add_argument("--workspace", type=int, metavar="MIB", help="GPU memory that an engine's layer may use")
    export.add_argument("--level", type=int, choices=range(6), help="how long engines are searched for, 0 to 5")
    served = export.add_argument_group("served by Triton (--to triton-server)")
    served.add_argument("--backend", choices=("onnxruntime", "tensorrt"), help="what runs the networks (default: onnxruntime)")
    served.add_argument("--kind", choices=("auto", "gpu", "cpu"), help="where they run; cpu on a machine without a GPU")
    served.add_argument("--max-batch", type=int, help="samples that one execution may have")
    served.add_argument("--queue-delay", type=int, metavar="US", help="how long a request may wait for others")
    served.add_argument("--instances", type=int, help="of each network on each GPU")
    served.add_argument("--sampler", help="of generate (default: ddpm, of a flow euler)")
    served.add_argument("--steps", type=int, nargs="+", help="that generate offers, the first by default (default: 50 20 250)")
    served.add_argument("--guidance-scale", type=float, help="of generate where a request has none")
    export.add_argument("--out", type=Path, required=True)

    kinds = _group(commands, "evaluate", "measure tokenizers, generators and pictures; resumable, on one process or many",
        "textok-fast evaluate reconstruction --model runs/tok/final --images photos --out evaluation")  # fmt: skip
    reconstruction = _command(kinds, "reconstruction", run_evaluate, "rFID, PSNR, SSIM, LPIPS and codebook use of a tokenizer",
        "textok-fast evaluate reconstruction --model runs/tok/final --images photos --out evaluation")  # fmt: skip
    reconstruction.add_argument("--model", required=True, help="tokenizer: a directory or a Hub id")
    reconstruction.add_argument(
        "--images", required=True, help="captioned pictures: a folder, .tar shards, or an .npz batch, which has no captions"
    )
    reconstruction.add_argument(
        "--reference", default="", help="pictures or an .npz reference batch, for rFID (default: the originals)"
    )
    reconstruction.add_argument("--no-captions", action="store_true", help="give the tokenizer the null caption")
    generation = _command(kinds, "generation", run_evaluate, "gFID, sFID, IS, precision and recall of samples",
        "textok-fast evaluate generation --samples runs/dit/final --reference VIRTUAL_imagenet256_labeled.npz "
        "--inception published --out evaluation")  # fmt: skip
    generation.add_argument("--reference", default="",
        help="an .npz reference batch, a folder of pictures or .tar shards (of super-resolution the originals, by default)",
    )  # fmt: skip
    generation.add_argument("--images", default="",
        help="of super-resolution: captioned pictures, which are made small and worn by the seed, and compared with what it "
        "makes of them (default: the held-out split of what it was trained on)")  # fmt: skip
    generation.add_argument("--strength", type=float, metavar="S",
        help="of the wear of --images, 0 to 1 (default: that of the training)")  # fmt: skip
    text = _command(kinds, "text", run_evaluate, "CLIP score of pictures and their captions",
        "textok-fast evaluate text --samples samples --clip openai/clip-vit-large-patch14 --out evaluation")  # fmt: skip
    text.add_argument("--clip", default="", metavar="CLIP",
        help="a CLIP of transformers: a directory, a Hub id such as openai/clip-vit-base-patch32, or ID@REVISION")  # fmt: skip
    for made in (generation, text):
        made.add_argument(
            "--samples",
            required=True,
            help="a pipeline's directory (of `train generator`, or `convert --tokenizer`), which then makes them; a folder of "
            "pictures, such as `sample` writes; .tar shards; or an .npz batch",
        )
        made.add_argument("--prompts", type=Path, metavar="FILE",
            help="for a pipeline that reads captions: one a line, or a folder of captioned pictures, in turn")  # fmt: skip
        made.add_argument("--seed", type=int, default=0, help="sample i is made from seed + i (default: %(default)s)")
        made.add_argument("--steps", type=int, default=50)
        made.add_argument("--sampler", default="", help="as of `sample`")
        made.add_argument("--guidance", type=float, default=1.0)
        made.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"))
        made.add_argument("--guided-channels", type=int, metavar="N")
    reference = _command(kinds, "reference", run_evaluate, "write an .npz reference batch of a set of pictures",
        "textok-fast evaluate reference --images photos --inception published --out reference.npz")  # fmt: skip
    reference.add_argument("--images", required=True, help="a folder of pictures, .tar shards, or an .npz batch")
    study = _command(kinds, "study", run_evaluate_study,
        "train tokenizers with text here and there and with few and many tokens, and compare what text is worth",
        "textok-fast evaluate study --out runs/study --tokens 4 8 16 32 --seeds 0 1 2")  # fmt: skip
    study.add_argument("--out", type=Path, required=True)
    study.add_argument("--tokens", type=int, nargs="+", default=[4, 8, 16, 32], help="(default: 4 8 16 32)")
    study.add_argument("--text", nargs="+", default=["both", "encoder", "decoder", "none"],
        choices=("both", "encoder", "decoder", "none"), help="where the text goes (default: all four)")  # fmt: skip
    study.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    study.add_argument("--pictures", type=int, default=1024, help="compared of each split (default: %(default)s)")
    study.add_argument(
        "--features",
        nargs="+",
        default=["random", "pixels"],
        metavar="NETWORK",
        help="of the Fréchet distances: random, pixels, or a model of transformers by directory (default: random pixels)",
    )
    study.add_argument("--jobs", type=int, default=0, help="trainings at once (default: one a core, or one on a GPU)")
    study.add_argument("--recipe", default="study", help="of the tokenizers (default: %(default)s)")
    study.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all trainings: run.steps=2000")
    for task in (reconstruction, generation, text, reference):
        task.set_defaults(task=task.prog.rsplit(" ", 1)[-1])
        task.add_argument("--count", type=int, metavar="N",
            help="the first N pictures (default: all of a set; 50,000 of a pipeline)")  # fmt: skip
        task.add_argument("--out", type=Path, required=True)
        task.add_argument("--batch-size", type=int, default=32, help="of the models (default: %(default)s)")
        task.add_argument("--part-size", type=int, default=64, metavar="N",
            help="pictures whose results are kept together: what a stopped run loses (default: %(default)s)")  # fmt: skip
        task.add_argument("--crop", choices=("center", "adm"), default="center",
            help="of pictures in files: the center square resized by Lanczos, or by the steps that made ADM's reference "
            "batches and published numbers, adm (default: %(default)s)")  # fmt: skip
        _plan_options(task)
    for task in (generation, text, reference):
        task.add_argument("--image-size", type=int, help="of pictures in files (default: the first one's; shards need it)")
    for task in (reconstruction, generation):
        task.add_argument("--lpips", nargs="+", default=[], metavar="FILE",
            help="VGG16's weights for ImageNet: a file, a URL, a Hub id, or 'published'; and LPIPS' heads if not torchmetrics' "
            "copy" + ("; of super-resolution" if task is generation else ""))  # fmt: skip
        task.add_argument("--lpips-sha256", nargs="+", default=[], metavar="HASH",
            help="what these must have, in their order; a URL needs it")  # fmt: skip
        task.add_argument("--features", nargs="+", default=["inception"], metavar="NETWORK",
            help="inception, pixels, random, or a vision model of transformers by directory, Hub id or ID@REVISION "
            "(default: inception)",
        )  # fmt: skip
    for task in (reconstruction, generation, text):
        task.add_argument("--npz", action="store_true", help="also write the pictures as an .npz batch, for other evaluators")
    for task in (reconstruction, generation, reference):
        task.add_argument("--inception", default="", metavar="FILE",
            help="Inception's weights: a file, a URL, or 'published' (default: what an earlier download left in the cache)",
        )  # fmt: skip
        task.add_argument("--inception-sha256", default="", metavar="HASH", help="what they must have; a URL needs it")

    kinds = _group(commands, "bench", "measure this machine", "textok-fast bench speedup --out speedup")
    speedup = _command(kinds, "speedup", run_bench_speedup,
        "compare whole systems over few and over many tokens, in three forms each",
        "textok-fast bench speedup --out speedup --threads 2")  # fmt: skip
    speedup.add_argument("--out", type=Path, help="directory for results.json, results.md and plots")
    speedup.add_argument("--systems", nargs="+", default=[], metavar="SYSTEM",
        help="TexTok-32 (or another number), DiT/2, DiT/1 (default: by device)")  # fmt: skip
    speedup.add_argument("--forms", nargs="+", default=["reference", "compile", "engine"],
        choices=("reference", "compile", "engine"))  # fmt: skip
    speedup.add_argument("--dtype", nargs="+", default=[], choices=("fp32", "bf16", "int8", "fp8"),
        help="int8 (CPU) and fp8 (GPU) are the engine's only (default: by device)")  # fmt: skip
    speedup.add_argument("--batch", type=int, nargs="+", default=[], help="(default: by device)")
    speedup.add_argument("--sampler", default="ddpm", choices=("ddpm", "ddim"))
    speedup.add_argument("--steps", type=int, default=250)
    speedup.add_argument("--full", action="store_true", help="also time whole pictures, none of it scaled")
    speedup.add_argument(
        "--no-compile-parts",
        action="store_true",
        help="on a GPU: capture the engine form's text encoder and SD-VAE instead of compiling them, which takes minutes",
    )
    speedup.add_argument(
        "--rounds", type=int, default=5, help="rounds over all systems and forms, at most (default: %(default)s)"
    )
    speedup.add_argument(
        "--time-budget", type=float, default=5400.0, metavar="SECONDS",
        help="what does not come to 3 rounds within it is left out, and the result says so (default: %(default)s)",
    )  # fmt: skip
    speedup.add_argument("--text-encoder", default="minilm", help="minilm, or a transformers model by name or directory")
    speedup.add_argument("--size", choices=tuple(GENERATOR_SIZES), default="XL")
    speedup.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    speedup.add_argument("--device", default="auto")

    draw = _command(kinds, "draw", run_bench_draw, "write the table and the plots of `bench speedup` again",
        "textok-fast bench draw speedup/results.json")  # fmt: skip
    draw.add_argument("results", type=Path, help="results.json")
    draw.add_argument("--out", type=Path, help="directory (default: where the results are)")

    steps = _command(kinds, "steps", run_bench_steps, "time one step of a DiT in PyTorch over few and over many tokens",
        "textok-fast bench steps --size XL --tokens 32 1024 4096 --batch 1 --dtype fp32 bf16 --out steps.json")  # fmt: skip
    steps.add_argument("--size", choices=tuple(GENERATOR_SIZES), default="XL")
    steps.add_argument("--tokens", type=int, nargs="+", default=[32, 1024, 4096])
    steps.add_argument("--batch", type=int, nargs="+", default=[1])
    steps.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"))
    steps.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    steps.add_argument("--rounds", type=int, default=10, help="rounds over all token counts, at most (default: %(default)s)")
    steps.add_argument("--min-rounds", type=int, default=3)
    steps.add_argument("--warmup", type=int, default=2)
    steps.add_argument("--guidance", action="store_true", help="twice the batch, as a guided step runs")
    steps.add_argument("--time-budget", type=float, default=None, metavar="SECONDS")
    steps.add_argument("--device", default="auto")
    steps.add_argument("--out", type=Path, help="JSON; a Markdown table and an SVG plot are written beside it")

    deploy = _command(kinds, "deploy", run_bench_deploy, "time exported artifacts beside PyTorch and the engine, in turn",
        "textok-fast bench deploy deploy/fp32 deploy/int8 --model runs/dit/final --out deploy.json")  # fmt: skip
    deploy.add_argument("directories", nargs="+", metavar="DIR", help="directories that `export` wrote")
    deploy.add_argument("--model", required=True, help="what they were exported from")
    deploy.add_argument("--batch", type=int, nargs="+", default=[1])
    deploy.add_argument("--text-tokens", type=int, default=16, help="length of the captions (default: %(default)s)")
    deploy.add_argument("--steps", type=int, default=20, help="of whole samples, of a pipeline (default: %(default)s)")
    deploy.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    deploy.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    deploy.add_argument("--device", default="auto")
    deploy.add_argument("--out", type=Path, help="JSON; the table is written beside it")

    for name, (help_text, settings) in STUDIES.items():
        study = _command(kinds, name, run_bench_study, help_text, f"textok-fast bench {name} --out {name} {settings}")
        study.set_defaults(study=name)
        study.add_argument("--out", type=Path, help=f"directory for {name}.json and {name}.md")
        study.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings, such as {settings}")

    _command(commands, "info", run_info, "what is installed, what is lacking and why", "textok-fast info")
    return parser


def _epilog(example: str) -> str:
    return f"example:\n  {example}"


def _parser(group: Any, name: str, help_text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = group.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=_epilog(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _group(commands: Any, name: str, help_text: str, example: str) -> Any:
    """A command that has commands of its own: where to add them."""
    return _parser(commands, name, help_text, example).add_subparsers(required=True, metavar="COMMAND")


def _command(group: Any, name: str, handler: Handler, help_text: str, example: str) -> argparse.ArgumentParser:
    parser = _parser(group, name, help_text, example)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(handler=handler)
    return parser


def _config_options(parser: argparse.ArgumentParser, cls: type) -> None:
    parser.add_argument("--recipe", "--preset", dest="recipe",
        help=f"start from a recipe, by name or as a .yaml file: {', '.join(recipe_names(cls))}")  # fmt: skip
    parser.add_argument("--config", type=Path, help="YAML file with settings, laid over the recipe")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.output_dir if there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="single settings: optim.lr=3e-4 model.size=tiny")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    """How an engine runs the models. What is not given is None, so that a plan's file is overridden by what is."""
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the plan's, or the GPU where there is one)")
    parser.add_argument("--precision", choices=PRECISIONS,
        help="auto: bf16 where the processor computes with it, else fp32; int8 on a CPU, fp8 on a GPU from compute capability "
        "8.9 on (default: the plan's, or fp32)")  # fmt: skip
    parser.add_argument("--compile", nargs="?", const="default", choices=COMPILE_MODES,
        help="run the networks through torch.compile, in this mode (--compile alone: default; without it: the plan's, or none)",
    )  # fmt: skip
    parser.add_argument("--plan", type=Path, metavar="FILE",
        help="JSON of an inference.Plan, such as the plan.json that each run writes into --out; other options override it",
    )  # fmt: skip


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="train", help="train, composition or object; for files train, validation or all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings: source=emoji objects=128 image_size=64")


# -- commands: each returns what --json prints ----------------------------------------------------------------------------


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.demo import demo

    return demo(args.out, source=args.source, steps=args.steps, quick=args.quick, command=args.command_line)


def run_data_fetch(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.data import fetch

    found = fetch(args.source, force=args.force)
    where = f"in {found.directory}" if found.directory else "drawn when they are needed"
    print(f"{found.name}: {found.pictures:,} pictures {where}\n{found.note}\nlicence: {found.licence}")
    return {
        "source": found.name,
        "directory": str(found.directory) if found.directory else None,
        "pictures": found.pictures,
        "licence": found.licence,
        "note": found.note,
    }


def _dataset(args: argparse.Namespace) -> CaptionedImages:
    from textok_fast.data import load_dataset

    return load_dataset(load_config(DataConfig, overrides=args.overrides), args.split)


def run_data_preview(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.data import contact_sheet
    from textok_fast.files import write_atomically

    dataset = _dataset(args)
    sheet = contact_sheet(dataset, args.count)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, lambda path: sheet.save(path, format="PNG"))
    print(f"{dataset.describe()}\nwrote {args.out}")
    return {"out": str(args.out), "data": dataset.describe(), "skipped": dataset.skipped}


def run_data_make(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.data import materialize

    dataset = _dataset(args)
    new = materialize(dataset, args.out, args.count)
    print(f"{dataset.describe()}\nwrote {new} pictures to {args.out} ({min(args.count, len(dataset)) - new} were there)")
    return {"out": str(args.out), "new": new, "data": dataset.describe(), "skipped": dataset.skipped}


def run_data_pack(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.data import PackOptions, load_dataset, pack

    options = PackOptions(args.shard_pictures, args.shard_mb * 2**20, args.resize, args.quality)
    dataset = load_dataset(_pictures(args), args.split, args.count, need_captions=args.captioned_only)
    with _progress("pack", args.json) as advance, _progress("check", args.json) as checked:
        report = pack(dataset, args.out, options, advance, checked)
    skipped = f", left out {len(report['skipped'])} corrupt ones" if report["skipped"] else ""
    print(
        f"{dataset.describe()}\nwrote {report['pictures']:,} pictures in {report['shards']} shards ({report['bytes']:,} bytes; "
        f"{report['shards_reused']} shards were there{skipped}) and index.json to {args.out}; every shard was read again"
    )
    return {**report, "data": dataset.describe()}


def _pictures(args: argparse.Namespace) -> DataConfig:
    """The data that --images and settings name."""
    from textok_fast.data import data_of

    given: list[str] = []
    if args.images is not None:
        found = data_of(args.images)
        given = [f"source={found.source}", f"path={json.dumps(found.path)}"]
    config = load_config(DataConfig, overrides=[*given, *args.overrides])
    if args.images is None and not args.overrides:
        raise InputError("give --images, or settings of the data such as source=huggingface path=owner/name")
    return config


def run_train_tokenizer(args: argparse.Namespace) -> dict[str, Any] | None:
    from textok_fast.training import train_tokenizer

    config = load_config(TokenizerTrainConfig, args.recipe, args.config, args.overrides)
    result = train_tokenizer(config, resume=args.resume, progress=not args.json)
    return _trained(result, f"wrote {result.final} (the tokenizer), {result.run / 'log.jsonl'} and {result.run / 'samples'}")


def run_train_generator(args: argparse.Namespace) -> dict[str, Any] | None:
    from textok_fast.training import train_generator

    config = load_config(GeneratorTrainConfig, args.recipe, args.config, args.overrides)
    with _progress("tokens", args.json) as advance:
        result = train_generator(config, resume=args.resume, progress=not args.json, on_cache=advance)
    return _trained(result, f"wrote {result.final} (generator and tokenizer) and {result.run / 'log.jsonl'}")


def _trained(result: TrainResult, text: str) -> dict[str, Any] | None:
    """What training left; of several processes the main one tells it."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return None
    print(text)
    return {"run": str(result.run), "final": str(result.final), "last": result.history[-1] if result.history else None}


def run_recipes(args: argparse.Namespace) -> dict[str, Any]:
    if args.name is not None:
        text = recipe_path(args.name).read_text(encoding="utf-8")
        print(text, end="")
        return {"name": args.name, "text": text}
    listed = [{"name": name, "for": recipe_sections(name), "about": recipe_about(name)} for name in recipe_names()]
    for recipe in listed:
        print(f"{recipe['name']:<22} {', '.join(recipe['for']):<22} {recipe['about']}")
    return {"recipes": listed}


def run_encode(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.inference.folders import encode_folder

    plan = _plan(args, args.batch_size)
    with _progress("encode", args.json, _announced(plan, args.out)) as advance:
        report = encode_folder(
            args.model,
            _pictures(args),
            args.out,
            args.format,
            args.batch_size,
            args.shard_size,
            plan,
            advance,
            workers=args.workers if args.workers is not None else int(args.ray is None),
            ray=args.ray,
            captions=args.captions,
        )
    skipped = "".join(f", skipped {count} ({reason})" for reason, count in report["skipped"].items() if count)
    print(
        f"wrote {report['pictures']} pictures' tokens to {args.out} ({report['shards_reused']} shards were there{skipped})",
    )
    return {**report, "plan": plan.to_dict()}


def run_decode(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.inference.folders import decode_folder

    plan = _plan(args, args.batch_size)
    with _progress("decode", args.json, _announced(plan, args.out)) as advance:
        report = decode_folder(args.model, args.tokens, args.out, args.batch_size, not args.no_captions, plan, advance)
    print(f"wrote {report['new']} pictures to {args.out} ({report['pictures'] - report['new']} were there)")
    return {**report, "plan": plan.to_dict()}


def run_sample(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.inference.folders import sample_to_folder

    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += _lines(args.prompts)
    plan = _plan(args, max(len(prompts), len(args.label)) * args.count)
    with _progress("sample", args.json, _announced(plan, args.out)) as advance:
        report = sample_to_folder(
            args.model,
            prompts,
            args.label,
            args.out,
            count=args.count,
            seed=args.seed,
            steps=args.steps,
            sampler=args.sampler,
            guidance=args.guidance,
            interval=tuple(args.guidance_interval) if args.guidance_interval else None,
            guided_channels=args.guided_channels,
            plan=plan,
            images=args.images,
            progress=advance,
        )
    print(
        f"wrote {report['new']} pictures to {args.out} ({len(report['images']) - report['new']} were there) "
        f"and their tokens to {report['tokens']}"
    )
    return {**report, "plan": plan.to_dict()}


def run_convert(args: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from textok_fast.interop import convert

    options: dict[str, dict[str, Any]] = {"": {}, "tokenizer": {}}
    for item in args.overrides:
        key, equals, value = item.partition("=")
        whose, _, name = key.rpartition(".")
        taken = name in ("kind", "weights", "out", "tokenizer", "tokenizer_options")  # these are --options
        if not equals or not name.isidentifier() or whose not in options or taken:
            raise InputError(f"settings are key=value, or tokenizer.key=value, got {item!r}")
        options[whose][name] = yaml.safe_load(value)
    report = convert(args.kind, args.weights, args.out, args.tokenizer, tokenizer_options=options["tokenizer"], **options[""])
    beside = f", with {report['tokenizer']}, pictures of {report['image_size']} px" if "tokenizer" in report else ""
    print(f"{report['kind']} ({report['what']}), {report['parameters']:,} parameters{beside}\nwrote {report['out']}")
    return report


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.export import export

    options: dict[str, Any] = {"what": args.what, "precision": args.precision, "images": args.images, "pictures": args.pictures}
    given = {"calibration": args.calibration, "tolerance": args.tolerance, "device": args.device}
    given |= {"targets": args.targets, "timing_cache": args.timing_cache, "opset": args.opset}
    given |= {"refit": args.refit, "level": args.level, "workspace": None if args.workspace is None else args.workspace << 20}
    sizes = {"batch": args.batch, "text_length": args.text_length}
    if profile := {name: tuple(size) for name, size in sizes.items() if size is not None}:
        given["profiles"] = [profile]
    if args.profile:
        if profile:
            raise InputError("--batch and --text-length are one profile, --profile each of several: give one kind or the other")
        given["profiles"] = [dict(map(_profile_size, sizes)) for sizes in args.profile]
    ours = ("backend", "kind", "max_batch", "queue_delay", "instances", "sampler", "steps", "guidance_scale")
    if served := {name: getattr(args, name) for name in ours if getattr(args, name) is not None}:
        if args.to != "triton-server":
            flag = next(iter(served)).replace("_", "-")
            raise InputError(f"--{flag} is of --to triton-server, this is an export to {args.to}")
        from textok_fast.export.server import ServerOptions

        given["server"] = ServerOptions(**served)
    options |= {name: value for name, value in given.items() if value is not None}

    def say(what: str) -> None:
        print(f"{what} ...", file=sys.stderr, flush=True)

    exported = export(args.model, args.out, args.to, progress=say, **options)
    print((args.out / "parity.md").read_text(encoding="utf-8"))
    names = ", ".join(entry["file"] for entry in exported.manifest.files.values())
    print(f"wrote {args.out}: {names}, export.json, parity.json and parity.md")
    return exported.to_dict()


def _profile_size(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME=LEAST,USUAL,MOST of ``export --profile``."""
    name, _, sizes = text.partition("=")
    try:
        found = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        found = ()
    if not name or len(found) != 3:
        raise InputError(f"a profile's sizes are NAME=LEAST,USUAL,MOST, such as batch=1,8,32; got {text!r}")
    return name, found


def run_evaluate(args: argparse.Namespace) -> dict[str, Any] | None:
    """One of the tasks; of several processes the main one tells the result."""
    from textok_fast.evaluation import evaluate
    from textok_fast.evaluation.parts import Processes

    _require_writable(args.out if args.task == "reference" else args.out / f"{args.task}.json")
    processes = Processes.join()  # before anything asks which GPU is this process's
    with _progress(args.task, args.json or not processes.is_main) as advance:
        given: dict[str, Any] = {
            "count": args.count,
            "crop": args.crop,
            "plan": _plan(args, args.batch_size),
            "batch_size": args.batch_size,
            "part_size": args.part_size,
            "command": args.command_line,
            "progress": advance,
        }
        for name in ("features", "inception", "inception_sha256", "lpips_sha256", "image_size", "npz"):
            if hasattr(args, name):
                given[name] = getattr(args, name)
        options = evaluate.Options(**given)
        if args.task == "reference":
            written = evaluate.write_reference(args.images, args.out, options)
            if written is not None:
                print(f"wrote {args.out}: statistics of {written['pictures']:,} pictures, and {written['kept']:,} of them")
            return written
        lpips = getattr(args, "lpips", [])
        if len(lpips) > 2:
            raise InputError(f"--lpips takes VGG16's weights, and maybe LPIPS' heads, got {' '.join(lpips)}")
        vgg, heads = (*lpips, "", "")[:2]
        if args.task == "reconstruction":
            captions = not args.no_captions
            found = evaluate.evaluate_reconstruction(
                args.model,
                args.images,
                args.out,
                reference=args.reference,
                with_captions=captions,
                lpips=(vgg, heads),
                options=options,
            )
        else:
            interval = tuple(args.guidance_interval) if args.guidance_interval else None
            prompts: list[str] = []
            if args.prompts is not None:
                prompts = evaluate.captions_of(args.prompts) if args.prompts.is_dir() else _lines(args.prompts)
            sampling = evaluate.Sampling(
                prompts, args.seed, args.steps, args.sampler, args.guidance, interval, args.guided_channels
            )
            if args.task == "generation" and evaluate.is_super_resolution(args.samples):
                found = evaluate.evaluate_super_resolution(
                    args.samples,
                    args.out,
                    images=args.images,
                    reference=args.reference,
                    strength=args.strength,
                    lpips=(vgg, heads),
                    sampling=sampling,
                    options=options,
                )
            elif args.task == "generation":
                if args.images or lpips or args.lpips_sha256 or args.strength is not None:
                    raise InputError(
                        "--images, --strength and --lpips are of super-resolution, which is compared with originals"
                    )
                if not args.reference:
                    raise InputError("give --reference, what the samples are compared with: a batch, a folder or shards")
                found = evaluate.evaluate_generation(
                    args.samples, args.out, reference=args.reference, sampling=sampling, options=options
                )
            else:
                found = evaluate.evaluate_text(args.samples, args.out, clip=args.clip, sampling=sampling, options=options)
    if found is None:
        return None
    print(found.to_markdown())
    print(f"wrote {', '.join(found.files)}; parts/ beside them is only needed to go on")
    return found.to_dict()


def run_evaluate_study(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.evaluation.text_study import StudyConfig, table, text_study

    _require_writable(args.out / "study.json")
    config = StudyConfig(
        args.out, args.tokens, args.text, args.seeds, args.pictures, args.features, args.jobs, args.recipe, args.overrides
    )
    result = text_study(config, command=args.command_line)
    print(table(result))
    print(f"wrote {args.out}/study.json, study.md and two plots for each split; every tokenizer is in NAME/final there")
    return result


def run_bench_speedup(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.evaluation.speedup import SpeedupConfig, SpeedupResult, run_speedup
    from textok_fast.evaluation.speedup_report import console, save

    config = SpeedupConfig(
        size=args.size,
        systems=tuple(args.systems),
        forms=tuple(args.forms),
        precisions=tuple(args.dtype),
        batch=tuple(args.batch),
        sampler=args.sampler,
        steps=args.steps,
        rounds=args.rounds,
        min_rounds=min(args.rounds, SpeedupConfig.min_rounds),
        time_budget_s=args.time_budget,
        full=args.full,
        compile_parts=not args.no_compile_parts,
        text_encoder=args.text_encoder,
        threads=args.threads,
        device=args.device,
    )
    if args.out is not None:
        _require_writable(args.out / "results.json")
    written: list[Path] = []

    def keep(result: SpeedupResult) -> None:
        if args.out is not None:
            written[:] = save(result, args.out)

    result = run_speedup(config, command=args.command_line, on_result=keep)
    print(console(result))
    if written:
        print("wrote " + ", ".join(map(str, written)))
    return result.to_dict()


def run_bench_draw(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.evaluation.speedup import load
    from textok_fast.evaluation.speedup_report import RESULTS_NAME, save

    out = args.results.parent if args.out is None else args.out
    result = load(args.results)
    _require_writable(out / RESULTS_NAME)
    written = save(result, out)
    print("wrote " + ", ".join(map(str, written)))
    return {"written": [str(path) for path in written]}


def run_bench_steps(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.evaluation import StepTimesConfig, StepTimesResult, console_table, run_step_times, save

    config = StepTimesConfig(
        size=args.size,
        tokens=tuple(args.tokens),
        batch=tuple(args.batch),
        dtypes=tuple(args.dtype),
        threads=args.threads,
        rounds=args.rounds,
        min_rounds=min(args.rounds, args.min_rounds),
        warmup=args.warmup,
        device=args.device,
        guidance=args.guidance,
        time_budget_s=args.time_budget,
    )
    if args.out is not None:
        _require_writable(args.out)
    written: list[Path] = []

    def keep(result: StepTimesResult) -> None:
        if args.out is not None:
            written[:] = save(result, args.out)

    result = run_step_times(config, command=args.command_line, on_result=keep)
    print(console_table(result))
    if written:
        print("wrote " + ", ".join(map(str, written)))
    return result.to_dict()


# command -> what it does, and settings for its example; textok_fast.evaluation.NAME has run_NAME and NameConfig
STUDIES = {
    "peers": ("compare the engine's step with other engines on the same weights", "tokens=[32] threads=[1]"),
    "profile": ("write a profiler's trace and the table of the kernels that take longest", "size=S"),
    "weights": ("time somebody's weights as their authors run them and in the engine", "weights=runs/sit/generator"),
    "training": ("time training steps in plain PyTorch, fused and compiled", "tokenizer=tiny generator=tiny"),
    "parity": ("measure what each precision and option changes in a forward pass and in samples", "size=S"),
}


def run_bench_study(args: argparse.Namespace) -> dict[str, Any]:
    import importlib

    from textok_fast.files import write_text

    module = importlib.import_module(f"textok_fast.evaluation.{args.study}")
    cls = getattr(module, f"{args.study.capitalize()}Config")
    files = [] if args.out is None else [args.out / f"{args.study}{suffix}" for suffix in (".json", ".md")]
    has_out = args.out is not None and "out" in {field.name for field in dataclasses.fields(cls)}
    config = load_config(cls, overrides=[*([f"out={json.dumps(str(args.out))}"] if has_out else []), *args.overrides])
    if files:
        _require_writable(files[0])

    def keep(result: Any) -> None:
        if files:
            write_text(files[0], json.dumps(result.to_dict(), indent=1) + "\n")
            write_text(files[1], result.to_markdown())

    run = getattr(module, f"run_{args.study}")
    parameters = inspect.signature(run).parameters
    given = {"command": args.command_line, "on_result": keep}
    result = run(config, **{name: value for name, value in given.items() if name in parameters})
    keep(result)
    print(result.to_markdown())
    if files:
        print("wrote " + ", ".join(map(str, files)))
    values: dict[str, Any] = result.to_dict()
    return values


def run_bench_deploy(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.evaluation.deploy import DeployConfig, DeployResult, run_deploy
    from textok_fast.files import write_text

    config = DeployConfig(
        directories=tuple(args.directories),
        model=args.model,
        batch=tuple(args.batch),
        text_tokens=args.text_tokens,
        steps=args.steps,
        rounds=args.rounds,
        threads=args.threads,
        device=args.device,
    )
    if args.out is not None:
        _require_writable(args.out)

    def keep(result: DeployResult) -> None:
        if args.out is not None:
            write_text(args.out, json.dumps(result.to_dict(), indent=1) + "\n")
            write_text(args.out.with_suffix(".md"), result.to_markdown())

    result = run_deploy(config, command=args.command_line, on_result=keep)
    print(result.to_markdown())
    if args.out is not None:
        print(f"wrote {args.out} and {args.out.with_suffix('.md')}")
    return result.to_dict()


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    from textok_fast.info import collect, describe

    found = collect()
    print(describe(found))
    return found


# -- small things ---------------------------------------------------------------------------------------------------------


class _progress:
    """A bar on stderr whose callback takes (done, total); it appears with the first call, so that a mistake is one line.

    What is done by then counts as there before: it is in no rate. ``announcement`` is printed before the bar.
    """

    def __init__(self, title: str, silent: bool, announcement: str = "") -> None:
        self.title, self.silent, self.announcement = title, silent, announcement
        self.bar: Any = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._advance

    def _advance(self, done: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            if self.announcement:
                print(self.announcement, flush=True)
            interval = 0.5 if sys.stderr.isatty() else 20.0
            given: dict[str, Any] = {"disable": self.silent, "file": sys.stderr, "mininterval": interval}
            self.bar = tqdm(desc=self.title, total=total, initial=done, **given)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:  # what follows has a bar of its own
            self.bar.close()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _plan(args: argparse.Namespace, batch: int) -> Plan:
    """What --plan says, or float32 on the best device, under what the other options say."""
    from textok_fast.inference.plan import Plan
    from textok_fast.ops.device import resolve_device

    given: dict[str, Any] = {} if args.compile is None else {"compile": args.compile}
    if getattr(args, "split", False):
        given["split"] = True
    if args.plan is None:
        precision: Precision | None = None if args.precision == "auto" else args.precision or "fp32"
        return Plan.automatic(args.device or "auto", precision, batch, **given).require_machine()
    plan = Plan.load(args.plan)
    if args.device is not None:
        given["device"] = str(resolve_device(args.device))
    if args.precision == "auto":
        given["precision"] = Plan.automatic(given.get("device", plan.device)).precision
    elif args.precision is not None:
        given["precision"] = args.precision
    return dataclasses.replace(plan, **given).require_machine()


def _announced(plan: Plan, out: Path) -> str:
    return "\n  ".join([f"plan (in {out / 'plan.json'}):", *plan.describe().splitlines()])


def _lines(file: Path) -> list[str]:
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts in {file}: {error}") from None
    if not found:
        raise InputError(f"{file} holds no captions: wanted one a line")
    return found


def _require_writable(out: Path) -> None:
    """Finds out before the work that the result can be written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"cannot write {out}")


if __name__ == "__main__":
    sys.exit(main())
