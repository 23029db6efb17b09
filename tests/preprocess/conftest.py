import pytest

from .helpers import Runner


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Runner(tmp_path)
