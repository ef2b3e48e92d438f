"""How good a model is: a folder's model and a file of rows in, numbers out. Knows nothing of training."""

from evaluation.scoring import Result, score_file

__all__ = ["Result", "score_file"]
