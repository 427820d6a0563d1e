"""SGLang's rank-consensus checker compares values, not addresses and not the histories of sets."""

from __future__ import annotations

import pickle
from queue import Queue

import pytest
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils import rank_consensus_checker as checker
from sglang_shift.runtime.rank_consensus import build_payload, compare_decisions, compare_in, same_everywhere


def compared(value) -> str:
    return build_payload("call", ["value"], {"value": value})


def request(**sampling) -> Req:
    return Req("a", None, [1, 2, 3], SamplingParams(**sampling))


def test_grammars_without_a_repr_are_compared_by_their_type():
    """Each rank has its own object of the same grammar."""
    one, other = request(), request()
    one.grammar, other.grammar = ReasonerGrammarObject(None, [1]), ReasonerGrammarObject(None, [1])
    assert repr(one) != repr(other), "SGLang gave it a repr: this seam can go"
    assert compared(one) == compared(other)
    assert "ReasonerGrammarObject" in compared(one)
    other.grammar = None
    assert compared(one) != compared(other)


def test_sets_of_numbers_are_compared_by_their_members():
    """Rank 0 sends the others a pickle of what it received, and in 7 and 15 the order is the set's history."""
    stops = SamplingParams(stop_token_ids=[7, 15])
    stops.normalize(None)
    received = pickle.loads(pickle.dumps(stops))
    assert received == stops
    assert repr(received) != repr(stops), "the order is the same after all: choose other numbers"
    assert compared(received) == compared(stops)
    assert compared(SamplingParams(stop_token_ids=[7, 16])) != compared(stops)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("<a.B object at 0x7f12ab>", "<a.B object>"),
        ("<function f at 0x7F>, {15, 7, -3}", "<function f>, {-3, 7, 15}"),
        ("Req(rid=a, input_ids=[15, 7], {'a': 1}, {5}, set())",) * 2,
    ],
)
def test_nothing_else_is_left_out(text, same):
    assert same_everywhere(text) == same


def test_decisions_are_compared_by_the_ranks_of_the_instance_that_made_them(monkeypatch):
    compared = []
    for name, value in {
        "_q": Queue(),
        "_sync_groups": ["world"],
        "_all_reduce_min_int": lambda number: number,
        "_check_for_consensus": lambda decisions: compared.append((decisions, list(checker._sync_groups))),
    }.items():
        monkeypatch.setattr(checker, name, value)
    for item in ("a", "b", ["two ranks"], "c", [], "d", None, "after the end"):
        if isinstance(item, list):
            compare_in(item)
        else:
            checker._q.put(item)
    compare_decisions()
    assert compared == [(["a", "b"], ["world"]), (["c"], ["two ranks"]), (["d"], [])]
