#!/usr/bin/env bash
# The measurements of docs/performance.md that want a GPU, each in a process of its own:
#
#   benchmarks/all.sh FOLDER [--peer-python PEERS/bin/python]
#
# writes FOLDER/NAME.txt and goes on after those that are there. PYTHON is the interpreter that has
# gemma_jax, .venv's by default.
set -uo pipefail
if (($# == 0)); then
  sed -n '4p' "$0"
  exit 2
fi
folder=$1
shift
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$folder"

bench() { # bench NAME ARGUMENT...
  local out=$folder/$1.txt
  if [[ -e $out ]]; then return; fi
  printf '== %s: bench %s\n' "$1" "${*:2}"
  if "$python" -m gemma_jax bench "${@:2}" >"$out.partial"; then
    mv "$out.partial" "$out"
    cat "$out"
  fi
}

bench train train --against hf-compile "$@"
bench float8_logits train --set head_logits_dtype=float8_e4m3fn
bench packed train --documents 12
bench distill distill
bench teacher teacher
bench long train --batch 1 --seq-len 32768
bench remat_full train --remat full
bench remat_dots train --remat dots
bench four_sequences train --batch 4
bench decode decode
bench data data
bench pattern_LLG train --pattern LLG
bench pattern_LG train --pattern LG
bench pattern_G train --pattern G
