"""A task of the user's own: ``module:function`` that returns an :class:`~curvdiag.Objective`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from curvdiag.errors import ArgumentError, CurvdiagError
from curvdiag.objective import Objective


class TaskError(CurvdiagError):
    """The user's own module or function cannot be found or run, or returns something else."""


@contextmanager
def load_task(task: str, *, show_traceback: bool = False) -> Iterator[Objective]:
    """The objective that a task returns.

    The current folder, and the folder of a task given as a file, can be imported from as long as the context lasts.

    Args:
        task: ``module:function``, or ``path/to/file.py:function``; the function is called without arguments.
        show_traceback: Print the traceback of what the user's own code raises.

    Raises:
        ArgumentError: ``task`` is not of this form.
        TaskError: There is no such module or function, it raises, or it returns no objective.
    """
    where, colon, name = task.strip().rpartition(":")
    if not (colon and where and name.isidentifier()):
        raise ArgumentError(f"a task is MODULE:FUNCTION or path/to/file.py:FUNCTION, not {task!r}")
    path = Path(where).expanduser() if where.endswith(".py") or "/" in where or "\\" in where else None
    kept = list(sys.path)
    sys.path[:0] = [str(path.absolute().parent if path is not None else Path.cwd())]
    importlib.invalidate_caches()
    try:
        module = find_module(where, show_traceback) if path is None else load_file(path, show_traceback)
        objective = users_own(lambda: function_of(module, name, where)(), f"{where}:{name}", module, show_traceback)
        if not isinstance(objective, Objective):
            kind = type(objective)
            what = "nothing" if objective is None else f"a {kind.__module__}.{kind.__qualname__}"
            raise TaskError(f"{where}:{name} returned {what}; a task returns a curvdiag.Objective")
        yield objective
    finally:
        sys.path[:] = kept


def find_module(name: str, show_traceback: bool) -> ModuleType:
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ArgumentError(f"{name!r} is not the name of a module; a file is given as path/to/file.py:FUNCTION")

    def load() -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing == name or name.startswith(f"{missing}."):
                raise TaskError(
                    f"there is no module {missing!r}, neither installed nor in {Path.cwd()}; "
                    "a file elsewhere is given as path/to/file.py:FUNCTION"
                ) from error
            raise

    return users_own(load, f"importing {name}", name, show_traceback)


def load_file(path: Path, show_traceback: bool) -> ModuleType:
    """Run a file as a module of its own name, or of another where that name is taken."""
    if not path.is_file():
        raise TaskError(f"there is no file {path}")
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"curvdiag_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} is not a Python file; its name ends in .py")
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling and dataclasses look a class up in its module
    try:
        users_own(lambda: loader.exec_module(module), f"importing {path}", module, show_traceback)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def function_of(module: ModuleType, name: str, where: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if not callable(found):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
        ]
        close = get_close_matches(name, own, n=3) or own[:5]
        hint = f"; it has {', '.join(close)}" if close else "; it has no function of its own"
        what = f"no function {name!r}" if found is None else f"{name!r}, but it is not a function"
        raise TaskError(f"{where} has {what}{hint}")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise TaskError(f"{where}:{name} is called without arguments, but: {error}") from error
    except ValueError:
        pass  # a callable without a signature: its call will tell
    return found


def users_own(call: Callable[[], Any], doing: str, module: ModuleType | str, show_traceback: bool) -> Any:
    """Call what the user wrote; what it raises becomes one line that names the place."""
    try:
        return call()
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        if show_traceback:
            traceback.print_exception(error)
        ended = isinstance(error, SystemExit)
        what = "ended the program (sys.exit)" if ended else f"failed with {type(error).__name__}"
        text = f": {error}" if str(error) and error.args else ""
        hint = "" if show_traceback else "; --traceback shows the way there"
        raise TaskError(f"{doing} {what}{text}{place_of(error, module)}{hint}") from error


def place_of(error: BaseException, module: ModuleType | str) -> str:
    """``(train.py, line 12)``: the deepest line outside installed packages, which is where the user looks first."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename, module)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def is_users(filename: str, module: ModuleType | str) -> bool:
    """Whether a line is in the module of the task, or else neither of curvdiag, of Python nor installed."""
    if not isinstance(module, str) and filename == getattr(module, "__file__", None):
        return True
    path = Path(filename)
    libraries = (Path(__file__).parent.parent, Path(importlib.__file__).parent.parent)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return path.suffix == ".py" and not installed and not any(path.is_relative_to(root) for root in libraries)
