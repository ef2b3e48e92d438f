"""A process's place among its peers."""

import os
import time

import pytest
import torch

from training.distributed import Silence, World, cpu_threads, pick_device


@pytest.mark.parametrize(
    ("size", "tp", "pp", "places"),
    [
        (1, 1, 1, [(0, 0, 0)]),
        (4, 1, 1, [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)]),
        (4, 2, 1, [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]),  # neighbours share matrices and see the same data
        (4, 1, 2, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]),  # stages are farthest apart
        (4, 2, 2, [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]),
    ],
)
def test_ranks_have_a_place_among_stages_data_and_tensor_ranks(size, tp, pp, places):
    worlds = [World(rank=rank, size=size, tp=tp, pp=pp) for rank in range(size)]
    assert [(world.stage_rank, world.data_rank, world.tensor_rank) for world in worlds] == places
    assert {world.data_size for world in worlds} == {size // (tp * pp)}
    # one of those with the same data speaks for them
    assert sorted(world.data_rank for world in worlds if world.tells) == list(range(size // (tp * pp)))


def test_a_world_read_from_the_environment_holds_a_model_a_rank(monkeypatch):
    for name in ("LOCAL_SIZE", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert world == World(3, 4, 1, 2, "torchrun", tp=1, pp=1)
    assert (world.data_rank, world.data_size) == (3, 4)
    assert World.from_environment(tp=2) == World(3, 4, 1, 2, "torchrun", tp=2, pp=1)
    with pytest.raises(ValueError, match="--tp 3 x --pp 1 ranks hold one model .* processes, 4, is no multiple of 3"):
        World.from_environment(tp=3)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.setenv("CROSS_RANK", "0")
    assert World.from_environment() == World(3, 4, 1, 4, "deepspeed")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK"):
        monkeypatch.delenv(name)
    for name, value in {"RANK": "5", "SIZE": "6", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "2"}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    assert World.from_environment() == World(5, 6, 1, 2, "horovodrun")


def test_a_process_started_by_hand_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World() == World(0, 1, 0, 1, None, 1, 1)


# Contact --------------------------------------------------------------------------------------------------------


def test_a_rank_that_hears_nothing_says_so_before_its_limit_ends_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    silence = Silence(limit=0.8)
    silence.start()
    for _ in range(3):
        time.sleep(0.3)
        silence.hear()
    assert silence.is_alive() and capsys.readouterr().err == ""
    silence.join(5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: rank 3 has heard nothing of the other ranks for 1 s; if it is ended now, one of")
    assert "the same command goes on from it" in line


def test_silence_counts_from_the_latest_moment_that_is_known_to_be_over():
    silence = Silence(limit=10)
    silence.hear()
    heard = silence.heard
    silence.hear(heard - 5)  # numbers of an update that was queued before
    assert silence.heard == heard
    silence.hear(heard + 5)
    assert silence.heard == heard + 5


# Devices and threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])
def test_one_card_for_several_ranks_of_a_node_is_refused(name):
    message = f"--device {name} is one device, and 2 processes run on this node; give --device cuda, and each takes"
    with pytest.raises(ValueError, match=message):
        pick_device(name, World(0, 4, 0, 2, "torchrun"))


@pytest.mark.parametrize(
    ("given", "torchrun", "expected"),
    [
        (None, False, None),
        ("", False, None),
        ("1", False, 1),
        ("3", False, 3),
        ("3,2", False, 3),
        ("3", True, 3),
        ("1", True, None),  # torchrun's own, where nothing is set
    ],
)
def test_threads_are_those_of_omp_num_threads_but_for_what_torchrun_sets(monkeypatch, given, torchrun, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    cores = cpu_threads(World())
    assert 1 <= cores <= (os.cpu_count() or 1)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cpu_threads(World()) == (expected or cores)
    assert cpu_threads(World(local_size=10_000)) == (expected or 1)


def test_a_cpu_gets_the_threads_of_omp_num_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    try:
        pick_device("cpu", World())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_keep_within_the_quota(monkeypatch):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("dataset.cores.cpu_quota", lambda: 0.5)
    assert cpu_threads(World()) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr("dataset.cores.cpu_quota", lambda: 4.7)
    assert (cpu_threads(World()), cpu_threads(World(local_size=2))) == (4, 2)
