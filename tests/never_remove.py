"""Eviction without removing anything: one row alone, and a mask of each key head that hides what has been evicted.

Nothing of the engine's passes, caches or kernels is used: transformers' own layers run with an attention function that
keeps every key and value, and rules that are written once more, head by head, in plain Python.
"""

import copy
import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamic_llava.sparsity.noise import fold_key, uniform_noise
from tests.builders import IMAGE_TOKEN

NAME = "never_remove"


@dataclass
class Head:
    """Every token that one key head was ever given, in order."""

    alive: list = field(default_factory=list)
    """Places of the tokens that it still holds."""
    mass: dict = field(default_factory=dict)
    latest: dict = field(default_factory=dict)
    norm: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """What a rule is told beside the head itself; tokens that a cut has dropped do not count."""

    layer: int
    head: int
    tokens: int
    outputs: int
    place: dict
    """Of each token: how many tokens of the row came before it."""
    is_output: tuple
    """Of each token of the row: whether it is an output token."""
    heads: tuple
    """All key heads of the layer, before any of them is asked."""


class NeverRemove:
    """One row; `rule(head, told)` returns the tokens that stay, after every chunk.

    From layer `cut` on tokens are hidden where `keeps(ids, output)` (N,) bool is False.
    """

    def __init__(self, model, row, rule, latest_queries=1, cut=None, keeps=None):
        self.language_model = _apart(model)
        self.head, self.rule, self.latest_queries = model.lm_head, rule, latest_queries
        self.embedded = model.get_input_embeddings()(row.ids)
        if len(row.pixels):
            images = model.model.get_image_features(row.pixels).pooler_output
            self.embedded[row.ids == IMAGE_TOKEN] = torch.cat(list(images)).flatten(0, -2)
        self.ids, self.output, self.seen = row.ids, row.output, 0
        self.cut, self.keeps = cut, keeps
        self.keys, self.values, self.heads = {}, {}, {}

    def say(self, count, ids=None):
        """Run the next `count` tokens of the row, or the given output ids behind it; returns logits (count, V)."""
        if ids is None:
            hidden = self.embedded[self.seen : self.seen + count]
        else:
            hidden = self.language_model.embed_tokens(ids)
            self.ids = torch.cat([self.ids, ids])
            self.output = torch.cat([self.output, torch.ones_like(ids, dtype=torch.bool)])
        place = torch.arange(self.seen, self.seen + count)[None]
        rotation = self.language_model.rotary_emb(hidden[None], position_ids=place)
        self.seen += count
        hidden = hidden[None]
        AttentionInterface.register(f"sparse_{NAME}", self._attend)
        try:
            for layer in self.language_model.layers:
                hidden = layer(hidden, position_embeddings=rotation, attention_mask=None)
        finally:
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(f"sparse_{NAME}")
        return self.head(self.language_model.norm(hidden))[0]

    def lengths(self):
        """Return (L, K): tokens that each head holds."""
        return torch.tensor([[len(head.alive) for head in self.heads[layer]] for layer in sorted(self.heads)])

    def _kept(self, layer):
        if self.cut is None or layer < self.cut:
            return torch.ones(self.seen, dtype=torch.bool)
        return self.keeps(self.ids[: self.seen], self.output[: self.seen])

    def _attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        layer, (_, key_heads, count, _) = module.layer_idx, key.shape
        heads = self.heads.setdefault(layer, [Head() for _ in range(key_heads)])
        for name, new in (("keys", key), ("values", value)):
            stored = getattr(self, name)
            stored[layer] = torch.cat([stored[layer], new], 2) if layer in stored else new
        keys, values, before = self.keys[layer], self.values[layer], self.seen - count
        kept, places = self._kept(layer), {}
        for token in kept.nonzero().flatten().tolist():
            places[token] = len(places)
        out, groups = torch.empty_like(query), query.shape[1] // key_heads
        for number, head in enumerate(heads):
            seen = torch.zeros(count, self.seen, dtype=torch.bool)
            seen[:, head.alive] = True
            seen[:, before:] = (kept[before:] | torch.eye(count, dtype=torch.bool)).tril()
            mine = slice(number * groups, (number + 1) * groups)
            scores = query[0, mine] @ keys[0, number].t() * scaling
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            out[0, mine] = weights @ values[0, number]
            head.alive += [token for token in range(before, self.seen) if kept[token]]
            received, latest = weights.sum((0, 1)).tolist(), weights[:, -self.latest_queries :].sum((0, 1)).tolist()
            for token in head.alive:
                head.mass[token] = head.mass.get(token, 0.0) + received[token]
                head.latest[token] = latest[token]
                head.norm[token] = keys[0, number, token].norm().item()
        is_output = tuple(self.output[: self.seen].tolist())
        told = len(places), int((self.output[: self.seen] & kept).sum()), places, is_output, copy.deepcopy(heads)
        for number, head in enumerate(heads):
            head.alive = sorted(self.rule(head, Told(layer, number, *told)))
        return out.transpose(1, 2), None


@lru_cache(maxsize=8)
def _apart(model):
    """Return a copy of the language model whose attention is named here."""
    language_model = copy.deepcopy(model.model.language_model)
    language_model.config._attn_implementation = NAME
    return language_model


def h2o(method):
    """The rule of H2O with the method's settings."""
    heavy_rate, recent_rate = Fraction(str(method.heavy_rate)), Fraction(str(method.recent_rate))

    def rule(head, told):
        if told.layer < method.layer:
            return head.alive
        leaving = [token for token in head.alive if method.shares_of != "outputs" or told.is_output[token]]
        prompt = told.tokens - told.outputs
        if method.shares_of == "outputs":
            prompt = told.outputs
        heavy, recent = math.floor(heavy_rate * prompt), math.floor(recent_rate * prompt)
        if method.shares_of == "tokens":
            recent += math.floor(recent_rate * told.outputs)
            both = heavy_rate + recent_rate
            heavy = math.floor(both * prompt) + math.floor(both * told.outputs) - recent
        elif method.shares_of == "outputs":
            heavy = math.floor((heavy_rate + recent_rate) * prompt) - recent
        recent = max(recent, 1)
        older = [token for token in head.alive[:-recent] if token in leaving]
        best = sorted(older, key=lambda token: (-head.mass[token], token))[:heavy]
        return {*head.alive[-recent:], *best, *(token for token in head.alive if token not in leaving)}

    return rule


def top_slots(method):
    """The rule of a method that keeps the best tokens within a budget, by `SCORES` of its name."""
    rate, score = Fraction(str(method.keep_rate)), SCORES[method.name]

    def rule(head, told):
        if told.layer < method.layer:
            return head.alive
        prompt, outputs = math.floor(rate * (told.tokens - told.outputs)), math.floor(rate * told.outputs)
        budget = {"prompt": prompt, "tokens": prompt + outputs, "outputs": outputs}[method.shares_of]
        leaving = [token for token in head.alive if method.shares_of != "outputs" or told.is_output[token]]
        recent = head.alive[-method.recent :]
        room = max(0, budget - len([token for token in recent if token in leaving]))
        older = [token for token in leaving if token not in recent]
        best = sorted(older, key=lambda token: (-score(method, head, told, token), token))[:room]
        return {*recent, *best, *(token for token in head.alive if token not in leaving)}

    return rule


@lru_cache(maxsize=4096)
def drawn(seed, place):
    return uniform_noise(fold_key(seed), torch.tensor([place])).item()


SCORES = {
    "tova": lambda method, head, told, token: sum(one.latest[token] for one in told.heads),
    "knorm": lambda method, head, told, token: -head.norm[token],
    "random_window": lambda method, head, told, token: drawn(method.seed, told.place[token]),
}


def snapkv(method):
    """The rule of SnapKV with the method's settings."""
    rate, reach = Fraction(str(method.keep_rate)), method.kernel // 2

    def rule(head, told):
        if told.outputs:
            return head.alive
        older, window = head.alive[: -method.window], head.alive[-method.window :]
        room = max(0, math.floor(rate * told.tokens) - len(window))
        pooled = {}
        for number, token in enumerate(older):
            around = older[max(0, number - reach) : number + reach + 1]
            pooled[token] = sum(head.latest[one] for one in around) / method.kernel
        return [*window, *sorted(older, key=lambda token: (-pooled[token], token))[:room]]

    return rule


def streaming_llm(method):
    """The rule of StreamingLLM with the method's settings."""
    return lambda head, told: [
        token for token in head.alive if token < method.sinks or token >= told.tokens - method.window
    ]
