"""The records that the training tests learn from."""

import pytest
from helpers.runs import write_records


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their images; runs write to out/ there."""
    return write_records(tmp_path)
