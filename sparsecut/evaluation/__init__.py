"""Answers, scores, and how certain they are."""
