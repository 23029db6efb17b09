"""Imports go one way: from commands down to what needs nothing."""

import ast
from pathlib import Path

import pytest

import fairseq_sha

ROOT = Path(fairseq_sha.__file__).parent
#: Each level may import itself and those before it. The package itself imports nothing but errors;
#: its ``register`` imports the tasks when it is called.
LEVELS = [
    {"errors", "files", "checks", "ngram_hash", "signals"},
    {"checkpoints", "registrations"},
    {"compatibility"},
    {"ops", "data", "optim", "criterions"},
    {"modules"},
    {"models"},
    {"evaluation"},
    {"tasks", "trained_model"},
    {
        "compression",
        "continuations",
        "flops",
        "onnx_export",
        "packed_file",
        "portable",
        "weights_import",
    },
    {"compare", "lm_eval_adapter"},
    {"reading"},
    {"commands"},
    {"__main__"},
]
SEPARATE = {"ops", "data", "optim", "criterions", "tasks", "trained_model"}


def part_of(module):
    """The first name below the package: ``models`` for ``fairseq_sha.models.sha_rnn``."""
    return module.split(".")[1] if "." in module else None


def imports_of(path):
    """Modules of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fairseq_sha":
            yield from (f"fairseq_sha.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


FILES = sorted(
    path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem != "__init__"
)


def test_every_part_has_its_level():
    parts = {path.relative_to(ROOT).parts[0].replace(".py", "") for path in FILES}
    assert parts == set.union(*LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upwards(path):
    own = path.relative_to(ROOT).parts[0].replace(".py", "")
    level = next(i for i, parts in enumerate(LEVELS) if own in parts)
    allowed = set.union(*LEVELS[: level + 1])
    if own in SEPARATE:
        allowed -= LEVELS[level] - {own}
    public = {"UserError", "__version__", "register"}  # of the package itself
    imported = {part_of(name) for name in imports_of(path) if name.startswith("fairseq_sha")}
    assert imported - {None} - public <= allowed
