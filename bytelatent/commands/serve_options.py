"""Settings of `blt serve`. Nothing here imports torch."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from bytelatent.commands.options import DEFAULT_MODEL, ThresholdSettings
from bytelatent.config import ARGUMENT, Option, must_be_named
from bytelatent.inference.settings import MAX_BATCH_SIZE, REMOVED, KVCacheNumbers, Quantization
from bytelatent.serving.limits import Limits

Names = Annotated[list[str], Option(("--name",))]
Hosts = Annotated[list[str], Option(("--allow-host",))]
Origins = Annotated[list[str], Option(("--allow-origin",))]


class ServeSettings(ThresholdSettings):
    """Serve a model by HTTP: the API of OpenAI's clients, and a page that shows patches.

    Example:  `blt serve runs/demo --port 8000`

    Then:  `curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once"}'`

    A key for all requests:  `BLT_API_KEY=... blt serve runs/demo --host 0.0.0.0`

    Attributes:
        model: a run, a folder with a model, OWNER/NAME on the hub, or tiny, the model in the package, which is used
            where this is not given and there is no demo.
        host: address to listen on. 0.0.0.0 is all of this machine's.
        port: port to listen on. 0 takes any that is free.
        name: name of the model for clients; may be repeated. Default: as it is given.
        api_key_file: file of API keys, one per line, without lines that begin with #; every request needs one of them.
            Default: the environment's BLT_API_KEY, if there is one.
        allow_host: name by which clients may call the server; may be repeated. Default: this machine's own names
            where it listens for itself alone, else any.
        allow_origin: site whose pages may call the server from a browser; may be repeated. Default: none.
        drain_seconds: time for running requests to end after SIGTERM or Ctrl-C.
        batch_size: texts that are decoded at once. Default: 16, on a GPU 64.
        max_waiting: texts that may wait for their turn; further ones are refused.
        prefill_chunk: bytes of prompts that are read between two steps of decoding at most. Default: 512, on a GPU
            4,096.
        prefix_cache_mb: memory for the states of prompts, for prompts that begin alike.
        device: device: auto, cpu, cuda, cuda:1 or mps.
        dtype: precision: float32, bfloat16 or auto (as the weights are stored).
        quantize: quantization of large matrices, faster on a GPU: int8, fp8 or full (none).
        kv_cache: KV caches: int8 for about half of bfloat16's memory, or full.
    """

    removed: ClassVar[dict[str, str]] = REMOVED

    model: Annotated[str, ARGUMENT] = DEFAULT_MODEL
    host: Annotated[str, AfterValidator(lambda host: must_be_named(host, "an address"))] = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    name: Names = Field(default=[])
    api_key_file: Path | None = None
    allow_host: Hosts = Field(default=[])
    allow_origin: Origins = Field(default=[])
    drain_seconds: float = Field(default=30, ge=0, le=86_400)
    batch_size: int | None = Field(default=None, ge=1, le=MAX_BATCH_SIZE)
    max_waiting: int = Field(default=256, ge=0, le=10**6)
    prefill_chunk: int | None = Field(default=None, ge=1, le=2**20)
    prefix_cache_mb: float = Field(default=256, ge=0, le=1e6)
    limits: Limits = Limits()
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantization = "full"
    kv_cache: KVCacheNumbers = "full"
