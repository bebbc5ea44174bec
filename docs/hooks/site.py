"""A hook of MkDocs: the pictures of ``figures/`` join the site, and the commands describe themselves."""

from __future__ import annotations

import enum
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.models import OptionInfo

FIGURES = "figures"
COMMANDS = "<!-- commands -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages link to ``../figures/...`` so that they also read well outside the site; there the folder is inside."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / FIGURES).iterdir()):
        name = f"{FIGURES}/{path.name}"
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    deep = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"](../{deep}{FIGURES}/", f"]({deep}{FIGURES}/")
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def commands() -> str:
    """Every command with its arguments and options, as its own ``--help`` has them."""
    from curvdiag.cli import app

    return "\n\n".join(section(one.name or one.callback.__name__, one.callback) for one in app.registered_commands)


def section(name: str, function: Callable[..., Any]) -> str:
    hints = typing.get_type_hints(function, include_extras=True)
    rows, usage = [], [f"curvdiag {name}"]
    for parameter in inspect.signature(function).parameters.values():
        kind, described = typing.get_args(hints[parameter.name])[:2]
        named = isinstance(described, OptionInfo)
        given = (
            (described.metavar or "").replace("|", " / ")
            or choices(kind)
            or ("" if kind is bool else written_type(kind))
        )
        flags = [flag for flag in (described.default, *(described.param_decls or ())) if isinstance(flag, str)]
        flags = flags or ([f"--{parameter.name.replace('_', '-')}"] if named else [])
        required = parameter.default is inspect.Parameter.empty
        if not named:
            usage.append(given if required else f"[{given}]")
        shown = " ".join(part for part in (", ".join(f"`{flag}`" for flag in flags), given and f"`{given}`") if part)
        default = "**required**" if required else written(parameter.default)
        rows.append(f"| {shown} | {described.help} | {default} |")
    head = "| argument or option | what it is | if not given |\n|---|---|---|\n"
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    body = (head + "\n".join(rows)) if rows else ""
    return f"## `curvdiag {name}`\n\n{text}\n\n```text\n{' '.join([*usage, '[OPTIONS]'])}\n```\n\n{body}"


def choices(kind: Any) -> str:
    return " / ".join(kind) if isinstance(kind, type) and issubclass(kind, enum.StrEnum) else ""


def written_type(kind: Any) -> str:
    plain = [one for one in typing.get_args(kind) or (kind,) if one is not type(None)]
    return {"int": "N", "float": "X", "Path": "PATH", "bool": ""}.get(getattr(plain[0], "__name__", ""), "TEXT")


def written(default: Any) -> str:
    nothing = default is None or default is False or default in ("", [])
    return "" if nothing else f"`{getattr(default, 'value', default)}`"
