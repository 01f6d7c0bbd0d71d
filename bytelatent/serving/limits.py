"""How much a request may ask for, and how long it may take."""

from pydantic import Field

from bytelatent.config import Settings
from bytelatent.inference.settings import MAX_NEW_BYTES


class Limits(Settings):
    """
    Attributes:
        max_prompt_bytes: longest prompt, in bytes.
        max_new_bytes: largest number of new bytes of a text; also what a chat gets where it asks for no number.
        max_samples: largest number of texts of a request: prompts times n.
        max_seconds: longest time for an answer. Then a text ends as if its length were reached.
        max_body_bytes: longest body of a request, in bytes.
        header_seconds: time for the head of a request to arrive.
        body_seconds: time for the body of a request to arrive.
    """

    max_prompt_bytes: int = Field(default=65_536, ge=1, le=2**30)
    max_new_bytes: int = Field(default=16_384, ge=1, le=MAX_NEW_BYTES)
    max_samples: int = Field(default=64, ge=1, le=65_536)
    max_seconds: float = Field(default=600, gt=0, le=1e6)
    max_body_bytes: int = Field(default=2**20, ge=1024, le=2**31)
    header_seconds: float = Field(default=10, gt=0, le=3600)
    body_seconds: float = Field(default=30, gt=0, le=3600)
