"""What an evaluation found: a row for every pair, the means, files of both."""

import csv
import io
import json
import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttsr_fast.files import shown, write_bytes

_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # the last four are wide forms


class Row(NamedTuple):
    """What one pair gave.

    Attributes:
        name: that of the pair.
        psnr: in dB, inf for a result that is equal to the truth.
        ssim: at most 1.
        seconds: to enlarge the picture, without reading and comparing.
        references: names of the files that helped; "LR" for the low-resolution picture itself.
    """

    name: str
    psnr: float
    ssim: float
    seconds: float
    references: tuple[str, ...]


class Failure(NamedTuple):
    """A pair that was skipped, and why."""

    name: str
    message: str


@dataclass(frozen=True)
class Table:
    """What all pairs gave, in their order, and the mean of it.

    Attributes:
        method: "ttsr", "detail" or "bicubic".
        protocol: one of `metrics.PROTOCOLS`.
        references: one of `choices.REFERENCES`.
        rows: of the pairs that could be evaluated, at least one.
        failures: the others, which count for no mean.
    """

    method: str
    protocol: str
    references: str
    rows: list[Row]
    failures: list[Failure]

    @property
    def equal(self) -> int:
        """Results that are equal to the truth, whose PSNR is infinite."""
        return sum(row.psnr == math.inf for row in self.rows)

    @property
    def psnr(self) -> float:
        """The mean of all that is finite; inf if nothing is."""
        finite = [row.psnr for row in self.rows if row.psnr != math.inf]
        return math.fsum(finite) / len(finite) if finite else math.inf

    @property
    def ssim(self) -> float:
        return math.fsum(row.ssim for row in self.rows) / len(self.rows)

    @property
    def seconds(self) -> float:
        """The mean for one picture."""
        return math.fsum(row.seconds for row in self.rows) / len(self.rows)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        r"""Write a line for every pair and the mean as the last; the file appears whole or not.

        Names and messages are made harmless for spreadsheets: characters that are not printable are
        escaped (`\n`), and an apostrophe comes before a leading `=`, `+`, `-` or `@`, which would
        begin a formula. `to_json` keeps them as they are.

        Raises:
            OSError: it cannot be written.
        """
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow((*Row._fields, "error"))
        for row in self.rows:
            lines.writerow((_cell(row.name), *row[1:-1], _cell(" ".join(row.references)), ""))
        for failure in self.failures:
            lines.writerow((_cell(failure.name), "", "", "", "", _cell(failure.message)))
        lines.writerow(("mean", self.psnr, self.ssim, self.seconds, "", ""))
        write_bytes(path, text.getvalue().encode())

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the same as one object, an infinite PSNR as the string "inf".

        Raises:
            OSError: it cannot be written.
        """
        content = {
            "method": self.method,
            "protocol": self.protocol,
            "references": self.references,
            "psnr": _number(self.psnr),
            "ssim": self.ssim,
            "seconds": self.seconds,
            "equal": self.equal,
            "images": [row._replace(psnr=_number(row.psnr))._asdict() for row in self.rows],
            "failures": [failure._asdict() for failure in self.failures],
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        write_bytes(path, text.encode())


def _number(x: float) -> Any:
    return x if math.isfinite(x) else str(x)


def _cell(text: str) -> str:
    """A text that a spreadsheet shows: in one line, and with ' before what would be a formula."""
    text = shown(text)
    return f"'{text}" if text.startswith(_FORMULA) else text
