"""The files a user writes: recipes and studies, checked against their schema. Knows nothing of
torch.
"""
