"""python3 FOLDER agent|client|search ARGUMENTS: a part of this room, from wherever its folder lies.

A run folder holds a copy as job/program; compute nodes have nothing else of ours.
"""

import importlib
import os
import sys

PARTS = ("agent", "client", "search")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        sys.exit(f"{sys.argv[0]}: needed is one of {', '.join(PARTS)}")
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, os.path.dirname(here))  # a package again: its parts import one another by its name
    sys.dont_write_bytecode = True  # the run folder keeps what was written into it
    part = importlib.import_module(f"{os.path.basename(here)}.{sys.argv[1]}")
    sys.exit(part.main(sys.argv[2:]))
