"""PEFT folders in and out, uploaded archives, merged checkpoints and GGUF LoRA.

May import core, checkpoints and storage.
Whatever is unsupported is refused with every reason at once; archives are checked while they are read.
"""
