"""What the quickstart's three stages did: model folders in, one table, two answers and the next line to type out.

    out/quickstart/{pretrain,full_sft,dpo}_128  ->  \
stage      seconds   bits per byte   exact match   preference accuracy
                                                    \
pretrain       240            0.21         0.0 %                48.4 %
                                                    ...

Everything is measured on rows that no stage was trained on (dataset/sample/make_sample.py says how they are kept out).
Exits with 1 where a goal of the quickstart is missed.

    python scripts/quickstart_report.py --out_dir out/quickstart --seconds 240 90 60
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console
from rich.table import Table

from dataset import Message, load_tokenizer
from dataset.records import one_line
from dataset.sample.make_sample import facts_right, known_answers, open_prompts
from evaluation.health import answer as answers_of
from evaluation.health import health
from evaluation.scoring import Result, score_file
from model import load_pretrained

STAGES = ("pretrain", "full_sft", "dpo")  # of scripts/quickstart.sh
SAMPLE = Path(__file__).parent.parent / "dataset" / "sample"
MEASURED = {  # file of held-out rows -> (number of evaluation.scoring, title of its column)
    "pretrain_heldout.jsonl": ("bits_per_byte", "bits per byte"),
    "questions.jsonl": ("exact_match", "exact match"),
    "dpo_heldout.jsonl": ("accuracy", "preference accuracy"),
}
LONGEST_ANSWER = 48  # tokens; the right answers have at most 20
PROMPTS = ("Translate: five white elephants under the bridge", "介绍一下白象。")  # about a kept-out (colour, animal)
TEMPERATURES = (0.0, 0.7)  # at which open prompts are answered
HEALTH = {"ended": "end by themselves", "no_loops": "no loops", "facts": "facts right", "known": "known answers kept"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--seconds", type=int, nargs=len(STAGES), help="how long each stage took")
    arguments = parser.parse_args()
    folders = [newest(arguments.out_dir, stage) for stage in STAGES]
    scores = [measure(folder) for folder in folders]
    open_answers = {(folder.name, t): judge(folder, t) for folder in folders[1:] for t in TEMPERATURES}
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table(scores, arguments.seconds or ["-"] * len(STAGES)))
    console.print(health_table(open_answers))
    console.print("Measured on held-out rows and prompts alone. Two answers, before and after DPO:\n")
    for prompt in PROMPTS:
        console.print(f"  [bold]{prompt}")
        for folder in folders[1:]:
            console.print(f"    {folder.name:14} {answer(folder, prompt)}", markup=False)
    console.print(f"\nPlots: {', '.join(str(folder / 'loss.png') for folder in folders)}", soft_wrap=True)
    console.print(f"Chat:  source .venv/bin/activate && python eval_model.py --model {folders[-1]}\n", soft_wrap=True)
    missed = goals_missed(scores, list(open_answers.values()))
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


def table(scores: list[Result], seconds: Sequence[int | str]) -> Table:
    """One line a stage; a number is bold where the stage was trained for it."""
    grid = Table("stage", "seconds", *(title for _, title in MEASURED.values()))
    for column in grid.columns[1:]:
        column.justify = "right"
    for i, (stage, score, spent) in enumerate(zip(STAGES, scores, seconds, strict=True)):
        cells = [f"{score['bits_per_byte']:.3f}", f"{score['exact_match']:.1%}", f"{score['accuracy']:.1%}"]
        cells[i] = f"[bold green]{cells[i]}"
        grid.add_row(stage, str(spent), *cells)
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


def goals_missed(scores: list[Result], open_answers: list[Result]) -> list[str]:
    """What the quickstart promises and did not reach, in words. `open_answers`: of SFT, then of DPO, by temperature."""
    _, sft, dpo = scores
    before, after = open_answers[: len(TEMPERATURES)], open_answers[len(TEMPERATURES) :]
    goals = {
        "exact match of at least 90 % after SFT": sft["exact_match"] >= 0.90,
        "preference accuracy of at most 65 % before DPO": sft["accuracy"] <= 0.65,
        "preference accuracy of at least 95 % after DPO": dpo["accuracy"] >= 0.95,
        "exact match at most 1 point lower after DPO": dpo["exact_match"] >= sft["exact_match"] - 0.01,
        "after DPO every open answer ends by itself": all(found["ended"] == 1 for found in after),
        "after DPO no open answer loops": all(found["no_loops"] == 1 for found in after),
        # 64 answers are drawn at each temperature, and a draw of the same model differs by some points
        "facts right after DPO as often as before (2 points for luck)": all(
            b["facts"] >= a["facts"] - 0.02 for a, b in zip(before, after, strict=True)
        ),
        "known answers kept after DPO (2 points)": after[0]["known"] >= before[0]["known"] - 0.02,
    }
    return [goal for goal, reached in goals.items() if not reached]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
