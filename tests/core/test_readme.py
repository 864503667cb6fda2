"""The README's Python does what it says: its blocks are run, in order, as one program."""

import re
from pathlib import Path

import numpy as np
import pytest

from vitcmp.compare import Comparison

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_readmes_python_runs(capsys):
    for package in ("jax", "torch", "timm"):
        pytest.importorskip(package)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert np.abs(names["a"]["logits"] - names["b"]["logits"]).max() < 1e-4
    assert isinstance(names["result"], Comparison)
    assert "ours / theirs" in capsys.readouterr().out
