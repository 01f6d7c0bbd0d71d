"""BLTs inside transformers: `import bytelatent.hf` registers them with its Auto classes.

    import bytelatent.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("runs/demo")
    tokenizer = AutoTokenizer.from_pretrained("runs/demo")

Their `from_pretrained` then takes a run, a folder or a repository in our format or Meta's, beside what it took before.
An export for transformers' own `BltForCausalLM` stays that; `BytelatentForCausalLM.from_pretrained` takes it, too.
"""

from bytelatent.errors import UserError

try:
    import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError:
    raise UserError("bytelatent.hf needs transformers: pip install 'bytelatent[transformers]'") from None

from bytelatent.hf.auto import register_classes
from bytelatent.hf.config import BytelatentConfig
from bytelatent.hf.model import BytelatentForCausalLM
from bytelatent.hf.tokenizer import BytelatentTokenizer

register_classes()

__all__ = ["BytelatentConfig", "BytelatentForCausalLM", "BytelatentTokenizer"]
