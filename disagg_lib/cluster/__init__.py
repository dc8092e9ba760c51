"""The only room that starts jobs or asks Slurm.

Comes in: a run folder, an Experiment. Goes out: submitted, followed and cancelled jobs; checks before the queue; what
the setup jobs found (compute node, image, client environment); params/site.yaml.
"""
