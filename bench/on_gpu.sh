#!/usr/bin/env bash
# Everything that waits for a machine with a GPU, in order of value, without a network:
#   bench/on_gpu.sh --out DIR --revision REV [--minutes M] [--steps NAME,...] [--list] [--dry-run]
# Leaves DIR/results.tar.gz (under 16 MiB) and DIR/log.txt, both up to date after every step.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.on_gpu "$@"
