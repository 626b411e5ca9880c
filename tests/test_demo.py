"""The demo from end to end, small: four arms, one page, and nothing trained twice."""

import re

import pytest

from sparsecut.demo import ARMS, arm_recipe, run


def test_arms_differ_in_fusion_and_output_only(tmp_path):
    recipes = [arm_recipe(tmp_path, method, seed=0, quick=False) for method, _ in ARMS.values()]
    assert len({r.output for r in recipes}) == len(recipes)
    assert all(r.stages == recipes[0].stages and r.evaluate == recipes[0].evaluate for r in recipes)
    assert {r.fusion["method"] for r in recipes} == {"llava", "hires_channels", "sparsecut_input", "sparsecut"}


def test_a_quick_demo_writes_its_page_and_keeps_what_is_finished(tmp_path):
    said = []
    page = run(tmp_path, quick=True, say=said.append)
    text = page.read_text()
    assert all(name in text for name in ARMS) and "one seed is one seed" in text
    assert text.count("<svg") > 6 and text.count("data:image/png;base64,") == 8
    assert not re.search(r'(src|href)="(?!data:)', text), "the page must need no other file"
    assert sum("finished, average" in line for line in said) == len(ARMS)
    said.clear()
    assert run(tmp_path, quick=True, say=said.append) == page
    assert sum("already finished, kept" in line for line in said) == len(ARMS)
    with pytest.raises(ValueError, match="of a demo with another seed, size or recipe"):
        run(tmp_path, seed=1, quick=True, say=said.append)
