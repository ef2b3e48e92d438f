"""One form of a model into another.

python scripts/convert.py merge out/full_sft_512 --into out/merged                an adapter and its base: a whole model
python scripts/convert.py merge ONE TWO --model BASE --into out/merged            several, one after another

What comes out is a Hugging Face model folder with its tokenizer: a stage starts from it, and what knows nothing of
adapters opens it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset import load_tokenizer
from model import load_pretrained
from model.adapter_folder import is_adapter, tokenizer_folder
from training.saver import export_model


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for what the user did wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    merging = commands.add_parser("merge", help="an adapter and its base into a whole model")
    merging.add_argument("adapters", nargs="+", type=Path, metavar="FOLDER", help="adapters, merged in this order")
    merging.add_argument("--model", type=Path, metavar="FOLDER", help="base; by default the one that the first names")
    merging.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="a new folder for the model")
    arguments = parser.parse_args(argv)
    try:
        merge(arguments.adapters, arguments.model, arguments.into)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def merge(adapters: list[Path], base: Path | None, into: Path) -> None:
    """Raises ValueError for a folder that holds no adapter, and where there is something at `into` already."""
    for folder in adapters:
        if not is_adapter(folder):
            raise ValueError(
                f"{folder}: no adapter_config.json here, so this is no adapter; a base is given as --model"
            )
    if into.exists():
        raise ValueError(f"--into {into} is there already; give the name of a new folder")
    first, *others = ([] if base is None else [base]) + adapters
    model = load_pretrained(first, adapters=others)
    if model.adapter is not None:
        raise ValueError(
            f"{adapters[-1]}: a {model.adapter.kind} adapter is no change of weights, so it does not merge"
        )
    tokenizer = load_tokenizer(tokenizer_folder(first, others))
    export_model(model, model.state_dict(), tokenizer, into)
    print(f"{into}: {model.num_parameters():,} parameters, merged of {' + '.join(map(str, [first, *others]))}")


if __name__ == "__main__":
    sys.exit(main())
