"""Look at data files as training sees them: tokens with the supervised ones coloured, lengths, and every bad line.

    python scripts/inspect_data.py dataset/sample/sft.jsonl --rows 1

    dataset/sample/sft.jsonl:1  23 tokens, 13 supervised
    <s>|<|user|>|W|ho| are| you|?|<|end|>|<|assistant|>[[I| am| ...|.|<|end|>]]        green instead of [[ ]] on a \
terminal

    tokens a row: 1,200 rows, median 61, longest 803
              32 - 63  ######################################## 640 (53.3%)
             64 - 127  ############## 231 (19.2%)

Exit status: 0, 1 where there are bad lines, 2 for a wrong flag or a missing file.
"""

import argparse
import io
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import DEFAULT_TOKENIZER, FORMS, LABELLED, DataError, TextTokenizer, load_tokenizer
from dataset.forms import Form, Rendered
from dataset.records import Row, expand_paths, form_of, one_line, read_rows

BAR = 40  # characters of the longest bar
BY_STAGE = {form.cache or form.stage: form for form in (*FORMS, LABELLED)}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    console = Console(no_color=arguments.no_color or None, highlight=False, soft_wrap=True)
    colour = console.is_terminal and not console.no_color
    try:
        tokenizer = load_tokenizer(arguments.tokenizer)
        paths = expand_paths(arguments.files)
        form = BY_STAGE[arguments.stage] if arguments.stage else form_of(paths[0])
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    bad: list[str] = []
    lengths: dict[str, list[int]] = {}
    supervised = tokens = 0
    for number, (row, sequences) in enumerate(rendered_rows(paths, form, tokenizer, bad)):
        for sequence in sequences:
            lengths.setdefault(sequence.name, []).append(len(sequence.ids))
            tokens += len(sequence.ids)
            supervised += sum(sequence.supervised)
            if number < arguments.rows:
                show(console, tokenizer, row, sequence, arguments.max_seq_len, colour)
    for name, values in lengths.items():
        console.print("\n".join(histogram(values, name, form, arguments.max_seq_len)), markup=False)
    if tokens:
        console.print(f"{tokens:,} tokens, {supervised:,} of them supervised ({supervised / tokens:.1%})", markup=False)
    console.print(f"{len(bad):,} bad lines{':' if bad else ''}", style="bold red" if bad else None)
    for message in bad:
        console.print(message, markup=False)
    return 1 if bad else 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="files or globs (.jsonl, .jsonl.gz, .jsonl.zst)")
    parser.add_argument(
        "--stage", type=lambda name: "full_sft" if name == "sft" else name, choices=tuple(BY_STAGE),
        help="what the rows are for (sft is full_sft, labelled is --loss_type kto); by default as the first row looks",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=3, help="rows shown, of the first [3]")
    parser.add_argument("--max_seq_len", type=int, default=512, help="tokens a training row has room for [512]")
    parser.add_argument(
        "--tokenizer", default=DEFAULT_TOKENIZER, help="tokenizer or model folder; by default the shipped one"
    )
    parser.add_argument(
        "--no_color", action="store_true", help="mark supervised tokens with [[ ]], and tokens' ends with |"
    )
    return parser.parse_args(argv)


def rendered_rows(
    paths: list[str], form: Form, tokenizer: TextTokenizer, bad: list[str]
) -> Iterator[tuple[Row, list[Rendered]]]:
    """Every good row with its sequences; the messages about bad ones go into `bad`, in the order of the files."""
    for path in paths:
        try:
            for row in read_rows([path], form, "skip", bad):
                try:
                    yield row, form.render(row.value, tokenizer)
                except ValueError as error:
                    bad.append(f"{row.where}: {error}")
        except DataError as error:  # nothing in the file, or damaged compression
            bad.append(str(error))
        except OSError as error:
            error.filename = path  # an error while reading has none
            bad.append(one_line(error))


# What is shown --------------------------------------------------------------------------------------------------


def show(
    console: Console, tokenizer: TextTokenizer, row: Row, sequence: Rendered, max_seq_len: int, colour: bool
) -> None:
    """The tokens of one sequence, as far as a training row reaches."""
    supervised = sum(sequence.supervised)
    name = f"{sequence.name}, " if sequence.name else ""
    head = f"{row.where}  {name}{len(sequence.ids):,} tokens, {supervised:,} supervised"
    console.print(head, style="bold", markup=False)
    limit = max_seq_len + 1  # so many tokens make max_seq_len pairs of input and label
    console.print(marked(tokenizer, sequence.ids[:limit], sequence.supervised[:limit], colour))
    if len(sequence.ids) > limit:
        console.print(
            f"... and {len(sequence.ids) - limit:,} tokens beyond --max_seq_len {max_seq_len}", style="yellow"
        )
    console.print()


def marked(tokenizer: TextTokenizer, ids: list[int], supervised: list[bool], colour: bool) -> Text:
    """Tokens as text: shades alternate from token to token, supervised ones are green; or with | and [[ ]]."""
    text = Text()
    if colour:
        for i, (token, mine) in enumerate(zip(ids, supervised, strict=True)):
            style = ("black on green", "black on bright_green") if mine else ("default", "default on grey23")
            text.append(visible(tokenizer, token), style=style[i % 2])
        return text
    for mine, group in itertools.groupby(zip(ids, supervised, strict=True), key=lambda pair: pair[1]):
        joined = "|".join(visible(tokenizer, token) for token, _ in group)
        text.append(f"[[{joined}]]" if mine else joined)
    return text


def visible(tokenizer: TextTokenizer, token: int) -> str:
    """A token's text, with signs for what would move or hide something on a terminal."""
    text = tokenizer.token_text(token).replace("\n", "⏎\n").replace("\t", "→\t").replace("\r", "␍")
    return "".join(c if c.isprintable() or c in "\n\t" else f"<U+{ord(c):04X}>" for c in text)


def histogram(lengths: list[int], name: str, form: Form, max_seq_len: int) -> list[str]:
    """Lines of text: how many rows are how long, in doublings.

    [3, 5, 6] -> ["tokens a row: 3 rows, median 5, longest 6", "2 - 3  ### 1 (33.3%)", "4 - 7  ###### 2 (66.7%)", ...]
    """
    bins = [length.bit_length() for length in lengths]
    counts = {size: bins.count(size) for size in range(min(bins), max(bins) + 1)}
    median, longest = statistics.median_low(lengths), max(lengths)
    lines = [f"{name or 'tokens a row'}: {len(lengths):,} rows, median {median:,}, longest {longest:,}"]
    for size, count in counts.items():
        span = f"{2 ** (size - 1):,} - {2**size - 1:,}"
        bar = "#" * round(BAR * count / max(counts.values()))
        lines.append(f"  {span:>17}  {bar} {count:,} ({count / len(lengths):.1%})")
    over = sum(length > max_seq_len + 1 for length in lengths)
    lines.append(f"  {over:,} rows are longer than --max_seq_len {max_seq_len}{': ' + form.too_long if over else ''}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
