"""Sampling with speculative decoding, in plain PyTorch: SGLang has no code for CPUs that verifies drafts by chance.

The algorithm is the one that SGLang uses on GPUs, for trees of drafts that come without probabilities of their own. A
coin walks through the children of a node. It accepts the first child at which the sum of the probabilities of the
children so far exceeds it. If it accepts none, another coin draws from what the rejected children leave. So a child
with the probability p is accepted with the probability p, and each token is drawn as without drafts.

It is the verification of drafts by Leviathan et al. (https://arxiv.org/abs/2211.17192) for drafts that are certain. It
tries the siblings of a tree one after the other, as SpecInfer does (https://arxiv.org/abs/2305.09781).
"""

from __future__ import annotations

import torch

from sglang_shift.seams import relies_on

SAMPLE = "sglang.srt.speculative.eagle_utils:eagle_sample"
SAMPLER = "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch"


@relies_on(SAMPLE, "It calls our function for top-k, where SGLang has None for CPUs.")
@relies_on(SAMPLER, "Without drafts, this function applies top-k and top-p to the same probabilities.")
def keep_top_k(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """Leave the ``top_k`` largest probabilities of each row, and make the others 0, in place of ``top_k_renorm_prob``.

    The rest is not divided by its sum, because top-p limits the sum of the probabilities before top-k.
    :func:`accept_by_chance` divides it.

    Args:
        probs: ``[rows, tokens]``.
        top_ks: ``[rows]``.
    """
    most = min(int(top_ks.max()), probs.shape[-1])
    largest, tokens = probs.topk(most, dim=-1)
    largest.masked_fill_(torch.arange(most) >= top_ks[:, None], 0)
    return torch.zeros_like(probs).scatter_(-1, tokens, largest)


@relies_on(SAMPLE, "It calls our function for top-p, where SGLang has None for CPUs.")
@relies_on(SAMPLER, "Without drafts, this function applies top-k and top-p to the same probabilities.")
def keep_top_p(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """Leave the largest probabilities of each row up to a sum of ``top_p``, in place of ``top_p_renorm_prob``.

    The one that exceeds the sum is left, too. As in :func:`keep_top_k`, the rest is not divided by its sum.

    Args:
        probs: ``[rows, tokens]``.
        top_ps: ``[rows]``.
    """
    largest, tokens = probs.sort(dim=-1, descending=True)
    before = largest.cumsum(-1) - largest
    largest.masked_fill_(before > top_ps[:, None], 0)
    return torch.zeros_like(probs).scatter_(-1, tokens, largest)


@relies_on(SAMPLE, "It calls our function to verify sampled drafts, and gives the result of rank 0 to all ranks.")
def accept_by_chance(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Follow coins through each tree of drafts, in place of ``tree_speculative_sampling_target_only``.

    The names are those with which SGLang calls it.

    Args:
        predicts: Gets the token after each accepted node, ``[requests * drafts]``.
        accept_index: Gets the accepted nodes of each request, ``[requests, depth]``, from its root on.
        accept_token_num: Gets the number of accepted nodes of each request, without its root.
        candidates: ``[requests, drafts]``, the tokens of the nodes.
        retrive_index: ``[requests, drafts]``, the numbers of the nodes among all requests.
        retrive_next_token: ``[requests, drafts]``, the first child of each node; -1 for none.
        retrive_next_sibling: ``[requests, drafts]``, the next child of the same parent; -1 for none.
        uniform_samples: ``[requests, drafts]``, a coin in [0, 1) for the children of each node.
        uniform_samples_for_final_sampling: ``[requests]``, a coin in [0, 1) for the token after the last node.
        target_probs: ``[requests, drafts, tokens]``, the model's probabilities after each node, up to a factor.
        draft_probs: Not used: the drafts have no probabilities.
        threshold_single: A child with this probability is accepted, whatever the coin is.
        threshold_acc: If below 1, the coins are multiplied by it, so that more drafts are accepted.
        deterministic: Not used: the result depends on the coins only.
    """
    for request, last_coin in enumerate(uniform_samples_for_final_sampling.tolist()):
        tokens, children, siblings, coins = (
            each[request].tolist() for each in (candidates, retrive_next_token, retrive_next_sibling, uniform_samples)
        )
        path, chosen, child = [0], [], 0
        while child != -1:
            node = path[-1]
            # A coin is below 1 by 2^-24 or more. So in float64, the rest below never loses all its mass to rounding.
            probs = target_probs[request, node].double()
            probs = probs / probs.sum()
            coin, passed = coins[node] * threshold_acc, 0.0
            child = children[node] if len(path) < accept_index.shape[1] else -1
            while child != -1:
                prob = float(probs[tokens[child]])
                passed += prob
                if prob > 0 and (coin < passed or prob >= threshold_single):
                    break
                probs[tokens[child]] = 0
                child = siblings[child]
            if child != -1:
                path.append(child)
            chosen.append(tokens[child] if child != -1 else _draw(probs, last_coin))
        numbers = retrive_index[request, path]
        write_accepted(request, numbers, torch.tensor(chosen), predicts, accept_index, accept_token_num)


def write_accepted(
    request: int,
    numbers: torch.Tensor,
    chosen: torch.Tensor,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
) -> None:
    """Write which drafts of a request are accepted, where SGLang reads it.

    Args:
        request: The row of the request.
        numbers: ``[nodes]``, the numbers of the root and of the accepted nodes among all requests.
        chosen: ``[nodes]``, the token after each of them.
        predicts: As in :func:`accept_by_chance`, and so are the others.
        accept_index: Gets ``numbers``.
        accept_token_num: Gets how many there are beside the root.
    """
    accept_index[request, : len(numbers)] = numbers.to(accept_index.dtype)
    accept_token_num[request] = len(numbers) - 1
    predicts[numbers] = chosen.to(predicts.dtype)


def _draw(weights: torch.Tensor, coin: float) -> int:
    """The token at which the sum of the weights exceeds the share ``coin`` of their total. Its weight is above 0."""
    sums = weights.cumsum(0)
    return int(torch.searchsorted(sums, coin * sums[-1], right=True))


KERNELS = {
    "top_k_renorm_prob": keep_top_k,
    "top_p_renorm_prob": keep_top_p,
    "tree_speculative_sampling_target_only": accept_by_chance,
}
"""The functions by SGLang's name for them. On a CPU, SGLang has None under these names."""


def register() -> None:
    """Put all of them in place."""
    from sglang.srt.speculative import eagle_utils

    vars(eagle_utils).update(KERNELS)
