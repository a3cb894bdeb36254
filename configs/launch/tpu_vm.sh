#!/bin/bash
# A Cloud TPU slice without Kubernetes:  TPU=my-pod ZONE=us-central1-a bash configs/launch/tpu_vm.sh
#
# The same command on every worker; JAX asks the metadata server who they are. WORKDIR is a folder that all workers can
# write (a bucket under gcsfuse, Filestore). To make the slice first:
#   gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
# A worker whose peer is gone ends within a minute; the same command then goes on from the last checkpoint.
set -eu

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [ "${SETUP:-no}" = yes ]; then
  on_all_workers "git clone ${REPOSITORY} sd_jax && cd sd_jax && python3 -m venv .venv &&
    .venv/bin/python -m pip install --constraint constraints.txt --editable .[tpu]"
fi

on_all_workers "cd sd_jax && .venv/bin/python train.py --config=configs/sd15_pretrain_256.py --workdir=${WORKDIR}"
