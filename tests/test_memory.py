"""Peak memory, by accounting for every allocation: no patches, nor the scores of all pairs."""

import ctypes
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests import cases
from ttsr_fast import gather_fold, search
from ttsr_fast.compat import feature_match_index, masa
from ttsr_fast.operators import pytorch

MIB = 1 << 20
ROOT = Path(__file__).parent.parent


def peak_allocated(run: Callable[[], object], folder: Path) -> int:
    """The most bytes that `run` holds at any time in tensors it makes, its results among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()  # kept until the profiler has stopped
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    assert events and results is not None
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def peak_resident(run: Callable[[], object]) -> int:
    """At least the same, seen by the operating system: memory from elsewhere counts too.

    The least of three calls, since threads that earlier tests have left touch memory as well.
    """
    return min(_peak_resident(run) for _ in range(3))


def _peak_resident(run: Callable[[], object]) -> int:
    gc.collect()  # or what earlier tests have left may be freed meanwhile
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = _status("VmRSS")
    results = run()
    assert results is not None
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def allocate() -> Tensor:
    x = torch.ones(12 * MIB // 4)
    y = x.add(1)  # both held: 24 MiB
    del x
    return y.add(1).sum()


RESIDENT = """
from tests.test_memory import MIB, allocate, peak_resident
allocate()
assert 23 * MIB <= peak_resident(allocate) <= 40 * MIB
beside = peak_resident(lambda: bytearray(b"x") * (40 * MIB))
assert 39 * MIB <= beside <= 42 * MIB
"""


def test_the_accounting_itself(tmp_path):
    assert 24 * MIB <= peak_allocated(allocate, tmp_path) <= 24 * MIB + 1024
    # In a process of its own: threads that other tests have left may free memory meanwhile.
    subprocess.run([sys.executable, "-c", RESIDENT], check=True, cwd=ROOT)


def test_fresh_memory_is_poisoned():
    assert torch.empty(2, 3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2), dtype=torch.int64).lt(-(2**60)).all()


# The scores of all pairs would take 2 MiB, 34 MiB, 10 MiB, 25 MiB.
SEARCH_SIZES = {
    "small": ((1, 64, 24, 31), (1, 64, 29, 23)),
    "medium": ((1, 256, 50, 60), (1, 256, 60, 50)),
    "one_key": ((3, 64, 40, 37), (1, 64, 41, 43)),
    "wide": ((1, 4, 16, 160), (1, 4, 16, 160)),
}


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [(torch.float32, 1), (torch.float32, 2), (torch.float16, 1), (torch.bfloat16, 1)],
    ids=str,
)
@pytest.mark.parametrize("shapes", SEARCH_SIZES.values(), ids=SEARCH_SIZES)
def test_search(backend, shapes, dtype, threads, tmp_path, set_threads, monkeypatch):
    set_threads(threads)
    monkeypatch.setattr(pytorch, "SLAB_BYTES", 4 * MIB)
    query, key = (torch.randn(s).to(dtype) for s in shapes)
    copies = 4 * (query.numel() + key.numel())
    scores = 4 * query[0, 0].numel() * key[0, 0].numel()
    bound = size(*search(query, key, backend=backend)) + copies
    bound += {
        "cpp": min(16 * MIB * threads, scores),
        "torch": 2 * copies + 4 * pytorch.SLAB_BYTES,
        "reference": math.inf,
    }[backend]
    assert peak_allocated(lambda: search(query, key, backend=backend), tmp_path) < bound
    if backend == "cpp":
        assert peak_resident(lambda: search(query, key, backend=backend)) < bound + MIB


# Patches would take 9 times the value; these bounds are in values and outputs.
TRANSFER_BOUNDS = {"cpp": 1, "torch": 3, "reference": math.inf}
TRANSFER_SIZES = {
    "level_3": ((1, 256, 40, 50), (1, 44, 46), 1),
    "level_1": ((1, 64, 82, 101), (1, 23, 25), 4),
    "one_value": ((1, 64, 60, 50), (3, 33, 31), 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shapes", TRANSFER_SIZES.values(), ids=TRANSFER_SIZES)
def test_gather_fold(backend, shapes, layout, dtype, tmp_path):
    value_size, index_size, stride = shapes
    value = cases.LAYOUTS[layout](torch.randn(value_size).to(dtype)).requires_grad_()
    index = cases.random_index(value_size, index_size, stride)
    weight = torch.rand(index.shape, requires_grad=True)
    results = []

    def forward():
        results[:] = [gather_fold(value, index, stride=stride, weight=weight, backend=backend)]
        return results

    def backward():
        return torch.autograd.grad(results[0], (value, weight), grad, retain_graph=True)

    forward()
    grad = torch.randn_like(results[0])
    bound = TRANSFER_BOUNDS[backend] * 4 * (value.numel() + grad.numel())
    assert peak_allocated(forward, tmp_path) < size(grad) + bound
    assert peak_allocated(backward, tmp_path) < size(value, weight) + bound
    if backend == "cpp":
        assert peak_resident(backward) < size(value, weight) + bound + MIB


@pytest.mark.parametrize("shapes", SEARCH_SIZES.values(), ids=SEARCH_SIZES)
def test_search_backward(backend, shapes, tmp_path):
    query, key = (torch.randn(s, requires_grad=True) for s in shapes)
    score, _ = search(query, key, backend=backend)
    grad = torch.randn_like(score)

    def backward():
        return torch.autograd.grad(score, (query, key), grad, retain_graph=True)

    maps = 12 * size(score)  # of one channel: norms, weights, index
    bound = (1 + TRANSFER_BOUNDS[backend]) * size(query, key) + maps
    assert peak_allocated(backward, tmp_path) < bound


def test_feature_match_index(backend, tmp_path, monkeypatch):
    """Patches would take 3.5 MiB of either map, the similarities of all pairs 20 MiB."""
    monkeypatch.setattr(pytorch, "SLAB_BYTES", MIB)
    maps = [torch.randn(40, 50, 50) for _ in range(2)]

    def run():
        return feature_match_index(*maps, norm_input=True, backend=backend)

    bound = 3 * size(*maps) + 4 * MIB
    assert peak_allocated(run, tmp_path) < {"reference": math.inf}.get(backend, bound)


def test_masa_transfer(backend, tmp_path):
    """Patches would take 9 times the features."""
    fea, soft_att = torch.randn(1, 64, 82, 102), torch.rand(1, 1, 23, 25)
    index = cases.random_index(fea.shape, (1, 23, 25), 2, padding=0)

    def run():
        return masa.transfer(fea, index, soft_att, ks=6, pd=2, stride=2, backend=backend)

    bound = (TRANSFER_BOUNDS[backend] + 2) * size(fea, run())
    assert peak_allocated(run, tmp_path) < bound
