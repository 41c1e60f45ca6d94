"""Choice of the algorithm of the Triton search, and reasons why one or all cannot run."""

import sys

import pytest
import torch
import triton

from ttsr_fast import search
from ttsr_fast.kernels import search as kernels
from ttsr_fast.kernels import slab, tile_configs
from ttsr_fast.operators import triton as backend
from ttsr_fast.operators.patch import Patch, Score

each = pytest.mark.parametrize


def run(algorithm, query, key):
    score = torch.empty(1, *query.shape[2:])
    match = (score, torch.empty_like(score, dtype=torch.int64))
    plan = kernels.Plan("fp32", algorithm)
    kernels.stages(query, key, None, match, Patch(7, 3), Score("both", 1e-12, False), plan)


def maps():
    return torch.randn(1, 3, 7, 9), torch.randn(1, 3, 8, 7)


def test_what_an_algorithm_declines():
    query, key = maps()
    for algorithm in ("slab", "rolled"):
        assert kernels.why_not(algorithm, torch.float32, 5, "fp32") == (
            "it is for patches of 3x3, not of 5x5"
        )
        with pytest.raises(RuntimeError, match=f"{algorithm!r} cannot do this .* 3x3, not of 7x7"):
            run(algorithm, query, key)
    with pytest.raises(ValueError, match="algorithm must be one of .*, got 'fastest'"):
        run("fastest", query, key)
    assert kernels.choose(query, key, Patch(5, 2), "fp32") == "direct"


def test_rocm_has_another_choice(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    large = torch.empty(1).expand(1, 256, 400, 400)
    assert "float32 result on ROCm" in kernels.why_not("slab", torch.float32, 3, "fp16x3")
    assert kernels.choose(large, large, Patch(3, 1), "fp16x3") == "rolled"
    assert kernels.choose(large, large, Patch(3, 1), "fp32") == "slab"
    monkeypatch.setattr(tile_configs, "target", lambda: "gfx90a")
    assert "TF32" in kernels.why_not("direct", torch.float32, 3, "tf32")
    monkeypatch.setattr(tile_configs, "target", lambda: "gfx942")
    assert kernels.why_not("direct", torch.float32, 3, "tf32") is None


@each(
    ("size", "precision", "compiled", "algorithm"),
    [
        ((540, 960), "fp16", True, "slab"),
        ((540, 960), "fp16x3", True, "slab"),
        ((540, 960), "fp32", True, "slab"),
        ((540, 960), "fp16", False, "rolled"),  # Python takes longer than the GPU
        ((540, 960), "fp32", False, "slab"),
        ((8, 8), "fp16", True, "direct"),  # launches dominate
    ],
)
def test_the_choice_by_predicted_time(monkeypatch, size, precision, compiled, algorithm):
    monkeypatch.setattr(slab, "has_cuda_kernel", lambda x: compiled)
    x = torch.empty(1).expand(1, 256, *size)
    assert kernels.choose(x, x, Patch(3, 1), precision) == algorithm


def test_the_choice_of_few_channels():
    """Work after a product weighs more, and the rolled search has less of it."""
    x = torch.empty(1).expand(1, 64, 400, 400)
    assert kernels.choose(x, x, Patch(3, 1), "fp16") == "rolled"
    assert kernels.choose(x, x, Patch(5, 2), "fp16") == "direct"


def test_targets_without_tiles_of_their_own(monkeypatch):
    monkeypatch.setattr(tile_configs, "target", lambda: "sm_100")
    assert (
        tile_configs.select("rolled", "float16x3") == tile_configs.TABLE["rolled", None, "tensor"]
    )
    assert tile_configs.select("direct", "float32") == tile_configs.TABLE["direct", None, "float32"]
    assert tile_configs.select("slab", "float16") == tile_configs.SAFE["slab"]
    monkeypatch.setattr(tile_configs, "target", lambda: "sm_120")
    assert tile_configs.select("rolled", "float16") == tile_configs.SAFE["rolled"], (
        "never compiled for it"
    )


def test_double_is_declined():
    query, key = (x.double() for x in maps())
    with pytest.raises(RuntimeError, match="'triton' cannot run search on .*float32, float16 and"):
        search(query, key, backend="triton")


@each(
    ("version", "interpret", "reason"),
    [
        ("3.5.1", True, "it needs Triton 3.6 or newer, this is 3.5.1"),
        ("3.6.0+git", False, "CUDA and ROCm; TRITON_INTERPRET=1 interprets them"),
        ("3.10.0", True, None),
    ],
)
def test_why_triton_cannot_run(monkeypatch, version, interpret, reason):
    monkeypatch.setattr(backend, "why_not_triton", backend.why_not_triton.__wrapped__)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    why = backend._why_not_on.__wrapped__(torch.device("cpu"))
    assert why is None if reason is None else reason in why


def test_missing_triton_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    why = backend.why_not_triton.__wrapped__()
    assert "install triton>=3.6" in why


def test_old_gpu_is_explained(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why = backend._why_not_on.__wrapped__(torch.device("cuda"))
    assert why == "it needs compute capability 8.0 or newer, this device has (7, 5)"
