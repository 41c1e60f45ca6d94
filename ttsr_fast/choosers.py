"""The inverse of an index: which queries chose each key."""

import torch
from torch import Tensor


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
        row = torch.arange(0, rows, keys, dtype=torch.int32, device=device)[:, None]
        row = (row + self.index.reshape(groups, -1).int()).flatten()
        ordered, order = torch.sort(row, stable=True)
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return torch.searchsorted(ordered, ends, out_int32=True), order.int()
