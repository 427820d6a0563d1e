"""Run a program in SGLang's frontend language on a running server:

    python -m sglang_shift.launch_server --tp-size 2 --enable-shift-parallel
    python examples/frontend_program.py [http://127.0.0.1:30000]

The language does not know that there are two modes. Its calls arrive as requests, and the server chooses the mode of
each step.
"""

import sys

import sglang as sgl


@sgl.function
def complete(s, signature: str):
    s += "import os\n\n\n" + signature + "\n"
    s += sgl.gen("body", max_tokens=16, temperature=0)
    s += "\n\nprint("
    s += sgl.select("shown", ["path", "None"])


def main(url: str = "http://127.0.0.1:30000") -> None:
    sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    signatures = [f"def {verb}_file(path):" for verb in ("read", "copy", "open", "close", "find", "move")]
    for state in complete.run_batch([{"signature": signature} for signature in signatures]):
        print(state["body"], "->", state["shown"])


if __name__ == "__main__":
    main(*sys.argv[1:])
