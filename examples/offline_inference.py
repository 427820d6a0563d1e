"""Generate text without a server: python examples/offline_inference.py

The engine runs two ranks on this machine and loads the demo model. Give ``model_path=...`` to load your own.
Each answer says how many of its steps ran in tensor parallelism (TP) and how many in sequence parallelism (SP).
"""

from sglang_shift import Engine

PROMPTS = ["def open_file(path):", "class Stack:", "import os\n" * 20 + "def list_files(folder):"]


def main() -> None:
    # shift_threshold=32: a step of more than 32 tokens runs in SP. These prompts have more tokens together. Each later
    # step has 3 tokens, and runs in TP. Without the threshold, the engine would first measure which mode is faster.
    engine = Engine(tp_size=2, enable_shift_parallel=True, shift_threshold=32)
    try:
        for answer in engine.generate(PROMPTS, {"max_new_tokens": 24, "temperature": 0}):
            print(answer["text"])
            print("steps:", answer["meta_info"]["shift_steps"])
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the ranks are new processes, which import this file again
    main()
