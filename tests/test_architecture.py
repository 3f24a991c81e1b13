"""Imports only go down (docs: design §1)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent
OURS = {"vlcot", "actors", "reward_servers", "learners", "rl_system", "configs", "toy"}
MAY_IMPORT = {
    "vlcot": set(),
    "actors": {"vlcot"},
    "reward_servers": {"vlcot"},
    "learners": {"vlcot"},
    "rl_system": {"vlcot", "actors", "reward_servers", "learners", "configs", "toy"},
    "toy": {"vlcot", "actors", "reward_servers", "learners"},
}
ENGINES = {"ray", "vllm", "deepspeed"}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_only_go_down(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        forbidden = (_imports(path) & OURS) - MAY_IMPORT[package] - {package}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_the_domain_knows_no_engine():
    for path in sorted((ROOT / "vlcot").rglob("*.py")):
        assert not _imports(path) & ENGINES, path.relative_to(ROOT)


def test_only_the_toy_data_source_imports_the_toy():
    users = [p for p in sorted((ROOT / "rl_system").rglob("*.py")) if "toy" in _imports(p)]
    assert [p.relative_to(ROOT).as_posix() for p in users] == ["rl_system/data/rows.py"]
