#!/usr/bin/env bash
# The tests marked `postgres`, on a PostgreSQL server of their own: on a free port, in a temporary folder, stopped in the end.
# Wants Debian's programs (`apt-get install postgresql`).  PostgreSQL refuses to be root: then it is run as `postgres`.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

programs=$(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)
if [ -z "$programs" ]; then
    echo "no PostgreSQL in /usr/lib/postgresql; apt-get install postgresql" >&2
    exit 2
fi

folder=$(mktemp -d)
as=()
if [ "$(id -u)" = 0 ]; then
    as=(setpriv --reuid=postgres --regid=postgres --clear-groups)
    chown postgres "$folder"
fi
server() {
    (cd "$folder" && HOME="$folder" "${as[@]}" "$programs/$1" "${@:2}")
}
finish() {
    server pg_ctl -D "$folder/data" -m immediate stop >/dev/null 2>&1 || true
    rm -rf "$folder"
}
trap finish EXIT

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
server initdb -D "$folder/data" -U jaxlora -A trust --encoding UTF8 --locale C >/dev/null
# Speed alone: what the tests ask of a commit is that it is seen, not that it outlives a power cut.
settings="-p $port -k $folder -c listen_addresses=127.0.0.1 -c fsync=off"
server pg_ctl -D "$folder/data" -w -l "$folder/log" -o "$settings" start >/dev/null

export JAXLORA_TEST_POSTGRES="postgresql://jaxlora@127.0.0.1:$port"
uv run --isolated --extra postgres pytest -n0 -m postgres "$@"
