"""Executes notebooks top to bottom with this interpreter; a failing cell fails the run."""

from __future__ import annotations

import os
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # The first cell installs specjax where it is missing; here it is the wheel under test.
        os.environ["SPECJAX_INSTALLED"] = "1"
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    print(f"{path}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran")
