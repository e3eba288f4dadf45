"""Where prompts come from: a file, or the target itself.

A chat model that is shown its template up to the start of the user's turn goes on as a user would: it writes
a question, and ends the turn. That gives prompts in the distribution the model was tuned on, for nothing but
time. Half of them get a few first words (an *opener*), because a small model left alone keeps asking the same
kind of question.
"""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import ConfigError

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 3, 200

OPENERS = (
    "What is",
    "What are",
    "Why do",
    "Why is",
    "How do I",
    "How does",
    "How can I",
    "Who was",
    "When did",
    "Where is",
    "Explain",
    "Describe",
    "Summarize",
    "Compare",
    "Define",
    "List",
    "Name three",
    "Give me",
    "Tell me about",
    "Write a short story",
    "Write a poem",
    "Write an email",
    "Write a paragraph",
    "Write a letter",
    "Write a summary of",
    "Write a Python function",
    "Write a function that",
    "Write a SQL query",
    "Write a shell command",
    "Return a JSON object",
    "Give me a JSON list",
    "Make a table of",
    "Create a list of",
    "Create a plan for",
    "Translate",
    "Rewrite the following",
    "Correct the grammar",
    "Classify",
    "Calculate",
    "Solve",
    "Suggest",
    "Can you",
    "Could you",
    "I am",
    "I need",
    "I want to",
    "My friend",
    "Please help me",
    "Is it true that",
    "Imagine",
    "Suppose",
    "In your own words",
    "Once upon a time",
    "Continue this story:",
)


def looks_like_text(text: str, num_tokens: int) -> bool:
    """Whether a sampled user turn is worth answering: of sensible length, mostly letters, not one word
    repeated.
    """
    stripped = text.strip()
    if not MIN_PROMPT_TOKENS <= num_tokens <= MAX_PROMPT_TOKENS or len(stripped) < 8 or "\ufffd" in stripped:
        return False
    if "<|" in stripped or not all(char.isprintable() or char in "\n\t" for char in stripped):
        return False
    if sum(char.isalpha() or char.isspace() for char in stripped) < 0.6 * len(stripped):
        return False
    words = stripped.lower().split()
    return len(words) >= 2 and len(set(words)) >= 0.35 * len(words)


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; a line that is a JSON object gives its "prompt" or "text", a JSON string itself.

    Raises ConfigError for a file that cannot be read or holds no prompt, and for an object without either
    key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompts.append(_from_line(line, f"{path}:{number}") if line.lstrip()[0] in '{"' else line.strip())
    if not prompts:
        raise ConfigError(f"--prompts {path}: no prompt found, expected one per line")
    return prompts


def _from_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        return line.strip()  # plain text that happens to start with a quote or a brace
    text = value if isinstance(value, str) else value.get("prompt", value.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            f'{where}: expected a JSON string, or an object with "prompt" or "text"; found {line[:60]!r}'
        )
    return text.strip()
