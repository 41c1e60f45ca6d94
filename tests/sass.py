"""Reads listings of machine code for NVIDIA GPUs: which instructions a loop runs in a turn.

The tools are those of Triton's wheel, which need no GPU.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
ATOMICS = {"RED", "REDG", "ATOM", "ATOMG"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, whether a predicate guards it, its name, its operands."""

    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes, None for another instruction."""
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if self.name == "BRA" and found else None


def run(tool: str, *arguments: str | Path) -> str:
    """What cuobjdump or nvdisasm prints."""
    command = [TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(listing: str) -> list[Instruction]:
    """Of one function."""
    return [
        Instruction(int(address, 16), bool(guard), name, operands)
        for address, guard, name, operands in INSTRUCTION.findall(listing)
    ]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The body of every loop, inner loops included."""
    return [
        [x for x in code if branch.target <= x.address <= branch.address]
        for branch in code
        if branch.target is not None and branch.target < branch.address
    ]


def usual_path(body: list[Instruction]) -> list[Instruction]:
    """What a loop runs where no score improves on the best.

    That is all but what a branch skips then: it has the atomic maximum and not the maximum of the
    scores, which decides.
    """
    path, end = [], 0
    for x in body:
        if x.address < end:
            continue
        path.append(x)
        if x.guarded and x.target is not None and x.address < x.target <= body[-1].address:
            skipped = {y.name.split(".")[0] for y in body if x.address < y.address < x.target}
            if skipped & ATOMICS and "FMNMX" not in skipped:
                end = x.target
    return path
