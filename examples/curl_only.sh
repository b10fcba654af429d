#!/usr/bin/env bash
# Trains an adapter with curl alone: upload, submit, wait, download, verify.
#
#     export ESPALIER_URL=http://127.0.0.1:8000/v1 ESPALIER_API_KEY=esp_live_...
#     examples/curl_only.sh rows.jsonl adapter/ [BASE_MODEL]
set -euo pipefail
rows=${1:?a file of rows}
directory=${2:?a directory for the adapter}
base=${3:-HuggingFaceTB/SmolLM2-135M-Instruct}

ask() { # PATH [OPTIONS]: the answer; one that is an error is shown and ends this script
    curl --silent --show-error --fail-with-body --header "authorization: Bearer $ESPALIER_API_KEY" \
        "${@:2}" "$ESPALIER_URL$1"
}
text_of() { # NAME: the first text of this name in the JSON on standard input; a nested object's comes later
    grep -o "\"$1\": *\"[^\"]*\"" | sed -n '1s/.*"\(.*\)"$/\1/p' || true
}

file=$(ask /files --form purpose=fine-tune --form "file=@$rows" | text_of id)
body="{\"model\": \"$base\", \"training_file\": \"$file\", \"hyperparameters\": {\"n_epochs\": 2}}"
job=$(ask /fine_tuning/jobs --header 'content-type: application/json' --data "$body" | text_of id)
echo "$job is submitted"

# Every event as it happens, until the job has ended: the service closes the stream then. If the connection breaks, this
# script ends and the job goes on.
ask "/fine_tuning/jobs/$job/stream" --no-buffer | sed --unbuffered -n 's/^data: .*"message": *"\([^"]*\)".*/\1/p'
status=$(ask "/fine_tuning/jobs/$job" | text_of status)
if [ "$status" != succeeded ]; then
    echo "The job has $status." >&2
    exit 1
fi

adapter=$(ask "/adapters?limit=100" | grep -o '"id": *"adapter[^}]*"fine_tuning_job_id": *"[^"]*"' | grep "$job" | text_of id)
mkdir -p "$directory"
ask "/adapters/$adapter/download?archive=tar" | tar --extract --directory "$directory"

# The manifest was written last and has the hash of every other file.
cd "$directory"
awk -F '"' '/"name":/ {name = $4} /"sha256":/ && name {print $4 "  " name; name = ""}' manifest.json | sha256sum --check
