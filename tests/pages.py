"""What a page of docs names by file and function, and by test."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check_names(page: str, where: str, least: int, *test_folders: Path) -> None:
    """Every `file.py:name` in folders `where` (a pattern) and every `test_name` exists.

    `least`: the page names more of either than this.
    """
    places = re.findall(rf"`((?:{where})/\w+\.py):(\w+)`", page)
    assert len(places) > least
    for file, name in places:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {name}\b", source), (file, name)
    paths = [path for folder in test_folders for path in folder.glob("test_*.py")]
    files = [path.read_text(encoding="utf-8") for path in paths]
    tests = re.findall(r"`(test_\w+)`", page)
    assert len(tests) > least
    for test in tests:
        assert any(f"def {test}(" in text for text in files), test
