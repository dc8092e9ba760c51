"""python tests/example.py: rehearse by the default parameters, and keep the small files of it, redacted, in results/ (4 minutes)."""

import shutil
import tempfile
from pathlib import Path

from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.run_all import run_chain
from disagg_lib.sharing.example import export_example, refuse_foreign

EXAMPLE = REPOSITORY / "results/example_rehearsal"

if __name__ == "__main__":
    refuse_foreign(EXAMPLE)  # before the minutes, not after
    scratch = Path(tempfile.mkdtemp(prefix="example-"))  # stays if the run fails: its logs say why
    run = run_chain(["params/rehearsal.yaml"], {}, str(scratch / EXAMPLE.name), with_plan=True)
    print(export_example(run, EXAMPLE).text())
    shutil.rmtree(scratch)
