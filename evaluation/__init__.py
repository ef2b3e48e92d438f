"""How good a model is: a folder's model and a file of rows in, numbers out; what an answer is worth, and the tools it
may call. Knows nothing of training."""

from typing import TYPE_CHECKING

from dataset.later import later

if TYPE_CHECKING:
    from evaluation.rewards import Reward, Sample
    from evaluation.scoring import Result, score_file
else:  # scores need torch; rewards and tools do without
    __getattr__ = later(
        {
            "evaluation.rewards": ("Reward", "Sample"),
            "evaluation.scoring": ("Result", "score_file"),
        }
    )

__all__ = ["Result", "Reward", "Sample", "score_file"]
