#!/usr/bin/env bash
# Build both images (see ../Dockerfile): k8s/image.sh [cuda|cpu]
#
# With Docker, or podman, where one of them runs. Else, as root, with buildah alone: no daemon, no namespaces beyond a
# chroot; where no registry of images can be reached either, on a base made from Debian's packages:
#   apt-get install buildah debootstrap
set -euo pipefail
cd "$(dirname "$0")/.."
VARIANT=${1:-cuda}
VERSION=$(sed -nE 's/^__version__ = "(.*)"/\1/p' cvdist/__init__.py)
# What runs log as their commit. Files that differ from it are said to.
COMMIT=$(git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || true)
BASE=${BASE:-python:3.11-slim-bookworm}
MADE=localhost/cvdist-base:bookworm  # where no registry of images can be reached
case $VARIANT in
  cuda) TAG=$VERSION ;;
  cpu) TAG=$VERSION-cpu ;;
  *) echo "error: the variants are cuda and cpu, not $VARIANT" >&2; exit 2 ;;
esac

build=()
if docker info >/dev/null 2>&1; then
  build=(docker build)
elif [ "$(id -u)" != 0 ] && podman info >/dev/null 2>&1; then
  build=(podman build)
elif [ "$(id -u)" = 0 ] && command -v buildah >/dev/null; then
  build=(buildah bud --isolation chroot --storage-driver overlay --network host --layers)
  # A network that opens TLS connections has a certificate of its own, which pip has to know.
  if [ -d /etc/ssl/certs ]; then build+=(--volume /etc/ssl/certs:/etc/ssl/certs:ro); fi
  if buildah inspect --type image "$MADE" >/dev/null 2>&1; then
    BASE=$MADE
  elif ! buildah inspect --type image "$BASE" >/dev/null 2>&1 && ! timeout 120 buildah pull -q "$BASE" >/dev/null 2>&1; then
    command -v debootstrap >/dev/null || {
      echo "error: no registry has $BASE, and there is no debootstrap to make a base with: apt-get install debootstrap" >&2
      exit 2
    }
    echo "no registry has $BASE: making a base of Debian's packages"
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=ca-certificates,netbase,python3,python3-pip,python3-venv \
      bookworm "$root/base" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$root/log" || { tail -5 "$root/log" >&2; exit 1; }
    container=$(buildah from --storage-driver overlay scratch)
    buildah add -q "$container" "$root/base" /
    buildah commit -q --rm "$container" "$MADE"
    BASE=$MADE
  fi
else
  echo "error: neither docker nor podman runs here; as root, buildah will do: apt-get install buildah" >&2
  exit 2
fi

echo "building cvdist:$TAG and cvdist-mlflow:$VERSION with ${build[0]}"
arguments=(--build-arg "BASE=$BASE" --build-arg "VERSION=$VERSION" --build-arg "COMMIT=$COMMIT")
"${build[@]}" "${arguments[@]}" --build-arg "VARIANT=$VARIANT" --target cvdist -t "cvdist:$TAG" .
"${build[@]}" "${arguments[@]}" --target mlflow -t "cvdist-mlflow:$VERSION" .
