#!/bin/bash
# install.sh FOLDER PACKAGE...: a virtual environment of its own, whole or not at all.
set -euo pipefail
folder=$1
shift
trap 'rm -rf "$folder"' ERR
python3 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
