"""A crowd of requests for a pool that is too small, with a target of the gap between tokens and modes that switch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle

from harness import Answer, Server
from sglang_shift.cost.chunk_budget import FLOOR

STREAMS, STREAM_TOKENS, LONG_TOKENS = 12, 120, 8
PREFIX = 500  # tokens that the long prompts share
# Requests that end by themselves are admitted before all their tokens have room.
CROWDED = ("--max-running-requests", "16", "--shift-tbt-target", "1000", "--schedule-conservativeness", "0.01")


def tokens(count: int, start: int = 0) -> list[int]:
    return [(37 * i + 11 * start + i * i % 7) % 4000 + 10 for i in range(start, start + count)]


def streams() -> list[list[int]]:
    return [tokens(60, start=100 * i) for i in range(STREAMS)]


def long_prompts() -> list[list[int]]:
    return [tokens(PREFIX) + tokens(200, start=1000 * i) for i in range(1, 4)]


@contextmanager
def switching(server: Server, seconds: float = 0.15) -> Iterator[None]:
    """Change the policy every so many seconds."""
    stop, policies = threading.Event(), cycle(["sp", "tp", "calibrated"])

    def switch() -> None:
        while not stop.wait(seconds):
            server.set(shift_policy=next(policies))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(switch)
        try:
            yield
        finally:
            stop.set()
        running.result()


def answers_of(server: Server, page: int) -> list[Answer]:
    """Send all streams, then the long prompts. Return the answers in this order.

    The function fails if something of what the crowd is for did not happen: chunks of the floor beside decodes, cached
    prefixes, retractions, and steps in both modes.

    Args:
        server: A server with the flags :data:`CROWDED`.
        page: The number of tokens of a page of the radix cache.
    """

    def ask(ids: list[int], count: int) -> Answer:
        # SGLang reserves all tokens of a request that ignores the end of its text; only others can outgrow the pool.
        return server.generate(ids, count, return_logprob=False, sampling_params={"ignore_eos": False})

    server.flush_cache()
    server.generate(tokens(PREFIX), 1)
    server.set(shift_tbt_target=0.001)
    before = server.state
    with switching(server), ThreadPoolExecutor(STREAMS + 3) as pool:
        running = [pool.submit(ask, ids, STREAM_TOKENS) for ids in streams()]
        time.sleep(0.5)
        running += [pool.submit(ask, ids, LONG_TOKENS) for ids in long_prompts()]
        answers = [each.result() for each in running]
    after = server.state
    assert after["chunks"]["steps"]["mixed"] > before["chunks"]["steps"]["mixed"], "no prompt beside decodes"
    assert after["chunks"]["last"]["room"] == FLOOR
    assert max(answer.meta["cached_tokens"] for answer in answers[STREAMS:]) > PREFIX - page
    assert sum(answer.meta["num_retractions"] for answer in answers) > 0, "the pool was not too small"
    assert all(after["steps"][mode] > before["steps"][mode] for mode in ("tp", "sp"))
    assert after["switches"] > before["switches"] + 2
    return answers
