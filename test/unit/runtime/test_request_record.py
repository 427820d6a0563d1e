"""What travels of a request, without ranks: its grammar, and what keeps it where it is."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_shift.runtime.request_record import keep_request, reason_to_stay, record, restore, restore_grammar


def made(**options) -> Req:
    return Req("a", "", array("q", [1, 2]), SamplingParams(max_new_tokens=9), **options)


class Grammar:
    """It rejects the token 7."""

    def __init__(self):
        self.accepted = []

    def accept_token(self, token):
        if token == 7:
            raise ValueError("Tokens not accepted: 7")
        self.accepted.append(token)


def travelled(output, to_finish) -> Req:
    """The request with a grammar, as another rank makes it again."""
    req, again = made(), made()
    keep_request(req, SimpleNamespace(sampling_params=None, time_stats=None))
    req.output_ids, req.grammar, req.to_finish = array("q", output), Grammar(), to_finish
    again.grammar = Grammar()
    noted = record(req, running=True, computed=2)
    restore(again, noted)
    restore_grammar(again, noted, None)
    return again


def test_a_request_whose_grammar_rejected_a_token_ends_and_not_the_server():
    """SGLang ends such a request with its next step. The level may change before."""
    req = travelled([5, 6, 7], FINISH_ABORT("Grammar accept_token failed"))
    assert req.grammar.accepted == [5, 6] and list(req.output_ids) == [5, 6, 7]
    assert req.to_finish.message == "Grammar accept_token failed"


def test_a_grammar_that_rejects_a_token_only_here_is_an_error():
    """The ranks would choose other tokens."""
    with pytest.raises(ValueError, match="not accepted: 7"):
        travelled([5, 6, 7], None)


@pytest.mark.parametrize("states", [True, "last"])
def test_a_request_that_returns_hidden_states_stays(states):
    """After a change, its prompt would be computed again, and SGLang would add the states to those of its tokens."""
    assert reason_to_stay(made()) is None
    assert "returns hidden states" in reason_to_stay(made(return_hidden_states=states))
