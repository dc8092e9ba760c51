"""The run folder: everything a run is made of, written before the job and read after it.

Comes in: an Experiment. Goes out: config.yaml, the job script, settings, the folder written whole, its manifest, and
tables of what it tells. Makes text and files; starts nothing.
"""
