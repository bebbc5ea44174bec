"""Optional packages are named where they are missing, with the command that installs them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from curvdiag.errors import CurvdiagError, MissingExtraError
from curvdiag.extras import require


def test_an_installed_package_is_imported():
    assert require("xml.etree.ElementTree", "xml").__name__ == "xml.etree.ElementTree"


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(module):
    with pytest.raises(
        MissingExtraError, match=r"no_such_package is not installed.*pip install 'curvdiag\[some\]'"
    ) as caught:
        require(module, "some")
    assert isinstance(caught.value, CurvdiagError)
    assert isinstance(caught.value, ImportError)
    assert caught.value.name == "no_such_package"


def test_what_an_installed_package_misses_itself_is_not_blamed_on_the_extra(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import another_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="another_that_is_missing") as caught:
        require("broken_package", "some")
    assert not isinstance(caught.value, MissingExtraError)


def test_curvdiag_itself_imports_no_optional_package():
    names = [
        "lightning",
        "pytorch_lightning",
        "transformers",
        "accelerate",
        "tensorboard",
        "wandb",
        "mlflow",
        "plotly",
        "safetensors",
    ]
    code = f"import curvdiag, curvdiag.cli, sys; print([n for n in {names} if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
