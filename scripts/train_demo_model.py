#!/usr/bin/env python3
"""Train the demo model: a small Llama that completes Python, trained on text that every machine has.

The corpus is the sources of the Python standard library. Each short documented function becomes two more documents.
One is the function alone, so that a completion can end by itself. The other is a chat turn, so that the chat template
has a meaning: the question is the docstring, and the answer is the function. The script makes everything itself:
corpus, BPE tokenizer, weights. It downloads nothing.

    python scripts/train_demo_model.py                 # 75 minutes on 2 cores
    python scripts/train_demo_model.py --minutes 2 --out /tmp/demo   # a quick try

The learning rate follows the clock. So a slower machine trains less, but its learning rate is also annealed at the end.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import time
from pathlib import Path
from zlib import crc32

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parent.parent
DEFAULT_OUT = REPO / "python" / "sglang_shift" / "demo_model"
END_OF_TEXT, USER, ASSISTANT, END_OF_TURN = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [END_OF_TEXT, USER, ASSISTANT, END_OF_TURN]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>\n{% else %}<|user|>\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VOCAB_SIZE = 4096
HELD_OUT_ONE_IN = 25
# Rows of a step, and tokens of a row. Every step takes one of these shapes, and the long shapes occur from the start:
# the model is worse at positions that the training does not visit.
STEP_SHAPES = [(8, 512), (8, 512), (2, 2048), (1, 4095)]
# These are left out: tests (odd on purpose), generated tables, and parts that do not belong to the library proper.
SKIPPED_PARTS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "__pycache__", "pydoc_data"}


def read_corpus() -> tuple[list[str], list[str]]:
    """Return the standard library's sources as (training, held-out) texts, split by file name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS & set(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        (held_out if crc32(str(relative).encode()) % HELD_OUT_ONE_IN == 0 else train).append(text)
    return train, held_out


def function_examples(sources: list[str]) -> list[str]:
    """Return two documents for each short documented function: its source, and a chat turn that asks for it."""
    examples = []
    for source in sources:
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
                continue
            body = ast.unparse(node)
            if len(body) < 1500:
                question = f"Write {node.name}: {doc.splitlines()[0]}"
                examples += [body, f"{USER}\n{question}{END_OF_TURN}\n{ASSISTANT}\n{body}{END_OF_TURN}\n"]
    return examples


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of :data:`VOCAB_SIZE` entries, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[USER, ASSISTANT, END_OF_TEXT],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a model with 8 attention heads over 2 KV heads, so that KV heads are replicated from 4 ranks on."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in (END_OF_TURN, END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
    """Return all texts as one stream of token ids [N], and the position at which each text starts.

    The end-of-text token ends each text.
    """
    ids: list[int] = []
    starts = []
    for text in texts:
        starts.append(len(ids))
        ids.extend(tokenizer.encode(text))
        ids.append(tokenizer.pad_token_id)
    return torch.tensor(ids, dtype=torch.long), starts


def cross_entropy(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats over ``rows`` [B, L + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1].contiguous()).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> float:
    """Return the mean loss in nats per token over the first 40k held-out tokens, in windows of ``length``."""
    windows = stream[: min(len(stream), 40_960) // (length + 1) * (length + 1)].view(-1, length + 1)
    with torch.no_grad():
        return sum(cross_entropy(model, row[None]).item() for row in windows) / len(windows)


def draw_rows(
    stream: torch.Tensor, starts: list[int], shape: tuple[int, int], generator: random.Random
) -> torch.Tensor:
    """Return rows [B, L + 1] of the stream for a step of ``shape`` (B, L).

    About half of the rows start with a document, as the prompts of users do. The other rows start anywhere.
    """
    rows, length = shape
    last = len(stream) - length - 1
    begins = [
        min(generator.choice(starts), last) if generator.random() < 0.5 else generator.randrange(last)
        for _ in range(rows)
    ]
    return torch.stack([stream[begin : begin + length + 1] for begin in begins])


def train(model: LlamaForCausalLM, stream: torch.Tensor, starts: list[int], minutes: float) -> int:
    """Train with Muon for the matrices and AdamW for the rest, over steps of :data:`STEP_SHAPES` in a random order.

    Returns:
        The number of tokens that the training saw.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    generator = random.Random(0)
    started, seen, step = time.monotonic(), 0, 0
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        # The learning rate warms up over 2 % of the time, stays, and anneals linearly over the last 40 %.
        scale = min(done / 0.02 + 0.01, 1.0, (1 - done) / 0.4)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * scale
        rows, length = shape = generator.choice(STEP_SHAPES)
        loss = cross_entropy(model, draw_rows(stream, starts, shape, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen, step = seen + rows * length, step + 1
        if step % 50 == 0:
            elapsed = time.monotonic() - started
            print(
                f"{100 * done:5.1f} %  step {step:5d}  {seen / 1e6:6.2f} M tokens"
                f"  {seen / elapsed:6.0f} tok/s  loss {loss.item():.3f}",
                flush=True,
            )
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=75.0, help="training time")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the model")
    args = parser.parse_args()

    train_texts, held_out_texts = read_corpus()
    print(f"{len(train_texts)} files to train on, {len(held_out_texts)} held out", flush=True)
    tokenizer = train_tokenizer(train_texts)
    documents = train_texts + function_examples(train_texts)
    random.Random(0).shuffle(documents)
    stream, starts = encode(tokenizer, documents)
    held_out, _ = encode(tokenizer, held_out_texts)
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} M training tokens", flush=True)

    seen = train(model, stream, starts, args.minutes)
    model.eval()
    losses = {str(n): round(held_out_loss(model, held_out, n), 4) for n in (512, 4095)}
    print(f"held-out loss in nats a token, by context length: {losses}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.out)
    report = {
        "parameters": parameters,
        "tokens_seen": seen,
        "minutes": args.minutes,
        "held_out_loss_nats_per_token": losses,
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"saved to {args.out}", flush=True)


if __name__ == "__main__":
    main()
