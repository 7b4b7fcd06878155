"""PEFT folders in and out, archives of strangers, merged checkpoints and GGUF LoRA.

May import core, checkpoints and storage.
What cannot be honoured is refused with every reason at once; archives are checked while they are read.
"""
