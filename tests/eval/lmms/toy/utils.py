"""The functions that toy.yaml names."""

from PIL import Image


def images(doc):
    return [Image.open(name).convert("RGB") for name in doc["images"]]


def context(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
