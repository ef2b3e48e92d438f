"""Sample answers, judge them, and write the best against the worst as rows for train_dpo.py.

python scripts/make_pairs.py --model full_sft_512 --data_path prompts.jsonl --reward reward_model:out/reward_512 \\
    --out pairs.jsonl
python train_dpo.py --data_path pairs.jsonl

Best-of-n and iterative (on-policy) DPO are these two commands, the second time with --model dpo_512. A prompt is a
conversation, whose last turn is left out where it is the assistant's; rewards are those of docs/rewards.md. A prompt
gives no pair where no answer ended by itself, or where the best is no more than --min_gap better than the worst.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

from dataset import PROMPT, Message, load_tokenizer, parse_answer
from dataset.columns import Report
from dataset.encode import Rules, encode_row
from dataset.records import expand_paths, one_line, read_rows
from dataset.tokenizer import TextTokenizer
from evaluation import Reward
from evaluation.reward_model import judges
from model import GPT, load_pretrained
from model.adapter_folder import tokenizer_folder
from training.config import model_folder
from training.distributed import pick_to_answer
from training.groups import Group, Sampling
from training.rollout import roll_out

SAME = "all rewards alike, or no more than --min_gap apart"
UNENDED = "no answer ended by itself within --max_new_tokens"


class Judged(NamedTuple):
    """An answer of a prompt."""

    text: str  # with the names of control tokens
    ended: bool
    reward: float


def best_and_worst(answers: Sequence[Judged], min_gap: float) -> tuple[Judged, Judged] | str:
    """The answer to prefer, which ended by itself, and the one to prefer it to; or why there are none. Of equal ones
    the first.

    best_and_worst([Judged("a", True, 1.0), Judged("b", True, 0.0)], 0.5)  -> (Judged("a", ...), Judged("b", ...))
    """
    ended = [each for each in answers if each.ended]
    if not ended:
        return UNENDED
    best, worst = max(ended, key=lambda each: each.reward), min(answers, key=lambda each: each.reward)
    return SAME if best.reward - worst.reward <= min_gap else (best, worst)


def read_prompts(paths: Sequence[str], model: GPT, tokenizer: TextTokenizer, limit: int) -> tuple[list[Group], Report]:
    """The first `limit` (0: all) that fit into the model's context, without answers. Raises DataError for a bad row."""
    rules, report = Rules(PROMPT, model.config.max_seq_len), Report()
    prompts: list[Group] = []
    for row in read_rows(expand_paths(list(paths)), PROMPT):
        if limit and len(prompts) == limit:
            break
        if (tokens := encode_row(row, tokenizer, rules, report)) is not None:
            ids = tokens.columns["ids"]
            assert isinstance(ids, list)
            prompts.append(Group(len(prompts), len(prompts), ids, row.value, row.where, []))
    return prompts, report


def answered(
    prompts: Sequence[Group], model: GPT, tokenizer: TextTokenizer, reward: Reward, arguments: argparse.Namespace
) -> Iterator[tuple[Group, list[Judged]]]:
    """Each prompt with its answers, as many prompts at a time as --batch_size rows hold."""
    together = max(1, arguments.batch_size // arguments.n)
    how = Sampling(arguments.n, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    for start in tqdm(range(0, len(prompts), together), desc="answering", unit="batch", disable=None):
        groups = prompts[start : start + together]
        drawn = roll_out(model, tokenizer, [each.prompt for each in groups], [each.number for each in groups], how)
        for group, answers in zip(groups, drawn, strict=True):
            group.answers = answers
        samples = [sample for group in groups for sample in group.samples()]
        totals = reward(samples).total
        judged = [
            Judged(sample.answer, sample.finish_reason == "stop", total)
            for sample, total in zip(samples, totals, strict=True)
        ]
        for i, group in enumerate(groups):
            yield group, judged[i * how.group_size : (i + 1) * how.group_size]


def pair_row(messages: list[Message], best: Judged, worst: Judged) -> dict[str, Any]:
    """A row of form PAIR; its rewards stand beside it, and nobody learns from them."""
    sides = {"chosen": best, "rejected": worst}
    row: dict[str, Any] = {name: [*messages, parse_answer(each.text)] for name, each in sides.items()}
    return row | {"rewards": [best.reward, worst.reward]}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for what the user did wrong."""
    try:
        run(parse_arguments(argv))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError where no pair is left to write."""
    folder = model_folder(arguments.model, arguments.out_dir)
    device, dtype = pick_to_answer(arguments.device, arguments.dtype)
    reward = Reward(arguments.reward, arguments.reward_weights, judges(device))
    model, tokenizer = load_pretrained(folder, device, dtype), load_tokenizer(tokenizer_folder(folder))
    prompts, report = read_prompts(arguments.data_path, model, tokenizer, arguments.max_prompts)
    left_out, rewards = Counter(report.dropped), []
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")  # whole or not at all
    pairs = 0
    with part.open("w", encoding="utf-8") as file:
        for prompt, answers in answered(prompts, model, tokenizer, reward, arguments):
            rewards.append([each.reward for each in answers])
            found = best_and_worst(answers, arguments.min_gap)
            if isinstance(found, str):
                left_out[found] += 1
            else:
                pairs += 1
                file.write(json.dumps(pair_row(prompt.row["conversations"], *found), ensure_ascii=False) + "\n")
    print(f"{pairs:,} pairs of {len(prompts):,} prompts that fit, {arguments.n} answers each")
    print("".join(f"no pair for {count:,}: {reason}\n" for reason, count in left_out.items()), end="")
    if rewards:
        mean, best = (sum(each) / len(rewards) for each in (map(average, rewards), map(max, rewards)))
        print(f"reward: {mean:.4f} on average, {best:.4f} the best of {arguments.n}")
    if not pairs:
        part.unlink()
        raise ValueError(
            f"{' '.join(arguments.data_path)}: no pair is left to write; a higher --temperature or --n gives answers "
            "that differ more"
        )
    os.replace(part, out)
    print(f"written to {out}; python train_dpo.py --data_path {out}")


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises ValueError for a number out of range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="what answers: a folder, or the name of a run in --out_dir")
    add("--out_dir", default="out", help="where run folders live [out]")
    add("--data_path", nargs="+", required=True, metavar="FILE", help="prompts: files or globs of conversations")
    add("--out", required=True, metavar="FILE.jsonl", help="where pairs are written, whole or not at all")
    add("--reward", nargs="+", required=True, help="what answers are worth (docs/rewards.md)")
    add("--reward_weights", nargs="+", type=float, help="one for each reward [1]")
    add("--n", type=int, default=8, help="answers a prompt [8]")
    add("--min_gap", type=float, default=0.0, help="the best reward is to be more than so much above the worst [0]")
    add("--max_prompts", type=int, default=0, help="only the first so many prompts, 0: all [0]")
    add("--max_new_tokens", type=int, default=256, help="longest answer, tokens [256]")
    add("--temperature", type=float, default=1.0, help="of sampling [1]")
    add("--batch_size", type=int, default=64, help="answers at a time [64]")
    add("--seed", type=int, default=0, help="of sampling [0]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="[auto]")
    arguments = parser.parse_args(argv)
    if arguments.n < 2 or arguments.min_gap < 0 or arguments.batch_size < 1 or arguments.temperature <= 0:
        raise ValueError(
            "--n must be at least 2, --min_gap at least 0, --batch_size at least 1 and --temperature more than 0"
        )
    return arguments


if __name__ == "__main__":
    sys.exit(main())
