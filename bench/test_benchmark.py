"""Both operations under pytest-benchmark, to compare commits: `pytest bench --benchmark-autosave`.

Each case is held against the ground truth before it is timed.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # siblings are imported as by the scripts

import peers
import transfer
from gate import SearchTruth, check_close
from sizes import Size

from ttsr_fast import search
from ttsr_fast.operators import backends

CPU = torch.device("cpu")
BACKENDS = [name for name in ("cpp", "torch") if backends.can_run(name, CPU)]
each = pytest.mark.parametrize


@each("size", ["40x40", "37x53:61x45", "80x80"])
@each("backend", BACKENDS)
def test_search(benchmark, backend, size):
    q, k = peers.maps(Size.parse(size), channels=256)
    SearchTruth(q, k, limit=256).check(search(q, k, backend=backend))
    benchmark.group = f"search {size}"
    benchmark(search, q, k, backend=backend)


@each("level", transfer.LEVELS)
@each("layout", transfer.LAYOUTS)
@each("operation", ["gather_fold", "adjoint"])
@each("backend", BACKENDS)
def test_transfer(benchmark, backend, operation, layout, level):
    query, key = (44, 62), (46, 62)
    stride, _ = transfer.LEVELS[level]
    value, grad = transfer.make_maps(level, layout, query, key)
    index = transfer.make_index("coherent", query, key)
    run = transfer.fold_run(backend, operation, value, grad, index, stride)
    truth = transfer.fold_truths(value, grad, index, stride)[operation]
    check_close(["result"], run(), [truth], transfer.TOLERANCE[operation])
    benchmark.group = f"{operation} {level} {layout}"
    benchmark(run)
