#!/usr/bin/env python3
"""Download the tokenizer of a published model, to compare its tokens with patches.

    download_tokenizer.py NAME PATH [--api_key [KEY]]

NAME is llama2, llama3, gemma or tiktoken (cl100k_base). The first three need access: open their page on the hub, accept
the terms, and make a key at https://huggingface.co/settings/tokens. Hand it over in the environment (HF_TOKEN), or give
--api_key alone and type it unseen; a key after --api_key is seen by everyone who lists this machine's processes.
PATH/tokenizer.json, where there is one, is what the patching mode bpe:PATH/tokenizer.json reads.
"""

import argparse
from pathlib import Path

from bytelatent import log
from bytelatent.errors import guarded
from bytelatent.hub import ASK, token_of
from bytelatent.prepare.download import NAMES, TIKTOKEN_SHA256, TIKTOKEN_URL, download_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("path", metavar="PATH", type=Path, help="the folder it writes")
    parser.add_argument(
        "--api_key", metavar="KEY", nargs="?", const=ASK, help="your key; alone: asks for it; left out: HF_TOKEN"
    )
    parser.add_argument("--tiktoken_url", metavar="URL", default=TIKTOKEN_URL, help="another place for tiktoken's file")
    arguments = parser.parse_args()
    log.configure()
    # The file at another address need not be the published one.
    sha256 = TIKTOKEN_SHA256 if arguments.tiktoken_url == TIKTOKEN_URL else None
    files = download_tokenizer(
        arguments.name, arguments.path, token_of(arguments.api_key), arguments.tiktoken_url, sha256
    )
    for file in files:
        print(file)


if __name__ == "__main__":
    guarded(main)
