"""Parameters in, one frozen Experiment out, with its topology and where each value came from.

Comes in: params files, values given by hand. Goes out: `Experiment`, its servers on ranks, GPUs and nodes, and the text
of experiment.yaml. Knows no run folder, no Slurm, no server.
"""
