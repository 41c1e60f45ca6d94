"""The command line: the files it writes, one line and an exit code for every bad input."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

import ttsr_fast
from tests.image_samples import noise
from ttsr_fast.cli import environment, record
from ttsr_fast.cli.commands import app
from ttsr_fast.cli.environment import EXTRAS
from ttsr_fast.images import Image, read_image
from ttsr_fast.model import TTSR, save_model
from ttsr_fast.operators import backends, build, library
from ttsr_fast.upscaling import upscale
from ttsr_fast.visualize import draw_match

ROOT = Path(__file__).parent.parent
each = pytest.mark.parametrize


LOW, REF = noise(6, 7, 3), noise(32, 36, 3, seed=4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with an image, a reference, and things that are neither."""
    monkeypatch.chdir(tmp_path)
    Image(LOW).save("low.png")
    Image(REF).save("ref.png")
    Image(REF[:11]).save("tiny.png")
    Path("broken.png").write_bytes(Path("low.png").read_bytes()[:60])
    Path("text.pth").write_text("not a checkpoint")
    torch.save({"a": torch.zeros(3)}, "foreign.pth")
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def assert_refused(result, message, code=2):
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def names(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != record.NAME)
    return sorted(str(path.relative_to(folder)) for path in files)


# --- upscale --------------------------------------------------------------------------------------


@each(
    ("arguments", "name"),
    [
        ((), "low_x4.png"),
        (("-o", "out.png"), "out.png"),
        (("-o", "sub"), "sub/low_x4.png"),
        (("--suffix", "", "-o", "sub"), "sub/low.png"),
        (("--suffix", "_big", "--ext", "tif"), "low_big.tif"),
    ],
)
def test_upscale_writes_what_the_function_returns(folder, arguments, name):
    Path("sub").mkdir()
    before = names(folder)
    result = run("upscale", "low.png", "--ref", "ref.png", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(rf"{name} \(28 x 24, \d+\.\d s\)\n", result.stdout)
    assert names(folder) == sorted([*before, name])
    np.testing.assert_array_equal(read_image(name).pixels, upscale(LOW, REF).image.pixels)


@each(
    ("options", "expected"),
    [
        (("--phases", "1"), {"phases": 1}),
        (("--method", "detail", "--device", "cpu"), {}),
        (("--backend", "reference", "--precision", "bf16"), {"precision": "bf16"}),
    ],
)
def test_options_reach_the_function(folder, options, expected):
    assert run("upscale", "low.png", "--ref", "ref.png", *options).exit_code == 0
    result = upscale(LOW, REF, **expected, backend="reference").image.pixels
    assert np.abs(read_image("low_x4.png").pixels.astype(int) - result).max() <= 1


def test_weights_make_it_ttsr(folder):
    torch.manual_seed(1)
    model = TTSR((1, 0, 0, 1), 4)
    save_model(model, "tiny.pth")
    assert run("upscale", "low.png", "--ref", "ref.png", "--weights", "tiny.pth").exit_code == 0
    expected = upscale(LOW, REF, model=model).image.pixels
    np.testing.assert_array_equal(read_image("low_x4.png").pixels, expected)


def test_a_compiled_network_gives_the_same(folder, monkeypatch):
    torch.manual_seed(1)
    model = TTSR((1, 0, 0, 1), 4)
    save_model(model, "tiny.pth")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    options = ("--ref", "ref.png", "--weights", "tiny.pth", "--compile")
    assert run("upscale", "low.png", *options).exit_code == 0
    assert [kind.__name__ for kind in compiled] == ["MainNet"]
    expected = upscale(LOW, REF, model=model).image.pixels
    np.testing.assert_array_equal(read_image("low_x4.png").pixels, expected)


def test_quiet_says_nothing(folder):
    result = run("upscale", "low.png", "--ref", "ref.png", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert Path("low_x4.png").is_file()


def test_the_suffix_is_kept_where_it_can_hold_the_result(folder):
    alpha = noise(6, 7)
    Image(LOW, alpha).save("a.webp")
    Image(LOW[..., :1]).save("b.JPG")
    deep = noise(6, 7, 3, dtype=np.uint16)
    tifffile.imwrite("c.tif", deep, photometric="rgb")
    for name, result in (("a.webp", "a_x4.webp"), ("b.JPG", "b_x4.JPG"), ("c.tif", "c_x4.png")):
        assert run("upscale", name, "--ref", "ref.png").exit_code == 0
        expected = upscale(name, REF).image
        written = read_image(result)
        if name != "b.JPG":
            np.testing.assert_array_equal(written.to_array(), expected.to_array(), strict=True)
        assert written.pixels.shape == expected.pixels.shape


# --- bad input ------------------------------------------------------------------------------------

PAIR = ("low.png", "--ref", "ref.png")


@each(
    ("arguments", "message"),
    [
        (("none.png", "--ref", "ref.png"), "cannot read none.png: no such file or folder"),
        (("low.png", "--ref", "none.png"), "cannot read none.png: no such file or folder"),
        (("broken.png", "--ref", "ref.png"), "cannot read broken.png: .*truncated.*"),
        (("low.png", "--ref", "broken.png"), "cannot read broken.png: .*truncated.*"),
        (("low.png", "--ref", "tiny.png"), "tiny.png must have .* 12x12 pixels, got 36x11"),
        ((*PAIR, "--ref", "tiny.png"), "tiny.png must have .* 12x12 pixels, got 36x11"),
        (("low.png",), "either --ref or --pairs is needed, and not both"),
        ((*PAIR, "--pairs", "sub"), "either --ref or --pairs is needed, and not both"),
        (("low.png", "--pairs", "ref.png"), "--pairs must be a folder, got ref.png"),
        (("low.png", "--ref", "sub"), "sub holds no images .*"),
        ((*PAIR, "--max-memory", "some"), "--max-memory: a size in bytes is expected, .*'some'"),
        (
            (*PAIR, "--max-memory", "1M"),
            "max_memory 1 MiB is too little for method 'detail' at .*: .* is enough",
        ),
        ((*PAIR, "--tile", "8"), "tile is for method 'ttsr', not for 'detail'"),
        ((*PAIR, "--amp", "bf16"), "amp is for method 'ttsr', not for 'detail'"),
        ((*PAIR, "--amp", "int8"), "--amp must be one of bf16, fp16, got int8"),
        ((*PAIR, "--compile"), "--compile is for --method ttsr, with --weights"),
        ((*PAIR, "--cache", "sub"), "--cache is for --method ttsr, with --weights"),
        ((*PAIR, "-o", "none/a.png"), "cannot write none/a.png: there is no folder none"),
        ((*PAIR, "-o", "low.png/a.png"), "cannot write low.png/a.png: there is no folder low.png"),
        ((*PAIR, "-o", "/proc/a.png"), "cannot write /proc/a.png: no file can be made in /proc .*"),
        ((*PAIR, "-o", "a.xyz"), "cannot write a.xyz: the suffix must be one of .*"),
        ((*PAIR, "-o", "low.png"), "cannot write low.png: it is an input or another result"),
        ((*PAIR, "--suffix", ""), "cannot write low.png: it is an input or another result"),
        ((*PAIR, "--ext", "gif"), "--ext must be auto or one of png, .*, got gif"),
        ((*PAIR, "--method", "magic"), "--method must be one of detail, ttsr, got magic"),
        ((*PAIR, "--method", "ttsr"), "--method ttsr needs --weights"),
        ((*PAIR, "--phases", "3"), "--phases must be one of 1, 2, 4, got 3"),
        ((*PAIR, "--backend", "abacus"), "--backend must be one of .*, got abacus"),
        ((*PAIR, "--precision", "fp4"), "--precision must be one of .*, got fp4"),
        ((*PAIR, "--device", "abacus"), "--device must be one of cpu.*, got abacus"),
        ((*PAIR, "--weights", "none.pth"), "cannot read none.pth: .*"),
        ((*PAIR, "--weights", "text.pth"), "cannot read text.pth: .*"),
        ((*PAIR, "--weights", "foreign.pth"), "foreign.pth .*"),
        ((*PAIR, "--weights", "foreign.pth", "--phases", "2"), "--weights are for --method ttsr.*"),
        (("sub", "--ref", "ref.png"), "sub holds no images .*"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(folder, arguments, message):
    Path("sub").mkdir()
    before = {name: Path(name).read_bytes() for name in names(folder)}
    assert_refused(run("upscale", *arguments), message)
    assert {name: Path(name).read_bytes() for name in names(folder)} == before


def test_a_failure_leaves_the_existing_result_alone(folder):
    Path("out.png").write_bytes(b"before")
    before = names(folder)
    assert_refused(
        run("upscale", "low.png", "--ref", "tiny.png", "-o", "out.png"), "tiny.png must .*"
    )
    assert Path("out.png").read_bytes() == b"before"
    assert names(folder) == before


def test_usage_is_explained(folder):
    for arguments in (("match", "low.png"), ("upscale", *PAIR, "--loud"), ("enlarge",)):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.stderr
    assert "LR" in run("upscale", "--help").stdout


# --- match, env and the program -------------------------------------------------------------------


def test_match_draws_the_result(folder):
    result = run("match", "low.png", "--ref", "ref.png", "-o", "sheet.png", "--phases", "1")
    assert result.exit_code == 0
    assert re.fullmatch(r"sheet.png \(1552 x \d+, \d+\.\d s\)\n", result.stdout)
    expected = draw_match(Image(LOW), Image(REF), *upscale(LOW, REF, phases=1))
    np.testing.assert_array_equal(read_image("sheet.png").pixels, expected.pixels)


@each(
    ("arguments", "message"),
    [
        (("low.png", "--ref", "tiny.png", "-o", "a.png"), "tiny.png must have at least one .*"),
        (("none.png", "--ref", "ref.png", "-o", "a.png"), "cannot read none.png: no such file"),
        ((*PAIR, "-o", "a.xyz"), "cannot write a.xyz: the suffix must be one of .*"),
    ],
)
def test_match_refuses_bad_input(folder, arguments, message):
    assert_refused(run("match", *arguments), message)


def env_lines():
    lines = (line.split("  ", 1) for line in run("env").stdout.splitlines())
    return {name: value.strip() for name, value in lines}


def test_env_tells_what_runs_and_why_not(monkeypatch):
    monkeypatch.setattr(
        backends, "why_not", lambda name, device: None if name == "torch" else f"no {device}"
    )
    lines = env_lines()
    assert lines["ttsr-fast"] == ttsr_fast.__version__
    assert lines["torch"].startswith(torch.__version__)
    assert lines["cpu capability"] == torch.backends.cpu.get_cpu_capability()
    assert lines["devices"].split(", ")[0] == "cpu"
    assert lines["torch on cpu"] == "runs"
    assert lines["reference on cpu"] == "no: no cpu"
    assert re.search(r"pillow \d+\.\d+", lines["extra cli"])


def test_env_names_the_instruction_set_and_the_version_of_cuda(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, device: None)
    monkeypatch.setattr(library, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(library, "load_cuda_library", lambda: None)
    monkeypatch.setattr(library, "cuda_library_version", lambda: "13.0")
    monkeypatch.setattr(environment, "devices", lambda: ["cpu", "cuda:0"])
    lines = env_lines()
    assert (lines["cpp on cpu"], lines["cpp on cuda"]) == ("runs, avx2", "runs")
    assert lines["cuda library"] == "loaded, CUDA 13.0"

    monkeypatch.setattr(library, "load_cuda_library", lambda: "it is not there")
    assert env_lines()["cuda library"] == "no: it is not there"


def test_env_builds_the_kernels_first(monkeypatch):
    def built(cuda=None, reason=None):
        """The first lines with a torch for this CUDA, and this reason not to compile in CUDA."""
        monkeypatch.setattr(build, "find_torch", lambda: build.Torch(Path(), "2.13.0", cuda))
        monkeypatch.setattr(build, "why_not", lambda *, cuda: reason)
        return run("env", "--build").stdout.partition("ttsr-fast ")[0].splitlines()

    libraries = {False: Path("/cache/cpu.so"), True: Path("/cache/cuda.so")}
    monkeypatch.setattr(build, "build_library", lambda *, cuda=False: libraries[cuda])
    monkeypatch.setattr(library, "load_cuda_library", lambda: "not loaded here")
    assert built() == ["compiled /cache/cpu.so"]
    assert built("13.0") == ["compiled /cache/cpu.so", "compiled /cache/cuda.so"]
    assert built("13.0", "there is no nvcc") == [
        "compiled /cache/cpu.so",
        "left out the kernels in CUDA: there is no nvcc",
    ]

    def fail():
        raise RuntimeError("there is no compiler\n(a second line)")

    monkeypatch.setattr(build, "build_library", fail)
    assert_refused(run("env", "--build"), "there is no compiler")


def test_extras_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    for extra, expected in EXTRAS.items():
        (names,) = re.findall(rf"^{extra} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        assert tuple(re.findall(r'"([\w-]+)', names)) == expected


def test_version():
    assert run("--version").stdout == f"ttsr-fast {ttsr_fast.__version__}\n"


def program(*arguments):
    command = [sys.executable, "-m", "ttsr_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.compiled  # or a warning says that they are missing
def test_the_program_runs(folder):
    result = program("upscale", *PAIR)
    assert (result.returncode, result.stderr) == (0, "")
    np.testing.assert_array_equal(read_image("low_x4.png").pixels, upscale(LOW, REF).image.pixels)


def test_the_program_fails_in_one_line(folder):
    result = program("upscale", "broken.png", "--ref", "ref.png")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch("error: cannot read broken.png: .*truncated.*\n", result.stderr)
