"""Write two pages of the documents from the code: ``docs/flags.md`` and ``docs/refusals.md``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import ModuleType

from sglang_shift.args import (
    cpu,
    dcp_size,
    exchange_pipeline,
    gemm_backend,
    graph_memory,
    instances,
    model_check,
    refusals,
    sp_size,
    sparse_prefill,
)
from sglang_shift.args.feature import Feature
from sglang_shift.errors import Refusal
from sglang_shift.flags import AUTO, EXCHANGE_DTYPES, EXCHANGES, FLAGS, POLICIES, Flag, Need
from sglang_shift.layers import structure
from sglang_shift.models import families, fields, token_shards
from sglang_shift.parallel.exchange import choose
from sglang_shift.platforms import fa3_shards, shards
from sglang_shift.policy import builtin
from sglang_shift.runtime import mode_check
from sglang_shift.weights import stacked

FLAGS_PAGE = """# Flags

<!-- Written by `python -m sglang_shift.args flags`; do not edit. -->

P is SGLang's `--tp-size`. In Python and in a `--config` file, names have underscores (`sp_size`, `shift_policy`).
All nodes must be started with the same values. [usage.md](usage.md) helps to choose them, and
[refusals.md](refusals.md) lists what is refused.

{sections}
"""

FLAG_SECTIONS = {
    Need.NOTHING: (
        "Parallelism",
        "Each of these flags turns `sglang_shift` on. Without them, all is stock SGLang.",
    ),
    Need.SP: ("SP mode", f"These flags need {Need.SP}."),
    Need.SWITCHING: ("The policy", f"These flags need {Need.SWITCHING}."),
    Need.INSTANCES: ("Instances", f"These flags need {Need.INSTANCES}."),
}
"""Heading and first sentence of each table of flags."""

REFUSALS_PAGE = """# What is refused

<!-- Written by `python -m sglang_shift.args refusals`; do not edit. -->

With `--sp-size`, `--enable-shift-parallel` or `--instances`, the server refuses what it cannot serve correctly. It
refuses almost all of it before any process starts. The launcher then prints one sentence, which says what was given,
what is wrong and what to do, and ends with exit code 2. In the messages below, words in italics and the letters D, H,
M, N, P, R and S stand for values.

## Features of SGLang

The message is: {message}

{features}

## What does not combine with `--dcp-size`

If `--dcp-size` is above 1, these features are refused, too. The message is: {dcp_message}

{dcp_features}

## What does not combine with `--instances`

With `--instances` N, these features are refused, too. The message is: {instance_message}

{instance_features}

## What does not combine with `--shift-sparse-prefill`

If `--shift-sparse-prefill` is given, these features are refused, too. The message is: {sparse_message}

{sparse_features}

## What does not combine with `--shift-exchange-pipeline`

With `--shift-exchange-pipeline on`, these features are refused, too. With `auto`, they keep the ordinary exchange.

{pipeline_features}

{sections}
"""

REFUSAL_SECTIONS: dict[str, tuple[ModuleType, ...]] = {
    "Flags": (refusals, builtin, cpu),
    "`--sp-size auto`": (sp_size,),
    "`--dcp-size`": (token_shards, dcp_size, fa3_shards, shards),
    "`--instances`": (instances,),
    "`--shift-sparse-prefill`": (sparse_prefill,),
    "The model": (model_check, fields, families, structure, stacked, mode_check),
    "The exchange": (choose, exchange_pipeline),
    "CUDA graphs and matrix products": (graph_memory, gemm_backend),
}
"""Headings, and the modules that declare the refusals below each heading."""

WITH_FEATURES = (refusals, dcp_size, instances, sparse_prefill)
"""The modules that refuse features of SGLang."""

VALUES = "|".join((AUTO, "off", *POLICIES, *EXCHANGES, *EXCHANGE_DTYPES, "[A-Z]", r"\d+"))
CODE = re.compile(
    r"(?P<verbatim>\[[^]]*\]\([^)]*\)|`[^`]*`)"
    rf"|--[a-z][\w-]*(?: (?:{VALUES})\b(?!:))?|\bSGLANG_\w+|\b\w+ForCausalLM\b|module:Class"
)
"""Flags, variables and classes. Links, and text that is code already, stay."""


def flags_page() -> str:
    """The page of all flags, with a table for each need."""
    sections = []
    for need, (title, sentence) in FLAG_SECTIONS.items():
        flags = [flag for flag in FLAGS if flag.need is need]
        text = code(sentence)
        if live := [code(flag.option) for flag in flags if flag.live]:
            link = "[at run time](usage.md#change-the-policy-at-run-time)"
            text += f" The values of these can be changed {link}: {', '.join(live)}."
        sections.append(f"## {title}\n\n{text}\n\n{table(('Flag', 'Default', 'Meaning'), map(_flag_row, flags))}")
    return FLAGS_PAGE.format(sections="\n\n".join(sections))


def _flag_row(flag: Flag) -> tuple[str, str, str]:
    value = "" if flag.type is bool else " " + (f"{{{','.join(flag.choices)}}}" if flag.choices else flag.placeholder)
    more = f"[More]({flag.more})." if flag.more else ""
    meaning = " ".join(filter(None, (code(flag.meaning), flag.limits, more)))
    return ", ".join(f"`{option}{value}`" for option in flag.options), code(flag.default) or "off", meaning


def refusals_page() -> str:
    """The page of all refusals, with a table for each section."""
    sections = []
    for title, modules in REFUSAL_SECTIONS.items():
        declared = [refusal for module in modules for refusal in refusals_of(module)]
        conflicts = [module.FEATURE_CONFLICT for module in WITH_FEATURES]  # they have a table of their own
        rows = [(message_of(r), code(r.why)) for r in declared if r not in conflicts]
        sections.append(f"## {title}\n\n{table(('Message', 'Why'), rows)}")
    return REFUSALS_PAGE.format(
        message=message_of(refusals.FEATURE_CONFLICT),
        features=_feature_table(refusals.FEATURES),
        dcp_message=message_of(dcp_size.FEATURE_CONFLICT),
        dcp_features=_feature_table(dcp_size.FEATURES),
        instance_message=message_of(instances.FEATURE_CONFLICT),
        instance_features=_feature_table(instances.FEATURES),
        sparse_message=message_of(sparse_prefill.FEATURE_CONFLICT),
        sparse_features=_feature_table(sparse_prefill.FEATURES),
        pipeline_features=_feature_table(exchange_pipeline.FEATURES),
        sections="\n\n".join(sections),
    )


def _feature_table(features: Iterable[Feature]) -> str:
    return table(("Feature", "Reason"), [(code(feature.name), code(feature.why)) for feature in features])


def refusals_of(module: ModuleType) -> list[Refusal]:
    """The refusals that a module declares, in the order of their declarations."""
    return [value for value in vars(module).values() if isinstance(value, Refusal)]


def message_of(refusal: Refusal) -> str:
    """The message of a refusal, with the name of each value in place of the value."""
    with_letters = re.sub(r"{([A-Z])}", r"\1", refusal.message)
    return re.sub(r"{(\w+)}", lambda name: f"*{name[1].replace('_', ' ')}*", code(with_letters))


def code(text: str) -> str:
    """Plain text with each flag, variable and class marked as code."""
    return CODE.sub(lambda match: match[0] if match["verbatim"] else f"`{match[0]}`", text)


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
