"""The index of a match: range check, and inverse in compressed sparse rows (CSR)."""

import os

import torch
from torch import Tensor

CHECK_INDEX_VARIABLE = "TTSR_FAST_CHECK_INDEX"


def checks_index() -> bool:
    """True if work on a GPU stops at an index outside the key grid."""
    return os.environ.get(CHECK_INDEX_VARIABLE, "1") != "0"


def check_index(index: Tensor, keys: int, where: str = "") -> None:
    """Stop at an index outside a grid of `keys` positions.

    Args:
        index: int64, any shape.
        keys: positions of the key grid.
        where: description of the grid, for the message.

    Raises:
        ValueError: on the CPU. CUDA stops with an assertion, without synchronising the device.
    """
    if index.numel() == 0:
        return
    if index.device.type == "cpu":
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= keys:
            raise ValueError(f"index must lie in [0, {keys}){where}, got {low} to {high}")
    elif index.is_cuda and checks_index():
        torch._assert_async(((index >= 0) & (index < keys)).all())


def at_index(
    x: Tensor,  # [N or 1, 1, HKo, WKo] or [N or 1, HKo, WKo]
    index: Tensor,  # [N, Ho, Wo]
) -> Tensor:  # [N, Ho, Wo]
    """The number of the key patch at every index."""
    flat = x.flatten(1).expand(index.shape[0], -1)
    return flat.gather(1, index.flatten(1)).view_as(index)


class InverseIndex:
    """The queries of every key, sorted once for all sums over them.

    Attributes:
        index: `[N, Ho, Wo]`, the key of every query.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self._csr: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def csr(self, keys: int, groups: int) -> tuple[Tensor, Tensor]:
        """Offsets and indices: row r = g * keys + i lists the queries of key i in group g.

        Args:
            keys: positions of the key grid.
            groups: N, or 1 if all images share the keys.

        Returns:
            `csr_offsets` `[groups * keys + 1]` and `csr_indices` `[N * Ho * Wo]`, both int32. Row r
            is `csr_indices[csr_offsets[r]:csr_offsets[r + 1]]`: positions in the flattened index,
            ascending. The sort is stable, so both are the same every time; nothing synchronises.

        Raises:
            ValueError: 2**31 queries or keys, or more.
        """
        if (keys, groups) not in self._csr:
            self._csr[keys, groups] = self._sort(keys, groups)
        return self._csr[keys, groups]

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
