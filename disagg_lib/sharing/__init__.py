"""A run for others: pages, a crate, a submission tree, the kept example; redacted.

Comes in: a run folder. Goes out: files for readers, written whole or not at all, without names that are nobody's
business; and the check that tables and figures follow from the raw logs.
"""
