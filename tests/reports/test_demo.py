"""The demo from end to end, small: four arms, one page, and nothing trained twice."""

import re

import pytest

from sparsecut.cli.demo import ARMS, demo_study, run


def test_arms_differ_in_fusion_and_output_only(tmp_path):
    study = demo_study(tmp_path)
    recipes = [study.recipe_of(one) for one in study.runs()]
    assert len({r.output for r in recipes}) == len(recipes) == len(ARMS)
    assert all(r.stages == recipes[0].stages and r.evaluate == recipes[0].evaluate for r in recipes)
    assert {r.fusion["method"] for r in recipes} == set(ARMS) == set(study.arms)


def test_a_quick_demo_writes_its_page_and_keeps_what_is_finished(tmp_path):
    said = []
    page = run(tmp_path, quick=True, log=said.append)
    text = page.read_text()
    assert all(title in text for title, _ in ARMS.values()) and "one seed is one seed" in text
    assert text.count("<svg") > 6 and text.count("data:image/png;base64,") == 8
    assert not re.search(r'(src|href)="(?!data:)', text), "the page must need no other file"
    assert sum(line.startswith(f"{k}/4  main ") for line in said for k in range(1, 5)) == len(ARMS)
    said.clear()
    assert run(tmp_path, quick=True, log=said.append) == page
    assert "4 runs: 4 finished, 0 to do in 2 processes" in said
    with pytest.raises(ValueError, match=r"holds another study \(it differs in pictures"):
        run(tmp_path, seed=1, quick=True, log=said.append)
