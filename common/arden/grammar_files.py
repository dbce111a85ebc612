"""Arden's words: the files `grammar/*.yaml`, read and checked.

`common.arden.grammar_form.FORM` says what each file holds. A fault is one line with file, line, key
and what is expected, so that anybody can add words without reading the code. Every scalar is a
text, `no` and `1665` too.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from common.arden.grammar_form import (
    FEWEST_TALES,
    FORM,
    LONGEST_COURTESY,
    TOLD_OF_A_PERSON,
    Form,
    Number,
    Texts,
)
from common.errors import UserError


def read_grammar(folder: Path) -> dict[str, Any]:
    """The files' content by name, as nested dicts and lists.

    Raises:
        UserError: a file is missing or faulty; the line says where, and what is expected.
    """
    grammar = {name: _read(folder / f"{name}.yaml", form) for name, form in FORM.items()}
    for name, fault in _faults_together(grammar):
        raise UserError(f"{os.path.relpath(folder / name)}.yaml, {fault}")
    return grammar


def _read(path: Path, form: Form) -> Any:
    shown = os.path.relpath(path)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}; Arden's grammar wants this file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 ({error.reason}): save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{shown}, line {line}: not valid YAML, {error.problem}") from error
    if node is None:
        raise UserError(f"{shown}: is empty; expected: {_describe(form)}")
    return _take(node, form, shown, "")


def _take(node: yaml.Node, form: Form, path: str, key: str) -> Any:
    """The node's content, once it has the form."""

    def refuse(what: str, at: yaml.Node = node, below: str = key) -> UserError:
        place = f"{path}, line {at.start_mark.line + 1}"
        return UserError(f"{place}{below and ', ' + below}: {what}")

    if isinstance(form, dict):
        if not isinstance(node, yaml.MappingNode):
            raise refuse(f"{_kind(node)}; expected: {_describe(form)}")
        content: dict[str, Any] = {}
        for name_node, value in node.value:
            name = str(name_node.value)
            below = f"{key}.{name}" if key else name
            if name in content:
                raise refuse("stands twice; once is expected", name_node, below)
            if name not in form and "*" not in form:
                raise refuse(f"unknown; expected: {_describe(form)}", name_node, below)
            content[name] = _take(value, form[name if name in form else "*"], path, below)
        for name in form.keys() - content.keys() - {"*"}:
            raise refuse(f"has no {name}; expected: {_describe(form)}")
        return content
    if isinstance(form, Texts):
        if not isinstance(node, yaml.SequenceNode):
            raise refuse(f"{_kind(node)}; expected: {_describe(form)}")
        texts: list[str] = []
        for item in node.value:
            text = _take(item, form.form, path, key)
            if text in texts:
                raise refuse(f"{text!r} stands twice; different texts are expected", item)
            texts.append(text)
        if len(texts) < form.least:
            raise refuse(f"{len(texts)} texts; expected: {_describe(form)}")
        return texts
    if not isinstance(node, yaml.ScalarNode):
        raise refuse(f"{_kind(node)}; expected: {_describe(form)}")
    if isinstance(form, Number):
        if not (node.value.isascii() and node.value.isdigit() and int(node.value)):
            raise refuse(f"{node.value!r}; expected: {_describe(form)}")
        return int(node.value)
    if fault := form.fault(node.value):
        raise refuse(f"{node.value!r} {fault}; expected: {_describe(form)}")
    return node.value


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "keys with values (a text with a colon in it wants quotes)"
    return "a list" if isinstance(node, yaml.SequenceNode) else f"one text, {node.value!r}"


def _describe(form: Form) -> str:
    if isinstance(form, dict):
        return ", ".join("others" if name == "*" else name for name in form)
    if isinstance(form, Texts):
        return f"a list, {form.least} or more, of: {_describe(form.form)}"
    if isinstance(form, Number):
        return "a whole number above 0"
    slots = " and ".join(f"{{{name}}}" for name in form.slots.split())
    return "a text" + (f" with {slots}" if slots else "")


def _faults_together(grammar: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(file, fault) of what is right by itself and wrong beside the rest."""
    names, relations = grammar["names"], grammar["relations"]
    if len(relations) <= TOLD_OF_A_PERSON:
        yield "relations", f"{len(relations)} relations; expected: {TOLD_OF_A_PERSON + 1} or more"
    for part in ("first", "last"):
        for text in set(names[part]) & set(names[f"strange_{part}"]):
            yield "names", f"strange_{part}: {text!r} is in {part} too; expected: no part in both"
    for name, spec in grammar["places"].items():
        if spec["of"] not in relations.keys() - {"friend"}:
            yield "places", f"{name}.of: {spec['of']!r}; expected: a relation that has values"
    for kind, lines in {"feast": "guests", "feud": "causes"}.items():
        spec = grammar["chronicle"][kind][lines]
        for name in spec.keys() - relations.keys():
            yield "chronicle", f"{kind}.{lines}.{name}: unknown; expected: a relation"
        if len(spec) < FEWEST_TALES:
            yield "chronicle", f"{kind}.{lines}: expected: {FEWEST_TALES} relations or more"
    if len(grammar["scene"]["roles"]) < 3:
        yield "scene", "roles: expected: 3 or more, for a dispute has three speakers"
    yield from _said_twice(grammar)
    courtesies = grammar["answers"]["courtesies"]
    for text in courtesies:
        if len(text.split()) > LONGEST_COURTESY:
            yield "answers", f"courtesies: {text!r}; expected: at most {LONGEST_COURTESY} words"
        for other in courtesies:
            if text != other and text.endswith(other):
                yield (
                    "answers",
                    f"courtesies: {text!r} ends in {other!r}; expected: none in another",
                )


def _said_twice(grammar: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """One answer to two facts, or one question after two."""
    said: dict[str, str] = {}
    for file in ("relations", "places"):
        for name, spec in grammar[file].items():
            texts = {name: [spec["answer"].replace("{what}", v) for v in spec.get("values", [])]}
            for key in ("questions", "held_out", "friends", "two_fact"):
                texts[f"{name}.{key}"] = spec.get(key, [])
            for key, of_one in texts.items():
                for text in of_one:
                    if text in said:
                        yield file, f"{key}: {text!r} stands under {said[text]} too; expected: once"
                    said[text] = key
