"""Every kernel for GPUs once, at small sizes, for a sanitizer: Triton's search, CUDA's transfer.

    compute-sanitizer python bench/kernel_smoke.py    on the GPU
    TRITON_INTERPRET=1 python bench/kernel_smoke.py --device cpu --tiny

Every algorithm of the search runs at every precision, with a batch, one key for a whole batch, a
mask, channels and widths that fill no block, and a larger patch. The transfer (that in C++ on the
CPU) runs with its gradients at every stride, type and layout, and where one key is chosen by more
queries than a program takes; then once at three levels together, in `SearchTransfer`. Every result
is held against the oracle in float64, on the CPU: exits with status 1 if one is wrong, and 2 if one
of the two cannot run.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import devices
import peers
import torch
import torch.nn.functional as F
from gate import WrongResult, check_close
from model_runs import make_features, module_run
from sizes import Size
from torch import Tensor

from ttsr_fast import backends, gather_fold, reference

Shape = tuple[int, int, int, int]


# --- the search ---


@dataclass(frozen=True)
class Case:
    """Shapes and options of a search; `smaller` is for where every step is slow."""

    query: Shape
    key: Shape
    masked: bool = False
    kernel_size: int = 3
    padding: int = 1

    @property
    def smaller(self) -> "Case":
        query, key = ((n, min(c, 8), min(h, 4), min(w, 5)) for n, c, h, w in (self.query, self.key))
        return Case(query, key, self.masked, self.kernel_size, self.padding)


CASES = {
    "batch": Case((2, 64, 9, 37), (2, 64, 11, 35)),
    "one key, masked": Case((3, 70, 5, 6), (1, 70, 40, 41), masked=True),
    "patches of 5x5": Case((1, 32, 8, 19), (1, 32, 9, 21), kernel_size=5, padding=1),
}


def check(
    found: peers.Found,  # [N, Ho, Wo] each
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    mask: Tensor | None,  # [1, HKo, WKo]
    case: Case,
    tolerance: float,
) -> str | None:
    """What is wrong with a result, None if nothing is."""
    patch = {"kernel_size": case.kernel_size, "padding": case.padding}
    best, _ = reference.search(query.double(), key.double(), mask, **patch)
    score, index = found
    if mask is not None and not mask.flatten()[index].all():
        return "a masked key was chosen"
    q, k = (F.normalize(F.unfold(x.double(), **patch), dim=1) for x in (query, key))
    at = index.flatten(1)[:, None, :].expand(-1, k.shape[1], -1)
    chosen = (k.expand(len(q), -1, -1).gather(2, at) * q).sum(1).view_as(best)
    lost, off = (best - chosen).max().item(), (score - chosen).abs().max().item()
    if not lost <= tolerance:
        return f"a chosen key scores {lost:.1e} below the maximum"
    return None if off <= peers.EXACT else f"a score is off by {off:.1e}"


def run_case(case: Case, algorithm: str, precision: str, device: torch.device) -> str:
    """One line of the report, beginning with `ok`, `declined` or `WRONG`."""
    from ttsr_fast.kernels import search as kernel_search

    patch = (case.kernel_size, case.padding)
    generator = torch.Generator("cpu").manual_seed(0)
    query, key = (
        torch.randn(shape, generator=generator, device="cpu").to(device)
        for shape in (case.query, case.key)
    )
    shrink = case.kernel_size - 1 - 2 * case.padding
    grid, key_grid = ([n - shrink for n in x.shape[2:]] for x in (query, key))
    mask = None
    if case.masked:
        mask = torch.rand(1, *key_grid, generator=generator, device="cpu") < 0.5
        mask[0, 0, 0] = True
        mask = mask.to(device)
    reason = kernel_search.why_not(algorithm, query.dtype, case.kernel_size, precision)
    if reason is not None:
        return f"declined: {reason}"
    score = torch.full((len(query), *grid), float("nan"), device=device)
    index = torch.full_like(score, -(2**40), dtype=torch.int64)
    kernel_search.search(
        *(query, key, mask, score, index, *patch, "both", 1e-12, False, precision),
        algorithm=algorithm,
    )
    devices.synchronize(device)
    tolerance = peers.choice_tolerance(precision)
    wrong = check((score, index), query, key, mask, case, tolerance)
    return "ok" if wrong is None else f"WRONG: {wrong}"


# --- the transfer ---


@dataclass(frozen=True)
class Fold:
    """A transfer with its gradients.

    Attributes:
        shared: whether one value serves the whole batch.
        to_one: whether all queries choose the same key.
    """

    stride: int
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    channels: int = 13
    weighted: bool = False
    kernel_size: int = 3
    shared: bool = False
    to_one: bool = False

    def __str__(self) -> str:
        words = [f"stride {self.stride}, {self.channels} channels, {self.dtype}, {self.layout}"]
        words += [name for name in ("weighted", "shared", "to_one") if getattr(self, name)]
        return ", ".join([*words, f"patches of {self.kernel_size}"]).replace("torch.", "")


STRIDES = (1, 2, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)
QUERIES, KEYS = (2, 9, 11), (6, 5)


def folds() -> Iterator[Fold]:
    """Channels that fill vectors or do not, and whatever else takes another way."""
    for stride, dtype, layout in itertools.product(STRIDES, DTYPES, FORMATS):
        yield Fold(stride, dtype, layout, channels=72)
        yield Fold(stride, dtype, layout, weighted=True)
    for stride, size in itertools.product(STRIDES, (1, 5, 7)):
        yield Fold(stride, kernel_size=size, weighted=True)
    for dtype, layout, shared in itertools.product(DTYPES, FORMATS, (False, True)):
        yield Fold(2, dtype, layout, channels=40, weighted=True, shared=shared, to_one=True)


def run_fold(case: Fold, device: torch.device) -> str:
    """One line of the report, for `gather_fold` and its gradients."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    n, h, w = QUERIES
    # The last blocks of the value are not whole.
    height, width = (case.stride * size + case.stride // 2 for size in KEYS)
    value = normal(1 if case.shared else n, case.channels, height, width).to(case.dtype)
    value = value.contiguous(memory_format=case.layout)
    grad = normal(n, case.channels, case.stride * h, case.stride * w).to(case.dtype)
    index = torch.randint(KEYS[0] * KEYS[1], QUERIES, generator=generator, device="cpu")
    index = torch.full_like(index, 7) if case.to_one else index
    weight = normal(*QUERIES) if case.weighted else None
    options = {"stride": case.stride, "kernel_size": case.kernel_size}

    def results(at: torch.device, dtype: torch.dtype | None, **more: object) -> list[Tensor]:
        v = value.to(at, dtype or case.dtype).requires_grad_()
        leaves = [v] if weight is None else [v, weight.to(at, dtype).requires_grad_()]
        function = reference.gather_fold if dtype else gather_fold
        out = function(v, index.to(at), weight=(leaves[1:] or [None])[0], **options, **more)
        grads = torch.autograd.grad(out, leaves, grad.to(at, out.dtype))
        return [x.detach().cpu() for x in (out, *grads)]

    found = results(device, None, backend="cpp")
    truth = results(devices.CPU, torch.float64, padding=case.kernel_size // 2)
    names = ["result", "gradient", "gradient of the weight"][: len(truth)]
    return verdict(names, found, truth, max(1e-5, 2 * torch.finfo(case.dtype).eps))


def run_module(operation: str, device: torch.device) -> str:
    """The same for `SearchTransfer`, where one launch serves the three levels."""
    maps, grads = make_features(Size((5, 6), (6, 5), 2))
    name = "cpp" if device.type == "cpu" else "default"
    found = module_run(name, operation, *([x.to(device) for x in xs] for xs in (maps, grads)))()
    truth = module_run(
        "reference", operation, *([x.double() for x in xs] for xs in (maps, grads))
    )()
    names = [f"result {n}" for n in range(len(truth))]
    return verdict(names, [x.detach().cpu() for x in found], truth, 1e-5)


def verdict(names: list[str], found: list[Tensor], truth: list[Tensor], tolerance: float) -> str:
    try:
        check_close(names, found, truth, tolerance)
    except WrongResult as error:
        return f"WRONG: {error}"
    return "ok"


# --- all of it ---


def search_lines(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str]]:
    for name, case in CASES.items():
        for algorithm, precision in itertools.product(peers.ALGORITHMS, args.precisions):
            result = run_case(case.smaller if args.tiny else case, algorithm, precision, device)
            yield f"{name}, {algorithm}, {precision}", result


def transfer_lines(device: torch.device) -> Iterator[tuple[str, str]]:
    for case in folds():
        yield str(case), run_fold(case, device)
    for operation in ("SearchTransfer", "with gradients"):
        yield operation, run_module(operation, device)


def main(argv: list[str] | None = None) -> int:
    """Run all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="cuda or cpu; default: the GPU where there is one")
    add("--tiny", action="store_true", help="a search of few positions and channels")
    add("--precisions", nargs="+", choices=peers.PRECISIONS, default=list(peers.PRECISIONS))
    args = parser.parse_args(argv)
    device = devices.pick(args.device)
    parts = {
        ("triton", "search"): search_lines(args, device),
        ("cpp", "gather_fold"): transfer_lines(device),
    }
    lines, missing = [], False
    for (backend, op), part in parts.items():
        reason = backends.why_not(backend, device, op)
        if reason is not None:
            missing = True
            print(f"{backend} cannot run {op} on {device}: {reason}")
            continue
        for name, result in part:
            lines.append(result)
            print(f"{name}: {result}", flush=True)
    wrong = sum(line.startswith("WRONG") for line in lines)
    ok = lines.count("ok")
    print(f"{ok} right, {len(lines) - ok - wrong} declined, {wrong} wrong")
    if wrong or not ok:
        return 1
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
