"""Listings of machine code for NVIDIA GPUs: the instructions of a loop iteration.

The tools are part of Triton's wheel and need no GPU.
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
    """One instruction. `guarded`: it has a predicate."""

    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Target address of a branch, None for other instructions."""
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if self.name == "BRA" and found else None


def run(tool: str, *arguments: str | Path) -> str:
    """Output of cuobjdump or nvdisasm."""
    command = [TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(listing: str) -> list[Instruction]:
    """Instructions of one function."""
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
    """Instructions of an iteration in which no score improves.

    A branch then skips the code with the atomic maximum. Code with the maximum of the scores is
    not skipped, since it decides.
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
