"""The model's checkpoint and the data set: fetched, verified, or made up for a rehearsal.

Comes in: a hub repository or a folder. Goes out: a verified folder, its manifest of digests, checks for 01.
"""
