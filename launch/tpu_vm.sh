#!/usr/bin/env bash
# Installs and starts one verb on every host of a TPU VM slice:
#   TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh train-denoiser --workdir=/mnt/DIR ...
# Data, cache and workdir must be on storage that every host mounts.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}"
repository="${REPOSITORY:-$(git remote get-url origin)}"
commit="$(git rev-parse HEAD)"
arguments="$(printf '%q ' "$@")"
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  set -e
  [ -d ldm_jax ] || git clone $(printf %q "$repository") ldm_jax
  cd ldm_jax && git fetch -q && git checkout -q $commit
  LDM_EXTRA=tpu bash launch/local.sh $arguments --distributed"
