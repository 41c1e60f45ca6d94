"""Memory plans: sizes in words, windows that fit, errors where nothing does."""

import platform
import re
import subprocess
import sys

import pytest
import torch

from ttsr_fast.model import TTSR
from ttsr_fast.upscaling import memory, plan
from ttsr_fast.upscaling.memory import free_bytes, parse_bytes, resident_bytes
from ttsr_fast.upscaling.plan import describe, plan_upscale

CPU = torch.device("cpu")
GIB = 2**30
LR, REF = (270, 480), (1080, 1920)
each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        model = TTSR()
    return model.to_empty(device="cpu")


@pytest.fixture(autouse=True)
def _nothing_is_taken(monkeypatch):
    monkeypatch.setattr(plan, "_growth", lambda device: 0)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)  # the tests' own name is the real one


@each(
    ("text", "expected"),
    [
        ("1", 1),
        ("512M", 512 * 2**20),
        ("4GiB", 4 * GIB),
        ("4 gb", 4 * GIB),
        ("1.5g", 3 * GIB // 2),
        ("100KB", 102400),
        ("2T", 2 * 2**40),
    ],
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@each("text", ["", "G", "-1G", "4 apples", "1e9", "0", "0G", "4GG"])
def test_other_words_are_no_sizes(text):
    with pytest.raises(ValueError, match="a size in bytes is expected, such as 4GiB or 512M, got"):
        parse_bytes(text)


def test_a_small_image_is_taken_whole(model):
    made = plan_upscale((88, 125), [(368, 500)], model=model, max_memory=3 * GIB)
    assert made.whole and made.band is None and made.store == CPU
    assert made.tiles["LTE"] >= 125
    assert [name for name, _ in made.stages] == ["LTE", "search", "MainNet"]


def test_much_memory_is_not_used_for_its_own_sake(model):
    made = plan_upscale(LR, [REF], model=model, max_memory=100 * GIB)
    assert not made.whole and made.peak < 6 * GIB


@each("gibibytes", [6, 3, 2])
def test_less_memory_is_kept_to_with_smaller_windows(model, gibibytes):
    made = plan_upscale(LR, [REF], model=model, max_memory=gibibytes * GIB)
    assert made.peak <= made.limit == gibibytes * GIB
    assert not made.whole
    larger = plan_upscale(LR, [REF], model=model, max_memory=2 * gibibytes * GIB)
    for name, side in made.tiles.items():
        assert plan.LEAST_TILE <= side <= larger.tiles[name]


def test_features_of_all_references_count_unless_they_are_cached(model):
    one, two = (plan_upscale(LR, [REF] * n, model=model, max_memory=3 * GIB) for n in (1, 2))
    search = [dict(made.stages)["search"] for made in (one, two)]
    assert search[1] - search[0] == 4 * 2048 * 270 * 480
    there = plan_upscale(LR, [REF] * 2, model=model, max_memory=3 * GIB, cached=True)
    assert search[0] - dict(there.stages)["search"] == 4 * 2048 * 270 * 480


def test_a_tile_is_taken_for_every_stage(model):
    made = plan_upscale(LR, [REF], model=model, max_memory=8 * GIB, tile=40)
    assert set(made.tiles.values()) == {40} and not made.whole


@each("options", [{}, {"tile": 100}])
def test_too_little_memory_is_refused_with_what_is_needed(model, options):
    lines, refusal = describe(LR, [REF], model=model, max_memory=GIB, **options)
    found = re.fullmatch(
        r"max_memory 1.00 GiB is too little .*: (\d\.\d)GiB is enough", str(refusal)
    )
    with pytest.raises(ValueError, match=r"max_memory 1.00 GiB is too little"):
        plan_upscale(LR, [REF], model=model, max_memory=GIB, **options)
    enough = float(found[1])
    made = plan_upscale(LR, [REF], model=model, max_memory=parse_bytes(f"{enough}GiB"), **options)
    assert made.peak <= made.limit
    with pytest.raises(ValueError, match="is too little"):
        plan_upscale(LR, [REF], model=model, max_memory=int((enough - 0.7) * GIB), **options)
    assert dict(lines)["limit"].endswith("more than is taken now") and len(lines) > 5


def test_more_memory_is_never_refused(model):
    lr, refs = (446, 275), [(2389, 499), (2106, 2737)]
    fits = []
    for limit in range(GIB, 8 * GIB, GIB // 16):
        _, refusal = describe(lr, refs, model=model, max_memory=limit)
        fits.append(refusal is None)
    assert not fits[0] and fits[-1] and fits == sorted(fits)


def test_detail_says_what_it_needs(model):
    (limit, (name, needed)), refusal = describe(LR, [REF])
    assert name == "detail" and needed.endswith(" GiB") and refusal is None
    _, refusal = describe(LR, [REF], max_memory=GIB // 10)
    assert str(refusal).startswith("max_memory 102 MiB is too little for method 'detail'")


def test_a_plan_in_words(model):
    found, refusal = describe(LR, [REF], model=model, max_memory=3 * GIB, method="ttsr")
    lines = dict(found)
    assert refusal is None
    assert lines["limit"] == "3.00 GiB more than is taken now"
    assert lines["features are kept on"] == "cpu"
    side = plan_upscale(LR, [REF], model=model, max_memory=3 * GIB).tiles["merge"]
    assert lines["merge"].endswith(f" GiB, windows of {side} x {side}")


def test_memory_that_is_free_and_taken():
    before = resident_bytes()
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    assert 180 * 2**20 < resident_bytes() - before < 260 * 2**20
    assert 0 < free_bytes(CPU) < 2**50 and held.all()


def test_a_container_has_less(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    whole = free_bytes(CPU)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > whole // 2
    (tmp_path / "memory.max").write_text("51000\n")
    assert free_bytes(CPU) == 50000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    """Where it is not, the system maps the pages of every block again."""
    code = """
import resource, sys, torch
from ttsr_fast.upscaling.memory import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
for _ in range(64):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    command = [sys.executable, "-c", code]
    fresh, kept = (
        int(subprocess.run([*command, *arguments], check=True, capture_output=True).stdout)
        for arguments in ([], ["keep"])
    )
    assert fresh - kept > 48 * 2**14  # 4 KiB each; small blocks may split a few of the first


def test_a_model_that_takes_no_reference():
    with pytest.raises(ValueError, match="model must have hard attention to be helped"):
        plan_upscale(LR, [REF], model=TTSR((1, 1, 1, 1), 4, hard_attention=False))
