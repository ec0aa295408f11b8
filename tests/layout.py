"""What a stage really reads: its import tree and the paths it names."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("schemas", "agent", "stages", "simulator")
SIMULATED = {"teacher_gen": "actors", "eval_judge": "judge"}
"""Stages that may start the simulator, and the role it plays for them; `python -m simulator` is imported by nobody."""


CALLED = {"report": "gate"}
"""Stages that start a command of ours, which is imported by nobody."""


BESIDE = {"agent/compiled.py": {"agent/attention.c", "agent/elementwise.c", "agent/vectors.h"}}
"""Code in other languages, by the module that takes it."""


def module_file(name: str) -> Path | None:
    """The file of one of our modules, relative to the root."""
    if name.split(".")[0] not in PACKAGES:
        return None
    path = Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


def imports(path: Path) -> set[Path]:
    """Our own files that a file imports, anywhere in it."""
    found: set[Path | None] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(module_file(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(module_file(node.module))
            found.update(module_file(f"{node.module}.{alias.name}") for alias in node.names)
    return {file for file in found if file and file.name != "__init__.py"}


def import_tree(path: Path) -> set[Path]:
    """A file and all of our own files that it imports, directly or not."""
    seen, waiting = set(), {path}
    while waiting:
        file = waiting.pop()
        seen.add(file)
        waiting |= imports(file) - seen
    return seen


def stage_code(module: str) -> set[str]:
    """All code files that a stage's result depends on."""
    files = import_tree(Path("stages", f"{module}.py"))
    if role := SIMULATED.get(module):
        files |= import_tree(Path("simulator/__main__.py")) | import_tree(Path("simulator", f"{role}.py"))
    if command := CALLED.get(module):
        files |= import_tree(Path("stages", f"{command}.py"))
    found = {file.as_posix() for file in files}
    return found.union(templates(module), *(BESIDE.get(file, set()) for file in found))


def templates(module: str) -> set[str]:
    """The files in `stages/_<module>/` that are no Python and that the stage names."""
    folder = Path("stages", f"_{module}")
    named = {node.value for node in ast.walk(ast.parse((ROOT / "stages" / f"{module}.py").read_text(encoding="utf-8")))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.*") if path.suffix != ".py" and path.name in named}
