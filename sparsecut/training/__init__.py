"""Training by a recipe: stage after stage, each one Hugging Face Trainer."""
