"""python -m disagg_lib.rehearsal: the stand-in for `trtllm-serve`."""

import sys

from .server import main

sys.exit(main(sys.argv[1:]))
