"""A model taken elsewhere: folders, files and cards that other programs open. Knows nothing of training."""
