"""New weights reach every mode, from disk and from a trainer's process group: dense models and experts in both ways."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, greedy, make_model
from harness import Answer
from prompts import assert_same_answers
from safetensors.torch import load_file
from sglang_shift.tools.servers import free_port
from torch.distributed import ProcessGroup

pytestmark = [pytest.mark.server, pytest.mark.full]

PROMPTS = [[(37 * i + 11 * n) % 4000 + 10 for i in range(n)] for n in (1, 5, 30, 100)]
TWO = ["--tp-size", "2", "--enable-shift-parallel", "--shift-threshold", "8"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "biases and one GEMM": Family("Qwen2Config", TWO),
    "divided experts": Family("MixtralConfig", TWO, EXPERTS),
    "replicated experts": Family("MixtralConfig", [*TWO, "--shift-experts", "replicated"], EXPERTS),
}


class Weights:
    """Two checkpoints of one architecture, and what transformers answers with each."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.folders = folder / "first", folder / "second"
        model = make_model(str(self.folders[0]), family)
        self.answers = [[greedy(model, ids, 16) for ids in PROMPTS]]
        make_model(str(self.folders[1]), family)  # for its other files
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
        model.save_pretrained(self.folders[1])
        self.answers.append([greedy(model, ids, 16) for ids in PROMPTS])
        assert [a.tokens for a in self.answers[0]] != [a.tokens for a in self.answers[1]]


@pytest.fixture(scope="module", params=MODELS)
def weights(request, tmp_path_factory):
    weights = Weights(MODELS[request.param], tmp_path_factory.mktemp("weights"))
    weights.flags = MODELS[request.param].flags
    return weights


@pytest.fixture(scope="module")
def server(weights, servers):
    return servers.get("--dtype", "float32", "--model-path", str(weights.folders[0]), *weights.flags)


def check(server: Any, expected: list[Answer]) -> None:
    for mode in ("sp", "tp"):
        with server.policy(mode) as steps:
            assert_same_answers(server.generate_all(PROMPTS, 1, 16), expected)
        assert {name for name, count in steps.items() if count} == {mode}


def test_from_disk(server, weights):
    check(server, weights.answers[0])
    for number in (1, 0):
        body = {"model_path": str(weights.folders[number]), "load_format": "auto"}
        assert server.post("/update_weights_from_disk", body)["success"]
        check(server, weights.answers[number])


def test_from_a_trainer(server, weights):
    """The trainer is this process: rank 0 of a group with the ranks of the server."""
    port = free_port()
    group = {"group_name": f"trainer at {port}", "master_address": "127.0.0.1", "master_port": port, "world_size": 3}
    tensors = load_file(weights.folders[1] / "model.safetensors")
    body = {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": group["group_name"],
    }
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(server.post, "/init_weights_update_group", {**group, "rank_offset": 1, "backend": "gloo"})
        trainer = trainers_group(**group)
        assert joined.result()["success"]
        assert server.post("/begin_weight_update", {})["success"]
        sent = pool.submit(send, trainer, list(tensors.values()))
        assert server.post("/update_weights_from_distributed", body)["success"]
        sent.result()
        assert server.post("/end_weight_update", {})["success"]
    torch.distributed.destroy_process_group(trainer)
    check(server, weights.answers[1])


def send(trainer: ProcessGroup, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        torch.distributed.broadcast(tensor, src=0, group=trainer)


def trainers_group(group_name: str, master_address: str, master_port: int, world_size: int) -> ProcessGroup:
    """Join the group of the server's ranks as rank 0."""
    from sglang.srt.utils import init_custom_process_group

    group: ProcessGroup = init_custom_process_group(
        backend="gloo", init_method=f"tcp://{master_address}:{master_port}", world_size=world_size, rank=0,
        group_name=group_name, timeout=timedelta(seconds=60),
    )  # fmt: skip
    return group
