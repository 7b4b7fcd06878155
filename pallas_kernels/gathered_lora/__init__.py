"""LoRA of serving: each token of decode, each lane of prompts has its own slot; rows are read from the pool in place.
May import segmented_lora, for XLA's form of prompts.
xla_cpu visits two tokens of an adapter at a time, written so that XLA reads rows where they lie."""
