#!/usr/bin/env bash
# Submits a run to a Ray cluster. Run it in the checkout:
#   RAY_AUTH_TOKEN=... deploy/cluster/submit.sh http://127.0.0.1:8265 --profile gsm8k-aug rollout.workers=6
# The nodes have the dependencies (deploy/cluster/Dockerfile); .rayignore keeps the upload below a megabyte.
# A stopped job has 130 s, not Ray's 3, to end its step and save its state: deadlines.terminate_s and 30 s more.
set -euo pipefail
cd "$(dirname "$0")/../.."
address=${1:?usage: submit.sh ADDRESS [arguments of train]}
shift
export RAY_AUTH_MODE=token
exec "${RAY:-.venv/bin/ray}" job submit --address "$address" --working-dir . \
    --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "130"}}' -- python -m deploy train "$@"
