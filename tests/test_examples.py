"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "pretrain", "sft", "reward", "rlhf")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
WITH_EXAMPLES = [path for path in FILES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples(path: Path) -> None:
    """Seen to fail with 0.36 for 0.35 in one of them."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
