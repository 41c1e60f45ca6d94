"""Both operations under pytest-benchmark, to compare commits: `pytest bench --benchmark-autosave`.

Each case is held against the ground truth before it is timed.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # siblings are imported as by the scripts

import transfer
from gate import SearchTruth
from machine import CPU
from registry import Size
from search_candidates import maps

from ttsr_fast import search
from ttsr_fast.operators import backends

BACKENDS = [name for name in ("cpp", "torch") if backends.can_run(name, CPU)]
each = pytest.mark.parametrize


@each("size", ["40x40", "37x53:61x45", "80x80"])
@each("backend", BACKENDS)
def test_search(benchmark, backend, size):
    q, k = maps(Size.parse(size))
    SearchTruth(q, k, limit=256).check(search(q, k, backend=backend))
    benchmark.group = f"search {size}"
    benchmark(search, q, k, backend=backend)


@each("level", transfer.LEVELS)
@each("layout", transfer.LAYOUTS)
@each("operation", transfer.OPERATIONS)
@each("backend", BACKENDS)
def test_transfer(benchmark, backend, operation, layout, level):
    place = (operation, level, layout, "coherent", Size((44, 62), (46, 62)))
    run = transfer.CANDIDATES[backend].prepare(*transfer.inputs(*place))
    transfer.gate(place)(run())
    benchmark.group = f"{operation} {level} {layout}"
    benchmark(run)
