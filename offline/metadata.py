"""What pip would have written about this repository: vLLM then finds its plugin. Argument: site-packages."""

import sys
import tomllib
from pathlib import Path


def write(site: Path, project: Path) -> Path:
    """Write the project's ``dist-info`` with its entry points; return the folder."""
    told = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    folder = site / f"{told['name']}-{told['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: {told['version']}\n"
    )
    lines = []
    for group, entries in told["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {where}" for name, where in entries.items()), ""]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(__file__).resolve().parent.parent)
