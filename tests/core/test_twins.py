"""jax_models and torch_models tell one model twice: the same files, the same definitions in the same order."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# No twins: these speak to the framework itself, to its devices and clocks (backend.py) or to its own graph (flops.py).
NO_TWINS = {"backend.py", "flops.py"}
# One thing by its name in torch and in JAX.
SAME_NAME = {"forward": "__call__", "torch_name": "flax_name"}


def files_of(package: str) -> list[str]:
    return sorted(path.name for path in (ROOT / package).glob("*.py"))


def twins_of(package: str, framework: str) -> list[str]:
    """Leaves out files whose first line, a comment `# torch:` or `# jax:`, says why only this framework has them."""
    return [
        name for name in files_of(package) if not (ROOT / package / name).read_text().startswith(f"# {framework}: ")
    ]


def definitions(source: str, framework: str) -> dict[str, bool]:
    """Returns the classes, methods (`Block.__call__`) and functions of a file in their order.

    True where a comment `# torch:` or `# jax:` in it, or right above it, says why this framework differs.
    """
    lines = source.splitlines()
    return dict(walk(ast.parse(source), lines, mark=f"# {framework}: "))


def walk(
    parent: ast.Module | ast.ClassDef, lines: list[str], *, mark: str, prefix: str = ""
) -> Iterator[tuple[str, bool]]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = prefix + SAME_NAME.get(node.name, node.name)
            yield name, any(mark in line for line in lines[start_of(node, lines) : node.end_lineno])
            if isinstance(node, ast.ClassDef):
                yield from walk(node, lines, mark=mark, prefix=f"{name}.")


def start_of(node: ast.ClassDef | ast.FunctionDef, lines: list[str]) -> int:
    """Returns the index of a definition's first line, its decorators and the comment above them included."""
    start = min(part.lineno for part in (node, *node.decorator_list)) - 1
    while start and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return start


def without_explained(ours: dict[str, bool], theirs: dict[str, bool]) -> list[str]:
    """Leaves out what only one twin has, with its methods, if it says why."""
    explained = tuple(name for name, is_marked in ours.items() if is_marked and name not in theirs)
    return [name for name in ours if name not in explained and not name.startswith(tuple(f"{e}." for e in explained))]


def compare(jax_source: str, torch_source: str) -> tuple[list[str], list[str]]:
    ours, theirs = definitions(jax_source, "jax"), definitions(torch_source, "torch")
    return without_explained(ours, theirs), without_explained(theirs, ours)


def test_both_packages_have_the_same_files_but_for_those_that_say_why():
    assert twins_of("jax_models", "jax") == twins_of("torch_models", "torch")
    assert set(files_of("jax_models")) >= NO_TWINS | {"layers.py", "vit.py", "vitdet.py", "resnet.py", "convnext.py"}


@pytest.mark.parametrize("name", sorted({*twins_of("jax_models", "jax")} - NO_TWINS - {"__init__.py"}))
def test_twins_define_the_same_things_in_the_same_order(name):
    jax, torch = compare(*((ROOT / package / name).read_text() for package in ("jax_models", "torch_models")))
    assert jax
    assert jax == torch


@pytest.mark.parametrize(
    ("torch_source", "is_twin"),
    [
        ("class A:\n    def forward(self): pass\n    def b(self): pass\ndef c(): pass", True),
        ("class A:\n    def b(self): pass\n    def forward(self): pass\ndef c(): pass", False),
        ("def c(): pass\nclass A:\n    def forward(self): pass\n    def b(self): pass", False),
        ("class A:\n    def forward(self): pass\ndef c(): pass", False),
        ("class A:\n    def forward(self): pass\n    def b(self): pass\ndef c(): pass\ndef d(): pass", False),
        (
            "class A:\n    def forward(self): pass\n    def b(self): pass\ndef c(): pass\n# torch: why\ndef d(): pass",
            True,
        ),
        ("class A:\n    def forward(self): pass\n    def b(self):  # torch: why\n        pass\ndef c(): pass", True),
    ],
)
def test_a_difference_between_twins_is_seen_unless_explained(torch_source, is_twin):
    jax_source = "class A:\n    def __call__(self): pass\n    def b(self): pass\ndef c(): pass"
    jax, torch = compare(jax_source, torch_source)
    assert (jax == torch) is is_twin
