"""Executes notebooks top to bottom with this interpreter; a failing cell fails the run.

python .ci/notebooks.py colab/*.ipynb            # what CI does
python .ci/notebooks.py --write colab/*.ipynb    # keeps the outputs, for readers who only look
"""

from __future__ import annotations

import argparse
import tempfile

import nbformat
from nbclient import NotebookClient

parser = argparse.ArgumentParser()
parser.add_argument("paths", nargs="+")
parser.add_argument("--write", action="store_true")
arguments = parser.parse_args()
for path in arguments.paths:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which would differ in every commit
    if arguments.write:
        nbformat.write(notebook, path)
    print(f"{path}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran")
