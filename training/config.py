"""Flags and YAML in, one checked dataclass out.

    load_config(PretrainConfig, ["--config", "configs/tiny.yaml", "--learning_rate", "1e-3"])
    -> PretrainConfig(dim=64, ..., learning_rate=0.001)

Flat names, the same on the command line and in YAML; a flag after --config overrides the file. Unknown names fail, all
in one message, each answered by what it is called here (names.py). `None` means "not given": shapes then come from the
model folder or from GPTConfig.
What all stages share stands here; what one stage has of its own stands beside its objective.
"""

import argparse
import difflib
import re
import sys
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from dataset.hub import local_path
from training.names import flags_among, unknown_names

SAMPLE = str(Path(__file__).parent.parent / "dataset" / "sample")
KINDS = ("lora", "bottleneck", "prefix")  # of adapters; model/adapters.py has their classes
BEST = "best"  # the folder, within a run's, of the best model so far


@dataclass(frozen=True)
class Rule:
    """What holds for a flag; it stands beside the flag and nowhere else."""

    help: str
    group: str
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    shape: bool = False  # of the model: a starting folder decides it, and a flag may not contradict
    # a change since the checkpoint: breaks the run and is refused, is worth a note, or does not matter
    resume: Literal["refuse", "note", "free"] = "free"
    by_node: bool = False  # whether nodes may differ in it: folders, a device's name
    once: bool = False  # holds for the start that is asked for alone, so config.yaml does not repeat it

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError for a value out of range; so written, it stops "not a number" as well."""
        bounds = {
            f"at least {self.at_least}": self.at_least is None or value >= self.at_least,
            f"more than {self.above}": self.above is None or value > self.above,
            f"less than {self.below}": self.below is None or value < self.below,
        }
        if not all(bounds.values()):
            expected = " and ".join(text for text in bounds if not text.endswith("None"))
            if None not in (self.at_least, self.below):
                expected = f"in [{self.at_least}, {self.below})"
            raise ValueError(f"--{name} is {value}; it must be {expected}")


def flag(default: Any, text: str = "", group: str = "", *, like: str = "", **rule: Any) -> Any:
    """A flag with its rule; or, `like` one that all stages have, with another default (and help, where given)."""
    if like:
        rule = vars(rules(Config)[like]) | ({"help": text} if text else {})
    else:
        rule |= {"help": text, "group": group}
    metadata = {"rule": Rule(**rule)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def shape_flag(text: str) -> Any:
    return flag(None, text, "model", shape=True, resume="refuse")


def adapter_flag(text: str, **rule: Any) -> Any:
    """Where an adapter is gone on with, its folder decides, and a flag may not contradict."""
    return flag(None, text, "adapter", resume="refuse", **rule)


def rules(config: "Config | type[Config]") -> dict[str, Rule]:
    """Every flag's rule, by name."""
    return {f.name: f.metadata["rule"] for f in fields(config)}


@dataclass(kw_only=True)
class Config:
    """What all stages share."""

    stage: ClassVar[str]
    previous: ClassVar[str | None] = None  # the stage whose model this one starts from
    chats: ClassVar[bool] = True  # whether its model is asked, or has a text to go on with
    scores: ClassVar[bool] = False  # whether its model gives a score and writes nothing
    splits: ClassVar[bool] = True  # whether ranks may hold its model between them; not one that writes while it learns

    data_path: list[str] = flag(
        [],
        "training files or globs (.jsonl, .jsonl.gz, .jsonl.zst), or hf://datasets/USER/NAME/FILE",
        "files",
        by_node=True,
    )
    val_path: list[str] = flag(
        [], "validation files; without them val_fraction of the documents is held out", "files", by_node=True
    )
    val_fraction: float = flag(
        0.01, "share of documents held out by their hash (0: none)", "files", at_least=0, below=1
    )
    eval_benchmark: list[str] = flag(
        [], "files of questions with known answers (docs/evaluation.md), asked while training", "files", by_node=True
    )
    on_bad_row: Literal["stop", "skip"] = flag(
        "stop", "what to do about a row that cannot be used; skipped ones are counted and listed", "files"
    )
    cache_dir: str = flag(".cache/seedling", "where tokenized data is kept", "files", by_node=True)
    out_dir: str = flag("out", "run folders live here", "files", by_node=True)
    run_name: str | None = flag(None, "name of this run's folder in out_dir; by default {stage}_{dim}", "files")
    init_from: str | None = flag(
        None,
        "model folder to start from, or the name of a run in out_dir, or hf://USER/MODEL, or none for random weights",
        "files",
        by_node=True,
    )
    tokenizer: str | None = flag(
        None, "folder of the tokenizer; by default the one of init_from, else the shipped one", "files", by_node=True
    )
    resume: str = flag(
        "auto",
        "auto (newest whole checkpoint of this run), a checkpoint folder, or none (start over)",
        "files",
        once=True,
    )

    dim: int | None = shape_flag("width")
    n_layers: int | None = shape_flag(
        "blocks; by default one for every 64 of dim (beyond 1,024: every 128), 4 at least"
    )
    n_heads: int | None = shape_flag(
        "query heads; by default 8, fewer where they were narrower than 32, more where wider than 128"
    )
    n_kv_heads: int | None = shape_flag("key and value heads; by default for every fourth query head or so")
    ffn_dim: int | None = shape_flag("SwiGLU width; by default 8/3 dim rounded up to a multiple of 64")
    vocab_size: int | None = shape_flag("rows of the embedding; by default the tokenizer's")
    max_seq_len: int | None = flag(None, "tokens a row, and the model's context", "model", at_least=1, resume="refuse")
    rope_theta: float | None = shape_flag("base of the rotary angles")
    norm_eps: float | None = shape_flag("epsilon of RMSNorm")
    tie_embeddings: bool | None = shape_flag("one matrix for embedding and head")
    qk_norm: bool | None = shape_flag("RMSNorm on queries and keys (Qwen3)")
    dropout: float = flag(
        0.0, "dropout in attention and residual branches", "model", at_least=0, below=1, resume="note"
    )

    adapter: Literal["lora", "bottleneck", "prefix"] | None = flag(
        None,
        "learn a few new parameters instead of the model's own: lora (low-rank changes of linear layers), bottleneck "
        "(two small layers behind attention and feed-forward), prefix (keys and values that every layer's attention "
        "sees before a document)",
        "adapter",
        resume="refuse",
    )
    lora_rank: int | None = adapter_flag("columns of A and rows of B; by default 16", at_least=1)
    lora_alpha: float | None = adapter_flag("the change is multiplied by alpha / rank; by default 32", above=0)
    lora_targets: str | None = adapter_flag(
        "linear layers that are adapted: all (of the blocks), attention, or names (q_proj,v_proj); by default all"
    )
    lora_rslora: bool | None = adapter_flag("multiply by alpha / sqrt(rank) instead")
    lora_dora: bool | None = adapter_flag("learn the lengths of the rows apart from their directions")
    lora_dropout: float = flag(0.0, "dropout of what enters A", "adapter", at_least=0, below=1, resume="note")
    bottleneck_size: int | None = adapter_flag("width of a bottleneck; by default 64", at_least=1)
    prefix_length: int | None = adapter_flag("places of a prefix; by default 16", at_least=1)
    train_control_tokens: bool | None = adapter_flag(
        "learn the control tokens' rows of embedding and head too; by default where a chat is learnt from a pretrained "
        "model, which has never seen them, and never with prefix: PEFT opens no prefix that has them"
    )

    epochs: float = flag(1.0, "passes over the data", "optimization", above=0, resume="note")
    max_steps: int = flag(0, "optimizer steps; overrides epochs (0: off)", "optimization", at_least=0, resume="note")
    batch_size: int = flag(
        16, "rows a process a micro-batch: lower it when memory runs out", "optimization", at_least=1, resume="note"
    )
    accumulation_steps: int = flag(1, "micro-batches an update", "optimization", at_least=1, resume="note")
    global_batch_size: int = flag(
        0,
        "rows an update over all processes, kept whatever their number; sets accumulation_steps (0: off)",
        "optimization",
        at_least=0,
        resume="note",
    )
    learning_rate: float | None = flag(1e-3, "peak learning rate", "optimization", above=0, resume="note")
    min_lr: float | None = flag(
        None, "final learning rate; by default a tenth of learning_rate", "optimization", at_least=0, resume="note"
    )
    warmup_steps: int | None = flag(
        None, "linear warm-up; by default 2 %% of the steps, at most 200", "optimization", at_least=0, resume="note"
    )
    lr_schedule: Literal["cosine", "wsd"] = flag(
        "cosine", "after warm-up: cosine, or stable then linear decay (wsd)", "optimization", resume="note"
    )
    decay_fraction: float = flag(
        0.2, "share of the steps in which wsd decays", "optimization", at_least=0, below=1, resume="note"
    )
    weight_decay: float = flag(
        0.1, "on matrices only, never on embeddings and norms", "optimization", at_least=0, resume="note"
    )
    grad_clip: float = flag(1.0, "largest norm of the gradient (0: off)", "optimization", at_least=0, resume="note")
    optimizer: Literal["adamw", "muon"] | None = flag(
        "adamw",
        "muon: torch.optim.Muon for hidden matrices, AdamW for the rest, embeddings ten times as fast",
        "optimization",
        resume="refuse",
    )
    beta1: float = flag(0.9, "AdamW: decay of the mean", "optimization", at_least=0, below=1, resume="note")
    beta2: float = flag(0.95, "AdamW: decay of the square", "optimization", at_least=0, below=1, resume="note")
    seed: int = flag(42, "of weights, data order and dropout", "optimization", resume="refuse")

    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", "machine", by_node=True)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "auto: bfloat16 where the hardware has it; float32 multiplies as TF32 on a GPU",
        "machine",
        resume="note",
    )
    compile: bool | None = flag(
        None,
        "torch.compile the blocks; by default on NVIDIA GPUs with Triton and a C compiler, and not under ZeRO",
        "machine",
    )
    grad_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, a third more time", "machine"
    )
    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed", "horovod"] = flag(
        "auto", "auto: ddp under torchrun, deepspeed and horovod under their launchers, else single", "machine"
    )
    hsdp: bool = flag(False, "fsdp: shard within a node, replicate across nodes", "machine")
    fsdp_reshard: bool | None = flag(
        None,
        "fsdp: drop gathered parameters after every pass (less memory) or keep them until an update is over (fewer "
        "gathers); by default kept where a whole copy takes no more than an eighth of a GPU's memory",
        "machine",
    )
    tp: int = flag(
        1,
        "fsdp: ranks that share every matrix between them (tensor parallel), neighbours in the world",
        "machine",
        at_least=1,
        resume="note",
    )
    pp: int = flag(
        1,
        "ddp and fsdp: stages of whole blocks, each on ranks of its own, that a micro-batch goes through one after "
        "another (pipeline parallel)",
        "machine",
        at_least=1,
        resume="note",
    )
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zb", "zbv"] = flag(
        "1f1b",
        "pp: the order in which stages take micro-batches; zb and zbv (zero bubble) are for ddp",
        "machine",
    )
    pp_stages_per_rank: int | None = flag(
        None,
        "pp: stages a rank holds; by default 2, and 1 for gpipe and 1f1b, which have no more",
        "machine",
        at_least=1,
    )
    zero_stage: int | None = flag(
        None,
        "deepspeed: 1 shards optimizer state, 2 gradients too, 3 parameters too; by default the file's, else 2",
        "machine",
    )
    offload: Literal["none", "cpu", "nvme"] | None = flag(
        None,
        "where sharded state is kept: none (on the device), cpu (host memory; fsdp and deepspeed), nvme (a disk; "
        "deepspeed stage 3); by default the deepspeed_config's, else none",
        "machine",
    )
    offload_dir: str | None = flag(
        None, "folder on the disk that --offload nvme uses; by default the run's", "machine", by_node=True
    )
    deepspeed_config: str | None = flag(
        None, "DeepSpeed JSON; what our flags say must not be said otherwise there", "machine", by_node=True
    )
    comm_timeout: float = flag(
        600.0,
        "seconds a rank waits for the others in training before it gives up, so that a launcher can restart",
        "machine",
        above=0,
    )

    log_interval: int = flag(10, "steps between logged lines", "reporting", at_least=1)
    eval_interval: int = flag(200, "steps between validations (0: only at the end)", "reporting", at_least=0)
    eval_rows: int = flag(512, "packed rows a validation looks at, at most (0: all)", "reporting", at_least=0)
    eval_answers: int = flag(
        0,
        "open prompts of held-out pairs answered at every validation, to see whether answers stay whole (0: none)",
        "reporting",
        at_least=0,
    )
    benchmark_interval: int = flag(
        0, "steps between benchmarks, where --eval_benchmark names some (0: only at the end)", "reporting", at_least=0
    )
    benchmark_rows: int = flag(256, "questions of every file, the first ones (0: all)", "reporting", at_least=0)
    save_interval: int = flag(500, "steps between checkpoints (0: only at the end)", "reporting", at_least=0)
    keep_last: int = flag(2, "checkpoints kept", "reporting", at_least=1)
    keep_best: str | None = flag(
        None,
        "keep the best model too, in the run's folder best: by val_loss, val_bpb, val_reward_accuracy ...",
        "reporting",
        resume="note",
    )
    patience: int = flag(
        0, "end after so many validations in a row without a gain by keep_best (0: off)", "reporting", at_least=0
    )
    async_save: bool = flag(False, "write checkpoints while training goes on", "reporting")
    sample_interval: int = flag(0, "steps between samples (0: none)", "reporting", at_least=0)
    sample_prompt: str | None = flag(None, "what samples begin with, or answer", "reporting")
    use_wandb: bool = flag(False, "log to Weights & Biases", "reporting")
    wandb_project: str = flag("seedling", "project on Weights & Biases", "reporting")
    wandb_run_name: str | None = flag(None, "run name on Weights & Biases; by default the run folder's", "reporting")
    use_tensorboard: bool = flag(False, "write TensorBoard events into the run folder", "reporting")

    @property
    def run_dir(self) -> Path:
        return Path(self.out_dir) / (self.run_name or f"{self.stage}_{self.dim}")

    def check(self) -> None:
        """Raise ValueError for a value out of its range, and for flags that contradict each other."""
        for name, rule in rules(self).items():
            if getattr(self, name) is not None:
                rule.check(name, getattr(self, name))
        if self.run_name is not None and (
            self.run_name in ("", ".", "..", "none") or re.search(r"[/\\]", self.run_name)
        ):
            raise ValueError(
                f"--run_name is {self.run_name!r}; it must be the name of one folder in --out_dir, "
                "without / and \\, and not none, which --init_from has for random weights"
            )
        self.check_keep_best()
        self.check_adapter()
        self.check_scores()
        if self.global_batch_size and self.accumulation_steps != 1:
            raise ValueError(
                f"--global_batch_size {self.global_batch_size} sets the accumulation, "
                f"--accumulation_steps {self.accumulation_steps} contradicts it; give one of them"
            )

    def check_adapter(self) -> None:
        """Raise ValueError for flags of an adapter that is not asked for."""
        for name, rule in rules(self).items():
            kinds = [kind for kind in KINDS if name.startswith(f"{kind}_")]
            if rule.group == "adapter" and getattr(self, name) and self.adapter not in (kinds or KINDS):
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, and the adapter is {self.adapter or 'none'}; "
                    f"give --adapter {' or '.join(kinds or KINDS)}, or leave it out"
                )

    def check_scores(self) -> None:
        """Raise ValueError for flags of a model that writes, where it is to score."""
        for name in ("sample_interval", "eval_answers", "eval_benchmark"):
            if self.scores and getattr(self, name):
                raise ValueError(f"--{name} is {getattr(self, name)}, and a reward model writes nothing; leave it out")
        if self.benchmark_interval and not self.eval_benchmark:
            raise ValueError(f"--benchmark_interval {self.benchmark_interval} needs files: give --eval_benchmark FILES")

    def check_keep_best(self) -> None:
        """Raise ValueError for flags that leave nothing to tell the best model by."""
        if self.keep_best is None:
            if self.patience:
                raise ValueError(
                    f"--patience {self.patience} needs --keep_best METRIC (val_loss, say), which tells what a gain is"
                )
            return
        for name, missing in (
            ("--val_fraction 0", not self.val_fraction and not self.val_path),
            ("--eval_interval 0", not self.eval_interval),
        ):
            if missing:
                raise ValueError(
                    f"--keep_best {self.keep_best} compares validations on the way, and {name} makes none; "
                    "leave one of the two out"
                )


@dataclass(kw_only=True)
class ChatConfig(Config):
    """What the stages share that learn from conversations."""

    chat_template: str | None = flag(
        None,
        "chatml or a Jinja file: how another family's model is to chat, instead of as its folder says; "
        "saved with the model",
        "files",
        by_node=True,
    )


SHAPE_FLAGS = tuple(name for name, rule in rules(Config).items() if rule.shape)

C = TypeVar("C", bound=Config)


class BadValue(argparse.ArgumentTypeError, ValueError):
    """A value of the wrong kind: argparse shows its message for a flag, and a file's reader gets a ValueError."""


def load_config(cls: type[C], argv: list[str] | None = None, about: str | None = None) -> C:
    """Command line (and the YAML file it names) -> config. about: what --help begins with, else what the stage is.

    Raises ValueError for an unknown name, a value of the wrong kind, or one out of range. `--help` prints and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    given, unknown = build_parser(cls, about).parse_known_args(argv)
    values = vars(given)
    values.pop("local_rank", None)  # the deepspeed launcher adds it; ranks are read from the environment
    names = [f.name for f in fields(cls)]
    if unknown:
        raise ValueError(unknown_names(flags_among(unknown), names, "flag", "--"))
    path = values.pop("config", None)
    from_file = read_yaml(path, cls, names) if path else {}
    config = cls(**(from_file | values))
    config.check()
    return config


def build_parser(cls: type[Config], about: str | None = None) -> argparse.ArgumentParser:
    """One option a field; what is not given stays out of the namespace."""
    parser = Parser(
        description=about or cls.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read flags from a file first")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for f in fields(cls):
        group = groups.setdefault(f.metadata["rule"].group, parser.add_argument_group(f.metadata["rule"].group))
        default = (
            f.default if f.default_factory is not list and not callable(f.default_factory) else f.default_factory()
        )  # type: ignore[misc]
        shown = "" if default is None or default == [] else f" [{relative(default)}]"
        kind = typing.get_type_hints(cls)[f.name]
        options: dict[str, Any] = {
            "help": f.metadata["rule"].help + shown.replace("%", "%%"),
            "type": lambda text, f=f, kind=kind: convert(text, kind, f"--{f.name}"),
        }
        if plain(kind) is bool:
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif typing.get_origin(kind) is list:
            (each,) = typing.get_args(kind)
            options |= {"nargs": "+", "metavar": "FILE" if f.metadata["rule"].group == "files" else each.__name__}
            options["type"] = lambda text, f=f, each=each: convert(text, each, f"--{f.name}")
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
    unknown = [str(name) for name in content if name not in names]
    if unknown:
        raise ValueError(f"--config {path}: {unknown_names(unknown, names, 'key', '')}")
    return {name: convert(value, hints[name], f"{path}: {name}") for name, value in content.items()}


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
        (each,) = typing.get_args(kind)
        items = value if isinstance(value, list) else [] if value is None else [value]
        return [convert(item, each, name) for item in items]
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
    """Write the config as YAML that --config takes, without what holds for one start alone. Its first line says the
    stage, for `stage_of`."""
    once = {name for name, rule in rules(config).items() if rule.once}
    content = {name: value for name, value in asdict(config).items() if value is not None and name not in once}
    header = f"# python train_{config.stage}.py --config {path}\n"
    path.write_text(header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def stage_of(folder: Path) -> str | None:
    """The stage that made a model folder, by the config.yaml of its run or else by its name; None where neither says.

    stage_of(Path("out/pretrain_512"))  -> "pretrain"
    stage_of(Path("out/wide"))          -> "pretrain", where its config.yaml begins with `# python train_pretrain.py`
    """
    folder = folder.resolve()
    run = folder.parent if folder.name == BEST else folder
    path = run / "config.yaml"
    header = path.read_text(encoding="utf-8").partition("\n")[0] if path.is_file() else ""
    found = re.match(r"# python train_(\w+)\.py ", header) or re.fullmatch(r"([a-z_]+)_\d+", run.name)
    return found[1] if found else None


def model_folder(name: str, out_dir: str) -> Path:
    """A model folder by its path, by the name of its run in out_dir, or of a hub (hf://USER/MODEL). Raises
    FileNotFoundError where none of them is."""
    found = local_path(name)
    for folder in (Path(found), Path(out_dir) / found):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"{name}: no such folder, here or in {out_dir}; expected a model folder (with config.json and "
        "model.safetensors), or the name of a run"
    )
