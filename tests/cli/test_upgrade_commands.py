"""The commands around finished vision-language models, as typed."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sparsecut import load, upgrade
from sparsecut.cli import main as cli

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ' : ' }}{% if m['content'] is string %}{{"
    " m['content'] }}{% else %}{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image'"
    " else c['text'] }}{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT"
    " :{% endif %}"
)


@pytest.fixture
def base(llava, tmp_path, monkeypatch):
    """A saved tiny LLaVA, `base`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    model, processor = llava
    processor.chat_template = TEMPLATE
    model.save_pretrained("base")
    processor.save_pretrained("base")
    return model


def run(*typed: str) -> str:
    """What a command prints; its error, where it has one, is raised."""
    result = CliRunner().invoke(cli.app, list(typed), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_upgrade_writes_shortcuts_and_says_what_they_cost(base, tmp_path):
    output = run("upgrade", "base", "--out", "shortcuts")
    model, _ = load("shortcuts")
    number = sum(p.numel() for p in model.fusion.parameters())
    assert (
        f"{number:,} parameters" in output
        and "49,568 parameters" in output
        and "wrote shortcuts" in output
    )
    assert sum(f.stat().st_size for f in (tmp_path / "shortcuts").iterdir()) < 4 * number + 4000
    assert "base + channels" in run("show", "shortcuts") and "shortcuts of base" in run(
        "show", "shortcuts"
    )
    run("upgrade", "base", "--out", "whole", "--whole", "--plan", "qwen3_vl")
    whole, _ = load("whole")
    assert whole.plan.layers == (1, 2, 3) and "base" in run("show", "whole")
    for name, value in base.state_dict().items():
        assert torch.equal(whole.base.state_dict()[name], value)


def test_cost_compares_plans_on_a_base(base, tmp_path):
    output = run("cost", "sparsecut", "qwen3_vl", "--base", "base", "--json", "costs.json")
    costs = json.loads((tmp_path / "costs.json").read_text())
    ours, theirs = (costs[name]["count"] for name in ("sparsecut", "qwen3_vl"))
    assert (
        ours["base_flops"]
        == theirs["base_flops"]
        < theirs["upgraded_flops"]
        < ours["upgraded_flops"]
    )
    assert (
        ours["num_image_tokens"] == 4 and f"{ours['num_fusion_parameters']:,} parameters" in output
    )
    with pytest.raises(ValueError, match="leave out --measure or --base"):
        run("cost", "sparsecut", "--base", "base", "--measure")


@pytest.mark.parametrize(
    "plan",
    [
        None,
        "sparsecut",
        "sparsecut -o count=2",
        "sparsecut -o rank=null",
        "sparsecut -o shared=true -o rank=4",
        "qwen3_vl",
        "plan.yaml",
    ],
)
def test_what_is_counted_is_what_is_made(base, tmp_path, plan):
    (tmp_path / "plan.yaml").write_text("{method: sparsecut, rank: 8, tiles: 0}")
    name, *options = plan.split() if plan else [None]
    to_count, to_make = ([name], ["--plan", name]) if plan else ([], [])
    run("cost", *to_count, "--base", "base", "--json", "costs.json", *options)
    output = run("upgrade", "base", "--out", "new", *to_make, *options)
    counted = json.loads((tmp_path / "costs.json").read_text())[name or "sparsecut"]["count"]
    model, _ = load("new")
    made = sum(p.numel() for p in model.fusion.parameters())
    assert counted["num_fusion_parameters"] == made
    assert f"{made:,} parameters" in output
    if plan == "sparsecut -o rank=null":
        default, _ = upgrade("base")
        assert made > sum(p.numel() for p in default.fusion.parameters())


def test_mistakes_are_reported_before_anything_is_written(base, tmp_path):
    with pytest.raises(ValueError, match="no shortcut"):
        run("upgrade", "base", "--out", "new", "--plan", "llava")
    with pytest.raises(ValueError, match="holds a model already"):
        run("upgrade", "base", "--out", "base")
    with pytest.raises(ValueError, match="base nothing"):
        run("upgrade", "nothing", "--out", "new")
    assert not (tmp_path / "new").exists()
