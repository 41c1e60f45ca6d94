"""Fixtures for all tests: poisoned memory, seeds, threads, the device and backends under test."""

import ctypes
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import emulated
from tests.processes import Processes
from ttsr_fast.operators import backends, build, triton
from ttsr_fast.upscaling import memory

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

# Where tensors are that a test makes without naming a device.
DEVICE = torch.device(os.environ.get("TTSR_FAST_TEST_DEVICE", "cpu"))
# A backend that is listed must run: a missing one is an error, never a skipped test.
DEFAULT_BACKENDS = {"cpu": "cpp,torch"}.get(DEVICE.type, "triton,torch")
BACKENDS = os.environ.get("TTSR_FAST_TEST_BACKENDS", DEFAULT_BACKENDS).split(",")
# About the CPU, its memory or no device at all: left out where another device is under test.
CPU_MODULES = {
    "test_backends",
    "test_bank",
    "test_bench",
    "test_bench_cases",
    "test_build",
    "test_build_changes",
    "test_checkpoint",
    "test_cli",
    "test_config",
    "test_convert",
    "test_cuda_kernels",
    "test_cuda_library",
    "test_cuda_slab",
    "test_datasets",
    "test_demo",
    "test_distributed",
    "test_docs",
    "test_emulator",
    "test_eval",
    "test_evaluation",
    "test_functional",
    "test_gate",
    "test_gpu_check",
    "test_images",
    "test_imports",
    "test_isa",
    "test_memory",
    "test_metrics",
    "test_offline",
    "test_packaging",
    "test_photographs",
    "test_resize",
    "test_resume",
    "test_search_kernel",
    "test_table",
    "test_ranks",
    "test_train_demo",
    "test_training",
    "test_upscale",
    "test_visualize",
}

# About what nvcc makes of the kernels, or a compiler of C++: left out where it cannot be used.
NVCC_MODULES = {"test_cuda_library"}
COMPILER_MODULES = {"test_build", "test_build_changes", "test_cuda_kernels", "test_cuda_slab"}
COMPILER_MODULES |= {"test_emulator", "test_isa", "test_search_kernel"}

# What a module cannot be imported without; it is left out where that is missing or too old. Where
# the tools of development are installed, of which mypy is one, that is an error.
PACKAGES = {
    "test_broken_calls": ("triton",),
    "test_cli": ("typer",),
    "test_convert": ("typer",),
    "test_cuda_library": ("triton",),
    "test_cuda_slab": ("triton",),
    "test_docs": ("griffe", "matplotlib", "sybil", "typer"),
    "test_eval": ("typer",),
    "test_gpu": ("triton",),
    "test_kernel_choice": ("triton",),
    "test_kernels": ("triton",),
    "test_layout": ("triton",),
    "test_properties": ("hypothesis",),
    "test_resume": ("typer",),
    "test_train_demo": ("skimage",),
    "test_training": ("accelerate",),
    "test_upscale": ("skimage",),
}


def _is_missing(package: str) -> bool:
    if find_spec(package) is None:
        return True
    if package != "triton":
        return False
    return _release(importlib.import_module(package).__version__) < triton.OLDEST_TRITON


def _release(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in number.split(".")[:2])


MISSING = {
    module: ", ".join(name for name in names if _is_missing(name))
    for module, names in PACKAGES.items()
}
LEFT_OUT = {module: names for module, names in MISSING.items() if names}
collect_ignore = [f"{module}.py" for module in LEFT_OUT]


def pytest_configure(config: pytest.Config) -> None:
    if LEFT_OUT and find_spec("mypy") is not None:
        raise pytest.UsageError(
            f"modules of tests lack packages that `make env` installs: {LEFT_OUT}"
        )
    if DEVICE.type == "cuda":  # for torch.use_deterministic_algorithms; read when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config.addinivalue_line("markers", "gpu: left out where there is no CUDA device")
    config.addinivalue_line("markers", "compiled: left out where cpp is not to be tested")
    config.addinivalue_line("markers", "double: searches in float64, which Triton declines")
    config.addinivalue_line("markers", "torch(major, minor): left out where torch is older")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    possible = {"gpu": torch.cuda.is_available(), "compiled": "cpp" in BACKENDS}
    missing = {name for name, here in possible.items() if not here}
    left_out = {item for item in items if missing & {mark.name for mark in item.iter_markers()}}
    left_out |= {item for item in items if _is_declined(item)}
    if DEVICE.type != "cpu":
        left_out |= {item for item in items if item.path.stem in CPU_MODULES}
    for modules, _ in _not_compiled():
        left_out |= {item for item in items if item.path.stem in modules}
    left_out |= {item for item in items if _is_for_newer_torch(item)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _not_compiled() -> Iterator[tuple[set[str], str]]:
    """Modules that need a compiler or a newer torch, with the reason."""
    for modules, cuda in ((NVCC_MODULES, True), (COMPILER_MODULES, False)):
        reason = build.why_not(cuda=cuda)
        if reason is not None:
            yield modules, reason


def _is_for_newer_torch(item: pytest.Item) -> bool:
    oldest = [mark.args for mark in item.iter_markers("torch")]
    return any(_release(torch.__version__) < release for release in oldest)


def _is_declined(item: pytest.Item) -> bool:
    """Whether a test asks Triton for float64, which its search declines.

    The other operators are PyTorch's there, and tested as such.
    """
    params = item.callspec.params if hasattr(item, "callspec") else {}
    dtype = params.get("dtype", params.get("sample", {}).get("dtype"))
    double = dtype == torch.float64 or item.get_closest_marker("double") is not None
    return double and params.get("backend") == "triton"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if DEVICE.type != "cpu":
        modules = ", ".join(sorted(CPU_MODULES))
        terminalreporter.write_line(
            f"on {DEVICE}; these are for the CPU and did not run: {modules}"
        )
    for modules, reason in _not_compiled():
        names = ", ".join(sorted(modules))
        terminalreporter.write_line(f"{names} did not run, as nothing can be compiled: {reason}")
    for module, names in LEFT_OUT.items():
        terminalreporter.write_line(f"{module} did not run, as {names} is missing or too old")


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend under test."""
    reason = backends.why_not(request.param, DEVICE)
    if reason is not None:
        pytest.fail(f"backend {request.param!r} is to be tested and cannot run: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program would keep it for all tests of this process, of which some measure it."""
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if DEVICE.type == "cpu":
        yield
        return
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def emulator() -> ctypes.CDLL:
    """The CUDA library, compiled for the CPU: every access is checked for its alignment."""
    library = emulated.library()
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


@pytest.fixture
def write_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writer of sources into an empty `csrc`; compiler, flags and cache are the test's own."""
    folder = tmp_path / "a $folder" / "csrc"
    for name in ("cpu", "cuda"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    for variable in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDA_HOME", "NVCCFLAGS"):
        monkeypatch.delenv(variable, raising=False)

    def write(text: str, name: str = "module.cpp") -> None:
        (folder / name).write_text(text)

    return write


@pytest.fixture(params=["ninja", "no ninja"])
def ninja(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Presence of ninja: the test runs with it and without."""
    if request.param == "no ninja":
        monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == "ninja" else name)
    return request.param == "ninja"


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def start_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Processes]]:
    """Starts a group of that many; at the end all are ended."""
    started = []

    def start(size: int) -> Processes:
        started.append(Processes(size, tmp_path_factory.mktemp("group")))
        return started[-1]

    yield start
    for group in started:
        group.end()


@pytest.fixture(scope="session")
def groups(start_processes: Callable[..., Processes]) -> Callable[..., Processes]:
    """A group of that many, the same one for all tests."""
    return cache(start_processes)


@pytest.fixture
def two(groups: Callable[..., Processes]) -> Processes:
    return groups(2)


@pytest.fixture
def three(groups: Callable[..., Processes]) -> Processes:
    return groups(3)


@pytest.fixture(params=[2, 3])
def processes(request: pytest.FixtureRequest, groups: Callable[..., Processes]) -> Processes:
    return groups(request.param)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN and huge negative integers, so that reading it unwritten shows.

    For the whole session, because PyTorch keeps tables of its own functions that it fills once.
    """
    with torch.device("cpu"):  # fills the table of factory functions with the originals
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args, **kwargs) -> Tensor:
        x = allocate(*args, **kwargs)
        with torch.no_grad():
            if x.is_floating_point():
                x.fill_(float("nan"))
            elif x.dtype in (torch.int32, torch.int64):
                x.fill_(torch.iinfo(x.dtype).min)
        return x

    return allocate_poisoned
