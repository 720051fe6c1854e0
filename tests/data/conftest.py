import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep prepared samples out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(folder))
    return folder
