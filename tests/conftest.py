"""What all tests share: tiny models, the shipped tokenizer, and the folder of real data where there is one."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a network
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pyarrow as pa
import pytest
import torch

from dataset import DEFAULT_TOKENIZER, Tokenizer, load_tokenizer
from dataset.columns import Encoded, Report
from model import GPT, GPTConfig
from tests.helpers import CORES, run_on

torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each worker. Training here would else start a thread a core, and threads that wait for each other, each
    # for its turn on a core that others use too, take ten times as long.
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    run_on([CORES[number % len(CORES)]])

FIRST = ("invariant", "e2e", "resume")  # folders of long modules: begun late, one would keep the other worker waiting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.parent.name) if item.path.parent.name in FIRST else len(FIRST))


TINY = {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "max_seq_len": 64}


@torch.no_grad()
def spread_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights far from their small initial values, norms too, so that a wrong use of any of them shows."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)


def encoded(**columns: list) -> Encoded:
    """Columns as `encode_files` makes them, in two chunks where there is more than one row."""
    kinds = {"spans": pa.list_(pa.int32()), "prompt": pa.int32()}
    schema = pa.schema({name: kinds.get(name, pa.list_(pa.uint16())) for name in columns})
    rows = len(next(iter(columns.values())))
    halves = [slice(0, rows // 2), slice(rows // 2, rows)] if rows > 1 else [slice(0, 1)]
    parts = [
        pa.RecordBatch.from_pydict({name: values[half] for name, values in columns.items()}, schema) for half in halves
    ]
    return Encoded(pa.Table.from_batches(parts), Report(used=rows), "made by hand")


@pytest.fixture
def make_model() -> Callable[..., GPT]:
    """make_model(**changes to TINY) -> GPT in eval mode with well-spread weights, the same at every call."""

    def make(seed: int = 0, **changes: object) -> GPT:
        model = GPT(GPTConfig(**(TINY | changes)))  # type: ignore[arg-type]
        spread_weights(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEFAULT_TOKENIZER)  # type: ignore[return-value]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data in {pretrain,sft,dpo,eval}/, at $SEEDLING_DATA. Tests that ask for it are skipped without it."""
    folder = Path(os.environ.get("SEEDLING_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set SEEDLING_DATA to run this test")
    return folder
