#!/usr/bin/env bash
# Make .venv in the repository root and install sglang_shift into it. If this is done already, end at once.
#
#   scripts/setup.sh             installs what serving needs
#   scripts/setup.sh benchmark   also installs what the benchmark's plots need
#   scripts/setup.sh gpu-check   also installs what the GPU checks need
#   scripts/setup.sh test        also installs what the tests, the plots and the GPU checks need
#
# The script uses $PYTHON, or else python3. If there is nothing to do, it prints nothing and needs no network.
set -euo pipefail

extras=${1:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/sglang_shift.stamp            # says what is installed; is written last
unfinished=$venv/sglang_shift.unfinished  # exists while an installation runs

say() { echo "sglang_shift: $*" >&2; }
die() { say "error: $*"; exit 2; }

# Print the stamp of a complete installation: its Python, the digest of its pyproject.toml, and its folder.
# Print nothing if .venv cannot run the package.
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

# Print the extras that .venv has, separated by commas.
present() { [[ -f $stamp ]] && sed 's/.* //' "$stamp" || true; }

# Succeed if .venv is complete. The test extras include all other extras, and all extras include what serving needs.
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

# SGLang pins a version of outlines whose core has no wheel for Python 3.13, so Rust would have to compile it. outlines
# is one of several grammar backends and not the default. So on Python 3.13 everything except outlines is installed.
install_without_outlines() {
    local needs=$venv/sglang_shift.requirements
    say "Python 3.13: leaving out outlines, which has no wheel for it; --grammar-backend outlines will not work"
    pip_install --no-deps -e . &&
        pip_install --no-deps "$(requirements sglang-shift | grep '^sglang==')" &&
        { requirements sglang; requirements sglang-shift ${extras//,/ }; } | grep -v -e '^sglang==' -e '^outlines==' >"$needs" &&
        pip_install -r "$needs"
}

# requirements PACKAGE [EXTRA...]: print what an installed package needs in this environment, one requirement per line.
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

# Check the Python that makes .venv. It must exist, have the right version, and be able to make environments.
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
if [[ -n ${PYTHON:-} ]]; then # the user names it, so it is checked even if .venv exists
    check_python
fi
if ready && [[ -z $version || $(minor_of "$venv/bin/python") == "$version" ]]; then
    exit 0
fi

# Only one set-up runs at a time. A second set-up waits, and then finds the work done.
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
    why="its last installation was interrupted" # pip takes half-installed packages for installed ones
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
extras=$({ present; echo "$extras"; } | tr , '\n' | sed '/^$/d' | sort -u | paste -sd , -) # keeps the extras of .venv
rm -f "$stamp"
touch "$unfinished"
if [[ $current == 3.13 ]]; then install=install_without_outlines; else install=install_all; fi
(cd "$root" && $install) >&2 || die "the installation failed, see above; run $0 again to retry"
found=$(installed)
[[ -n $found ]] || die "pip reported success, but the package cannot be found in .venv; remove .venv and run $0 again"
echo "$found $extras" >"$stamp"
rm "$unfinished"
say "ready"
