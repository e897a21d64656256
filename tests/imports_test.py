"""The layout of the package: who may import whom, what importing does, how large a file may be."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "moe_vlm_jax"

# Part of the package -> parts of the package that it may import, beside itself and OPEN.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "tree": set(),
    "batch": set(),
    "hlo": set(),
    "collectives": {"hlo"},
    "traffic": {"hlo"},
    "rendezvous": set(),
    "distributed": {"rendezvous"},
    "limits": {"config"},
    "expert_rules": {"config", "limits"},
    "validation": {"config", "limits", "expert_rules"},
    "sharding": {"config", "batch", "validation", "quant"},
    "cost": {"config", "hlo", "models"},
    "quant": {"tree"},
    "nn": {"quant", "sharding"},
    "moe": {"nn"},
    "models": {"moe", "nn", "quant"},
    "losses": {"batch"},
    "data": {"config", "batch"},
    "hf": {"models", "quant"},
    "training": {"models", "moe", "losses", "data", "hf", "cost", "quant", "assets", "analysis"},
    "ready": {"training", "models", "hf", "data"},
    "planning": {"training", "models", "quant", "cost", "collectives", "traffic"},
    "decoding": {"models", "nn", "quant"},
    "evaluation": {"decoding", "data"},
    "analysis": {"models", "data", "evaluation"},  # of evaluation: the frame of its pages
    "reporting": {"evaluation", "training", "models", "hf", "data"},
    "origins": set(),
    "preferences": {"evaluation", "decoding", "data", "ready", "origins"},
    "serving": {"decoding", "data", "ready", "origins"},
    "arguments": {"decoding", "ready"},
    "chain": {"config", "validation"},
    "command_line": {"config", "validation", "chain"},
    "assets": set(),
}
OPEN = {"config", "tree", "batch", "sharding", "validation", "distributed"}
# These stand below everything: what is open to all must not pull the rest in.
CLOSED = {
    *("config", "tree", "batch", "hlo", "collectives", "traffic", "rendezvous", "distributed", "limits"),
    "expert_rules",
    "validation",
    *("sharding", "cost", "losses", "data", "command_line", "chain", "assets", "origins"),
}
# Command lines may import anything, and nobody imports them.
COMMAND_LINES = {
    "train",
    "generate",
    "chat",
    "serve",
    "convert",
    "merge",
    "plan",
    "evaluate",
    "report",
    "analyze",
    "cluster_questions",
}

MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
PYTHON_FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("moe_vlm_jax", "tests", "benchmarks", "configs")
    for path in (ROOT / folder).rglob("*.py")
)


def part_of(module: pathlib.Path) -> str:
    """moe_vlm_jax/nn/mlp.py -> 'nn'; moe_vlm_jax/train.py -> 'train'; moe_vlm_jax/__init__.py -> ''."""
    parts = module.with_suffix("").parts[1:]
    return "" if parts == ("__init__",) else parts[0]


def imported_parts(source: str) -> set[str]:
    """Returns the parts of the package that a module imports, wherever in the file it does."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError("relative import: name the package")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("moe_vlm_jax.")}
    return parts


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_what_the_table_allows(module):
    part = part_of(module)
    imported = imported_parts((ROOT / module).read_text())
    assert not imported & COMMAND_LINES, "nobody imports a command line"
    if part in COMMAND_LINES:
        return
    assert part in ALLOWED or part == "", f"{part!r} is new: give it a row in the table"
    allowed = ALLOWED.get(part, set()) | {part} | (set() if part in CLOSED else OPEN)
    assert imported <= allowed, f"{module} may not import {sorted(imported - allowed)}"


def test_the_table_names_only_parts_that_exist():
    existing = {part_of(module) for module in MODULES}
    assert set(ALLOWED) | COMMAND_LINES <= existing


def test_the_import_walk_finds_imports_inside_functions():
    source = (
        "import moe_vlm_jax.nn.mlp\ndef f():\n    from moe_vlm_jax.hf import names\n    from moe_vlm_jax import tree\n"
    )
    assert imported_parts(source) == {"nn", "hf", "tree"}


@pytest.mark.slow
def test_importing_the_package_touches_no_device():
    # Command lines define the same flags, so each gets a process of its own.
    library = [module for module in MODULES if part_of(module) not in COMMAND_LINES]
    groups = [library, *([pathlib.Path("moe_vlm_jax", f"{name}.py")] for name in sorted(COMMAND_LINES))]
    processes = [start_import(group) for group in groups]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def start_import(modules: list[pathlib.Path]) -> subprocess.Popen:
    names = [".".join(module.with_suffix("").parts).removesuffix(".__init__") for module in modules]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was touched at import'\n"
    )
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_heavy_and_optional_packages_are_imported_where_they_are_used(module):
    body = ast.parse((ROOT / module).read_text()).body
    top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    heavy = {name.split(".")[0] for name in names}
    heavy &= {"torch", "transformers", "matplotlib", "pyarrow", "pandas", "libtpu"}
    assert not heavy, f"import {heavy} inside the function that needs it"


def test_one_module_imports_transformers():
    imported = re.compile(r"^\s*(import|from) transformers\b", re.MULTILINE)
    owners = [str(module) for module in MODULES if imported.search((ROOT / module).read_text())]
    assert owners == ["moe_vlm_jax/data/fast_tokenizers.py"], "make tokenizers there: its import is quiet and late"


def test_the_server_alone_needs_its_http_library():
    """Asking a model, also from the terminal or with a file of questions, works without the extra 'serve'."""
    found = {}
    for module in MODULES:
        imported = re.findall(r"^(?:import|from) (?:aiohttp|moe_vlm_jax\.serving import .*(?:service|running))\b",
                              (ROOT / module).read_text(), re.MULTILINE)  # fmt: skip
        found |= {str(module): len(imported)} if imported else {}
    assert set(found) == {"moe_vlm_jax/serving/service.py", "moe_vlm_jax/serving/running.py"}


def test_only_training_joins_a_cluster():
    """A cluster's variables stay in the environment of a shell in which somebody asks a question or merges."""
    joins = re.compile(r"\bdistributed\.(join|initialize)\(")
    found = {str(module): joins.findall((ROOT / module).read_text()) for module in MODULES}
    joining = {module: calls for module, calls in found.items() if calls}
    assert joining == {"moe_vlm_jax/distributed.py": ["initialize"], "moe_vlm_jax/train.py": ["join"]}


def test_no_file_of_the_package_is_longer_than_400_lines():
    long = {str(module): lines for module in MODULES if (lines := len((ROOT / module).read_text().splitlines())) > 400}
    assert not long, "split them"


def test_no_module_is_a_drawer_for_anything():
    drawers = re.compile(r"(utils?|helpers?|managers?|misc|common)$")
    named = [str(module) for module in MODULES if any(drawers.fullmatch(p) for p in module.with_suffix("").parts)]
    assert not named, "name a module after what is in it"


def test_no_file_names_a_machine():
    # A path or a package index that exists on one machine only.
    places = re.compile(r"(?<![\w.])/(?:home|root|opt|work|mnt)/[\w.]|https?://[\w.]*(?:pypi|pythonhosted|mirror)")
    found = []
    for path in PYTHON_FILES:
        for number, line in enumerate((ROOT / path).read_text().splitlines(), start=1):
            if path.name != "imports_test.py" and places.search(line):
                found.append(f"{path}:{number}: {line.strip()}")
    assert not found, found


def test_one_module_imports_matplotlib():
    imported = re.compile(r"^\s*(import|from) matplotlib\b", re.MULTILINE)
    owners = [str(module) for module in MODULES if imported.search((ROOT / module).read_text())]
    assert owners == ["moe_vlm_jax/analysis/drawing.py"]
