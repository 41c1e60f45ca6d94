"""Offline compilation of the Triton kernels for any target, with a report as JSON.

    python tests/offline.py sm_90 rolled

The search runs on tensors without memory. The driver names the target, and launches only compile,
so the report is about the code of a real GPU. It needs a process of its own: a target is global,
and a compiler may end the process.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

if __name__ == "__main__":
    import sass  # beside this file
else:
    from tests import sass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Dtype of the features and precision, by the name of a test.
OPERANDS = {
    "fp32": (torch.float32, "fp32"),
    "tf32": (torch.float32, "tf32"),
    "fp16x3": (torch.float32, "fp16x3"),
    "fp16": (torch.float32, "fp16"),
    "bf16": (torch.float32, "bf16"),
    "float16": (torch.float16, "fp16"),
    "bfloat16": (torch.bfloat16, "bf16"),
}
# Images, query size, images of the key, key size; all share their kernels.
SIZES = [
    (1, (20, 30), 1, (33, 47)),
    (2, (33, 47), 2, (64, 64)),
    (3, (64, 64), 1, (20, 30)),
    (1, (16, 1), 1, (1, 17)),
]


@dataclass(frozen=True)
class Case:
    """Options with kernels of their own; the number and size of images are not among them."""

    operands: str
    tile: str = "table"  # or "safe"
    channels: int = 256
    channels_last: bool = False
    masked: bool = False
    kernel_size: int = 3
    normalize: str = "both"
    add_eps: bool = False
    sweep: bool = False  # through all sizes


class Driver:
    """The part of a driver that a compiler uses."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Compiled:
    """All compiled kernels by number, and the kernels of the latest launches."""

    def __init__(self) -> None:
        self.kernels: list[Any] = []  # kept, so that no two have the same identity
        self.names: list[str] = []
        self.launched: set[int] = set()
        launch = JITFunction.run

        def compile_only(function: Any, *args: Any, **kwargs: Any) -> Any:
            kernel = launch(function, *args, **{**kwargs, "warmup": True})
            self.launched.add(self._number(kernel, function.__name__))
            return kernel

        JITFunction.run = compile_only

    def _number(self, kernel: Any, name: str) -> int:
        for number, known in enumerate(self.kernels):
            if known is kernel:
                return number
        self.kernels.append(kernel)
        self.names.append(name)
        return len(self.kernels) - 1


def cases(algorithm: str, options: bool) -> Iterator[Case]:
    """All operands, tiles, channels and layouts; or all other options."""
    # One each of the operands in one, two and three parts.
    for operands in ("fp32", "fp16x3", "bf16") if options else OPERANDS:
        case = Case(operands)
        if not options:
            yield replace(case, sweep=True)
            yield replace(case, sweep=True, channels_last=True)
            yield replace(case, tile="safe")
            yield replace(case, channels=64)
            continue
        sizes = (1, 3, 5, 7) if algorithm == "direct" else (3,)
        for kernel_size in sizes:
            for masked in (False, True):
                yield replace(case, kernel_size=kernel_size, masked=masked)
        yield replace(case, normalize="none")
        yield replace(case, channels=3, masked=True, add_eps=True)


def features(case: Case, n: int, size: tuple[int, int]) -> Tensor:  # [n, case.channels, *size]
    dtype = OPERANDS[case.operands][0]
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return torch.zeros(n, case.channels, *size, dtype=dtype).to(memory_format=layout)


def search(algorithm: str, case: Case) -> None:
    """Search for all `SIZES` in a sweep, else for the first."""
    from ttsr_fast.kernels import search as kernels
    from ttsr_fast.kernels import tile_configs
    from ttsr_fast.operators.patch import Patch, Score

    tile = tile_configs.SAFE[algorithm] if case.tile == "safe" else None
    for n, size, n_k, size_k in SIZES if case.sweep else SIZES[:1]:
        mask = torch.ones(n_k, *size_k, dtype=torch.bool) if case.masked else None
        launches = kernels.stages(
            features(case, n, size),
            features(case, n_k, size_k),
            mask,
            (torch.zeros(n, *size), torch.zeros(n, *size, dtype=torch.int64)),
            Patch(case.kernel_size, case.kernel_size // 2),
            Score(case.normalize, 1e-12, case.add_eps),
            kernels.Plan(OPERANDS[case.operands][1], algorithm, tile),
        )
        for launch in launches.values():
            launch()


def compile_case(algorithm: str, case: Case, compiled: Compiled) -> dict[str, Any]:
    """Case, tile and numbers of the kernels, or the error of the compiler."""
    from ttsr_fast.kernels import precision, tile_configs

    # The last message if the compiler ends the process.
    sys.stderr.write(f"compiling {algorithm} for {case}\n")
    dtype = precision.precision_for(*OPERANDS[case.operands]).name
    safe = case.tile == "safe"
    tile = tile_configs.SAFE[algorithm] if safe else tile_configs.select(algorithm, dtype)
    record = {**vars(case), "dtype": dtype, "sizes": vars(tile), "error": None}
    compiled.launched = set()
    try:
        search(algorithm, case)
    except Exception as error:
        text = str(error).strip() or "no message"
        record["error"] = f"{type(error).__name__}: {text.splitlines()[-1][:300]}"
    return {**record, "kernels": sorted(compiled.launched)}


def describe(name: str, kernel: Any) -> dict[str, Any]:
    """Resources of a compiled kernel, from its code.

    `local` is the memory of a thread in bytes, for spilled registers. `products` are the names of
    the tensor instructions.
    """
    facts = {
        "name": name,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor_columns": getattr(kernel.metadata, "tmem_size", None) or 0,
    }
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        facts["local"] = numbers(r"\.private_segment_fixed_size:\s+(\d+)", text)
        facts["spilled"] = numbers(r"\.vgpr_spill_count:\s+(\d+)", text)
        facts["spilled_scalars"] = numbers(r"\.sgpr_spill_count:\s+(\d+)", text)
        facts["registers"] = numbers(r"\.vgpr_count:\s+(\d+)", text)
        facts["products"] = sorted(set(re.findall(r"\bv_s?mfmac?_\w+", text)))
        return {**facts, "copies_blocks": False}
    usage = disassembled(kernel.asm["cubin"], "-res-usage")
    text = kernel.asm["ptx"]
    # Spilled registers are in the stack frame or in LOCAL.
    facts["local"] = numbers(r"STACK:(\d+)", usage) + numbers(r"LOCAL:(\d+)", usage)
    facts["spilled"] = facts["local"]
    facts["spilled_scalars"] = 0
    facts["registers"] = numbers(r"REG:(\d+)", usage)
    facts["products"] = sorted(set(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)\b", text)))
    if "wgmma" in facts["products"] or name == "slab_search_kernel":
        facts["loops"] = loops(kernel.asm["cubin"])
    return {**facts, "copies_blocks": "cp.async.bulk.tensor" in text}


def numbers(pattern: str, text: str) -> int:
    """Largest number found, at least one."""
    return max(int(number) for number in re.findall(pattern, text))


def disassembled(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return sass.run("cuobjdump", option, file.name)


def loops(cubin: bytes) -> dict[str, int]:
    """Instructions of a thread per turn of the loop over rows or tiles of keys, without the inner
    loop, and per turn of the inner loop if the kernel multiplies."""
    code = sass.instructions(disassembled(cubin, "-sass"))
    bodies = [body for body in sass.loops(code) if len(body) > 20]
    inner = [body for body in bodies if any(x.name.startswith("HGMMA") for x in body)]
    inner_length = min(map(len, inner), default=0)
    paths = [sass.usual_path(body) for body in bodies]
    outer = max((len(x) for x in paths if any(y.name == "FMNMX" for y in x)), default=0)
    return {"outer": outer - inner_length, "inner": inner_length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("algorithm", choices=("slab", "rolled", "direct"))
    parser.add_argument("--options", action="store_true", help="masks, sizes of patches, ...")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("with TRITON_INTERPRET set there is no compiler")
    torch.set_default_device("meta")
    triton.runtime.driver.set_active(Driver(TARGETS[args.target]))
    compiled = Compiled()
    records = [
        compile_case(args.algorithm, case, compiled) for case in cases(args.algorithm, args.options)
    ]
    from ttsr_fast.kernels import tile_configs

    document = {
        "triton": triton.__version__,
        "table": [[list(key), vars(tile)] for key, tile in tile_configs.TABLE.items()],
        "cases": records,
        "kernels": list(map(describe, compiled.names, compiled.kernels)),
    }
    json.dump(document, sys.stdout)


if __name__ == "__main__":
    main()
