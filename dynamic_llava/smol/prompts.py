"""Four hundred requests for long texts: four wordings of each of a hundred subjects, and their split.

A subject is wholly in training or wholly held out, so nothing that is asked in one is asked in the other.
"""

from dataclasses import dataclass

HELD_EVERY = 10
"""Of so many subjects of a kind one is held out."""


@dataclass(frozen=True)
class Request:
    """A request and where it came from."""

    id: str
    text: str
    held: bool
    """Whether it is measured on; else it is trained on."""


_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "explain": (
        (
            "Explain in detail how {} to a curious student.",
            "Write a long, clear article about how {}.",
            "Teach me step by step how {}, with an example for each step.",
            "A child asks how {}. Give a patient and complete answer in several paragraphs.",
        ),
        (
            "bread rises", "a bicycle stays upright", "rain forms", "a sailing boat moves against the wind",
            "bees make honey", "a camera records an image", "the moon causes tides", "a seed becomes a tree",
            "paper is recycled", "the heart pumps blood", "a refrigerator cools food", "glass is made",
            "birds find their way in autumn", "a bridge carries its load", "the ear turns sound into signals",
            "coffee gets from a farm to a cup", "a clock keeps time", "volcanoes erupt", "languages change",
            "an aeroplane stays in the air",
        ),
    ),
    "visit": (
        (
            "Describe a visit to {} with everything that one sees, hears and smells.",
            "Write a travel report about a day at {}.",
            "Write a letter to a friend in which you tell about {}.",
            "Describe {} in the morning, at noon and at night.",
        ),
        (
            "a fishing harbour", "an old library", "a night market", "a mountain hut", "a railway station",
            "a botanical garden", "a small theatre", "a desert village", "a lighthouse", "a school on its last day",
            "a museum of clocks", "a farm in harvest time", "a frozen lake", "a busy bakery", "an island ferry",
            "a workshop of violins", "a flower auction", "a forest after the rain", "a castle ruin", "a city rooftop",
        ),
    ),
    "advise": (
        (
            "Give thorough advice to somebody who wants to {}.",
            "Write a plan for one month for a person who wants to {}.",
            "List the ten most important things to know for everybody who wants to {}, and explain each.",
            "What usually goes wrong when people {}, and what can they do about it? Answer at length.",
        ),
        (
            "learn to swim", "plant a vegetable garden", "play the piano", "repair an old chair", "run a long race",
            "cook for a large family", "speak in front of an audience", "save money every month", "learn a language",
            "adopt a dog", "write a first novel", "move to another country", "sleep better", "build a wooden shelf",
            "start a book club", "travel by train for weeks", "brew tea properly", "teach a class of children",
            "organise a village fair", "draw portraits",
        ),
    ),
    "tell": (
        (
            "Write a short story about {}.",
            "Tell a story for children in which {} plays the main part.",
            "Write the diary of one week about {}.",
            "Write a conversation between two neighbours about {}.",
        ),
        (
            "a clockmaker who is always late", "a lost letter", "the last passenger of a bus", "a garden without walls",
            "a robot that learns to paint", "twins who swap places", "a storm on a small island", "a forgotten recipe",
            "a musician who cannot hear", "an unusual birthday", "a key that fits no door", "a journey by balloon",
            "a baker and a thief", "the oldest tree of a town", "a cat that counts", "a broken radio",
            "a map with a mistake", "a winter without snow", "a very polite ghost", "the first day of a new job",
        ),
    ),
    "compare": (
        (
            "Compare {} in detail: what they share, how they differ, and whom each suits.",
            "Write an essay on the advantages and disadvantages of {}.",
            "Two friends argue about {}. Write down what each of them says.",
            "Describe the history of {} and what they may become in the future.",
        ),
        (
            "trains and cars", "tea and coffee", "paper books and screens", "cities and villages", "summer and winter",
            "theatre and film", "cats and dogs", "chess and football", "letters and telephone calls", "bread and rice",
            "gardens and parks", "mountains and beaches", "radio and television", "wood and stone as materials",
            "walking and cycling", "markets and supermarkets", "pencils and keyboards", "solar and wind power",
            "large and small families", "museums and libraries",
        ),
    ),
}  # fmt: skip


def prompts() -> list[Request]:
    """Return all of them, each part mixed evenly: the first n are a fair sample of every n."""
    made = [
        Request(
            f"{kind}-{subject:02d}-{wording}", wordings[wording].format(subjects[subject]), not subject % HELD_EVERY
        )
        for subject in range(max(len(subjects) for _, subjects in _KINDS.values()))
        for wording in range(4)
        for kind, (wordings, subjects) in _KINDS.items()
        if subject < len(subjects)
    ]
    return made
