"""A pytest plugin: one JSON line per finished phase or subtest, [test, phase, outcome, reason],
into HF_SUITE_OUTCOMES.
"""

import json
import os
import re


def pytest_runtest_logreport(report):
    """Write a report down, a failure that was expected as `xfailed`."""
    outcome, reason = report.outcome, ""
    if hasattr(report, "wasxfail"):
        outcome = "passed" if report.passed else "xfailed"
        reason = report.wasxfail
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif report.failed:
        reason = str(
            getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr)
        )
    reason = re.sub(r"\s+", " ", reason.removeprefix("Skipped: ").removeprefix("reason: "))[:300]
    with open(os.environ["HF_SUITE_OUTCOMES"], "a") as file:
        file.write(json.dumps([report.nodeid, report.when, outcome, reason]) + "\n")
