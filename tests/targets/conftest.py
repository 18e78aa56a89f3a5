"""What tests of files have in common."""

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a module's files go."""
    return tmp_path_factory.mktemp("files")
