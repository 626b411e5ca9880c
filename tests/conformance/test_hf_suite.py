"""The command that runs transformers' own tests: how it counts, and what it writes."""

import pytest
from helpers.benchmark_modules import import_benchmark

hf_suite = import_benchmark("hf_suite")

OUTCOMES = {
    "cases.py::TestLlava::test_a": ("passed", ""),
    "cases.py::TestLlava::test_b": ("passed", ""),
    "cases.py::TestSparseCut::test_a": ("failed", "two is not three"),
    "cases.py::TestSparseCut::test_b": ("skipped", "no pictures"),
    "cases.py::TestSparseCut::test_c": ("skipped", "no sound"),
}


def test_a_test_is_the_worst_of_its_parts():
    reports = [
        ("a", "setup", "passed", ""),
        ("a", "call", "xfailed", "not read"),
        ("a", "call", "passed", ""),
        ("b", "setup", "skipped", "no GPU"),
        ("c", "call", "passed", ""),
        ("c", "call", "failed", "a subtest"),
        ("d", "call", "skipped", "one part"),
        ("d", "call", "passed", ""),
    ]
    expected = {
        "a": ("xfailed", "not read"),
        "b": ("skipped", "no GPU"),
        "c": ("failed", "a subtest"),
        "d": ("passed", ""),
    }
    assert hf_suite.fold(reports) == expected


def test_the_section_counts_and_gives_reasons():
    text = hf_suite.section(hf_suite.by_class(OUTCOMES), "5.23.0", "5.23.0")
    assert "from the release's tag" in text
    assert "| `LlavaForConditionalGeneration` | 2 | 0 | 0 | 0 |" in text
    assert "| `SparseCutForConditionalGeneration` | 0 | 2 | 0 | 1 |" in text
    assert "- `SparseCutForConditionalGeneration`: `test_a`: two is not three" in text
    assert "`test_b`: no pictures" in text and "test_c" not in text  # nobody runs test_c
    assert "a checkout that says it is 5.16.0" in hf_suite.section({}, "5.23.0", "5.16.0")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no tests/vlm_tester.py.* best at tag v5\.23\.0"):
        hf_suite.repository("5.23.0", str(tmp_path))


def test_an_archive_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(address):
        raise OSError("no network")

    monkeypatch.setattr(hf_suite, "WORK", tmp_path)
    monkeypatch.setattr(hf_suite.urllib.request, "urlretrieve", unreachable)
    with pytest.raises(
        SystemExit, match=r"could not be downloaded \(no network\); give a checkout"
    ):
        hf_suite.repository("5.23.0", None)
