"""torch.hub: ``torch.hub.load("OWNER/textok-fast", "tokenizer", "directory or Hub id")``, with this repository's address."""

dependencies = ["torch", "numpy", "PIL", "safetensors", "huggingface_hub", "transformers", "yaml"]


def tokenizer(source, **options):
    """A :class:`textok_fast.TexTok` from a directory or a Hub id; options as ``TexTok.from_pretrained``."""
    from textok_fast import TexTok

    return TexTok.from_pretrained(source, **options)


def dit(source, **options):
    """A :class:`textok_fast.DiT`; options as ``DiT.from_pretrained``."""
    from textok_fast import DiT

    return DiT.from_pretrained(source, **options)


def pipeline(directory, **options):
    """A generation pipeline; options as ``textok_fast.inference.load_pipeline``."""
    from textok_fast.inference import load_pipeline

    return load_pipeline(directory, **options)


def foreign(kind, weights, **options):
    """Somebody else's model on these modules; arguments as ``textok_fast.interop.load``."""
    from textok_fast.interop import load

    return load(kind, weights, **options)
