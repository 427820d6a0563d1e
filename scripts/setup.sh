#!/usr/bin/env bash
# Make .venv in the repository root and install sglang_shift into it; at once where that is done.
#
#   scripts/setup.sh             what serving needs
#   scripts/setup.sh benchmark   and what the benchmark's plots need
#   scripts/setup.sh gpu-check   and what the GPU checks need
#   scripts/setup.sh test        and what the tests need, all of the above among it
#
# Uses $PYTHON, else python3. Prints nothing when there is nothing to do, and needs no network then.
set -euo pipefail

extras=${1:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/sglang_shift.stamp            # what was installed; written last
unfinished=$venv/sglang_shift.unfinished  # there while an installation runs

say() { echo "sglang_shift: $*" >&2; }
die() { say "error: $*"; exit 2; }

# What a complete install leaves behind: Python, folder and pyproject.toml it was made for.
# Empty where .venv cannot run the package.
installed() {
    "$venv/bin/python" - "$root" 2>/dev/null <<'PYTHON' || true
import hashlib, importlib.metadata, pathlib, sys
root = pathlib.Path(sys.argv[1])
for package in ("sglang", "sglang_shift"):
    importlib.metadata.version(package)
digest = hashlib.sha256((root / "pyproject.toml").read_bytes()).hexdigest()
print(f"{sys.version_info[0]}.{sys.version_info[1]} {digest} {root}")
PYTHON
}

# The extras that .venv has, separated by commas.
present() { [[ -f $stamp ]] && sed 's/.* //' "$stamp" || true; }

# Is .venv complete? The test extras include all others, and all include what serving needs.
ready() {
    local found has
    [[ -f $stamp && ! -e $unfinished ]] || return 1
    found=$(installed)
    [[ -n $found && $(cat "$stamp") == "$found "* ]] || return 1
    has=,$(present),
    [[ -z $extras || $has == *,test,* || $has == *,$extras,* ]]
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input $quiet "$@"; }

install_all() { pip_install -e ".${extras:+[$extras]}"; }

# SGLang pins an outlines whose core has no wheel for Python 3.13 (it would be compiled, with Rust). It is one of
# several grammar backends and not the default, so there it is left out and all else installed.
install_without_outlines() {
    local needs=$venv/sglang_shift.requirements
    say "Python 3.13: leaving out outlines, which has no wheel for it; --grammar-backend outlines will not work"
    pip_install --no-deps -e . &&
        pip_install --no-deps "$(requirements sglang-shift | grep '^sglang==')" &&
        { requirements sglang; requirements sglang-shift ${extras//,/ }; } | grep -v -e '^sglang==' -e '^outlines==' >"$needs" &&
        pip_install -r "$needs"
}

# requirements PACKAGE [EXTRA...]: what an installed package needs in this environment, a line each.
requirements() {
    "$venv/bin/python" - "$@" <<'PYTHON'
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
for line in importlib.metadata.requires(sys.argv[1]) or []:
    requirement = Requirement(line)
    extras = sys.argv[2:] or [""]
    if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
        requirement.marker = None
        print(requirement)
PYTHON
}

minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# The interpreter to build .venv with: there, of the right age, able to make environments.
check_python() {
    local hint="set PYTHON to one that is, for example PYTHON=python3.12"
    command -v "$python" >/dev/null || die "$python was not found; sglang_shift needs Python 3.11 to 3.13; install it, or name another: PYTHON=python3.12"
    version=$(minor_of "$python")
    case $version in
        3.11 | 3.12 | 3.13) ;;
        "") die "$python does not run as Python; sglang_shift needs Python 3.11 to 3.13; $hint" ;;
        2.* | 3.[0-9] | 3.10) die "$python is Python $version, which is too old; sglang_shift needs 3.11 to 3.13; $hint" ;;
        *) die "$python is Python $version, which is too new; sglang_shift needs 3.11 to 3.13; $hint" ;;
    esac
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python (Python $version) lacks the venv module; on Debian and Ubuntu: apt-get install python$version-venv"
}

python=${PYTHON:-python3}
version=
if [[ -n ${PYTHON:-} ]]; then # asked for by name: check it even where .venv exists
    check_python
fi
if ready && [[ -z $version || $(minor_of "$venv/bin/python") == "$version" ]]; then
    exit 0
fi

# One set-up at a time; a second one waits, and then finds the work done.
if command -v flock >/dev/null; then
    exec 9<"$root/pyproject.toml"
    if ! flock --nonblock 9; then
        say "another set-up is running; waiting for it"
        flock 9
        if ready && [[ -z $version || $(minor_of "$venv/bin/python") == "$version" ]]; then
            exit 0
        fi
    fi
fi

why=
current=$(minor_of "$venv/bin/python")
if [[ ! -e $venv ]]; then
    why="there is none"
elif [[ ! $current =~ ^3\.1[123]$ || $current != "${version:-$current}" ]]; then
    why="the one there has ${current:+Python }${current:-no Python that runs}"
elif [[ -e $unfinished && $venv/lib/python$current/site-packages -nt $unfinished ]]; then
    why="its last installation was interrupted" # half-installed packages look installed to pip
elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    why="the one there has no pip"
fi
if [[ -n $why ]]; then
    check_python
    say "making .venv with Python $version ($why)"
    "$python" -m venv --clear --without-pip "$venv"
    touch "$unfinished"
    "$python" -m venv "$venv"
    current=$version
fi

quiet=
if [[ -d $venv/lib/python$current/site-packages/sglang ]]; then
    say "bringing .venv up to date"
    quiet=--quiet
else
    say "installing sglang_shift, SGLang and PyTorch: 3 to 4 minutes and about 11 GB, the first time only"
fi
extras=$({ present; echo "$extras"; } | tr , '\n' | sed '/^$/d' | sort -u | paste -sd , -) # what it has, it keeps
rm -f "$stamp"
touch "$unfinished"
if [[ $current == 3.13 ]]; then install=install_without_outlines; else install=install_all; fi
(cd "$root" && $install) >&2 || die "the installation failed, see above; run $0 again to retry"
found=$(installed)
[[ -n $found ]] || die "pip reported success, but the package cannot be found in .venv; remove .venv and run $0 again"
echo "$found $extras" >"$stamp"
rm "$unfinished"
say "ready"
