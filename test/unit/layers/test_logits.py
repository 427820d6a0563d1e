"""The exit from the token-sharded region: everything that a logits processor or a pooler reads is gathered."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.runtime_context import get_forward
from sglang_shift.layers.logits import ExitAfterLayers, ExitToLogits
from sglang_shift.modes import Mode
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.region import scatter_tokens
from sglang_shift.parallel.step import Step, run_step
from sglang_shift.parallel.topology import Topology

FULL = torch.arange(10.0).view(5, 2)


class TwinGroup:
    """A group of two ranks. The other rank's rows are those of this rank, plus 100."""

    world_size, rank_in_group = 2, 0

    def all_gather_into_tensor(self, output, input):
        output.copy_(torch.cat([input, input + 100]))


TOPOLOGY = Topology(RankLayout(2, 2), 0, TwinGroup(), None, None)  # type: ignore[arg-type]


class Processor(torch.nn.Module):
    """Stands for SGLang's logits processor, and returns all that it gets."""

    def forward(self, input_ids, hidden_states, lm_head, metadata, aux_hidden_states=None, before_norm=None):
        assert not get_forward().sp_active, "the LM head is outside of the region"
        return SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})


class Decoder(torch.nn.Module):
    """Stands for the layers of a model. They add 1."""

    def forward(self, hidden_states, *others):
        return (hidden_states + 1, *others) if others else hidden_states + 1


def prefill(**fields):
    """Two requests with 3 and 2 tokens."""
    fields = {"forward_mode": ForwardMode.EXTEND, "capture_hidden_mode": CaptureHiddenMode.NULL, **fields}
    return SimpleNamespace(
        is_prefill_only=False, return_logprob=False, extend_seq_lens_cpu=[3, 2], extend_logprob_start_lens_cpu=[3, 2],
        **fields,
    )  # fmt: skip


DECODE = {"forward_mode": ForwardMode.DECODE}


def step_of(module, exit_class, **fields):
    forwards = Forwards()
    forwards.replace(module, exit_class(module))
    return Step(Mode.SP, TOPOLOGY, prefill(**fields), forwards)


def everyones(local):
    """The rows of both ranks, of which the last one pads."""
    return torch.cat([local, local + 100])[:5]


def test_rows_that_the_head_reads_have_values():
    processor = Processor()
    with run_step(step_of(processor, ExitToLogits)) as step:
        local = scatter_tokens(step, FULL)
        got = processor("ids", local, "head", "metadata")
        assert step.left and not step.inside
    assert (got.input_ids, got.lm_head, got.metadata) == ("ids", "head", "metadata")
    assert got.aux_hidden_states is None and got.before_norm is None
    assert got.hidden_states.shape == FULL.shape
    sent = local[2]  # the last row of the first request; the other rank sends that of the second one
    assert torch.equal(got.hidden_states[[2, 4]], torch.stack([sent, sent + 100]))
    assert not got.hidden_states[[0, 1, 3]].any(), "nobody reads these"


def test_all_rows_leave_a_decode():
    processor = Processor()
    with run_step(step_of(processor, ExitToLogits, **DECODE)) as step:
        local = scatter_tokens(step, FULL)
        assert torch.equal(processor(None, local, None, None).hidden_states, everyones(local))


@pytest.mark.parametrize("kind", [list, tuple])
def test_hidden_states_of_several_layers(kind):
    processor = Processor()
    with run_step(step_of(processor, ExitToLogits, capture_hidden_mode=CaptureHiddenMode.FULL)) as step:
        local = scatter_tokens(step, FULL)
        got = processor(None, local, None, None, kind([local + 1, local + 2]))
    assert type(got.aux_hidden_states) is kind
    for each, more in zip(got.aux_hidden_states, (1, 2), strict=True):
        assert torch.equal(each, everyones(local + more))
    assert torch.equal(got.hidden_states, everyones(local))


def test_hidden_states_of_layers_side_by_side_and_before_the_norm():
    processor = Processor()
    with run_step(step_of(processor, ExitToLogits, **DECODE)) as step:
        local = scatter_tokens(step, FULL)
        wide, before_norm = torch.cat([local, local], 1), local + 7
        got = processor(None, local, None, None, aux_hidden_states=wide, hidden_states_before_norm=before_norm)
    assert torch.equal(got.aux_hidden_states, everyones(wide))
    assert torch.equal(got.before_norm, everyones(before_norm))
    assert torch.equal(got.hidden_states, everyones(local))


@pytest.mark.parametrize(("module", "kind"), [(Processor(), ExitToLogits), (Decoder(), ExitAfterLayers)])
def test_a_step_that_never_entered_is_an_error(module, kind):
    with (
        run_step(step_of(module, kind)),
        pytest.raises(RuntimeError, match=r"without an embedding that sglang_shift knows.*serve this model without"),
    ):
        module(*[FULL] * 4) if kind is ExitToLogits else module(FULL)
    assert "forward" not in vars(module)


def test_a_pooler_reads_all_rows():
    decoder = Decoder()
    with run_step(step_of(decoder, ExitAfterLayers)) as step:
        local = scatter_tokens(step, FULL)
        assert step.exit_plan is not None
        assert torch.equal(decoder(local), everyones(local + 1))
        assert step.left and not get_forward().sp_active


def test_all_tensors_of_a_decoder_are_gathered():
    decoder = Decoder()
    with run_step(step_of(decoder, ExitAfterLayers)) as step:
        local = scatter_tokens(step, FULL)
        hidden_states, before_norm, nothing = decoder(local, local + 7, None)
    assert nothing is None
    assert torch.equal(hidden_states, everyones(local + 1)) and torch.equal(before_norm, everyones(local + 7))


def test_tp_steps_run_sglangs_processor():
    processor = Processor()
    step = step_of(processor, ExitToLogits)
    step.mode = Mode.TP
    with run_step(step):
        assert processor(None, FULL, None, None).hidden_states is FULL
