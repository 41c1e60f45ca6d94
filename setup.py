"""Adds the kernels in C++ to the package; everything else is in pyproject.toml.

By default they become part of the package wherever torch and a compiler are at hand, and it is said
where they do not. TTSR_FAST_BUILD=cpu insists on them, TTSR_FAST_BUILD=none leaves them out.
"""

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = runpy.run_path("ttsr_fast/build.py")


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        BUILD["compile_library"](Path(self.get_ext_fullpath(ext.name)))


def extensions() -> list[Extension]:
    wanted = os.environ.get("TTSR_FAST_BUILD", "")
    if wanted not in ("", "none", "cpu", "cuda"):
        raise SystemExit(f"TTSR_FAST_BUILD must be cpu, cuda or none, got {wanted!r}")
    if wanted == "cuda":
        raise SystemExit("TTSR_FAST_BUILD=cuda: this version has no CUDA kernels")
    reason = "TTSR_FAST_BUILD=none" if wanted == "none" else BUILD["why_not"]()
    if reason is None:
        sources = [os.path.relpath(source) for source in BUILD["sources"]()]
        return [Extension("ttsr_fast._C", sources, py_limited_api=True)]
    if wanted == "cpu":
        raise SystemExit(f"TTSR_FAST_BUILD=cpu: the kernels cannot be compiled here: {reason}")
    print(f"ttsr-fast: building without the kernels in C++: {reason}")
    return []


setup(
    packages=["ttsr_fast", "ttsr_fast.model", "ttsr_fast.kernels", "ttsr_fast.csrc"],
    package_dir={"ttsr_fast.csrc": "csrc", "ttsr_fast.kernels": "kernels"},
    package_data={
        "ttsr_fast": ["py.typed"],
        "ttsr_fast.csrc": ["*.cpp", "*.h", "cpu/*.cpp", "cpu/*.h"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
