"""Time and memory of `SearchTransfer` and of TTSR, against their original form.

    python bench/model.py                        ten minutes on a small CPU
    python bench/model.py --sizes 270x480        maps of SearchTransfer
    python bench/model.py --pair 88x125:368x500  image and reference of TTSR

`SearchTransfer` forward, and with all its gradients where there are not too
many pairs. TTSR forward on an image, and a training step (L1, backward, Adam) on
a batch of patches, with the time of every stage. The original form is
`ttsr_fast.reference.search_transfer` in the same model. Exits with status 1 if a
result was wrong, which is not timed.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import runner
import torch
from gate import SearchTruth, WrongResult, check_close
from model_candidates import (
    CANDIDATES,
    MODEL,
    MODULE,
    ORIGINAL,
    Subject,
    make_features,
    module_run,
    subject,
)
from registry import Case, Rows, Size
from report import size_title
from torch import Tensor

from ttsr_fast import reference, search

KIND, SUBJECTS = "model", ("cpp", "default")
SETTINGS = {
    "cpu": ("9*40x40 88x125:92x125 160x160 270x480", 1.0, 60.0),
    "quick cpu": ("2*16x16 22x31:23x31", 0.1, 60.0),
    "cuda": ("9*40x40 88x125:92x125 270x480", 1.0, 60.0),
    "quick cuda": ("9*40x40", 0.1, 60.0),
}
PAIRS = 1 << 27  # beyond which the forward pass alone is measured and some of its queries checked
QUERIES = 512  # that are checked then
MAPS = ["S", "T_lv3", "T_lv2", "T_lv1"]
GRADIENTS = ["lrsr_lv3", "refsr_lv3", "ref_lv1", "ref_lv2", "ref_lv3"]
STAGE_RUNS = 3
LOSS = 0.01  # dB, by rounding to 16 bits
TOLERANCE = dict(zip(MODULE, (5e-6, 1e-5), strict=True))

Check = Callable[[tuple[Tensor, ...]], dict[str, float]]


# --- the gates ---


def module_check(operation: str, size: Size, device: torch.device) -> Check:
    """`SearchTransfer` against float64."""
    maps, grads = make_features(size, device)
    if size.pairs > PAIRS:
        return large_check(maps)
    doubles = ([x.double() for x in tensors] for tensors in (maps, grads))
    truth = module_run(ORIGINAL, operation, *doubles)()
    names = MAPS if operation == "SearchTransfer" else GRADIENTS
    return lambda result: check_close(names, result, truth, TOLERANCE[operation])


def large_check(maps: list[Tensor]) -> Check:
    """The scores of some queries, and a channel of every level, against float64."""
    lrsr, refsr, *values = maps
    queries = SearchTruth(lrsr, refsr, limit=QUERIES)
    index = search(lrsr, refsr).index
    levels = zip(reversed(values), (1, 2, 4), strict=True)
    truth = [reference.gather_fold(v[:, :1].double(), index, stride=s) for v, s in levels]

    def check(result: tuple[Tensor, ...]) -> dict[str, float]:
        score, *textures = result
        found = queries.check((score[:, 0], index), score_tolerance=TOLERANCE["SearchTransfer"])
        first = [texture[:, :1] for texture in textures]
        error = check_close(MAPS[1:], first, truth, TOLERANCE["SearchTransfer"])
        return {**error, "checked_queries": found["checked_queries"]}

    return check


def model_check(operation: str, size: Size, device: torch.device) -> Check:
    """The model's results, or loss and gradient of a training step, against float64.

    The gradient jumps where rounding changes the sign of a residual or of an activation. With
    convolutions in 16 bits there are only the image and the scores, which stay exact. The image may
    differ as little as costs `LOSS` where the float64 model is 30 dB away from the original.
    """
    truth = Subject(ORIGINAL, operation, size, device, torch.float64).run()

    def check(result: tuple[Tensor, ...]) -> dict[str, float]:
        if operation == "training step":
            check_close(["loss"], result[:1], truth[:1], 1e-5)
            return check_close(["gradient"], result[1:], truth[1:], 1e-2)
        if len(result) == len(truth):
            return check_close(["sr", *MAPS], result, truth, 1e-4)
        check_close(["S"], result[1:], truth[1:2], 1e-5)
        error = (result[0].double() - truth[0]).square().mean().item() / 4  # for a range of 1
        loss = 10 * math.log10(1 + error / 1e-3)
        if not loss <= LOSS:
            raise WrongResult(f"its rounding costs an image of 30 dB {loss:.3f} dB")
        return check_close(["sr"], result[:1], truth[:1], 2e-2) | {"loss_db": loss}

    return check


# --- the cases ---


def cases(args: argparse.Namespace) -> Iterator[Case]:
    if args.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # of convolutions, torch's default
    for size in sorted(args.sizes, key=lambda size: size.pairs):
        for operation in MODULE[: 1 if size.pairs > PAIRS else None]:
            check = module_check(operation, size, args.device)
            yield case(operation, size, size_title(size.facts), check, args)
    height, width = args.patch.query
    training = replace(args.patch, key=(4 * height, 4 * width))
    lr = [size_title({**size.facts, "key": size.query}) for size in (args.pair, training)]
    titles = (f"LR {lr[0]}, reference {'x'.join(map(str, args.pair.key))}", f"LR {lr[1]}")
    for operation, size, title in zip(MODEL, (args.pair, training), titles, strict=True):
        check = model_check(operation, size, args.device)
        yield case(operation, size, title, check, args)


def case(operation: str, size: Size, title: str, check: Check, args: argparse.Namespace) -> Case:
    def finish(rows: Rows, rates: dict[str, float]) -> dict[str, Any]:
        if operation in MODEL:
            add_stages(operation, size, args.device, rows)
        return {}

    return Case(
        title=title,
        operation=operation,
        size=size,
        place=(operation, size),
        check=lambda candidate, result: check(result),
        names=tuple(name for name in args.candidates if CANDIDATES[name].has(operation)),
        finish=finish,
    )


def add_stages(operation: str, size: Size, device: torch.device, rows: Rows) -> None:
    """Median time of every stage; the candidates take turns."""
    names = [name for name in rows if CANDIDATES[name].amp is None]
    subjects = {name: subject(name, operation, size, device) for name in names}
    taken = [{name: x.stages() for name, x in subjects.items()} for _ in range(STAGE_RUNS)]
    for name in names:
        stages = taken[0][name]
        rows[name]["stages_s"] = {x: median(run[name][x] for run in taken) for x in stages}
    subject.cache_clear()


def inputs(*place: Any) -> tuple[Any, ...]:
    return place  # the candidates make them


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pair", type=Size.parse, metavar="LR:REF", help="pixels, default: 88x125:368x500")
    text = "batch of a training step, default: 9*40x40, on a CPU 2*40x40"
    add("--patch", type=Size.parse, metavar="N*LR", help=text)


def resolve(args: argparse.Namespace) -> None:
    pair, patch = "88x125:368x500", "2*40x40" if args.device.type == "cpu" else "9*40x40"
    if args.quick:
        pair, patch = "12x16:48x60", "10x10"
    args.pair = args.pair or Size.parse(pair)
    args.patch = args.patch or Size.parse(patch)
    if args.pair.queries * args.pair.keys > 16 * PAIRS:
        raise ValueError("--pair is too large for the float64 model that results are held against")


if __name__ == "__main__":
    sys.exit(runner.main(sys.modules[__name__]))
