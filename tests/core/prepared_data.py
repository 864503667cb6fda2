"""Datasets that tests prepare, and Python in a process of its own that reads them."""

import os
import subprocess
import sys
from pathlib import Path

from experiments.capacity.data import builders

ROOT = Path(__file__).parents[2]


def prepared(builder, folder, file_format="array_record"):
    return builders.prepare(lambda: builder(data_dir=folder, file_format=file_format))


def run(code, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, **options)
