#!/bin/sh
# Installs SGLang 0.5.23 for the CPU into its own environment (about 3 GB; minutes, cached after).
# Usage: install.sh DIR [PYTHON]      DIR/venv is the environment, DIR/model the tiny random model.
set -eu
HERE=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
DIR=$1
PYTHON=${2:-python3.11}
STAMP=$DIR/.installed
WANT=$(cat "$HERE/install.sh" "$HERE/constraints.txt" "$HERE/make_model.py" "$HERE"/cpu-shim/*.py \
    "$HERE"/cpu-shim/sgl_kernel/*.py "$HERE"/cpu-shim/*.toml "$HERE"/tiny-llama.json \
    "$HERE"/observer/*.py "$HERE"/observer/*.toml \
    "$HERE"/emulator/*.py "$HERE"/emulator/*.toml | cksum)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANT" ]; then exit 0; fi

# Mooncake, the KV transfer, links against these even when it uses TCP only.
LIBRARIES="libibverbs.so.1 librdmacm.so.1 libnuma.so.1 libnl-3.so.200 libnl-route-3.so.200"
PACKAGES="libibverbs1 librdmacm1 libnuma1 libnl-3-200 libnl-route-3-200"
missing() {
    for name in $LIBRARIES; do
        /sbin/ldconfig -p | grep -qF "$name " || echo "$name"
    done
}
if [ -n "$(missing)" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $PACKAGES
fi
if [ -n "$(missing)" ]; then
    echo "SGLang's KV transfer needs $(missing | tr '\n' ' '): apt-get install $PACKAGES" >&2
    exit 1
fi

mkdir -p "$DIR"
[ -x "$DIR/venv/bin/python" ] || "$PYTHON" -m venv "$DIR/venv"
pip() { "$DIR/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"; }
pip -c "$HERE/constraints.txt" torch numpy
# --no-deps: the declared dependencies pull in CUDA wheels; what is really imported follows.
pip -c "$HERE/constraints.txt" --no-deps sglang triton torchvision apache-tvm-ffi xgrammar dill gguf \
    mooncake-transfer-engine-non-cuda
pip -c "$HERE/constraints.txt" transformers tokenizers fastapi uvicorn uvloop orjson msgspec pyzmq \
    prometheus-client psutil pydantic python-multipart requests aiohttp setproctitle packaging \
    pybase64 partial_json_parser pillow einops xxhash ipython tqdm watchfiles regex zstandard \
    python-dateutil interegular numba scipy sentencepiece tiktoken openai compressed-tensors \
    jsonschema soundfile
# What reading a profile needs, for the plug-in that emulates its card.
pip -c "$HERE/constraints.txt" pandas tomli-w
pip --no-deps --force-reinstall "$HERE/cpu-shim" "$HERE/observer" "$HERE/emulator"
"$DIR/venv/bin/python" "$HERE/make_model.py" "$HERE/tiny-llama.json" "$DIR/model"
printf '%s\n' "$WANT" >"$STAMP"
