"""A griffe extension: docstrings with rst-ish roles, tables and ``::`` blocks become Markdown that the site renders.

It reads ``:class:`~curvdiag.Objective``` as a link, a simple table as a Markdown table, ``::`` as a fence, and gives
``a, b: text`` in a section an entry each, since Google style knows one name a line. An error that is only named is
explained in its class's own words.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from griffe import Alias, AliasResolutionError, CyclicAliasError, Extension, Module, NameResolutionError, Object

from curvdiag import errors

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`(~?)([\w.]+)`")
RULE = re.compile(r"^=+(?:  +=+)+$")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):$")
SEVERAL = re.compile(r"^(    )(\w+(?:, \w+)+)(?::(.*))?$")
ALONE = re.compile(r"^(    )(\w+)$")


class Rst(Extension):
    """Rewrites every docstring of a package after it has been loaded, when names can be resolved."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        for thing in walk(pkg):
            if thing.docstring is not None:
                thing.docstring.value = markdown(thing.docstring.value, thing)


def walk(thing: Object) -> Iterator[Object]:
    yield thing
    for member in thing.members.values():
        if not isinstance(member, Alias):
            yield from walk(member)


def markdown(text: str, thing: Object | None = None) -> str:
    """The docstring of ``thing`` in Markdown with Google sections."""
    text = "\n".join(fences(list(tables(list(sections(text.splitlines()))))))
    return ROLE.sub(lambda found: link(found[2], bool(found[1]), thing), text)


def link(name: str, short: bool, thing: Object | None) -> str:
    shown = short_name(name) if short else name
    target = name if thing is None else place(name, thing)
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


def place(name: str, thing: Object) -> str:
    """Where the object stands that ``thing`` calls so; a name of another package, or of the text alone, as it is."""
    with contextlib.suppress(NameResolutionError):  # then it may be the whole path
        name = thing.resolve(name)
    try:
        found = thing.modules_collection[name]
        if found.is_module and short_name(name) in found.members:  # the function that its file is named after
            found = found.members[short_name(name)]
        return found.canonical_path
    except (KeyError, AliasResolutionError, CyclicAliasError):
        return name


def short_name(name: str) -> str:
    return name.rpartition(".")[2]


def sections(lines: list[str]) -> Iterator[str]:
    """One line for each name that an entry gives together with others, and a colon where there is none."""
    inside = False
    for line in lines:
        if line and not line.startswith(" "):
            inside = bool(SECTION.match(line))
        several, alone = SEVERAL.match(line), ALONE.match(line)
        if inside and several:
            names = several[2].split(", ")
            if several[3] is None:
                yield from (f"    {name}: {meaning(name)}" for name in names)
            else:
                yield from (f"    {name}: See ``{names[-1]}``." for name in names[:-1])
                yield f"    {names[-1]}:{several[3]}"
        elif inside and alone:
            yield f"    {alone[2]}: {meaning(alone[2])}"
        else:
            yield line


def meaning(name: str) -> str:
    """The first line of an error's docstring; nothing for other names."""
    return (inspect.getdoc(getattr(errors, name)) or "").split("\n")[0] if hasattr(errors, name) else ""


def tables(lines: list[str]) -> Iterator[str]:
    """Simple tables, whose columns are marked by rows of ``=``; a row goes on where its first cell is empty."""
    rest = iter(lines)
    for line in rest:
        if not RULE.match(line.strip()):
            yield line
            continue
        indent = len(line) - len(line.lstrip())
        starts = [found.start() for found in re.finditer(r"=+", line)]
        header = cells(next(rest), starts)
        next(rest)
        rows: list[list[str]] = []
        for row in rest:
            if RULE.match(row.strip()):
                break
            parts = cells(row, starts)
            # A key that goes on stands under one that ended with a comma; text that goes on has no key.
            if rows and (not parts[0] or rows[-1][0].endswith(",")):
                rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], parts, strict=True)]
            else:
                rows.append(parts)
        for parts in (header, ["---"] * len(starts), *rows):
            yield " " * indent + "| " + " | ".join(escaped(part) for part in parts) + " |"


def cells(line: str, starts: list[int]) -> list[str]:
    ends = [*starts[1:], len(line)]
    return [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]


def escaped(cell: str) -> str:
    """Bars outside code would end the cell; those in code are taken as they are."""
    parts = cell.split("``")
    return "``".join(part if i % 2 else part.replace("|", r"\|") for i, part in enumerate(parts))


def fences(lines: list[str]) -> Iterator[str]:
    """What stands indented under a line that ends in ``::``, as a block of Python."""
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.endswith("::"):
            yield line
            at += 1
            continue
        if line.strip() != "::":
            yield line[:-1]
            yield ""
        indent, at, block = len(line) - len(line.lstrip()), at + 1, []
        while at < len(lines) and (not lines[at].strip() or len(lines[at]) - len(lines[at].lstrip()) > indent):
            block.append(lines[at])
            at += 1
        code = textwrap.dedent("\n".join(block)).strip("\n")
        yield from (" " * indent + part for part in ("```python", *code.splitlines(), "```", ""))
