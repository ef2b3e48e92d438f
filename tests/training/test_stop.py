"""One of two ranks is asked to stop: both end at the same step, one update later, and leave a checkpoint."""

from pathlib import Path

from tests.helpers import ROOT, TINY, launched, losses, make_data

ASKED_AT = 3  # the update in which rank 1 gets its signal
SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.helpers import train_here
from training.engines.ddp import DDPEngine

class Asked(DDPEngine):
    learnt = 0

    def forward_backward(self, *given):
        Asked.learnt += 1
        if Asked.learnt == {ASKED_AT} and self.world.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return super().forward_backward(*given)

import training.engines.ddp
training.engines.ddp.DDPEngine = Asked
train_here("pretrain", *sys.argv[1:])
print(f"rank {{os.environ['RANK']}} learnt {{Asked.learnt}} updates", flush=True)
"""


def test_both_ranks_stop_at_one_step_and_go_on_from_it(tmp_path: Path) -> None:
    data = make_data(tmp_path)["pretrain"]
    script = tmp_path / "asked.py"
    script.write_text(SCRIPT)
    files = ["--data_path", data, "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path, "--val_fraction", 0]
    flags = ["--dim", 32, *TINY, "--batch_size", 1, "--max_steps", 9, "--save_interval", 0, "--log_interval", 100]
    done = launched(script, *files, *flags)
    said = done.stdout + done.stderr
    for rank in (0, 1):
        assert f"rank {rank} learnt {ASKED_AT + 1} updates" in said
    assert f"stopped at step {ASKED_AT + 1} of 9; the same command continues from here" in said
    assert list(losses(tmp_path, "pretrain")) == [ASKED_AT + 1]
    assert (tmp_path / f"pretrain_32/checkpoints/step_{ASKED_AT + 1:06d}/COMPLETE").is_file()
