"""The public class: a BLT with its patching settings and its entropy model."""

from bytelatent.blt.forward import Attentions, BLTOutput, ByPart
from bytelatent.blt.generating import MAX_BATCH_SIZE, MAX_CONTINUATIONS, GeneratedText, Generating
from bytelatent.blt.looking import Looking
from bytelatent.blt.patches import Patches
from bytelatent.blt.reading import BitsPerByte, TextReading, TextStates
from bytelatent.model import ByteLM


class BLT(Generating, Looking):
    """A Byte Latent Transformer with its patching settings and its entropy model, as a module of torch.

        model = BLT.from_pretrained("runs/demo")
        model.generate("The history of", max_new_bytes=200)
        model(ids, labels=ids).loss.backward()

    All attributes but `quantize`, `device` and `dtype` can be set; every method then uses the new value, and it is
    saved. The entropy model is frozen: it stays in evaluation mode, gets no gradients, and keeps its precision.

    Attributes:
        config: all of `config.json`; `patching` and `context` are two of its values.
        model: the network.
        patching: the patching settings.
        entropy_model: the byte LM for the entropies; None if the patching mode needs none.
        context: context of the training, in ids; `bits_per_byte` splits longer texts into pieces of this size.
        quantize: `int8` or `fp8` if the network's large matrices are quantized, else `full`.
        kv_cache: `int8` if texts are generated with KV caches in 8 bits, else `full`.
        chat_template: how a conversation is written for the model, a `ChatTemplate` or None. It can be set to Jinja.
    """


__all__ = [
    "BLT",
    "MAX_BATCH_SIZE",
    "MAX_CONTINUATIONS",
    "Attentions",
    "BLTOutput",
    "BitsPerByte",
    "ByPart",
    "ByteLM",
    "GeneratedText",
    "Patches",
    "TextReading",
    "TextStates",
]
