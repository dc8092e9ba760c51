"""python -m disagg_lib"""

from .command_line import main

main(prog_name="python -m disagg_lib")
