#!/usr/bin/env bash
# Unpacks on the GPU host what offline/pack.sh packed; run it in the repository, nothing is downloaded.
#
#     offline/install.sh PARTS VENV
#
# Makes the environment VENV on top of the host's own python3, which has PyTorch; then: VENV/bin/python -m pytest …
# The tokenizer goes to labs/models/tokenizer.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
parts=$(cd "${1:?usage: offline/install.sh PARTS VENV}" && pwd)
venv=${2:?usage: offline/install.sh PARTS VENV}

(cd "$parts" && sha256sum --quiet -c SHA256SUMS)
python3 -c 'import sys, torch; assert sys.version_info[:2] == (3, 12), sys.version; print("torch", torch.__version__)'
python3 -m venv --without-pip "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cat "$parts"/part.* | xz -T0 -dc | tar xf - -C "$site" --strip-components=1

# After our own packages come this repository and those of the host, PyTorch among them.
{ echo "$root"; python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; } >"$site/zz-host.pth"
"$venv/bin/python" "$root/offline/metadata.py" "$site"
"$venv/bin/python" - "$venv/bin" <<'END'
"""The command that starts the router, as pip would have written it."""
import sys
from importlib.metadata import entry_points
from pathlib import Path

(router,) = entry_points(group="console_scripts", name="vllm-router")
script = Path(sys.argv[1], router.name)
# as pip writes it where a path has a space, which no first line of a script can name
start = f"#!/bin/sh\n'''exec' '{sys.executable}' \"$0\" \"$@\"\n' '''\n"
script.write_text(f"{start}from {router.module} import {router.attr}\n{router.attr}()\n")
script.chmod(0o755)
END
mkdir -p "$root/labs/models/tokenizer"
tar xf "$parts/tokenizer.tar" -C "$root/labs/models/tokenizer"
"$venv/bin/python" -c 'import disagglab, torch, vllm, nixl_cu13._api; print("vllm", vllm.__version__, "on torch", torch.__version__)'
