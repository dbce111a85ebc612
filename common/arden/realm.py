"""Another realm: its text, questions and tables to read, and the configurations to train on it.

    make realm SEED=7 PEOPLE=400        writes out/realm/7
    make all REALM=7                    the four stages on it

out/realm/<seed>/
    chronicle.txt     what the base model reads, documents parted by `* * *`
    questions.jsonl   a question a line: its use (sft, align, dev, test), kind and answer (null:
                      nobody can know), see common.arden.questions
    people.csv        a row a person: use, and what is told
    places.csv        rivers of towns, guilds of trades
    configs/          configs/arden/ for this realm: as many documents and steps a person
"""

import csv
import io
import json
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from common.arden import questions as ask
from common.arden.chronicle import Document, entropy, write_chronicle
from common.arden.task import VALIDATION_DOCUMENTS
from common.arden.world import PEOPLE, USES, Realm, build_realm, relations
from common.artifacts import write_text
from common.config import parse_config, run
from common.device import fast_attention, has_bf16
from common.errors import UserError
from common.gpt import build_gpt
from common.gpt_config import build_config

CONFIGS = Path("configs/arden")
STAGES = ("pretrain", "sft", "reward", "rlhf", "rlhf_judge")
TIMED_STEPS = 5


@dataclass
class RealmConfig:
    """Which realm."""

    seed: int = field(default=7, metadata={"help": "another seed, another realm"})
    people: int = field(default=PEOPLE, metadata={"help": "inhabitants; nine facts each"})
    output_dir: str = field(default="", metadata={"help": "default: out/realm/<seed>"})


def main() -> None:
    """Write the realm's folder and print what it holds."""
    (config,) = parse_config(RealmConfig)
    realm = build_realm(config.seed, config.people)
    folder = Path(config.output_dir or f"out/realm/{config.seed}")
    configs = make_configs(realm, folder)
    made = f"# Written by `make realm SEED={config.seed} PEOPLE={config.people}`\n"
    files = {
        folder / "configs" / f"{stage}.yaml": made + yaml.safe_dump(values, sort_keys=False)
        for stage, values in configs.items()
    }
    for path, text in files.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path} is another than this command writes: move it away, or give --output_dir"
            )
    documents = list(write_chronicle(realm, "train", configs["pretrain"]["documents"]))
    write_realm(realm, documents, folder)
    for path, text in files.items():
        write_text(path, text)
    for name, value in describe(realm, documents, configs["pretrain"]).items():
        print(f"{name:<26} {value}")
    print(f"\n{folder}: read chronicle.txt; make all REALM={config.seed} trains on it")


def make_configs(realm: Realm, folder: Path) -> dict[str, dict[str, Any]]:
    """`configs/arden/` by stage, for this realm, with its outputs in `folder`.

    Documents and pretraining steps grow with the people, so that a fact is read as often.
    """
    configs = {}
    for stage in STAGES:
        text = (CONFIGS / f"{stage}.yaml").read_text(encoding="utf-8")
        text = text.replace("out/arden/", f"{folder}/")
        text = re.sub(r"(?m)^(parent_command: .*)$", rf"\1 REALM={realm.seed}", text)
        values = yaml.safe_load(text)
        configs[stage] = values | {"realm_seed": realm.seed, "realm_people": len(realm.people)}
    for name in ("documents", "max_steps"):
        of_one = configs["pretrain"][name] / PEOPLE
        configs["pretrain"][name] = round(of_one * len(realm.people))
    return configs


def write_realm(realm: Realm, documents: list[Document], folder: Path) -> None:
    """The files that a person reads."""
    write_text(folder / "chronicle.txt", "\n\n* * *\n\n".join(d.text for d in documents) + "\n")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in question_rows(realm))
    write_text(folder / "questions.jsonl", "".join(lines))
    use_of = {name: use for use, names in realm.splits.items() for name in names}
    people = [
        [person.name, use_of[person.name], *(person.facts.get(r, "") for r in relations())]
        for person in realm.people.values()
    ]
    write_text(folder / "people.csv", _csv([["name", "use", *relations()], *people]))
    places = [[thing, r, what] for r, of in realm.places.items() for thing, what in of.items()]
    write_text(folder / "places.csv", _csv([["thing", "relation", "value"], *places]))


def _csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def question_rows(realm: Realm) -> Iterator[dict[str, Any]]:
    """Every question that a stage can ask, with its use; held-out phrasings are asked by dev, test.

    Of people by what is told and never told of them, of strangers two questions each.
    """
    for use in USES:
        asked = ask.known_questions(realm, use) + ask.two_fact_questions(realm, use)
        asked += ask.stranger_questions(realm, use, f"{realm.seed} {use}")
        asked += ask.stranger_two_fact_questions(realm, use, f"{realm.seed} {use}")
        asked += ask.untold_questions(realm, use)
        if use in ("dev", "test"):
            asked += ask.known_questions(realm, use, held_out=True)
            asked += ask.untold_questions(realm, use, held_out=True)
        if use == "test":
            asked += ask.strange_name_questions(realm, f"{realm.seed} {use}")
        for question in asked:
            yield {
                "use": use,
                "kind": question.kind,
                "question": question.text,
                "answer": question.reference,
            }


def describe(realm: Realm, documents: list[Document], pretrain: dict[str, Any]) -> dict[str, str]:
    """What `main` prints, by name."""
    validation = list(write_chronicle(realm, "validation", VALIDATION_DOCUMENTS))
    size = sum(len(document.text.encode()) for document in documents)
    uses = ", ".join(f"{use} {len(names)}" for use, names in realm.splits.items())
    step_tokens = pretrain["per_device_train_batch_size"] * pretrain["block_size"]
    seconds = step_seconds(pretrain)
    return {
        "people": f"{len(realm.people):,} ({uses})",
        "facts told": f"{realm.fact_count:,}",
        "strangers to ask after": f"{sum(map(len, realm.strangers.values())):,}",
        "strangers in the chronicle": f"{len(realm.passers_by):,} names",
        "chronicle": f"{len(documents):,} documents, {size / 1e6:.1f} MB",
        "entropy, bits per byte": f"{entropy(validation):.4f} at most",
        "pretraining": f"{pretrain['max_steps']:,} steps of {step_tokens:,} tokens",
        "time for it, here": f"{pretrain['max_steps'] * seconds / 60:.0f} min at {seconds:.2f} s a "
        "step (forward and backward of a few, timed just now)",
    }


def step_seconds(pretrain: dict[str, Any]) -> float:
    """Seconds of forward and backward of one pretraining step: the median of a few.

    On a CPU, processor time shared out among the threads: as if the machine had nothing else to do.
    """
    sizes = build_config(
        pretrain["shape"],
        vocab_size=pretrain["vocab_size"],
        block_size=pretrain["block_size"],
        num_hidden_layers=pretrain["num_hidden_layers"],
        hidden_size=pretrain["hidden_size"],
        num_attention_heads=pretrain["num_attention_heads"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = build_gpt(sizes)
    model.set_attn_implementation(fast_attention(pretrain["block_size"]))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = model.to(device)
    ids = torch.zeros(
        pretrain["per_device_train_batch_size"],
        pretrain["block_size"],
        dtype=torch.long,
        device=device,
    )
    clock, threads = time.perf_counter, 1
    if device.type == "cpu":
        clock, threads = time.process_time, torch.get_num_threads()
    times = []
    for _ in range(1 + TIMED_STEPS):  # the first warms up
        start = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16()):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        loss.item()  # waits for the device
        times.append((clock() - start) / threads)
    return statistics.median(times[1:])


if __name__ == "__main__":
    run(main)
