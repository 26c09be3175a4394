#!/usr/bin/env bash
# What one worker of a TPU slice does for tpu.py. It lies in code/gemma_jax/machines of the job's
# folder; beside code/ are work/ (where commands run; all workers of the slice see the same) and
# the small files by which the calls below know of each other.
#
#   worker.sh setup NAME BUCKET PATH...    packages, the shared folder, what the bucket has of PATHs
#   worker.sh start JOB COMMAND...         runs launch.sh COMMAND in the background
#   worker.sh status                       gemma-jax-worker INDEX STATE EXIT_CODE TIME JOB
#   worker.sh log OFFSET | stop
#
# BUCKET is - where there is none. JOB is any word that tells commands apart.
set -euo pipefail

code=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
job=$(dirname -- "$code")
work=$job/work
export PATH=$HOME/.local/bin:$PATH GEMMA_JAX_EXTRA=tpu

metadata() {
  curl -fsS -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

index() { metadata agent-worker-number; }

addresses() { # of all workers, the first one's first; in one of the two forms there are
  metadata worker-network-endpoints | tr , '\n' | sed 's/.*://'
}

install() { # install PACKAGE COMMAND: a package of the system, if it is missing
  command -v "$2" >/dev/null || [[ -x /usr/sbin/$2 ]] ||
    { sudo apt-get -qq update && sudo apt-get -qq install -y "$1" >/dev/null; }
}

share() { # worker 0's folder becomes everyone's
  local -a all
  mkdir -p "$work"
  mapfile -t all < <(addresses)
  if ((${#all[@]} == 1)); then return; fi
  if [[ $(index) == 0 ]]; then
    install nfs-kernel-server exportfs
    local options address
    options="rw,sync,no_subtree_check,all_squash,anonuid=$(id -u),anongid=$(id -g)"
    for address in "${all[@]:1}"; do echo "$work $address($options)"; done |
      sudo tee /etc/exports.d/gemma_jax.exports >/dev/null
    sudo systemctl start nfs-kernel-server
    sudo exportfs -ra
  elif ! mountpoint -q "$work"; then
    install nfs-common mount.nfs
    local tries=0
    # A file that another worker has just made has to be seen: its absence is not remembered.
    until sudo mount -t nfs -o hard,lookupcache=positive "${all[0]}:$work" "$work"; do
      ((++tries < 60)) || return 1
      sleep 5
    done
  fi
}

sync() { # sync FROM TO: nothing is deleted, and what is newer there stays
  gcloud storage rsync --recursive --skip-if-dest-has-newer-mtime --quiet \
    --exclude='.*orbax-checkpoint-tmp.*|.*\.partial$|(.*/)?\.lock$' "$1" "$2"
}

pull() {
  local path half
  for path in "${paths[@]}"; do
    mkdir -p "$work/$path"
    if gcloud storage ls "$bucket/$path/" &>/dev/null; then sync "$bucket/$path" "$work/$path"; fi
  done
  while read -r half; do # checkpoints whose copying was cut off
    if [[ $half == */checkpoints/* ]]; then rm -rf -- "${work:?}/$half"; fi
  done < <(gcloud storage cat "$bucket/.pushing/*" 2>/dev/null)
}

push() { # called where `set -e` does not act, so each step says itself that it has failed
  local path
  (cd "$work" && find "${paths[@]}" -type d -regex '.*/checkpoints/[0-9]+') | sort >"$job/found"
  touch "$job/pushed"
  comm -13 "$job/pushed" "$job/found" >"$job/pushing"
  gcloud storage cp "$job/pushing" "$bucket/.pushing/$name" --quiet || return
  for path in "${paths[@]}"; do sync "$work/$path" "$bucket/$path" || return; done
  mv "$job/found" "$job/pushed"
  : >"$job/pushing"
  gcloud storage cp "$job/pushing" "$bucket/.pushing/$name" --quiet
}

push_now_and_then() {
  while sleep "${GEMMA_JAX_PUSH_S:-300}"; do
    push || echo 'worker.sh: the copy to the bucket failed; it is tried again later'
  done
}

read_settings() { # NAME, BUCKET, PATH...
  mapfile -t paths <"$job/settings"
  name=${paths[0]} bucket=${paths[1]}
  paths=("${paths[@]:2}")
}

pushes() { [[ $bucket != - && $(index) == 0 ]]; }

setup() {
  mkdir -p "$work"
  printf '%s\n' "$@" >"$job/settings"
  read_settings
  rm -f "$job/job" "$job/ended"
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv
  "$code/launch.sh" --help >/dev/null # makes the environment
  share
  if [[ $(index) == 0 ]]; then
    tar -xzf "$job/code.tar.gz" -C "$work" # experiment files, named from the top of the checkout
    rm -f "$job/pushed"
    if pushes; then pull; fi
  fi
}

alive() { [[ -f $job/pid ]] && kill -0 "$(<"$job/pid")" 2>/dev/null; }

start() {
  if alive; then
    echo "worker $(index) is running a command already" >&2
    exit 3
  fi
  echo "$1" >"$job/job"
  rm -f "$job/ended" "$job/pid" "$job/program"
  set -m # a process group of its own, in which Ctrl-C is not ignored
  nohup bash "${BASH_SOURCE[0]}" run "${@:2}" >"$job/log" 2>&1 </dev/null &
  echo $! >"$job/pid"
}

run() { # in the background; a notice of preemption (SIGTERM) reaches the program by itself
  local exit_code=0 program pusher=''
  read_settings
  trap : TERM
  set -m # a process group each
  cd "$work"
  "$code/launch.sh" "$@" &
  program=$!
  echo "$program" >"$job/program"
  if pushes; then
    push_now_and_then &
    pusher=$!
  fi
  while :; do # a signal ends `wait` before the program has ended
    wait "$program" && exit_code=0 || exit_code=$?
    kill -0 "$program" 2>/dev/null || break
  done
  # SIGTERM came before the program listened to it (it was being installed, say): 75 is what it says.
  if ((exit_code == 143)); then exit_code=75; fi
  if [[ -n $pusher ]]; then
    kill -TERM -- "-$pusher" 2>/dev/null || :
    wait "$pusher" 2>/dev/null || :
    push || push || exit_code=74 # EX_IOERR: what was made is on this worker alone
  fi
  echo "$exit_code $(date +%s)" >"$job/ended.partial"
  mv "$job/ended.partial" "$job/ended"
}

status() {
  local state=idle result='0 0' known=-
  if [[ -f $job/job ]]; then
    known=$(<"$job/job")
    if [[ -f $job/ended ]]; then
      state=ended result=$(<"$job/ended")
    elif alive; then
      state=running
    else
      state=lost # with its machine, which has started again
    fi
  fi
  echo "gemma-jax-worker $(index) $state $result $known"
}

log() {
  if [[ -f $job/log ]]; then tail -c "+$(($1 + 1))" "$job/log"; fi
}

stop() { # as Ctrl-C does: the program saves and ends
  local tries=0
  while alive; do
    if ((tries == 0)); then kill -INT -- "-$(<"$job/program")" 2>/dev/null || :; fi
    if ((tries == 300)); then kill -KILL -- "-$(<"$job/program")" 2>/dev/null || :; fi
    ((++tries <= 600)) || return 1
    sleep 1
  done
}

"$@"
