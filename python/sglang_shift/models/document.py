"""Writes ``docs/models.md``, the page of the models that are served, from the records and rules of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from sglang_shift.models.families import FAMILIES, PACKAGE, WITH_IMAGES, Family
from sglang_shift.models.fields import HARMLESS, ROPE, RULES, WINDOW, neutral_values, supported_fields
from sglang_shift.models.heads import Heads
from sglang_shift.models.rope_fields import OF_ANY_TYPE, ROPE_PARAMETERS

MAX_RANKS = 32
"""The largest P in the table of head counts."""

HEAD_COUNTS = (Heads(16, 2), Heads(16, 8), Heads(28, 4), Heads(32, 8), Heads(32, 32), Heads(40, 8), Heads(64, 8))
"""Usual head counts of published models."""

PAGE = """\
# Models

This page is the output of `python -m sglang_shift.models`: do not edit it. It is made from the records and the rules in
`python/sglang_shift/models/`, by which the server decides. A test compares the page with the output.

## Which models are served

A model is served if SGLang has a class for its architecture, serves it in TP, and its layers are of known kinds. The
server finds the layers by their structure, and not by the name of the model. These are the kinds:

- attention (`RadixAttention`) with its linears, also with latents (MLA);
- MLPs, and experts (`FusedMoE` with `TopK`);
- norms, embeddings, and other layers that compute each token alone.

Recurrent layers (Mamba, linear attention) and sparse attention with an indexer are refused. So are models for which
SGLang takes transformers' code. When the server starts, it runs made-up requests in each mode, and refuses the model if
the modes differ by more than rounding explains: [the check](usage.md#the-check-at-start-up).
[data/models.csv](data/models.csv) lists the architectures that were compared with transformers in every mode.
[quantization.md](quantization.md) lists the formats of weights.

## Models with images

These architectures are served with text and images: {with_images}. They are in
[data/models.csv](data/models.csv), too: there they got prompts without images. Tests of servers compare prompts with
images with transformers. Steps that compute a prompt with images run in TP: [how](usage.md#features-of-sglang). Other
models with images, videos or sounds are refused.

## Families

For the architectures of these families, the server also compares every field of `config.json` with what SGLang's class
computes. Other architectures are served as stock SGLang serves them: a field that SGLang ignores is ignored here, too.

{families}

These are the linears of each layer, and which of them have a bias:

{linears}

## Numbers of ranks

P, the number of ranks, is `--tp-size`. It must divide the heads and the MLP's intermediate size. P and the number of
KV heads must divide each other. If there are fewer KV heads than ranks, each KV head is on several ranks. In SP mode
these copies take memory, and ranks exchange them. `--sp-size` must divide P. `python -m sglang_shift.plan` computes the
memory that a model takes.

The table shows which P up to {max_ranks} suit usual head counts. `x2` means that each KV head is on two ranks.

{ranks}

## Fields of config.json that are served

SGLang's classes take these fields as transformers does:

{supported}

These fields change no answer: {harmless}.

The rules below decide about {ruled}.

These types of rope are served. The parameters in the table can have any value that the
[rules](#what-is-refused) do not exclude. Every type also has {of_any_type}.

{ropes}

## What is refused

SGLang's classes read the fields that they know, and ignore all others without a message. Stock SGLang would answer
wrongly, or fail. Here the server does not start. Its message names the field, and the way out if there is one. These
are the rules:

{rules}

A field of the next table is served if it is absent, null or an empty list, or has the value in the table. Fields of
other models are in this table, and so are all other fields that transformers has for the family.

{neutral}
"""


def document() -> str:
    """Return the page, in Markdown."""
    return PAGE.format(
        with_images=_codes(WITH_IMAGES), families=_families(), linears=_linears(), max_ranks=MAX_RANKS, ranks=_ranks(),
        supported=_supported_fields_table(), harmless=_codes(HARMLESS), ruled=_codes(ROPE | WINDOW),
        of_any_type=_codes(OF_ANY_TYPE), ropes=_ropes(), rules=_rules(), neutral=_neutral(),
    )  # fmt: skip


def _families() -> str:
    rows = [
        (
            family.title,
            f"`{family.architecture}`",
            f"`{family.model_type}`",
            f"`{PACKAGE}{family.native}`",
            "yes" if family.qk_norm else "no",
            family.window.value,
        )
        for family in FAMILIES.values()
    ]
    return _table(
        ("Family", "`architectures`", "`model_type`", "SGLang's class", "Norms of Q and K", "Has a sliding window in"),
        rows,
    )


def _linears() -> str:
    roles = {linear.name: linear.role for family in FAMILIES.values() for linear in family.linears}
    rows = [
        (f"`{name}`", "inputs" if role.row_parallel else "outputs", *(_bias(f, name) for f in FAMILIES.values()))
        for name, role in roles.items()
    ]
    return _table(("Linear", "Ranks divide its", *(family.title for family in FAMILIES.values())), rows)


def _bias(family: Family, name: str) -> str:
    for linear in family.linears:
        if linear.name == name:
            return f"bias if `{linear.bias}`" if isinstance(linear.bias, str) else "bias" if linear.bias else "no bias"
    return "no such linear"


def _ranks() -> str:
    rows = [(str(heads.query), str(heads.kv), ", ".join(_suitable_ranks(heads))) for heads in HEAD_COUNTS]
    return _table(("Heads", "KV heads", "P"), rows)


def _suitable_ranks(heads: Heads) -> Iterable[str]:
    for ranks in range(2, MAX_RANKS + 1):
        if heads.divides_queries(ranks) and heads.divides_kv(ranks):
            copies = ranks * heads.of_rank(ranks).kv // heads.kv
            yield f"{ranks} x{copies}" if copies > 1 else str(ranks)


def _supported_fields_table() -> str:
    fields = {family.title: supported_fields(family) for family in FAMILIES.values()}
    common = frozenset.intersection(*fields.values())
    rows = [("every family", _codes(common))]
    rows += [(title, _codes(own - common)) for title, own in fields.items() if own - common]
    return _table(("Family", "Fields"), rows)


def _ropes() -> str:
    rows = [(f"`{kind}`", _codes(parameters)) for kind, parameters in ROPE_PARAMETERS.items() if kind != "default"]
    rows.append(("`default`, or none", "those of all other types, which change nothing"))
    return _table(("Type", "Parameters"), rows)


def _rules() -> str:
    rows = [(each.subject, _concerned_families(each.concerns), each.reason, each.way_out) for each in RULES]
    return _table(("`config.json` has", "Families", "Why it is refused", "What you can do"), rows)


def _concerned_families(concerns: Callable[[Family], bool]) -> str:
    return _titles([family for family in FAMILIES.values() if concerns(family)])


def _neutral() -> str:
    """Return the table of neutral values. Fields with the same value in the same families share a row."""
    having: dict[tuple[str, str], list[Family]] = {}
    for family in FAMILIES.values():
        for field, value in neutral_values(family).items():
            having.setdefault((json.dumps(value), field), []).append(family)
    lines = sorted((-len(families), _titles(families), value, field) for (value, field), families in having.items())
    rows = [
        (titles, f"`{value}`", _codes(field for *_, field in group))
        for (_, titles, value), group in groupby(lines, key=lambda line: line[:3])
    ]
    return _table(("Families", "Value", "Fields"), rows)


def _titles(families: Sequence[Family]) -> str:
    return "all" if len(families) == len(FAMILIES) else ", ".join(family.title for family in families)


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("|  |", "| |")
