"""MkDocs hooks of the user guide: tables of measurements, tables of names, and formulas.

- `<!-- results: KIND -->` on a line of its own becomes the tables and plots of `bench/results`.
- `<!-- names -->` becomes a table of the objects that the page documents.
- TeX becomes SVG: a page needs no script, no font and no network.
"""

import functools
import json
import re
import sys
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path
from typing import Any

import griffe
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import text_to_path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))  # as for its scripts

import report

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("search", "transfer", "model", "highres")
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "bench" / "results"

_UNIT = re.compile(r"(?<=\d) (?=(?:[µm]?s|[kMG]B?|[GT]FLOP/s|GB/s)\b)")
_EXPONENT = re.compile(r"(?<=\de)-(?=\d)")
_RESULTS = re.compile(r"^<!-- results: (\w+) -->$", re.MULTILINE)
_PACKAGE = "ttsr_fast."
_NAMES = "<!-- names -->"
_DOCUMENTED = re.compile(r"^::: (\S+)", re.MULTILINE)
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL
)
_ROLE = re.compile(r":math:`([^`]*)`")
_POWER = re.compile(r"\b(\d+)\*\*(-?\d+)(?![\d`])")
_DIRECTIVE = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n?)+)", re.MULTILINE)
_EM = 100  # units of an SVG
_COMMANDS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    if page is not None and len(_RESULTS.findall(markdown)) > 1:
        page.meta["hide"] = ["toc"]  # wide tables take its column
    markdown = _RESULTS.sub(lambda match: results(match[1]), markdown)
    if _NAMES in markdown:
        markdown = markdown.replace(_NAMES, names(_DOCUMENTED.findall(markdown)))
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    return _FORMULA.sub(lambda match: formula(match[2], match[1] == "div"), html)


def results(kind: str) -> str:
    """Markdown of every result file of one kind, CPUs first.

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
        text = _UNIT.sub("\N{NO-BREAK SPACE}", report.markdown(data))
        parts.append(_EXPONENT.sub("\N{NON-BREAKING HYPHEN}", text))
    if not any(report.is_gpu(data) for _, data in found):
        parts.append("No GPU has been measured yet.\n")
    return "\n".join(parts)


def names(paths: list[str]) -> str:
    """Markdown table: each documented object, or public member of a module, and its first line."""
    table = ["| name | summary |", "| --- | --- |"]
    for path, found in _objects(paths):
        name = path.removeprefix(_PACKAGE).replace(".", ".<wbr>")
        table.append(f"| [<code>{name}</code>][{path}] | {_first_line(found)} |")
    return "\n".join(table)


def _objects(paths: list[str]) -> Iterator[tuple[str, griffe.Object | griffe.Alias]]:
    for path in paths:
        found = _package()[path.removeprefix(_PACKAGE)]
        if not found.is_module:
            yield path, found
            continue
        for name, member in found.members.items():
            exported = name in found.exports if found.exports else not member.is_alias
            shown = member.is_public and member.has_docstring
            if exported and shown and (member.is_function or member.is_class):
                yield f"{path}.{name}", member


@functools.cache
def _package() -> griffe.Object | griffe.Alias:
    return griffe.load("ttsr_fast", search_paths=[ROOT], resolve_aliases=True)


def _first_line(found: griffe.Object | griffe.Alias) -> str:
    """First paragraph of the docstring.

    Raises:
        ValueError: there is none.
    """
    if found.docstring is None:
        raise ValueError(f"{found.path} must have a docstring")
    return dollars(" ".join(found.docstring.value.split("\n\n")[0].split()))


def formula(tex: str, block: bool) -> str:
    """SVG of a formula; `tex` as it stands in HTML.

    Raises:
        ValueError: Matplotlib does not know a command.
    """
    tex = " ".join(unescape(tex).split())
    math = tex.replace(r"\Big\l", r"\left\l").replace(r"\Big\r", r"\right\r")
    math = f"${math}$".replace(r"\frac", r"\dfrac" if block else r"\frac")
    font = FontProperties(size=_EM, math_fontfamily="dejavusans")  # as sans-serif as the page
    try:
        width, height, depth = text_to_path.get_text_width_height_descent(math, font, True)
    except ValueError as error:
        raise ValueError(f"formula must be known to Matplotlib, got {tex}") from error
    outline = Outline(*text_to_path.get_text_path(font, math, True))
    steps = (
        _COMMANDS[code] + " ".join(f"{n * (-1) ** i:.0f}" for i, n in enumerate(numbers))
        for numbers, code in outline.iter_segments(simplify=False)
        if code != Outline.CLOSEPOLY  # a filled outline closes itself
    )
    size = f'width="{width / _EM:.2f}em" height="{height / _EM:.2f}em"'
    box = f'viewBox="0 {depth - height:.0f} {width:.0f} {height:.0f}"'
    style = "" if block else f' style="vertical-align: {-depth / _EM:.2f}em"'
    name = "div" if block else "span"
    return (
        f'<{name} class="formula"><svg role="img" aria-label="{escape(tex)}" {size} {box}{style}>'
        f'<path fill="currentColor" d="{"".join(steps)}"/></svg></{name}>'
    )


def dollars(docstring: str) -> str:
    """A docstring with its formulas, and powers of numbers, in the notation of Markdown."""
    block = _DIRECTIVE.sub(lambda m: f"{m[1]}$$\n{m[2].rstrip()}\n{m[1]}$$\n", docstring)
    return _POWER.sub(r"$\1^{\2}$", _ROLE.sub(r"$\1$", block))


class Formulas(griffe.Extension):
    """`dollars` for every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = dollars(obj.docstring.value)
