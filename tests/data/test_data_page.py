"""docs/data.md: every block of it is a stage's part that trains."""

import re
from pathlib import Path

import pytest
import yaml
from helpers.runs import log, run, stage
from helpers.shards import write_shards

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder in which `mine` holds the page's files."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "mine").mkdir()
    write_shards(folder / "mine")
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_of_the_page_trains(mine, number, monkeypatch):
    monkeypatch.chdir(mine)
    changes = yaml.safe_load(BLOCKS[number])
    args = {"max_steps": 2, **changes.pop("args", {})}
    run(mine, {**stage(mine, args=args), **changes}, output=str(mine / f"out-{number}"))
    assert len(log(mine, output=f"out-{number}")) == 2
