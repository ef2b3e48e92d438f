"""Two recipes in one loop: what differs between them, and that both are asked the same."""

import json
from pathlib import Path

import pytest
import torch

from dataset.batch import IGNORE
from scripts import contest
from tests.helpers import TINY, make_data
from training import PretrainConfig, load_config
from training.engines import pytorch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contest")
    rows = make_data(folder)["pretrain"].read_text().splitlines()
    rows.append(json.dumps({"text": "the fox sees a bird near the river and then " * 60}))  # beyond a row
    (folder / "pretrain.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def meet(files: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What a recipe is measured by, learns from and decays."""
    seen: dict = {}
    train, build = contest.train, pytorch.build_optimizers

    def watched(engine, objective, source, val, start, identity):
        seen.update(val=val.rows, train=source.rows, identity=identity, config=start.config)
        return train(engine, objective, source, val, start, identity)

    def built(*arguments, **more):
        seen["optimizers"] = build(*arguments, **more)
        return seen["optimizers"]

    monkeypatch.setattr(contest, "train", watched)
    monkeypatch.setattr(pytorch, "build_optimizers", built)
    flags = ["--data_path", files / "pretrain.jsonl", "--val_fraction", 0.2, "--cache_dir", files / "cache"]
    flags += ["--out_dir", files / "out", "--run_name", recipe, "--dim", 32, *TINY, "--max_seq_len", 512]
    flags += ["--max_steps", 3, "--eval_interval", 3, "--log_interval", 1, *contest.RECIPES[recipe].flags.split()]
    contest.main(recipe, load_config(PretrainConfig, [str(flag) for flag in flags]))
    lines = (files / "out" / recipe / "metrics.jsonl").read_text().splitlines()
    return seen | {"records": [json.loads(line) for line in lines]}


def test_recipes_differ_in_rows_and_decay_and_are_asked_the_same(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = (meet(files, recipe, monkeypatch) for recipe in contest.RECIPES)
    every = list(range(len(ours["val"])))
    assert len(every) == len(other["val"]) > 1
    assert torch.equal(ours["val"].collate(every).input_ids, other["val"].collate(every).input_ids)
    assert len(other["train"]) == 51 > len(ours["train"])  # a row each
    learnt = other["train"].collate(list(range(51)))
    documents = [other["train"].ids[document] for document in range(51)]
    for row, document in enumerate(documents):
        kept = min(len(document) - 1, contest.ROW)
        assert learnt.input_ids[row, :kept].tolist() == document[:kept].tolist()
        assert (learnt.labels[row] != IGNORE).sum() == kept
    assert max(map(len, documents)) > contest.ROW
    decays = [
        [group["weight_decay"] for each in met["optimizers"] for group in each.param_groups] for met in (ours, other)
    ]
    assert 0.0 in decays[0] and set(decays[1]) == {0.01}
    assert other["config"].warmup_steps == 0 and other["config"].learning_rate == 5e-4
    for met in (ours, other):
        assert met["records"][-1]["val_bpb"] > 0 and met["records"][-1]["seconds"] > 0
    assert ours["identity"] != other["identity"]  # one does not go on from the other's checkpoint
