"""YAML of settings from untrusted files: plain values, bounded time, no code, no other files."""

import codecs
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from ttsr_fast.files import refusal, shown
from ttsr_fast.optional import optional

_LIMIT = 2**16  # bytes; a configuration with all explanations has six thousand
_DEPTH = 8


def load(path: str | os.PathLike[str]) -> Any:
    """Value of a YAML file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        ValueError: the file cannot be read, is too large or is no YAML; and as `parse`.
        ImportError: PyYAML is missing.
    """
    name = shown(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LIMIT + 1)
    except OSError as error:
        raise ValueError(f"cannot read {name}: {refusal(error)}") from error
    if len(content) > _LIMIT:
        raise ValueError(f"{name} is not a YAML file of settings: it has more than {_LIMIT} bytes")
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if content.startswith(marks) else "utf-8-sig"
    try:
        return parse(content.decode(encoding))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a YAML file: it is not in UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{name} is not a YAML file: {error}") from error


def parse(text: str) -> Any:
    """A value of dicts, lists, strings, numbers, bools and None.

    Raises:
        ValueError: no YAML, a duplicate key, an anchor, alias or tag, or nesting deeper than any
            setting needs. The message gives the line.
        ImportError: PyYAML is missing.
    """
    yaml, loader = _yaml()
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from error
    except (yaml.YAMLError, ValueError) as error:  # such as a number of 5000 digits
        raise ValueError(str(error).splitlines()[0]) from error


def dump(value: Any) -> str:
    """A value in one line, for `parse`.

    Raises:
        ImportError: PyYAML is missing.
    """
    yaml, _ = _yaml()

    def text(dumper: Any, value: str | PurePath) -> Any:
        style = None if str(value).isprintable() else '"'  # escapes line ends
        return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style=style)

    no_aliases = {"ignore_aliases": lambda *_: True}  # `parse` refuses them
    dumper: Any = type("Dumper", (yaml.SafeDumper,), no_aliases)
    dumper.add_representer(str, text)
    dumper.add_multi_representer(PurePath, text)
    options = {"default_flow_style": True, "width": math.inf, "allow_unicode": True}
    line = yaml.dump([value], Dumper=dumper, sort_keys=False, **options)
    return line.strip()[1:-1]  # without the brackets


def check_plain(key: str, value: Any) -> None:
    """Refuse a value that OmegaConf would resolve, such as from the environment.

    Raises:
        ValueError: a string in the value holds `${`, or a number has more than 63 bits. The message
            names the key.
    """
    if isinstance(value, str):
        if "${" in value:
            raise ValueError(f"{key} must not refer to other values with ${{...}}, got {value!r}")
    elif isinstance(value, int):
        if value.bit_length() > 63:
            raise ValueError(f"{key} must have at most 63 bits, got {value.bit_length()}")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            check_plain(key, name)
            check_plain(key, inner)
    elif isinstance(value, Sequence):
        for inner in value:
            check_plain(key, inner)


@cache
def _yaml() -> tuple[Any, Any]:
    """PyYAML, and its safe loader with the limits above."""
    yaml = optional("yaml", "a configuration needs PyYAML: pip install 'ttsr-fast[train]'")
    safe_loader: Any = yaml.SafeLoader

    class Loader(safe_loader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if event.anchor is not None:
                raise yaml.MarkedYAMLError(None, None, "anchor or alias", event.start_mark)
            if getattr(event, "tag", None) is not None:
                raise yaml.MarkedYAMLError(None, None, f"tag {event.tag}", event.start_mark)
            self.depth += 1
            if self.depth > _DEPTH:
                raise yaml.MarkedYAMLError(None, None, "too deep a nesting", event.start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.value in ("<<", *seen):
                    name = key.value if isinstance(key, yaml.ScalarNode) else key.id
                    raise yaml.MarkedYAMLError(
                        None, None, f"duplicate or impossible key {name!r}", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {  # 2026-11-28 is the name of a folder, not a date
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml, Loader
