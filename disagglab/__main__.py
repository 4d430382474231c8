"""``python -m disagglab``: the same as the command ``disagglab``."""

from disagglab.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m disagglab"))
