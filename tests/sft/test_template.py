"""A person's own chat template: what is wrong with it is said before training."""

import re

import pytest

from common.errors import UserError
from common.tokenizer import train_characters
from sft.template import check_template

OWN = (
    "<|bos|>{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|eos|>"
    "{% else %}<|assistant|>{% generation %}{{ m.content }}<|eos|>{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_good_templates_pass():
    tokenizer = train_characters(["ask say"])
    check_template(tokenizer)
    tokenizer.chat_template = OWN
    check_template(tokenizer)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (OWN, "", "has no chat template: give it one"),
        ("{% endfor %}", "", "the chat template cannot render user and assistant: "),
        ("{% generation %}{{ m.content }}<|eos|>{% endgeneration %}", "{{ m.content }}<|eos|>",
         "has no generation marks: write {% generation %}"),
        ("<|eos|>{% endgeneration %}", "{% endgeneration %}<|eos|>",
         "leave out '<|eos|>' after an answer, so that the model would never learn to stop"),
        ("<|user|>{{ m.content }}", "<|user|>{% generation %}{{ m.content }}{% endgeneration %}",
         "generation marks hold 'asksay<|eos|>asksay<|eos|>' of two questions"),
        ("{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}say",
         "opens an answer (add_generation_prompt) otherwise than it writes one"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(old: str, new: str, message: str):
    """Each was seen to pass with its check left out."""
    tokenizer = train_characters(["ask say"])
    assert old in OWN
    tokenizer.chat_template = OWN.replace(old, new)
    with pytest.raises(UserError, match=re.escape(message)):
        check_template(tokenizer)
