"""Installation with compiled kernels; everything else is in pyproject.toml.

By default the kernels in C++ are included where torch and a compiler are found, and the kernels in
CUDA where that torch has CUDA and nvcc is found. Without them, or if compiling fails, the package
works in plain PyTorch and warns at its first use. TTSR_FAST_BUILD=cpu requires C++ alone,
TTSR_FAST_BUILD=cuda both with any torch. TTSR_FAST_BUILD=none leaves both out.
"""

import os
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

BUILD = runpy.run_path("ttsr_fast/operators/build.py")
LANGUAGES = {"ttsr_fast._C": "C++", "ttsr_fast._C_cuda": "CUDA"}


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.unlink(missing_ok=True)  # no library of an earlier build if this one fails
        try:
            BUILD["compile_library"](library, cuda=LANGUAGES[ext.name] == "CUDA")
        except (RuntimeError, OSError) as error:
            raise CompileError(str(error)) from error  # an optional one is left out


def extensions() -> list[Extension]:
    wanted = os.environ.get("TTSR_FAST_BUILD", "")
    if wanted not in ("", "none", "cpu", "cuda"):
        raise SystemExit(f"TTSR_FAST_BUILD must be cpu, cuda or none, got {wanted!r}")
    found = []
    for name, language in LANGUAGES.items():
        reason = why_left_out(language, wanted)
        if reason is None:
            sources = BUILD["sources"](cuda=language == "CUDA")
            paths = list(map(os.path.relpath, sources))
            found.append(Extension(name, paths, py_limited_api=True, optional=not wanted))
        else:
            print(f"ttsr-fast: building without the kernels in {language}: {reason}")
    return found


def why_left_out(language: str, wanted: str) -> str | None:
    if wanted == "none" or (wanted, language) == ("cpu", "CUDA"):
        return f"TTSR_FAST_BUILD={wanted}"
    reason = BUILD["why_not"](cuda=language == "CUDA")
    if reason is not None and wanted:
        kernels = f"the kernels in {language}"
        raise SystemExit(f"TTSR_FAST_BUILD={wanted}: {kernels} cannot be compiled here: {reason}")
    if reason is None and language == "CUDA" and not wanted:
        torch = BUILD["find_torch"]()
        return None if torch.cuda else f"torch {torch.version} is a build without CUDA"
    return reason


setup(
    packages=[
        *find_packages(include=["ttsr_fast", "ttsr_fast.*"]),
        "ttsr_fast.kernels",
        "ttsr_fast.csrc",
    ],
    package_dir={"ttsr_fast.csrc": "csrc", "ttsr_fast.kernels": "kernels"},
    package_data={
        "ttsr_fast": ["py.typed"],
        "ttsr_fast.training": ["presets/*.yaml"],
        "ttsr_fast.csrc": ["*.cpp", "*.h", "*/*.cpp", "*/*.h", "*/*.cu"],
    },
    exclude_package_data={"ttsr_fast.csrc": ["*.md"]},  # for developers
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
