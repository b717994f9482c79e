#!/bin/sh
# Installs SGLang 0.5.23 for GPUs (CUDA 13, as its torch is) into its own environment.
# Usage: install-gpu.sh DIR [PYTHON]      DIR is the environment.
set -eu
HERE=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
DIR=$1
PYTHON=${2:-python3.11}
# What a server imports: `mooncake` alone is a folder, its engine is the part that links to CUDA.
IMPORTS="import sglang, mooncake.engine, voltana_engine_observer"
LIBRARIES="libibverbs.so.1 libmlx5.so.1 librdmacm.so.1 libnuma.so.1"
PACKAGES="libibverbs1 ibverbs-providers librdmacm1 libnuma1"

missing=
for name in $LIBRARIES; do
    /sbin/ldconfig -p | grep -qF "$name " || missing="$missing $name"
done
if [ -n "$missing" ]; then
    echo "SGLang's KV transfer needs$missing, with or without an RDMA card: apt-get install $PACKAGES" >&2
    exit 1
fi
[ -x "$DIR/bin/python" ] || "$PYTHON" -m venv "$DIR"
if ! "$DIR/bin/python" -c "$IMPORTS" 2>/dev/null; then
    # The plain mooncake-transfer-engine is built for CUDA 12: its engine needs libcudart.so.12.
    "$DIR/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        "sglang==0.5.23" "mooncake-transfer-engine-cuda13==0.3.13.post1" "$HERE/observer"
    "$DIR/bin/python" -c "$IMPORTS"
fi
