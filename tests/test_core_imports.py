"""The core stands alone: importing it needs jax and numpy, and it imports nothing of the laboratory around it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import forwardgrad

ROOT = Path(forwardgrad.__file__).parent
LABORATORY = ("adapters", "models", "data", "training", "cli", "presets", "diagnostics", "reproductions")
CORE = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] not in LABORATORY
    and path != ROOT / "__init__.py"  # may fetch from the laboratory when called: the first test below
)
HEAVY = ("flax", "optax", "orbax", "tyro", "rich", "matplotlib", "sklearn", "tensorboardX", "jaxtyping", "equinox")


def test_importing_needs_jax_and_numpy_alone():
    """And none of the others is imported where it is installed."""
    program = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None  # importing it raises
import forwardgrad as fg
import jax.numpy as jnp, jax
loss = lambda w: (w ** 2).sum()
value, grads = fg.value_and_grad(loss, guess=fg.rademacher())(jnp.ones(3), key=jax.random.key(0))
assert grads.shape == (3,)
assert "lg-fg-a" in fg.recipes.names()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imported(path):
    """Full names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_core_is_found():
    assert {
        "taps.py",
        "engine.py",
        "credit.py",
        "recipes/ren2023.py",
        "guesses/random.py",
        "losses/cross_entropy.py",
    } <= set(CORE)


@pytest.mark.parametrize("file", CORE)
def test_the_core_imports_nothing_of_the_laboratory(file):
    for name in imported(ROOT / file):
        own, _, rest = name.partition(".")
        if own == "forwardgrad":
            assert rest.split(".")[0] not in LABORATORY, f"{file} imports {name}"
        else:
            assert own in {"jax", "numpy", *sys.stdlib_module_names}, f"{file} imports {name}"


@pytest.mark.parametrize("file", CORE)
def test_private_names_of_jax_are_in_one_file(file):
    private = [name for name in imported(ROOT / file) if name.startswith("jax._")]
    assert not private or file == "taps.py"
