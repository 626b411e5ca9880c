"""Checkpoints of the released SparseCut code."""
