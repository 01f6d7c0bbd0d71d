#!/usr/bin/env bash
# Lint, format and types: what `make lint` and pre-commit run.
#
#   bash dev/lint.sh                    all three; exit code 1 if any of them finds something
#   bash dev/lint.sh --fix              mend what ruff can, then check the types
#   bash dev/lint.sh check|format|types  only these
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tools of .venv where there is one, else those of the active environment.
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi

fix=false
steps=()
for argument in "$@"; do
  case "$argument" in
    --fix) fix=true ;;
    check | format | types) steps+=("$argument") ;;
    *)
      echo "dev/lint.sh: '$argument' is unknown; it takes --fix, check, format, types" >&2
      exit 2
      ;;
  esac
done
if [ ${#steps[@]} -eq 0 ]; then steps=(check format types); fi

failed=0
for step in "${steps[@]}"; do
  case "$step" in
    check) if $fix; then ruff check --fix .; else ruff check .; fi || failed=1 ;;
    format) if $fix; then ruff format .; else ruff format --check .; fi || failed=1 ;;
    # The path is that of the environment whose packages the code is checked against.
    types) basedpyright --pythonpath "$(command -v python || command -v python3)" || failed=1 ;;
  esac
done
exit "$failed"
