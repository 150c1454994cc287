#!/usr/bin/env bash
# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
#
# Check style and types: ruff, mypy and shellcheck.
set -euo pipefail
cd "$(dirname "$0")/.."

ci/install-deps.sh lint

# Debian 12 has no ruff.
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
/usr/bin/python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check 'ruff==0.14.*'

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
/usr/bin/python3 -m mypy rbd_export.py
shellcheck ci/*.sh bench/*.sh tests/*.sh tests/stress/*.sh .ci/run
