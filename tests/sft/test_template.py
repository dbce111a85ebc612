"""A person's own chat template: what is wrong with it is said before training."""

import re

import pytest

from common.errors import UserError
from common.tokenizer import train_characters
from sft.template import check_template

OWN = (
    "<|bos|>{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|eos|>"
    "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|eos|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM = "{% if m.role == 'system' %}"


def test_good_templates_pass():
    """Also one that says that it knows no system turn."""
    tokenizer = train_characters(["ask say lead"])
    check_template(tokenizer)
    tokenizer.chat_template = OWN
    check_template(tokenizer)
    refuses = f"{SYSTEM}{{{{ raise_exception('no system turn') }}}}{{% endif %}}"
    tokenizer.chat_template = OWN.replace("messages %}", "messages %}" + refuses)
    check_template(tokenizer)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (OWN, "", "has no chat template: give one"),
        ("{% endfor %}", "", "the chat template cannot render user and assistant: "),
        ("{% generation %}{{ m.content }}<|eos|>{% endgeneration %}", "{{ m.content }}<|eos|>",
         "has no generation marks: write {% generation %}"),
        ("<|eos|>{% endgeneration %}", "{% endgeneration %}<|eos|>",
         "leave out '<|eos|>' after an answer, so that the model would never learn to stop"),
        ("|>{{ m.content }}", "|>{% generation %}{{ m.content }}{% endgeneration %}",
         "generation marks hold 'asksay<|eos|>asksay<|eos|>' of user `ask`, assistant `say`"),
        ("{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}say",
         "opens an answer (add_generation_prompt) otherwise than it writes one"),
        ("{% generation %}{{ m.content }}", "{% generation %}{{ m.content[:2] }}",
         "generation marks hold 'sa<|eos|>sa<|eos|>' of user `ask`, assistant `say`"),
        ("{% if m.role == 'assistant' %}", "{% if m.role != 'user' %}",
         "generation marks hold 'lead<|eos|>say<|eos|>say<|eos|>' of system `lead`, user"),
        ("{% else %}", "{% elif m.role == 'user' %}", "leaves out what a system turn says"),
        ("<|{{ m.role }}|>{{ m.content }}", "<|{{ m.role }}|>",
         "writes two user turns that say `ask` as '<|bos|><|user|><|eos|><|assistant|>say"),
        ("<|{{ m.role }}|>{{ m.content }}", "<|{{ m.role }}|>{{ m.content if loop.first }}",
         "write what each says, once"),
        ("{% else %}", "{% else %}Question:", "writes signs that the tokenizer does not know"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(old: str, new: str, message: str):
    """Each was seen to pass with its check left out."""
    tokenizer = train_characters(["ask say lead"])
    assert old in OWN
    tokenizer.chat_template = OWN.replace(old, new)
    with pytest.raises(UserError, match=re.escape(message)):
        check_template(tokenizer)
