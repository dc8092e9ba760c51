"""The serving model: step times and scheduling rules, simulated in virtual time, and plans made with it.

Comes in: an Experiment, step-time tables, length distributions. Goes out: predicted TTFT, TPOT and the highest valid
QPS of a topology. Knows no Slurm, no HTTP, no run folder; all that comes out is `simulated`.
"""
