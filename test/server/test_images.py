"""Models with images: prompts with and without images in both modes, against Hugging Face transformers.

Steps that compute a prompt with images run in TP. All other steps run in any mode.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import requests
from harness import Answer, Server, shift_flags
from prompts import assert_same_answers
from tiny_images import ImageModel, encoded, picture

pytestmark = [pytest.mark.server, pytest.mark.full]

NEW_TOKENS = 4
CHUNKS = ("--chunked-prefill-size", "64")  # less than the tokens of some pictures
SWITCHING = {
    "qwen2_vl": (*shift_flags(2, 2), *CHUNKS),
    "qwen2_5_vl": (*shift_flags(2, 2), *CHUNKS, "--enable-mixed-chunk"),
    "qwen3_vl": (*shift_flags(4, 2), *CHUNKS),
    "qwen3_vl_moe": (*shift_flags(2, 2), *CHUNKS),
    # A chunk must not end inside of an image, because the tokens of an image attend to each other.
    "gemma3_vl": shift_flags(2, 2),
}
CODE = "for i in range(10): print(i)\n"


class Prompt(NamedTuple):
    """A prompt. ``@`` in its text stands for a picture."""

    text: str
    pictures: tuple[int, ...] = ()


PROMPTS = [
    Prompt("def f(x):"),
    Prompt(CODE * 12),
    Prompt("@", (0,)),
    Prompt(f"{CODE} @ return x", (1,)),
    Prompt(f"{CODE} @ return @ x", (1, 2)),  # the beginning of the prompt before it
    Prompt(f"{CODE} @ return @ x", (1, 3)),  # the same text, another picture
    Prompt(f"@{CODE * 8}", (4,)),
    Prompt(CODE * 3),
]


class Asked:
    """A model with its prompts, and what transformers answers."""

    def __init__(self, model: ImageModel) -> None:
        self.model = model
        self.expected = [model.answer(self.text(p), self.pictures(p), NEW_TOKENS) for p in PROMPTS]
        assert len({tuple(answer.tokens) for answer in self.expected}) == len(PROMPTS), "each picture counts"

    def text(self, prompt: Prompt) -> str:
        return prompt.text.replace("@", self.model.image)

    def pictures(self, prompt: Prompt) -> list[Any]:
        return [picture(number) for number in prompt.pictures]

    def ask(self, server: Server, prompt: Prompt) -> Answer:
        body: dict[str, Any] = {
            "text": self.text(prompt),
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            "return_logprob": True,
        }
        if prompt.pictures:
            body["image_data"] = [encoded(image) for image in self.pictures(prompt)]
        return Answer.of(server.post("/generate", body))

    def ask_all(self, server: Server, concurrency: int) -> list[Answer]:
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda prompt: self.ask(server, prompt), PROMPTS))
        assert_same_answers(answers, self.expected)
        for answer, expected in zip(answers, self.expected, strict=True):
            assert answer.meta["prompt_tokens"] == expected.meta["prompt_tokens"]
        return answers


@pytest.fixture(scope="module", params=SWITCHING)
def asked(request, tmp_path_factory):
    return request.param, Asked(ImageModel(request.param, tmp_path_factory.mktemp(request.param)))


def steps_by_kind(answers: list[Answer]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the steps by mode of the prompts without images, and of those with images."""
    kinds: tuple[dict[str, int], dict[str, int]] = ({"tp": 0, "sp": 0}, {"tp": 0, "sp": 0})
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        for mode, count in answer.meta["shift_steps"].items():
            kinds[bool(prompt.pictures)][mode] += count
    return kinds


def test_same_answers_as_transformers(asked, servers):
    name, asked = asked
    server = servers.get(*asked.model.flags, *SWITCHING[name])
    assert "the modes compute the same (SP is within" in server.log.read_text(errors="replace")
    for policy in ("tp", "sp", "tokens"):
        server.flush_cache()
        with server.policy(policy, 16):
            text, images = steps_by_kind(asked.ask_all(server, 1))  # one request a step
            cached = asked.ask_all(server, 1)  # from the radix cache
            server.flush_cache()
            asked.ask_all(server, len(PROMPTS))  # with and without images in a step
        assert all(answer.meta["cached_tokens"] > 0 for answer in cached)
        if policy == "tp":
            assert text["sp"] == images["sp"] == 0
        elif policy == "sp":
            assert text["tp"] == 0
            assert images["tp"] >= sum(bool(prompt.pictures) for prompt in PROMPTS), "a prompt with images runs in TP"
            assert images["sp"] == (NEW_TOKENS - 1) * sum(bool(prompt.pictures) for prompt in PROMPTS)
        else:
            assert text["tp"] > 0 and text["sp"] > 0 and images["sp"] == 0


def test_sp_alone(servers, tmp_path):
    """Without a mode selector, prompts with images still run in TP, and all else in SP."""
    asked = Asked(ImageModel("qwen3_vl", tmp_path))
    server = servers.get(*asked.model.flags, "--dtype", "float32", "--tp-size", "2", "--sp-size", "2")
    text, images = steps_by_kind(asked.ask_all(server, 1))
    count = sum(bool(prompt.pictures) for prompt in PROMPTS)
    assert text == {"tp": 0, "sp": NEW_TOKENS * (len(PROMPTS) - count)}
    assert images == {"tp": count, "sp": (NEW_TOKENS - 1) * count}
    asked.ask_all(server, len(PROMPTS))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return Asked(ImageModel("qwen2_5_vl", tmp_path_factory.mktemp("calibrated")))


@pytest.fixture
def calibrated_server(servers, calibrated):
    return servers.get(*calibrated.model.flags, "--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel")


def test_a_calibration_chooses_the_modes(calibrated_server, calibrated):
    """Steps with images compute more than the calibration knows, so they do not count as drift."""
    assert calibrated_server.state["calibration"].startswith("calibrated in"), calibrated_server.state
    calibrated.ask_all(calibrated_server, 4)


def test_requests_that_are_wrong(calibrated_server, calibrated):
    """A picture that is none is refused, and what stands for a picture is text if there is no picture."""
    body = {"text": calibrated.text(PROMPTS[2]), "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
    broken = {**body, "image_data": ["data:image/png;base64,iVBORw0KGgo="]}
    assert requests.post(calibrated_server.url + "/generate", json=broken, timeout=60).status_code >= 400
    answers = []
    for policy in ("tp", "sp"):
        calibrated_server.flush_cache()
        with calibrated_server.policy(policy) as steps:
            answers.append(calibrated_server.post("/generate", body)["output_ids"])
        assert {mode for mode, count in steps.items() if count} == {policy}
    assert answers[0] == answers[1]
    calibrated.ask_all(calibrated_server, len(PROMPTS))
