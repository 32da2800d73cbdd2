"""The embedded default: what the three scripts work on when they are called without any flags.

A script that finds nothing there makes what comes before it first, so that `python evaluate.py`
runs in a new checkout: the synthetic shop, its summaries, the training.
"""

import os
import subprocess
import sys
from pathlib import Path

from launch.command import Shared
from launch.processes import gather, ranks
from trsr import InputError

DATA, MODEL, RUN = "data/demo", "models/tiny", Path("runs/demo")
ROOT = Path(__file__).parent.parent
SHOP = ("-m", "prepare.demo", "--out", DATA)
SHOP += ("--train-users", "150", "--val-users", "10", "--test-users", "200")  # as make demo


def make_missing(flags: Shared, data: str, summaries: bool = False, training: bool = False) -> None:
    """Make what is missing of the embedded default: its data, and if asked what follows from them.

    Nothing is done if the user named data, a model or a run, or if the run is about other data.
    Every process has to call it.
    """
    if flags.given & {"data", "model", "run"} or data != DATA:
        return
    make_first(Path(DATA) / "meta.json", *SHOP)
    if summaries:
        make_first(RUN / "summaries.jsonl", "summarize.py")
    if training:
        make_first(RUN / "adapter", "train.py")


def make_first(missing: Path, *command: str) -> None:
    """Make a file or folder by an earlier command, if it is missing. Every process has to call it.

    One process does the work, as its own child, while the others wait.
    """
    if ranks()[0] == 0 and not missing.exists():
        print(f"{missing} is missing, so this comes first: python {' '.join(command)}", flush=True)
        script = [str(ROOT / part) if part.endswith(".py") else part for part in command]
        alone = {
            k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_", "GROUP_"))
        }
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK", "ROLE_WORLD_SIZE"):
            alone.pop(name, None)
        alone["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [alone.get("PYTHONPATH")])])
        status = subprocess.run([sys.executable, *script], env=alone, check=False).returncode
        if status or not missing.exists():
            raise InputError(f"{missing}: could not be made; run python {' '.join(command)}")
    gather(None)
