"""``ftfast store``: builds, describes and verifies factor stores, from which ``ftfast distill --store`` trains."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ftfast.distillation.runtime.signals import Interrupted, signals_interrupt
from ftfast.errors import StoreError, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the three actions."""
    parser.description = (
        "A factor store holds what a trained teacher and paraphraser say about fixed views (crop and flip) of every "
        "training image. Students then train from it, and no teacher runs: ftfast distill --store STORE."
    )
    actions = parser.add_subparsers(dest="action", metavar="build|info|verify", required=True)
    build = actions.add_parser(
        "build",
        help="make a store from a run folder's teacher and paraphraser",
        description="Makes a store from the teacher and paraphraser of a run of ftfast distill; under torchrun, every "
        "process makes its share. A build that was ended goes on with --resume.",
        allow_abbrev=False,
    )
    build.add_argument("run", metavar="RUN", help="the run folder of ftfast distill")
    build.add_argument("store", metavar="STORE", help="the folder to make")
    build.add_argument(
        "--views", metavar="N", type=int, help="crops and flips of each image [4; 1 without augmentation]"
    )
    build.add_argument(
        "--dtype",
        metavar="NAME",
        default="int8",
        help="of the factors (one of int8, float8_e4m3fn, bfloat16, float16) [int8]",
    )
    build.add_argument("--logits", action="store_true", help="keep the teacher's logits too, for kd and ft+kd")
    build.add_argument("--seed", metavar="N", type=int, default=0, help="of the views [0]")
    build.add_argument(
        "--batch-size", metavar="N", type=int, default=64, help="images at once, with all their views [64]"
    )
    build.add_argument("--shard-images", metavar="N", type=int, help="images in a file [as many as make 64 MiB]")
    build.add_argument("--resume", action="store_true", help="go on with a build that was ended")
    build.add_argument(
        "--estimate", action="store_true", help="say how large it will be and how long it takes, no more"
    )
    _add_places(build)
    info = actions.add_parser("info", help="what a store holds", description="Says what a store holds.")
    info.add_argument("store", metavar="STORE", help="its folder")
    info.add_argument("--json", action="store_true", help="print JSON")
    verify = actions.add_parser(
        "verify",
        help="read every byte, and compute a sample anew",
        description="Reads every byte of a store and compares checksums, then computes a sample of its factors anew.",
        allow_abbrev=False,
    )
    verify.add_argument("store", metavar="STORE", help="its folder")
    verify.add_argument(
        "--sample", metavar="N", type=int, default=64, help="images to compute anew; 0 for none, without data [64]"
    )
    verify.add_argument("--loader", metavar="NAME", help="of photographs: folder or webdataset [the store's]")
    _add_places(verify)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="FOLDER", help="where the images are [the run's, else $FTFAST_DATA]")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu or cuda [auto]")
    parser.add_argument("--workers", metavar="N", type=int, help="processes that read photographs [the run's]")


def run(args: argparse.Namespace) -> int:
    """Runs an action; what was found goes to standard output, what goes on to standard error."""
    return {"build": _build, "info": _info, "verify": _verify}[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from ftfast.distillation.store.build import Request, build_store

    request = Request(args.views, args.dtype, args.logits, args.seed, args.batch_size, args.shard_images)
    try:
        with signals_interrupt():
            build_store(
                Path(args.run),
                Path(args.store),
                request,
                resume=args.resume,
                only_estimate=args.estimate,
                device=args.device,
                data_dir=args.data_dir,
                workers=args.workers,
            )
    except Interrupted as interruption:
        advice = f"run the same command with --resume to go on with {args.store}"
        raise Interrupted(interruption.number, advice) from None
    if os.environ.get("RANK", "0") == "0" and not args.estimate:
        print(f"Store: {args.store}")
    return 0


def _info(args: argparse.Namespace) -> int:
    from ftfast.distillation.store import header as headers
    from ftfast.distillation.store.compute import describe

    path = Path(args.store)
    header = headers.read(path)
    there = len(list(path.glob("shard-*.safetensors")))
    if args.json:
        print(json.dumps({**header.to_json(), "finished": header.is_finished, "shards_there": there}, indent=2))
        return 0
    state = "finished" if header.is_finished else f"not finished: {there} of {header.shard_count} shards are there"
    rows: list[tuple[str, Any]] = [("store", f"{path}, {state}"), ("holds", describe(header))]
    rows += [(name, header.settings[name]) for name in ("data", "teacher", "teacher_layer", "rate")]
    rows += [("computed in", header.computed_in), ("views", f"{header.transform['cut']}, seed {header.seed}")]
    rows += [(f"hash of {name}", value) for name, value in header.hashes.items()]
    print("\n".join(f"{shown(name):20}{shown(str(value))}" for name, value in rows))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ftfast.distillation.store.verify import verify

    if args.sample < 0:
        raise StoreError(f"sample is {args.sample}; it takes a whole number of at least 0.")
    found = verify(
        Path(args.store),
        sample=args.sample,
        device=args.device,
        data_dir=args.data_dir,
        loader=args.loader,
        workers=args.workers,
    )
    anew = f"; {found.views} factors computed anew are at most {found.distance:.3f} away" if found.views else ""
    print(f"{args.store}: every byte is as it was written{anew}")
    return 0
