#!/usr/bin/env bash
#SBATCH --job-name=create_env
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=01:00:00
# A virtual environment with everything that training needs, in the versions that are tested (constraints.txt).
#
#   bash setup/create_env.sh                        makes .venv, or brings it up to date
#   sbatch setup/create_env.sh                      the same as a job, from the top of the repository
#   bash setup/create_env.sh ENV [EXTRA,EXTRA...]   another folder; the extras of pyproject.toml, data,hf if left out
#
# PYTHON=python3.12 chooses the interpreter. No conda, and nothing outside ENV.
set -euo pipefail

# As a job this is a copy in SLURM's own folder, so the repository is where sbatch was called.
for root in "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-}" "${SLURM_SUBMIT_DIR:-}/.."; do
  if [ -f "$root/constraints.txt" ] && [ -f "$root/pyproject.toml" ]; then break; fi
  root=
done
if [ -z "$root" ]; then
  echo "create_env.sh: this is not the repository; call it from its top: sbatch setup/create_env.sh" >&2
  exit 2
fi
here=$PWD
root=$(cd "$root" && pwd)
env=${1:-$root/.venv}
case $env in /*) ;; *) env=$here/$env ;; esac
extras=${2:-data,hf}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "PYTHON: '$python' is not Python 3.11 or newer; name one: PYTHON=python3.12 bash setup/create_env.sh" >&2
  exit 2
fi
if [ ! -e "$env/pyvenv.cfg" ] && [ ! -e "$env/.unfinished" ] && [ -n "$(ls -A "$env" 2>/dev/null)" ]; then
  echo "create_env.sh: '$env' is something else than an environment; name another folder" >&2
  exit 2
fi

# One whose making was interrupted is made anew; `make` knows the same mark.
if [ -e "$env/.unfinished" ]; then rm -rf "$env"; fi
if [ ! -e "$env/pyvenv.cfg" ]; then
  mkdir -p "$env"
  touch "$env/.unfinished"
  "$python" -m venv "$env"
fi
"$env/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "$root[$extras]"
rm -f "$env/.unfinished"
echo "ready: . '$env/bin/activate'"
