#!/usr/bin/env bash
# Everything on one machine; makes .venv by itself and uses it again the next time.
#   bash launch/local.sh demo [--workdir=DIR]        digits, from images to a report
#   bash launch/local.sh test [PYTEST ARGUMENTS]     the test suite
#   bash launch/local.sh test --parity               the comparisons with PyTorch references
#   bash launch/local.sh processes N VERB ...        `ldm VERB ...` as N processes on this machine
#   bash launch/local.sh VERB ...                    any other `ldm` verb
# LDM_PYTHON names the interpreter (python3), LDM_EXTRA the accelerator (cuda12, cuda13, tpu).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
bin="$venv/bin"

# install EXTRAS: once for each set of extras and each state of the requirement files.
install() {
  local extras="$1" stamp="$venv/.installed-$1" want
  want="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
  if [ ! -x "$bin/python" ]; then
    "${LDM_PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "ldm_jax needs Python 3.11 or newer; name one with LDM_PYTHON=" >&2; exit 2; }
    "${LDM_PYTHON:-python3}" -m venv "$venv"
  fi
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && return
  if [ "$extras" = parity ]; then
    # PyTorch first and alone: whatever asks for it later is content with this build, and nothing
    # resolves it anew into one with several GB of accelerator libraries. Where pip's index offers
    # only such a build, name PyTorch's CPU index in PIP_EXTRA_INDEX_URL.
    "$bin/python" -m pip install --quiet --disable-pip-version-check \
      -c "$root/constraints.txt" torch
  fi
  "$bin/python" -m pip install --quiet --disable-pip-version-check \
    -c "$root/constraints.txt" -e "$root[$extras]"
  if [ "$extras" = parity ]; then
    # Alone too: two of them ask for torchvision, whose build would have to match that of PyTorch,
    # and of which the comparisons need nothing; the third has all it needs.
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      -c "$root/constraints.txt" lpips prdc torch-fidelity
  fi
  printf '%s' "$want" >"$stamp"
}

command="${1:-}"
[ $# -gt 0 ] && shift
case "$command" in
  "" | -h | --help | help)
    sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"
    ;;
  test)
    cd "$root"
    if [ "${1:-}" = --parity ]; then
      shift
      install dev
      install parity
      exec "$bin/python" -m pytest -m parity tests/parity -n 2 --dist loadfile --no-loadscope-reorder "$@"
    fi
    install dev
    exec "$bin/python" -m pytest -m "not parity" -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
  processes)
    count="${1:?how many processes?}"
    shift
    install "${LDM_EXTRA:-dev}"
    port="$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
    # Concurrent collectives of different groups deadlock on CPU backends without this.
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    pids=()
    for ((i = 0; i < count; i++)); do
      "$bin/ldm" "$@" --coordinator="localhost:$port" --num-processes="$count" --process-id="$i" &
      pids+=("$!")
    done
    status=0
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    exit "$status"
    ;;
  *)
    install "${LDM_EXTRA:-dev}"
    exec "$bin/ldm" "$command" "$@"
    ;;
esac
