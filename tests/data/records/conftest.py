import pytest

from tests.data.records.written import write


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    write(directory)
    return directory


@pytest.fixture
def own(tmp_path):
    write(tmp_path / "cache")
    return tmp_path / "cache"
