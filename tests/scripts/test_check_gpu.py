"""The check of a card, without one: what a CPU can answer is asked in earnest, and what fails is told as a failure."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import model.attention
from scripts import check_gpu, check_gpu_engines, check_gpu_parts, check_gpu_promises
from scripts.check_gpu_engines import ENGINES, compared
from scripts.check_gpu_ground import FAILED, LEFT_OUT, OK, PRECISIONS, Ground, Result, judged
from scripts.check_gpu_promises import attention_of
from tests.helpers import PLAIN, ROOT, launched
from tests.training.test_engine_spread import varlen
from tests.training.test_waits import Operators, Python, Watch
from training import ALONE
from training.engines.pytorch import Accumulating, PyTorchEngine

CPU = torch.device("cpu")
SHAPE = ["--dim", "32", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2", "--max_seq_len", "64"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*SHAPE, "--cache_dir", str(tmp_path_factory.mktemp("check_gpu"))]


@pytest.fixture(scope="module")
def ground(flags: list[str]) -> Ground:
    return check_gpu.ground_of(CPU, flags)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engines of one rank in this process, where there is no launcher to wait for; without DeepSpeed's."""

    def spread_over(processes: int, device: str, flags: tuple[str, ...]) -> check_gpu_engines.Losses:
        file = tmp_path / "losses.json"
        if not file.is_file():
            check_gpu_engines.main(["--json", str(file), "--device", device, *flags])
        return json.loads(file.read_text())

    monkeypatch.setattr(check_gpu_engines, "spread_over", spread_over)
    for stage in range(4):
        monkeypatch.delitem(ENGINES[1], f"zero{stage}")


# All together ---------------------------------------------------------------------------------------------------


def test_all_that_a_cpu_can_answer_is_right(here: None, flags: list[str], tmp_path: Path, capsys) -> None:
    file = tmp_path / "card.json"
    status = check_gpu.main([*PLAIN[:2], *flags, "--no_benchmark", "--json", str(file)])
    found = {each["name"]: each for each in json.loads(file.read_text())["checks"]}
    printed = capsys.readouterr().out
    assert status == 0, printed
    answered = {name for name, each in found.items() if each["status"] == OK}
    assert answered == {
        *(f"parity: {stage}, {name}" for stage in ALONE for name in ("float32", "bfloat16", "float16")),
        *(f"engines: {name} x1" for name in ("single", "ddp", "fsdp")),
        *("decoding: greedy", "decoding: 1 row", "decoding: 32 rows", "memory: held"),
    }
    left = [each for each in found.values() if each["status"] == LEFT_OUT]
    assert len(left) == len(found) - len(answered) and all(each["found"] for each in left)
    assert f"{len(answered)} ok, 0 FAILED, {len(left)} left out" in printed.splitlines()[-1]
    assert not any(name.startswith("benchmark") for name in found)


def test_a_wrong_gradient_fails_and_so_does_the_whole(
    flags: list[str], capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one precision: the others are right, and say so."""

    def wrong(engine: PyTorchEngine, loss: Tensor) -> None:
        engine.scaler.scale(loss * (1.1 if engine.dtype == torch.bfloat16 else 1.0)).backward()

    monkeypatch.setattr(PyTorchEngine, "backward", wrong)
    file = tmp_path / "card.json"
    assert check_gpu.main([*PLAIN[:2], *flags, "--only", "parity", "--json", str(file)]) == 1
    assert json.loads(file.read_text())["failed"] == [f"parity: {stage}, bfloat16" for stage in ALONE]
    printed = capsys.readouterr().out
    assert "FAILED" in printed.splitlines()[-1] and "do not train like this" in printed


def test_no_card_is_an_error_that_says_what_to_do(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert check_gpu.main([]) == 2
    assert "use --device cpu" in capsys.readouterr().err


def test_a_check_that_ends_with_an_error_fails_and_the_next_is_asked(ground: Ground, capsys) -> None:
    def crashing(ground: Ground) -> Result:
        raise ZeroDivisionError("no such kernel")

    found = check_gpu.run({"a: one": crashing, "b: two": lambda ground: judged(True, "fine", "")}, ground)
    assert [result.status for result, _ in found.values()] == [FAILED, OK]
    assert found["a: one"][0].found == "ZeroDivisionError: no such kernel"
    assert capsys.readouterr().out.startswith("FAILED    a: one  ZeroDivisionError: no such kernel")


# Waits ----------------------------------------------------------------------------------------------------------


class Raising(Watch):
    """As torch.cuda.set_sync_debug_mode("error"): what would wait is an error, where it is asked for."""

    def note(self, what: str) -> None:
        super().note(what)
        if self.waits:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


@contextlib.contextmanager
def as_on_a_card() -> Iterator[None]:
    watch = Raising("Accumulating.forward_backward", "PyTorchEngine.step")
    with Python(watch.note), Operators(watch.note):
        yield


@pytest.mark.parametrize("stage", ALONE)
def test_updates_wait_for_nothing_and_one_that_does_is_named(
    flags: list[str], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground = Ground(CPU, flags, watching=as_on_a_card)
    assert check_gpu_promises.waits(stage, ground).status == OK
    clip = PyTorchEngine.clip_gradients

    def asking(engine: PyTorchEngine) -> Tensor:
        norm = clip(engine)
        return norm if norm.item() > 0 else norm * 0

    monkeypatch.setattr(PyTorchEngine, "clip_gradients", asking)
    found = check_gpu_promises.waits(stage, ground)
    assert found.status == FAILED and "waits for the card" in found.found and "item" in found.found


# Kernels --------------------------------------------------------------------------------------------------------

RAN = {
    "FlashAttention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>",
        "void (anonymous namespace)::cunn_SoftMaxForward<8, float, float, float>",  # the loss's
    ],
    "efficient": ["fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>::Params)"],
    "cuDNN": ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_f16_knob_3_64x128x64_4x1x1_kernel0_0"],
}
MATH = (
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 9, false, false>",
    "void (anonymous namespace)::softmax_warp_backward<float, float, float, 9, false, false>",
    "aten::_scaled_dot_product_attention_math",
)
OTHERS = ["ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "aten::mm", "Memcpy HtoD (Pinned -> Device)"]


@pytest.mark.parametrize("kind", RAN)
def test_kernels_are_known_by_name(kind: str) -> None:
    assert attention_of([*OTHERS, *RAN[kind]]) == {kind}


@pytest.mark.parametrize("name", MATH)
def test_the_plain_formula_on_a_card_is_a_failure_whatever_else_ran(name: str) -> None:
    with pytest.raises(ValueError, match="plain formula"):
        attention_of([*OTHERS, *RAN["FlashAttention"], name])


def test_no_attention_at_all_is_a_failure_too() -> None:
    with pytest.raises(ValueError, match="no attention among 3 names"):
        attention_of(OTHERS)


# Graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> Iterator[Ground]:
    """Blocks made graphs as on CUDA, with what stands for FlashAttention; the graphs are run as they are."""
    monkeypatch.setattr(model.attention, "has_varlen", lambda *asked: True)
    monkeypatch.setattr(model.attention, "VARLEN_GQA", True)
    monkeypatch.setattr(model.attention, "varlen", varlen)
    monkeypatch.setattr(Accumulating, "compiler", "eager")
    yield Ground(CPU, flags, compiles=True)
    torch.compiler.reset()


def test_graphs_are_counted_and_a_break_is_a_failure(compiling: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [check_gpu_promises.graphs(stage, compiling) for stage in ("pretrain", "dpo")]
    assert [result.status for result in found] == [OK, OK], found

    def breaking(*asked) -> Tensor:
        torch._dynamo.graph_break()
        return varlen(*asked)

    monkeypatch.setattr(model.attention, "varlen", breaking)
    found = [check_gpu_promises.graphs("pretrain", compiling)]
    assert found[0].status == FAILED and "breaks: none" not in found[0].found


def test_compiled_blocks_are_held_to_the_same_numbers(compiling: Ground) -> None:
    assert check_gpu_parts.parity("dpo", PRECISIONS["bfloat16"], True, compiling).status == OK


# Engines --------------------------------------------------------------------------------------------------------

ONE_PROCESS = {"bfloat16": [9.0, 8.9, 8.8], "float16": [9.0, 8.9, 8.8]}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ([9.001, 8.901, 8.799], OK),
        ([9.0, 8.9, 9.0], FAILED),  # another way
        ([9.0, 9.0, 9.0], FAILED),  # nothing moves
        ([9.0, float("nan"), 8.8], FAILED),
        ("RuntimeError: no", FAILED),
    ],
)
def test_losses_of_an_engine_are_held_to_those_of_one_process(found: list[float] | str, status: str, ground) -> None:
    result = compared({"bfloat16": found, "float16": [9.0, 8.9, 8.8]}, dict(ONE_PROCESS), ground)
    assert result.status == status, result


DEEP = ["--n_layers", "4"]  # of which two ranks with two stages each have a block a stage
SPLIT2 = ["tp2", "pp2 1f1b", "pp2 zb", "pp2 zbv", "pp2 fsdp"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "names"),
    [(2, SPLIT2), (4, ["tp2 fsdp2", "pp2 ddp2", "pp2 tp2"])],
)
def test_split_engines_are_asked_in_real_processes(
    processes: int, names: list[str], here: None, flags: list[str], tmp_path: Path
) -> None:
    asked = [*flags, *DEEP]
    launched(
        ROOT / "scripts/check_gpu_engines.py", *PLAIN[:2], "--json", tmp_path / "split.json", *asked,
        "--engines", *names, ranks=processes,
    )  # fmt: skip
    found = json.loads((tmp_path / "split.json").read_text())
    assert list(found) == names == [name for name in ENGINES[processes] if name in names]
    alone = check_gpu_engines.spread_over(1, "cpu", tuple(asked))["single"]
    results = {name: compared(losses, alone, Ground(CPU, asked)) for name, losses in found.items()}
    assert {name: result.status for name, result in results.items()} == dict.fromkeys(names, OK), results


def test_what_a_model_cannot_be_split_into_is_left_out_with_the_reason(ground: Ground) -> None:
    zbv = ENGINES[2]["pp2 zbv"]
    assert "n_layers is 2" in check_gpu_engines.refusal(zbv, ground)  # of the shape above
    assert check_gpu_engines.refusal(zbv, Ground(CPU, [*ground.flags, *DEEP])) == ""
    assert "at least 2 micro-batches" in check_gpu_engines.refusal(
        ENGINES[4]["pp2 ddp2"], Ground(CPU, [*ground.flags, "--accumulation_steps", "1"])
    )


def test_an_engine_whose_turn_never_came_is_told_from_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of what torchrun said stands in the place of its losses."""
    launch = check_gpu_engines.launch
    ending = [sys.executable, "-c", "import sys; sys.exit('no card left')"]
    monkeypatch.setattr(check_gpu_engines, "launch", lambda command: launch(ending))
    found = check_gpu_engines.spread_over(2, "cuda", ())
    assert found.keys() == ENGINES[2].keys()
    assert set(found["tp2"].values()) == {"torchrun ended with 1: no card left\n"}
    assert compared(found["tp2"], dict(ONE_PROCESS), Ground(CPU, [])).status == FAILED
