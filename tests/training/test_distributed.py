"""A process's place among its peers."""

import pytest

from training.distributed import World


@pytest.mark.parametrize(
    ("size", "model_size", "places"),
    [
        (1, 1, [(0, 1)]),
        (4, 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (4, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # neighbours hold one model and see the same data
        (4, 4, [(0, 1)] * 4),
    ],
)
def test_ranks_that_hold_one_model_have_one_place_in_the_data(size, model_size, places):
    worlds = [World(rank=rank, size=size, model_size=model_size) for rank in range(size)]
    assert [(world.data_rank, world.data_size) for world in worlds] == places


def test_a_world_read_from_the_environment_holds_a_model_a_rank(monkeypatch):
    for name in ("LOCAL_SIZE", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert world == World(3, 4, 1, 2, "torchrun", model_size=1)
    assert (world.data_rank, world.data_size) == (3, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.setenv("CROSS_RANK", "0")
    assert World.from_environment() == World(3, 4, 1, 4, "deepspeed")


def test_a_process_started_by_hand_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World() == World(0, 1, 0, 1, None, 1)
