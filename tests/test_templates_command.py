"""The command for a folder of chat templates tells what holds, and why a template is refused."""

import json

import pytest
from helpers.benchmark_modules import import_benchmark

templates = import_benchmark("templates")

GOOD = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant: ' }}{% endif %}"
)
# Leaves out system turns, opens a thought unless told otherwise, and marks no end.
ODD = (
    "{% for m in messages if m.role != 'system' %}{{ '<|turn|>' + m.role + ': ' }}"
    "{{ '<think></think>' if m.role == 'assistant' else '' }}{{ m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant: <think>' }}"
    "{{ '</think>' if enable_thinking is false else '\n' }}{% endif %}"
)
# Writes a header that the prompt does not have, so that the answer would begin with it.
HEADED = GOOD.replace("m.content", "('to=user ' if m.role == 'assistant' else '') + m.content")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.jinja").write_text(GOOD)
    (tmp_path / "odd").mkdir()
    settings = {"chat_template": [{"name": "default", "template": ODD}]}
    (tmp_path / "odd/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "odd/config.json").write_text("{}")
    return tmp_path


def test_a_folder_of_templates_becomes_a_table(folder, capsys):
    page = folder / "page.md"
    templates.main([str(folder), "--page"], page)
    rows = {}
    for line in page.read_text().splitlines():
        if line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
            rows[name.strip("`")] = dict(zip([*templates.COLUMNS, "argument"], cells, strict=False))
    assert set(rows) == {"good", "odd/tokenizer_config.json"}
    good, odd = rows.values()
    assert {good[column] for column in templates.COLUMNS[1:]} == {"yes"}
    assert odd["system"] == "refused"
    assert odd["stops"] == "no"
    assert odd["argument"] == "`enable_thinking: false`"
    assert {odd[column] for column in ("labels", "prompt", "scores", "two turns", "image")} == {
        "yes"
    }
    assert "`odd/tokenizer_config.json` (system)" in page.read_text()
    templates.main([str(folder), "good"], page)
    assert "odd" not in capsys.readouterr().out.splitlines()[-1]


def test_what_is_refused_has_its_reason_and_no_text_of_the_template():
    row = templates.check_template("headed", HEADED)
    assert row.has("refused")
    assert "to=user" in row.reasons["one turn"]
    (line,) = templates.group_reasons([row])
    assert "to=user" not in line
    assert "`headed`" in line


def test_a_folder_without_templates_is_told(tmp_path):
    with pytest.raises(SystemExit):
        templates.main([str(tmp_path)])
