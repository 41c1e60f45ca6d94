"""Table of an evaluation: a row for every pair, the means, CSV and JSON files."""

import csv
import io
import json
import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttsr_fast.files import shown, write_bytes

_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # the last four are full-width forms


class Row(NamedTuple):
    """Result of one pair.

    Attributes:
        name: of the pair.
        psnr: in dB, inf for a result that equals the truth.
        ssim: at most 1.
        seconds: time of the upscaling, without reading and comparing.
        references: names of the reference files; "LR" for the low-resolution image itself.
    """

    name: str
    psnr: float
    ssim: float
    seconds: float
    references: tuple[str, ...]


class Failure(NamedTuple):
    """A pair that was skipped, and the reason."""

    name: str
    message: str


@dataclass(frozen=True)
class Table:
    """Results of all pairs, in their order, and their means.

    Attributes:
        method: "ttsr", "detail" or "bicubic".
        protocol: one of `metrics.PROTOCOLS`.
        references: one of `choices.REFERENCES`.
        rows: of the evaluated pairs, at least one.
        failures: the other pairs, which no mean includes.
    """

    method: str
    protocol: str
    references: str
    rows: list[Row]
    failures: list[Failure]

    @property
    def equal(self) -> int:
        """Number of results that equal the truth, with infinite PSNR."""
        return sum(row.psnr == math.inf for row in self.rows)

    @property
    def psnr(self) -> float:
        """Mean of all finite values; inf without any."""
        finite = [row.psnr for row in self.rows if row.psnr != math.inf]
        return math.fsum(finite) / len(finite) if finite else math.inf

    @property
    def ssim(self) -> float:
        return math.fsum(row.ssim for row in self.rows) / len(self.rows)

    @property
    def seconds(self) -> float:
        """Mean for one image."""
        return math.fsum(row.seconds for row in self.rows) / len(self.rows)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        r"""Write a line for every pair, then the mean; the file appears whole or not at all.

        Names and messages are made harmless for spreadsheets: characters that are not printable are
        escaped (`\n`), and an apostrophe precedes a leading `=`, `+`, `-` or `@`, which would begin
        a formula. `to_json` does not change them.

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
        """Write the table as one object, with an infinite PSNR as the string "inf".

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
    """Text of a cell: one line, with ' in front of a formula."""
    text = shown(text)
    return f"'{text}" if text.startswith(_FORMULA) else text
