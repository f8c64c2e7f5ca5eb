"""Lower layers never import higher ones, and importing the package stays cheap (docs/architecture.md)."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flux_attention

PACKAGE = Path(flux_attention.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
RANKS = {
    name: rank
    for rank, names in enumerate(
        (
            ("config",),
            ("kernels",),
            ("modes",),
            ("router", "route", "cache"),
            ("models",),
            ("generation",),
            ("data",),
            ("training", "evaluation", "serving"),
            ("report",),
            ("cli", "__main__"),
        )
    )
    for name in names
}


DOCS = [
    "README.md",
    "docs/architecture.md",
    "docs/how-to/evaluate.md",
    "docs/how-to/serve-with-vllm.md",
    "docs/how-to/train-your-own.md",
]


def dotted(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Layers of this package that a module imports, anywhere in it, with the line."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            targets = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "flux_attention" and len(target) > 1:
                # A public name stands for the layer that defines it.
                layer = flux_attention._HOME.get(target[1], target[1]) if len(target) == 2 else target[1]
                yield layer.split(".")[0], node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(dotted(path)[1:]) or "flux_attention")
def test_imports_point_down(path):
    name = dotted(path)
    if name == ("flux_attention",):
        return  # its lazy table names every layer
    assert name[1] in RANKS, f"{path.name}: a new layer; give it its place in docs/architecture.md and here"
    for layer, line in imports(path):
        if layer.startswith("__"):
            continue  # __version__ and the like
        assert layer in RANKS, f"{path}:{line} imports {layer}, which has no place in the architecture"
        assert RANKS[layer] <= RANKS[name[1]], f"{path}:{line}: {name[1]} must not import {layer}"


def test_a_wrong_import_is_found(tmp_path, monkeypatch):
    wrong = PACKAGE / "config.py"
    seen = wrong.read_text() + "\ndef f():\n    from .cache import FluxCache\n    from flux_attention import attach\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: seen)
    assert {layer for layer, _ in imports(wrong)} == {"cache", "models"}


@pytest.mark.parametrize("page", DOCS, ids=str)
def test_pages_name_files_that_are_there(page):
    root = Path(__file__).resolve().parents[2]
    there = {
        path.name for folder in ("src", "tests", "recipes", "benchmarks") for path in (root / folder).rglob("*.py")
    }
    named = re.findall(r"`([\w/]+\.py)`", (root / page).read_text(encoding="utf-8"))
    assert {name for name in named if name.rsplit("/")[-1] not in there} == set()


def test_public_names_are_listed_once():
    assert sorted(flux_attention._HOME) == flux_attention.__all__
    assert set(flux_attention.__all__) <= set(dir(flux_attention))
    with pytest.raises(AttributeError, match=r"no attribute 'atach'.*attach"):
        flux_attention.atach  # noqa: B018


OPTIONAL = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "flash_attn",
    "gguf",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "rich",
    "triton",
    "typer",
}

# torch and transformers import triton and others themselves where they find them, so what counts is who asks.
WATCH = """
import builtins
asked, real = set(), builtins.__import__
def watching(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and str((globals or {}).get("__name__")).startswith("flux_attention"):
        asked.add(name.split(".")[0])
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = watching
"""


def in_fresh_process(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_bare_import_loads_nothing_heavy():
    loaded = in_fresh_process("import sys, flux_attention; print(*sys.modules)")
    assert "flux_attention" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "vllm", *OPTIONAL}


def test_public_names_need_no_optional_package():
    asked = in_fresh_process(f"{WATCH}\nfrom flux_attention import *\nprint(*asked)")
    assert "torch" in asked  # the watch works
    assert not asked & {"vllm", *OPTIONAL}
