"""Lines of `env`: versions, devices, backends, and reasons where a backend does not run."""

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

import ttsr_fast
from ttsr_fast.choices import BACKENDS
from ttsr_fast.devices import gpu
from ttsr_fast.operators import backends, library

# Packages of the extras of pyproject.toml.
EXTRAS = {
    "cli": ("imagecodecs", "pillow", "rich", "safetensors", "tifffile", "typer"),
    "train": ("accelerate", "omegaconf", "pillow", "safetensors", "scikit-image", "tensorboard"),
    "bench": ("matplotlib", "pytest-benchmark", "scikit-image"),
    "baselines": ("faiss-cpu", "pykeops"),
}


def describe() -> Iterator[tuple[str, str]]:
    """Names and values of the lines."""
    yield "ttsr-fast", ttsr_fast.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "devices", ", ".join(devices())
    yield "cpu capability", torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield f"cuda:{number}", torch.cuda.get_device_name(number)
    for backend in BACKENDS:
        for kind in dict.fromkeys(device.partition(":")[0] for device in devices()):
            reason = backends.why_not(backend, torch.device(kind))
            if reason is not None:
                verdict = f"no: {reason}"
            elif (backend, kind) == ("cpp", "cpu"):
                verdict = f"runs, {library.instruction_set()}"
            else:
                verdict = "runs"
            yield f"{backend} on {kind}", verdict
    reason = library.load_cuda_library()
    if reason is None:
        yield "cuda library", f"loaded, CUDA {library.cuda_library_version()}"
    else:
        yield "cuda library", f"no: {reason}"
    for extra, names in EXTRAS.items():
        yield f"extra {extra}", ", ".join(f"{name} {_version(name)}" for name in names)


def devices() -> list[str]:
    """Devices of tensors: the CPU, and every GPU that torch supports."""
    kind = gpu()
    if kind is None:
        return ["cpu"]
    return ["cpu", *(f"{kind}:{n}" for n in range(torch.get_device_module(kind).device_count()))]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
