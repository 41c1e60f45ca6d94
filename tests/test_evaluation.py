"""Evaluations: methods, references, bad images, comparison images, processes."""

import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.processes import LIMIT
from tests.sets import LEFT, RIGHT, save_cufed5
from ttsr_fast import metrics
from ttsr_fast.datasets import Pair, find_pairs
from ttsr_fast.evaluation import evaluate
from ttsr_fast.images import Image, downscale, read_image, to_tensor, upscale_bicubic
from ttsr_fast.model import TTSR
from ttsr_fast.references import search_references
from ttsr_fast.upscaling import upscale

each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return TTSR((1, 1, 1, 1), 4)


@pytest.fixture
def pair(tmp_path):
    """An image whose sides are no multiples of 4, and three references of other sizes."""
    images = {
        "hr.png": LEFT[:50, :71],
        "a.png": RIGHT[:61, :90],
        "b.png": RIGHT[40:93, 50:99],
        "c.png": LEFT[3:60, :80],
    }
    for name, pixels in images.items():
        Image(pixels).save(tmp_path / name)
    return Pair("hr", tmp_path / "hr.png", tuple(tmp_path / f"{x}.png" for x in "abc"))


def forward(model, low, *refs):
    """The model itself on images in memory, with the best of several references."""
    inputs = [[to_tensor(x) for x in (r, upscale_bicubic(downscale(r)))] for r in refs]
    with torch.no_grad():
        query = to_tensor(low), to_tensor(upscale_bicubic(low))
        results = [model(*query, ref, refsr) for ref, refsr in inputs]
        best = torch.stack([score for _, score, *_ in results]).argmax(0)
        sr = results[0][0]
        return ((sr[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8), best


# --- what is compared -----------------------------------------------------------------------------


@each("protocol", metrics.PROTOCOLS)
def test_the_model_with_the_first_reference(model, pair, protocol):
    (row,) = evaluate(model, [pair], protocol=protocol).rows
    hr, ref = read_image(pair.hr).pixels[:48, :68], read_image(pair.references[0]).pixels[:60, :88]
    sr, _ = forward(model, downscale(hr), ref)
    assert row.name == "hr"
    assert row.psnr == pytest.approx(metrics.psnr(sr, hr, protocol), abs=1e-3)
    assert row.ssim == pytest.approx(metrics.ssim(sr, hr, protocol), abs=1e-4)
    assert row.references == ("a.png",)
    assert 0 < row.seconds < LIMIT


@each("method", ["detail", "bicubic"])
def test_methods_without_weights(pair, method):
    (row,) = evaluate(method, [pair], references="all").rows
    hr = read_image(pair.hr).pixels[:48, :68]
    low, refs = downscale(hr), list(pair.references)
    sr = upscale(low, refs).image.pixels if method == "detail" else upscale_bicubic(low)
    assert row.psnr == metrics.psnr(sr, hr)
    assert row.ssim == metrics.ssim(sr, hr)
    assert row.references == (("a.png", "b.png", "c.png") if method == "detail" else ())


def test_a_model_without_hard_attention_takes_no_reference(pair):
    torch.manual_seed(2)
    model = TTSR((1, 1, 1, 1), 4, hard_attention=False)
    hr = read_image(pair.hr).pixels[:48, :68]
    with torch.no_grad():
        (sr,) = model(to_tensor(downscale(hr)))
    expected = ((sr[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
    (row,) = evaluate(model, [pair]).rows
    assert row.psnr == metrics.psnr(expected, hr)
    assert row.references == ()


def test_all_references_are_searched(model, pair):
    """One of them is the image itself, a little off: only `all` finds it."""
    best = {mode: evaluate("detail", [pair], references=mode).psnr for mode in ("first", "all")}
    assert best["all"] > best["first"] + 1
    (row,) = evaluate(model, [pair], references="all").rows
    hr = read_image(pair.hr).pixels[:48, :68]
    expected = upscale(downscale(hr), list(pair.references), model=model).image.pixels
    assert row.psnr == metrics.psnr(expected, hr)
    assert row.references == ("a.png", "b.png", "c.png")


@each(("method", "side"), [("ttsr", 100), ("detail", 500)])
def test_the_stack_is_one_image(model, pair, method, side, monkeypatch):
    if method == "ttsr":  # which takes long
        monkeypatch.setattr("ttsr_fast.evaluation.runner.CANVAS", side)
    used = model if method == "ttsr" else "detail"
    (row,) = evaluate(used, [pair], references="stack").rows
    stack = np.zeros((3 * side, side, 3), np.uint8)
    for n, path in enumerate(pair.references):
        pixels = read_image(path).pixels
        stack[side * n : side * n + pixels.shape[0], : pixels.shape[1]] = pixels
    hr = read_image(pair.hr).pixels[:48, :68]
    options = {"model": model} if method == "ttsr" else {}
    expected = upscale(downscale(hr), stack, **options).image.pixels
    assert row.psnr == metrics.psnr(expected, hr)
    assert row.references == ("a.png", "b.png", "c.png")


@each("mode", ["first", "all", "stack"])
def test_without_references_the_small_image_is_one(model, pair, mode):
    (row,) = evaluate(model, [pair._replace(references=())], references=mode).rows
    hr = read_image(pair.hr).pixels[:48, :68]
    low = downscale(hr)
    sr, _ = forward(model, low, low[:12, :16])
    assert row.psnr == pytest.approx(metrics.psnr(sr, hr), abs=1e-3)
    assert row.references == ("LR",)


def test_options_reach_the_search(model, pair, monkeypatch):
    calls = []

    def watched(query, keys, *, precision, backend, **options):
        calls.append((precision, backend))
        return search_references(query, keys, precision=precision, backend=backend, **options)

    monkeypatch.setattr("ttsr_fast.upscaling.ttsr.search_references", watched)
    monkeypatch.setattr(model.SearchTransfer, "backend", "torch")
    plain = evaluate(model, [pair]).psnr
    small = evaluate(model, [pair], precision="bf16", backend="reference").psnr
    assert calls == [(None, "torch"), ("bf16", "reference")]
    assert small == pytest.approx(plain, abs=0.5)
    with pytest.raises(ValueError, match="hr: max_memory .* is too little for method 'ttsr'"):
        evaluate(model, [pair], max_memory=1)


def test_grey_and_16_bits_count_as_their_8_bit_colours(tmp_path):
    grey = LEFT[:48, :52, :1]
    Image(grey).save(tmp_path / "grey.png")
    Image(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image(grey.repeat(3, axis=2)).save(tmp_path / "colour.png")
    pairs = [Pair(name, tmp_path / f"{name}.png", ()) for name in ("colour", "grey", "deep")]
    rows = evaluate("detail", pairs).rows
    assert len({row[1:3] for row in rows}) == 1


def test_a_model_in_float64(model, pair):
    single, double = evaluate(model, [pair]), evaluate(model.double(), [pair])
    model.float()
    assert double.psnr == pytest.approx(single.psnr, abs=1e-3)


def test_progress_names_pairs(pair, tmp_path):
    steps = []
    pairs = [pair._replace(name=name) for name in "xyz"]
    pairs[1] = pairs[1]._replace(hr=tmp_path / "no.png")
    evaluate("bicubic", pairs, on_error="skip", progress=lambda *x: steps.append(x))
    assert steps == [("x", 1, 3), ("y", 2, 3), ("z", 3, 3)]


# --- bad input ------------------------------------------------------------------------------------


@each(
    ("options", "error", "message"),
    [
        ({"protocol": "y"}, ValueError, "protocol must be one of .*, got 'y'"),
        ({"references": "each"}, ValueError, "references must be one of .*, got 'each'"),
        ({"on_error": "ignore"}, ValueError, "on_error must be 'raise' or 'skip', got 'ignore'"),
        ({"max_memory": 0}, ValueError, "max_memory must be a positive number of bytes, got 0"),
        ({"device": "cpu"}, ValueError, "device is for 'detail'"),
        ({"model": "swinir"}, ValueError, "model must be a TTSR or one of .*, got 'swinir'"),
        ({"model": torch.nn.Identity()}, TypeError, "model must be a TTSR .*, got Identity"),
        ({"pairs": []}, ValueError, "pairs must hold at least one pair, got none"),
        ({"backend": "abacus"}, ValueError, "hr: .*backend must be None or one of .*'abacus'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(model, pair, options, error, message):
    arguments = {"model": model, "pairs": [pair], **options}
    with pytest.raises(error, match=message):
        evaluate(**arguments)


def test_bad_images_are_named(pair, tmp_path):
    broken, small, large = (tmp_path / f"{x}.png" for x in ("broken", "small", "large"))
    broken.write_bytes(pair.hr.read_bytes()[:200])
    Image(LEFT[:8, :20]).save(small)
    Image(LEFT[:20, :40].repeat(15, axis=1)).save(large)

    def refused(message, hr=pair.hr, references=pair.references, method="detail", mode="all"):
        with pytest.raises(ValueError, match=message):
            evaluate(method, [Pair("x", hr, references)], references=mode)

    refused(r"cannot read .*broken\.png: ", broken)
    refused(r"cannot read .*broken\.png: ", references=(*pair.references, broken))
    refused(r"x: reference small\.png must be at least 12x12 pixels, got 20x8", references=(small,))
    refused(r"x: reference LR must be at least 12x12 pixels, got 5x2", small, ())
    refused(r"x: images must be at least 11x11 pixels .* got 20x8", small, method="bicubic")
    refused(r"large\.png must fit into 500x500 .* 600x20", references=(large,), mode="stack")
    missing = pair._replace(hr=tmp_path / "no.png", references=(tmp_path / "nor.png",))
    with pytest.raises(FileNotFoundError, match=r"no\.png: no such file \(the first of 2 that are"):
        evaluate("detail", [pair, missing])


def test_nothing_is_computed_before_all_is_checked(pair, tmp_path, monkeypatch):
    """Neither for the last image, nor without scikit-image, nor in too little memory."""
    monkeypatch.setattr("ttsr_fast.evaluation.runner.upscale", None)
    small, text = tmp_path / "small.png", tmp_path / "text.png"
    Image(LEFT[:8, :20]).save(small)
    text.write_text("no image")
    for last in (pair._replace(references=(small,)), Pair("x", text, ())):
        with pytest.raises(ValueError, match=r"must be at least 12x12|text\.png: it is no PNG"):
            evaluate("detail", [pair, last])
    with pytest.raises(ValueError, match="hr: max_memory 1 MiB is too little"):
        evaluate("detail", [pair], max_memory=2**20)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        evaluate("detail", [pair])


def test_skipped_images_are_listed_and_not_counted(pair, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pair.hr.read_bytes()[:200])
    pairs = [pair, Pair("x", broken, ()), Pair("y", tmp_path / "no.png", ()), pair]
    table = evaluate("bicubic", pairs, on_error="skip")
    assert [row.name for row in table.rows] == ["hr", "hr"]
    assert table.psnr == evaluate("bicubic", [pair]).psnr
    assert [failure.name for failure in table.failures] == ["x", "y"]
    assert f"cannot read {broken}: " in table.failures[0].message
    with pytest.raises(ValueError, match=r"none of 2 pairs can be evaluated: cannot read .*broken"):
        evaluate("bicubic", pairs[1:3], on_error="skip")


def test_a_model_that_gives_nan_is_named(pair):
    model = TTSR((1, 1, 1, 1), 4)
    torch.nn.init.constant_(model.MainNet.merge_tail.conv_tail2.bias, math.nan)
    with pytest.raises(
        ValueError, match="hr: the weights hold NaN in MainNet.merge_tail.conv_tail2.bias"
    ):
        evaluate(model, [pair])


# --- images -------------------------------------------------------------------------------------


@each("mode", ["first", "all"])
def test_drawings_show_what_was_compared(pair, tmp_path, mode):
    folder = tmp_path / "drawings"
    evaluate("detail", [pair], references=mode, pictures=folder)
    assert [path.name for path in folder.iterdir()] == ["hr.png"]
    sheet = read_image(folder / "hr.png").pixels
    step, height = 508, round(48 * 480 / 68)
    assert sheet.shape == (2 * (height + 28) + 40 + 28, 4 * step + 28, 3)
    hr = read_image(pair.hr).pixels[:48, :68]
    panel = sheet[68 : 68 + height, 28 + 2 * step :][:, :480]
    inside = (panel != [230, 30, 60]).any(2)
    rows = (np.arange(height) + 0.5) * 48 / height
    columns = (np.arange(480) + 0.5) * 68 / 480
    expected = hr[rows.astype(int)][:, columns.astype(int)]
    assert (panel == expected).all(2)[inside].mean() > 0.98


def test_a_drawing_never_replaces_an_input(pair):
    before = pair.hr.read_bytes()
    with pytest.raises(ValueError, match=r"cannot write .*hr\.png: it is an input"):
        evaluate("bicubic", [pair], pictures=pair.hr.parent)
    with pytest.raises(ValueError, match="pairs must have different names"):
        evaluate("bicubic", [pair, pair], pictures=pair.hr.parent / "drawings")
    assert pair.hr.read_bytes() == before


# --- processes ------------------------------------------------------------------------------------


def without_seconds(table):
    return [row._replace(seconds=0) for row in table.rows], table.failures


def evaluate_there(model, pairs, options):
    return evaluate(model, pairs, **options)


def test_two_processes_give_the_table_of_one(two, model, tmp_path):
    pairs = find_pairs(save_cufed5(tmp_path / "CUFED5", 9), "cufed5")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    pairs.insert(4, Pair("broken", broken, ()))
    expected = without_seconds(evaluate(model, pairs, on_error="skip"))
    assert len(expected[0]) == 9
    for table in two.run(evaluate_there, model, pairs, {"on_error": "skip"}):
        assert without_seconds(table) == expected


def test_an_error_in_one_process_ends_all(three, model, pair, tmp_path):
    """And the group can be used again."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(pair.hr.read_bytes()[:200])  # its header is whole
    pairs = [pair, Pair("broken", broken, ()), pair, pair]
    first, second, third = three.run(evaluate_there, model, pairs, {})
    assert isinstance(second, ValueError)
    assert str(second).startswith(f"cannot read {broken}: ")
    for other in (first, third):
        assert re.match(r"process 1 of the group raised ValueError.*broken\.png", str(other))
    tables = three.run(evaluate_there, "bicubic", pairs[:1], {})
    assert [len(table.rows) for table in tables] == [1, 1, 1]


def evaluate_own(pairs, together):
    own = pairs[: dist.get_rank() + 1]
    return evaluate("bicubic", own, together=together)


def test_processes_agree_or_go_alone(two, pair):
    pairs = [pair, pair._replace(name="x")]
    assert [len(table.rows) for table in two.run(evaluate_own, pairs, False)] == [1, 2]
    for error in two.run(evaluate_own, pairs, True):
        assert str(error) == "the processes must evaluate the same pairs in the same way"
