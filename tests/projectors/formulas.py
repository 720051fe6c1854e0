"""The parts that projectors are made of, in plain loops over lists of numbers: nothing of torch.

`weights` are those of a module by name, as nested lists.
"""

from math import erf, exp, sqrt


def linear(value, weights, name):
    """Return W x + b of one list of numbers; without a bias where there is none."""
    matrix, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    return [
        sum(w * x for w, x in zip(row, value, strict=True)) + (0.0 if bias is None else bias[number])
        for number, row in enumerate(matrix)
    ]


def gelu(value):
    return [0.5 * x * (1 + erf(x / sqrt(2))) for x in value]


def sigmoid(value):
    return [1 / (1 + exp(-x)) for x in value]


def silu(value):
    return times(value, sigmoid(value))


def plus(one, other):
    return [x + y for x, y in zip(one, other, strict=True)]


def times(one, other):
    return [x * y for x, y in zip(one, other, strict=True)]


def mean(values):
    return [sum(column) / len(values) for column in zip(*values, strict=True)]


def norm(value, weights, name, eps):
    middle = sum(value) / len(value)
    spread = sqrt(sum((x - middle) ** 2 for x in value) / len(value) + eps)
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return [(x - middle) / spread * w + b for x, w, b in zip(value, scale, shift, strict=True)]


def perceptron(value, weights, name, activation=gelu):
    """Return the two maps `name`.0 and `name`.2 with an activation between."""
    return linear(activation(linear(value, weights, f"{name}.0")), weights, f"{name}.2")


def attention(query, keys, values, heads):
    """Return what one query takes of values, head by head."""
    size, taken = len(query) // heads, []
    for first in range(0, len(query), size):
        part = slice(first, first + size)
        scores = [exp(sum(times(query[part], key[part])) / sqrt(size)) for key in keys]
        shares = [score / sum(scores) for score in scores]
        taken += [sum(times(shares, column)) for column in zip(*(value[part] for value in values), strict=True)]
    return taken


def blocks(patches, side, scale):
    """Return the patches of every block of scale x scale, both row by row."""
    return [
        [patches[(top + y) * side + left + x] for y in range(scale) for x in range(scale)]
        for top in range(0, side, scale)
        for left in range(0, side, scale)
    ]


def depthwise(patches, side, weights, name):
    """Return a 3 x 3 convolution of each number for itself, with zeros around the image."""
    matrix, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias", [0.0] * len(patches[0]))
    found = []
    for row in range(side):
        for column in range(side):
            value = list(bias)
            for y in range(max(0, row - 1), min(side, row + 2)):
                for x in range(max(0, column - 1), min(side, column + 2)):
                    tap = [kernel[0][y - row + 1][x - column + 1] for kernel in matrix]
                    value = plus(value, times(tap, patches[y * side + x]))
            found.append(value)
    return found
