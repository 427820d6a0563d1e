"""A policy of your own. Serve the demo model with it:

    PYTHONPATH=examples python -m sglang_shift.launch_server --tp-size 2 --enable-shift-parallel \\
        --shift-policy custom_policy:BusyOrLong
"""

from sglang_shift.modes import Mode, ShiftPolicy, StepState


class BusyOrLong(ShiftPolicy):
    """Chooses SP for prompts of more than 48 tokens, and for every step while the server has at least four requests.

    ``choose`` runs on rank 0, and all ranks follow its answer.

    Some values of ``step`` differ by mode. These are mappings: ``step.padded[Mode.SP]`` is the number of tokens that
    the step would compute in SP. It includes the tokens that pad the step to its CUDA graph.
    """

    def choose(self, step: StepState) -> Mode:
        busy = step.num_waiting + step.num_running >= 4
        return Mode.SP if busy or step.num_prefill_tokens > 48 else Mode.TP

    def explain(self, step: StepState, mode: Mode) -> str:
        return f"{step.num_waiting + step.num_running} requests, {step.num_prefill_tokens} prompt tokens"

    def describe(self) -> str:
        return "SP for at least 4 requests or more than 48 prompt tokens, else TP"
