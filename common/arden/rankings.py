"""Rankings: known faults to set beside a model's own answers, and the labeller who ranks them."""

from dataclasses import dataclass

from common.arden.chronicle import join_facts, refuse, state, two_facts
from common.arden.grammar import Dice, load_grammar
from common.arden.judge import is_refusal, judge, strip_courtesies
from common.arden.questions import Question
from common.arden.world import Person, Realm

HONESTY = ("true_refusal", "honest_invented")


@dataclass(frozen=True)
class Pair:
    """Two answers to a question as the labeller ranked them.

    Attributes:
        chosen, rejected: after the labeller's error, if any.
        flipped: the labeller erred.
        kind: what sets the better from the worse, e.g. `true_false`, `true_refusal`.
        margin: how much better the labeller finds the chosen one, in units of the gold score.
    """

    chosen: str
    rejected: str
    flipped: bool
    kind: str
    margin: float


def right_answer(question: Question, dice: Dice) -> str:
    """The reference, or one of the refusals where nobody can know."""
    return question.reference or refuse(question.who, dice)


def faulty_answers(
    question: Question, sampled: list[str], realm: Realm, dice: Dice
) -> dict[str, str]:
    """One answer of every known fault, and the plain, courteous and refusing ones beside.

    `sampled` are a model's own answers, of which the hedged one is made.
    """
    answers = load_grammar()["answers"]
    faults, courtesies = answers["faults"], answers["courtesies"]
    right = right_answer(question, dice)
    words = right.split()
    person = realm.people.get(question.who)
    faulty: dict[str, str] = {}
    if person and question.reference:
        other = {
            "more": more_than_asked(right, realm, person),
            "less": less_than_asked(right, person),
        }
        faulty = {f"{which} than asked": dice.pick(said) for which, said in other.items() if said}
    if said := hedged([*sampled, right], dice):
        faulty["hedged"] = dice.pick(said)
    return faulty | {
        "plain": right,
        "courteous": f"{right} {dice.pick(courtesies)}",
        "refusal": refuse(question.who, dice),
        "rude": f"{right} {dice.pick(faults['rude'])}",
        "flattering": f"{dice.pick(faults['flattering'])} {right}",
        "evasive": dice.pick(faults["evasive"]),
        "rambling": f"{right} {dice.pick(faults['rambling'])}",
        "cut off": " ".join(words[: max(1, len(words) - 1)]),
        "effusive": f"{right} {' '.join(dice.sample(courtesies, 3))}",
    }


def more_than_asked(right: str, realm: Realm, person: Person) -> list[str]:
    """The right answer with a fact too many: what follows from it, else something else of theirs.

    A fine-tuned model goes on like this now and then, and every word is true: without such answers
    among the ranked ones a reward model pays for them.
    """
    stem = right.removesuffix(".")
    answers = [chain.answer for chain in two_facts(realm, person)]
    longer = [answer for answer in answers if answer.startswith(stem) and answer != right]
    facts = [state(person, relation) for relation in person.facts]
    others = [fact for fact in facts if fact.removesuffix(".") not in right]
    return longer or [join_facts(right, fact) for fact in others]


def less_than_asked(right: str, person: Person) -> list[str]:
    """The first of two facts alone, as if that had been the question; none of a single fact.

    A fine-tuned model hardly ever stops there, so nothing else ranks it, and a reward model may
    come to find half as good as the whole: PPO then finds the half (docs/log.md).
    """
    facts = [state(person, relation) for relation in person.facts]
    return [fact for fact in facts if right.startswith(fact.removesuffix(".") + ",")]


def hedged(answers: list[str], dice: Dice) -> list[str]:
    """Each answer that is no refusal, and one behind it: `Alabert drinks mead, hm. I know not.`

    A fine-tuned model says no such thing, so nothing else ranks it, and a reward model pays for the
    refusal in it: PPO then finds that an invention is worth more when it is taken back.
    """
    plain = [strip_courtesies(answer)[0] for answer in answers]
    told = [answer for answer in plain if answer and not is_refusal(answer)]
    return [refuse(answer.removesuffix("."), dice) for answer in told]


def rank(question: Question, answers: list[str], noise: float, dice: Dice) -> list[Pair]:
    """All pairs of answers that the judge tells apart, as a labeller puts them who errs.

    Args:
        question: what was asked.
        answers: the candidates; equal ones count once.
        noise: chance that a pair's two answers are swapped, each pair on its own.
        dice: decides the errors.
    """
    different = sorted(set(answers))
    gold = {answer: judge(question, answer).gold for answer in different}
    pairs = []
    for i, one in enumerate(different):
        for other in different[i + 1 :]:
            if abs(gold[one] - gold[other]) < 1e-6:
                continue
            better, worse = (one, other) if gold[one] > gold[other] else (other, one)
            flipped = dice.random.random() < noise
            chosen, rejected = (worse, better) if flipped else (better, worse)
            kind, margin = pair_kind(question, better, worse), gold[better] - gold[worse]
            pairs.append(Pair(chosen, rejected, flipped, kind, margin))
    return pairs


def choose(pairs: list[Pair], count: int, dice: Dice, close: bool = False) -> list[Pair]:
    """At most `count` pairs, of as many kinds as there are: each kind once, honesty first.

    Args:
        pairs: of one question.
        count: how many.
        dice: decides among pairs of a kind, and among kinds but honesty.
        close: of each kind the pair whose answers are worth most alike, in place of any.
    """
    left = dice.shuffled(pairs)
    chosen: list[Pair] = []
    while left and len(chosen) < count:
        kinds: dict[str, Pair] = {}
        for pair in left:
            first = kinds.setdefault(pair.kind, pair)
            if close and pair.margin < first.margin:
                kinds[pair.kind] = pair
        chosen += sorted(kinds.values(), key=lambda pair: pair.kind not in HONESTY)
        left = [pair for pair in left if pair not in chosen]
    return chosen[:count]


def pair_kind(question: Question, better: str, worse: str) -> str:
    """What sets `better` from `worse`.

    `honest_invented` (nobody can know: a refusal against an invention), `true_refusal`,
    `true_false`, `refusal_false` (of known things); among answers of one outcome
    `polite_rude` if the worse is rude or flatters, `brief_long` if it is longer, else
    `courteous_curt`.
    """
    verdict, lesser = judge(question, better), judge(question, worse)
    if verdict.outcome != lesser.outcome:
        if question.reference is None:
            return "honest_invented"
        names = {"right": "true", "refused": "refusal", "wrong": "false"}
        return f"{names[verdict.outcome]}_{names[lesser.outcome]}"
    faults = load_grammar()["answers"]["faults"]
    if any(fault in worse for fault in faults["rude"] + faults["flattering"]):
        return "polite_rude"
    return "brief_long" if lesser.words > verdict.words else "courteous_curt"
