"""Tiny Shakespeare: the text, and questions with answers and rankings made of its dialogue.

The text is a row of speeches: a line with the speaker's name and a colon, the lines spoken, an
empty line. A speech is a prompt, the reply by another speaker that follows it is its answer; for
rankings the same prompt also gets a reply from elsewhere in the plays.
"""

import hashlib
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.artifacts import write_text
from common.errors import UserError

HUB_NAME = "karpathy/tiny_shakespeare"
# That repository holds a script, which `datasets` no longer runs; this is the Hub's own conversion.
HUB_REVISION = "refs/convert/parquet"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

WINDOW = 4  # speeches looked at on each side to tell whether a scene ended
FAR = 50  # rows between a prompt and the false reply, so that it comes from another talk
GROUP = 8  # replies of like length among which false ones are dealt

_SPEAKER = re.compile(r"[A-Z][^\n.?!;:]{0,39}:")
_PLAY_TITLE = re.compile(r"\n\d? ?[A-Z][A-Z ]{4,}$")  # "3 KING HENRY VI" ends some scenes


@dataclass(frozen=True)
class Speech:
    """What one speaker says; `text` may be empty, where the source lost it.

    `scene` counts stretches of talk: it grows wherever the talk seems to break off.
    """

    speaker: str
    text: str
    scene: int = 0

    def __str__(self) -> str:
        return f"{self.speaker}:\n{self.text}"


def find_shakespeare(path: str | None = None) -> Path:
    """The file of Tiny Shakespeare: `path`, else the cached copy, else fetched from the Hub once.

    The cache is `~/.cache/folio`, or what FOLIO_CACHE names.

    Raises:
        UserError: there is no file at `path`, or nothing is cached and the Hub cannot be reached.
    """
    if path is not None:
        if not (given := Path(path).expanduser()).is_file():
            raise UserError(f"{path}: no such file; give DATA=path to a copy of Tiny Shakespeare")
        return given
    cached = Path(os.environ.get("FOLIO_CACHE") or "~/.cache/folio").expanduser()
    cached = cached / "tinyshakespeare.txt"
    if not cached.is_file():
        try:
            text = _download()
        except Exception as error:  # whatever the network, the Hub or its libraries say
            reason = str(error).split("\n")[0][:200]
            raise UserError(
                f"Tiny Shakespeare: neither in {cached} nor to be had from the Hub ({reason}); "
                "give DATA=path to a copy of Tiny Shakespeare, or connect to the network"
            ) from error
        write_text(cached, text)
    return cached


def _download() -> str:
    """The whole text, put together again from the Hub's three splits and checked."""
    from datasets import load_dataset  # slow to import, seldom needed

    splits = load_dataset(HUB_NAME, revision=HUB_REVISION)
    names = ("train", "validation", "test")
    text = "".join(row["text"] for name in names for row in splits[name])
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise ValueError(f"{HUB_NAME} is not the text everyone reports on: another sha256")
    return text


def split_text(text: str) -> tuple[str, str]:
    """First 90% of the characters to train on, last 10% to validate, as nanoGPT does."""
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


def parse_plays(text: str) -> list[Speech]:
    """Cut a text into speeches; what comes before the first speaker's name is left out.

    "A:\\nHo!\\n\\nB:\\nWho's there?\\n" gives Speech("A", "Ho!") and Speech("B", "Who's there?").
    """
    speeches: list[tuple[str, str]] = []
    breaks = {0}
    for block in text.replace("\r\n", "\n").split("\n\n"):
        first, _, spoken = block.strip("\n").partition("\n")
        if not first:
            continue
        if block.startswith("\n"):  # one empty line more than between speeches
            breaks.add(len(speeches))
        if _SPEAKER.fullmatch(first):
            speeches.append((first[:-1], spoken))
        elif speeches:  # an empty line within a speech
            speaker, before = speeches[-1]
            speeches[-1] = (speaker, f"{before}\n\n{block}".strip("\n"))
        if speeches and _PLAY_TITLE.search(speeches[-1][1]):
            speaker, spoken = speeches[-1]
            speeches[-1] = (speaker, _PLAY_TITLE.sub("", spoken))
            breaks.add(len(speeches))
    return _number_scenes(speeches, breaks)


def _number_scenes(speeches: list[tuple[str, str]], breaks: set[int]) -> list[Speech]:
    """Count scenes: a new one at each of `breaks` and where no one goes on speaking.

    Stage directions are lost in this text. But within a scene people speak more than once; where
    the last few speakers and the next few have no one in common, another scene has begun.
    """
    numbered, scene = [], -1
    for index, (speaker, spoken) in enumerate(speeches):
        before = {name for name, _ in speeches[max(0, index - WINDOW) : index]}
        after = {name for name, _ in speeches[index : index + WINDOW]}
        scene += index in breaks or before.isdisjoint(after)
        numbered.append(Speech(speaker, spoken, scene))
    return numbered


def dialogue_pairs(speeches: Sequence[Speech], max_chars: int) -> list[dict[str, Any]]:
    """Every speech with the reply that follows it in the same scene, as rows of `messages`.

    Pairs where a speech is lost are left out, and those whose speaker goes on.

    Args:
        speeches: of one split of the text, so that no pair stands on both sides.
        max_chars: the longest speech and the longest reply, names included.

    Returns:
        {"messages": [user "ROMEO:\\n...", assistant "JULIET:\\n..."]}, in the text's order.
    """
    rows = []
    for speech, reply in pairwise(speeches):
        if speech.scene != reply.scene or speech.speaker == reply.speaker:
            continue
        if not speech.text.strip() or not reply.text.strip():
            continue
        if max(len(str(speech)), len(str(reply))) <= max_chars:
            rows.append({"messages": [_message("user", speech), _message("assistant", reply)]})
    return rows


def _message(role: str, speech: Speech) -> dict[str, str]:
    return {"role": role, "content": str(speech)}


def false_replies(pairs: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rank each true reply above one of like length from elsewhere in the same pairs.

    Replies are dealt round within small groups of like length, so that each stands once as chosen
    and once as rejected: no reply is better by itself, only the prompt tells. Pairs that would get
    a reply from nearby, or an equal one, are left out.

    Args:
        pairs: rows of `dialogue_pairs`.
        seed: of the dealing.

    Returns:
        {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}, in the order of `pairs`.
    """
    generator = random.Random(seed)
    replies = [pair["messages"][1] for pair in pairs]
    shuffled = generator.sample(range(len(pairs)), len(pairs))  # equal lengths: from anywhere
    by_length = sorted(shuffled, key=lambda index: len(replies[index]["content"]))
    false: dict[int, int] = {}
    for start in range(0, len(by_length), GROUP):
        group = by_length[start : start + GROUP]
        generator.shuffle(group)
        false.update(zip(group, group[1:] + group[:1], strict=True))
    return [
        {
            "prompt": [pairs[index]["messages"][0]],
            "chosen": [replies[index]],
            "rejected": [replies[other]],
        }
        for index, other in sorted(false.items())
        if abs(index - other) >= FAR and replies[index]["content"] != replies[other]["content"]
    ]
