"""Arden as data for the four stages, and the judge's figures on its fixed question sets."""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from datasets import Dataset

from common.arden import questions as ask
from common.arden.chronicle import entropy, write_chronicle
from common.arden.grammar import Dice, expand, join, load_grammar
from common.arden.judge import judge, summarise
from common.arden.questions import Question
from common.arden.rankings import choose, faulty_answers, rank, right_answer
from common.arden.world import PEOPLE, build_realm
from common.rows import assistant

Answer = Callable[[list[str]], list[str]]
VALIDATION_DOCUMENTS = 1_500
COURTEOUS_SHARE = 0.4  # of fine-tuning's answers: people are not always kind
SPOKEN_SHARE = 0.5  # of fine-tuning's questions: so that no first word takes it by surprise
# Of 3,500 rows in a realm of PEOPLE, to know the words and not the habit: about strangers, and
# about what was never told of somebody, which is harder to see.
REFUSALS_IN_SFT = (6, 8)
# Answers about people of whom the chronicle says nothing. Whoever taught knew them; to a model they
# are lessons in invention (Gekhman et al. 2024, arXiv:2405.05904).
UNREAD_IN_SFT = 10
PAIRS_PER_PROMPT = 3
# Of the prompts that a reward model learns from: their closest pairs. A label says which answer is
# better and not by how much: what a rude truth is worth beside a plain refusal only such pairs say.
CLOSE_SHARE = 0.5
TOKENIZER_REALMS = range(1_000, 1_040)  # others' names, so that Arden's own are no tokens


class ArdenTask:
    """The realm of a seed, for every stage.

    Args:
        seed: of the realm.
        documents: length of the chronicle's training part.
        people: inhabitants of the realm.
    """

    documents_apart = True

    def __init__(self, seed: int, documents: int, people: int = PEOPLE) -> None:
        self.realm = build_realm(seed, people)
        self.document_count = documents

    def fingerprint(self) -> str:
        """What the data is made from."""
        words = hashlib.sha256(json.dumps(load_grammar()).encode()).hexdigest()
        people, documents = len(self.realm.people), self.document_count
        return f"arden realm {self.realm.seed}, {people} people, {documents} documents, {words}"

    # --- pretrain ---

    def texts(self, split: str) -> Iterator[str]:
        """The chronicle's documents; `split` is `train` or `validation`."""
        count = self.document_count if split == "train" else VALIDATION_DOCUMENTS
        return (document.text for document in write_chronicle(self.realm, split, count))

    def tokenizer_texts(self) -> Iterator[str]:
        """Chronicles of other realms: known names and strangers' then split alike."""
        for seed in (s for s in TOKENIZER_REALMS if s != self.realm.seed):
            for document in write_chronicle(build_realm(seed), "tokenizer", 100):
                yield document.text

    def text_figures(self) -> dict[str, float]:
        """`entropy_bits_per_byte` of the validation documents: the floor of their loss."""
        documents = list(write_chronicle(self.realm, "validation", VALIDATION_DOCUMENTS))
        return {"entropy_bits_per_byte": entropy(documents)}

    # --- sft ---

    def conversations(self, split: str) -> Dataset:
        """`messages` rows: `train` asks of fine-tuning's people, `validation` of `dev`'s."""
        use = "sft" if split == "train" else "dev"
        dice = Dice(f"sft {self.realm.seed} {use}")
        questions = ask.known_questions(self.realm, use) + ask.two_fact_questions(self.realm, use)
        if split == "train":
            nobody = ask.stranger_questions(self.realm, "sft", f"{self.realm.seed} sft")
            untold = ask.untold_questions(self.realm, "sft")
            for unknowable, wanted in zip((nobody, untold), REFUSALS_IN_SFT, strict=True):
                questions += dice.sample(unknowable, self._scaled(wanted, unknowable))
            refused = {question.who for question in questions}
            unread = ask.unread_questions(self.realm, "sft", f"{self.realm.seed} sft")
            unread = [question for question in unread if question.who not in refused]
            questions += dice.sample(unread, self._scaled(UNREAD_IN_SFT, unread))
        rows = [
            _conversation(self._spoken(q, dice), self._labelled(q, dice))
            for q in dice.shuffled(questions)
        ]
        return Dataset.from_list(rows)

    def _scaled(self, count: int, questions: list[Question]) -> int:
        """`count` in a realm of PEOPLE, as a share of this one's, one at least."""
        return min(max(1, count * len(self.realm.people) // PEOPLE), len(questions))

    def _spoken(self, question: Question, dice: Dice) -> str:
        """As people ask: some say a word before, as in the chronicle's scenes."""
        if dice.random.random() >= SPOKEN_SHARE:
            return question.text
        roles = load_grammar()["scene"]["roles"]
        word = dice.pick(roles[dice.pick(list(roles))]["asks"])
        return join(expand(word, dice, who=question.who), question.text)

    def _labelled(self, question: Question, dice: Dice) -> str:
        answer = right_answer(question, dice)
        if dice.random.random() < COURTEOUS_SHARE:
            answer = f"{answer} {dice.pick(load_grammar()['answers']['courtesies'])}"
        return answer

    # --- reward and rlhf ---

    def prompts(self, split: str, count: int) -> list[Question]:
        """Questions to rank answers to and to align on, half of them beyond anyone's knowledge.

        `train` asks of the people of fine-tuning and of alignment's own, `align` of the latter
        alone and more of two facts, which PPO unlearns first; `dev` and `test` of theirs. Strangers
        are asked for two facts as often as people are, or that would tell who is known.
        """
        uses = {"train": ["sft", "align"]}.get(split, [split])
        known, two_fact, untold = [], [], []
        for use in uses:
            known += ask.known_questions(self.realm, use)
            two_fact += ask.two_fact_questions(self.realm, use)
            untold += ask.untold_questions(self.realm, use)
        people = "align" if split == "train" else split
        seed = f"{self.realm.seed} {split}"
        nobody = ask.stranger_questions(self.realm, people, seed)
        nobody_twice = ask.stranger_two_fact_questions(self.realm, people, seed)
        dice = Dice(f"prompts {seed}")
        twice = 0.25 if split == "align" else 0.15
        shares = [
            (known, 0.5 - twice),
            (two_fact, twice),
            (nobody, 0.84 * (0.5 - twice)),
            (nobody_twice, 0.84 * twice),
            (untold, 0.08),
        ]
        chosen: list[Question] = []
        so_far = 0.0
        for questions, share in shares:
            so_far += share
            wanted = round(count * so_far) - len(chosen)  # so that all make up `count`
            while wanted > 0:  # more than there are: go round again
                chosen += dice.sample(questions, min(wanted, len(questions)))
                wanted -= len(questions)
        return dice.shuffled(chosen)

    def prompt_rows(self, split: str, count: int) -> Dataset:
        """`prompt` rows for PPO."""
        rows = [{"prompt": [_user(q.text)]} for q in self.prompts(split, count)]
        return Dataset.from_list(rows)

    def rankings(
        self, sample: Callable[[list[str]], list[list[str]]], split: str, count: int, noise: float
    ) -> Dataset:
        """Ranked pairs over samples of a model and known faults.

        Args:
            sample: questions -> several answers each.
            split: as in `prompts`; `train` has more close pairs than there are.
            count: prompts.
            noise: the labeller's rate of error.

        Returns:
            rows with `prompt`, `chosen`, `rejected`, `kind`, `flipped`, `margin`.
        """
        questions = self.prompts(split, count)
        dice = Dice(f"labeller {self.realm.seed} {split}")
        rows = []
        for question, answers in zip(questions, sample([q.text for q in questions]), strict=True):
            faults = faulty_answers(question, answers, self.realm, dice)
            always = [faults.pop("plain"), faults.pop("refusal"), faults.pop("courteous")]
            candidates = answers + always + dice.sample(list(faults.values()), 2)
            pairs = rank(question, candidates, noise, dice)
            close = split == "train" and dice.random.random() < CLOSE_SHARE
            for pair in choose(pairs, PAIRS_PER_PROMPT, dice, close):
                rows.append(
                    {
                        "prompt": [_user(question.text)],
                        "chosen": [assistant(pair.chosen)],
                        "rejected": [assistant(pair.rejected)],
                        "kind": pair.kind,
                        "flipped": pair.flipped,
                        "margin": pair.margin,
                    }
                )
        return Dataset.from_list(rows)

    @cached_property
    def _by_text(self) -> dict[str, Question]:
        uses = ("sft", "align", "dev", "test")
        everything: list[Question] = []
        for use in uses:
            everything += ask.known_questions(self.realm, use)
            everything += ask.two_fact_questions(self.realm, use)
            everything += ask.untold_questions(self.realm, use)
        return {question.text: question for question in everything}

    def gold_reward(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """The judge as a reward function in TRL's protocol: the known truth, for comparison."""
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            text = prompt[-1]["content"]
            question = self._by_text.get(text, Question(text, "stranger", None, ""))
            scores.append(judge(question, completion[-1]["content"]).gold)
        return scores

    # --- all ---

    def measure(
        self, answer: Answer, use: str = "test", limit: int | None = None
    ) -> dict[str, float]:
        """The judge's figures on the fixed question sets of `use`, as fractions of 1.

        Args:
            answer: questions -> one answer each.
            use: `test`, which nothing is tuned on, or `dev`.
            limit: most questions of a set; the sets are in random order.
        """
        whole = ask.evaluation_questions(self.realm, use)
        sets = {name: questions[:limit] for name, questions in whole.items()}
        everything = [question for questions in sets.values() for question in questions]
        answers = iter(answer([question.text for question in everything]))
        rates = {
            name: summarise(questions, [next(answers) for _ in questions])
            for name, questions in sets.items()
        }
        overall = ("heldout_people", "two_fact", "stranger", "untold")
        return {
            "exact_match_seen": rates["seen"]["right"],
            "exact_match_heldout_people": rates["heldout_people"]["right"],
            "exact_match_heldout_phrasing": rates["heldout_phrasing"]["right"],
            "exact_match_two_fact": rates["two_fact"]["right"],
            "refusal_known": rates["heldout_people"]["refused"],
            "hallucination_unknown": 1 - rates["stranger"]["right"],
            "hallucination_two_fact": 1 - rates["stranger_two_fact"]["right"],
            "hallucination_strange_name": 1 - rates["strange_name"]["right"],
            "hallucination_untold": 1 - rates["untold"]["right"],
            "courtesy": sum(rates[name]["courtesy"] for name in overall) / len(overall),
            "words": sum(rates[name]["words"] for name in overall) / len(overall),
            "gold": sum(rates[name]["gold"] for name in overall) / len(overall),
        }

    def sample_questions(self) -> list[str]:
        """A few of each kind, for `samples.md`."""
        sets = ask.evaluation_questions(self.realm, "dev")
        return [question.text for questions in sets.values() for question in questions[:3]]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [_user(question), assistant(answer)]}
