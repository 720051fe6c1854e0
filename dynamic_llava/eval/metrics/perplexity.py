"""Teacher-forced perplexity: negative log-likelihoods per answer token from ONE forward pass (docs/method.md, 5).

B batch, N tokens, V vocabulary.
"""

import math

import torch


def answer_nll(logits_BNV: torch.Tensor, labels_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log p over each row's labelled tokens, and how many there are.

    logits_BNV is float (B, N, V), labels_BN int64 (B, N) with -100 at positions that do not count; position i predicts
    label i + 1. Returns float64 (B,) sums and int64 (B,) counts. ValueError when the shapes disagree.
    """
    if logits_BNV.shape[:2] != labels_BN.shape:
        raise ValueError(
            f"logits of shape {tuple(logits_BNV.shape)} do not belong to labels of shape {tuple(labels_BN.shape)}; "
            "give logits (B, N, V) of every position and labels (B, N)"
        )
    targets = labels_BN[:, 1:]
    counted = targets != -100
    log_probability = torch.log_softmax(logits_BNV[:, :-1].float(), dim=-1)
    picked = log_probability.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nll = -torch.where(counted, picked, 0.0).sum(dim=1, dtype=torch.float64)
    return nll, counted.sum(dim=1)


def perplexity(nll: float, tokens: int) -> float:
    """exp(mean negative log-likelihood) over all tokens together; ValueError without tokens."""
    if tokens <= 0:
        raise ValueError(f"perplexity over {tokens} tokens is undefined; give at least one labelled token")
    return math.exp(nll / tokens)
