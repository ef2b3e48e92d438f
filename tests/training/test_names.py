"""Names from elsewhere: each is answered by what it means here, all of a command line at once."""

import re
from dataclasses import fields

import pytest

import eval_model
from tests.helpers import ROOT
from training import STAGES, DPOConfig, PretrainConfig, SFTConfig, load_config
from training.names import ELSEWHERE, LAUNCHER, answer, flags_among

TRAINING = sorted({f.name for stage in STAGES.values() for f in fields(stage.config)})
TALKING = sorted(vars(eval_model.parse_arguments([])))

MINIMIND = (
    "--hidden_size 512 --num_hidden_layers 8 --max_seq_len 340 --use_moe 0 --save_dir ../out --save_weight pretrain "
    "--from_weight none --from_resume 1 --epochs 1 --batch_size 32 --num_workers 8 --use_compile 1"
)


def test_all_unknown_flags_of_a_minimind_line_are_answered_at_once():
    with pytest.raises(ValueError) as error:
        load_config(PretrainConfig, MINIMIND.split())
    said = str(error.value).splitlines()
    assert said[:4] == [
        "unknown flag --hidden_size; here it is --dim",
        "unknown flag --num_hidden_layers; here it is --n_layers",
        "unknown flag --use_moe; no such thing here: every network is dense",
        "unknown flag --save_dir; here it is --out_dir",
    ]
    assert said[5:7] == [
        "unknown flag --from_weight; here it is --init_from FOLDER",
        "unknown flag --from_resume; here it is --resume, which is auto by default: the same command goes on",
    ]
    assert len(said) == 9 and said[-1] == "unknown flag --use_compile; here it is --compile"


@pytest.mark.parametrize(
    ("cls", "argv", "told"),
    [
        (SFTConfig, "--depth=4 --device-batch-size=8", ["--n_layers", "--batch_size"]),  # nanochat
        (SFTConfig, "--num-iterations 5 --eval-every 9", ["--max_steps", "--eval_interval"]),
        (PretrainConfig, "--train.micro_batch_size 4 --train.epochs 2", ["--batch_size", "--epochs"]),  # LitGPT
        (PretrainConfig, "--eval.interval 5 --precision bf16-true", ["--eval_interval", "--dtype float32"]),
        (DPOConfig, "--per_device_train_batch_size 2 --lr 1", ["--batch_size", "--learning_rate"]),  # the Trainer
        (DPOConfig, "--output_dir o --num_train_epochs 3", ["--out_dir", "--epochs"]),
        (  # Megatron-LM
            PretrainConfig,
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 "
            "--micro-batch-size 4 --untie-embeddings-and-output-weights --distributed-timeout-minutes 10",
            ["--tp N", "--pp N", "--pp_stages_per_rank", "--batch_size", "--tie_embeddings no", "--comm_timeout"],
        ),
        (PretrainConfig, "--parallelism.tensor_parallel_degree 2", ["--tp N"]),  # torchtitan
    ],
)
def test_flags_of_other_toolkits_are_answered_by_meaning(cls, argv, told):
    with pytest.raises(ValueError) as error:
        load_config(cls, argv.split())
    said = str(error.value).splitlines()
    assert len(said) == len(told)
    assert all(f"; here it is {name}" in line for name, line in zip(told, said, strict=True)), said


def megatrons_flags() -> list[str]:
    """Those that docs/distributed.md lists."""
    text = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    table = text.split("### Megatron-LM")[1].split("### Horovod")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [flag for row in rows for flag in re.findall(r"--([a-z0-9-]+)", row)]


@pytest.mark.parametrize("theirs", megatrons_flags())
def test_flags_of_megatron_that_the_documentation_lists_are_answered(theirs: str) -> None:
    ours = theirs.replace("-", "_")
    assert ours in TRAINING or ours in ELSEWHERE


def test_unknown_keys_of_a_file_are_answered_without_dashes(tmp_path):
    (tmp_path / "theirs.yaml").write_text("hidden_size: 64\ndim: 64\nuse_moe: 1\nlerning_rate: 1\noutput_dir: o\n")
    with pytest.raises(ValueError) as error:
        load_config(PretrainConfig, ["--config", str(tmp_path / "theirs.yaml")])
    assert str(error.value).removeprefix(f"--config {tmp_path}/theirs.yaml: ").splitlines() == [
        "unknown key hidden_size; here it is dim",
        "unknown key use_moe; no such thing here: every network is dense",
        "unknown key lerning_rate; did you mean learning_rate?",
        "unknown key output_dir; here it is out_dir",
    ]


def test_eval_model_answers_for_its_own_flags(capsys):
    argv = "--load_from model --weight full_sft --hidden_size 512 --history 2 --lr 1 --temprature 0 --max_new_tokens 9"
    assert eval_model.main(argv.split()) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown flag --load_from; here it is --model FOLDER",
        "unknown flag --weight; here it is --model_mode (0 pretrain, 1 full_sft, 2 dpo), or --model FOLDER",
        "unknown flag --hidden_size; here it is --dim",
        "unknown flag --history; no such thing here: all of a conversation that fits the context is kept; "
        "/reset forgets it",
        "unknown flag --lr; in the training scripts it is --learning_rate",
        "unknown flag --temprature; did you mean --temperature?",
    ]


@pytest.mark.parametrize("theirs", ELSEWHERE)
def test_every_answer_names_flags_that_exist(theirs):
    assert theirs == theirs.replace("-", "_").lower()
    for sentence in ELSEWHERE[theirs].split(" | "):
        named = set(re.findall(r"--(\w+)", sentence)) - LAUNCHER
        assert named <= set(TRAINING) or named <= set(TALKING), sentence
    for names in (TRAINING, TALKING):
        assert theirs in names or "did you mean" not in answer(f"--{theirs}", names, training=tuple(TRAINING))


def test_the_first_alternative_whose_flags_exist_is_named():
    assert answer("--weight", ["init_from"]) == "here it is --init_from FOLDER"
    assert answer("--load_best_model_at_end", ["keep_last"]).startswith("no such thing here: --keep_last")
    assert answer("--load_best_model_at_end", ["keep_last", "keep_best"]) == "here it is --keep_best"


@pytest.mark.parametrize(
    ("extra", "flags"),
    [(["--lr", "-3", "--x=1", "a.jsonl"], ["--lr", "--x=1"]), (["stray", "b"], ["stray"]), (["--lr", "-.5"], ["--lr"])],
)
def test_values_of_unknown_flags_are_not_taken_for_flags(extra, flags):
    assert flags_among(extra) == flags
