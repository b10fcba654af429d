#!/usr/bin/env bash
# Serves an adapter with vLLM: what follow_to_adapter.py or curl_only.sh has left in a directory.
#
#     examples/serve_with_vllm.sh adapter/ [NAME] [more options of vllm serve]
#
# Clients then ask for the model NAME. vLLM takes only some ranks as --max-lora-rank, and its default is 16.
set -euo pipefail
directory=${1:?the directory of an adapter}
name=${2:-$(basename "$(cd "$directory" && pwd)")}
shift $(($# > 1 ? 2 : 1))

config=$directory/adapter_config.json
read_setting() { # NAME: a setting of the adapter, which stands on a line of its own
    sed -n "s/^ *\"$1\": *\"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$config" | head -n 1
}
base=$(read_setting base_model_name_or_path)
rank=$(read_setting r)
for most in 8 16 32 64 128 256 320 512; do
    [ "$rank" -le "$most" ] && break
done
exec vllm serve "$base" --enable-lora --max-lora-rank "$most" --lora-modules "$name=$directory" "$@"
