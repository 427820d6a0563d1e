"""The state of the random numbers of a rank. Ranks of an instance must draw the same ones when they sample tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class RandomState:
    """The states of the generators.

    Attributes:
        python: The state of Python's generator, by which SGLang may order a queue.
        cpu: The state of the generator of the CPU.
        device: The state of the generator of the device; None if the device is the CPU.
    """

    python: Any
    cpu: torch.Tensor
    device: torch.Tensor | None


def random_state(device: str) -> RandomState:
    """The state of this rank."""
    own = None if device == "cpu" else torch.get_device_module(device).get_rng_state()
    return RandomState(random.getstate(), torch.get_rng_state(), own)


def set_random_state(device: str, state: RandomState) -> None:
    """Let this rank draw the random numbers of the rank whose state it is."""
    random.setstate(state.python)
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        torch.get_device_module(device).set_rng_state(state.device)
