"""From flags to an adapter, from one stage's adapter to the next, and to a whole model again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval_model
from model import load_pretrained, save_pretrained
from model.adapter_folder import base_folder, load_adapter
from model.adapters import LINEAR, LoRA
from scripts import convert
from tests.helpers import BOTTLENECK, LORA, PREFIX, run_here, stage_flags, train_here, train_start
from training import DPOConfig, PretrainConfig, SFTConfig, load_config
from training.adapting import adapter_of, flags_of
from training.optimizer import build_optimizers
from training.saver import differences
from training.setup import starting_model, weights_hash


@pytest.fixture
def folder(make_model, tokenizer, tmp_path) -> Path:
    path = tmp_path / "pretrain_32"
    save_pretrained(make_model(n_layers=1, vocab_size=6400), path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Three stages; the second learns an adapter, and the third goes on with it."""
    folder = tmp_path_factory.mktemp("stages")
    train_start(folder)
    steps = ["--max_steps", 3, "--batch_size", 4, "--learning_rate", 1e-2]
    train_here("full_sft", *stage_flags(folder, "full_sft", folder / "out"), *LORA, *steps)
    start = ["--init_from", "full_sft_32"]
    train_here("dpo", *stage_flags(folder, "dpo", folder / "out"), *steps, *start, "--adapter", "lora")
    return folder


def config_of(cls: type, folder: Path, *flags: str):
    return load_config(cls, ["--init_from", str(folder), *flags])


def test_defaults_are_filled_in_and_recorded(folder):
    start = starting_model(config_of(SFTConfig, folder, "--adapter", "lora"))
    adapter = start.model.adapter
    known = {"base": str(folder), "base_hash": weights_hash(start.found)}
    assert adapter == LoRA(tokens=tuple(sorted(start.tokenizer.control_ids)), **known)
    assert (adapter.rank, adapter.alpha, adapter.targets) == (16, 32, LINEAR)
    flags = flags_of(adapter)
    assert flags["lora_targets"] == "all" and flags["train_control_tokens"] is True
    assert all(getattr(start.config, name) == value for name, value in flags.items())
    assert starting_model(start.config).model.adapter == adapter  # what config.yaml records makes it again


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("attention", LINEAR[:4]), ("q_proj, down_proj", ("q_proj", "down_proj"))],
)
def test_flags_say_what_is_adapted(folder, targets, expected):
    flags = ["--adapter", "lora", "--lora_targets", targets, "--lora_rank", "2", "--lora_rslora"]
    start = starting_model(config_of(SFTConfig, folder, *flags))
    adapter = start.model.adapter
    assert isinstance(adapter, LoRA) and (adapter.targets, adapter.rank, adapter.rslora) == (expected, 2, True)
    assert start.config.lora_targets == targets.replace(" ", "")


def test_control_tokens_are_learnt_where_a_chat_begins(folder, tokenizer, tmp_path):
    """By default: from a pretrained model, unless texts are learnt again; and as flags say."""

    def tokens(cls: type, start: Path, *flags: str) -> bool:
        asked = config_of(cls, start, "--adapter", "lora", *flags)
        return bool(starting_model(asked).model.adapter.tokens)

    chats = tmp_path / "full_sft_32"
    folder.rename(chats)
    assert not tokens(SFTConfig, chats) and not tokens(DPOConfig, chats)
    assert tokens(SFTConfig, chats, "--train_control_tokens")
    chats.rename(folder)
    assert tokens(SFTConfig, folder) and not tokens(PretrainConfig, folder)
    assert not tokens(SFTConfig, folder, "--train_control_tokens", "no")
    prefix = ["--adapter", "prefix"]  # with which PEFT would not see them
    assert not tokens(SFTConfig, folder, *prefix) and tokens(SFTConfig, folder, *prefix, "--train_control_tokens")


def test_first_values_are_no_part_of_what_a_run_starts_from(folder):
    """So that the reference of preference pairs is the model's, whatever is to be learnt."""
    plain, *others = (
        starting_model(config_of(DPOConfig, folder, *flags))
        for flags in ([], ["--adapter", "lora"], ["--adapter", "lora", "--seed", "7"], PREFIX)
    )
    assert {weights_hash(start.found) for start in others} == {weights_hash(plain.found)}
    assert len({weights_hash(start.weights) for start in others}) == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lora_rank", "8"], "--lora_rank is 8, and the adapter is none; give --adapter lora"),
        (
            ["--train_control_tokens"],
            "--train_control_tokens is True, and the adapter is none; give --adapter lora or bottleneck or prefix",
        ),
        (["--adapter", "lora", "--init_from", "none"], "give the model to start from with --init_from"),
        (["--adapter", "lora", "--lora_targets", "q,k"], "'q' names no linear layer of a block"),
        (["--adapter", "lora", "--lora_rank", "0"], "--lora_rank is 0; it must be at least 1"),
        (["--adapter", "loar"], "did you mean lora?"),
    ],
)
def test_a_mistake_is_told(folder, flags, told):
    with pytest.raises(ValueError) as error:
        starting_model(config_of(SFTConfig, folder, *flags))
    assert told in str(error.value)


def test_muon_leaves_an_adapter_to_adamw(folder):
    from model import GPT

    start = starting_model(config_of(SFTConfig, folder, "--adapter", "lora", "--lora_dora"))
    model = GPT(start.model.config, start.model.adapter)
    (adamw,) = build_optimizers(model, SFTConfig(optimizer="muon", weight_decay=0.3))
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
    assert type(adamw) is torch.optim.AdamW and adamw.param_groups[0]["weight_decay"] == 0.3
    assert (decay, rest) == ({"lora_A", "lora_B"}, {"lora_magnitude_vector", "trainable_tokens_delta"})


# From stage to stage --------------------------------------------------------------------------------------------


def test_a_run_leaves_an_adapter_and_checkpoints_of_it_alone(base):
    run = base / "out/full_sft_32"
    left = {path.name for path in run.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "config.yaml"} <= left
    assert not left & {"model.safetensors", "config.json", "generation_config.json"}
    learnt = sum(tensor.nbytes for tensor in load_file(run / "adapter_model.safetensors").values())
    state = sum(path.stat().st_size for path in run.glob("checkpoints/*/state/*.distcp"))
    whole = (base / "start/pretrain_32/model.safetensors").stat().st_size
    assert 3 * learnt < state < whole  # parameters and two moments; the rest is names and places


def test_the_next_stage_goes_on_with_the_adapter_on_the_same_base(base):
    first, second = base / "out/full_sft_32", base / "out/dpo_32"
    assert base_folder(first) == base_folder(second) == base / "start/pretrain_32"
    shape = load_pretrained(first).config
    (adapter, weights), (again, later) = load_adapter(first, shape), load_adapter(second, shape)
    assert adapter == again and adapter.tokens
    assert all(not torch.equal(weights[name], later[name]) for name in weights)
    records = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the reference is the model it starts from
    assert abs(records[0]["drift"]) < 1e-4 < abs(records[-1]["drift"])


AT_FIRST = {"kto": 0.5, "ipo": 25.0, "simpo": None, "orpo": None}  # loss of a model that is its own reference, beta 0.1


@pytest.mark.parametrize("start", ["start/full_sft_32", "out/full_sft_32"], ids=["a new adapter", "one that goes on"])
def test_whatever_the_preference_loss_its_reference_is_the_model_before(base, tmp_path, start):
    """The same whether all weights are learnt or an adapter; where a loss has no reference, none is computed."""
    for loss, expected in AT_FIRST.items():
        seen = {}
        for adapter in ([], ["--adapter", "lora"]):
            cache = tmp_path / f"{loss} {len(adapter)}"
            flags = [*stage_flags(base, "dpo", tmp_path), "--init_from", base / start, "--cache_dir", cache, *adapter]
            name = f"{loss}_{len(adapter)}"
            steps = ["--max_steps", 3, "--batch_size", 4, "--learning_rate", 1e-2, "--run_name", name]
            train_here("dpo", *flags, *steps, "--loss_type", loss)
            seen[len(adapter)] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
            assert bool(list(cache.glob("reference-*"))) == (expected is not None)
        full, adapted = seen.values()
        assert adapted[0]["loss"] == pytest.approx(expected or full[0]["loss"], rel=1e-4)
        assert abs(adapted[-1]["chosen_reward"] - adapted[0]["chosen_reward"]) > 1e-3
        assert ("drift" in adapted[0]) == (expected is not None) and abs(adapted[0].get("drift", 0)) < 1e-4


def test_an_adapter_learns_from_a_teacher_which_may_be_an_adapter(base, tmp_path):
    steps = ["--max_steps", 4, "--batch_size", 4, "--learning_rate", 1e-2]
    flags = [*stage_flags(base, "distill", tmp_path), *steps]
    whole = tmp_path / "whole"
    assert convert.main([str(base / "out/full_sft_32"), "--to", "adapter_merged", "--out", str(whole)]) == 0
    first = {}
    for name, teacher, own in [
        ("all", base / "out/full_sft_32", []),
        ("lora", base / "out/full_sft_32", LORA),
        ("lora, merged teacher", whole, LORA),
    ]:
        train_here("distill", *flags, *own, "--teacher", teacher, "--run_name", name)
        first[name] = [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
    assert first["lora"][0] == pytest.approx(first["all"][0], rel=1e-5)  # an adapter changes nothing at first
    assert first["lora"] == pytest.approx(first["lora, merged teacher"], rel=1e-5)
    assert first["lora"][-1] < first["lora"][0]
    assert {path.name for path in (tmp_path / "lora").glob("*.safetensors")} == {"adapter_model.safetensors"}


def test_a_flag_may_not_contradict_the_adapter_that_is_there(base, tokenizer):
    start = base / "out/full_sft_32"
    shape = load_pretrained(start).config
    with pytest.raises(ValueError, match=r"--lora_rank 8 contradicts .*which has 4; .*convert.py --to adapter_merged"):
        adapter_of(config_of(DPOConfig, start, "--adapter", "lora", "--lora_rank", "8"), str(start), tokenizer, shape)


def test_without_the_flag_all_of_the_merged_model_is_learnt(base):
    start = starting_model(config_of(DPOConfig, base / "out/full_sft_32"))
    merged = load_pretrained(base / "out/full_sft_32").state_dict()
    assert start.model.adapter is None
    assert all(torch.equal(tensor, merged[name]) for name, tensor in start.weights())


def test_an_adapter_is_merged_into_a_whole_folder(base, tmp_path, capsys):
    adapter, into = base / "out/full_sft_32", tmp_path / "whole"
    assert convert.main([str(adapter), "--to", "adapter_merged", "--out", str(into)]) == 0
    opened, merged = load_pretrained(adapter), load_pretrained(into)
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in opened.state_dict().items())
    assert (into / "chat_template.jinja").is_file()
    start, twice = base / "start/pretrain_32", tmp_path / "twice"
    several = [str(adapter), str(adapter), "--base", str(start), "--to", "adapter_merged", "--out", str(twice)]
    assert convert.main(several) == 0
    stacked = load_pretrained(start, adapters=[adapter, adapter]).state_dict()
    assert all(torch.equal(t, stacked[name]) for name, t in load_pretrained(twice).state_dict().items())
    assert convert.main([str(adapter), "--to", "adapter_merged", "--out", str(into)]) == 2
    assert convert.main([str(into), "--to", "adapter_merged", "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "is there already" in said and "no adapter_config.json here" in said


def test_eval_model_opens_an_adapter_alone_and_on_a_base(base, capsys):
    flags = ["--out_dir", str(base / "out"), "--prompt", "Hi", "--max_new_tokens", "4", "--temperature", "0"]
    plain = ["--model", str(base / "start/pretrain_32"), "--adapter", "full_sft_32"]
    answers = []
    for which in ([], plain, ["--adapter", "full_sft_32"], ["--model", "full_sft_32", "--device", "cpu"]):
        assert eval_model.main([*flags, *which]) == 0
        answers.append(capsys.readouterr())
    assert len({answer.out for answer in answers}) == 1
    assert f"pretrain_32 + {base}/out/full_sft_32: " in answers[1].err


def test_another_adapter_is_another_run(base):
    flags = [*stage_flags(base, "full_sft", base / "out"), "--max_steps", 3, "--batch_size", 4, "--learning_rate", 1e-2]
    for other, told in (
        (["--adapter", "lora", "--lora_rank", 2], "--lora_rank was 4 and is 2"),
        (PREFIX, "--adapter was lora and is prefix"),
        ([], "--adapter was lora and is None"),
    ):
        done = run_here("full_sft", *flags, *other)
        assert done.returncode == 2 and told in done.stderr and "--resume none" in done.stderr


def test_no_adapter_goes_on_from_a_checkpoint_of_all_weights(folder):
    """Whether or not it was written when there were adapters."""
    config = starting_model(config_of(SFTConfig, folder, "--adapter", "lora")).config
    for before in ({"adapter": None, "lora_rank": None, "seed": 42}, {"seed": 42}):
        now = {"adapter": "lora", "lora_rank": 16, "seed": 42}
        assert "--adapter was None and is lora" in differences({"identity": before}, now, config)
    assert differences({"identity": {"seed": 42}}, {"adapter": None, "seed": 42}, config) == []


def test_a_new_prefix_is_no_part_of_the_reference(base, tmp_path):
    """Any key takes its share of attention, so the model with it does not say what it starts from."""
    said = []
    for name, adapter in (("plain", []), ("prefix", PREFIX)):
        flags = [*stage_flags(base, "dpo", tmp_path / name), "--max_steps", 1, "--batch_size", 4, *adapter]
        train_here("dpo", *flags, "--cache_dir", tmp_path / name / "cache")
        files = sorted((tmp_path / name / "cache").glob("reference-*.pt"))
        said.append({path.name: torch.load(path, weights_only=True)[0] for path in files})
    assert said[0].keys() == said[1].keys() and len(said[0]) == 2
    for name, plain in said[0].items():  # pairs that one step does not come to are not a number
        torch.testing.assert_close(said[1][name], plain, rtol=0, atol=0, equal_nan=True)
        assert plain.isfinite().any()
    drift = [
        json.loads((tmp_path / f"{name}/dpo_32/metrics.jsonl").read_text())["drift"] for name in ("plain", "prefix")
    ]
    assert abs(drift[0]) < 1e-4 < abs(drift[1])


def test_a_base_that_was_trained_anew_is_told(base, make_model, tmp_path):
    flags = [*stage_flags(base, "full_sft", tmp_path), "--max_steps", 1, "--batch_size", 4, *BOTTLENECK]
    pretrained = tmp_path / "pretrain_32"
    shutil.copytree(base / "start/pretrain_32", pretrained)
    train_here("full_sft", *flags, "--init_from", pretrained)
    start = starting_model(config_of(DPOConfig, tmp_path / "full_sft_32", "--adapter", "bottleneck"))
    weights_hash(start.found)
    save_pretrained(make_model(vocab_size=6400, ffn_dim=128, seed=1), pretrained)
    with pytest.raises(ValueError, match="full_sft_32 was learnt on other weights than .*pretrain_32 has"):
        weights_hash(start.found)


@pytest.mark.parametrize("adapter", [BOTTLENECK, PREFIX], ids=["bottleneck", "prefix"])
def test_other_adapters_go_from_stage_to_stage_and_are_never_merged(base, tmp_path, capsys, adapter):
    steps = ["--max_steps", 3, "--batch_size", 4, "--learning_rate", 1e-2]
    train_here("full_sft", *stage_flags(base, "full_sft", tmp_path), *steps, *adapter)
    first = tmp_path / "full_sft_32"
    shape = load_pretrained(first).config
    train_here("dpo", *stage_flags(base, "dpo", tmp_path), *steps, *adapter[:2], "--init_from", first)
    assert load_adapter(tmp_path / "dpo_32", shape)[0] == load_adapter(first, shape)[0]
    records = [json.loads(line) for line in (tmp_path / "dpo_32/metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    flags = ["--model", str(first), "--prompt", "Hi", "--max_new_tokens", "4"]
    assert eval_model.main(flags) == 0
    assert convert.main([str(first), "--to", "adapter_merged", "--out", str(tmp_path / "whole")]) == 2
    assert (
        f"a {adapter[1]} adapter is no change of weights" in capsys.readouterr().err
        and not (tmp_path / "whole").exists()
    )
    done = run_here("dpo", *stage_flags(base, "dpo", tmp_path / "other"), "--init_from", first)
    assert done.returncode == 2 and f"--adapter {adapter[1]}" in done.stderr
