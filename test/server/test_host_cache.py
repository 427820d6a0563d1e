"""The hierarchical cache: what one mode computed goes to host memory, comes back, and the other mode continues it."""

from __future__ import annotations

import pytest
from harness import SUPPORT, shift_flags
from prompts import assert_same_answers

pytestmark = [pytest.mark.server, pytest.mark.full]

POOL = 1500  # tokens on the device: about three of the prompts
FLAGS = (
    *shift_flags(2, 2), "--enable-hierarchical-cache", "--hicache-ratio", "8", "--hicache-io-backend", "direct",
    "--hicache-mem-layout", "layer_first", "--hicache-write-policy", "write_through",
    "--max-total-tokens", str(POOL), "--chunked-prefill-size", "512",
)  # fmt: skip


@pytest.mark.parametrize(("writer", "reader"), [("sp", "tp"), ("tp", "sp")])
def test_a_prompt_comes_back_from_the_host(servers, reference, writer, reader):
    server = servers.get(*FLAGS, module=[str(SUPPORT / "host_cache_server.py")])
    chosen = [i for i, ids in enumerate(reference.prompts) if 250 < len(ids) < 800]
    prompts = [reference.prompts[i] for i in chosen]
    assert sum(map(len, prompts)) > 2 * POOL
    server.flush_cache()
    with server.policy(writer):
        for ids in prompts:
            server.generate(ids, 1)
    with server.policy(reader) as steps:
        answers = [server.generate(ids) for ids in prompts]
    assert_same_answers(answers, [reference.answers[1][i] for i in chosen])
    assert steps[writer] == 0 < steps[reader]
    assert sum(a.meta["cached_tokens"] for a in answers) > POOL, "nothing came back from the host"
