#!/usr/bin/env python3
"""Download a data set of the hub and prepare it: shuffled as a whole, cut into chunks, some documents held out.

    download_prepare_hf_data.py NAME MEMORY [--data_dir ./data] [--seed 42] [--nchunks 32]

NAME is fineweb_edu, fineweb_edu_10bt, dclm_baseline_1.0, dclm_baseline_1.0_10prct, any data set of the hub as
hf://datasets/OWNER/NAME[@REVISION][/PATTERN], or a folder of yours. MEMORY is how many gigabytes it may use.

It downloads to DATA_DIR/NAME and writes DATA_DIR/NAME_shuffled. Stopped and run again, it goes on from where it was.
"""

import argparse
from pathlib import Path

from bytelatent import log
from bytelatent.errors import UserError, guarded
from bytelatent.hub import ASK, token_of
from bytelatent.prepare import PrepareSettings, prepare
from bytelatent.prepare.download import dataset_name, download_dataset, is_hub


def main() -> None:
    arguments = parse()
    log.configure()
    name, source = found(arguments)
    settings = PrepareSettings.parse(
        {
            "source": [str(source)],
            "out": arguments.data_dir / f"{name}_shuffled",
            "name": name,
            "memory": arguments.memory,
            "chunks": arguments.nchunks,
            "seed": arguments.seed,
            "validation": arguments.validation,
            "dedup": arguments.dedup,
            "executor": arguments.executor,
        }
    )
    print(prepare(settings))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("memory", metavar="MEMORY", type=float, help="gigabytes (10^9 bytes)")
    parser.add_argument("--data_dir", metavar="DIR", type=Path, default=Path("data"))
    parser.add_argument("--seed", type=int, default=42, help="shuffle seed")
    parser.add_argument("--nchunks", metavar="N", type=int, default=32, help="files to write")
    parser.add_argument("--validation", metavar="N", type=int, help="documents held out; 1 %%, 10000 at most")
    parser.add_argument("--dedup", action="store_true", help="leave out documents whose text occurred before")
    parser.add_argument("--executor", default="local", help="local, slurm, ray")
    parser.add_argument(
        "--api_key", metavar="KEY", nargs="?", const=ASK, help="your key; alone: asks for it; left out: HF_TOKEN"
    )
    return parser.parse_args()


def found(arguments: argparse.Namespace) -> tuple[str, Path]:
    """What to call the text, and the folder that holds it, downloaded if it is the hub's.

    Raises:
        UserError: it is neither the hub's nor a folder.
    """
    wanted = arguments.name
    folder = Path(wanted).expanduser()
    if not is_hub(wanted) and folder.is_dir():
        return folder.resolve().name, folder
    if not is_hub(wanted) and "/" in wanted:
        raise UserError(f"'{wanted}' is no folder; give one, a known name or hf://datasets/OWNER/NAME")
    name = dataset_name(wanted)  # complains about an unknown name
    return name, download_dataset(wanted, arguments.data_dir / name, token_of(arguments.api_key))


if __name__ == "__main__":
    guarded(main)
