"""The sizes that the search benchmarks run at."""

import argparse
import re
from dataclasses import dataclass

Grid = tuple[int, int]


@dataclass(frozen=True)
class Size:
    """A query grid, a key grid, and how many images of each are searched at once."""

    query: Grid
    key: Grid
    batch: int = 1

    @classmethod
    def parse(cls, text: str) -> "Size":
        """`HxW`, `HxW:HKxWK` where the grids differ, and `N*` before it for a batch of N."""
        match = re.fullmatch(r"(?:(\d+)\*)?(\d+)x(\d+)(?::(\d+)x(\d+))?", text)
        if match is None or any(n is not None and int(n) == 0 for n in match.groups()):
            raise argparse.ArgumentTypeError(
                f"must read 100x100, 100x100:108x96 or 9*40x40, got {text!r}"
            )
        n, h, w, hk, wk = (int(n) if n else 0 for n in match.groups())
        return cls((h, w), (hk, wk) if hk else (h, w), n or 1)

    @property
    def queries(self) -> int:
        """Query positions of an image."""
        return self.query[0] * self.query[1]

    @property
    def keys(self) -> int:
        """Key positions of an image."""
        return self.key[0] * self.key[1]

    @property
    def pairs(self) -> int:
        return self.batch * self.queries * self.keys
