"""The package of the paper, torch alone: predictors, decisions, their training, MaskedSoftmax, admission cache."""

from dynamic_llava.sparsity.decisions import budget, clip_mask_gradient, gumbel_keep, threshold_keep, top_k_keep
from dynamic_llava.sparsity.masked_softmax import masked_softmax_attention, masked_softmax_weights
from dynamic_llava.sparsity.noise import fold_key, gumbel_noise, uniform_noise
from dynamic_llava.sparsity.predictors import ImagePredictor, OutputPredictor, keep_margin
from dynamic_llava.sparsity.training import RELAXATIONS, keep_rate_loss, temperature

__all__ = [
    "RELAXATIONS",
    "ImagePredictor",
    "OutputPredictor",
    "budget",
    "clip_mask_gradient",
    "fold_key",
    "gumbel_keep",
    "gumbel_noise",
    "keep_margin",
    "keep_rate_loss",
    "masked_softmax_attention",
    "masked_softmax_weights",
    "temperature",
    "threshold_keep",
    "top_k_keep",
    "uniform_noise",
]
