"""Type-check the notebooks: their code cells, one after the other, as a program that pyright reads.

    python scripts/check_notebooks.py notebooks

Ends with pyright's exit status. Line numbers are those of the program, where each cell begins with its notebook and
number.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def program(notebook: Path) -> str:
    """Concatenate a notebook's code cells to one program; expressions that a notebook would display are allowed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = ["# pyright: reportUnusedExpression=false"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            parts.append(f"# {notebook.name}, cell {number}\n{''.join(cell['source'])}")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns pyright's exit status, or 2 where there is no notebook."""
    parser = argparse.ArgumentParser(description="Type-check the code cells of all notebooks in a folder.")
    parser.add_argument("folder", type=Path)
    notebooks = sorted(parser.parse_args(argv).folder.glob("*.ipynb"))
    if not notebooks:
        print("no notebook there", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        for notebook in notebooks:
            Path(folder, f"{notebook.stem}.py").write_text(program(notebook), encoding="utf-8")
        command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, folder]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
