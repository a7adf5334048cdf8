#!/usr/bin/env bash
# Gets TensorRT's headers out of the crate registry into .headers/, for machines without TensorRT: those of TensorRT 11.4, or with `rtx`
# those of TensorRT for RTX 1.7.
#
#   export TENSORRT_INCLUDE_DIR="$(scripts/tensorrt-headers.sh | tail -n 1)"
#   cargo build --features tensorrt
#
# The crate `trtx-sys` carries them (Apache-2.0). Only its files are taken: none of its code is compiled or run.
# Cargo downloads it and checks it against the lock file; the lock file is checked against the sum below.
set -euo pipefail

version=0.9.1
build=rtx1.7
checksum=5480ee056292951daa1bc74532162d6cb75190f091e45d7d97c0c356916ae171
platform=x86_64-unknown-linux-gnu

case ${1-} in
'') name="TensorRT 11.4" stem=tensorrt-11.4 folder=TensorRT-Headers/TRT-Enterprise-11.4 ;;
rtx) name="TensorRT for RTX 1.7" stem=tensorrt-rtx-1.7 folder=TensorRT-Headers/TRT-RTX-1.7 ;;
*)
    echo "usage: $0 [rtx]; \"$1\" is no TensorRT that it knows" >&2
    exit 2
    ;;
esac

headers=$(cd "$(dirname "$0")/.." && pwd)/.headers
target=$headers/$stem-${checksum:0:12}
if [[ ! -d $target ]]; then
    mkdir -p "$headers"
    work=$(mktemp -d "$headers/get.XXXXXX")
    trap 'rm -rf "$work"' EXIT

    mkdir "$work/src"
    touch "$work/src/lib.rs"
    cat > "$work/Cargo.toml" <<TOML
[package]
name = "tensorrt-headers"
edition = "2024"
[dependencies]
trtx-sys = { version = "=$version", default-features = false }
[workspace]
TOML
    cargo generate-lockfile --quiet --manifest-path "$work/Cargo.toml"
    if ! grep -A 3 '^name = "trtx-sys"$' "$work/Cargo.lock" | grep -qxF "checksum = \"$checksum\""; then
        echo "the registry's trtx-sys $version+$build does not have the checksum $checksum:" >&2
        grep -A 3 '^name = "trtx-sys"$' "$work/Cargo.lock" >&2
        exit 1
    fi
    cargo metadata --quiet --locked --format-version 1 --filter-platform "$platform" \
        --manifest-path "$work/Cargo.toml" > "$work/metadata.json"
    manifest=$(grep -o "\"manifest_path\":\"[^\"]*/trtx-sys-$version[^\"]*/Cargo.toml\"" "$work/metadata.json" | cut -d '"' -f 4)

    # Renamed when whole: a folder under the final name is complete.
    cp -r "$(dirname "$manifest")/$folder" "$work/headers"
    test -f "$work/headers/NvInfer.h" && test -f "$work/headers/NvOnnxParser.h"
    mv -T "$work/headers" "$target" 2>/dev/null || test -f "$target/NvInfer.h" # another run may have been first
    echo "$name headers from trtx-sys $version+$build" >&2
fi

echo "$target"
