"""A stage killed by SIGKILL again and again, each run a fork of this process, which imports once.

python tests/kills.py STAGE OUTPUT KILLS SEED --field value ...

Every second kill comes at a random time, every other at a random change of the output directory:
before a file is opened for writing, renamed or removed, which the writing of a checkpoint is full
of. OUTPUT/whole is never killed; a killed run that got to its end is followed by another.
"""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.config import as_flags, run

ROOT = Path(__file__).parents[1]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
CHANGES_A_RUN = 60  # about as many as a tenth of a run of the test's makes


def start(
    main: Callable[[], None],
    output: Path,
    fields: list[str],
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Fork a run of the stage; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        prepare()
        sys.argv = ["stage", "--output_dir", str(output), *fields]
        with (output.parent / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        run(main)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_at_change(output: Path, count: int) -> None:
    """From now on this process kills itself at its `count`-th change below `output`."""
    left = count

    def watch(event: str, args: tuple) -> None:
        nonlocal left
        writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
        if (writes or event in CHANGES) and str(args[0]).startswith(str(output)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def wait(child: int) -> bool:
    """Whether the run was killed; otherwise it went to its end.

    Raises:
        RuntimeError: it failed by itself.
    """
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with exit code {code}")
    return code != 0


def kill_again_and_again(
    main: Callable[[], None], folder: Path, kills: int, seed: int, fields: list[str]
) -> None:
    """The run that is left alone, then killed ones until there were `kills`, then to the end."""
    begin = time.perf_counter()
    wait(start(main, folder / "whole", fields))
    seconds = time.perf_counter() - begin
    chance = random.Random(seed)
    done = lives = 0
    while done < kills:
        output = folder / f"killed-{lives}"
        if done % 2:
            child = start(main, output, fields)
            time.sleep(chance.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        else:
            count = chance.randint(1, CHANGES_A_RUN)
            child = start(main, output, fields, partial(kill_at_change, output, count))
        if wait(child):
            done += 1
        else:
            lives += 1
    wait(start(main, folder / f"killed-{lives}", fields))


def run_killed(stage: str, folder: Path, kills: int, fields: dict[str, Any]) -> None:
    """This file in a process of its own, whose threads no fork inherits; its log where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, __file__, stage, str(folder), str(kills), "0", *as_flags(fields)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr + (folder / "log").read_text()


if __name__ == "__main__":
    stage, folder, kills, seed, *fields = sys.argv[1:]
    main = importlib.import_module(f"{stage}.__main__").main
    kill_again_and_again(main, Path(folder), int(kills), int(seed), fields)
