"""The offline engine: same keyword arguments, same answers; weight updates reach the base weights."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.server, pytest.mark.full]

# In a process of its own: an engine holds the process's signal handlers and environment.
PROGRAM = """
import json, sys
from transformers import AutoModelForCausalLM
import sglang_shift

def ask(engine, prompts):
    outputs = engine.generate(input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": 8,
        "ignore_eos": True}, return_logprob=True)
    return [(o["output_ids"], [x[0] for x in o["meta_info"]["output_token_logprobs"]]) for o in outputs]

def refused(engine, **request):
    try:
        engine.generate(**request)
    except ValueError as error:
        return str(error)

def main():
    prompts, (first_model, other_model) = json.loads(sys.stdin.readline()), sys.argv[1:]
    engine = sglang_shift.Engine(model_path=first_model, tp_size=2, sp_size=2, dtype="float32", log_level="warning")
    first = ask(engine, prompts)
    state = engine.get_server_info()["internal_states"][0]["shift"]
    assert state["steps"]["tp"] == 0 < state["steps"]["sp"], state
    # What would end a rank is an error here, and the engine lives: the answers below are of the same one.
    assert "has no tokens" in refused(engine, input_ids=[[], []])
    assert "has no tokens" in refused(engine, prompt="")
    # New weights from disk must reach the whole base weights of every rank, not its own shard only.
    updated = engine.update_weights_from_disk(other_model)
    assert updated[0] if isinstance(updated, tuple) else updated, updated
    second = ask(engine, prompts)
    # Tensor by tensor, back to the first model.
    model = AutoModelForCausalLM.from_pretrained(first_model, dtype="float32")
    assert engine.begin_weight_update()[0]
    for name, tensor in model.named_parameters():
        assert engine.update_weights_from_tensor([(name, tensor.data)])[0], name
    assert engine.end_weight_update()[0]
    third = ask(engine, prompts)
    engine.shutdown()
    print(json.dumps([first, second, third]))

if __name__ == "__main__":
    main()
"""


def test_engine_and_weight_update(reference, servers, tmp_path):
    import json

    import torch
    from harness import Answer
    from prompts import assert_same_answers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from two_layers import two_layer_model

    servers.stop()
    chosen = list(range(8, 48, 8))
    prompts = [reference.prompts[i] for i in chosen]
    model = AutoModelForCausalLM.from_pretrained(two_layer_model(), dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.mul_(1 + 0.05 * torch.randn_like(parameter))
    other = tmp_path / "other"
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(two_layer_model()).save_pretrained(other)

    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), two_layer_model(), str(other)],
        input=json.dumps(prompts) + "\n", capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    first, second, third = [[Answer(t, p, {}) for t, p in run] for run in json.loads(done.stdout.splitlines()[-1])]
    for run in (first, third):
        assert_same_answers(run, [reference.answers[16][i] for i in chosen])

    expected = []
    with torch.no_grad():
        for ids in prompts:
            tokens = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=-1)[0]
            logits = model(tokens[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            new = tokens[len(ids) :]
            expected.append(Answer(new.tolist(), logits.gather(1, new[:, None])[:, 0].tolist(), {}))
    assert_same_answers(second, expected)
