"""Readers of base checkpoints: Hugging Face directories and GGUF files, tokenizers and chat templates.
May import core, config and model.
Both give float32 arrays under our names, [in, out]. No code of a checkpoint runs; templates run in a sandbox."""
