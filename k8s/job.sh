#!/usr/bin/env bash
# Create one job: k8s/job.sh OVERLAY JOB [RUN]
#
# Each call makes a RayJob with a name of its own, and prints that name; no other job is touched. RUN names the job's
# MLflow run and its checkpoints: a run that exists is continued, and of two jobs of one run the newer one wins.
# `nightly` is a RayCronJob, of which there is one.
set -euo pipefail
cd "$(dirname "$0")"
fail() { echo "error: $*" >&2; exit 2; }

if [ $# -lt 2 ] || [ $# -gt 3 ]; then fail "usage: k8s/job.sh OVERLAY JOB [RUN]"; fi
overlay=$1 job=$2
[ -f "jobs/$overlay/kustomization.yaml" ] || fail "no overlay $overlay: there are" $(ls jobs)
jobs=$(sed -n 's/^    cvdist\/job: //p' components/jobs/*.yaml)
grep -qx -e "$job" <<<"$jobs" || fail "no job $job: there are" $jobs

edits=(-e '')
# kustomize knows no `generateName`.
if [ "$job" != nightly ]; then edits+=(-e 's/^  name: \(.*\)$/  generateName: \1-/'); fi
if [ $# = 3 ]; then
  [[ $3 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "'$3' is no name of a run: it takes letters, digits and - _ ."
  grep -q 'run=.*;' "components/jobs/$job.yaml" || fail "$job has no run to name"
  edits+=(-e "s/run=[^;]*;/run=$3;/")
fi
kubectl kustomize "jobs/$overlay" | sed "${edits[@]}" | kubectl create -o name -f - --selector "cvdist/job=$job"
