"""Data as people have it: texts, prompts with completions, chats, and questions on documents."""
