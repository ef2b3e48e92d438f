"""Flags and YAML in, one checked dataclass out.

    load_config(PretrainConfig, ["--config", "configs/tiny.yaml", "--learning_rate", "1e-3"])
    -> PretrainConfig(dim=64, ..., learning_rate=0.001)

Flat names, the same on the command line and in YAML; a flag after --config overrides the file. An unknown name fails
and the nearest one is named. `None` means "not given": shapes then come from the model folder or from GPTConfig.
"""

import argparse
import difflib
import sys
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

SHAPE_FLAGS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "rope_theta", "norm_eps", "tie_embeddings", "qk_norm",
)  # fmt: skip
SAMPLE = str(Path(__file__).parent.parent / "dataset" / "sample")


def flag(default: Any, text: str, group: str) -> Any:
    metadata = {"help": text, "group": group}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Config:
    """What all stages share."""

    stage: ClassVar[str]
    previous: ClassVar[str | None] = None  # the stage whose model this one starts from

    data_path: list[str] = flag([], "training files or globs (.jsonl, .jsonl.gz, .jsonl.zst)", "files")
    val_path: list[str] = flag([], "validation files; without them val_fraction of the documents is held out", "files")
    val_fraction: float = flag(0.01, "share of documents held out by their hash (0: none)", "files")
    on_bad_row: Literal["stop", "skip"] = flag(
        "stop", "what to do about a row that cannot be used; skipped ones are counted and listed", "files"
    )
    cache_dir: str = flag(".cache/seedling", "where tokenized data is kept", "files")
    out_dir: str = flag("out", "run folders {stage}_{dim} live here", "files")
    init_from: str | None = flag(None, "model folder to start from, or none for random weights", "files")
    tokenizer: str | None = flag(
        None, "folder of the tokenizer; by default the one of init_from, else the shipped one", "files"
    )
    resume: str = flag(
        "auto", "auto (newest whole checkpoint of this run), a checkpoint folder, or none (start over)", "files"
    )

    dim: int | None = flag(None, "width", "model")
    n_layers: int | None = flag(None, "blocks", "model")
    n_heads: int | None = flag(None, "query heads", "model")
    n_kv_heads: int | None = flag(None, "key and value heads", "model")
    ffn_dim: int | None = flag(None, "SwiGLU width; by default 8/3 dim rounded up to a multiple of 64", "model")
    vocab_size: int | None = flag(None, "rows of the embedding; by default the tokenizer's", "model")
    max_seq_len: int | None = flag(None, "tokens a row, and the model's context", "model")
    rope_theta: float | None = flag(None, "base of the rotary angles", "model")
    norm_eps: float | None = flag(None, "epsilon of RMSNorm", "model")
    tie_embeddings: bool | None = flag(None, "one matrix for embedding and head", "model")
    qk_norm: bool | None = flag(None, "RMSNorm on queries and keys (Qwen3)", "model")
    dropout: float = flag(0.0, "dropout in attention and residual branches", "model")

    epochs: float = flag(1.0, "passes over the data", "optimization")
    max_steps: int = flag(0, "optimizer steps; overrides epochs (0: off)", "optimization")
    batch_size: int = flag(16, "rows a process a micro-batch: lower it when memory runs out", "optimization")
    accumulation_steps: int = flag(1, "micro-batches an update", "optimization")
    global_batch_size: int = flag(
        0,
        "rows an update over all processes, kept whatever their number; sets accumulation_steps (0: off)",
        "optimization",
    )
    learning_rate: float = flag(1e-3, "peak learning rate", "optimization")
    min_lr: float | None = flag(None, "final learning rate; by default a tenth of learning_rate", "optimization")
    warmup_steps: int | None = flag(None, "linear warm-up; by default 2 %% of the steps, at most 200", "optimization")
    lr_schedule: Literal["cosine", "wsd"] = flag(
        "cosine", "after warm-up: cosine, or stable then linear decay (wsd)", "optimization"
    )
    decay_fraction: float = flag(0.2, "share of the steps in which wsd decays", "optimization")
    weight_decay: float = flag(0.1, "on matrices only, never on embeddings and norms", "optimization")
    grad_clip: float = flag(1.0, "largest norm of the gradient (0: off)", "optimization")
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "muon: torch.optim.Muon for hidden matrices, AdamW for the rest", "optimization"
    )
    beta1: float = flag(0.9, "AdamW: decay of the mean", "optimization")
    beta2: float = flag(0.95, "AdamW: decay of the square", "optimization")
    seed: int = flag(42, "of weights, data order and dropout", "optimization")

    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", "machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "auto: bfloat16 where the hardware has it", "machine"
    )
    compile: bool = flag(False, "torch.compile the blocks", "machine")
    grad_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, a third more time", "machine"
    )
    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = flag(
        "auto", "auto: ddp under torchrun, deepspeed under its launcher, else single", "machine"
    )
    hsdp: bool = flag(False, "fsdp: shard within a node, replicate across nodes", "machine")
    zero_stage: int | None = flag(
        None,
        "deepspeed: 1 shards optimizer state, 2 gradients too, 3 parameters too; by default the file's, else 2",
        "machine",
    )
    offload: Literal["none", "cpu", "nvme"] | None = flag(
        None, "keep sharded state in host memory, or (deepspeed stage 3) on a disk", "machine"
    )
    offload_dir: str | None = flag(None, "folder on the disk that --offload nvme uses; by default the run's", "machine")
    deepspeed_config: str | None = flag(
        None, "DeepSpeed JSON; what our flags say must not be said otherwise there", "machine"
    )
    comm_timeout: float = flag(
        600.0,
        "seconds a rank waits for the others in training before it gives up, so that a launcher can restart",
        "machine",
    )

    log_interval: int = flag(10, "steps between logged lines", "reporting")
    eval_interval: int = flag(200, "steps between validations (0: only at the end)", "reporting")
    eval_rows: int = flag(512, "packed rows a validation looks at, at most (0: all)", "reporting")
    save_interval: int = flag(500, "steps between checkpoints (0: only at the end)", "reporting")
    keep_last: int = flag(2, "checkpoints kept", "reporting")
    async_save: bool = flag(False, "write checkpoints while training goes on", "reporting")
    sample_interval: int = flag(0, "steps between samples (0: none)", "reporting")
    sample_prompt: str | None = flag(None, "what samples begin with, or answer", "reporting")
    use_wandb: bool = flag(False, "log to Weights & Biases", "reporting")
    wandb_project: str = flag("seedling", "project on Weights & Biases", "reporting")
    wandb_run_name: str | None = flag(None, "run name on Weights & Biases; by default the run folder's", "reporting")
    use_tensorboard: bool = flag(False, "write TensorBoard events into the run folder", "reporting")

    @property
    def run_dir(self) -> Path:
        return Path(self.out_dir) / f"{self.stage}_{self.dim}"

    def check(self) -> None:
        """Raise ValueError for a value out of its range."""
        at_least_one = ("batch_size", "accumulation_steps", "log_interval", "keep_last", "max_seq_len")
        not_negative = (
            "max_steps",
            "eval_interval",
            "save_interval",
            "sample_interval",
            "eval_rows",
            "weight_decay",
            "grad_clip",
            "warmup_steps",
            "min_lr",
            "global_batch_size",
        )
        for names, least in ((at_least_one, 1), (not_negative, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= least:  # so written, it stops "not a number" as well
                    raise ValueError(f"--{name} is {value}; it must be at least {least}")
        if not (self.learning_rate > 0 and self.epochs > 0):
            raise ValueError(
                f"--learning_rate {self.learning_rate} and --epochs {self.epochs} must both be more than 0"
            )
        if self.global_batch_size and self.accumulation_steps != 1:
            raise ValueError(
                f"--global_batch_size {self.global_batch_size} sets the accumulation, --accumulation_steps {self.accumulation_steps} contradicts it; give one of them"
            )
        if not self.comm_timeout > 0:
            raise ValueError(f"--comm_timeout is {self.comm_timeout}; it must be more than 0")
        for name in ("val_fraction", "decay_fraction", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be in [0, 1)")


@dataclass(kw_only=True)
class PretrainConfig(Config):
    """Next-token training on plain text."""

    stage: ClassVar[str] = "pretrain"
    data_path: list[str] = flag(
        [f"{SAMPLE}/pretrain.jsonl"], "training files or globs (.jsonl, .jsonl.gz, .jsonl.zst)", "files"
    )


@dataclass(kw_only=True)
class SFTConfig(Config):
    """Supervised fine-tuning on conversations; the loss stands on the assistant's turns only."""

    stage: ClassVar[str] = "full_sft"
    previous: ClassVar[str | None] = "pretrain"
    data_path: list[str] = flag(
        [f"{SAMPLE}/sft.jsonl"], "training files or globs (.jsonl, .jsonl.gz, .jsonl.zst)", "files"
    )
    learning_rate: float = flag(5e-4, "peak learning rate", "optimization")
    epochs: float = flag(2.0, "passes over the data", "optimization")


@dataclass(kw_only=True)
class DPOConfig(Config):
    """Direct preference optimization on pairs of answers."""

    stage: ClassVar[str] = "dpo"
    previous: ClassVar[str | None] = "full_sft"
    data_path: list[str] = flag(
        [f"{SAMPLE}/dpo.jsonl"], "training files or globs (.jsonl, .jsonl.gz, .jsonl.zst)", "files"
    )
    batch_size: int = flag(
        4, "rows a process a micro-batch; a row is 2 * max_seq_len wide and holds whole pairs", "optimization"
    )
    learning_rate: float = flag(1e-5, "peak learning rate", "optimization")
    weight_decay: float = flag(0.0, "on matrices only, never on embeddings and norms", "optimization")
    beta: float = flag(0.1, "DPO: strength of the pull towards the reference (larger: closer)", "preference")
    loss_type: Literal["sigmoid"] = flag("sigmoid", "DPO's loss", "preference")

    def check(self) -> None:
        super().check()
        if not self.beta > 0:
            raise ValueError(f"--beta is {self.beta}; it must be more than 0")


C = TypeVar("C", bound=Config)


class BadValue(argparse.ArgumentTypeError, ValueError):
    """A value of the wrong kind: argparse shows its message for a flag, and a file's reader gets a ValueError."""


def load_config(cls: type[C], argv: list[str] | None = None) -> C:
    """Command line (and the YAML file it names) -> config.

    Raises ValueError for an unknown name, a value of the wrong kind, or one out of range. `--help` prints and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    given, unknown = build_parser(cls).parse_known_args(argv)
    values = vars(given)
    values.pop("local_rank", None)  # the deepspeed launcher adds it; ranks are read from the environment
    names = [f.name for f in fields(cls)]
    if unknown:
        raise ValueError(unknown_name(unknown[0], names, "flag", "--"))
    path = values.pop("config", None)
    from_file = read_yaml(path, cls, names) if path else {}
    config = cls(**(from_file | values))
    config.check()
    return config


def build_parser(cls: type[Config]) -> argparse.ArgumentParser:
    """One option a field; what is not given stays out of the namespace."""
    parser = Parser(description=cls.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE.yaml", help="read flags from a file first")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for f in fields(cls):
        group = groups.setdefault(f.metadata["group"], parser.add_argument_group(f.metadata["group"]))
        default = (
            f.default if f.default_factory is not list and not callable(f.default_factory) else f.default_factory()
        )  # type: ignore[misc]
        shown = "" if default is None or default == [] else f" [{relative(default)}]"
        kind = typing.get_type_hints(cls)[f.name]
        options: dict[str, Any] = {
            "help": f.metadata["help"] + shown.replace("%", "%%"),
            "type": lambda text, f=f, kind=kind: convert(text, kind, f"--{f.name}"),
        }
        if plain(kind) is bool:
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif typing.get_origin(kind) is list:
            options |= {"nargs": "+", "metavar": "FILE", "type": str}
        else:
            options["metavar"] = (
                "|".join(typing.get_args(kind)) if typing.get_origin(kind) is Literal else plain(kind).__name__
            )
        group.add_argument(f"--{f.name}", **options)
    return parser


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors, like all of ours."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)


def relative(default: Any) -> str:
    """A default as --help shows it: paths from the repository's root."""
    shown = " ".join(default) if isinstance(default, list) else str(default)
    return shown.replace(str(Path(SAMPLE).parent.parent) + "/", "")


def read_yaml(path: str, cls: type[Config], names: list[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: found {type(content).__name__}, expected lines of `flag: value`")
    hints = typing.get_type_hints(cls)
    for name in content:
        if name not in names:
            raise ValueError(f"--config {path}: {unknown_name(str(name), names, 'key', '')}")
    return {name: convert(value, hints[name], f"{path}: {name}") for name, value in content.items()}


def unknown_name(found: str, names: list[str], kind: str, prefix: str) -> str:
    nearest = difflib.get_close_matches(found.lstrip("-").split("=")[0].replace("-", "_"), names, n=1, cutoff=0.5)
    hint = f"; did you mean {prefix}{nearest[0]}?" if nearest else "; --help lists them all"
    return f"unknown {kind} {found}{hint}"


def plain(kind: Any) -> Any:
    """`int | None` -> int."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def convert(value: Any, kind: Any, name: str) -> Any:
    """A command-line string or YAML value -> the field's type. Raises ValueError naming the field."""
    optional = plain(kind) is not kind
    kind = plain(kind)
    if optional and (value is None or (value == "none" and kind is not str and "none" not in typing.get_args(kind))):
        return None
    if typing.get_origin(kind) is list:
        return [str(item) for item in (value if isinstance(value, list) else [] if value is None else [value])]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            nearest = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise BadValue(f"{name} is {value!r}; it must be one of {', '.join(choices)}{hint}")
        return value
    if kind is bool:
        known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if str(value).lower() not in known:
            raise BadValue(f"{name} is {value!r}; it must be true or false")
        return known[str(value).lower()]
    if kind is str:
        return str(value)
    try:
        number = float(value)
        if kind is int and number != int(number):
            raise ValueError
        return (
            kind(number)
            if kind is float
            else int(value if isinstance(value, str) and value.lstrip("-").isdigit() else number)
        )
    except (TypeError, ValueError, OverflowError):
        raise BadValue(f"{name} is {value!r}; it must be {'a whole number' if kind is int else 'a number'}") from None


def save_config(config: Config, path: Path) -> None:
    """Write the config as YAML that --config takes."""
    content = {name: value for name, value in asdict(config).items() if value is not None}
    header = f"# python train_{config.stage}.py --config {path}\n"
    path.write_text(header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
