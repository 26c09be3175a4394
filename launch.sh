#!/usr/bin/env bash
# Makes the environment where it is missing, then hands everything on to the package.
#
#   ./launch.sh VERB ...    python -m gemma_jax VERB ..., from any folder
#   ./launch.sh test ...    pytest ..., in this folder, with the tools of the dev extra
#   ./launch.sh test clients ...    the tests against transformers, llama.cpp and mlx-lm alone
#
# GEMMA_JAX_EXTRA=cuda,wandb names the extras to install in place of the one that fits the
# hardware. To start over, delete .venv.
set -euo pipefail

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/installed # written last: without it an environment counts as broken

say() { printf 'launch.sh: %s\n' "$*" >&2; }
die() { say "$@" && exit 2; }

# What an installation is made from. It is compared as text, so that a start runs no program.
project=$(<"$root/pyproject.toml")
base=$root$'\n'$(<"$root/.python-version")
recipe=$base$'\n'${project%%$'\n[tool.'*}$'\n'$(<"$root/constraints.txt")

read_stamp() { # sets `extras` and `made_from`
  local content=''
  if [[ -x $python && -f $stamp ]]; then content=$(<"$stamp"); fi
  extras=${content%%$'\n'*}
  made_from=${content#*$'\n'}
}

has() { [[ ,$extras, == *",$1,"* ]]; }

hardware() {
  if [[ -n ${GEMMA_JAX_EXTRA:-} ]]; then
    echo "$GEMMA_JAX_EXTRA"
  elif has cuda; then # asking a driver that nobody keeps awake takes seconds: once is enough
    echo cuda
  elif command -v nvidia-smi >/dev/null && timeout 60 nvidia-smi -L &>/dev/null; then
    echo cuda
  elif { compgen -G '/dev/accel[0-9]*' || compgen -G '/dev/vfio/[0-9]*'; } >/dev/null &&
    grep -qsx 0x1ae0 /sys/bus/pci/devices/*/vendor; then # Google's number among PCI vendors
    echo tpu
  else
    echo cpu
  fi
}

ready() {
  local extra
  [[ $made_from == "$recipe" ]] || return
  for extra in ${wanted//,/ }; do
    has "$extra" || return
  done
}

find_python() { # prints a Python that is new enough and can make environments
  local candidate
  for candidate in python3.12 python3.13 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
    "$candidate" -c 'if True:
      import ensurepip, sys, venv
      sys.exit(print(sys.executable) if sys.version_info >= (3, 12) else 1)' 2>/dev/null && return
  done
  return 1
}

make_venv() {
  local found
  rm -rf -- "$venv"
  if command -v uv >/dev/null && uv venv --quiet --python 3.12 "$venv" 2>/dev/null; then return; fi
  found=$(cd -- "$root" && find_python) || # pyenv's commands read .python-version there
    die "no Python 3.12 or newer with its venv module was found; install one (uv python install" \
      "3.12, pyenv install 3.12 or apt install python3.12-venv) and run the same command again."
  "$found" -m venv "$venv" || die "$found could not make $venv; see the message above."
}

install() { # holds the lock; another launch.sh may have done the work meanwhile
  read_stamp
  if ready; then return; fi
  # Another folder or another Python needs another environment, and so does half of one.
  if [[ $made_from == "$base"$'\n'* ]]; then mv -- "$stamp" "$stamp.old"; else make_venv; fi
  wanted=$(tr , '\n' <<<"$wanted,$extras" | sed '/^$/d' | sort -u | paste -sd, -)
  say "installing gemma_jax[$wanted] and what it needs into $venv (once, a few minutes)"
  local -a pip=("$python" -m pip -qq install --disable-pip-version-check)
  if command -v uv >/dev/null; then
    pip=(uv --quiet pip install --compile-bytecode --python "$python")
  else
    "$python" -m pip --version &>/dev/null || "$python" -m ensurepip &>/dev/null ||
      die "$venv has no pip and there is no uv; delete it and run the same command again."
  fi
  if ! "${pip[@]}" -c "$root/constraints.txt" -e "${root}[$wanted]"; then
    if [[ -f $stamp.old ]]; then mv -- "$stamp.old" "$stamp"; fi
    die "the installation failed for the reason above; mend it and run the same command again."
  fi
  printf '%s\n%s\n' "$wanted" "$recipe" >"$stamp.partial"
  mv -- "$stamp.partial" "$stamp"
}

read_stamp
wanted=$(hardware)
wanted=${wanted// /}
for extra in ${wanted//,/ }; do
  [[ $project == *$'\n'"$extra = ["* ]] ||
    die "GEMMA_JAX_EXTRA names '$extra', which is no extra in pyproject.toml; use cpu, cuda or tpu."
done
if [[ ${1:-} == test ]]; then wanted=$wanted,dev; fi
if ! ready; then
  ( # the lock lies on this file: one installation at a time
    if command -v flock >/dev/null && ! flock -n 9; then
      say "waiting for another launch.sh to finish its installation"
      flock 9
    fi
    install
  ) 9<"${BASH_SOURCE[0]}"
fi

if [[ ${1:-} == test ]]; then
  cd -- "$root"
  if [[ ${2:-} == clients ]]; then
    "$python" tests/clients/install.py # each client has an environment of its own
    exec "$python" -m pytest -m clients -rs "${@:3}"
  fi
  exec "$python" -m pytest "${@:2}"
fi
exec "$python" -P -m gemma_jax "$@" # -P: the folder where the user stands shadows no module
