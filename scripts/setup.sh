# Sourced by demo.sh and test.sh: `setup` makes .venv in the repository, installs the project in it, and does
# neither again until pyproject.toml changes. `setup dev` adds what the tests need.

# Prints the first Python that is new enough. $PYTHON goes before the usual names.
find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return
        fi
    done
    echo "setup: Python 3.10 or later is needed, and none was found: install one, or set PYTHON to its path" >&2
    return 1
}

make_venv() {
    [ -x .venv/bin/python ] && .venv/bin/python -c 'import sys, pip' >/dev/null 2>&1 && return
    local python
    python=$(find_python) || return 1
    echo "setup: making .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv; then
        echo "setup: $python could not make .venv: on Debian and Ubuntu, install python3-venv" >&2
        return 1
    fi
}

# Says every 30 seconds how long process $1 has been running, until it ends; gives its status.
wait_aloud() {
    local started=$SECONDS told=0 elapsed
    trap 'kill "$1" 2>/dev/null; exit 130' INT TERM
    while kill -0 "$1" 2>/dev/null; do
        sleep 1
        elapsed=$((SECONDS - started))
        if [ $((elapsed - told)) -ge 30 ]; then
            told=$elapsed
            printf 'setup: still at work, %d min %02d s\n' $((elapsed / 60)) $((elapsed % 60))
        fi
    done
    trap - INT TERM
    wait "$1"
}

setup() {
    local extra=${1:-} stamp=.venv/.installed wanted have log=.venv/install.log
    make_venv || return 1
    wanted="$(cksum <pyproject.toml) $PWD"
    have=$(cat "$stamp${extra:+-$extra}" 2>/dev/null || true)
    [ "$have" = "$wanted" ] && return
    if .venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llama_cpp") is None)'; then
        echo "setup: installing the project in .venv"
    else
        echo "setup: installing the project in .venv; the native library compiles, which takes 5 to 10 minutes"
        if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
            echo "setup: no C++ compiler was found: where the next step fails, install one (on Debian and Ubuntu:" \
                "build-essential)" >&2
        fi
    fi
    .venv/bin/python -m pip install --disable-pip-version-check -e ".${extra:+[$extra]}" >"$log" 2>&1 &
    if ! wait_aloud $!; then
        tail -n 25 "$log" >&2
        echo "setup: the installation failed; the lines above are the last of $log" >&2
        return 1
    fi
    printf '%s\n' "$wanted" >"$stamp${extra:+-$extra}"
    [ -z "$extra" ] || printf '%s\n' "$wanted" >"$stamp"
    echo "setup: done"
}
