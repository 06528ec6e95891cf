#!/bin/sh
# Prints the first usable Python: the one given, or else 3.11 to 3.13 under one of the usual names.
# Usable: it runs, is new enough, and can make virtual environments.
usable='import sys, ensurepip, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= tuple(map(int, sys.argv[1].split("."))))'
if [ -n "$1" ]; then
  newest=3.99
  candidates=$1
else
  newest=3.13
  candidates="python3 python3.13 python3.12 python3.11 python"
fi
for python in $candidates; do
  if "$python" -c "$usable" "$newest" >/dev/null 2>&1; then
    command -v "$python"
    exit 0
  fi
done
echo "No usable Python among: $candidates. jaxprompt needs Python 3.11, 3.12 or 3.13 with its venv" \
  "module (Debian, Ubuntu: apt-get install python3-venv); then try again, or name it:" \
  "make PYTHON=/path/to/python3.12 ..." >&2
exit 1
