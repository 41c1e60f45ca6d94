"""What MkDocs does for the user guide beside Markdown: tables of measurements, and formulas.

`<!-- results: KIND -->` on a line of its own becomes the tables and plots of `bench/results`. TeX
becomes MathML, which browsers draw by themselves: pages need no script, no font and no network.
"""

import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))  # as for its scripts

import report

KINDS = ("search", "transfer", "model", "highres")
IMAGES = Path(__file__).resolve().parent / "images"
RESULTS = Path(report.__file__).resolve().parent / "results"

_UNIT = re.compile(r"(?<=\d) (?=(?:[µm]?s|[kMG]B?|[GT]FLOP/s|GB/s)\b)")
_RESULTS = re.compile(r"^<!-- results: (\w+) -->$", re.MULTILINE)
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL
)
_ROLE = re.compile(r":math:`([^`]*)`")
_POWER = re.compile(r"\b(\d+)\*\*(-?\d+)(?![\d`])")
_DIRECTIVE = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n?)+)", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _RESULTS.sub(lambda match: results(match[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    return _FORMULA.sub(lambda match: mathml(match[2], match[1] == "div"), html)


def results(kind: str) -> str:
    """Markdown of every result file of that kind, those of a CPU first.

    Raises:
        ValueError: no benchmark writes results of that kind.
    """
    if kind not in KINDS:
        raise ValueError(f"results must be of one of {KINDS}, got {kind!r}")
    files = [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    found = [
        (path, data)
        for path, whole in files
        for data in (whole, *whole.get("results", {}).values())  # of gpu_check.py, by step
        if data.get("kind") == kind
    ]
    if not found:
        return "Nothing has been measured yet.\n"
    parts = []
    for path, data in sorted(found, key=lambda pair: report.is_gpu(pair[1])):
        if (IMAGES / f"{path.stem}.png").is_file():
            parts.append(f"![Plot of {path.name}](images/{path.stem}.png)\n")
        parts.append(_UNIT.sub("\N{NO-BREAK SPACE}", report.markdown(data)))
    if not any(report.is_gpu(data) for _, data in found):
        parts.append("No GPU has been measured yet.\n")
    return "\n".join(parts)


def mathml(tex: str, block: bool) -> str:
    """A formula as browsers draw it; `tex` as it stands in HTML.

    Raises:
        ValueError: it has a command that is not known.
    """
    tex = re.sub(r"\\Big\b", "", unescape(tex).strip())  # brackets grow by themselves
    tex = re.sub(r"\\arg\b", r"\\text{arg}\\,", tex)
    formula = convert(tex, display="block" if block else "inline")
    unknown = re.search(r"\\\w+", formula)
    if unknown:
        raise ValueError(f"formula must use commands that latex2mathml knows, got {unknown[0]}")
    return formula


def dollars(docstring: str) -> str:
    """A docstring whose formulas, and powers of numbers, are written as in Markdown."""
    block = _DIRECTIVE.sub(lambda m: f"{m[1]}$$\n{m[2].rstrip()}\n{m[1]}$$\n", docstring)
    return _POWER.sub(r"$\1^{\2}$", _ROLE.sub(r"$\1$", block))


class Formulas(griffe.Extension):
    """Applies `dollars` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = dollars(obj.docstring.value)
