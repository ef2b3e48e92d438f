"""Whether answers stay whole while a score rises: open prompts answered at the start and at every validation.

    answers.begin()           what the starting model answers, kept in Progress for the whole run
    answers.look()            {"val_ended": 0.62, "val_no_loops": 0.88, "val_distinct_2": 0.3, "val_answer_tokens": 71}
    answers.warn(record)      warning: answers to 16 held-out prompts fall apart at step 40: 62% end by themselves ...

The prompts are those of held-out rows that have open ones (preference pairs); where there are none, nothing happens.
"""

from dataset.tokenizer import TextTokenizer
from evaluation.health import answer_ids, health
from training.engines.contract import Engine
from training.metrics import Record
from training.saver import Progress, Say

MOST_TOKENS = 128  # of an answer
WORSE = 0.1  # a share that fell by so much since the start is worth a warning
LONGER = 2.0  # answers that many times as long as at the start, too


class Answers:
    """Of one run. Every rank calls every method at the same time."""

    def __init__(
        self, engine: Engine, tokenizer: TextTokenizer, prompts: list[list[int]], progress: Progress, say: Say
    ):
        self.engine, self.tokenizer, self.prompts = engine, tokenizer, prompts
        self.progress, self.say = progress, say

    def begin(self) -> None:
        """Ask the starting model, unless a resumed run knows what it answered."""
        if self.prompts and self.progress.step == 0:
            self.progress.answers = self.look()

    def look(self) -> dict[str, float]:
        """Health of greedy answers of the model as it stands; empty without prompts."""
        if not self.prompts:
            return {}
        with self.engine.generator() as model:
            found = None
            if self.engine.world.rank == 0:
                answers = answer_ids(model, self.tokenizer, self.prompts, max_new_tokens=MOST_TOKENS)
                found = {f"val_{name}": value for name, value in health(answers).items()}
        found = self.engine.gather(found)[0]
        assert found is not None
        return found

    def warn(self, record: Record) -> None:
        """Say where answers have become worse than the starting model's."""
        before = self.progress.answers
        if not before or "val_ended" not in record:
            return
        worse = [
            f"{record[name]:.0%} {what} ({before[name]:.0%} at the start)"
            for name, what in (("val_ended", "end by themselves"), ("val_no_loops", "are without a loop"))
            if record[name] < before[name] - WORSE
        ]
        length = record["val_answer_tokens"]
        if length > LONGER * before["val_answer_tokens"]:
            worse.append(f"they are {length:.0f} tokens long ({before['val_answer_tokens']:.0f} at the start)")
        if worse:
            self.say(
                f"warning: answers to {len(self.prompts)} held-out prompts fall apart at step {record['step']}: "
                f"{', '.join(worse)}; raise what keeps them (--nll_weight, --kl), or lower --learning_rate or --epochs"
            )
