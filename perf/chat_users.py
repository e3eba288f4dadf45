"""Chat users for a server: ``python -m perf.chat_users URL USERS MAX_TOKENS TEMPERATURE``.

Each streams one answer after another and throws it away, until the server leaves or the process is ended. A
process of its own, so that what users cost is not counted as the server's, and as little of it as possible.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import Sequence

import aiohttp
import uvloop

from perf.latency import DEFAULT_PROMPTS, read_prompts


async def chat(url: str, users: int, max_tokens: int, temperature: float) -> None:
    """Let the users loose; ends when the server leaves."""
    prompts = [prompt.prompt for prompt in read_prompts(DEFAULT_PROMPTS)]
    connections = aiohttp.TCPConnector(limit=users)
    async with aiohttp.ClientSession(url, connector=connections, timeout=aiohttp.ClientTimeout()) as session:

        async def user(number: int) -> None:
            chance = random.Random(number)
            tokens = max(
                1, max_tokens * (number + 1) // users
            )  # users begin at different places of an answer
            while True:
                body = {
                    "messages": [{"role": "user", "content": chance.choice(prompts)}],
                    "max_tokens": tokens,
                    "temperature": temperature,
                    "seed": chance.getrandbits(32),
                    "stream": True,
                }
                async with session.post("/v1/chat/completions", json=body) as response:
                    response.raise_for_status()
                    async for _ in response.content.iter_any():
                        pass
                tokens = max_tokens

        with contextlib.suppress(aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
            await asyncio.gather(*map(user, range(users)))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    url, users, max_tokens, temperature = sys.argv[1:] if argv is None else argv
    uvloop.run(chat(url, int(users), int(max_tokens), float(temperature)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
