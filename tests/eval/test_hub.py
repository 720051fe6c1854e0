"""Hugging Face datasets from local folders: saved, parquet, with configurations; and what is said about a wrong one."""

import pytest

datasets = pytest.importorskip("datasets")

from dynamic_llava.eval.reading import NAME, TEXT  # noqa: E402
from dynamic_llava.eval.tasks.hub import HubData, read_hub  # noqa: E402
from tests.sft_builders import picture  # noqa: E402

ROWS = [{"id": number, "text": f"t{number}", "image": picture(number)} for number in range(3)]


def made(**more):
    return datasets.Dataset.from_list([row | more for row in ROWS])


def check(hub):
    table = read_hub(hub, {"id": NAME, "text": TEXT})
    assert [(row["id"], row["text"]) for row in table.rows] == [(number, f"t{number}") for number in range(3)]
    assert "image" not in table.rows[0]
    assert table.image(2).load().tobytes() == picture(2).tobytes()


def test_saved_datasets(tmp_path):
    made().save_to_disk(tmp_path / "one")
    check(HubData(str(tmp_path / "one"), "test"))
    datasets.DatasetDict({"test": made(), "val": made()}).save_to_disk(tmp_path / "several")
    check(HubData(str(tmp_path / "several"), "val"))
    with pytest.raises(ValueError, match=r"split train cannot be had"):
        read_hub(HubData(str(tmp_path / "several"), "train"), {"id": NAME})


def test_folders_of_parquet_files_and_configurations(tmp_path):
    for folder in (tmp_path / "plain", tmp_path / "by_name" / "full"):
        (folder / "data").mkdir(parents=True)
        made().to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    check(HubData(str(tmp_path / "plain"), "test"))
    check(HubData(str(tmp_path / "plain"), "test", "full"))  # a folder that declares none is the configuration
    check(HubData(str(tmp_path / "by_name"), "test", "full"))


def test_a_cell_with_several_images(tmp_path):
    rows = [{"id": 0, "image": [picture(1), picture(2)]}, {"id": 1, "image": []}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    table = read_hub(HubData(str(tmp_path / "d"), "test"), {"id": NAME})
    assert table.image(0, place=1).load().tobytes() == picture(2).tobytes()
    with pytest.raises(ValueError, match=r"row 1, image has 0 images; number 1 is due"):
        table.image(1).load()


def test_images_outside_the_dataset_are_refused(tmp_path):
    picture().save(tmp_path / "a.png")
    cells = [{"bytes": None, "path": str(tmp_path / "a.png")}, None]
    data = datasets.Dataset.from_list([{"id": number, "image": cell} for number, cell in enumerate(cells)])
    data.save_to_disk(tmp_path / "d")
    table = read_hub(HubData(str(tmp_path / "d"), "test"), {"id": NAME})
    for row in range(2):
        with pytest.raises(ValueError, match=f"row {row}, image holds no image; the pixels must lie in the dataset"):
            table.image(row).load()


def test_what_is_missing_is_named(tmp_path):
    made().save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"no columns \['label'\]; it has \['id', 'text', 'image'\]"):
        read_hub(HubData(str(tmp_path / "d"), "test"), {"id": NAME, "label": TEXT})
    (tmp_path / "empty").mkdir()
    made().select([]).to_parquet(tmp_path / "empty" / "test.parquet")
    with pytest.raises(ValueError, match="no data"):
        read_hub(HubData(str(tmp_path / "empty"), "test"), {"id": NAME})
    with pytest.raises(ValueError, match=r"nobody/nothing.*cannot be had.*local folder"):
        read_hub(HubData("nobody/nothing", "test"), {"id": NAME})
