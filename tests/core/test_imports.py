"""Who may import whom. The contracts are in setup.cfg; here, fresh interpreters show what importing really loads."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = {"jax": ("jax", "jaxlib", "flax", "optax"), "torch": ("torch", "torchvision", "timm")}
CORE_MODULES = {"specs", "params", "backend", "recipe", "resample", "environment"}  # what the models may use of vitcmp
# What vitcmp's modules import beside the standard library and vitcmp itself, at their top or inside a function.
PACKAGES = {"numpy", "absl"}
EXTRA_PACKAGES = {
    "run": {"rich"},
    "report": {"rich"},
    "weight_files": {"safetensors", "torch"},
    "timm_hub": {"timm", "torch", "huggingface_hub"},
}
TINY = "vit_ti16:depth=1,width=48,num_heads=3,mlp_dim=96,num_classes=10,image_size=32x48"
CHILD = """
import importlib, json, sys
loaded = {{}}
for module in {modules}:
    importlib.import_module(module)
    loaded[module] = sorted(sys.modules.keys() & set({watched}))
print(json.dumps(loaded))
"""
FORWARD = """
import sys
sys.modules.update(dict.fromkeys({absent}))
import numpy as np, vitcmp
out = vitcmp.forward({backend!r}, {model!r}, vitcmp.init_weights({model!r}), np.zeros((1, 32, 48, 3)))
print(out["logits"].shape)
"""
MISSING = """
import sys
sys.modules.update(dict.fromkeys({absent}))
from vitcmp.backend import load_backend
try:
    load_backend({backend!r})
except ValueError as error:
    print(error)
"""


def run_fresh(code: str) -> str:
    """Runs the code in a new interpreter where warnings are errors, and returns what it printed."""
    command = [sys.executable, "-W", "error", "-c", code]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def loaded_by(modules: list[str], watched: tuple[str, ...]) -> dict[str, list[str]]:
    """Imports the modules, one after the other, and returns which of the watched are loaded after each."""
    return json.loads(run_fresh(CHILD.format(modules=modules, watched=watched)))


def modules_of(package: str) -> dict[str, Path]:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"{package}/ has no Python files"
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(path: Path) -> set[str]:
    """Returns the full names of what a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_importing_any_module_of_vitcmp_loads_no_framework():
    watched = (*PARTS["jax"], *PARTS["torch"], "jax_models", "torch_models")
    programs = {module for module in modules_of("vitcmp") if module.endswith(".__main__")}
    loaded = loaded_by([module for module in modules_of("vitcmp") if module not in programs], watched)
    for program in programs:  # each has the flags of a command line, so no two fit into one interpreter
        loaded |= loaded_by([program], watched)
    assert "vitcmp.specs" in loaded and "vitcmp.report.__main__" in loaded
    assert {module: names for module, names in loaded.items() if names} == {}


def test_importing_vitcmp_loads_nothing_that_only_the_command_line_needs():
    watched = ("rich", "absl", "safetensors", "subprocess", "vitcmp.run", "vitcmp.runner", "vitcmp.report")
    assert loaded_by(["vitcmp"], watched) == {"vitcmp": []}


@pytest.mark.parametrize(("backend", "other"), [("jax", "torch"), ("torch", "jax")])
def test_one_frameworks_models_do_not_load_the_other(backend, other):
    pytest.importorskip(backend)
    loaded = loaded_by([*modules_of(f"{backend}_models")], (*PARTS[other], f"{other}_models"))
    assert f"{backend}_models.backend" in loaded
    assert {module: names for module, names in loaded.items() if names} == {}


@pytest.mark.parametrize(("backend", "other"), [("jax", "torch"), ("torch", "jax")])
def test_one_framework_alone_runs_its_half(backend, other):
    pytest.importorskip(backend)
    assert run_fresh(FORWARD.format(absent=PARTS[other], backend=backend, model=TINY)) == "(1, 10)"


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_missing_framework_is_named_with_what_installs_it(backend):
    message = run_fresh(MISSING.format(absent=[backend], backend=backend))
    assert message.startswith(f"backend={backend}: the package {backend!r} is not installed")
    assert f"pip install 'vitcmp[{backend}]'" in message


@pytest.mark.parametrize("package", ["jax_models", "torch_models"])
def test_models_use_only_the_neutral_core(package):
    for module, path in modules_of(package).items():
        core = {name.split(".")[1] for name in imports_of(path) if name.split(".")[0] == "vitcmp"}
        assert core <= CORE_MODULES, module


def test_vitcmp_needs_only_numpy_and_absl():
    for module, path in modules_of("vitcmp").items():
        part = module.partition(".")[2].partition(".")[0]
        allowed = PACKAGES | EXTRA_PACKAGES.get(part, set()) | {"vitcmp"} | sys.stdlib_module_names
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed, module


def test_import_contracts_hold():
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    lint = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout + lint.stderr
