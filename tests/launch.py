"""How a stage is started, in one process or in several."""

import sys


def stage_start(stage: str, processes: int = 1, sharded: bool = False) -> list[str]:
    """The command that runs a stage, less its flags; `sharded` by FSDP2 (`sharded_on_cpu.py`)."""
    if processes == 1:
        return [sys.executable, "-m", stage]
    kind, module = ("fsdp", ["tests/sharded_on_cpu.py"]) if sharded else ("ddp", ["-m"])
    config = f"configs/accelerate/{kind}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [*launch, *module, stage]
