"""docs/arden.md names files, functions and numbers that exist."""

import re
from pathlib import Path

from common.arden.task import REFUSALS_IN_SFT, UNREAD_IN_SFT
from common.arden.world import (
    FEWEST_PASSERS_BY,
    FEWEST_PEOPLE,
    PEOPLE_SHARES,
    STRANGERS,
    build_realm,
)

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "arden.md").read_text(encoding="utf-8")


def test_files_exist() -> None:
    """Broken by a file renamed in the page."""
    rows = re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
    files = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)]
    assert len(files) >= 10
    for name in files:
        path = name if "/" in name else f"common/arden/{name}"
        assert (ROOT / path).exists(), name
    listed = {Path(name).name for name in files}
    modules = {path.name for path in (ROOT / "common" / "arden").glob("[a-z]*.py")}
    assert modules == listed


def test_table_of_uses_is_the_code_s() -> None:
    """Broken by 30% of people for test in the page."""
    for use, share in PEOPLE_SHARES.items():
        assert re.search(rf"\| `{use}` \| {share:.0%} \| {STRANGERS[use]:,} \|", PAGE), use


def test_numbers_are_the_code_s() -> None:
    """Broken by 13,600 names in the page."""
    realm = build_realm(1)
    groups = [realm.people, realm.passers_by, *realm.strangers.values()]
    names = sum(len(group) for group in groups)
    most = names - sum(STRANGERS.values()) - FEWEST_PASSERS_BY
    for text in (f"{names:,} can be spelled", f"From {FEWEST_PEOPLE} people", f"to {most:,}"):
        assert text in PAGE
    assert f"Realm 1: {realm.fact_count:,} facts" in PAGE
    assert f"(here {sum(REFUSALS_IN_SFT)} of some" in PAGE
    assert f"and {UNREAD_IN_SFT} are about people of whom" in PAGE
