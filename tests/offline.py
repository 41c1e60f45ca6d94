"""Compiles the Triton kernels for a target that is not here and prints what came of it as JSON.

    python tests/offline.py sm_90 rolled

The search itself runs, on tensors without memory, with a driver that names the target and with
launches that only compile: what is compiled is what a GPU would be given. A process of its own,
because a target is for a process and a compiler may end it.
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
# Operands as they are named in tests: the dtype of the features and the precision.
OPERANDS = {
    "fp32": (torch.float32, "fp32"),
    "tf32": (torch.float32, "tf32"),
    "fp16x3": (torch.float32, "fp16x3"),
    "fp16": (torch.float32, "fp16"),
    "bf16": (torch.float32, "bf16"),
    "float16": (torch.float16, "fp16"),
    "bfloat16": (torch.bfloat16, "bf16"),
}
# Images, query size, images of the key, key size: no two of them are to need kernels of their own.
SIZES = [
    (1, (20, 30), 1, (33, 47)),
    (2, (33, 47), 2, (64, 64)),
    (3, (64, 64), 1, (20, 30)),
    (1, (16, 1), 1, (1, 17)),
]


@dataclass(frozen=True)
class Case:
    """What kernels may be compiled anew for; images and their sizes are not among it."""

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
    """As much of a driver as a compiler asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Compiled:
    """The kernels compiled so far, each with its number, and those of the latest launches."""

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
    """All operands, tiles, channels and layouts; or what else a caller may ask for."""
    # Of the operands that are stored in one, two and three parts, one each.
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
    """One search for each of `SIZES` if the case is to sweep, else for the first."""
    from ttsr_fast.kernels import search as kernels
    from ttsr_fast.kernels import tile_configs

    padding = case.kernel_size // 2
    tile = tile_configs.SAFE[algorithm] if case.tile == "safe" else None
    for n, size, n_k, size_k in SIZES if case.sweep else SIZES[:1]:
        mask = torch.ones(n_k, *size_k, dtype=torch.bool) if case.masked else None
        score = torch.zeros(n, *size)
        index = torch.zeros(n, *size, dtype=torch.int64)
        kernels.search(
            features(case, n, size),
            features(case, n_k, size_k),
            mask,
            score,
            index,
            case.kernel_size,
            padding,
            case.normalize,
            1e-12,
            case.add_eps,
            OPERANDS[case.operands][1],
            algorithm=algorithm,
            tile=tile,
        )


def compile_case(algorithm: str, case: Case, compiled: Compiled) -> dict[str, Any]:
    """The case, its tile and the numbers of its kernels, or how the compiler failed."""
    from ttsr_fast.kernels import precision, tile_configs

    sys.stderr.write(
        f"compiling {algorithm} for {case}\n"
    )  # the last word, if the compiler ends us
    dtype = precision.precision_for(*OPERANDS[case.operands]).name
    tile = (
        tile_configs.SAFE[algorithm]
        if case.tile == "safe"
        else tile_configs.select(algorithm, dtype)
    )
    record = {**vars(case), "dtype": dtype, "sizes": vars(tile), "error": None}
    compiled.launched = set()
    try:
        search(algorithm, case)
    except Exception as error:
        text = str(error).strip() or "no message"
        record["error"] = f"{type(error).__name__}: {text.splitlines()[-1][:300]}"
    return {**record, "kernels": sorted(compiled.launched)}


def describe(name: str, kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes, as far as its code shows it.

    `local` is memory of a thread's own, in bytes: that is where registers are spilled to.
    `products` are the tensor instructions, by their first words.
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
    # Whatever is spilled lies in the stack frame, or else in LOCAL.
    facts["local"] = numbers(r"STACK:(\d+)", usage) + numbers(r"LOCAL:(\d+)", usage)
    facts["spilled"] = facts["local"]
    facts["spilled_scalars"] = 0
    facts["registers"] = numbers(r"REG:(\d+)", usage)
    facts["products"] = sorted(set(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)\b", text)))
    if "wgmma" in facts["products"] or name == "slab_search_kernel":
        facts["loops"] = loops(kernel.asm["cubin"])
    return {**facts, "copies_blocks": "cp.async.bulk.tensor" in text}


def numbers(pattern: str, text: str) -> int:
    """The largest of the numbers found; there has to be one."""
    return max(int(number) for number in re.findall(pattern, text))


def disassembled(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return sass.run("cuobjdump", option, file.name)


def loops(cubin: bytes) -> dict[str, int]:
    """Instructions that a thread runs in a turn of the loop over rows or tiles of keys, without the
    inner loop, and in a turn of the inner loop, if the kernel multiplies."""
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
