"""Methods that cut at several layers, before the language model, or merge, against a reference that removes nothing.

The reference runs transformers' own layers on all tokens with one explicit mask a layer: a token sees itself and the
earlier ones that the method has not dropped at an earlier layer. It decides by formulas of its own.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dynamic_llava import get_method
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.sparsity import budget
from tests.builders import IMAGE_TOKEN, LAYERS, assert_same_logits, collate, fixed_rows, new_model_of
from tests.clip_folders import READS, tiny_clip

STAGED = {
    "pyramiddrop": {"stage_keep_rate": 0.5},
    "pyramiddrop, two": {"layers": (1, 4), "stage_keep_rate": 0.34},
    "divprune": {"image_keep_rate": 0.3},
    "tome": {"image_keep_rate": 0.6},
    "tome, rounds": {"image_keep_rate": 0.2},
    "hired": {"image_keep_rate": 0.3},
    "vispruner": {"image_keep_rate": 0.45},
    "vispruner, fastervlm": {"image_keep_rate": 0.3, "important_ratio": 1},
    "vispruner, thinned": {"image_keep_rate": 0.2, "important_ratio": 0},
    "visionzip": {"image_keep_rate": 0.5, "dominant_share": 0.6},
    "visionzip, few": {"image_keep_rate": 0.1},
    "holov": {"image_keep_rate": 0.4, "image_parts": 4},
    "holov, uneven": {"image_keep_rate": 0.7, "image_parts": 5, "variation": 0.5},
    "holov, single": {"image_keep_rate": 0.3},
    "hiprune": {"image_keep_rate": 0.5, "object_share": 0.7},
    "hiprune, few": {"image_keep_rate": 0.3, "object_share": 1.0, "object_depth": 1.0},
    "scope": {"image_keep_rate": 0.4},
    "scope, flatter": {"image_keep_rate": 0.6, "saliency": 0.5},
    "dart": {"image_keep_rate": 0.6, "image_pivots": 2, "layer": 4},
    "vscan": {"image_keep_rate": 0.35, "wider": 2, "layer": 2, "window": 3, "local_share": 0.8, "shallow_depth": 0.7},
    "idpruner": {"image_keep_rate": 0.4},
    "sparsevlm": {"last_keep_rate": 0.2, "schedule": (40, 10), "drop_layers": (2, 4)},
    "sparsevlm_plus": {"last_keep_rate": 0.3, "schedule": (40, 20), "drop_layers": (1, 4), "head_share": 0.5},
    "prumerge_plus": {},
    "prumerge_plus, two": {"neighbours": 2},
    "prumerge_plus, share": {"image_keep_rate": 0.45, "neighbours": 3},
    "average_pool, overlapping": {"side_keep_rate": 0.75},
    "downsample": {},
    "trim": {},
    "trim, share": {"image_keep_rate": 0.3},
    "cdpruner": {"image_keep_rate": 0.4},
    "visionselector": {"image_keep_rate": 0.4},
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
        self.images, self.project, self.tower = list(images_of(ids)), model.model.multi_modal_projector, []
        if self.images:
            features = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
            embeds[0, torch.cat(self.images)] = features
            self.tower = [Tower(model.model.vision_tower, one[None]) for one in pixels]
            self.pixels, self.encoder = pixels, model.model.get_image_features
        self.ids = ids
        self.hidden, self.embeds, self.until = embeds, embeds[0].clone(), torch.full(ids.shape, LAYERS)
        self.places = {cut.layer for cut in method.cuts(LAYERS)}
        places = torch.arange(len(ids))[None]
        rotation, self.weights = self.decoder.rotary_emb(embeds, position_ids=places), None
        for index, layer in enumerate(self.decoder.layers):
            if index in self.places:
                for number, image in enumerate(self.images):
                    self.number = number
                    self.cut(image[self.until[image] > index], index)
            seen = (self.until > index) | torch.eye(len(ids), dtype=torch.bool)
            mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen.tril(), torch.finfo(torch.float32).min)
            self.last, self.rotation = (layer, self.hidden), rotation
            queries = layer.self_attn.register_forward_hook(lambda module, given, out: setattr(self, "weights", out[1]))
            self.hidden = layer(self.hidden, attention_mask=mask, position_embeddings=rotation)
            queries.remove()
        self.logits = model.lm_head(self.decoder.norm(self.hidden))[0]

    def cut(self, image, index):
        """Decide on the columns of an image that are left."""
        self.at = index
        drop = getattr(self, self.method.name)(image)
        self.until[image[drop]] = index

    def pyramiddrop(self, image):
        asked = int((~self.answers).nonzero().max())
        row = self.weights[0, :, asked, image].mean(0)
        keep = row.argsort(descending=True)[: budget(self.method.stage_keep_rate, len(image))]
        return [place for place in range(len(image)) if place not in keep]

    def visionselector(self, image):
        """Every product of a query with a key, one by one."""
        net = self.decoder.method
        tokens = self.hidden[0, image]
        queries, keys = tokens @ net.query.T + net.query_bias, tokens @ net.key.T + net.key_bias
        products = queries @ keys.T / 1792**0.5
        scores = [sum(row.tolist()) / len(image) for row in products]
        keep = best(scores, math.floor(self.method.image_keep_rate * len(image)))
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

    def hired(self, image):
        keep = best(self.tower[self.number].row, budget(self.method.image_keep_rate, len(image)))
        return [place for place in range(len(image)) if place not in keep]

    def vispruner(self, image):
        tower, total = self.tower[self.number], budget(self.method.image_keep_rate, len(image))
        ranked = best(tower.row, len(image))
        important = int(total * self.method.important_ratio)
        keep, others = ranked[:important], ranked[important:]
        others = others if important < total else []
        while (surplus := len(others) - (total - important)) > 0:
            nearest = {one: max(cosine(tower.features, one, other) for other in others[1::2]) for one in others[::2]}
            listed = sorted(nearest, key=lambda one: -nearest[one])
            others = listed[min(8, surplus) :] + others[1::2]
        return [place for place in range(len(image)) if place not in keep + others]

    def visionzip(self, image):
        tower, total = self.tower[self.number], budget(self.method.image_keep_rate, len(image))
        dominant = best(tower.row, max(1, int(total * self.method.dominant_share)))
        rest = [place for place in range(len(image)) if place not in dominant]
        contextual = [rest[i * (len(rest) // (total - len(dominant)))] for i in range(total - len(dominant))]
        groups = {place: [] for place in contextual}
        for place in rest if contextual else ():
            if place not in groups:
                groups[max(contextual, key=lambda one: cosine(tower.keys, one, place))].append(place)
        for place, group in groups.items():
            if group:
                self.hidden[0, image[place]] = self.project(tower.features[place] + tower.features[group].mean(0))
        return [place for place in rest if place not in contextual]

    def holov(self, image):
        row, count = 1e3 * self.tower[self.number].row, min(self.method.image_parts, len(image))
        hidden, total = self.hidden[0, image], budget(self.method.image_keep_rate, len(image))
        parts = [part.tolist() for part in np.array_split(np.arange(len(image)), count)]
        scores = []
        for part in parts:
            varies = []
            for one in part:
                alike = [0.0 if other == one else cosine(hidden, one, other) for other in part]
                mean = sum(alike) / max(1, len(part) - 1)
                varies.append(sum((value - mean) ** 2 for value in alike) / max(1, len(part) - 1))
            scale = float(row[part].mean()) / (sum(varies) / len(part) + 1e-6)
            scores.append(float(row[part].mean()) + self.method.variation * scale * sum(varies) / len(part))
        quotas = [min(len(part), int(score / sum(scores) * total)) for part, score in zip(parts, scores, strict=True)]
        while sum(quotas) < total:
            for number in best(torch.tensor(scores), count):
                quotas[number] += quotas[number] < len(parts[number]) and sum(quotas) < total
        kept = {part[place] for part, quota in zip(parts, quotas, strict=True) for place in best(row[part], quota)}
        return [place for place in range(len(image)) if place not in kept]

    def hiprune(self, image):
        tower, total, side = self.tower[self.number], budget(self.method.image_keep_rate, len(image)), 4
        early = tower.received[max(1, round(self.method.object_depth * len(tower.received))) - 1]
        anchors = best(early, round(total * self.method.object_share / 5))
        beside = [
            place for place in best(early, len(image))
            if any(abs(place // side - one // side) + abs(place % side - one % side) == 1 for one in anchors)
        ]  # fmt: skip
        keep = [*anchors, *(place for place in beside if place not in anchors)][:total]
        deep = [place for place in best(tower.received[-2], len(image)) if place not in keep]
        keep += deep[: total - len(keep)]
        return [place for place in range(len(image)) if place not in keep]

    def scope(self, image):
        tower, every, keep = self.tower[self.number], range(len(image)), []
        alike = [[cosine(tower.features, one, other) for other in every] for one in every]

        def coverage(chosen):
            return sum(max([0.0, *(alike[one][other] for one in chosen)]) for other in every)

        while len(keep) < budget(self.method.image_keep_rate, len(image)):
            added = {one: coverage([*keep, one]) - coverage(keep) for one in every if one not in keep}
            keep.append(max(added, key=lambda one: added[one] * float(tower.row[one]) ** self.method.saliency))
        return [place for place in every if place not in keep]

    def dart(self, image):
        layer, hidden = self.last
        keys = layer.self_attn.k_proj(layer.input_layernorm(hidden)).unflatten(-1, (2, -1))
        keys = layer.self_attn.k_norm(keys) if hasattr(layer.self_attn, "k_norm") else keys
        keys = apply_rotary_pos_emb(keys.transpose(1, 2), keys.transpose(1, 2), *self.rotation)[1]
        norms, normed = keys[0].abs().sum((0, 2)), self.decoder.norm(self.hidden)[0]
        question = [place for place in range(int(image[-1]) + 1, len(normed)) if not self.answers[place]]
        question = [place for place in question if not any(place in other for other in self.images)]
        question = question or [int((~self.answers).nonzero().max())]
        total = budget(self.method.image_keep_rate, len(image))
        first = [int(image[place]) for place in best(norms[image], self.method.image_pivots)][:total]
        pivots = [*first, *(question[place] for place in best(norms[question], self.method.text_pivots))]
        keep, share = [*first], Fraction(total - len(first), len(pivots))
        for number, pivot in enumerate(pivots):
            left = [place for place in image.tolist() if place not in keep]
            found = sorted(left, key=lambda place: cosine(normed, place, pivot))
            keep += found[: math.floor(share * (number + 1)) - math.floor(share * number)]
        return [place for place in range(len(image)) if int(image[place]) not in keep]

    def vscan(self, image):
        total = budget(self.method.image_keep_rate, 16)
        if self.at:
            asked = int((~self.answers).nonzero().max())
            keep = best(self.weights[0, :, asked, image].mean(0), total)
            return [place for place in range(len(image)) if place not in keep]
        tower, side, every = self.tower[self.number], 4, range(len(image))
        early = tower.rows[max(1, round(self.method.shallow_depth * len(tower.rows))) - 1]
        windows = {}
        for place in best(early, 16):
            where = place // side // self.method.window, place % side // self.method.window
            windows.setdefault(where, []).append(place)
        wide = min(16, self.method.wider * total)
        each = math.floor(wide * self.method.local_share) // len(windows)
        keep = [place for window in windows.values() for place in window[:each]]
        keep += [place for place in best(tower.row, 16) if place not in keep][: wide - len(keep)]
        groups, whole = {place: [place] for place in keep}, self.hidden[0, image].clone()
        for place in every:
            if place not in groups:
                groups[max(sorted(keep), key=lambda one: cosine(whole, one, place))].append(place)
        for place, group in groups.items():
            self.hidden[0, image[place]] = whole[group].mean(0)
        return [place for place in every if place not in keep]

    def raters(self, image):
        asked = [place for place in range(int(self.images[0][-1]) + 1, len(self.embeds)) if not self.answers[place]]
        asked = [place for place in asked if not any(place in other for other in self.images)]
        end = int((~self.answers).nonzero().max())
        asked = asked if end in asked else [*asked, end]
        products = torch.stack([self.embeds[place] @ self.embeds[asked].T for place in torch.cat(self.images)])
        relevance = dict(zip(asked, products.softmax(-1).mean(0).tolist(), strict=True))
        mine = [place for place in asked if place > int(image[-1]) or place == end]
        mean = sum(relevance[place] for place in mine) / len(mine)
        return [place for place in mine if relevance[place] > mean] or mine

    def scheduled(self):
        stage = list(self.method.drop_layers).index(self.at)
        rate, schedule = Fraction(str(self.method.last_keep_rate)), self.method.schedule
        return max(1, int(rate * schedule[stage] / schedule[-1] * 16))

    def sparsevlm(self, image):
        rated = self.weights[0, :, self.raters(image)][:, :, image].mean((0, 1))
        keep = best(rated, self.scheduled())
        dropped = [place for place in best(rated, len(image)) if place not in keep]
        if not dropped:
            return []
        recycled = sorted(dropped[: int(len(dropped) * 0.3) + 1])
        whole = self.hidden[0, image[recycled]].clone()
        count, every = int(len(recycled) / 10) + 1, range(len(recycled))
        apart = [[float((one - other).norm()) / len(one) ** 0.5 for other in whole] for one in whole]
        density = [math.exp(-sum(gap**2 for gap in sorted(gaps)[:count]) / count) for gaps in apart]
        peaks = []
        for one in every:
            denser = [apart[one][other] for other in every if (-density[other], other) < (-density[one], one)]
            peaks.append(density[one] * min(denser, default=max(map(max, apart))))
        centres = best(torch.tensor(peaks), count)
        groups = {centre: [] for centre in centres}
        for one in every:
            groups[one if one in groups else min(centres, key=lambda centre: apart[one][centre])].append(one)
        for centre, group in groups.items():
            self.hidden[0, image[recycled[centre]]] = whole[group].mean(0)
        keep += [recycled[centre] for centre in centres]
        return [place for place in range(len(image)) if place not in keep]

    def sparsevlm_plus(self, image):
        asked, (cos, sin) = self.raters(image), self.rotation
        vector = torch.ones(1, 1, *cos.shape[1:])
        turned = apply_rotary_pos_emb(vector, vector, cos, sin)[0][0, 0]
        alone = turned @ turned.T / turned.shape[1] ** 0.5
        rows = (self.weights[0] / alone)[:, asked][:, :, image]
        heads = best(rows.sum((1, 2)), int(self.method.head_share * len(rows)))
        keep = best(rows[heads].mean((0, 1)), self.scheduled())
        return [place for place in range(len(image)) if place not in keep]

    def idpruner(self, image):
        row, hidden = self.tower[self.number].row, self.hidden[0, image]
        importance = ((row - row.min()) / (row.max() - row.min() + 1e-6)).tolist()
        keep, weight = best(importance, 1), self.method.importance_weight
        while len(keep) < budget(self.method.image_keep_rate, len(image)):
            left = [place for place in range(len(image)) if place not in keep]
            likeness = {place: max(cosine(hidden, place, one) for one in keep) for place in left}
            keep.append(max(left, key=lambda place: weight * importance[place] - (1 - weight) * likeness[place]))
        return [place for place in range(len(image)) if place not in keep]

    def clip(self, image):
        """(n, P) patches and (m, P) pieces of the question in the shared space, by transformers' own CLIP."""
        folder = tiny_clip(self.tower[0].features.shape[1])
        whole = CLIPModel.from_pretrained(folder).eval()
        taken = whole.visual_projection(whole.vision_model.post_layernorm(self.tower[self.number].features))
        asked = range(int(image.max()) + 1, int(self.answers.nonzero()[0]) if self.answers.any() else len(self.ids))
        words = " ".join(f"w{self.ids[column]}" for column in asked if self.ids[column] != IMAGE_TOKEN)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        (start, *letters, end), room = tokenizer(words)["input_ids"], READS - 2
        cut = [[start, *letters[at : at + room], end] for at in range(0, max(1, len(letters)), room)]
        return taken, torch.cat([whole.get_text_features(torch.tensor([one])).pooler_output for one in cut])

    def trim(self, image):
        patches, pieces = self.clip(image)
        scores = np.exp(-(patches @ pieces[0]).double().numpy())
        scores /= scores.sum()
        if self.method.image_keep_rate == "outliers":
            lower, upper = np.percentile(scores, [25, 75])
            count = int((scores > upper + 1.5 * (upper - lower)).sum())
        else:
            count = int(Fraction(str(self.method.image_keep_rate)) * len(image)) - 1
        keep = best(torch.tensor(scores), count)
        rest = [place for place in range(len(image)) if place not in keep]
        self.hidden[0, image[rest[-1]]] = self.project(self.tower[self.number].features[rest].mean(0))
        return rest[:-1]

    def cdpruner(self, image):
        patches, pieces = self.clip(image)
        unlike = np.array(
            [-np.mean([float(F.cosine_similarity(one, piece, dim=0)) for piece in pieces]) for one in patches]
        )
        relevance = (unlike - unlike.min() + 1e-6) / (unlike.max() - unlike.min())
        unit = F.normalize(self.hidden[0, image], dim=-1).double().numpy()
        kernel, keep, every = relevance[:, None] * (unit @ unit.T) * relevance, [], range(len(image))
        while len(keep) < budget(self.method.image_keep_rate, len(image)):
            volume = {
                one: np.linalg.det(kernel[np.ix_([*keep, one], [*keep, one])]) for one in every if one not in keep
            }
            keep.append(max(volume, key=lambda one: volume[one]))
        return [place for place in every if place not in keep]

    def prumerge_plus(self, image):
        tower, every = self.tower[self.number], range(len(image))
        row = tower.joint_row.tolist()
        if self.method.image_keep_rate == "outliers":
            lower, upper = np.percentile(row, [25, 75])
            count = max(1, sum(one > upper + 1.5 * (upper - lower) for one in row))
            step = max(1, int(int(len(row) / count) / 3))
            keep = {*best(tower.joint_row, count), *range(0, len(row) - 1, step)}
        else:
            count = int(Fraction(str(self.method.image_keep_rate)) * len(row)) - 1
            keep = best(tower.joint_row, math.ceil(count / 2))
            left, parts = [place for place in every if place not in keep], count // 2
            keep = {*keep, *(left[int(Fraction(2 * part + 1, 2 * parts) * len(left))] for part in range(parts))}
        rest = [place for place in every if place not in keep]
        for one in keep:
            ranked = sorted((i for i in every if i != one), key=lambda other: -cosine(tower.joint_keys, one, other))
            added = sum(row[other] * tower.features[other] for other in ranked[: self.method.neighbours])
            self.hidden[0, image[one]] = self.project(tower.features[one] + added)
        if rest:
            self.hidden[0, image[rest[-1]]] = self.project(sum(row[place] * tower.features[place] for place in rest))
        return rest[:-1]

    def average_pool(self, image):
        coarse = int(4 * self.method.side_keep_rate)
        grid = self.tower[self.number].features.T.unflatten(1, (4, 4))
        cells = F.adaptive_avg_pool2d(grid, coarse).flatten(1).T
        self.hidden[0, image[MIDDLES[coarse]]] = self.project(cells)
        return [place for place in range(len(image)) if place not in MIDDLES[coarse]]

    def downsample(self, image):
        coarse = int(4 * self.method.side_keep_rate)
        channels = [Image.fromarray(channel.numpy()) for channel in self.pixels[self.number]]
        small = [np.asarray(one.resize((14 * coarse, 14 * coarse), Image.Resampling.BICUBIC)) for one in channels]
        seen = self.encoder(torch.tensor(np.stack(small))[None], interpolate_pos_encoding=True).pooler_output
        self.hidden[0, image] = 0  # the whole picture is not seen
        self.hidden[0, image[MIDDLES[coarse]]] = torch.cat(list(seen))
        return [place for place in range(len(image)) if place not in MIDDLES[coarse]]


MIDDLES = {2: [0, 2, 8, 10], 3: [0, 1, 2, 4, 5, 6, 8, 9, 10]}
"""In a grid of 4 x 4: the upper left of each 2 x 2 cell; of three overlapping cells of two patches, likewise."""


class Tower:
    """What transformers' own tower gives of one image, all of its attention weights returned."""

    def __init__(self, tower, pixels):
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
        depth = len(tower.encoder.layers)
        self.rows = [layer[0].mean(0)[0, 1:] for layer in out.attentions]
        self.row = self.rows[depth - 2]  # of the layer whose output the projector reads
        self.features = out.hidden_states[-2][0, 1:]
        self.received = [layer[0].mean((0, 1))[1:] for layer in out.attentions]
        queries, keys = self.maps(tower.encoder.layers[depth - 2], out.hidden_states[depth - 2])
        self.keys = keys.view(len(keys), tower.config.num_attention_heads, -1).mean(1)[1:]
        queries, keys = self.maps(tower.encoder.layers[depth - 1], out.hidden_states[depth - 1])
        self.joint_row = (keys @ queries[0] / keys.shape[1] ** 0.5).softmax(0)[1:]
        self.joint_keys = keys[1:]

    @staticmethod
    def maps(layer, hidden):
        normed = layer.layer_norm1(hidden[0])
        return layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)


def best(scores, count):
    """The places of the highest scores, equal ones by place."""
    return sorted(range(len(scores)), key=lambda place: -float(scores[place]))[:count]


def cosine(vectors, one, other):
    return float(F.cosine_similarity(vectors[one], vectors[other], dim=0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("named", STAGED)
@torch.no_grad()
def test_every_path_is_the_reference(named, family):
    """Ragged rows of 0-3 images, padded: decisions and logits of the masked, scoring, cached and uncached paths."""
    method = get_method(named.split(",")[0], **STAGED[named])
    model = new_model_of(method.name, 2, family=family, attention="eager")
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
