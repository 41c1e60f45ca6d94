"""The index of a match: its check, and its inverse: which queries chose each key."""

import os

import torch
from torch import Tensor

CHECK_INDEX_VARIABLE = "TTSR_FAST_CHECK_INDEX"


def checks_index() -> bool:
    """Whether work on a GPU stops at an index outside the key grid."""
    return os.environ.get(CHECK_INDEX_VARIABLE, "1") != "0"


def check_index(index: Tensor, keys: int) -> None:
    """Stop where an index is outside a grid of so many keys.

    Raises:
        ValueError: on the CPU. CUDA stops with an assertion, without synchronising the device.
    """
    if index.numel() == 0:
        return
    if index.device.type == "cpu":
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= keys:
            raise ValueError(f"index must lie in [0, {keys}), got {low} to {high}")
    elif index.is_cuda and checks_index():
        torch._assert_async(((index >= 0) & (index < keys)).all())


class Choosers:
    """The queries that chose each key, sorted out once for all who sum over them.

    Attributes:
        index: `[N, Ho, Wo]`, the key of every query.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self._sorted: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, keys: int, groups: int) -> tuple[Tensor, Tensor]:
        """Compressed rows: key i of group g was chosen by `order[begin[r]:begin[r + 1]]`.

        Args:
            keys: positions of the key grid.
            groups: N, or 1 to let all images choose among the same keys.

        Returns:
            `begin` `[groups * keys + 1]` with r = g * keys + i, and `order` `[N * Ho * Wo]`, both
            int32: positions in the flattened index, ascending for each key. The sort is stable, so
            both are the same every time; nothing waits for the device.

        Raises:
            ValueError: 2**31 queries or keys, or more.
        """
        if (keys, groups) not in self._sorted:
            self._sorted[keys, groups] = self._sort(keys, groups)
        return self._sorted[keys, groups]

    def _sort(self, keys: int, groups: int) -> tuple[Tensor, Tensor]:
        rows, device = groups * keys, self.index.device
        if max(self.index.numel(), rows) >= 2**31:
            raise ValueError(
                f"index and key grid must have less than 2**31 positions in all, got "
                f"{self.index.numel()} and {rows}"
            )
        check_index(self.index, keys)
        row = torch.arange(0, rows, keys, dtype=torch.int32, device=device)[:, None]
        row = (row + self.index.reshape(groups, -1).int()).flatten()
        ordered, order = torch.sort(row, stable=True)
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return torch.searchsorted(ordered, ends, out_int32=True), order.int()
