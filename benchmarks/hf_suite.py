"""transformers' own tests, run on our classes and on the stock LLaVA; counts and reasons go into
docs/support.md.

    # all of it, about two minutes after the downloads
    python benchmarks/hf_suite.py
    # what only the repository has, from a folder
    python benchmarks/hf_suite.py --repository ../transformers
    python benchmarks/hf_suite.py -k test_beam                     # some tests, on screen only

The release's source archive, from the package index, holds the common tests. Only the repository
holds those of generation, export and pipelines, and the base classes for vision-language models.
Give a checkout of the release's tag (--repository or TRANSFORMERS_REPOSITORY); otherwise GitHub's
archive of it is fetched. Everything is put together under runs/hf-suite.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

from support_page import replace_section

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "hf-suite"
ARCHIVE = "https://github.com/huggingface/transformers/archive/refs/tags/v{}.tar.gz"
NEEDED = (
    "generation",
    "exporters",
    "pipelines",
    "utils",
    "fixtures",
)  # folders of tests/ that the common tests import
ORDER = ("skipped", "passed", "xfailed", "failed")  # a test is the worst of its parts
CLASSES = {
    "TestLlava": "`LlavaForConditionalGeneration`",
    "TestSparseCut": "`SparseCutForConditionalGeneration`",
    "TestUpgrade": "`SparseCutUpgrade` of it",
    "TestLlavaProcessor": "`LlavaProcessor`",
    "TestSparseCutProcessor": "`SparseCutProcessor`",
}
STOCK = {
    "TestSparseCut": "TestLlava",
    "TestUpgrade": "TestLlava",
    "TestSparseCutProcessor": "TestLlavaProcessor",
}


def source_archive(release: str) -> Path:
    """The unpacked source archive of a release, from the package index."""
    folder = WORK / f"transformers-{release}"
    if not folder.exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            str(WORK),
        ]
        if subprocess.run([*pip, f"transformers=={release}"]).returncode:
            raise SystemExit(
                f"the source archive of transformers {release} could not be downloaded (see"
                f" pip's error above); put transformers-{release}.tar.gz, unpacked, at {folder}"
            )
        with tarfile.open(WORK / f"transformers-{release}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    return folder


def repository(release: str, checkout: str | None) -> Path:
    """A folder with the repository's tests: the checkout, or GitHub's archive of the release's
    tag.
    """
    if checkout is not None:
        folder = Path(checkout)
        if not (folder / "tests" / "vlm_tester.py").is_file():
            raise SystemExit(
                f"{folder} holds no tests/vlm_tester.py, so it is no checkout of transformers; give"
                f" the folder of one, best at tag v{release}"
            )
        return folder
    folder = WORK / "repository" / f"transformers-{release}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            name, _ = urllib.request.urlretrieve(ARCHIVE.format(release))
        except OSError as error:
            raise SystemExit(
                f"{ARCHIVE.format(release)} could not be downloaded ({error}); give a checkout of"
                f" transformers at tag v{release} with --repository FOLDER or"
                " TRANSFORMERS_REPOSITORY"
            ) from error
        with tarfile.open(name) as archive:
            archive.extractall(folder.parent, filter="data")
    return folder


def assemble(release: str, checkout: Path) -> Path:
    """Lay out a folder in which the tests run: the repository's, and the release's own where it has
    them.
    """
    import transformers

    folder, archive = WORK / "run", source_archive(release)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    shutil.copytree(checkout / "utils", folder / "utils")
    shutil.copy(checkout / "conftest.py", folder)
    for name in NEEDED:
        shutil.copytree(checkout / "tests" / name, folder / "tests" / name)
    for path in [*(checkout / "tests").glob("*.py"), *(archive / "tests").glob("*.py")]:
        shutil.copy(path, folder / "tests")
    shutil.copy(Path(__file__).with_name("hf_suite_cases.py"), folder)
    # The tests take a image from here before they look for it on the hub.
    coco = folder / "tests" / "fixtures" / "tests_samples" / "COCO" / "000000039769.png"
    shutil.copy(coco, folder / "coco_sample.png")
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = -p no:cacheprovider -W ignore --import-mode=importlib\n"
    )
    return folder


def version_of(checkout: Path) -> str:
    """Return the version that a checkout declares."""
    found = (
        re.search(r'version="([^"]+)"', (checkout / "setup.py").read_text())
        if (checkout / "setup.py").is_file()
        else None
    )
    return found[1] if found else "unknown"


def run(folder: Path, chosen: str | None) -> dict[str, tuple[str, str]]:
    """Run the cases in a process of their own and return test -> (outcome, reason)."""
    out = folder / "outcomes.jsonl"
    paths = os.pathsep.join(str(p) for p in (folder, ROOT, Path(__file__).parent))
    environment = os.environ | {
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "HF_SUITE_OUTCOMES": str(out),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "hf_suite_outcomes",
        "-c",
        "pytest.ini",
        "hf_suite_cases.py",
    ]
    subprocess.run(
        [*command, *(["-k", chosen] if chosen else []), "--tb=short"], cwd=folder, env=environment
    )
    if not out.is_file():
        raise SystemExit(
            f"no test ran; the reason stands above. Try it by hand: cd {folder} &&"
            f" {' '.join(command)}"
        )
    return fold(json.loads(line) for line in out.read_text().splitlines())


def fold(reports) -> dict[str, tuple[str, str]]:
    """One outcome per test of its phases and subtests: the worst; reports are (test, phase,
    outcome, reason).
    """
    outcomes = {}
    for test, phase, outcome, reason in reports:
        if phase != "call" and outcome == "passed":
            continue
        if test not in outcomes or ORDER.index(outcome) > ORDER.index(outcomes[test][0]):
            outcomes[test] = outcome, reason
    return outcomes


def by_class(outcomes: dict) -> dict[str, dict[str, tuple[str, str]]]:
    """Class -> test -> (outcome, reason)."""
    classes = defaultdict(dict)
    for test, result in outcomes.items():
        name, test = test.split("::")[-2:]
        classes[name][test] = result
    return {name: classes[name] for name in CLASSES if name in classes}


def section(classes: dict, release: str, checkout: str) -> str:
    """The text of docs/support.md: counts, and each test that fails, is expected to, or is skipped
    for us alone, with its reason.
    """
    origin = (
        "the release's tag" if checkout == release else f"a checkout that says it is {checkout}"
    )
    text = f"""\
`make hf-suite` made this section with transformers {release}. It runs transformers' own tests on tiny
random models of our classes and, with the same settings, of the stock LLaVA. These are the common
tests of models, generation, export, training, processors and pipelines, offline on a CPU. The
common tests are those of the release's source archive. Those of generation, export and pipelines
come from {origin}.

| class | passed | skipped | expected to fail | failed |
|---|---|---|---|---|
"""
    for name, tests in classes.items():
        counts = Counter(outcome for outcome, _ in tests.values())
        cells = " | ".join(
            str(counts[outcome]) for outcome in ("passed", "skipped", "xfailed", "failed")
        )
        text += f"| {CLASSES[name]} | {cells} |\n"
    lists = {
        "Failed": lambda name, test, outcome: outcome == "failed",
        "Expected to fail": lambda name, test, outcome: outcome == "xfailed",
        "Skipped, but run for the stock class": lambda name, test, outcome: (
            name in STOCK
            and outcome == "skipped"
            and classes.get(STOCK[name], {}).get(test, ("skipped",))[0] != "skipped"
        ),
    }
    for title, belongs in lists.items():
        groups = defaultdict(list)
        for name, tests in classes.items():
            for test, (outcome, reason) in sorted(tests.items()):
                if belongs(name, test, outcome):
                    groups[CLASSES[name], reason].append(f"`{test}`")
        lines = [
            f"- {name}: {', '.join(tests)}: {reason.rstrip('.')}."
            for (name, reason), tests in groups.items()
        ]
        text += f"\n{title}:" + (" none.\n" if not lines else "\n\n" + "\n".join(lines) + "\n")
    return text


def main():
    """Put the tests together, run them, and write the section."""
    import transformers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repository",
        default=os.environ.get("TRANSFORMERS_REPOSITORY"),
        help="a checkout of transformers",
    )
    parser.add_argument(
        "-k", dest="chosen", help="only tests whose names match; nothing is written"
    )
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    release = transformers.__version__
    checkout = repository(release, options.repository)
    classes = by_class(run(assemble(release, checkout), options.chosen))
    text = section(classes, release, version_of(checkout))
    print(text)
    if not options.chosen:
        replace_section("transformers' own tests", text)
    sys.exit(
        any(outcome == "failed" for tests in classes.values() for outcome, _ in tests.values())
    )


if __name__ == "__main__":
    main()
