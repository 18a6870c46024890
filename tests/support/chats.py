"""Chat templates for the tests, on the tokenizer of bytes."""

from armt_dist.data.tokenizers import byte_tokenizer

# Each turn is its role's first letter, `:`, the words and a line end; the assistant's words are not marked.
PLAIN = (
    "{% for turn in messages %}{{ turn['role'][0] }}:{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
# The same, with the words of the assistant marked.
MARKED = (
    "{% for turn in messages %}{{ turn['role'][0] }}:"
    "{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] }}\n{% endgeneration %}"
    "{% else %}{{ turn['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
# The last answer is written in capitals until another turn follows.
CHANGING = (
    "{% for turn in messages %}{{ turn['role'][0] }}:"
    "{{ turn['content'] | upper if loop.last else turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def chat_tokenizer(folder, template=PLAIN):
    """Save the tokenizer of bytes with a chat template; return the folder's name."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)
