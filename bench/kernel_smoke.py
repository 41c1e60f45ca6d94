"""Every algorithm of the Triton search at every precision once, at small sizes, for a sanitizer.

    compute-sanitizer python bench/kernel_smoke.py    on the GPU
    TRITON_INTERPRET=1 python bench/kernel_smoke.py --device cpu --tiny

Between them the cases have a batch, one key for a whole batch, a mask, channels and widths that
fill no block, and a larger patch. Every result is held against the oracle in float64: exits with
status 1 if one is wrong, and 2 if the backend cannot run.
"""

import argparse
import sys
from dataclasses import dataclass

import devices
import peers
import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast import backends, reference

Shape = tuple[int, int, int, int]


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
        *(query, key, mask, score, index, *patch, "both", 1e-12, precision), algorithm=algorithm
    )
    devices.synchronize(device)
    tolerance = peers.choice_tolerance(precision)
    wrong = check((score, index), query, key, mask, case, tolerance)
    return "ok" if wrong is None else f"WRONG: {wrong}"


def main(argv: list[str] | None = None) -> int:
    """Run all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="cuda or cpu; default: the GPU where there is one")
    add("--tiny", action="store_true", help="few positions and channels")
    add("--precisions", nargs="+", choices=peers.PRECISIONS, default=list(peers.PRECISIONS))
    args = parser.parse_args(argv)
    device = devices.pick(args.device)
    reason = backends.why_not("triton", device)
    if reason is not None:
        print(f"the Triton backend cannot run on {device}: {reason}")
        return 2
    lines = []
    for name, case in CASES.items():
        for algorithm in peers.ALGORITHMS:
            for precision in args.precisions:
                result = run_case(case.smaller if args.tiny else case, algorithm, precision, device)
                lines.append(result)
                print(f"{name}, {algorithm}, {precision}: {result}", flush=True)
    wrong = sum(line.startswith("WRONG") for line in lines)
    ok = lines.count("ok")
    print(f"{ok} right, {len(lines) - ok - wrong} declined, {wrong} wrong")
    return int(wrong > 0 or ok == 0)


if __name__ == "__main__":
    sys.exit(main())
