#!/bin/sh
# Finds a Python that raycomplete runs on (PYTHON=/path/to/python names one) and hands over to install.py.
here=$(cd "$(dirname "$0")" && pwd) || exit 2
for candidate in ${PYTHON:-python3.11 python3.12 python3 "$here/../.venv/bin/python"}; do
    "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 || continue
    "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 && exec "$candidate" "$here/install.py" "$@"
    second_best=${second_best:-$candidate}
done
if [ -n "$second_best" ]; then
    echo "Set-up refused: $second_best lacks the venv module; install it (Debian, Ubuntu: apt install python3-venv, or" \
        "python3.11-venv for python3.11) and run make setup again."
elif [ -n "$PYTHON" ]; then
    echo "Set-up refused: PYTHON=$PYTHON is not a working Python 3.11 or 3.12; name one that is."
else
    echo "Set-up refused: no Python 3.11 or 3.12 found as python3.11, python3.12 or python3; install one (your system's" \
        "package manager, or pyenv install 3.11) or name it with make setup PYTHON=/path/to/python."
fi >&2
exit 2
