#!/bin/bash
# XPK (Google's launcher for GKE), TPUs:  CLUSTER=... IMAGE=... bash configs/launch/xpk.sh
#
# IMAGE: this repository in /sd_jax with `pip install -e .[tpu]`. The workdir is a folder that all pods can write, e.g. a
# bucket mounted by `xpk storage attach`. With several slices (SLICES=2) the outermost axis of the mesh is the slower
# network between them. Preempted, a run saves itself and ends with status 75, for which XPK starts it anew.
set -eu

xpk workload create \
  --cluster="$CLUSTER" \
  --workload="${NAME:-sd-jax}" \
  --tpu-type="${TPU_TYPE:-v5litepod-256}" \
  --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" \
  --max-restarts=100 \
  --restart-on-exit-codes=75 \
  --command="cd /sd_jax && exec python train.py --config=configs/sd15_pretrain_256.py --workdir=${WORKDIR:-/runs/sd15_pretrain_256} --config.mesh.slice=-1"
