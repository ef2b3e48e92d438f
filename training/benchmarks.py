"""What a model gets right of benchmarks while it is trained: accuracies beside the losses of held-out rows.

    benchmarks.look(step=200)     {"bench_arc_easy": 0.31, "bench_lambada": 0.02, "bench_lambada_perplexity": 212.4}
    step 200, benchmarks: arc_easy 31.0% (24.9 to 37.9, chance 25.0%), lambada 2.0% ...

Items and judging are evaluation/benchmark.py's; ranks share the items, each with the whole network, which a sharded
engine gathers for so long.
"""

from dataset.tokenizer import TextTokenizer
from evaluation.benchmark import How, judge_items, read_files, scores_of
from evaluation.likelihood import Ranks
from training.config import Config
from training.engines.contract import Engine
from training.saver import Say

MOST_TOKENS = 128  # of a written answer


class Benchmarks:
    """Of one run. Every rank calls `look` at the same time."""

    def __init__(self, engine: Engine, config: Config, tokenizer: TextTokenizer, say: Say):
        """Raises DataError and FileNotFoundError for files that cannot be asked."""
        self.engine, self.tokenizer, self.say = engine, tokenizer, say
        self.how = How(config.chats, max_new_tokens=MOST_TOKENS, max_rows=config.benchmark_rows)
        self.items, _ = read_files(config.eval_benchmark, self.how)

    def look(self, step: int) -> dict[str, float]:
        """Accuracies of the model as it stands, of every task; and perplexities, where answers have one."""
        world = self.engine.world
        with self.engine.generator() as model:
            ranks = Ranks(world.rank, world.size, self.engine.gather)
            outcomes, _ = judge_items(model, self.tokenizer, self.items, self.how, ranks)
        scores = [each for each in scores_of(outcomes) if each.group == "task"]
        shown = (f"{each.name} {each.accuracy:.1%} ({100 * each.low:.1f} to {100 * each.high:.1f}, "
                 f"chance {each.chance:.1%})" for each in scores)  # fmt: skip
        self.say(f"step {step}, benchmarks: {', '.join(shown)}")
        found = {f"bench_{each.name}": each.accuracy for each in scores}
        for each in scores:
            if each.accuracy_by_length is not None:
                found[f"bench_{each.name}_by_length"] = each.accuracy_by_length
            if each.perplexity is not None:
                found[f"bench_{each.name}_perplexity"] = each.perplexity
        return found
