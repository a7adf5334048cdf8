#!/usr/bin/env bash
# Gets the libraries of TensorRT for RTX 1.7 out of the Python registry into .tensorrt-rtx/: 163 MB to download, 225 MB on disk.
#
#   export TENSORRT_LIB_DIR="$(scripts/tensorrt-rtx.sh | tail -n 1)"
#   trt-embed build --compute-capability 8.6 -m MODEL -o model.engine
#
# The wheel of ONNX Runtime's execution provider carries them (NVIDIA's licence, in the wheel). Its code is neither installed nor run, and
# pip checks it against the sum below. Wants python3 with pip, Linux on x86_64 with glibc 2.28 or newer.
set -euo pipefail

wheel=onnxruntime-ep-nv-tensorrt-rtx-cu12
version=0.5.0
checksum=d71fcbaf4adc627d82fffa6bbac9300a4bfc58fbfa604929b601d22211083d47
library=libtensorrt_rtx.so.1
parser=libtensorrt_onnxparser_rtx.so.1

folder=$(cd "$(dirname "$0")/.." && pwd)/.tensorrt-rtx
target=$folder/$version-${checksum:0:12}

if [[ ! -d $target ]]; then
    mkdir -p "$folder"
    work=$(mktemp -d "$folder/get.XXXXXX")
    trap 'rm -rf "$work"' EXIT

    echo "$wheel==$version --hash=sha256:$checksum" > "$work/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        --requirement "$work/requirements.txt" --dest "$work" >&2
    mkdir "$work/lib"
    python3 - "$work" "$library" "$parser" <<'PYTHON'
import shutil, sys, zipfile
from pathlib import Path
work, names = Path(sys.argv[1]), sys.argv[2:]
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in names:
        # The files bear their whole version; what loads them asks for the short name.
        (member,) = [member for member in archive.namelist() if Path(member).name.startswith(name + ".")]
        with archive.open(member) as source, open(work / "lib" / name, "wb") as target:
            shutil.copyfileobj(source, target)
PYTHON
    # Renamed when whole: a folder under the final name is complete.
    mv -T "$work/lib" "$target" 2>/dev/null || test -f "$target/$library" # another run may have been first
    echo "TensorRT for RTX from $wheel $version" >&2
fi

echo "$target"
