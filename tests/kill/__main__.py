"""Kill `liar prune --force` at random moments, and fill the disk under it: what was there stays, or the new is there, whole.

    make kill
    .venv/bin/python tests/kill --kills 20 --full-disks 10 --seed 7

A tiny model is pruned over and over by forked children, with budgets that take turns. After every kill the folder has to
load, and to be, from the first byte to the last, the old model or the new one, whichever the moment allows. Full disks are
real ones (a tmpfs of random size) where this process may mount one; elsewhere, and in a quarter of the cases, the system
limits the size of files. Ends with code 1 and a message with the seed if anything is not as promised.
"""

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from children import Stage, tail
from disks import REASONS, Disks
from jobs import KEEPS, make_home, prune
from kills import Kills
from rich.console import Console
from tqdm import tqdm
from whole import Expected, Fault, different, expected_model

import liar

# Files that each model has of its own.
OWN = {"config.json", "model.safetensors", "liar.json", "mask.json", "report.json", "run.json"}
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="python tests/kill", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--full-disks", type=int, default=100, help="under a folder, and again under files (default: 100)")
    parser.add_argument("--seed", type=int, default=None, help="of all draws; what a kill falls on depends on the machine too")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    home, began = Path(tempfile.mkdtemp(prefix="liar-kill-")), time.perf_counter()
    say(f"seed {seed}; liar from {Path(liar.__file__).parent}; working in {home}")
    try:
        faults = attack(home, arguments.kills, arguments.full_disks, seed)
    except Fault as fault:
        say(f"what is left is in {home}")
        faults = [str(fault)]
    except BaseException:
        shutil.rmtree(home)
        raise
    else:
        shutil.rmtree(home)
    for fault in {fault.splitlines()[-1]: fault for fault in reversed(faults)}.values():
        say(f"FAILED (one of its kind): {fault}")
    tried = f"{arguments.kills} kills, {arguments.full_disks} full disks under a folder and {arguments.full_disks} under files"
    say(f"{tried}, --seed {seed}, {time.perf_counter() - began:.0f} s: {len(faults) or 'no'} failures")
    return 1 if faults else 0


def attack(home: Path, kills: int, disks: int, seed: int) -> list[str]:
    """Everything; what was not as promised. Raises the first `Fault` of a kill."""
    draw = random.Random(seed)
    prepare_forks()
    models = make_models(home, seed)
    fell = Kills(home, models, draw).run(kills)
    stages = ", ".join(f"{fell[stage.name]} {stage.name}" for stage in Stage)
    say(f"kills: {kills}, of them {fell['inside']} inside the save; after {fell['beside']} something hidden lay beside")
    say(f"  by stage: {stages}; inside the save, the new model was found {fell['new']} times, else the old one")
    full = Disks(home, draw)
    if "space" not in full.kinds:
        say("no tmpfs can be mounted here (this needs root): RLIMIT_FSIZE in place of full disks")
    for where, fill, what in (("a folder", full.under_a_folder, models), ("files", full.under_files, home / "kills" / "slim")):
        counts = fill(what, disks) if disks else Counter[str]()
        kinds = ", ".join(f"{counts.pop(kind, 0)} {kind}" for kind in REASONS)
        say(f"full disks under {where}: {disks}, by what there was too little of: {kinds}")
        say(f"  in: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return full.faults


def say(text: str) -> None:
    """Print as it is."""
    console.print(text, markup=False)


def prepare_forks() -> None:
    """One thread, and no lock that a killed child could keep from its parent."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # An end by `kill` unmounts disks and removes files, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def make_models(home: Path, seed: int) -> list[Expected]:
    """What undisturbed jobs write; they run here, so that children find everything imported."""
    make_home(home, seed)
    models, out = [], home / "kills" / "slim"
    for job, keep in enumerate(KEEPS):
        with (home / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = prune(home, out, job)
        if code:
            raise Fault(f"an undisturbed run ended with {code}:\n{tail((home / 'log.txt').read_text())}")
        models.append(expected_model(out, keep))
    for one, other in itertools.combinations(models, 2):
        same = OWN - set(different(one.files, other.files))
        assert not same, f"a mixture of models would not be noticed by {same}"
    return models


if __name__ == "__main__":
    sys.exit(main())
