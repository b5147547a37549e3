"""The size ratchet of `make check`: files up to 350 lines, functions up to 60. Ruff counts parameters."""

import ast
import sys
from pathlib import Path

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
FOLDERS = ("parallel", "longctx", "launch", "tests", "benchmarks", "examples")


def problems_of(path: Path) -> list[str]:
    """Every limit that the file breaks, as `path:line: what`."""
    text = path.read_text()
    found = []
    lines = text.count("\n")
    if lines > MAX_FILE_LINES:
        found.append(f"{path}:1: {lines} lines, at most {MAX_FILE_LINES}; split the file by what it does")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += _function_problems(path, node)
    return found


def _function_problems(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    where = f"{path}:{node.lineno}: {node.name}"
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > MAX_FUNCTION_LINES:
        return [f"{where} has {length} lines, at most {MAX_FUNCTION_LINES}"]
    return []


def main() -> int:
    """Check the tree from the repository root; the exit status of `make check`."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(p.relative_to(root) for folder in FOLDERS for p in (root / folder).rglob("*.py"))
    found = [problem for path in files for problem in problems_of(path)]
    print("\n".join(found) if found else f"sizes: {len(files)} files within limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
