#!/usr/bin/env bash
# Packs what a GPU host without a package registry needs, to be carried there in pieces.
#
#     offline/pack.sh OUT [MIB]
#
# Writes OUT/part.00, part.01, …, each at most MIB (default 55) MiB, OUT/tokenizer.tar and OUT/SHA256SUMS. Needs pip,
# unzip, xz and network, no GPU; the wheels are those of the host, whatever this machine is. docs/how-to/offline.md is
# its page.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: offline/pack.sh OUT [MIB]}"
out=$(cd "$1" && pwd)
mib=${2:-55}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/whl" "$work/site"
rm -f "$out"/part.* "$out/tokenizer.tar" "$out/SHA256SUMS"

platforms=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64
    --platform linux_x86_64)
for n in 39 35 34 31 28 27 26 24 18 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
echo "pack: downloading $(grep -c == "$here/requirements.txt") wheels for Python 3.12"
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$work/whl" -r "$here/requirements.txt"
for wheel in "$work"/whl/*.whl; do unzip -q -o "$wheel" -d "$work/site"; done

# FlashAttention 2, MLA, MoE-only and Blackwell kernels: a dense Llama on Hopper runs without them.
cd "$work/site"
rm -rf vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/vllm-rs vllm/third_party/deep_gemm \
    vllm/third_party/fmha_sm100 vllm/_qutlass_C* vllm/_flashmla*
find . -name __pycache__ -prune -exec rm -rf {} +
find . -name '*.a' -delete
cd "$work"
echo "pack: compressing $(du -sm site | cut -f1) MB"
tar cf - site | xz -T0 -1 | split -b "${mib}M" -d - "$out/part."

# A real tokenizer beside random weights: that of the embedded lab's model, once a run has converted it.
model=$(find "${DISAGGLAB_CACHE:-$HOME/.cache/disagglab}/models" -name tokenizer.json -printf '%h\n' 2>/dev/null | head -1)
if [[ -z $model ]]; then
    echo "pack: no tokenizer found; run make lab once on this machine, then pack again" >&2
    exit 1
fi
tar cf "$out/tokenizer.tar" -C "$model" config.json tokenizer.json tokenizer_config.json chat_template.jinja
cd "$out"
sha256sum part.* tokenizer.tar >SHA256SUMS
ls -l
