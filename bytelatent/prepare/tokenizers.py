"""Tokenizers of published models, to compare patches with and for patching mode `bpe`."""

import hashlib
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from bytelatent.errors import UserError, nearest
from bytelatent.files import whole_file
from bytelatent.hub import few, hub_errors, require_client

TOKENIZER_JSON = "tokenizer.json"
TIKTOKEN_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
TIKTOKEN_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class HubTokenizer:
    """Where a tokenizer is on the hub."""

    repository: str
    file: str = "tokenizer.model"


TOKENIZERS = {
    "llama2": HubTokenizer("meta-llama/Llama-2-7b"),
    "llama3": HubTokenizer("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model"),
    "gemma": HubTokenizer("google/gemma-2-2b"),
}
TIKTOKEN = "tiktoken"
NAMES = (*TOKENIZERS, TIKTOKEN)


def fetch_tokenizer(
    name: str,
    folder: Path,
    token: str | None = None,
    url: str = TIKTOKEN_URL,
    sha256: str | None = TIKTOKEN_SHA256,
) -> list[Path]:
    """Download a tokenizer into `folder`, under the names its repository gives the files; return them.

    With a hub tokenizer comes tokenizer.json, which patching mode `bpe` reads, if the repository holds it.

    Args:
        name: one of `NAMES`.
        token: of a user who has access; HF_TOKEN if left out.
        url: where cl100k_base is, for the name `tiktoken`.
        sha256: what its bytes must come to; None takes any.

    Raises:
        UserError: the name is unknown, access is missing, the server does not answer, the folder cannot be written.
    """
    folder = Path(folder)
    if name == TIKTOKEN:
        return [_fetch_plain(url, folder / url.rsplit("/", 1)[1], sha256)]
    if name not in TOKENIZERS:
        raise UserError(f"'{name}' is no known tokenizer; known are {', '.join(NAMES)}{nearest(name, list(NAMES))}")
    require_client(name, "data")
    return _fetch_from_hub(TOKENIZERS[name], folder, token)


def _fetch_from_hub(tokenizer: HubTokenizer, folder: Path, token: str | None) -> list[Path]:
    from huggingface_hub import HfApi, hf_hub_download

    name = tokenizer.repository
    with hub_errors(name, token=token):
        listed = [file.rfilename for file in HfApi(token=token).repo_info(name).siblings or []]
        if tokenizer.file not in listed:
            raise UserError(f"{name} has no file '{tokenizer.file}'; it has {few(listed)}")
        wanted = [file for file in (tokenizer.file, TOKENIZER_JSON) if file in listed]
        for file in wanted:
            hf_hub_download(name, file, local_dir=folder, token=token)
    return [folder / file for file in wanted]


def _fetch_plain(url: str, target: Path, sha256: str | None) -> Path:
    data = _read(url)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"'{url}' gave other bytes than were published; run the same again, or check the network")
    with whole_file(target) as aside:
        aside.write_bytes(data)
    return target


def _read(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, HTTPException) as error:  # URLError and HTTPError are OSErrors
        raise UserError(f"'{url}' cannot be downloaded: {error}; check the network and run the same again") from None
    except ValueError:
        raise UserError(f"'{url}' is no address; write http:// or https://") from None
