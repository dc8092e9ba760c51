"""python -m disagg_lib"""

from .pipeline import main

main(prog_name="python -m disagg_lib")
