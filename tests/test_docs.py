"""README and user guide: code and commands run, links lead somewhere, figures show the truth."""

import ast
import doctest
import functools
import json
import re
import shlex
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import pytest
import torch
import typer
from PIL import Image as pillow
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from ttsr_fast import SearchTransfer, gather_fold, search, upscale
from ttsr_fast.cli.commands import app
from ttsr_fast.images import Image
from ttsr_fast.model import TTSR, save_model

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for scripts of these folders
sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
sys.path.insert(0, str(Path(__file__).parent.parent / "docs" / "draw"))

import figure_data
import figures
import hooks

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs" / "index.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXTENSIONS = ["fenced_code", "tables", "toc"]
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


class Page(HTMLParser):
    """Targets of links and images, anchors, and code, by the language of its block."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        text = path.read_text()
        self.targets: list[str] = []
        self.anchors = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
        self.code: list[tuple[str, str]] = []
        self._language: str | None = None
        self.feed(markdown.markdown(text, extensions=EXTENSIONS))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]
        self.anchors.add(found.get("id") or "")
        if tag == "code":
            self._language = (found.get("class") or "").removeprefix("language-")
            self.code.append((self._language, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "code":
            self._language = None

    def handle_data(self, data: str) -> None:
        if self._language is not None:
            self.code[-1] = (self._language, self.code[-1][1] + data)


page = functools.cache(Page)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 56, 3), np.uint8)
    Image(pixels[:8, :10]).save("small.png")
    for name in ("sharp.png", "first.png", "second.png", "other.png"):
        Image(pixels).save(name)
    save_model(TTSR((1, 1, 1, 1), 4), "TTSR.pt")
    Path("photographs").mkdir()
    for name in ("a.png", "b.png"):
        Image(pixels.repeat(3, 0).repeat(3, 1)).save(f"photographs/{name}")


@each_page
@pytest.mark.usefixtures("files")
def test_python_blocks_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, in one namespace; the README takes its features from the reader."""
    # The graph is what can break; compiling it takes seconds.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(path)
    if path.name == "README.md":
        maps = {"query": (2, 8, 5, 6), "key": (1, 8, 4, 7), "value": (1, 3, 16, 28)}
        document.namespace.update({name: torch.rand(size) for name, size in maps.items()})
    examples = list(document.examples())
    assert len(examples) == path.read_text().count("```python\n")
    for example in examples:
        example.evaluate()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("shown", [search, gather_fold, SearchTransfer, upscale])
def test_examples_of_docstrings_run(shown: Any) -> None:
    (example, *_) = doctest.DocTestFinder(recurse=False).find(
        shown, globs={"torch": torch, shown.__name__: shown}
    )
    result = doctest.DocTestRunner().run(example)
    assert result.attempted >= 4 and result.failed == 0


@each_page
def test_links_lead_somewhere(path: Path) -> None:
    for target in page(path).targets:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if anchor:
            assert anchor in page(linked).anchors, target


@each_page
def test_commands_are_understood(path: Path) -> None:
    program = typer.main.get_command(app)
    blocks = [code for language, code in page(path).code if language == "sh"]
    blocks = [block.replace("\\\n", "") for block in blocks]
    for line in (line.strip() for block in blocks for line in block.splitlines()):
        first, *words = shlex.split(line, comments=True) or [""]
        if first == "python":
            assert (ROOT / words[0]).is_file(), line
        elif first == "ttsr-fast":
            words = words[: words.index(">")] if ">" in words else words
            with program.make_context("ttsr-fast", words) as context:
                name, command, rest = program.resolve_command(context, words)
                command.make_context(name, rest, parent=context)


def test_places_of_the_layout_exist() -> None:
    rows = re.findall(r"^\|.+\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    places = re.findall(r"`([\w./]+/|[\w./]+/\w+\.py)`", "\n".join(rows))
    assert len(places) > 30
    assert [place for place in places if not (ROOT / place).exists()] == []


@each_page
def test_make_targets_exist(path: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for language, code in page(path).code:
        if language in ("", "sh"):
            assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= known


def test_quoted_messages_are_those_of_the_package() -> None:
    """In bold code, with an ellipsis for what differs; so that both change together."""
    quoted = re.findall(r"\*\*`(.+?)`\*\*", (ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(quoted) > 80
    said = [
        text
        for file in [*(ROOT / "ttsr_fast").rglob("*.py"), ROOT / "setup.py"]
        for text in texts(file)
    ]
    unknown = [
        message for message in quoted if not any(message.strip("… ") in text for text in said)
    ]
    assert unknown == []


def texts(file: Path) -> list[str]:
    """Every string of a source file, with an ellipsis for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value.replace("%s", "…"))
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            found.append("".join(map(str, parts)))
    return found


# --- what the guide is built with -----------------------------------------------------------------


def test_tables_come_from_the_results() -> None:
    text = hooks.on_page_markdown("before\n\n<!-- results: search -->\n\nafter")
    assert text.startswith("before\n\n") and text.endswith("\n\nafter")
    assert "| queries in keys | pairs | cpp fp32 |" in text
    assert "![Plot of search.json](images/search.png)" in text
    with pytest.raises(ValueError, match="must be of one of .*'search'.*, got 'speed'"):
        hooks.on_page_markdown("<!-- results: speed -->")


def test_results_of_a_gpu_come_last_and_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    monkeypatch.setattr(hooks.report, "markdown", lambda data: data["text"])
    assert hooks.results("model") == "Nothing has been measured yet.\n"
    for name, device, kind in (
        ("a", "cuda", "model"),
        ("b", "cpu", "model"),
        ("c", "cpu", "other"),
    ):
        data = {"kind": kind, "device": {"type": device}, "text": name}
        data = data if name == "b" else {"results": {"step": data}}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    assert hooks.results("model") == "b\na"
    (tmp_path / "a.json").unlink()
    assert hooks.results("model") == "b\nNo GPU has been measured yet.\n"


def test_formulas_of_docstrings_become_svg() -> None:
    docstring = "With :math:`w_j` as\n\n.. math::\n    a &\n    b\n\nshown, 2**-9, `k**2` and all."
    text = hooks.dollars(docstring)
    assert text == "With $w_j$ as\n\n$$\n    a &\n    b\n$$\n\nshown, $2^{-9}$, `k**2` and all."
    html = r'<p><span class="arithmatex">\(x &lt; y\)</span></p><div class="arithmatex">\[z\]</div>'
    inline, block = hooks.on_page_content(html).split("</p>")
    assert inline.startswith('<p><span class="formula"><svg role="img" aria-label="x &lt; y" ')
    assert "vertical-align" in inline and "arithmatex" not in inline + block
    assert block.startswith('<div class="formula"><svg role="img" aria-label="z" ')
    assert re.search(r'd="M[0-9MLQC -]+"/></svg></div>$', block)
    with pytest.raises(ValueError, match=r"formula must be known to Matplotlib, got \\nonsense x"):
        hooks.formula(r"\nonsense x", block=False)


def test_tables_of_names_come_from_docstrings() -> None:
    paths = ["ttsr_fast.search", "ttsr_fast.metrics"]
    page = "<!-- names -->\n" + "".join(f"\n::: {path}\n" for path in paths)
    rows = hooks.on_page_markdown(page).split("\n\n")[0].splitlines()[2:]
    first = str(search.__doc__).splitlines()[0]
    assert rows[0] == f"| [<code>search</code>][ttsr_fast.search] | {first} |"
    name = "[<code>metrics.<wbr>psnr</code>][ttsr_fast.metrics.psnr]"
    assert any(row.startswith(f"| {name} | ") for row in rows)
    with pytest.raises(ValueError, match="ttsr_fast.__version__ must have a docstring"):
        hooks.names(["ttsr_fast.__version__"])


def test_index_lists_every_page() -> None:
    linked = {INDEX.parent / target.partition("#")[0] for target in page(INDEX).targets}
    assert set(PAGES) - linked == {ROOT / "README.md", INDEX}


def test_figures_show_what_is_computed() -> None:
    """The functions check themselves against the operators; what the page says of them is here."""
    products = figure_data.products()
    assert products.patches[4, 3] == products.pixels.diagonal(-1)[2:5].sum()
    read = figure_data.blocks().read
    assert sorted(read.count(place) for place in set(read)) == [1, 1, 7]
    assert figure_data.overlaps()["none"].unique().tolist() == [4, 6, 9]
    shift = figure_data.walk().patches.argmax(1)[24:] - torch.arange(24, 48)
    assert shift.add(4).abs().le(1).double().mean() > 0.9, "a match, four columns to the left"


@pytest.mark.parametrize("name", ["diagonals", "walk", "blocks", "overlap"])
def test_figures_are_drawn(name: str, tmp_path: Path) -> None:
    draw: Callable[[Path], None] = figures.FIGURES[name]
    draw(tmp_path / "figure.png")
    kept = ROOT / "docs" / "figures" / f"{name}.png"
    with pillow.open(tmp_path / "figure.png") as drawn, pillow.open(kept) as shown:
        assert drawn.size == shown.size
