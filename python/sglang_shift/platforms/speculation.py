"""Plain PyTorch for the kernels of speculative decoding that have no code for CPUs, or that SGLang writes in Triton.

They take the place of SGLang's functions in stock servers on this platform as well.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

from sglang_shift.platforms import draft_sampling
from sglang_shift.platforms.attention_backend import CpuAttentionBackend
from sglang_shift.platforms.cpu import ATTENTION, is_active
from sglang_shift.seams import put_in_place, replaces

KERNELS = "sgl_kernel.speculative"
"""The module of SGLang's kernel library that has :func:`reconstruct_tree`. The library needs CUDA to be imported."""


@replaces(
    "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func",
    "SGLang's function launches a Triton kernel.",
    when=is_active,
)
def write_slots(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    batch_size: int,
) -> None:
    """Write KV slots into the table of the requests, in place of ``assign_req_to_token_pool_func``.

    Args:
        rows: ``[requests]``, the row of each request in the table.
        table: ``[rows, tokens]``, which slot each token of a request has.
        starts: ``[requests]``, the first token whose slot is written.
        ends: ``[requests]``, the token after the last one.
        slots: The slots of all requests, one request after the other.
        batch_size: The number of requests.
    """
    places = [slice(*pair) for pair in zip(starts.tolist(), ends.tolist(), strict=True)]
    for row, place, new in zip(rows.tolist(), places, slots.split([p.stop - p.start for p in places]), strict=True):
        table[row, place] = new.to(table.dtype)


@replaces(
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._init_kv_copy_and_warmup",
    "SGLang's method compiles a Triton kernel. With SGLANG_NATIVE_MOVE_KV_CACHE, nothing uses the kernel.",
    when=is_active,
)
def prepare_no_copies(pool: Any) -> None:
    """Prepare nothing for copies inside of a KV pool, in place of ``_init_kv_copy_and_warmup``."""
    pool._kv_copy_config = None


def slots_of(
    *, req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, start_offset: torch.Tensor,
    end_offset: torch.Tensor, batch_size: int, draft_token_num: int, device: Any,
) -> torch.Tensor:  # fmt: skip
    """Read the KV slots of drafts from the table of the requests. SGLang asks its platform for this function.

    Returns:
        ``[batch_size * draft_token_num]``, the slots of the tokens from ``start_offset`` to ``end_offset``, one request
        after the other.
    """
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    slots = torch.cat([req_to_token[row, start:end] for row, start, end in spans]).long()
    return torch.nn.functional.pad(slots, (0, batch_size * draft_token_num - len(slots)))


@replaces(
    "sglang.srt.speculative.spec_utils:fill_front_out_cache_loc_func",
    "SGLang's function launches a Triton kernel.",
    when=is_active,
)
def first_slots(counts: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Put the first ``counts[i]`` slots of each request together, in place of ``fill_front_out_cache_loc_func``."""
    window = slots.view(len(counts), -1)
    chosen = window[torch.arange(window.shape[1]) < counts[:, None]]
    out[: len(chosen)] = chosen


@replaces(
    "sglang.srt.speculative.spec_utils:fill_accept_out_cache_loc_func",
    "SGLang's function launches a Triton kernel.",
    when=is_active,
)
def accepted_slots(accepted: torch.Tensor, slots: torch.Tensor, out: torch.Tensor, size: int) -> None:
    """Put the slots of the accepted drafts together, in place of ``fill_accept_out_cache_loc_func``.

    Args:
        accepted: ``[requests, depth]``, the accepted drafts as indices of ``slots``; -1 for none.
        slots: The slots of all drafts.
        out: Where the slots of the accepted drafts go.
        size: The elements of ``accepted``.
    """
    chosen = slots[accepted[accepted >= 0].long()]
    out[: len(chosen)] = chosen


@replaces(
    "sglang.srt.speculative.eagle_utils:verify_tree_greedy_func",
    "SGLang's function calls a kernel that has no code for CPUs.",
    when=is_active,
)
def accept_greedily(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow the model's own tokens through each tree of drafts, in place of ``verify_tree_greedy_func``.

    Args:
        predicts: Gets the model's token at each accepted node, ``[requests * drafts]``.
        accept_index: Gets the accepted nodes of each request, ``[requests, depth]``, from its root on.
        accept_token_num: Gets the number of accepted nodes of each request, without its root.
        candidates: ``[requests, drafts]``, the tokens of the nodes.
        retrieve_index: ``[requests, drafts]``, the numbers of the nodes among all requests.
        retrieve_next_token: ``[requests, drafts]``, the first child of each node; -1 for none.
        retrieve_next_sibling: ``[requests, drafts]``, the next child of the same parent; -1 for none.
        target_predict: ``[requests, drafts]``, the model's token after each node.
        topk: Not used.
    """
    for request in range(len(candidates)):
        tokens, children, siblings, predicted = (
            each[request].tolist() for each in (candidates, retrieve_next_token, retrieve_next_sibling, target_predict)
        )
        path, node = [0], 0
        while len(path) < accept_index.shape[1]:
            child = children[node]
            while child != -1 and tokens[child] != predicted[node]:
                child = siblings[child]
            if child == -1:
                break
            path.append(node := child)
        numbers, chosen = retrieve_index[request, path], target_predict[request, path]
        draft_sampling.write_accepted(request, numbers, chosen, predicts, accept_index, accept_token_num)
    return predicts, accept_index, accept_token_num


def reconstruct_tree(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Write the links of each tree of drafts, as ``sgl_kernel.speculative.reconstruct_indices_from_tree_mask`` does.

    Args:
        tree_mask: ``[requests * drafts * drafts]``, whether a node descends from another node.
        verified_seq_len: ``[requests]``, the tokens before the drafts.
        positions: Gets the positions of the nodes, ``[requests * drafts]``.
        retrieve_index: Gets the numbers of the nodes among all requests, ``[requests, drafts]``.
        retrieve_next_token: Gets the first child of each node; -1 for none.
        retrieve_next_sibling: Gets the next child of the same parent; -1 for none.
        batch_size: The number of requests.
        draft_token_num: The number of nodes of a request.
    """
    visible = tree_mask.view(batch_size, draft_token_num, draft_token_num).bool().tril()
    visible |= torch.eye(draft_token_num, dtype=torch.bool)
    depths = visible.sum(-1) - 1
    positions.copy_((depths + verified_seq_len[:, None]).flatten())
    retrieve_index.copy_(torch.arange(batch_size * draft_token_num).view(batch_size, -1))
    # The nearest ancestor is the parent. A root has none.
    ancestors = visible.tril(-1) * torch.arange(draft_token_num)
    for request, parents in enumerate(torch.where(depths > 0, ancestors.amax(-1), -1).tolist()):
        _link(parents, retrieve_next_token[request], retrieve_next_sibling[request])


@replaces(
    "sglang.srt.speculative.eagle_utils:build_tree_kernel_efficient_func",
    "SGLang's function calls a kernel that has no code for CPUs.",
    when=is_active,
)
def build_tree(
    parent_list: torch.Tensor,
    top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Make each tree of drafts of a draft model, in place of ``build_tree_kernel_efficient_func``.

    Args:
        parent_list: ``[requests, ...]``, the draft before each group of ``topk`` drafts.
        top_scores_index: ``[requests, drafts - 1]``, the drafts that became nodes. The root is not among them.
        seq_lens: ``[requests]``, the tokens before the drafts.
        tree_mask: Gets which tokens and nodes a node attends to, one request after the other.
        positions: Gets the positions of the nodes, ``[requests * drafts]``.
        retrieve_index: Gets the numbers of the nodes among all requests, ``[requests, drafts]``.
        retrieve_next_token: Gets the first child of each node; -1 for none.
        retrieve_next_sibling: Gets the next child of the same parent; -1 for none.
        topk: The drafts of a group.
        spec_steps: Not used.
        num_verify_tokens: The number of nodes of a request.
        tree_mask_mode: SGLang's ``TreeMaskMode``: 0 for a mask of all tokens and nodes, 1 for one of the nodes alone.
    """
    size, start = num_verify_tokens, 0
    retrieve_index.copy_(torch.arange(len(seq_lens) * size).view(-1, size))
    for request, length in enumerate(seq_lens.tolist()):
        chosen, groups = top_scores_index[request].tolist(), parent_list[request].tolist()
        parents = [-1] + [chosen.index(groups[i // topk]) + 1 if i >= topk else 0 for i in chosen]
        visible = torch.eye(size, dtype=torch.bool)
        for node, parent in enumerate(parents[1:], 1):
            visible[node] |= visible[parent]
        columns = size if tree_mask_mode else length + size
        tree_mask[start : start + size * columns].view(size, columns)[:, -size:] = visible
        start += size * columns
        positions[request * size : (request + 1) * size] = length + visible.sum(-1) - 1
        _link(parents, retrieve_next_token[request], retrieve_next_sibling[request])


def _link(parents: list[int], next_token: torch.Tensor, next_sibling: torch.Tensor) -> None:
    """Write the first child and the next sibling of each node of a tree; -1 for none."""
    next_token.fill_(-1)
    next_sibling.fill_(-1)
    for parent in set(parents) - {-1}:
        nodes = [node for node, its_parent in enumerate(parents) if its_parent == parent]
        next_token[parent] = nodes[0]
        for node, sibling in pairwise(nodes):
            next_sibling[node] = sibling


@replaces(
    "sglang.kernels.ops.speculative.cache_locs:assign_draft_cache_locs_contiguous_func",
    "SGLang's function launches a Triton kernel.",
    when=is_active,
)
def draft_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    topk: int,
    num_cols: int,
    positions: torch.Tensor | None = None,
    mrope: torch.Tensor | None = None,
) -> None:
    """Read the KV slots of a draft model's tokens, in place of ``assign_draft_cache_locs_contiguous_func``."""
    assert positions is None and mrope is None, "SGLang asks for positions on a GPU only"
    count = topk * num_cols
    out_cache_loc.copy_(
        slots_of(
            req_pool_indices=req_pool_indices, req_to_token=req_to_token, start_offset=seq_lens,
            end_offset=seq_lens + count, batch_size=len(seq_lens), draft_token_num=count, device="cpu",
        )
    )  # fmt: skip


class DraftSteps:
    """The attention backends of a draft model that proposes one token after the other, one backend for each step.

    Args:
        model_runner: The draft model's runner.
        topk: Drafts of a step for each draft of the step before. It must be 1.
        steps: Steps of the draft model. The last one needs no attention.
    """

    def __init__(self, model_runner: Any, topk: int, steps: int) -> None:
        if topk > 1:
            raise NotImplementedError(
                f"--speculative-eagle-topk {topk} needs attention over trees, which the CPU platform does not have for "
                "draft models; give 1"
            )
        self.attn_backends = [CpuAttentionBackend(model_runner, ahead=step + 1) for step in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Forget the step before, in each backend."""
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


@replaces(
    "sglang.srt.speculative.draft_utils:DraftBackendFactory._create_triton_decode_backend",
    "On this platform, the attention backend of this name is ours.",
    when=is_active,
)
def draft_decode_backend(factory: Any) -> tuple[str, DraftSteps]:
    """Make the attention of a draft model's steps."""
    return ATTENTION, DraftSteps(factory.draft_model_runner, factory.topk, factory.speculative_num_steps)


@replaces(
    "sglang.srt.speculative.draft_utils:DraftBackendFactory._create_triton_prefill_backend",
    "On this platform, the attention backend of this name is ours.",
    when=is_active,
)
def draft_extend_backend(factory: Any) -> tuple[str, CpuAttentionBackend]:
    """Make the attention of a draft model that reads what the model has accepted."""
    return ATTENTION, CpuAttentionBackend(factory.draft_model_runner)


@replaces(
    "sglang.kernels.ops.speculative.eagle:fill_bonus_tokens_func",
    "SGLang's function launches a Triton kernel.",
    when=is_active,
)
def last_accepted(tokens: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, stride: int, batch_size: int) -> None:
    """Put the last accepted token of each request into ``out``, in place of ``fill_bonus_tokens_func``.

    Args:
        tokens: ``[requests * stride]``, the accepted tokens of each request from its first place on.
        counts: ``[requests]``, how many tokens of each request are accepted.
        out: ``[requests]``.
        stride: The places of each request.
        batch_size: The number of requests.
    """
    last = torch.arange(batch_size, device=tokens.device) * stride + counts[:batch_size].long() - 1
    out[:batch_size] = tokens.flatten()[last].to(out.dtype)


def register() -> None:
    """Put all of them in place. A server with speculative decoding needs this before it builds its draft worker."""
    for function in (
        write_slots, prepare_no_copies, first_slots, accepted_slots, accept_greedily, build_tree, draft_slots,
        draft_decode_backend, draft_extend_backend, last_accepted,
    ):  # fmt: skip
        put_in_place(function)
    draft_sampling.register()
    kernels = ModuleType(KERNELS, "Kernels for CPUs. SGLang's library of this name cannot be imported without CUDA.")
    kernels.reconstruct_indices_from_tree_mask = reconstruct_tree  # type: ignore[attr-defined]
    sys.modules.setdefault(KERNELS, kernels)
