#!/usr/bin/env python3
"""Make a model to measure with: a Llama with random weights and the demo model's tokenizer.

    python benchmark/make_model.py DIR [--layers 8] [--hidden-size 1024] ...

The model's answers mean nothing. Its steps cost what steps of a model of that size cost. With the defaults (100 million
parameters), matrix products and communication dominate a step, as on GPUs. In the demo model, the time to call
operations dominates a step.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=2816)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--context", type=int, default=32768, help="longest sequence, tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from sglang_shift.models.random_model import write_random_model

    parameters = write_random_model(
        args.dir,
        seed=args.seed,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
    )
    print(f"{args.dir}: {parameters / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
