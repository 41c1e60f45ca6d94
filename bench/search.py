"""Time and memory of the patch search against baselines, over a sweep of sizes.

    python bench/search.py                          the sweep of the README
    python bench/search.py --quick                  under a minute
    python bench/search.py --sizes 100x100:108x96   queries 100x100, keys 108x96
    python bench/search.py --sizes 9*40x40          nine images at once
    python bench/search.py --sizes 270x480@16       16 channels, also after the other forms

Runs on the GPU where there is one. Exits with status 1 if a result was wrong,
which is not timed.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import runner
import torch
from gate import SearchTruth
from machine import instruction_set, multiplies_bfloat16
from registry import OPERANDS, Candidate, Case, Rows, Run, Size, gemm_run
from report import size_title
from search_candidates import CANDIDATES, PIXELS, maps, resolved
from torch import Tensor

KIND, SUBJECTS = "search", ("cpp-fp32", "triton-fp16", "triton-fp16x3")
SETTINGS = {
    "cpu": (
        "40x40 37x53:61x45 80x80 100x100 100x100:108x96 125x185 160x160 270x480 "
        "100x100:108x96@64 100x100:108x96@16 270x480@16 270x480@4 4000*24x24@32",
        3.0,
        60.0,
    ),
    "quick cpu": ("16x16 24x24 37x53:61x45 10*24x24@32", 0.3, 5.0),
    "cuda": ("40x40 9*40x40 80x80 100x100:108x96 125x185 160x160 270x480 540x960", 0.5, 5.0),
    "quick cuda": ("9*40x40 80x80 125x185", 0.1, 2.0),
}
TRUTH_BYTES = 1 << 30  # bounds the queries that are checked at the largest sizes
BASELINE_PAIRS = Size.parse("270x480").pairs  # beyond which a GPU runs this package alone
GRAPH_PAIRS = 32_000_000  # beyond which launches are a small part of the time


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for size in args.sizes:
        query, key = maps(size, args.device)
        truth = SearchTruth(query, key, limit=min(2048, TRUTH_BYTES // (8 * size.keys)))
        candidates = [CANDIDATES[name] for name in args.candidates]
        operands = {x.operands for x in candidates if x.backend != "cpp"}
        yield Case(
            title=size_title({**size.facts, "channels": size.channels}, args.channels),
            operation="search",
            size=size,
            place=(size,),
            check=partial(check, truth),
            names=tuple(args.candidates),
            facts={"channels": size.channels, "dtype": "float32", "checked": checked(truth, size)},
            rooflines=gemm_runs(operands, size.channels, args.device),
            finish=partial(finish, size, (query, key)),
            skip=partial(skip, size, args.device),
        )


def checked(truth: SearchTruth, size: Size) -> str:
    queries = f"{len(truth.positions)} of {size.batch * size.queries} queries"
    return f"{queries}, in {truth.checked_images} of {size.batch} images"


def check(
    truth: SearchTruth, candidate: Candidate, result: tuple[Tensor, Tensor]
) -> dict[str, float]:
    return truth.check(result, candidate.tolerance, candidate.score_tolerance)


def skip(size: Size, device: torch.device, candidate: Candidate) -> str | None:
    """The reason why a candidate is left out at a size of a GPU."""
    if device.type == "cuda" and size.pairs > BASELINE_PAIRS and candidate.baseline:
        return "skipped (beyond the sizes of baselines)"
    if candidate.graph and size.pairs > GRAPH_PAIRS:
        return "skipped (launches are a small part here)"
    return None


def gemm_runs(
    operands: set[str], channels: int, device: torch.device
) -> dict[str, tuple[Run, int]]:
    """Products as deep as those of the search, by operands and depth.

    On a GPU also K = 3 C. On a CPU that multiplies bfloat16 also of that, whatever the candidates.
    """
    gpu = device.type == "cuda"
    depths = [channels, 3 * channels] if gpu else [channels]
    operands = operands | {"float32"}
    if not gpu and multiplies_bfloat16():
        operands.add("bfloat16")
    names = [name for name in OPERANDS if name in operands]
    runs = {f"{name} {k}": gemm_run(name, k, device) for name in names for k in depths}
    if gpu and "float16" in operands and not torch.version.hip:  # PyTorch has none on ROCm
        for k in depths:
            runs[f"float16 {k} to float32"] = gemm_run("float16", k, device, torch.float32)
    return runs


def finish(
    size: Size, inputs: tuple[Tensor, Tensor], rows: Rows, gemms: dict[str, float]
) -> dict[str, Any]:
    """Rates that follow from the times of the rows and of the matrix products."""
    ascending = sorted(gemms.items(), key=lambda item: item[1])
    rates = {name.split()[0]: rate for name, rate in ascending}  # the largest of each
    for name, row in rows.items():
        candidate = resolved(CANDIDATES[name], *inputs)
        row |= rates_of(row["median_s"], candidate, size, rates)
        if candidate.backend == "cpp":
            row["instruction_set"] = instruction_set()
    cheapest = "float16" if inputs[0].is_cuda and "float16" in rates else "float32"
    return {
        "gemm_flop_per_s": gemms,
        "pixel_gemm_operands": cheapest,
        "pixel_gemm_s": size.pairs * 2 * size.channels / rates[cheapest],
    }


def rates_of(
    seconds: float, candidate: Candidate, size: Size, rates: dict[str, float]
) -> dict[str, Any]:
    issued = 2 * size.channels * candidate.products * size.pairs / seconds
    return {
        "backend": candidate.backend,
        "algorithm": candidate.algorithm,
        "precision": candidate.precision,
        "pairs_per_s": size.pairs / seconds,
        "effective_flop_per_s": 2 * size.channels * PIXELS * size.pairs / seconds,
        "issued_flop_per_s": issued,
        "operands": candidate.operands,
        "gemm_share": issued / rates[candidate.operands],
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--channels", type=runner.positive, default=256)


def resolve(args: argparse.Namespace) -> None:
    """Nothing depends on other options."""


inputs = maps


if __name__ == "__main__":
    sys.exit(runner.main(sys.modules[__name__]))
