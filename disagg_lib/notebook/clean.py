"""python -m disagg_lib.notebook.clean: git's clean filter for notebooks/, from standard input to standard output.

JupyterLab saves as it goes: outputs, counts, the kernel's version, absolute paths. None of it is the notebook's source, so
`make lab` has git read the files through this (.gitattributes names it), and a Run All changes nothing that git sees.
"""

import json
import sys

KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT_OF_A_CELL = ("tags", "jupyter")


def clean_text(text: str) -> str:
    """A notebook's source as the repository keeps it: keys in order, no outputs, no counts, no trace of a machine."""
    notebook = json.loads(text)
    notebook["metadata"] = KERNEL
    for cell in notebook["cells"]:
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name in KEPT_OF_A_CELL}
        if isinstance(cell["source"], str):
            cell["source"] = cell["source"].splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    sys.stdout.write(clean_text(sys.stdin.read()))
