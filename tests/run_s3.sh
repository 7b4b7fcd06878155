#!/usr/bin/env bash
# The tests marked `s3`, on a server of S3's protocol of their own: moto's, on a free port, stopped in the end.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
uvx --from 'moto[server]==5.2.*' moto_server --host 127.0.0.1 --port "$port" >/dev/null 2>&1 &
server=$!
trap 'pkill -P "$server" 2>/dev/null; kill "$server" 2>/dev/null || true' EXIT
for _ in $(seq 300); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then break; fi
    sleep 0.2
done

export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_REGION=us-east-1
export AWS_ENDPOINT_URL="http://127.0.0.1:$port" AWS_ALLOW_HTTP=true
export JAXLORA_TEST_S3="$AWS_ENDPOINT_URL"
uv run --isolated pytest -n0 -m s3 "$@"
