"""Write the documents that a run keeps out of its training, so that eval_model.py can score a model on just those.

python scripts/held_out.py "data/pretrain/zh_*.jsonl" --stage pretrain --output held_out_zh.jsonl
python eval_model.py --model_mode 0 --score held_out_zh.jsonl

The choice is the one of --val_fraction: a hash of the document (of the prompt in SFT and DPO), so files can be named
one by one, in any order, and give the same documents as the whole training set does.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset.encode import Rules, is_held_out
from dataset.records import expand_paths, one_line, read_rows
from training import STAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="data files or globs")
    parser.add_argument("--stage", required=True, choices=tuple(STAGES))
    parser.add_argument("--val_fraction", type=float, default=0.01, help="as in training [0.01]")
    parser.add_argument("--output", required=True, metavar="FILE.jsonl")
    args = parser.parse_args()
    rules = Rules(STAGES[args.stage].form, max_seq_len=0, val_fraction=args.val_fraction)
    read = kept = 0
    with open(args.output, "w", encoding="utf-8") as output:
        for row in read_rows(expand_paths(args.files), rules.form):
            read += 1
            if is_held_out(row, rules):
                kept += 1
                output.write(json.dumps(row.value, ensure_ascii=False) + "\n")
    print(f"{args.output}: {kept:,} of {read:,} rows")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
