"""`upscale --resume`: which results are kept, and which are made again and why."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ttsr_fast
from tests.test_cli import LOW, REF, assert_refused, folder, names, noise, run  # noqa: F401
from ttsr_fast.cli import batch, inputs, record
from ttsr_fast.cli.record import NAME, Record
from ttsr_fast.images import Image, read_image
from ttsr_fast.model import TTSR, save_model
from ttsr_fast.upscaling import upscale

each = pytest.mark.parametrize
ALL = [f"lows_x4/{number}_x4.png" for number in range(3)]
OPTIONS = ("lows", "--ref", "ref.png", "--weights", "tiny.pt")


@pytest.fixture
def folders(folder):  # noqa: F811  # the fixture above
    """Three images, a reference and a model."""
    Path("lows").mkdir()
    for number in range(3):
        Image(noise(4, 5, 3, seed=number)).save(f"lows/{number}.png")
    save(seed=1)
    return folder


def save(seed, name="tiny.pt"):
    torch.manual_seed(seed)
    save_model(TTSR((0, 0, 0, 0), 2), name)


def resume(*options, made=(), again=(), kept=ALL):
    """A run with --resume makes these results, of which it says this, and keeps others."""
    before = {path: (Path(path).stat().st_ino, Path(path).read_bytes()) for path in kept}
    result = run("upscale", *(options or OPTIONS), "--resume")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    if kept:
        total = len(kept) + len(made)
        assert lines.pop() == f"kept {len(kept)} of {total} results, which are up to date"
    assert [line.split()[0] for line in lines if line.endswith(" s)")] == list(made)
    assert [line for line in lines if not line.endswith(" s)")] == list(again)
    after = {path: (Path(path).stat().st_ino, Path(path).read_bytes()) for path in kept}
    assert after == before


def assert_right(ref=REF, model="tiny.pt", **options):
    weights = ttsr_fast.load_model(model)
    for number, path in enumerate(ALL):
        expected = upscale(f"lows/{number}.png", ref, model=weights, **options).image.pixels
        np.testing.assert_array_equal(read_image(path).pixels, expected)


def test_a_run_that_was_cut_short_goes_on(folders):
    run("upscale", *OPTIONS)
    Path(ALL[1]).unlink()
    resume(made=[ALL[1]], kept=[ALL[0], ALL[2]])
    resume()
    assert_right()


def test_resources_do_not_count(folders):
    """What is computed decides, and not where or in what steps."""
    run("upscale", *OPTIONS)
    options = ("--tile", "2", "--max-memory", "100G", "--backend", "torch", "--cache", "features")
    resume(*OPTIONS, *options, "--device", "cpu", "--precision", "fp32")
    for suffix in (".jpg", ".bmp"):
        result = run("upscale", *OPTIONS, "--ext", suffix[1:], "--resume")
        assert len(result.stdout.splitlines()) == 3, "other files"


def test_results_without_a_record_are_made_again(folders):
    run("upscale", *OPTIONS)
    Path("lows_x4", NAME).unlink()
    Path(ALL[1]).write_bytes(b"of another program")
    again = [f"{path} is made again: there is no record of how it was made" for path in ALL]
    resume(made=ALL, again=again, kept=[])
    resume()
    assert_right()


@each("change", ["image", "reference", "weights", "phases", "amp", "precision", "version", "file"])
def test_results_of_something_else_are_made_again(folders, monkeypatch, change):
    options, reason, changed = OPTIONS, f"{change} was", ALL
    detail = ("lows", "--ref", "ref.png", "--phases", "1")
    run("upscale", *(detail if change == "phases" else OPTIONS))
    if change == "image":
        Image(noise(4, 5, 3, seed=9)).save("lows/1.png")
        reason, changed = "the image has changed", ALL[1:2]
    elif change == "reference":
        Image(REF[::-1]).save("ref.png")
        reason = "the references have changed"
    elif change == "weights":
        save(seed=2)
        reason = "the weights have changed"
    elif change == "phases":
        options, reason = ("lows", "--ref", "ref.png"), "phases was 1"
    elif change == "amp":
        options, reason = (*OPTIONS, "--amp", "bf16"), "amp was none"
    elif change == "precision":
        options, reason = (*OPTIONS, "--precision", "bf16"), "precision was fp32"
    elif change == "version":
        reason = f"version was {ttsr_fast.__version__}"
        monkeypatch.setattr(ttsr_fast, "__version__", "99.1")
    else:
        Path(ALL[2]).write_bytes(Path(ALL[2]).read_bytes()[:-1])
        reason, changed = "the file has changed", ALL[2:]
    again = [f"{path} is made again: {reason}" for path in changed]
    resume(*options, made=changed, again=again, kept=[path for path in ALL if path not in changed])
    resume(*options)


def test_the_method_counts(folders):
    run("upscale", "lows", "--ref", "ref.png")
    again = [f"{path} is made again: method was detail" for path in ALL]
    resume(made=ALL, again=again, kept=[])
    assert_right()


def test_each_image_has_its_own_reference(folders):
    Path("refs").mkdir()
    for number in range(3):
        Image(noise(20, 24, 3, seed=9 + number)).save(f"refs/{number}.png")
    options = ("lows", "--pairs", "refs")
    run("upscale", *options)
    Image(noise(20, 24, 3, seed=20)).save("refs/2.png")
    again = [f"{ALL[2]} is made again: the references have changed"]
    resume(*options, made=ALL[2:], again=again, kept=ALL[:2])


def test_an_image_alone_has_a_record_if_it_is_to_be_resumed(folders):
    options = ("low.png", "--ref", "ref.png")
    assert run("upscale", *options).exit_code == 0
    assert not Path(NAME).exists()
    again = ["low_x4.png is made again: there is no record of how it was made"]
    resume(*options, made=["low_x4.png"], again=again, kept=[])
    resume(*options, kept=["low_x4.png"])
    resume(*options, "-o", "lows/big.png", made=["lows/big.png"], kept=[])
    resume(*options, "-o", "lows/big.png", kept=["lows/big.png"])
    assert_refused(
        run("upscale", *options, "-o", "none/a.png", "--resume"),
        "cannot write none/a.png: there is no folder none",
    )


# --- results beside their inputs ---


def test_results_are_no_inputs_of_the_next_run(folders):
    options = ("lows", "--ref", "ref.png", "-o", "lows")
    paths = [f"lows/{number}_x4.png" for number in range(3)]
    run("upscale", *options)
    expected = names(folders / "lows")
    assert expected == sorted([*(f"{n}.png" for n in range(3)), *(f"{n}_x4.png" for n in range(3))])
    resume(*options, kept=paths)
    Path(paths[0]).unlink()
    resume(*options, made=paths[:1], kept=paths[1:])
    result = run("upscale", *options)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 3)
    assert names(folders / "lows") == expected
    for number in range(3):
        Path(f"lows/{number}.png").unlink()
    assert_refused(run("upscale", *options), "LR must name images, got only results")


def test_an_input_is_never_replaced(folders):
    """Not even one whose turn comes later, or a reference of another image."""
    shutil.copy("lows/1.png", "lows/0_x4.png")
    before = Path("lows/0_x4.png").read_bytes()
    result = run("upscale", "lows", "--ref", "ref.png", "-o", "lows", "--quiet")
    assert_refused(
        result,
        "cannot write lows/0_x4.png: it is an input or another result\nerror: 1 of 4 images failed",
        code=1,
    )
    assert Path("lows/0_x4.png").read_bytes() == before

    shutil.copytree("lows", "refs", ignore=shutil.ignore_patterns(".*", "*_x4_x4*"))
    for path in Path("refs").iterdir():
        Image(noise(20, 24, 3)).save(path)
    before = Path("refs/0_x4.png").read_bytes()
    result = run("upscale", "lows/0.png", "--pairs", "refs", "-o", "refs")
    assert_refused(result, "cannot write refs/0_x4.png: it is an input or another result")
    assert Path("refs/0_x4.png").read_bytes() == before


def test_the_current_folder_has_a_name(folders, monkeypatch):
    monkeypatch.chdir("lows")
    assert run("upscale", ".", "--ref", "../ref.png").exit_code == 0
    assert names(folders / "lows_x4") == [f"{number}_x4.png" for number in range(3)]


# --- the file ---


def lines():
    return Path("lows_x4", NAME).read_bytes().splitlines(keepends=True)


@each("size", [0, 1, 16, 17, 40, -1])
def test_a_torn_line_costs_its_result_alone(folders, size):
    run("upscale", *OPTIONS)
    first, second, third = lines()
    Path("lows_x4", NAME).write_bytes(first + second + third[:size])
    again = [f"{ALL[2]} is made again: there is no record of how it was made"]
    if size == -1:  # all but the end of the line
        resume()
    else:
        resume(made=ALL[2:], again=again, kept=ALL[:2])
        resume()


def test_a_changed_line_does_not_count(folders):
    run("upscale", *OPTIONS)
    content = Path("lows_x4", NAME).read_bytes()
    Path("lows_x4", NAME).write_bytes(content.replace(b'"0_x4.png"', b'"9_x4.png"'))
    again = [f"{ALL[0]} is made again: there is no record of how it was made"]
    resume(made=ALL[:1], again=again, kept=ALL[1:])


def test_one_result_is_one_line(folders, monkeypatch):
    """And stale lines are left out when there are many."""
    run("upscale", *OPTIONS)
    assert len(lines()) == 3
    run("upscale", *OPTIONS)
    assert len(lines()) == 6
    monkeypatch.setattr(record, "_STALE", 0)
    resume()
    assert len(lines()) == 3


def test_other_bytes_in_a_record_do_no_harm(folders):
    Path("lows_x4").mkdir()
    for content in (b"\xff\xfe\n\n \n", b"[]", record._checksum(b"[1]") + b" [1]\n"):
        Path("lows_x4", NAME).write_bytes(content)
        assert run("upscale", *OPTIONS).exit_code == 0
        resume()


@each("kind", ["folder", "link"])
def test_a_record_that_cannot_be_written_is_an_error_before_the_work(folders, kind):
    Path("lows_x4").mkdir()
    path = Path("lows_x4", NAME)
    path.mkdir() if kind == "folder" else path.symlink_to("elsewhere")
    assert_refused(run("upscale", *OPTIONS), f"cannot write {path}: it is no regular file")
    assert names(folders / "lows_x4") == []


def test_a_full_disk_is_named(folders, monkeypatch):
    Path("lows_x4").mkdir()
    target = Record(Path("lows_x4"))
    monkeypatch.setattr(record, "_APPEND", 0)  # for reading, where writing fails
    Path("lows_x4", NAME).touch()
    with pytest.raises(OSError, match=rf"cannot write lows_x4/{re.escape(NAME)}: Bad file"):
        target.add(Path("ref.png"), {})


# --- Ctrl-C ---


def test_an_interrupted_folder_can_be_resumed(folders, monkeypatch):
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return upscale(*args, **options)

    monkeypatch.setattr(batch, "upscale", interrupted)
    result = run("upscale", *OPTIONS)
    assert result.exit_code == 130
    message = "interrupted after 1 of 3 images; the same command with --resume goes on"
    assert result.stderr == f"error: {message}\n"
    assert names(folders / "lows_x4") == ["0_x4.png"]
    resume(made=ALL[1:], kept=ALL[:1])
    assert_right()

    calls[:] = [None]
    result = run("upscale", "low.png", "--ref", "ref.png")
    assert (result.exit_code, result.stderr) == (130, "error: interrupted after 0 of 1 images\n")
    assert not Path("low_x4.png").exists()


def test_an_interrupt_before_the_first_image_is_one_line(folders, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "upscale_options", interrupted)
    result = run("upscale", *OPTIONS)
    message = "error: interrupted before the first image\n"
    assert (result.exit_code, result.output) == (130, message)


def test_weights_that_change_while_they_are_read_do_not_count(folders, monkeypatch):
    options = inputs.upscale_options

    def read_and_replace(*arguments):
        result = options(*arguments)
        save(seed=2)
        return result

    monkeypatch.setattr(inputs, "upscale_options", read_and_replace)
    run("upscale", *OPTIONS)
    monkeypatch.setattr(inputs, "upscale_options", options)
    again = [f"{path} is made again: the weights have changed" for path in ALL]
    resume(made=ALL, again=again, kept=[])
    assert_right()


def test_an_input_that_is_saved_anew_meanwhile_is_still_an_input(folders, monkeypatch):
    """Its number in the file system is another one then."""
    Path("lows/00.png").write_bytes(Path("lows/0.png").read_bytes())

    def save_again(*arguments, **options):
        Path("new.png").write_bytes(Path("lows/1.png").read_bytes())
        Path("new.png").replace("lows/00.png")
        return upscale(*arguments, **options)

    monkeypatch.setattr(batch, "upscale", save_again)
    result = run("upscale", "lows", "--ref", "ref.png", "-o", "lows", "--suffix", "0")
    assert "cannot write lows/00.png: it is an input or another result" in result.stderr
    assert Path("lows/00.png").read_bytes() == Path("lows/1.png").read_bytes()


def test_a_finished_folder_may_be_read_only(folders, monkeypatch):
    run("upscale", *OPTIONS)
    monkeypatch.setattr(Record, "check_writable", lambda self: 1 / 0)
    resume()


def test_results_are_no_references_of_the_next_run(folders):
    Path("both").mkdir()
    for number in range(2):
        Image(noise(16, 16, 3, seed=number)).save(f"both/{number}.png")
    options = ("both", "--ref", "both", "-o", "both", "--phases", "1", "--resume")
    assert run("upscale", *options).exit_code == 0
    results = {path: path.stat().st_ino for path in Path("both").glob("*_x4.png")}
    assert len(results) == 2
    again = run("upscale", *options)
    assert (again.exit_code, again.output) == (0, "kept 2 of 2 results, which are up to date\n")
    assert {path: path.stat().st_ino for path in Path("both").glob("*_x4*.png")} == results
