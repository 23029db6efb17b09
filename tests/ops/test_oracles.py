import ast
from pathlib import Path

import fairseq_sha


def test_production_imports_no_oracle():
    """What a test compares with must not be what it tests."""
    package = Path(fairseq_sha.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(name.name for name in node.names)]
                assert not any("oracles" in name for name in names), path


def test_oracles_import_nothing_of_the_package():
    path = Path(fairseq_sha.__file__).parent / "ops" / "oracles.py"
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    assert not any(isinstance(node, ast.ImportFrom) for node in nodes)
    imports = [node for node in nodes if isinstance(node, ast.Import)]
    assert [name.name for node in imports for name in node.names] == ["torch"]
