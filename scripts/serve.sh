#!/usr/bin/env bash
# Start a server, and set up what is missing. Without flags it serves the demo model in shift mode on 2 ranks.
#
#   scripts/serve.sh [flags of SGLang's server and of sglang_shift]
#
# It adds --tp-size 2 unless you give a size, and --enable-shift-parallel unless you give --sp-size.
# It adds neither if you give --config, and then does not say when the server is ready: the file may have the address.
# For stock SGLang, run python -m sglang_shift.launch_server.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

host=127.0.0.1
port=30000
scheme=http
node=0
auth=
add_size=true
add_shift=true
announces=true
previous=
for arg in "$@"; do
    # A flag is `--flag value` or `--flag=value`. Look at the flag once its value is known.
    case $arg in
        --*=*) flag=${arg%%=*} value=${arg#*=} ;;
        *) flag=$previous value=$arg ;;
    esac
    previous=$arg
    case $flag in
        --host) host=$value ;;
        --port) port=$value ;;
        --node-rank) node=$value ;;
        --api-key) auth=' -H "Authorization: Bearer YOUR_API_KEY"' ;;
        --ssl-certfile) scheme=https ;;
    esac
    case ${arg%%=*} in # also abbreviations, because the parser accepts them
        --tp | --tp-* | --te*) add_size=false ;;
        --sp-s | --sp-si* | --seq* | --enable-shi*) add_shift=false ;;
        --conf*) add_size=false add_shift=false announces=false ;;
        -h | --help) sed -n 's/^# \{0,1\}//; 2,8p' "${BASH_SOURCE[0]}"; echo; announces=false ;;
    esac
done
if $add_shift; then set -- "$@" --enable-shift-parallel; fi
if $add_size; then set -- "$@" --tp-size 2; fi

# A client cannot connect to every address on which a server can listen.
case $host in
    0.0.0.0 | "") host=127.0.0.1 ;;
    ::) host='[::1]' ;;
    *:*) host="[$host]" ;;
esac
url=$scheme://$host:$port

# Wait for the server, then print requests to paste. Standard input is a pipe that the server holds
# open. If the pipe ends, the server is gone.
announce() {
    local status
    while true; do
        status=0
        read -r -t 1 || status=$?
        [[ $status -gt 128 ]] || return 0
        curl --silent --insecure --noproxy '*' --max-time 5 --fail --output /dev/null "$url/health" && break
    done
    cat <<END

sglang_shift: ready at $url. Paste one of these into another terminal:

  curl $url/generate$auth -H "Content-Type: application/json" -d '{
    "text": "def open_file(path):", "sampling_params": {"max_new_tokens": 64, "temperature": 0}}'

  curl $url/v1/chat/completions$auth -H "Content-Type: application/json" -d '{
    "model": "default", "max_tokens": 96, "temperature": 0,
    "messages": [{"role": "user", "content": "Write is_empty: Return True if the queue is empty."}]}'

Ctrl-C stops the server.

END
}

"$root/scripts/setup.sh"
if $announces && [[ $node == 0 ]] && command -v curl >/dev/null; then
    exec 3> >(announce <&0 &)
    wait "$!" 2>/dev/null || true # waits for the shell that started it, not for `announce`
fi
exec "$root/.venv/bin/python" -m sglang_shift.launch_server "$@"
