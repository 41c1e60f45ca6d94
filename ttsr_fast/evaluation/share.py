"""Processes of torch.distributed that share the work of an evaluation, step by step."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Share:
    """This process among all that make the same call.

    After each step every process knows the outcome of all, so that none continues for long after an
    error in another.

    Args:
        together: False for a process on its own.
    """

    def __init__(self, together: bool) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if together and dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:  # gloo takes objects from the CPU, with every backend of the others
            self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def check_all_equal(self, step: Callable[[], object]) -> None:
        """Raise if `step` raises in a process, or does not return the same in all."""
        facts = self.run_on_all(step)
        if any(other != facts[0] for other in facts):
            raise ValueError("the processes must evaluate the same pairs in the same way")

    def run_on_all(self, step: Callable[[], T]) -> list[T]:
        """Results of `step` in all processes; an error in each if it raises in one."""
        if self.size == 1:
            return [step()]
        done: list[T] = []
        error: Exception | None = None
        try:
            done.append(step())
        except Exception as caught:  # any: the others wait
            error = caught
        outcomes: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, (done, repr(error)), group=self._group)
        except RuntimeError as lost:
            raise RuntimeError("a process of the group has ended, or does not answer") from (
                error or lost
            )
        if error is not None:
            raise error
        for rank, (result, message) in enumerate(outcomes):
            if not result:
                raise RuntimeError(f"process {rank} of the group raised {message}")
        return [result for (result,), _ in outcomes]
