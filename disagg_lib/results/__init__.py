"""LoadGen's files in, values, verdicts, tables and figures out.

Comes in: run folders, published folders, folders that LoadGen wrote into. Goes out: one row a run, its verdict by the
rules of its round, the comparison with published runs, accuracy. Reads folders; writes only what `run` asks for.
"""
