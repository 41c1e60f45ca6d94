"""The processes of a torch.distributed group in one call: agreement and reductions.

No process waits in vain: before anything large is reduced, every process has reported success or
failure of its own share, and a checksum of its arguments.
"""

import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ttsr_fast.devices import gpu

TIMEOUT = 30.0  # seconds
LONGEST_TIMEOUT = 1e6

_FACTS = 8  # that processes compare, at most

T = TypeVar("T")


def rank_and_size(group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """Rank of this process in the group, by default of all processes, and the size of that.

    Raises:
        RuntimeError: there is no group, or this process is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "there is no group of processes: start the program by "
            "`torchrun --nproc-per-node 2 program.py` and let it begin with "
            'torch.distributed.init_process_group("gloo"), on GPUs ("nccl")'
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise RuntimeError("this process is not in the group that was passed")
    return rank, dist.get_world_size(group)


class Ranks:
    """The processes of a group in one call of `operation`."""

    def __init__(self, operation: str, group: "dist.ProcessGroup | None", timeout: float) -> None:
        self.rank, self.size = rank_and_size(group)
        self.operation = operation
        whole = dist.group.WORLD if group is None else group
        assert whole is not None  # or `rank_and_size` has raised
        self.group = whole
        self.legal = isinstance(timeout, int | float) and 0 < timeout <= LONGEST_TIMEOUT
        self.timeout = timeout
        kinds = dist.get_backend_config(self.group)  # such as "cpu:gloo,cuda:nccl"
        self.device = "cpu" if "cpu:" in kinds else kinds.split(":")[0]

    def check_all_equal(self, step: Callable[[], dict[str, str]]) -> None:
        """Run `step`, and raise in every process if it raises in one.

        What it returns has to be the same in all, and is compared by name.
        """
        start, error, facts = time.monotonic(), None, {}
        try:
            if not self.legal:
                raise ValueError(
                    f"timeout must be a number of seconds above 0 and up to {LONGEST_TIMEOUT:.0f}, "
                    f"got {self.timeout!r}"
                )
            facts = step()
        except Exception as caught:  # any: the others wait
            error = caught
        facts = {"the operation": self.operation, **facts}
        digests = [zlib.crc32(text.encode()) for text in facts.values()]
        digests += [0] * (_FACTS - len(digests))
        failed = 0 if error is None else self.rank + 1
        row = torch.tensor([failed, *digests, *(-x for x in digests)], device=self.device)
        try:
            self.reduce(row, "MAX", spent=time.monotonic() - start)
        finally:
            if error is not None:
                raise error
        failed, *digests = row.tolist()
        if failed:
            raise RuntimeError(
                f"{self.operation}: process {failed - 1} of the group raised an error, which it "
                f"reports itself"
            )
        for name, high, low in zip(facts, digests[:_FACTS], digests[_FACTS:], strict=False):
            if high != -low:
                raise ValueError(
                    f"{self.operation}: the processes of the group must agree on {name}, which "
                    f"is {facts[name]} in process {self.rank}"
                )

    def run_on_all(self, step: Callable[[], T]) -> T:
        """The result of `step`, or an error in every process if it raises in one."""
        done: list[T] = []

        def run() -> dict[str, str]:
            done.append(step())
            kind = gpu()
            if kind is not None:  # so that what it took is known, and its errors
                torch.get_device_module(kind).synchronize()
            return {}

        self.check_all_equal(run)
        return done[0]

    def reduce(self, x: Tensor, operation: str, spent: float = 0.0) -> Tensor:
        """`x`, reduced in place.

        Waits for the others as long as this process has `spent` on its share, and `timeout`.
        """
        if x.numel() == 0:
            return x
        limit = timedelta(seconds=(self.timeout if self.legal else TIMEOUT) + spent)
        options = dist.AllreduceOptions()
        options.reduceOp = getattr(dist.ReduceOp, operation)
        if x.device.type == "cpu":
            options.timeout = limit  # gloo gives up, or this process could not end after it has
        try:
            self.group.allreduce([x], options).wait(limit)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.operation}: a process of the group has ended, or did not answer process "
                f"{self.rank} of {self.size} in {limit.total_seconds():.0f} s; its own output may "
                f"say why. The group is lost"
            ) from error
        return x
