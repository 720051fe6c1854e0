"""The two predictors (Sec. 3.2, A.4.1, Fig. 5): small networks that score every image and every output token.

Shape suffixes: I images, n image tokens, D hidden size, U predictor width.
Both return two logits per token: index 0 = drop, index 1 = keep (Eq. 5).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DROP = 0
"""Index of the drop logit."""
KEEP = 1
"""Index of the keep logit."""

_NORM_EPS = 1e-5


def keep_margin(logits: Tensor) -> Tensor:
    """Return keep logit - drop logit, the score by which tokens are ranked (monotone in the keep log-probability).

    logits (..., 2) of any float dtype -> (...) float32 (float64 for float64 logits).
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits[..., KEEP] - logits[..., DROP]


class Predictor(nn.Module):
    """What both predictors share: a head whose last map gives the two logits."""

    head: nn.Sequential

    @torch.no_grad()
    def start_at(self, keep_rate: float) -> None:
        """Set the last bias so that, of a new predictor, sampled decisions keep about this share of the tokens.

        Gumbel-Softmax keeps a token of margin m with the probability sigmoid(m), whatever the temperature, and a new
        predictor's margins lie closely around its bias. Without noise every token is kept from one half on.
        """
        bias = self.last_bias
        bias[DROP], bias[KEEP] = 0.0, math.log(keep_rate / (1 - keep_rate))

    @property
    def last_bias(self) -> nn.Parameter:
        """(2,): what every token's logits have added."""
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        return last.bias


class ImagePredictor(Predictor):
    """Scores the tokens of each image jointly: pre-norm transformer blocks, then a local and a global half (A.4.1).

    The global half is the mean over the image's valid tokens (DynamicViT's feature; the paper is silent, the published
    code does it). Images never see each other. Raises ValueError when the width does not suit the heads or the halves.
    """

    def __init__(self, hidden_size: int, width: int = 512, heads: int = 8, mlp: int = 2048, blocks: int = 2) -> None:
        super().__init__()
        _check_width(width)
        self.down = _down_projection(hidden_size, width)
        self.blocks = nn.ModuleList(_TransformerBlock(width, heads, mlp) for _ in range(blocks))
        self.head = _head(width)

    def forward(self, hidden_InD: Tensor, valid_In: Tensor | None = None) -> Tensor:
        """Return the logits (I, n, 2) of the hidden states (I, n, D).

        valid_In (I, n) bool marks the real tokens of images padded to a common n; None means all of them. Padding,
        whatever it contains, has no influence on valid tokens; its own logits are finite and meaningless.
        """
        if hidden_InD.dim() != 3:
            raise ValueError(f"hidden has shape {tuple(hidden_InD.shape)}; give (images, tokens, hidden size)")
        if valid_In is not None:
            if valid_In.shape != hidden_InD.shape[:2] or valid_In.dtype != torch.bool:
                raise ValueError(
                    f"valid is {valid_In.dtype} of shape {tuple(valid_In.shape)}; give bool of shape "
                    f"{tuple(hidden_InD.shape[:2])}, the images and tokens of hidden"
                )
            if bool(valid_In.all()):
                valid_In = None  # images of one length: attention needs no mask
            else:
                hidden_InD = hidden_InD.masked_fill(~valid_In[..., None], 0)
        x_InU = self.down(hidden_InD)
        for block in self.blocks:
            x_InU = block(x_InU, valid_In)
        local, pooled = x_InU.chunk(2, dim=-1)
        mean = _mean_over_valid(pooled, valid_In).expand_as(pooled)
        logits: Tensor = self.head(torch.cat((local, mean), dim=-1))
        return logits


class OutputPredictor(Predictor):
    """Scores one output token from its own hidden state only, so training and decoding decide by the same function."""

    def __init__(self, hidden_size: int, width: int = 512) -> None:
        super().__init__()
        _check_width(width)
        self.down = _down_projection(hidden_size, width)
        self.head = _head(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., 2) of the hidden states (..., D)."""
        logits: Tensor = self.head(self.down(hidden))
        return logits


class _TransformerBlock(nn.Module):
    """Pre-norm transformer block without dropout."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attention = _Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, x_InU: Tensor, valid_In: Tensor | None) -> Tensor:
        x_InU = x_InU + self.attention(self.attention_norm(x_InU), valid_In)
        x_InU = x_InU + self.mlp(self.mlp_norm(x_InU))
        return x_InU


class _Attention(nn.Module):
    """Bidirectional self-attention over the valid tokens of one image; the rows of `qkv` are q, k, v in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}; choose a number of heads that divides it")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_InU: Tensor, valid_In: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_InU).chunk(3, dim=-1))
        visible = None
        if valid_In is not None:
            # An image slot without any valid token sees its (zeroed) padding: a fully masked softmax is not defined.
            visible = (valid_In | ~valid_In.any(dim=-1, keepdim=True))[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(-2))
        return projected


def _down_projection(hidden_size: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(hidden_size, eps=_NORM_EPS), nn.Linear(hidden_size, width), nn.GELU())


def _head(width: int) -> nn.Sequential:
    half, quarter = width // 2, width // 4
    return nn.Sequential(nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2))


def _check_width(width: int) -> None:
    if width < 4 or width % 4:
        raise ValueError(f"width={width} is not usable; the head halves it twice: choose a positive multiple of 4")


def _mean_over_valid(x_InU: Tensor, valid_In: Tensor | None) -> Tensor:
    if valid_In is None:
        return x_InU.mean(dim=1, keepdim=True)
    weight = valid_In[..., None].to(x_InU.dtype)
    return (x_InU * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
