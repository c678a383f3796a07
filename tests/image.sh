#!/usr/bin/env bash
# `make image-test`: both images as a hardened cluster runs them: no network, read-only root, no capabilities, a user that nobody knows.
#   tests/image.sh CBD_IMAGE MLFLOW_IMAGE
set -euo pipefail
cbd=${1:?the image of the steps}; mlflow=${2:?the image of the tracking server}; docker=${DOCKER:-docker}
hardened=(--rm --network none --read-only --tmpfs /tmp:rw,mode=1777,size=6g --cap-drop ALL --security-opt no-new-privileges
  --user "$((RANDOM + 20000)):$((RANDOM + 20000))")

user=$($docker image inspect --format '{{.Config.User}}' "$cbd" "$mlflow" | sort -u)
test "$user" = 10001:10001 || { echo "error: the images run as $user"; exit 1; }
$docker run "${hardened[@]}" "$cbd" sh -c '! command -v gcc cc make' || { echo "error: a compiler is in the image"; exit 1; }
$docker run "${hardened[@]}" "$cbd" sh -c 'test -s "$1"' sh "$($docker image inspect --format '{{index .Config.Labels "cbd.sbom"}}' "$cbd")"

# The embedded runner starts each component by the command in the compiled pipeline: KFP's executor.
$docker run "${hardened[@]}" --shm-size 1g -e OMP_NUM_THREADS=1 --volume "$(cd "$(dirname "$0")" && pwd):/tests:ro" "$cbd" \
  python /tests/image_run.py

name=cbd-image-test-$$
trap '$docker rm --force "$name" >/dev/null 2>&1 || true' EXIT
$docker run "${hardened[@]}" --detach --name "$name" "$mlflow" server --backend-store-uri sqlite:////tmp/mlflow.db \
  --artifacts-destination /tmp/artifacts --serve-artifacts --workers 1 >/dev/null
for _ in $(seq 60); do
  if $docker exec "$name" python -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:5000/health")' 2>/dev/null; then healthy=yes; break; fi
  sleep 3
done
test "${healthy:-}" = yes || { $docker logs "$name" | tail -20; echo "error: the tracking server did not become healthy"; exit 1; }
$docker exec "$name" python -c 'import boto3, psycopg2, flask_wtf'
echo "image-test: both images passed"
