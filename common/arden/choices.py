"""The notation of choices in Arden's grammar: `[a|b|c]`, nesting allowed."""


def split_choice(template: str) -> tuple[str, list[str], str] | None:
    """The text before the first `[a|b]`, its options, the text behind; None where there is none.

    >>> split_choice("so [a|b[c|d]] it is")
    ('so ', ['a', 'b[c|d]'], ' it is')

    Raises:
        ValueError: a bracket or a bar that belongs to no choice.
    """
    start = template.find("[")
    before = template if start < 0 else template[:start]
    if "]" in before or "|" in before:
        raise ValueError("a ] or | without its [")
    if start < 0:
        return None
    depth, options, piece = 0, [], start + 1
    for position in range(start, len(template)):
        char = template[position]
        if char == "[":
            depth += 1
        elif char == "|" and depth == 1:
            options.append(template[piece:position])
            piece = position + 1
        elif char == "]":
            depth -= 1
            if depth == 0:
                options.append(template[piece:position])
                return before, options, template[position + 1 :]
    raise ValueError("a [ without its ]")


def alternatives(template: str) -> list[str]:
    """Every text that a template's choices can make, its slots unfilled."""
    choice = split_choice(template)
    if choice is None:
        return [template]
    before, options, after = choice
    return [
        before + chosen + rest
        for option in options
        for chosen in alternatives(option)
        for rest in alternatives(after)
    ]
