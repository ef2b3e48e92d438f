"""Conversations with a model, for whoever shows them. Prints nothing, and knows nothing of training."""

from serving.session import AnswerCut, ContextFull, Notice, Sampling, Session

__all__ = ["AnswerCut", "ContextFull", "Notice", "Sampling", "Session"]
