"""The forms that rows may have, found from their columns, and what each field must hold.

text                              every token is scored
prompt, completion                the completion is scored
messages: [{role, content}, ...]  the assistant's turns are scored
documents: [text, ...], question, answer    the answer is scored
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ...config import ConfigError, one_line


class Form(NamedTuple):
    """What rows of one form have."""

    columns: tuple[str, ...]
    scored: str
    """What the loss counts, for people."""
    answer: str | None = None
    """The column that may not be empty, because it is all that is scored."""


FORMS = {
    "messages": Form(("messages",), "the assistant's turns"),
    "documents": Form(("documents", "question", "answer"), "the answer", "answer"),
    "prompt": Form(("prompt", "completion"), "the completion", "completion"),
    "text": Form(("text",), "every token", "text"),
}


def find_form(columns: Iterable[str], where: str) -> str:
    """Return the first of FORMS whose columns are there. Raises ConfigError naming the columns that were found."""
    columns = list(columns)
    for name, form in FORMS.items():
        if set(form.columns) <= set(columns):
            return name
    known = "; ".join(" + ".join(form.columns) for form in reversed(FORMS.values()))
    raise ConfigError(
        f"{where}: the columns are {one_line(', '.join(columns)) or 'none'}, and one of these sets is needed: {known}; "
        "rename them"
    )


def check_row(row: dict[str, Any], name: str, where: str) -> None:
    """Raise ConfigError, which begins with `where` and the field, for a row that is not of the form `name`."""
    form = FORMS[name]
    for column in form.columns:
        if row.get(column) is None:
            raise ConfigError(f"{where}, {column}: missing; every row needs {' + '.join(form.columns)}")
        if column == "messages":
            check_messages(row[column], where)
        elif column == "documents":
            for i, document in enumerate(check_list(row[column], f"{where}, documents")):
                check_text(document, f"{where}, documents.{i}")
        else:
            check_text(row[column], f"{where}, {column}")
    if form.answer is not None and not row[form.answer].strip():
        raise ConfigError(
            f"{where}, {form.answer}: empty, and the loss counts {form.scored}; fill it or remove the row"
        )


def check_messages(messages: Any, where: str) -> None:
    """Raise ConfigError for what is no chat with an answer in it."""
    answers = 0
    for i, message in enumerate(check_list(messages, f"{where}, messages")):
        if not isinstance(message, dict):
            raise ConfigError(f"{where}, messages.{i}: expected {{role, content}}, got {kind(message)}; correct it")
        for key in ("role", "content"):
            check_text(message.get(key), f"{where}, messages.{i}.{key}")
        if message["role"] == "assistant":
            answers += 1
            if not message["content"].strip():
                raise ConfigError(f"{where}, messages.{i}.content: an empty answer; fill it or remove the row")
    if not answers:
        raise ConfigError(f"{where}, messages: no turn of the assistant, so nothing is scored; remove the row")


def check_list(value: Any, where: str) -> list[Any]:
    """Return a list. Raises ConfigError for anything else."""
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list, got {kind(value)}; correct it")
    return value


def check_text(value: Any, where: str) -> None:
    """Raise ConfigError for what is no text, or cannot be written as UTF-8."""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected text, got {kind(value)}; correct it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: half of a surrogate pair at character {error.start}; correct it") from None


def kind(value: Any) -> str:
    """Describe a value of the wrong type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"{type(value).__name__} {one_line(value, 40)}")
