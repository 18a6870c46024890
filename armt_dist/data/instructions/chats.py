"""Tokens of a chat by the tokenizer's own template, and which of them the assistant wrote."""

import re
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ...config import ConfigError, one_line

Messages = list[dict[str, str]]
# With it, a template marks the assistant's words itself.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokenizer's template of chats; None if it has none."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else None


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids int64 [n] of a chat, and which the assistant wrote, bool [n].

    A template that marks the assistant's words says which. For others, they are what a turn of the assistant adds to
    the prompt before it, which must not change with later turns. Raises ConfigError, which begins with `where`.
    """
    template = chat_template(tokenizer)
    if template and GENERATION.search(template) and tokenizer.is_fast:
        found = apply(tokenizer, messages, where, return_assistant_tokens_mask=True)
        return np.array(found["input_ids"]), np.array(found["assistant_masks"], dtype=bool)
    ids = np.array(apply(tokenizer, messages, where)["input_ids"])
    scored = np.zeros(len(ids), dtype=bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, until = (
            np.array(apply(tokenizer, messages[: i + own], where, add_generation_prompt=not own)["input_ids"])
            for own in (0, 1)
        )
        if not (begins(until, before) and begins(ids, until)):
            raise ConfigError(
                f"{where}, messages.{i}: the tokenizer's chat template writes the turns before differently once others "
                "follow, so that the answer's tokens are not known; use a template with {% generation %}"
            )
        scored[len(before) : len(until)] = True
    return ids, scored


def apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, **options: Any) -> Any:
    """Return what `apply_chat_template` does. Raises ConfigError where the template refuses the chat."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}, messages: the tokenizer's chat template refuses them ({one_line(error)}); correct the turns"
        ) from None


def begins(ids: np.ndarray, start: np.ndarray) -> bool:
    """Return whether `ids` begins with `start`."""
    return np.array_equal(ids[: len(start)], start)
