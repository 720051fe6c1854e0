"""Methods that cut at several layers, before the language model, or merge, against a reference that removes nothing.

The reference runs transformers' own layers on all tokens with one explicit mask a layer: a token sees itself and the
earlier ones that the method has not dropped at an earlier layer. It decides by formulas of its own.
"""

import pytest
import torch
from torch.nn import functional as F

from dynamic_llava import get_method
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.sparsity import budget
from tests.builders import IMAGE_TOKEN, LAYERS, assert_same_logits, build_model, collate, fixed_rows

STAGED = {
    "pyramiddrop": {"stage_keep_rate": 0.5},
    "pyramiddrop, two": {"layers": (1, 4), "stage_keep_rate": 0.34},
    "divprune": {"image_keep_rate": 0.3},
    "tome": {"image_keep_rate": 0.6},
    "tome, rounds": {"image_keep_rate": 0.2},
}


def images_of(row):
    """Yield the columns of each image of a row of ids, 16 tokens each."""
    places = (row == IMAGE_TOKEN).nonzero()[:, 0]
    yield from places.split(16) if len(places) else ()


class Reference:
    """One row, never removed from: hidden states, and for each token the first layer that no longer sees it."""

    def __init__(self, model, method, ids, pixels, answers):
        self.decoder, self.method, self.answers = model.model.language_model, method, answers
        embeds = model.get_input_embeddings()(ids[None])
        self.images = list(images_of(ids))
        if self.images:
            features = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
            embeds[0, torch.cat(self.images)] = features
        self.hidden, self.until = embeds, torch.full(ids.shape, LAYERS)
        self.places = {cut.layer for cut in method.cuts(LAYERS)}
        places = torch.arange(len(ids))[None]
        rotation, self.weights = self.decoder.rotary_emb(embeds, position_ids=places), None
        for index, layer in enumerate(self.decoder.layers):
            if index in self.places:
                for image in self.images:
                    self.cut(image[self.until[image] > index], index)
            seen = (self.until > index) | torch.eye(len(ids), dtype=torch.bool)
            mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen.tril(), torch.finfo(torch.float32).min)
            queries = layer.self_attn.register_forward_hook(lambda module, given, out: setattr(self, "weights", out[1]))
            self.hidden = layer(self.hidden, attention_mask=mask, position_embeddings=rotation)
            queries.remove()
        self.logits = model.lm_head(self.decoder.norm(self.hidden))[0]

    def cut(self, image, index):
        """Decide on the columns of an image that are left."""
        drop = getattr(self, self.method.name)(image)
        self.until[image[drop]] = index

    def pyramiddrop(self, image):
        asked = int((~self.answers).nonzero().max())
        row = self.weights[0, :, asked, image].mean(0)
        keep = row.argsort(descending=True)[: budget(self.method.stage_keep_rate, len(image))]
        return [place for place in range(len(image)) if place not in keep]

    def divprune(self, image):
        unit = F.normalize(self.hidden[0, image], dim=-1)
        apart = (1 - unit @ unit.T).tolist()
        every = range(len(image))
        keep = [max(every, key=lambda i: min(apart[i][j] for j in every if j != i))]
        while len(keep) < budget(self.method.image_keep_rate, len(image)):
            keep.append(max((i for i in every if i not in keep), key=lambda i: min(apart[i][j] for j in keep)))
        return [place for place in every if place not in keep]

    def tome(self, image):
        groups = [[place] for place in range(len(image))]
        whole = self.hidden[0, image].clone()
        while (surplus := len(groups) - budget(self.method.image_keep_rate, len(image))) > 0:
            unit = F.normalize(torch.stack([whole[group].mean(0) for group in groups]), dim=-1)
            first, second = range(0, len(groups), 2), range(1, len(groups), 2)
            tie = {one: max(second, key=lambda other: float(unit[one] @ unit[other])) for one in first}
            chosen = sorted(first, key=lambda one: -float(unit[one] @ unit[tie[one]]))[:surplus]
            for one in chosen:
                groups[tie[one]] += groups[one]
            groups = [group for place, group in enumerate(groups) if place not in chosen]
        for group in groups:
            self.hidden[0, image[group[0]]] = whole[group].mean(0)
        return [place for place in range(len(image)) if place not in {group[0] for group in groups}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("named", STAGED)
@torch.no_grad()
def test_every_path_is_the_reference(named, family):
    """Ragged rows of 0-3 images, padded: decisions and logits of the masked, scoring, cached and uncached paths."""
    method = get_method(named.split(",")[0], **STAGED[named])
    model = build_model(kv_heads=2, family=family, attention="eager")
    batch = fixed_rows(seed=11)
    inputs = collate(batch, "left")
    inputs.pop("keep_mask")
    given = {**inputs, "method": method, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    masked = model(**given, labels=inputs["input_ids"])
    dropped = model(**given)
    prompt = {name: values[:, :-6] for name, values in given.items() if name not in ("method", "pixel_values")}
    cached = model(**prompt, pixel_values=inputs["pixel_values"], method=method, use_cache=True)
    steps = []
    for column in range(inputs["input_ids"].shape[1] - 6, inputs["input_ids"].shape[1]):
        token = inputs["input_ids"][:, column : column + 1]
        places = given["position_ids"][:, column : column + 1]
        steps.append(model(input_ids=token, position_ids=places, method=method, cache=cached.cache))
    pixels = iter(inputs["pixel_values"].split([int((row.ids == IMAGE_TOKEN).sum()) // 16 for row in batch]))
    for number, row in enumerate(batch):
        real = inputs["attention_mask"][number].bool()
        reference = Reference(model, method, row.ids, next(pixels), row.output)
        until = masked.sparsity.until[number, real]
        assert torch.equal(until, reference.until), f"row {number}"
        assert torch.equal(dropped.sparsity.until[number, real], until)
        assert_same_logits(masked.logits[number, real], reference.logits, what=f"masked, row {number}")
        kept = until == LAYERS
        assert_same_logits(dropped.logits[number, real][kept], reference.logits[kept], what=f"dropped, row {number}")
        assert_same_logits(cached.logits[number, -1], reference.logits[-7], what=f"prefill, row {number}")
        found = torch.stack([step.logits[number, 0] for step in steps])
        assert_same_logits(found, reference.logits[-6:], what=f"steps, row {number}")
        seen = cached.cache.record
        assert torch.equal(seen.until[number, real], until)
        stored = seen.tokens_per_layer()[number].tolist()
        assert stored == [int((reference.until > layer).sum()) for layer in range(LAYERS)]
        held = [int(cached.cache.groups[group].lengths[number]) for group in cached.cache.group_of]
        assert held == stored, "the cache holds other tokens than the record says"
