"""What only a GPU can show of the Triton search: streams, graphs, waiting, devices, sizes."""

import pytest
import torch

from tests.checks import assert_same_choice
from ttsr_fast import search
from ttsr_fast.kernels import search as kernels
from ttsr_fast.kernels import slab
from ttsr_fast.operators import library

pytestmark = pytest.mark.gpu
each = pytest.mark.parametrize
DEVICES = [f"cuda:{n}" for n in range(torch.cuda.device_count())]


def maps(device="cuda", size=(9, 64, 40, 40), dtype=torch.float32):
    return (torch.randn(size, device=device).to(dtype) for _ in range(2))


@each("precision", ["fp32", "fp16x3", "fp16"])
@each("size", [(9, 64, 40, 40), (1, 64, 90, 100)], ids=str)
def test_nothing_waits_for_the_device(size, precision):
    query, key = maps(size=size)
    mask = torch.rand(1, *size[2:], device="cuda") < 0.5
    options = {"precision": precision, "key_mask": mask, "backend": "triton"}
    expected = search(query, key, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        match = search(query, key, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, other in zip(match, expected, strict=True):
        assert torch.equal(ours, other), "bit-equal twice"


@each("kernel", ["cuda", "triton"])
@each("precision", ["fp32", "tf32", "fp16x3", "fp16", "bf16"])
@each("size", [(2, 64, 9, 37), (1, 70, 150, 131), (9, 256, 40, 40)], ids=str)
def test_slab(monkeypatch, size, precision, kernel):
    """Strips, blocks that overlap, images beside each other; by the kernel of either library."""
    assert library.load_cuda_library() is None
    query, key = maps(size=size)
    assert slab.has_cuda_kernel(query)
    if kernel == "triton":
        monkeypatch.setattr(slab, "has_cuda_kernel", lambda x: False)
    monkeypatch.setattr(kernels, "choose", lambda *_: "slab")
    match = search(query, key, precision=precision, backend="triton")
    assert_same_choice(match, query, key, precision=precision)


@each("algorithm", kernels.ALGORITHMS)
@each("precision", ["fp32", "fp16x3", "fp16"])
def test_equal_patches_at_many_places(monkeypatch, precision, algorithm):
    """In different blocks and strips: the lowest index wins, so all have the same score."""
    monkeypatch.setattr(kernels, "choose", lambda *_: algorithm)
    query, key = maps(size=(1, 256, 120, 300))
    places = [(y, x) for y in range(5, 118, 16) for x in range(5, 298, 29)]
    patch = torch.randn(1, 256, 3, 3, device="cuda")
    for y, x in places:
        key[..., y - 1 : y + 2, x - 1 : x + 2] = patch
    for y, x in places[::7]:
        query[..., y - 1 : y + 2, x - 1 : x + 2] = patch
    index = search(query, key, precision=precision, backend="triton").index[0]
    assert {index[place].item() for place in places[::7]} == {5 * 300 + 5}


@each("algorithm", kernels.ALGORITHMS)
def test_captured_in_a_graph(monkeypatch, algorithm):
    monkeypatch.setattr(kernels, "choose", lambda *_: algorithm)
    query, key = maps(size=(2, 64, 20, 37))
    search(query, key, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        match = search(query, key, backend="triton")
    for x in (query, key):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert_same_choice(match, query, key)


def test_on_the_current_stream():
    query, key = maps(size=(1, 64, 30, 30))
    search(query, key, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late = query + 1  # not there before the sleep ends
        match = search(late, key, backend="triton")
    stream.synchronize()
    assert_same_choice(match, late, key)


@each("device", DEVICES)
def test_on_every_device(device):
    query, key = maps(device, size=(1, 32, 20, 20))
    match = search(query, key, backend="triton")
    assert match.score.device == torch.device(device)
    assert_same_choice(match, query, key)


@each("algorithm", kernels.ALGORITHMS)
def test_more_than_two_to_the_31_elements(monkeypatch, algorithm):
    """The last rows match as they do by themselves."""
    monkeypatch.setattr(kernels, "choose", lambda *_: algorithm)
    query = torch.randn(1, 1, 8_500, 4_000, device="cuda").half().expand(1, 64, -1, -1)
    assert query.numel() > 2**31
    key = torch.randn(1, 64, 4, 5, device="cuda").half()
    whole = search(query, key, backend="triton")
    part = search(query[:, :, -10:], key, backend="triton")
    for x, y in zip(whole, part, strict=True):
        assert torch.equal(x[:, -9:], y[:, -9:])
