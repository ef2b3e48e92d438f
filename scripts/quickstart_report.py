"""What the quickstart's stages did: model folders in, three tables, two answers and the next line to type out.

    out/quickstart/{pretrain,full_sft,dpo,grpo}_128  ->  \
stage      seconds   bits per byte   exact match   preference accuracy   pass@1
                                                    \
pretrain       240            0.21         0.0 %                48.4 %        -
                                                    ...

Everything is measured on rows that no stage was trained on (dataset/sample/make_sample.py says how they are kept out).
Exits with 1 where a goal of the quickstart is missed.

    python scripts/quickstart_report.py --out_dir out/quickstart --seconds 240 90 60 60
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console
from rich.table import Table

from dataset import Message, load_tokenizer, render_chat
from dataset.records import one_line
from dataset.sample.make_sample import facts_right, known_answers, open_prompts
from evaluation import Reward, Sample
from evaluation.health import answer as answers_of
from evaluation.health import health
from evaluation.scoring import Result, score_file
from model import load_pretrained
from training.groups import Sampling
from training.rollout import pass_at, roll_out

STAGES = ("pretrain", "full_sft", "dpo", "grpo")  # of scripts/quickstart.sh
SAMPLE = Path(__file__).parent.parent / "dataset" / "sample"
MEASURED = {  # file of held-out rows -> (number of evaluation.scoring, title of its column)
    "pretrain_heldout.jsonl": ("bits_per_byte", "bits per byte"),
    "questions.jsonl": ("exact_match", "exact match"),
    "dpo_heldout.jsonl": ("accuracy", "preference accuracy"),
}
LONGEST_ANSWER = 48  # tokens; the right answers have at most 20
PROMPTS = ("Translate: five white elephants under the bridge", "介绍一下白象。")  # about a kept-out (colour, animal)
TEMPERATURES = (0.0, 0.7)  # at which open prompts are answered
DRAWN = Sampling(group_size=16, max_new_tokens=64, temperature=1.0, seed=0)  # answers to every open prompt
TOGETHER = 16  # prompts
HEALTH = {"ended": "end by themselves", "no_loops": "no loops", "facts": "facts right", "known": "known answers kept"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--seconds", type=int, nargs=len(STAGES), help="how long each stage took")
    arguments = parser.parse_args()
    folders = dict(zip(STAGES, (newest(arguments.out_dir, stage) for stage in STAGES), strict=True))
    chats = STAGES[1:]
    scores = {stage: measure(folder) for stage, folder in folders.items()}
    open_answers = {(stage, t): judge(folders[stage], t) for stage in chats for t in TEMPERATURES}
    drawn = {stage: draw(folders[stage]) for stage in chats}
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table(scores, drawn, arguments.seconds or ["-"] * len(STAGES)))
    console.print(health_table(open_answers))
    console.print(drawn_table(drawn))
    console.print("Measured on held-out rows and prompts alone. Two answers of each model that chats:\n")
    for prompt in PROMPTS:
        console.print(f"  [bold]{prompt}")
        for stage in chats:
            console.print(f"    {stage:10} {answer(folders[stage], prompt)}", markup=False)
    console.print(f"\nPlots: {', '.join(str(each / 'loss.png') for each in folders.values())}", soft_wrap=True)
    console.print(
        f"Chat:  source .venv/bin/activate && python eval_model.py --model {folders['dpo']}\n"
        f"Page:  python scripts/serve.py --model {folders['full_sft']} {folders['dpo']}\n",
        soft_wrap=True,
    )
    missed = goals_missed(scores, open_answers, drawn)
    for goal in missed:
        print(f"goal missed: {goal}", file=sys.stderr)
    return 1 if missed else 0


def newest(out_dir: Path, stage: str) -> Path:
    """The stage's model folder. Raises FileNotFoundError where there is none."""
    found = sorted(out_dir.glob(f"{stage}_*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{out_dir}/{stage}_*: no model there; run `bash scripts/quickstart.sh` first")
    return found[-1].parent


def measure(folder: Path) -> Result:
    """The three numbers of one model, by their names in evaluation.scoring."""
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    results = {
        name: score_file(model, tokenizer, SAMPLE / name, batch_size=64, max_new_tokens=LONGEST_ANSWER)
        for name in MEASURED
    }
    return {number: results[name][number] for name, (number, _) in MEASURED.items()}


def judge(folder: Path, temperature: float) -> Result:
    """Health of the answers to the kept-out open prompts of the sample world, and the share whose facts are right."""
    model, tokenizer, prompts = load_pretrained(folder), load_tokenizer(folder), open_prompts()
    asked = [[user(prompt.question)] for prompt in prompts]
    found = answers_of(model, tokenizer, asked, max_new_tokens=96, temperature=temperature, batch_size=64)
    right = [facts_right(prompt, each.text) for prompt, each in zip(prompts, found, strict=True)]
    judged = health(found) | {"facts": sum(right) / len(right)}
    if temperature:
        return judged
    questions, expected = zip(*known_answers(), strict=True)
    said = answers_of(model, tokenizer, [[user(q)] for q in questions], max_new_tokens=96, batch_size=64)
    kept = [each.text == text for each, text in zip(said, expected, strict=True)]
    return judged | {"known": sum(kept) / len(kept)}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(folder: Path, prompt: str) -> str:
    """The likeliest answer."""
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    (found,) = answers_of(model, tokenizer, [[user(prompt)]], max_new_tokens=96)
    return found.text


def draw(folder: Path) -> Result:
    """What is drawn in answer to the kept-out open prompts: pass@1 and pass@8 by the valley's own judge, the share of
    different answers among those to one prompt, entropy in nats a token."""
    model, tokenizer, prompts = load_pretrained(folder), load_tokenizer(folder), open_prompts()
    ids = [render_chat(tokenizer, [user(each.question)], add_generation_prompt=True).ids for each in prompts]
    groups = [
        group
        for first in range(0, len(ids), TOGETHER)
        for group in roll_out(
            model, tokenizer, ids[first : first + TOGETHER], range(first, min(first + TOGETHER, len(ids))), DRAWN
        )
    ]
    reward, size = Reward(["world"]), DRAWN.group_size
    right = [
        sum(reward([Sample([user(prompt.question)], each.text, {}, each.finish_reason) for each in group]).total)
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    said = [each for group in groups for each in group]
    return {f"pass@{k}": sum(pass_at(k, int(each), size) for each in right) / len(right) for k in (1, 8)} | {
        "distinct": sum(len({each.text for each in group}) for group in groups) / len(said),
        "entropy": sum(each.entropy for each in said) / sum(len(each.logps) for each in said),
    }


def table(scores: dict[str, Result], drawn: dict[str, Result], seconds: Sequence[int | str]) -> Table:
    """One line a stage; a number is bold where the stage was trained for it."""
    grid = Table("stage", "seconds", *(title for _, title in MEASURED.values()), "pass@1")
    for column in grid.columns[1:]:
        column.justify = "right"
    for i, ((stage, score), spent) in enumerate(zip(scores.items(), seconds, strict=True)):
        cells = [f"{score['bits_per_byte']:.3f}", f"{score['exact_match']:.1%}", f"{score['accuracy']:.1%}"]
        cells.append(f"{drawn[stage]['pass@1']:.1%}" if stage in drawn else "-")
        cells[i] = f"[bold green]{cells[i]}"
        grid.add_row(stage, str(spent), *cells)
    return grid


def drawn_table(drawn: dict[str, Result]) -> Table:
    """What is right more often is said in fewer ways: both, of answers drawn at temperature 1."""
    grid = Table("open answers at temperature 1", "pass@1", "pass@8", "different answers", "entropy (nats a token)")
    for column in grid.columns[1:]:
        column.justify = "right"
    for stage, found in drawn.items():
        shares = (f"{found[name]:.1%}" for name in ("pass@1", "pass@8", "distinct"))
        grid.add_row(stage, *shares, f"{found['entropy']:.3f}")
    return grid


def health_table(open_answers: dict[tuple[str, float], Result]) -> Table:
    """A preference score can rise while answers fall apart: what open prompts are answered with, beside it."""
    grid = Table("answers to open prompts", *HEALTH.values())
    for column in grid.columns[1:]:
        column.justify = "right"
    for (name, temperature), found in open_answers.items():
        how = f"temperature {temperature}" if temperature else "likeliest"
        grid.add_row(f"{name}, {how}", *(f"{found[key]:.1%}" if key in found else "-" for key in HEALTH))
    return grid


def goals_missed(
    scores: dict[str, Result], open_answers: dict[tuple[str, float], Result], drawn: dict[str, Result]
) -> list[str]:
    """What the quickstart promises and did not reach, in words."""
    sft, dpo, grpo = (scores[stage] for stage in STAGES[1:])

    def of(stage: str, name: str) -> list[float]:
        """Of answers to open prompts, at every temperature where it was measured."""
        return [open_answers[stage, t][name] for t in TEMPERATURES if name in open_answers[stage, t]]

    goals = {
        "exact match of at least 90 % after SFT": sft["exact_match"] >= 0.90,
        "preference accuracy of at most 65 % before DPO": sft["accuracy"] <= 0.65,
        "preference accuracy of at least 95 % after DPO": dpo["accuracy"] >= 0.95,
        "exact match at most 1 point lower after DPO": dpo["exact_match"] >= sft["exact_match"] - 0.01,
        "known answers kept after DPO (2 points)": of("dpo", "known")[0] >= of("full_sft", "known")[0] - 0.02,
        "pass@1 of at least 85 % after GRPO": drawn["grpo"]["pass@1"] >= 0.85,
        "exact match at most 1 point lower after GRPO": grpo["exact_match"] >= sft["exact_match"] - 0.01,
    }
    for name, stage in (("DPO", "dpo"), ("GRPO", "grpo")):
        goals |= {
            f"after {name} every open answer ends by itself": min(of(stage, "ended")) == 1,
            f"after {name} no open answer loops": min(of(stage, "no_loops")) == 1,
            # of 64 answers; those that are drawn differ by some points from one draw of a model to the next
            f"facts right after {name} as often as before (2 points; 4 for the luck of drawn ones)": all(
                b >= a - (0.04 if t else 0.02)
                for t, a, b in zip(TEMPERATURES, of("full_sft", "facts"), of(stage, "facts"), strict=True)
            ),
        }
    return [goal for goal, reached in goals.items() if not reached]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
