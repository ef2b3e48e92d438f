"""Write tasks for lm-evaluation-harness that ask what `eval_model.py --raw --benchmark FILES` asks, word for word.

python scripts/lm_eval_tasks.py arc_easy.jsonl lambada.jsonl --out tasks
lm_eval run --model hf --model_args pretrained=out/pretrain_512,dtype=float32 --include_path tasks --tasks seedling

So its numbers can be held against ours, and its other models against the same rows. A file holds items of one task,
kind and language; they are asked without examples.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import yaml

from dataset.records import expand_paths, one_line
from evaluation.items import GO_ON, WORDS, Item, read_items

GROUP = "seedling"
QUESTION = """\
{{% if "\\n{word}" in "\\n" ~ question %}}{{% else %}}{asks}{{% endif %}}{{{{question}}}}
{answers}"""
BEGINNINGS = "[{% for each in choices %}{{each[:each|length - suffix|length].__repr__()}}, {% endfor %}]"
METRICS: dict[str, list[dict[str, object]]] = {
    "choice": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    "cloze": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
    "generate": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
OUTPUTS = {"choice": "multiple_choice", "cloze": "loglikelihood", "generate": "generate_until"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the tasks, one file each")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest written answer, tokens [256]")
    arguments = parser.parse_args(argv)
    try:
        for path in expand_paths(arguments.files):
            task = task_of(path, arguments.max_new_tokens)
            file = Path(arguments.out) / f"{task['task']}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(task, allow_unicode=True, sort_keys=False), encoding="utf-8")
            print(f"{path}: task {task['task']} in {file}")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def task_of(path: str, max_new_tokens: int) -> dict[str, object]:
    """A task as lm-evaluation-harness reads it. Raises ValueError for a file of several tasks, kinds or languages."""
    items = read_items(path)
    first = items[0]
    forms = {(each.task, each.kind, each.lang, bool(each.suffix), bool(each.question)) for each in items}
    if len(forms) > 1:
        raise ValueError(f"{path}: found items of several forms ({sorted(forms)[:2]}), expected one task a file")
    return {
        "task": f"{GROUP}_{first.task}",
        "tag": GROUP,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(path).resolve())}},
        "test_split": "test",
        "output_type": OUTPUTS[first.kind],
        **asked(first),
        **({"generation_kwargs": generation(first, max_new_tokens)} if first.kind == "generate" else {}),
        "metric_list": METRICS[first.kind][: 1 if first.suffix else None],  # what is judged has one length there
        "metadata": {"version": 1},
    }


def asked(item: Item) -> dict[str, object]:
    """What is read and what is judged, as `evaluation.items.prompts` has it."""
    if item.suffix:  # the contexts differ, and what is judged does not
        return {
            "doc_to_text": "{{answer}}", "doc_to_choice": BEGINNINGS, "doc_to_target": "{{suffix}}",
            "target_delimiter": "",
        }  # fmt: skip
    asks, answers = WORDS[item.lang]
    plain = item.kind == "cloze" or item.task in GO_ON
    text = "{{question}}" if plain else QUESTION.format(word=asks.strip(), asks=asks, answers=answers)
    if item.kind == "choice":
        return {"doc_to_text": text, "doc_to_choice": "choices", "doc_to_target": "answer"}
    return {"doc_to_text": text, "doc_to_target": "{{' ' ~ answer}}" if item.kind == "cloze" else "{{answer}}"}


def generation(item: Item, max_new_tokens: int) -> dict[str, object]:
    until = [f"\n{WORDS[item.lang][0].strip()}"]
    return {"until": until, "do_sample": False, "max_gen_toks": max_new_tokens}


if __name__ == "__main__":
    sys.exit(main())
