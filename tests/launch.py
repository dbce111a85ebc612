"""How a stage is started, in one process or in several, and killed."""

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil


def stage_start(stage: str, processes: int = 1, sharded: bool = False) -> list[str]:
    """The command that runs a stage, less its flags; `sharded` by FSDP2 (`sharded_on_cpu.py`)."""
    if processes == 1:
        return [sys.executable, "-m", stage]
    kind, module = ("fsdp", ["tests/sharded_on_cpu.py"]) if sharded else ("ddp", ["-m"])
    config = f"configs/accelerate/{kind}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [*launch, *module, stage]


def kill_when(path: Path, command: list[str], environment: Mapping[str, str]) -> None:
    """Start `command`, and kill it and all that it started as soon as there is `path`."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment) as process:
        while not path.exists():
            assert process.poll() is None, "it ended without a checkpoint"
            time.sleep(0.002)
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
