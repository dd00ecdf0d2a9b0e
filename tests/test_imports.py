"""Who imports whom, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from zsq.methods import BASELINES, METHODS

ROOT = Path(__file__).parent.parent / "src" / "zsq"
FILES = sorted(ROOT.rglob("*.py"))
ALLOWED = {
    "core": "core",
    "compat": "core",
    "zoo": "compat core zoo",
    "nets": "compat core nets zoo",
    "losses": "core losses",
    "synthesis": "core losses synthesis",
    "quant": "core nets losses quant",
    "methods": "core losses synthesis quant methods",
    "evaluate": "core nets quant",
    "store": "core nets quant",
    "export": "core nets quant export",
    "estimate": "core losses synthesis",
    "api": "core estimate report nets quant export methods evaluate store version zoo",
    "runtime": "core nets export evaluate api runtime",
    "layers": "core estimate nets synthesis quant api runtime",
    "rows": "core",
    "report": "core nets losses api estimate layers report rows version zoo",
    "engines": "allocator core",
    "compare": "compare core nets synthesis quant methods evaluate api engines rows",
    "literature": "core api",
    "table": "core literature rows",
    "cli": "allocator cli core estimate layers nets methods evaluate api runtime compare engines report rows table "
    "torchrun zoo version",
    "__main__": "cli",
    "__init__": "api core evaluate methods nets version",
    "allocator": "",
    "torchrun": "",
    "version": "",
}
MORE = {"zoo/train.py": {"allocator", "evaluate"}}


def home(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever it stands in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: say the whole name"
            names |= {f"zsq.{each.name}" for each in node.names} if node.module == "zsq" else {node.module or ""}
        elif isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
    return names


def outside(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=where)
def test_imports_point_down(path):
    reached = {name.split(".")[1] for name in imported(path) if name.startswith("zsq.")}
    assert reached - set(ALLOWED[home(path)].split()) <= MORE.get(where(path), set())


@pytest.mark.parametrize("path", [path for path in FILES if home(path) == "core"], ids=where)
def test_core_needs_torch_alone(path):
    assert outside(path) <= {"zsq", "torch", *sys.stdlib_module_names}


def test_only_evaluate_opens_a_dataset():
    datasets = {"sklearn", "zipfile", "datasets", "torchvision.datasets"}
    assert [where(path) for path in FILES if imported(path) & datasets or "sklearn" in outside(path)] == ["evaluate.py"]
    readers = {where(path) for path in FILES if "zsq.evaluate" in imported(path)}
    assert readers == {
        "__init__.py",
        "api.py",
        "cli/runs.py",
        "compare/controls.py",
        "compare/grid.py",
        "compare/work.py",
        "runtime/verify.py",
        "zoo/train.py",
    }


@pytest.mark.parametrize("path", [path for path in FILES if where(path) != "core/run.py"], ids=where)
def test_global_randomness_is_left_alone(path):
    """Seeding torch is allowed where its state is put back: inside ``with torch.random.fork_rng(...)``."""
    tree = ast.parse(path.read_text())
    forked = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.With) and forks(node) for inner in walk(node)
    }
    seeds = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and id(node) not in forked
        if ast.unparse(node) in {"torch.manual_seed", "torch.seed", "np.random", "numpy.random"}
    ]
    assert seeds == []
    assert not imported(path) & {"random", "numpy.random"}


def walk(node: ast.With) -> list[ast.AST]:
    return [inner for line in node.body for inner in ast.walk(line)]


def forks(node: ast.With) -> bool:
    return any(ast.unparse(item.context_expr).startswith("torch.random.fork_rng(") for item in node.items)


def test_a_method_takes_no_class_of_another():
    for path in (ROOT / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zsq.methods."):
                assert all(each.name.isupper() or each.name.islower() for each in node.names), where(path)


def test_every_method_file_is_listed():
    files = {path.stem for path in (ROOT / "methods").glob("*.py")} - {"__init__"}
    assert files == {name.replace("-", "_") for name in {**METHODS, **BASELINES}}


def test_importing_zsq_is_cheap():
    heavy = {"torchvision", "timm", "onnx", "onnxruntime", "openvino", "nncf", "sklearn", "typer", "rich"}
    script = f"import sys, zsq, zsq.api; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    script = "import sys, zsq; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
