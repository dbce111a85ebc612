"""What a stage leaves behind, written so that a killed run loses nothing.

out/<profile>/<stage>/
    model.safetensors, config.json, tokenizer ...   the finished model
    checkpoints/     to go on from
    config.yaml      the resolved configuration
    metrics.jsonl    a line per logging step
    summary.json     the final figures, flat names
    samples.md       what the model says
    manifest.json    what it came from: parent, data, code, packages, seed
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from common.config import INCIDENTAL
from common.errors import UserError
from common.tokenizer import hash_tokenizer, load_tokenizer

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers")
MEASURED = "best_of_n.json"  # of a run's parent, by rlhf.best_of_n; it may lie there before the run
MEASURED_FROM = "best_of_n.manifest.json"  # what those figures are of
TELLING = {"summary.json": 1, "manifest.json": 2}  # of a run, in the order in which they go
_held: dict[Path, int] = {}  # directories that this process works in, and what locks them


def hold(folder: Path, flag: str = "--output_dir") -> None:
    """Keep other processes out of `folder`, `flag`'s, as long as this one lives, however it ends.

    Raises:
        UserError: another one is at work there.
    """
    if folder.resolve() in _held:
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(
            f"{folder}: another process is at work there; wait until it ends, or give another "
            f"{flag}"
        ) from error
    except OSError:
        pass  # a file system without locks
    _held[folder.resolve()] = lock


@contextmanager
def held(folder: Path, flag: str) -> Iterator[None]:
    """`hold`, no longer than the block lasts."""
    before = folder.resolve() in _held
    hold(folder, flag)
    try:
        yield
    finally:
        if not before:
            os.close(_held.pop(folder.resolve()))


class StageOutput:
    """The output directory of one stage: new, to be gone on with, or finished.

    Args:
        path: `output_dir`.
        config: the resolved configuration; without incidental fields it identifies the run.
        sources: hashes of what the run reads, e.g. {"parent": ..., "data": ...}.
        overwrite: let `start` set aside what another configuration left there.
        incidental: names of further fields that have no influence on the weights.

    Nothing is touched before `start`, which one process calls: several may look at the same time.
    `finished`: the run is there. `replaces`: what is there is another one, which has to go.

    A run that stopped before its first checkpoint, say at a row that cannot be read, is in nobody's
    way: the next one replaces it. Of any other that is to be replaced everything lies in
    `replaced/` until the new run is finished.

    Raises:
        UserError: the directory holds a run of another configuration, parent or data, or files that
            no run has left there.
    """

    def __init__(
        self,
        path: str,
        config: dict[str, Any],
        sources: dict[str, str],
        overwrite: bool = False,
        incidental: frozenset[str] = frozenset(),
    ) -> None:
        if not path.strip():
            raise UserError("output_dir is empty: name a folder of its own for the run")
        self.path = Path(path)
        self.config = config
        passed_over = INCIDENTAL | incidental
        if config.get("load_best_model_at_end"):  # of the checkpoints that were saved
            passed_over -= {"save_steps"}
        identity = {name: value for name, value in config.items() if name not in passed_over}
        self.manifest = {"config": identity, "sources": sources}
        old = self._read_manifest()
        changed = "" if old is None else first_difference(old, self.manifest, passed_over)
        if changed and not overwrite and self._holds_work():
            raise UserError(
                f"{self.path} holds a run with {changed}: "
                "give another --output_dir, or --overwrite true to replace it"
            )
        self.replaces = bool(changed)
        known = old is not None and not changed
        self.finished = known and (self.path / "summary.json").exists()

    def _read_manifest(self) -> dict[str, Any] | None:
        """Of the run that is there, if any.

        Raises:
            UserError: it cannot be read, or there are files without one, which are no run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir ({self.path}) is a file: name a folder")
        try:
            manifest = read_json(self.path / "manifest.json")
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.path}/manifest.json is damaged ({error}): give another --output_dir, or "
                "delete the folder"
            ) from None
        if manifest is None and self.path.exists() and (others := self._entries()):
            raise UserError(
                f"{self.path} holds {others[0].name}, which no run has left there: give another "
                "--output_dir, for a run may delete what it finds"
            )
        return manifest

    def _entries(self) -> list[Path]:
        """What is the run's own: what has a manifest, as rankings have, answers for itself.

        An empty folder is nobody's: a trainer makes its own before the run starts.
        """
        return [
            entry
            for entry in sorted(self.path.iterdir())
            if not entry.name.startswith(".")
            and entry.name not in (MEASURED, MEASURED_FROM)
            and not (entry / "manifest.json").exists()
            and not (entry.is_dir() and not any(entry.iterdir()))
        ]

    def _clear(self) -> None:
        """Set the old run aside if there is work in it, else delete it.

        A finished run that lies aside already is not given up for one that was not finished. What
        tells of the run goes last, so that a kill in between is made good by the next start.
        """
        aside = self.path / "replaced"
        entries = [entry for entry in self._entries() if entry != aside]
        entries.sort(key=lambda entry: TELLING.get(entry.name, 0))
        interrupted = aside.exists() and not (aside / "manifest.json").exists()
        better_aside, finished = ((place / "summary.json").exists() for place in (aside, self.path))
        if interrupted:
            _set_aside(entries, aside)
        elif self._holds_work() and (finished or not better_aside):
            shutil.rmtree(aside, ignore_errors=True)
            _set_aside(entries, aside)
        else:
            _delete(entries)

    def _holds_work(self) -> bool:
        return (self.path / "summary.json").exists() or any(self.checkpoints.glob("*"))

    def says_finished(self) -> bool:
        """Whether the run is there, as is then said: nothing is left to do."""
        if self.finished:
            print(f"{self.path} is finished; delete it to train it anew")
        return self.finished

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.path / "checkpoints"

    def start(self) -> None:
        """Write the configuration and the manifest; called by one process, before training.

        What another configuration left in the directory is set aside first. From here to `finish`,
        or to the end of this process, no other one can start there.

        Raises:
            UserError: another one is at work there, or nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").touch()
            (self.path / ".writable").unlink()
        except OSError as error:
            raise UserError(
                f"output_dir ({self.path}) cannot be written to ({error.strerror}): give another"
            ) from None
        hold(self.path)
        if self.replaces:
            self._clear()
            self.replaces = False
        code = {"commit": git_commit(), "packages": _package_versions()}
        write_json(self.path / "manifest.json", self.manifest | code)
        write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        summary: dict[str, Any],
        samples: str,
    ) -> None:
        """Write the model, samples and, last, the summary that marks the run as finished."""
        scratch = self.path / "unfinished"
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed here
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in sorted(scratch.iterdir()):
            os.replace(file, self.path / file.name)
        scratch.rmdir()
        write_text(self.path / "samples.md", samples)
        model_hash = {"model": hash_model(self.path)}
        write_json(self.path / "manifest.json", read_json(self.path / "manifest.json") | model_hash)
        write_json(self.path / "summary.json", summary)
        self.settle()
        os.close(_held.pop(self.path.resolve()))

    def settle(self) -> None:
        """The run is finished: the one that it replaced can go."""
        shutil.rmtree(self.path / "replaced", ignore_errors=True)


def _set_aside(entries: list[Path], aside: Path) -> None:
    """Move what a run has left, in this order."""
    aside.mkdir(exist_ok=True)
    print(f"{aside.parent}: the run that was there lies in {aside} until this one is finished")
    for entry in entries:
        entry.rename(aside / entry.name)


def _delete(entries: list[Path]) -> None:
    """Delete files, folders, and links but not what they lead to, in this order."""
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: appends a line per log; a resumed run drops the lines it will redo."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Keep only lines up to `step`, without those that tell of a training that had ended."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [
                line for line in lines if _step_of(line) <= step and "train_runtime" not in line
            ]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer's hook: drop what will be logged again."""
        if state.is_world_process_zero:
            self.rewind(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's hook: write what it logs."""
        if state.is_world_process_zero and logs:
            self.write({"step": state.global_step, **logs})


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line that a killed run left half-written."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def make_variable(folder: Path) -> str:
    """How make is told of a profile's folder.

    >>> make_variable(Path("out/own")), make_variable(Path("out/realm/7"))
    ('PROFILE=own', 'REALM=7')
    """
    kind = "REALM" if folder.parent.name == "realm" else "PROFILE"
    return f"{kind}={folder.name}"


def require_parent(path: str, command: str) -> Path:
    """The directory of a finished model.

    Raises:
        UserError: there is none; names the command that makes it.
    """
    if not (Path(path) / "config.json").exists():
        aside = Path(path) / "replaced"
        there = f" (the one that was replaced lies in {aside})" if aside.is_dir() else ""
        raise UserError(f"no finished model in {path}{there}: run `{command}` first")
    return Path(path)


def require_apart(output_dir: str, *parents: Path) -> None:
    """Refuse to write a run into a directory that it reads.

    Raises:
        UserError: a parent is the output directory.
    """
    for parent in parents:
        if parent.resolve() == Path(output_dir).resolve():
            raise UserError(
                f"output_dir ({output_dir}) is a model that the run reads: give another"
            )


def require_kind(path: Path, *, scores: bool) -> None:
    """Refuse a reward model where a language model is needed, and the other way round.

    Raises:
        UserError: `path` holds the other kind.
    """
    config = read_json(path / "config.json")
    name = (config.get("architectures") or [""])[0]
    if ("SequenceClassification" in name or "Reward" in name) != scores:
        there, needed = "a reward model", "a language model"
        if scores:
            there, needed = needed, there
        raise UserError(f"{path} holds {there} ({name}): {needed} is needed here")


def require_same_tokenizer(one: Path, other: Path) -> None:
    """Refuse two models that would read the same text as different ids.

    Raises:
        UserError: tokenizer or chat template differ.
    """
    ours, theirs = load_tokenizer(one), load_tokenizer(other)
    for what, differ in {
        "tokenizer": hash_tokenizer(ours) != hash_tokenizer(theirs),
        "chat template": ours.chat_template != theirs.chat_template,
    }.items():
        if differ:
            raise UserError(f"{one} and {other} differ in {what}: train one from the other")


def require_go(reward: Path, allow_no_go: bool) -> None:
    """Refuse to align by a reward model that its own stage warns of.

    One that was trained elsewhere has no verdict, and passes.

    Raises:
        UserError: its summary says `go: false`; with the reasons.
    """
    summary = read_json(reward / "summary.json") or {}
    if summary.get("go", True) or allow_no_go:
        return
    reasons = "; ".join(summary["no_go_reasons"])
    raise UserError(
        f"the reward model {reward} is a no-go: {reasons}. "
        f"See {reward}/report.md, train a better one, or --allow_no_go true"
    )


def read_json(path: Path) -> Any:
    """The file's content, or None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Write as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def hash_model(path: Path) -> str:
    """sha256 over a directory's weights (all shards), hex."""
    weights = sorted(path.glob("*.safetensors"))
    return hashlib.sha256("".join(_hash_file(file) for file in weights).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_difference(
    old: dict[str, Any], new: dict[str, Any], passed_over: Collection[str] = ()
) -> str:
    """E.g. `seed 1 (now 2)`; empty where configuration and sources are equal."""
    for group in ("config", "sources"):
        before, after = old.get(group, {}), new[group]
        for name in {**before, **after}:
            if name not in passed_over and before.get(name) != after.get(name):
                if group == "sources":
                    return f"another {name}"
                return f"{name} {before.get(name)} (now {after.get(name)})"
    return ""


def git_commit() -> str:
    """Of the code that runs, `-dirty` behind it if it was changed since."""
    try:
        here = Path(__file__).parent
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
