"""The search kernel with vectors of 16 bytes, for this processor and for AArch64 (NEON).

`search_kernel_driver.cpp` packs maps and calls the kernel without torch, under QEMU where need be.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import cases
from tests.checks import assert_same_choice
from tests.emulated import ROOT
from ttsr_fast import Match, reference
from ttsr_fast.operators import build

each = pytest.mark.parametrize
each_dtype = each("dtype", [torch.float32, torch.float64], ids=str)

DRIVER = str(ROOT / "tests/search_kernel_driver.cpp")
KERNEL = str(ROOT / "csrc/cpu/search_kernel_baseline.cpp")
FLAGS = [*build.FLAGS, f"-I{ROOT / 'csrc'}", "-DISA=baseline", "-DVECTOR_BYTES=16"]
TARGETS = {
    "native": ["c++"],
    "aarch64-gcc": ["aarch64-linux-gnu-g++", "-static"],
    "aarch64-clang": ["clang++", "--target=aarch64-linux-gnu", "-static"],
}
CROSS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}

SHAPES = ("one_pixel", "rows", "primes", "vector_4", "vector_17", "two_rows", "channels_257")
# Best scores of a query; row offsets of a call; patch columns of a query tile and of a key tile.
SPLITS = [(1, 4, 99, 99), (3, 1, 7, 13)]


class Case(NamedTuple):
    query: Tensor  # [1, C, H, W]
    key: Tensor  # [1, C, HK, WK]
    mask: Tensor  # [1, HKo, WKo]
    patch: dict[str, int]
    split: tuple[int, int, int, int]

    def norms(self, x: Tensor) -> Tensor:  # [Ho*Wo]
        return F.unfold(x.double(), **self.patch).norm(dim=1).flatten()


@pytest.fixture(scope="module", params=TARGETS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command to which the files of cases and results are added; `kernel.s` lies beside it."""
    compiler, native = TARGETS[request.param], request.param == "native"
    for program, package in {compiler[0]: "clang", **({} if native else CROSS)}.items():
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}: apt install {package}")
    folder = tmp_path_factory.mktemp("driver")
    kernel, program = str(folder / "kernel.s"), str(folder / "driver")
    subprocess.run([*compiler, *FLAGS, "-S", KERNEL, "-o", kernel], check=True)
    subprocess.run([*compiler, *FLAGS, DRIVER, kernel, "-o", program], check=True)
    return [program] if native else ["qemu-aarch64", program]


def make_cases(make: Callable[..., Tensor], dtype: torch.dtype) -> list[Case]:
    made = []
    for (kernel_size, padding), name, split in product(cases.PATCHES, SHAPES, SPLITS):
        shapes = [(1, *shape[1:]) for shape in cases.SEARCH_SHAPES[name]]
        reach = kernel_size - 1 - 2 * padding
        if min(min(shape[2:]) for shape in shapes) > reach:
            query, key = (make(*shape).to(dtype) for shape in shapes)
            mask = torch.rand(1, *(n - reach for n in shapes[1][2:])) < 0.8
            mask[..., -1] = True
            patch = {"kernel_size": kernel_size, "padding": padding}
            made.append(Case(query, key, mask, patch, split))
    return made


def run(
    driver: list[str], made: list[Case], folder: Path, *, normalize: bool
) -> Iterator[tuple[Case, list[Match]]]:
    """The best matches of every case. Patches that are not finite have score NaN."""
    numbers = []
    for case in made:
        keep, offsets, *columns = case.split
        head = [case.query.dtype == torch.float64, keep, offsets, case.query.shape[1]]
        head += [*case.patch.values(), *case.query.shape[2:], *case.key.shape[2:], *columns]
        score = torch.where(case.norms(case.query).isfinite(), -torch.inf, torch.nan)
        norm = case.norms(case.key)
        scale = torch.where(norm.isfinite(), 1 / norm if normalize else 1.0, torch.nan)
        scale = scale.where(case.mask.flatten(), 0)
        numbers += [torch.tensor(head), case.query, case.key, score, scale, case.mask]
    torch.cat([x.double().flatten() for x in numbers]).numpy().tofile(folder / "cases")
    subprocess.run([*driver, folder / "cases", folder / "results"], check=True)
    rest = torch.from_numpy(np.fromfile(folder / "results"))
    for case in made:
        norm, keep = case.norms(case.query), case.split[0]
        width = case.query.shape[3] + 2 * case.patch["padding"] - case.patch["kernel_size"] + 1
        count = 2 * keep * len(norm)
        scores, index = rest[:count].view(2, keep, 1, -1, width)
        rest = rest[count:]
        if normalize:
            scores = scores / norm.view(1, -1, width)
        yield case, list(map(Match, scores.to(case.query.dtype), index.long()))
    assert len(rest) == 0


@each_dtype
def test_best_keys(driver, dtype, tmp_path):
    made = make_cases(torch.randn, dtype)
    for case, (match, *_) in run(driver, made, tmp_path, normalize=True):
        assert_same_choice(match, *case[:3], **case.patch)


@each_dtype
@each("nan", [0, 0.5], ids=["finite", "nan"])
def test_ties_and_nan(driver, nan, dtype, tmp_path):
    """Exact sums of integers; the first pixel of some maps is NaN."""

    def make(*size):
        x = cases.integers(*size)
        x[..., 0, 0] += torch.nan if torch.rand(()) < nan else 0
        return x

    made = make_cases(make, dtype)
    for case, matches in run(driver, made, tmp_path, normalize=False):
        query, key = case.query.double(), case.key.double()
        score, index = reference.search(query, key, case.mask, normalize="none", **case.patch)
        assert torch.equal(matches[0].index, index)
        assert torch.equal(matches[0].score.isnan(), score.isnan())
        assert torch.equal(matches[0].score.double().nan_to_num(), score.nan_to_num())
        if nan == 0:
            scores = F.unfold(key, **case.patch).mT @ F.unfold(query, **case.patch)
            scores[~case.mask.flatten(1)] = -torch.inf
            best, keys = scores.sort(dim=1, descending=True, stable=True)
            for match, score, index in zip(matches, best[0], keys[0], strict=False):
                valid = score.isfinite()
                assert torch.equal(match.score.double().flatten(), score)
                assert torch.equal(match.index.flatten()[valid], index[valid])


def test_products_stay_in_registers(driver):
    """Loops with 6x4 vectors of sums, query pixels by element, without the stack."""
    if len(driver) == 1:
        pytest.skip("for AArch64")
    text = re.sub(r" *//.*", "", Path(driver[-1]).with_name("kernel.s").read_text())
    loops = re.findall(r"^(\.L\w+):\n((?:\t(?!b|cb|tb|\.).*\n)+)\tb\.?ne\t\1$", text, re.MULTILINE)
    for vector in ("4s", "2d"):
        products = [loop for _, loop in loops if len(re.findall(rf"fmla.*\.{vector}", loop)) == 24]
        assert products
        for loop in products:
            assert len(re.findall(r"fmla.*\[\d\]", loop)) >= 20
            assert len(re.findall(r"\tdup|\tld1r", loop)) <= 1 and "[sp" not in loop
