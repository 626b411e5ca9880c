"""Evaluate a model: answers to questions, scores, their uncertainty, and ablation of shortcuts."""
