"""The planner: it offers nothing that would be refused, shows what fits, and its line is one that training takes."""

import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from model import GPTConfig
from scripts.scaling_paper import GB
from scripts.split_paper import Network
from scripts.split_plan import Asked, Planned, bubble_table, command, main, plan, plan_tables, shape_of
from tests.helpers import ROOT, environment
from training import PretrainConfig, load_config
from training.distributed import World
from training.engines import engine_name
from training.split import check_micro_batches, check_shape, stages_per_rank

PLACES = [(7e9, 8, 8), (1e9, 24, 8), (3e9, 48, 4), (70e9, 256, 8)]


@pytest.mark.parametrize(("params", "gpus", "node"), PLACES)
def test_no_mixture_is_offered_that_training_refuses(params: float, gpus: int, node: int) -> None:
    asked = Asked(params, gpus, 80 * GB, node)
    found = plan(asked)
    net = found.net
    assert found.fits and found.tried == len(found.fits) + len(found.too_large) + found.refused.total()
    given = of_line(found.fits[0], net, asked)
    for each in [*found.fits, *found.too_large]:
        mix, engine = each.mix, each.mix.engine.split()[0].replace("hsdp", "fsdp")
        config = replace(given, tp=mix.tp, pp=mix.pp, engine=engine, hsdp=mix.engine.startswith("hsdp"))
        config = replace(config, pp_schedule=mix.schedule, fsdp_reshard=None if engine == "ddp" else True)
        world = World(size=gpus, local_size=min(gpus, node), launcher="torchrun", tp=mix.tp, pp=mix.pp)
        assert engine_name(config, world) == engine and stages_per_rank(config) == mix.per_rank
        check_shape(config, GPTConfig(6400, net.dim, net.layers, net.heads, net.kv_heads))
        if mix.pp > 1:
            check_micro_batches(config, each.micro_batches)
        assert each.micro_batches * mix.data == asked.update and world.data_size == mix.data


def of_line(planned: Planned, net: Network, asked: Asked) -> PretrainConfig:
    said = shlex.split(command(planned, net, asked))
    return load_config(PretrainConfig, said[said.index("train_pretrain.py") + 1 :])


def test_the_line_says_what_was_planned() -> None:
    asked = Asked(7e9, 64, 80 * GB)
    found = plan(asked)
    first = {(each.mix.engine, each.mix.schedule, each.mix.checkpointing): each for each in reversed(found.fits)}
    assert len(first) > 10
    for planned in first.values():
        mix, config = planned.mix, of_line(planned, found.net, asked)
        assert (config.tp, config.pp, config.pp_schedule) == (mix.tp, mix.pp, mix.schedule)
        assert config.grad_checkpointing is mix.checkpointing and config.hsdp is mix.engine.startswith("hsdp")
        kept = {"ddp": None, "fsdp": True, "hsdp": True}.get(mix.engine, False)
        assert config.fsdp_reshard is kept
        assert (config.dim, config.n_layers, config.global_batch_size) == (found.net.dim, found.net.layers, 1024)


def test_the_fastest_that_fits_is_first() -> None:
    found = plan(Asked(7e9, 64, 80 * GB))
    assert [each.seconds for each in found.fits] == sorted(each.seconds for each in found.fits)
    assert all(each.held.total <= 72 * GB for each in found.fits)
    assert all(each.held.total > 72 * GB for each in found.too_large)
    # all of 16 bytes a parameter are somewhere
    assert min(each.held.state for each in found.fits) >= 16 * found.net.parameters / 64
    small = plan(Asked(7e9, 64, 40 * GB))
    assert 0 < len(small.fits) < len(found.fits) and small.fits[0].seconds >= found.fits[0].seconds


@pytest.mark.parametrize("params", [1e8, 5e8, 1e9, 7e9, 13e9, 70e9, 4e11])
def test_a_shape_has_about_the_parameters(params: float) -> None:
    net, _ = shape_of(params)
    assert 0.9 < net.parameters / params < 1.1
    GPTConfig(net.vocab, net.dim, net.layers, net.heads, net.kv_heads)  # which refuses what does not fit together


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--params 7e9 --gpus 20", "--gpus 20 are no whole nodes of 8"),
        ("--params 7 --gpus 8", "--params is 7; plans are for 5e+07 to 2e+12"),
        ("--params nan --gpus 8", "--params is nan"),
        ("--params 7e9 --gpus 0", "--gpus is 0; it must be at least 1"),
        ("--params 7e9 --gpus 2048", "--gpus is 2,048; the formulas are for up to 1,024"),
        ("--params 7e9 --gpus 8 --memory nan", "--memory is nan"),
        ("--params 7e9 --gpus 8 --rows 0", "--rows is 0"),
    ],
)
def test_numbers_that_make_no_sense_are_named(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(flags)) == 2
    assert said in capsys.readouterr().err


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("--params 70e9 --gpus 8")) == 1
    shown = capsys.readouterr().out
    assert "0 fit into 90%" in shown and "nothing fits; the smallest" in shown and "torchrun" not in shown
    assert main(shlex.split("--params 7e9 --gpus 8 --update 3 --rows 2")) == 1
    assert "no mixture can be" in capsys.readouterr().out


def test_it_runs_as_part_of_memory_and_without_torch() -> None:
    script = str(ROOT / "scripts/memory.py")
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--plan', '--params', '7e9', '--gpus', '1024']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("0 False\n"), done.stderr
    assert "…" not in done.stdout and "torchrun --nnodes 128" in done.stdout


def test_the_tables_of_the_documentation_are_what_the_script_prints() -> None:
    written = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    missing = [part for part in [bubble_table(), *plan_tables().split("\n\n")] if part not in written]
    assert not missing, "run `python scripts/scaling.py --paper`"
