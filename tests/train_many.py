"""Started by a launcher: several runs of the entry scripts in the same processes, which saves the seconds of importing.

torchrun --nproc_per_node 2 tests/train_many.py runs.json        [["pretrain", ["--dim", "32", ...]], ...]

"eval_model" may be the last: it takes leave of the other ranks.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval_model
from tests.helpers import no_pictures, train_here
from training import distributed

with no_pictures():
    for stage, flags in json.loads(Path(sys.argv[-1]).read_text()):
        if stage == "eval_model":
            assert eval_model.main(flags) == 0
        else:
            train_here(stage, *flags)
distributed.stop()
