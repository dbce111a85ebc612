"""Runs a stage under FSDP2 on the CPU, which accelerate gives to GPUs and their like alone.

    accelerate launch --config_file configs/accelerate/fsdp.yaml \
        tests/sharded_on_cpu.py sft --config configs/arden/sft.yaml

With this one choice of accelerate's undone all that follows is what a GPU runs, over gloo.
"""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.state

kinds = {kind.name: kind for kind in accelerate.state.DistributedType}
kinds["MULTI_SDAA"] = kinds["MULTI_CPU"]  # one of those that may shard
accelerate.state.DistributedType = SimpleNamespace(**kinds)  # type: ignore[misc, assignment]

sys.path.insert(0, str(Path(__file__).parent.parent))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
