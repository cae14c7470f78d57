#!/usr/bin/env bash
# Create one job: k8s/job.sh OVERLAY JOB [RUN]
#
# Each call makes a RayJob with a name of its own, and prints that name; no other job is touched. RUN names the job's
# MLflow run and its checkpoints: a run that exists is continued, and of two jobs of one run the newer one wins.
# `nightly` is a RayCronJob, of which there is one.
set -euo pipefail
cd "$(dirname "$0")"
usage="usage: k8s/job.sh OVERLAY JOB [RUN]"
overlay=${1:?$usage}
job=${2:?$usage}
[ -d "jobs/$overlay" ] || { echo "error: no overlay $overlay: there are" jobs/*/ >&2; exit 2; }
[ -f "components/jobs/$job.yaml" ] || { echo "error: no job $job: there are" components/jobs/*.yaml >&2; exit 2; }

edits=()
# kustomize knows no `generateName`.
if [ "$job" != nightly ]; then edits+=(-e 's/^  name: \(.*\)$/  generateName: \1-/'); fi
if [ $# -gt 2 ]; then
  [[ $3 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || { echo "error: '$3' is no name: letters, digits, - _ ." >&2; exit 2; }
  grep -q 'run=.*;' "components/jobs/$job.yaml" || { echo "error: $job has no run to name" >&2; exit 2; }
  edits+=(-e "s/run=[^;]*;/run=$3;/")
fi
kubectl kustomize "jobs/$overlay" | sed "${edits[@]:--n;p}" | kubectl create -o name -f - --selector "cvdist/job=$job"
