"""No test is passed over for a reason that nobody has agreed to: skips.txt lists the reasons, a pattern a line."""

import re
from pathlib import Path

LISTED = Path(__file__).with_name("skips.txt")
_SEEN = {}  # reason → the first test that gave it


def patterns():
    "The reasons that are agreed to."
    lines = LISTED.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def unlisted(reasons):
    "Reasons that match no line of the list."
    return [r for r in reasons if not any(re.fullmatch(p, r, re.DOTALL) for p in patterns())]


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _SEEN.setdefault(reason.removeprefix("Skipped: "), report.nodeid)


def pytest_sessionfinish(session):
    if unlisted(_SEEN) and not session.exitstatus:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for reason in unlisted(_SEEN):
        terminalreporter.write_line(
            f"SKIPPED for a reason that {LISTED.name} does not list: {_SEEN[reason]}: {reason}",
            red=True,
        )
