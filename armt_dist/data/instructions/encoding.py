"""From a row to tokens: which are scored, and which may be left out where the row is too long.

A token is one uint32: its id, and two bits that say what it is for.
"""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...config import ConfigError
from ..text.tokenising import Tokeniser
from .chats import Messages, chat_template, chat_tokens

SCORED, CONTEXT = np.uint32(2**31), np.uint32(2**30)
IDS = np.uint32(2**30 - 1)


class RowEncoder:
    """Makes samples, uint32 [n], of rows that have been checked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, leading_tokens: bool):
        self.tokenizer, self.template = tokenizer, chat_template(tokenizer)
        self.tokeniser = Tokeniser(tokenizer, leading_tokens)

    def identity(self) -> list[Any]:
        """Return what the tokens of a row depend on, as JSON has it."""
        return [*self.tokeniser.identity(), self.template]

    def encode(self, row: dict[str, Any], form: str, where: str) -> np.ndarray:
        """Return the tokens of a row. Raises ConfigError, which begins with `where`."""
        if form == "text":
            return self.tokeniser.encode(row["text"]).astype(np.uint32) | SCORED
        if form == "messages":
            messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
            return self.chat(messages, without_longest(messages), where)
        if form == "prompt":
            return self.parts(row["prompt"], "", row["completion"])
        documents, question = "\n\n".join(row["documents"]), row["question"]
        if self.template:
            whole, shorter = (question_turns(text, question, row["answer"]) for text in (documents, ""))
            return self.chat(whole, shorter, where)
        return self.parts(documents, f"\n\nQuestion: {question}\nAnswer:", f" {row['answer']}")

    def parts(self, context: str, question: str, answer: str) -> np.ndarray:
        """Return the tokens of plain texts end to end, of which only the answer and eos are scored."""
        ids = [part.astype(np.uint32) for part in self.tokeniser.encoder([context, question, answer])]
        leading, eos = (part.astype(np.uint32) for part in (self.tokeniser.leading, self.tokeniser.eos))
        return np.concatenate([leading, ids[0] | CONTEXT, ids[1], ids[2] | SCORED, eos | SCORED])

    def chat(self, messages: Messages, shorter: Messages, where: str) -> np.ndarray:
        """Return the tokens of a chat; what the chat `shorter` does not have is context."""
        if self.template is None:
            raise ConfigError(
                f"{where}, messages: a chat, and the tokenizer has no chat template; use one that has, or give "
                "prompt + completion"
            )
        ids, scored = chat_tokens(self.tokenizer, messages, where)
        if not scored.any():
            raise ConfigError(f"{where}, messages: the tokenizer's chat template marks no token as the assistant's")
        sample = ids.astype(np.uint32)
        sample[scored] |= SCORED
        rest, _ = chat_tokens(self.tokenizer, shorter, where)
        start, end = difference(ids, rest)
        sample[start:end][~scored[start:end]] |= CONTEXT
        return sample


def question_turns(documents: str, question: str, answer: str) -> Messages:
    """Return the chat of a question on documents."""
    asked = f"{documents}\n\n{question}" if documents else question
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def without_longest(messages: Messages) -> Messages:
    """Return a chat with the content of its longest turn of the user left out."""
    sizes = [len(turn["content"]) if turn["role"] == "user" else -1 for turn in messages]
    longest = sizes.index(max(sizes))
    if sizes[longest] < 0:
        return messages
    return [turn | {"content": ""} if i == longest else turn for i, turn in enumerate(messages)]


def difference(ids: np.ndarray, shorter: np.ndarray) -> tuple[int, int]:
    """Return where the tokens stand that `shorter` does not have, between the common beginning and the common end."""
    most = min(len(ids), len(shorter))
    start = most if (same := ids[:most] == shorter[:most]).all() else int(same.argmin())
    left = most - start
    ahead = ids[::-1][:left] == shorter[::-1][:left]
    end = left if ahead.all() else int(ahead.argmin())
    return start, len(ids) - end


def shorten(sample: np.ndarray, tokens: int) -> np.ndarray:
    """Return a sample without the beginning of its context, as far as that is needed to have at most `tokens`."""
    over = len(sample) - tokens
    return sample if over <= 0 else np.delete(sample, np.flatnonzero(sample & CONTEXT)[:over])


def pieces(sample: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cut a text into pieces of `tokens`; a last one that predicts nothing is left out."""
    return [sample[start : start + tokens] for start in range(0, len(sample) - 1, tokens)]
