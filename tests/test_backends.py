"""The choice of a backend, its explanation, and that nothing falls back behind one's back."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ttsr_fast import choices, gather_fold, search
from ttsr_fast.operators import backends, build, library, triton

CPU, META = torch.device("cpu"), torch.device("meta")
OPERATORS = ("search", "gather_fold", "gather_fold_adjoint", "gather_dot")


@pytest.fixture
def without_cpp(monkeypatch):
    reasons = {"cpp": "it is switched off"}
    monkeypatch.setattr(backends, "why_not", lambda name, *_: reasons.get(name))


def run(command, **settings):
    """A finished process with `settings` in its environment."""
    environment = {**os.environ, **settings}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def inputs():
    return torch.randn(1, 3, 5, 6), torch.randn(1, 3, 4, 7)


def test_a_reason_is_given_or_it_runs(backend):
    assert backends.can_run(backend, CPU) and backends.why_not(backend, CPU) is None
    assert not backends.can_run("cpp", META)
    with pytest.raises(
        RuntimeError, match="'cpp' cannot run search on meta: .* for the CPU and for"
    ):
        backends.can_run("cpp", META, raise_error=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_first_that_can_run_is_chosen(monkeypatch, name):
    x, _ = inputs()
    names = [backend for backend in choices.BACKENDS if backend != "triton"]  # not on the CPU
    for count, expected in enumerate(names):
        missing = names[:count]
        monkeypatch.setattr(backends, "why_not", lambda b, *_, m=missing: "off" if b in m else None)
        chosen = backends.choose(name, x, None)
        assert chosen is backends.choose(name, x, expected)
    for other in names[:-1]:
        monkeypatch.setattr(backends, "why_not", lambda *_: None)
        assert backends.choose(name, x, other) is not chosen


@pytest.mark.parametrize("name", OPERATORS)
def test_every_backend_has_every_operator(backend, name):
    assert callable(backends.choose(name, inputs()[0], backend))


def test_explicit_backend_does_not_fall_back(without_cpp, monkeypatch):
    query, key = inputs()
    index = torch.zeros(1, 5, 6, dtype=torch.int64)
    refused = pytest.raises(RuntimeError, match="'cpp' cannot run .* on cpu: it is switched off")
    with refused:
        search(query, key, backend="cpp")
    with refused:
        gather_fold(key, index, backend="cpp")
    monkeypatch.setenv("TTSR_FAST_BACKEND", "cpp")
    with refused:
        search(query, key)
    with refused:
        gather_fold(key, index)


def test_none_chooses_what_is_left(without_cpp):
    query, key = inputs()
    match, expected = search(query, key), search(query, key, backend="torch")
    assert torch.equal(match.score, expected.score) and torch.equal(match.index, expected.index)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_environment_variable_equals_the_argument(monkeypatch, name):
    used = []

    def record(*arguments):
        used.append(name)
        for x in arguments[3]:
            x.zero_()

    monkeypatch.setattr(backends.MODULES[name], "search", record)
    query, key = inputs()
    search(query, key, backend=name)
    monkeypatch.setenv("TTSR_FAST_BACKEND", name)
    search(query, key)
    assert used == [name, name]
    other = "reference" if name == "torch" else "torch"
    search(query, key, backend=other)
    assert used == [name, name], "the argument comes first"
    monkeypatch.setenv("TTSR_FAST_BACKEND", "")
    assert backends.choose("search", query, None) is not None


def test_environment_variable_that_names_nothing(monkeypatch):
    monkeypatch.setenv("TTSR_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="backend must be None or one of .*got 'fastest'"):
        search(*inputs())


def test_backward_uses_the_backend_of_the_forward(monkeypatch, backend):
    asked = []
    choose = backends.choose

    def record(name, x, wanted):
        asked.append((name, wanted))
        return choose(name, x, wanted)

    monkeypatch.setattr(backends, "choose", record)
    query, key = (x.requires_grad_() for x in inputs())
    score, index = search(query, key, backend=backend)
    gather_fold(key, index, weight=score, backend=backend).sum().backward()
    assert {name for name, _ in asked} == set(OPERATORS)
    assert {wanted for _, wanted in asked} == {backend}


@pytest.mark.torch(2, 10)
def test_missing_library_is_explained(monkeypatch):
    monkeypatch.setattr(library, "_library", lambda: None)
    reason = library.load_library.__wrapped__()
    assert reason.endswith(f"; `{sys.executable} -m ttsr_fast.operators.build` compiles it")


@pytest.mark.torch(2, 10)
def test_missing_kernels_are_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(library, "_library", lambda: None)
    monkeypatch.setattr(library, "load_library", library.load_library.__wrapped__)
    backends._warn_once.cache_clear()
    query, key = inputs()
    search(query, key, backend="torch")
    assert caplog.messages == []
    gather_fold(key, search(query, key).index)
    (message,) = caplog.messages
    assert re.fullmatch(
        r"ttsr-fast works without its kernels, several times slower: the compiled library is not "
        r"part .*; `\S+ -m ttsr_fast.operators.build` compiles it "
        r"\(TTSR_FAST_BACKEND=torch silences this\)",
        message,
    )
    monkeypatch.setattr("platform.system", lambda: "Windows")
    backends._warn_once.cache_clear()
    search(query, key)
    assert len(caplog.messages) == 1, "there are none for that system"


def test_older_torch_runs_without_the_kernels(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    reason = library.load_library.__wrapped__()
    assert reason == "the kernels need torch 2.10 or newer, this is 2.6.0+cu124"


@pytest.mark.torch(2, 10)
def test_library_that_does_not_load_gives_the_reason(monkeypatch, tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("TTSR_FAST_LIBRARY", str(broken))
    reason = library.load_library.__wrapped__()
    assert reason.startswith(f"_C.abi3.so does not load under torch {torch.__version__}")
    assert "file too short" in reason or "invalid ELF header" in reason


@pytest.mark.torch(2, 10)
def test_library_without_the_kernels_is_refused():
    """A library that loads and is another one, in a process of its own."""
    other = Path(torch.__file__).parent / "lib" / "libshm.so"
    script = "from ttsr_fast.operators import library; print(library.load_library())"
    result = run([sys.executable, "-c", script], TTSR_FAST_LIBRARY=str(other))
    assert result.stdout.startswith(f"{other} was compiled from other sources; `")


def test_reference_backend_runs_everything():
    query, key = (x.requires_grad_() for x in inputs())
    score, index = search(query, key, backend="reference")
    out = gather_fold(key, index, weight=score, backend="reference")
    grads = torch.autograd.grad(out.sum(), (query, key))
    score, index = search(query, key, backend="torch")
    out = gather_fold(key, index, weight=score, backend="torch")
    for x, y in zip(grads, torch.autograd.grad(out.sum(), (query, key)), strict=True):
        torch.testing.assert_close(x, y)


BASELINE = "neon" if platform.machine() in ("aarch64", "arm64") else "baseline"
INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", BASELINE)


@pytest.mark.compiled
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set(instruction_set, request, monkeypatch):
    """The tests of `search`, with the kernels that another processor would run."""
    tests = [str(request.path.with_name(name)) for name in ("test_search.py", "test_parts.py")]
    chosen = "options or ties or identical or (shapes and float32) or test_parts"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen]
    settings = {"TTSR_FAST_ISA": instruction_set, "TTSR_FAST_TEST_BACKENDS": "cpp"}
    if instruction_set == "amx":  # with a tile unit in C++
        portable = Path(__file__).parent.parent / "build/portable-tiles" / build.LIBRARY
        monkeypatch.setenv("CXXFLAGS", "-DTTSR_PORTABLE_TILES")
        build.compile_library(portable)
        settings["TTSR_FAST_LIBRARY"] = str(portable)
    result = run(command, **settings)
    refused = "TTSR_FAST_ISA must name an instruction set of this processor" in result.stdout
    assert result.returncode == 0 or (refused and instruction_set != BASELINE), result.stdout


class OnGpu:
    device, dtype = torch.device("cuda"), torch.float32


def test_who_runs_what_on_a_gpu(monkeypatch):
    """Triton searches; the compiled library transfers, and PyTorch where that is missing."""
    for module, check in ((triton, "_why_not_on"), (library, "why_not_gpu")):
        monkeypatch.setattr(module, check, lambda _: None)
    for reason, transfer in ((None, "cpp"), ("it is missing", "torch")):
        monkeypatch.setattr(library, "load_cuda_library", lambda r=reason: r)
        for op in OPERATORS:
            expected = getattr(backends.MODULES["triton" if op == "search" else transfer], op)
            assert backends.choose(op, OnGpu, None) is expected
            assert backends.choose(op, OnGpu, "triton") is expected
    with pytest.raises(RuntimeError, match="cannot run gather_fold on cuda: it is missing"):
        backends.choose("gather_fold", OnGpu, "cpp")
    with pytest.raises(RuntimeError, match="cannot run search on cuda: .*backend='triton'"):
        backends.choose("search", OnGpu, "cpp")


def test_gpus_that_the_kernels_are_not_compiled_for(monkeypatch):
    monkeypatch.setattr(library, "load_cuda_library", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, backend in (((7, 5), "torch"), ((8, 0), "cpp")):
        library.why_not_gpu.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        expected = backends.MODULES[backend].gather_fold
        assert backends.choose("gather_fold", OnGpu, None) is expected
    library.why_not_gpu.cache_clear()


def test_triton_is_chosen_for_gpus_alone(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, *_: "CPU" if name == "cpp" else None)
    assert backends.choose("search", OnGpu, None) is backends.choose("search", OnGpu, "triton")
    on_cpu = backends.choose("search", inputs()[0], None)
    assert on_cpu is backends.choose("search", OnGpu, "torch")


@pytest.mark.torch(2, 10)
@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (13000, "13.0", None),
        (13010, "13.3", None),
        (13000, "12.8", r"compiled with CUDA 13.0, torch with 12.8; with nvcc 12 `"),
        (12080, "13.0", r"compiled with CUDA 12.8, torch with 13.0; with nvcc 13 `"),
        (13000, None, "is a build without CUDA"),
    ],
)
def test_cuda_of_the_library_and_of_torch(monkeypatch, ours, theirs, reason):
    monkeypatch.setattr(torch.version, "cuda", theirs)
    monkeypatch.setattr(library, "_library", lambda *, cuda: Path("_C_cuda.abi3.so"))
    monkeypatch.setattr(library, "_load", lambda *_: None)
    version = f"{ours // 1000}.{ours % 1000 // 10}"
    monkeypatch.setattr(library, "cuda_library_version", lambda: version)
    found = library.load_cuda_library.__wrapped__()
    assert found is reason is None or reason in found


@pytest.mark.torch(2, 10)
def test_missing_cuda_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "_library", lambda *, cuda: None)
    reason = library.load_cuda_library.__wrapped__()
    assert reason.startswith("the CUDA library is not part of this installation; `")
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    broken = tmp_path / "_C_cuda.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("TTSR_FAST_CUDA_LIBRARY", str(broken))
    reason = library.load_cuda_library.__wrapped__()
    assert reason.startswith("_C_cuda.abi3.so does not load under torch")
