"""Stages of training, one Hugging Face Trainer each."""
