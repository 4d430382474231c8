"""Where the suite's folders lie in this checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "reports"
LABS = ROOT / "labs"
WORKLOADS = ROOT / "workloads"
