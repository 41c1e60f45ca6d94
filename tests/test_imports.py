"""The layers of the package: who may import whom, how long a file may be, what an import may do."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ttsr_fast import choices, metrics
from ttsr_fast.upscaling import pipeline

ROOT = Path(__file__).parent.parent

# What each module or subpackage may import, besides the standard library and its own files.
LAW: dict[str, set[str]] = {
    "__init__": {"_moved", "certify", "functional", "model", "modules", "references", "upscaling"},
    "__main__": {"cli"},
    "_moved": set(),
    "choices": set(),
    "devices": {"torch"},
    "files": set(),
    "optional": set(),
    # The two operations.
    "reference": {"torch"},
    "operators": {"choices", "reference", "torch"},
    "functional": {"choices", "operators", "torch"},
    "modules": {"functional", "torch"},
    "references": {"functional", "operators", "torch"},
    "distributed": {"devices", "functional", "operators", "references", "torch"},
    "certify": {"functional", "operators", "torch"},
    "compat": {"functional", "torch"},
    # The model, and what is made with it.
    "model": {"choices", "files", "modules", "optional", "torch"},
    "images": {"files", "numpy", "optional", "torch"},
    "upscaling": {"choices", "files", "functional", "images", "model", "references", "torch"},
    "datasets": {"choices", "files", "images", "numpy"},
    "metrics": {"numpy", "optional"},
    "visualize": {"PIL", "files", "images", "numpy", "torch"},
    "evaluation": {"choices", "datasets", "files", "images", "metrics", "model"},
    "training": {"choices", "datasets", "devices", "files", "images", "metrics", "model"},
}
LAW["evaluation"] |= {"numpy", "torch", "upscaling", "visualize"}
LAW["training"] |= {"PIL", "accelerate", "numpy", "optional", "torch"}
LAW["cli"] = {*LAW, "PIL", "numpy", "rich", "torch", "typer"}
# Inside `operators`: an operator uses another, backends are reached through their selection.
OPERATORS: dict[str, set[str]] = {
    "build": set(),
    "registry": set(),
    "patch": set(),
    "index": set(),
    "library": {"build", "patch", "registry"},
    "triton": {"library", "patch"},
    "cpp": {"index", "library", "patch"},
    "pytorch": {"index", "patch"},
    "oracle": {"index", "patch"},
    "backends": {"build", "cpp", "library", "oracle", "pytorch", "triton"},
    "gather_fold": {"backends", "index", "patch", "registry"},
    "search": {"backends", "gather_fold", "index", "patch", "registry"},
    "__init__": set(),
}
# What `import ttsr_fast` leaves alone: it has to be quick, and to work without these.
LEFT_ALONE = {"PIL", "faiss", "matplotlib", "ninja", "pykeops", "rich", "setuptools", "skimage"}
LEFT_ALONE |= {"imagecodecs", "safetensors", "tifffile", "triton", "typer"}
LEFT_ALONE |= {"accelerate", "omegaconf", "tensorboard", "yaml"}

PACKAGE = sorted((ROOT / "ttsr_fast").rglob("*.py"))
TRITON = sorted((ROOT / "kernels").glob("*.py"))  # installed as ttsr_fast.kernels
BENCH = sorted((ROOT / "bench").rglob("*.py"))
DOCS = sorted((ROOT / "docs").rglob("*.py"))
PYTHON = [
    *PACKAGE,
    *TRITON,
    *BENCH,
    *DOCS,
    *sorted((ROOT / "tests").rglob("*.py")),
    ROOT / "setup.py",
]
KERNELS = sorted((ROOT / "csrc").rglob("*.[ch]*"))
each = pytest.mark.parametrize


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, absolute and dotted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(path: Path) -> str:
    return path.relative_to(ROOT / "ttsr_fast").parts[0].removesuffix(".py")


def imported_layer(module: str) -> str:
    """The part of the package that a module belongs to, or the name of another package."""
    root, *rest = module.split(".")
    if root != "ttsr_fast":
        return root
    return rest[0] if rest and rest[0] in LAW else "__init__"


@each("path", sorted((ROOT / "ttsr_fast" / "operators").glob("*.py")), ids=name)
def test_operators_obey_theirs(path: Path) -> None:
    prefix = "ttsr_fast.operators."
    inside = {m.removeprefix(prefix) for m in imports(path) if m.startswith(prefix)}
    assert {module.partition(".")[0] for module in inside} <= OPERATORS[path.stem]


def test_no_import_goes_in_a_circle() -> None:
    """Between files, the ones inside functions included."""
    modules = {name(path).removesuffix(".py").replace("/", "."): path for path in PACKAGE}
    uses = {
        module: {
            prefix
            for target in imports(path)
            for prefix in (target, target.rpartition(".")[0])
            if prefix in modules and prefix != module
        }
        for module, path in modules.items()
    }
    while leaves := {module for module, used in uses.items() if not used}:
        uses = {m: used - leaves for m, used in uses.items() if m not in leaves}
    assert uses == {}


@each("path", PACKAGE, ids=name)
def test_package_obeys_the_law(path: Path) -> None:
    assert layer(path) in LAW, "a new layer: say in LAW what it may import"
    allowed = {*LAW[layer(path)], layer(path), *sys.stdlib_module_names}
    assert {imported_layer(module) for module in imports(path)} - allowed == set()


@each("path", TRITON, ids=name)
def test_triton_kernels_stand_alone(path: Path) -> None:
    allowed = {"torch", "triton", "ttsr_fast.kernels", *sys.stdlib_module_names}
    for module in imports(path):
        assert module.split(".")[0] in allowed or module.startswith("ttsr_fast.kernels."), module


def test_only_one_backend_reaches_the_kernels() -> None:
    """By name, when they are first asked for; nothing else says that name."""
    users = {path.name for path in PACKAGE if "ttsr_fast.kernels" in path.read_text()}
    assert users == {"triton.py"}


@each("path", BENCH, ids=name)
def test_bench_stands_on_the_package_alone(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & {"tests", *(test.stem for test in (ROOT / "tests").glob("*.py"))}


@each("path", KERNELS, ids=name)
def test_kernels_keep_to_the_stable_abi(path: Path) -> None:
    included = re.findall(r"#\s*include\s*<([^>]*/[^>]*)>", path.read_text())
    allowed = (
        "torch/csrc/stable/",
        "torch/headeronly/",
        "torch/csrc/inductor/aoti_torch/c/",
        "sys/",
    )
    assert [header for header in included if not header.startswith(allowed)] == []


@each("path", [*PYTHON, *KERNELS], ids=name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether Triton compiles it; a kernel is one function, however long."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@each("path", PYTHON, ids=name)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not is_kernel(node):
            body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
            assert node.end_lineno is not None
            assert node.end_lineno - body[0].lineno < 60, f"{node.name} is too long"


def test_import_does_nothing_else() -> None:
    """It prints nothing, starts no process, reads no network and loads nothing that is optional."""
    program = """
import sys, torch
before = set(sys.modules)
def forbid(event, arguments):
    if event in ("os.system", "os.posix_spawn", "socket.connect", "subprocess.Popen"):
        sys.exit(f"{event} {arguments}")
sys.addaudithook(forbid)
import ttsr_fast
assert not torch.cuda.is_initialized()
assert torch.ops.ttsr_fast.search and ttsr_fast.search
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
sys.exit(" ".join(loaded & %r) or 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", program % LEFT_ALONE], capture_output=True, text=True, cwd=ROOT
    )
    assert (result.stdout, result.stderr.strip(), result.returncode) == ("", "", 0)


FORMER_NAMES = """
import warnings
import ttsr_fast
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from ttsr_fast.bank import ReferenceBank
    from ttsr_fast.pairs import Pair, find_pairs
    from ttsr_fast import build, pictures
    from ttsr_fast.backends import OLDEST_TRITON, choose, load_library
    from ttsr_fast.plan import Plan, parse_bytes
    from ttsr_fast.training.datasets import Draws, PairDataset
    from ttsr_fast.upscale import upscale
print(*(str(warning.message).partition(" is now ")[2] for warning in caught))
import ttsr_fast.datasets, ttsr_fast.operators.build, ttsr_fast.upscaling
assert Pair is ttsr_fast.datasets.Pair and build.remedy is ttsr_fast.operators.build.remedy
assert ReferenceBank is ttsr_fast.ReferenceBank and upscale is ttsr_fast.upscaling.upscale
assert ttsr_fast.plan.parse_bytes("1KiB") == 1024 and "choose" in dir(ttsr_fast.backends)
assert not hasattr(ttsr_fast, "nothing")
from ttsr_fast.pairs import *
assert degrade is ttsr_fast.datasets.degrade
assert {warning.filename for warning in caught} == {"<string>"}, caught[0].filename
try:
    ttsr_fast.upscale("no.png", "ref.png")
except FileNotFoundError:
    pass
"""


def test_former_names_are_importable_with_a_warning() -> None:
    command = [sys.executable, "-c", FORMER_NAMES]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stderr == ""
    command = [sys.executable, "-m", "ttsr_fast.build", "--help"]
    program = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert program.returncode == 0 and "ttsr_fast.operators.build" in program.stdout
    assert result.stdout.split() == [
        "ttsr_fast.upscaling.bank",
        "ttsr_fast.datasets",
        "ttsr_fast.operators.build",
        "ttsr_fast.visualize",
        "ttsr_fast.operators.backends",
        "ttsr_fast.upscaling.plan",
        "ttsr_fast.training.data",
        "ttsr_fast.upscaling",
    ]


HEAVY = ("torch", "numpy", "PIL", "omegaconf", "accelerate")
LIGHT = """
import sys
from ttsr_fast.cli import commands
print(*(name for name in %r if name in sys.modules))
"""


def test_the_program_loads_nothing_heavy_for_its_help(tmp_path: Path) -> None:
    script = tmp_path / "ttsr-fast"
    script.write_text(LIGHT % (HEAVY,))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.stdout, result.stderr) == ("\n", "")
    command = [sys.executable, "-X", "importtime", "-m", "ttsr_fast", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "rich.progress" in loaded
    assert loaded & set(HEAVY) == set()


def test_an_import_loads_everything_in_any_order() -> None:
    program = """
import ttsr_fast, torch
assert torch.ops.ttsr_fast.search and ttsr_fast.images and callable(ttsr_fast.upscale)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_choices_are_what_the_modules_take() -> None:
    assert tuple(metrics.PROTOCOLS) == choices.PROTOCOLS
    assert tuple(pipeline.AMP) == choices.AMP
