"""Questions from a Hugging Face dataset: an id on the Hub, or a local folder; `datasets` is imported when it is used.

A local folder is one that `save_to_disk` wrote, or one of data files (parquet, JSON lines) that `load_dataset` reads;
a configuration lies in its subfolder of that name, or is declared by the folder's README.md, as on the Hub.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dynamic_llava.eval.reading import Fields, fields_of

SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder is known to come from `save_to_disk`."""


@dataclass(frozen=True)
class HubData:
    """Where rows come from: a dataset's id or local folder, its configuration, and the split."""

    dataset: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class HubImage:
    """The image of one row, read from the dataset when it is needed; `place` chooses where a cell holds a list."""

    table: Any = field(repr=False)
    row: int
    column: str
    name: str
    place: int = 0

    def load(self) -> Any:
        """Return the Pillow image in RGB; ValueError where the cell holds none or a broken one."""
        from dynamic_llava.processing.images import decode_image

        return decode_image(self._encoded(), self.name)

    def digest(self) -> str:
        """Return the digest of the encoded image."""
        return sha256(self._encoded()).hexdigest()

    def _encoded(self) -> bytes:
        cell = self.table[self.row : self.row + 1].column(self.column)[0].as_py()
        if isinstance(cell, list):
            if self.place >= len(cell):
                raise ValueError(f"{self.name} has {len(cell)} images; number {self.place + 1} is due")
            cell = cell[self.place]
        if not isinstance(cell, dict) or cell.get("bytes") is None:
            raise ValueError(f"{self.name} holds no image; the pixels must lie in the dataset itself, not in a file")
        return bytes(cell["bytes"])


@dataclass(frozen=True)
class HubTable:
    """Rows of a dataset without their images, and the images on demand."""

    rows: Sequence[dict[str, Any]]
    images: Any = field(repr=False)
    source: HubData

    def image(self, row: int, column: str = "image", place: int = 0) -> HubImage:
        """Return the image of a row, not yet read."""
        return HubImage(self.images, row, column, f"{self.source.dataset}, row {row}, {column}", place)

    def with_image(self, column: str = "image") -> list[bool]:
        """Return of each row whether it has an image at all."""
        return self.images[:].column(column).is_valid().to_pylist()


def read_hub(hub: HubData, columns: Fields, image: str | None = "image") -> HubTable:
    """Return the rows of a dataset with these columns, images left undecoded until asked for.

    Raises ValueError when `datasets` is not installed, when the dataset, configuration or split cannot be had, or is
    empty, when a column is missing (and names those there are), and when a cell holds another kind (and names its row).
    """
    data = _load(hub)
    wanted = [*columns, *([] if image is None else [image])]
    if missing := [name for name in wanted if name not in data.column_names]:
        raise ValueError(f"{hub.dataset} has no columns {missing}; it has {data.column_names}")
    # Arrow cells are the encoded bytes; a cast of the column would rewrite the images of a list column on disk.
    images = None if image is None else data.select_columns([image]).with_format("arrow")
    rows = data.select_columns(list(columns)).to_list()
    if not rows:
        raise ValueError(f"{hub.dataset}, split {hub.split} holds no rows")
    for number, row in enumerate(rows):
        fields_of(row, columns, f"{hub.dataset}, row {number}")
    return HubTable(rows, images, hub)


def _load(hub: HubData) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{hub.dataset} needs the package datasets; install dynamic-llava[eval]") from None
    folder, config = Path(hub.dataset), hub.config
    if config is not None and (folder / config).is_dir():
        folder, config = folder / config, None
    elif folder.is_dir() and not (folder / "README.md").is_file():
        config = None  # a folder that declares no configurations is one
    try:
        if any((folder / name).is_file() for name in SAVED):
            saved = datasets.load_from_disk(str(folder))
            return saved[hub.split] if isinstance(saved, datasets.DatasetDict) else saved
        name = str(folder) if folder.is_dir() else hub.dataset
        return datasets.load_dataset(name, config, split=hub.split)
    except (ValueError, LookupError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"dataset {hub.dataset}, configuration {hub.config}, split {hub.split} cannot be had: {error}; "
            "give another id, or a local folder"
        ) from error
