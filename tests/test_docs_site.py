"""The site builds without a warning, loads nothing from elsewhere, and leaves nothing public out."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from html.parser import HTMLParser

import pytest
import torch
from docs_pages import PAGES, ROOT
from torch import nn

import curvdiag
from curvdiag import CurvatureMonitor, Objective
from curvdiag.optim import LPSGDM

API = ROOT / "docs" / "reference" / "api"
PUBLIC = (
    "",
    "noise",
    "scaling",
    "optim",
    "schedules",
    "plotting",
    "record",
    "monitor",
    "loggers",
    "checkpoints",
    "report",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site is built by mkdocs: pip install 'curvdiag[docs]'")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Loads(HTMLParser):
    """Addresses that a browser fetches by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "edit"):
            self.found.append(given.get("href") or "")
        elif tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(given.get("src") or "")


def test_no_page_loads_anything_from_another_server(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text())
        assert loads.found
        assert [address for address in loads.found if re.match(r"(https?:)?//", address)] == [], page
        here = [address for address in loads.found if address and not address.startswith(("/", "data:"))]
        assert [address for address in here if not (page.parent / address.split("?")[0]).exists()] == [], page
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles) == []


def test_roles_tables_and_sections_of_docstrings_are_rendered(site):
    text = "".join(path.read_text() for path in (site / "reference" / "api").rglob("*.html"))
    assert re.findall(r":(?:class|func|meth|attr|data|mod):", text) == []
    assert "====" not in text
    assert re.findall(r"(?m)^\s*::\s*$|::</p>", text) == []
    assert "<td><code>curv/hessian/lambda_max</code></td>" in text
    assert re.findall(r"<p>(?:Args|Raises|Attributes|Returns):", text) == []
    assert "doc-symbol-module" not in text  # a function, and not the file that has its name
    assert 'href="../spectrum/#curvdiag.spectrum.anisotropy.anisotropy"' in text


def test_pictures_and_commands_are_in_the_site(site):
    assert {path.name for path in (site / "figures").iterdir()} == {p.name for p in (ROOT / "figures").iterdir()}
    commands = (site / "reference" / "commands" / "index.html").read_text()
    from curvdiag.cli import app

    for one in app.registered_commands:
        assert f"curvdiag {one.name or one.callback.__name__}</code></h2>" in re.sub(r"<a class.*?</a>", "", commands)
    assert "--checkpoints" in commands
    assert "--output" in commands
    assert re.search(r"<code>--seed</code>[^\n]*\n<td>[^\n]*\n<td><code>0</code></td>", commands)  # 0 is a default, too


def test_every_public_name_has_its_place_in_the_reference():
    documented = {name for page in API.glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}
    for name in documented:
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name
    ends = {name.rsplit(".", 1)[-1] for name in documented}
    errors = re.findall(r"`(\w+)`", (ROOT / "docs" / "reference" / "errors.md").read_text())
    for room in PUBLIC:
        module = importlib.import_module(f"curvdiag.{room}".rstrip("."))
        missing = {
            name
            for name in module.__all__
            if name not in ends and name not in errors and name not in ("optim", "schedules", "Cadence")
        }
        assert missing == set(), room


def test_every_error_is_explained():
    from curvdiag import errors

    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception | Warning):
            assert f"`{name}`" in page, name
            for base in (ValueError, MemoryError, ImportError, ArithmeticError):
                if issubclass(value, base):
                    assert re.search(rf"\| `{name}` \| `{base.__name__}` \|", page), name


def test_the_keys_are_those_that_are_measured():
    listed = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "reference" / "keys.md").read_text(), flags=re.M)
    patterns = [re.sub(r"<\w+>", "*", key) for key in listed]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, targets = torch.randn(40, 3, dtype=torch.float64), torch.randint(3, (40,))
    objective = Objective(model, nn.CrossEntropyLoss(), (inputs, targets))
    optimizer = LPSGDM(model.parameters(), lr=0.01, p=4)
    seen = set()
    named = ["layer_anisotropy", "preconditioned_lambda_max", "cwgd_diagonal"]
    for options in ({"preset": "full"}, {"measure": named}):
        monitor = CurvatureMonitor(objective, every=1, strict=True, steps=8, **options).attach(optimizer)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        monitor.observe_loss(loss)
        optimizer.step()
        monitor.detach()
        seen |= set(monitor.history[-1].scalars)
    assert {key for key in seen if not any(fnmatchcase(key, pattern) for pattern in patterns)} == set()
    assert {p for p in patterns if not any(fnmatchcase(key, p) for key in seen)} == set()


def test_the_hook_reads_what_docstrings_hold(monkeypatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    from docstrings import markdown

    text = markdown(
        "A :class:`~a.b.C` and :func:`f`.\n\n::\n\n    x = 1\n\n"
        "====  =====\nkey   what\n====  =====\n``a``  one ``|g|``\n      more\n====  =====\n\n"
        "Args:\n    one, two: Both.\n\nRaises:\n    AError, BError\n    StaleWeightsError\n"
    )
    assert '<autoref optional identifier="a.b.C"><code>C</code></autoref>' in text
    assert "```python\nx = 1\n```" in text
    assert "one: See ``two``." in text
    assert "    two: Both." in text
    assert "    AError: \n    BError: " in text
    assert "    StaleWeightsError: The weights changed under an operator that shares them" in text
    assert curvdiag.__doc__ is not None


def test_every_page_is_reached_from_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert page.relative_to(ROOT / "docs").as_posix() in config, page
