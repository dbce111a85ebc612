"""What a row of someone's data may look like, and how each look becomes ours.

`find_shape` recognises a row by its fields; the shape's `convert` checks the row and gives our own
(of several ranked answers a list of them, one for each pair; one without answers if all are equal):

    text        {"text": str}
    messages    {"messages": [{"role", "content"}, ...]}, ending in assistant
    preference  {"prompt": [...], "chosen": [assistant], "rejected": [assistant],
                 "margin": how much better, "kind": a name for such pairs; None if not said}
    prompt      {"prompt": [...]}, ending in user

Messages begin with at most one system turn; then user and assistant take turns.
"""

import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

Messages = list[dict[str, str]]

# ShareGPT's names for the roles.
_ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("system", "user", "assistant")}
_CONVERSATION = 'a list of messages, or a dialogue that begins with "Human:"'
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # Anthropic's, in a dialogue as one text


def assistant(text: str) -> dict[str, str]:
    """A message of an assistant's."""
    return {"role": "assistant", "content": text}


class BadRow(ValueError):
    """A row that cannot be trained on; the message says which field and why."""


@dataclass(frozen=True)
class Row:
    """One row of a source, seen through `columns`: our field -> their column."""

    values: dict[str, Any]
    columns: dict[str, str]
    expected: str = ""

    def name(self, field: str) -> str:
        """What the source calls our field."""
        return self.columns.get(field, field)

    def has(self, field: str) -> bool:
        """Whether the row has it; null counts as missing."""
        return self.values.get(self.name(field)) is not None

    def get(self, field: str) -> Any:
        """The value.

        Raises:
            BadRow: it is missing.
        """
        if not self.has(field):
            raise BadRow(f'"{self.name(field)}" is missing; expected {self.expected}')
        return self.values[self.name(field)]

    def text(self, field: str) -> str:
        """The value, checked to be text with something in it."""
        return _check_text(self.get(field), f'"{self.name(field)}"')

    def is_blank(self, field: str) -> bool:
        """Whether the value is text with nothing in it."""
        value = self.values.get(self.name(field))
        return isinstance(value, str) and not value.strip()

    def messages(self, field: str, role: str) -> Messages:
        """The value as messages; plain text is one message by `role`, or a whole dialogue."""
        value, name = self.get(field), f'"{self.name(field)}"'
        if isinstance(value, str) and re.match(r"\s*Human:", value):
            return _dialogue(value, name, opens_answer=role == "user")
        if isinstance(value, str) and role == "user" and value.rstrip().endswith("\n\nAssistant:"):
            raise BadRow(
                f'{name} ends in "Assistant:" and does not begin with "Human:"; expected it '
                "from its first turn on (what stands before it is a column of its own, `system`)"
            )
        if isinstance(value, str):
            return [{"role": role, "content": self.text(field)}]
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list) or not value:
            raise BadRow(f"{name} is {_show(value)}; expected text, or a list of messages")
        return [_message(item, f"{name}[{i}]") for i, item in enumerate(value)]

    def kind(self) -> str | None:
        """The optional column `kind` of ranked answers; blank, as in CSV, it is none."""
        return self.text("kind") if self.has("kind") and not self.is_blank("kind") else None

    def margin(self) -> float | None:
        """The optional column `margin` of ranked answers; blank it is none, numerals a number."""
        if not self.has("margin") or self.is_blank("margin"):
            return None
        value = self.get("margin")
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        return _check_number(value, f'"{self.name("margin")}"', least=0)

    def system(self) -> Messages:
        """The optional column `system`, as a turn of its own."""
        value = self.values.get(self.name("system"))
        blank = not value or self.is_blank("system")
        return [] if blank else [{"role": "system", "content": self.text("system")}]


def _message(value: Any, name: str) -> dict[str, str]:
    """{"role", "content"}, from that or from ShareGPT's {"from", "value"}."""
    if not isinstance(value, dict):
        raise BadRow(f"{name} is {_show(value)}; expected a message with role and content")
    keys = ("from", "value") if value.get("from") is not None else ("role", "content")
    role, content = (value.get(key) for key in keys)
    if value.get("tool_calls") or value.get("function_call"):
        raise BadRow(f"{name} calls a tool; expected text alone")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(f'{name}: "{keys[0]}" is {_show(role)}; expected system, user or assistant')
    return {"role": _ROLES[role], "content": _check_text(content, f'{name}: "{keys[1]}"')}


def _dialogue(text: str, name: str, opens_answer: bool) -> Messages:
    """Turns of "\\n\\nHuman: Hi\\n\\nAssistant: Ho", as in Anthropic's HH.

    A prompt may end in an "Assistant:" that opens the answer.
    """
    text = "\n\n" + text.replace("\r\n", "\n").lstrip()
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if opens_answer and turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    return [
        {"role": _SPEAKERS[speaker], "content": _check_text(said.strip(), f"{name}[{i}]")}
        for i, (speaker, said) in enumerate(turns)
    ]


def _check_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_show(value)}; expected text")
    if not value.strip():
        raise BadRow(f"{name} is empty; expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} holds half a character (a lone surrogate); expected text") from None
    return value


def _check_number(value: Any, name: str, least: float = -math.inf) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:  # nan, inf, and what is no float's
        raise BadRow(f"{name} is {_show(value)}; expected a number")
    if value < least:
        raise BadRow(f"{name} is {_show(value)}; expected {least:g} or more")
    return float(value)


def _show(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def _refuse_tools(row: Row) -> None:
    if row.values.get("tools"):
        raise BadRow('"tools" lists what may be called; expected text alone')


def _check_turns(messages: Messages, last: str, name: str) -> Messages:
    """`messages` of the field `name`, if roles come in order and the last is `last`."""
    offset = int(messages[0]["role"] == "system") if messages else 0
    for turn, message in enumerate(messages[offset:]):
        expected = ("user", "assistant")[turn % 2]
        if message["role"] != expected:
            raise BadRow(
                f'"{name}": turn {turn + offset + 1} is by {message["role"]}; expected {expected}: '
                "an optional system turn, then user and assistant in turns"
            )
    if len(messages) == offset or messages[-1]["role"] != last:
        found = messages[-1]["role"] if messages else "nobody"
        raise BadRow(f'"{name}": the last turn is by {found}; expected {last}')
    return messages


def _conversation(field: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        _refuse_tools(row)
        messages = row.messages(field, "user")
        if len(messages) == 1 and isinstance(given := row.get(field), str):  # as a cell of CSV
            raise BadRow(f'"{row.name(field)}" is {_show(given)}; expected {_CONVERSATION}')
        messages = row.system() + messages
        return {"messages": _check_turns(messages, "assistant", row.name(field))}

    return convert


def _question_and_answer(question: str, answer: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        if isinstance(row.values.get("label"), bool):
            raise BadRow('"label" says if the answer is good; expected answers to learn from alone')
        _refuse_tools(row)
        prompt = row.messages(question, "user")
        completion = row.messages(answer, "assistant")
        messages = row.system() + prompt + completion
        return {"messages": _check_turns(messages, "assistant", row.name(question))}

    return convert


def _instruction(row: Row) -> Messages:
    """Alpaca's prompt: the instruction and, after an empty line, the input if there is any.

    Before them the turns of `history`, a list of [question, answer].
    """
    instruction, extra = row.text("instruction"), row.values.get(row.name("input"))
    if extra is not None and not isinstance(extra, str):
        raise BadRow(f'"{row.name("input")}" is {_show(extra)}; expected text')
    if extra and extra.strip():
        instruction += "\n\n" + _check_text(extra, f'"{row.name("input")}"')
    return [*_history(row), {"role": "user", "content": instruction}]


def _history(row: Row) -> Messages:
    turns, name = row.values.get(row.name("history")) or [], f'"{row.name("history")}"'
    if isinstance(turns, str) and turns.strip() in ("", "[]"):  # an empty list, as CSV has it
        return []
    if not isinstance(turns, list):
        raise BadRow(f"{name} is {_show(turns)}; expected a list of [question, answer]")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow(f"{name}[{i}] is {_show(turn)}; expected [question, answer]")
        asked, answer = (_check_text(text, f"{name}[{i}]") for text in turn)
        messages += [{"role": "user", "content": asked}, assistant(answer)]
    return messages


def _alpaca(row: Row) -> dict[str, Any]:
    answer = assistant(row.text("output"))
    return {"messages": [*row.system(), *_instruction(row), answer]}


def _question(field: str) -> Callable[[Row], Messages]:
    return lambda row: row.messages(field, "user")


def _preference(asked: Callable[[Row], Messages] | None = None) -> Callable[[Row], dict[str, Any]]:
    """Where chosen and rejected are whole conversations, what they share is the prompt."""

    def convert(row: Row) -> dict[str, Any]:
        chosen = row.messages("chosen", "assistant")
        rejected = row.messages("rejected", "assistant")
        prompt = chosen[:-1]
        both = f'"{row.name("chosen")}" and "{row.name("rejected")}"'
        if prompt != rejected[:-1]:
            raise BadRow(f"{both} differ before their last turn; expected one prompt")
        if not prompt and not asked:
            raise BadRow(f"{both} hold no prompt; expected of each {_CONVERSATION}")
        given = row.values.get(row.name("prompt"))
        if asked and (not prompt or isinstance(given, list)):
            shared, prompt = prompt, asked(row)
            if prompt[len(prompt) - len(shared) :] != shared:
                raise BadRow(f'"{row.name("prompt")}" does not end in what chosen begins with')
        prompt = row.system() + prompt
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            _check_turns(prompt + answer[-1:], "assistant", row.name(name))
        if chosen == rejected:
            raise BadRow(f"{both} are the same; expected two answers")
        return {
            "prompt": prompt,
            "chosen": chosen[-1:],
            "rejected": rejected[-1:],
            "margin": row.margin(),
            "kind": row.kind(),
        }

    return convert


def _ranked(row: Row) -> list[dict[str, Any]]:
    """Every pair whose scores differ, the higher one chosen; the prompt alone where none do."""
    prompt = row.system() + row.messages("prompt", "user")
    answers, scores = row.get("answers"), row.get("scores")
    for field, values in (("answers", answers), ("scores", scores)):
        if not isinstance(values, list) or len(values) < 2:
            raise BadRow(f'"{row.name(field)}" is {_show(values)}; expected a list of at least two')
    if len(answers) != len(scores):
        raise BadRow(
            f'"{row.name("answers")}" has {len(answers)} entries and "{row.name("scores")}" '
            f"{len(scores)}; expected a score for each answer"
        )
    for i, score in enumerate(scores):
        _check_number(score, f'"{row.name("scores")}"[{i}]')
    said = [
        [assistant(_check_text(a, f'"{row.name("answers")}"[{i}]'))] for i, a in enumerate(answers)
    ]
    _check_turns(prompt, "user", row.name("prompt"))
    for one, other in combinations(range(len(said)), 2):
        if said[one] == said[other] and scores[one] != scores[other]:
            name = row.name("answers")
            raise BadRow(f'"{name}"[{one}] and [{other}] are the same with different scores')
    first = [i for i, answer in enumerate(said) if answer not in said[:i]]
    pairs = [
        {
            "prompt": prompt,
            "chosen": said[one],
            "rejected": said[other],
            "margin": float(scores[one] - scores[other]),
            "kind": row.kind(),
        }
        for one in first
        for other in first
        if scores[one] > scores[other]
    ]
    return pairs or [{"prompt": prompt, **dict.fromkeys(("chosen", "rejected", "margin", "kind"))}]


def _prompt(field: str) -> Callable[[Row], dict[str, Any]]:
    """A conversation that ends in an answer gives what came before that answer."""

    def convert(row: Row) -> dict[str, Any]:
        prompt = row.system() + row.messages(field, "user")
        if field != "prompt" and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        return {"prompt": _check_turns(prompt, "user", row.name(field))}

    return convert


class Shape(NamedTuple):
    """One look that rows may have, known by its `fields`."""

    fields: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any] | list[dict[str, Any]]]
    optional: tuple[str, ...] = ("system",)

    def __str__(self) -> str:
        *first, last = self.fields
        return f"{', '.join(first)} and {last}" if first else last

    def asking(self) -> "Shape":
        """The same rows, of which the prompt alone is wanted."""
        if len(self.fields) == 1:  # a conversation, which may as well end in a question
            return self._replace(convert=_prompt(*self.fields))

        def convert(row: Row) -> dict[str, Any]:
            found = self.convert(row)
            found = found[0] if isinstance(found, list) else found
            return {"prompt": found["prompt"] if "prompt" in found else found["messages"][:-1]}

        return self._replace(convert=convert)


_ALPACA_EXTRA = ("input", "system", "history")
_PAIR_EXTRA = ("system", "margin", "kind")
SHAPES: dict[str, list[Shape]] = {
    "text": [Shape(("text",), lambda row: {"text": row.text("text")}, ())],
    "messages": [
        Shape(("messages",), _conversation("messages")),
        Shape(("conversations",), _conversation("conversations")),
        Shape(("prompt", "completion"), _question_and_answer("prompt", "completion")),
        Shape(("question", "answer"), _question_and_answer("question", "answer")),
        Shape(("instruction", "output"), _alpaca, _ALPACA_EXTRA),
    ],
    "preference": [
        *(
            Shape((field, "chosen", "rejected"), _preference(_question(field)), _PAIR_EXTRA)
            for field in ("prompt", "conversations", "question")
        ),
        Shape(
            ("instruction", "chosen", "rejected"),
            _preference(_instruction),
            ("input", "history", *_PAIR_EXTRA),
        ),
        Shape(("chosen", "rejected"), _preference(), _PAIR_EXTRA),
        Shape(("prompt", "answers", "scores"), _ranked, ("system", "kind")),
    ],
}
SHAPES["prompt"] = [
    *(shape.asking() for shape in SHAPES["messages"] + SHAPES["preference"]),
    Shape(("prompt",), _prompt("prompt")),
    Shape(("question",), _prompt("question")),
    Shape(
        ("instruction",), lambda row: {"prompt": row.system() + _instruction(row)}, _ALPACA_EXTRA
    ),
]


def find_shape(format: str, values: dict[str, Any], columns: dict[str, str]) -> Shape:
    """The shape that a source's first row has.

    Where none fits wholly, the one with most fields does; its `convert` names what is missing.
    Where a row has answers, its prompt is what they answer: every stage then holds the same ones
    out. Bare it is taken only of a row without.

    Raises:
        BadRow: none fits, or two fit equally.
    """
    row = Row(values, columns)
    shapes = [s for s in SHAPES[format] if set(columns) <= {*s.fields, *s.optional}]
    there = [sum(map(row.has, shape.fields)) for shape in shapes]
    whole = [s for s, n in zip(shapes, there, strict=True) if n == len(s.fields)]
    part = [s for s, n in zip(shapes, there, strict=True) if n == max(there) > 0]
    if format == "prompt":
        whole = _answered(whole)
    # Of "chosen, rejected" and "prompt, chosen, rejected" the larger explains the row.
    found = [s for s in whole if not any(set(s.fields) < set(o.fields) for o in whole)] or part
    if len(found) == 1:
        return found[0]
    has = f"the row has {', '.join(map(str, values)) or 'no columns'}"
    expected = ", or ".join(map(str, found or shapes))
    if found and found == whole:
        raise BadRow(f"{has}: fits {expected}; name the columns to take with `columns`")
    raise BadRow(
        f'{has}; format "{format}" needs {expected}: rename, or map with `columns` (our: theirs)'
    )


def _answered(whole: list[Shape]) -> list[Shape]:
    """Of a row's looks those with an answer: fine-tuning's, or else the reward model's, if any."""
    for format in ("messages", "preference"):
        known = [shape.fields for shape in SHAPES[format]]
        if found := [shape for shape in whole if shape.fields in known]:
            return found
    return whole
