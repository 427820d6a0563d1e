"""Which steps must run in TP."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.runtime.tp_only import ADAPTER, IMAGES, reason_for_tp, tp_rules


def batch(*, adapters=(None,), images=(None,), mode=ForwardMode.EXTEND):
    reqs = [
        SimpleNamespace(lora_id=adapter, multimodal_inputs=image)
        for adapter, image in zip(adapters, images, strict=True)
    ]
    return SimpleNamespace(forward_mode=mode, reqs=reqs)


@pytest.mark.parametrize(
    ("rules", "step", "reason"),
    [
        ((ADAPTER,), batch(), None),
        ((ADAPTER,), batch(adapters=(None, "a"), images=(None, None)), ADAPTER.reason),
        ((ADAPTER,), batch(adapters=("a",), mode=ForwardMode.DECODE), ADAPTER.reason),
        ((IMAGES,), batch(images=("image",)), IMAGES.reason),
        ((IMAGES,), batch(images=("image",), mode=ForwardMode.DECODE), None),
        ((ADAPTER, IMAGES), batch(adapters=("a",), images=("image",)), ADAPTER.reason),
    ],
)
def test_reason(rules, step, reason):
    assert reason_for_tp(rules, step) == reason


def test_a_server_has_the_rules_that_it_needs():
    assert tp_rules(adapters=False, images=False) == ()
    assert tp_rules(adapters=True, images=False) == (ADAPTER,)
    assert tp_rules(adapters=True, images=True) == (ADAPTER, IMAGES)
