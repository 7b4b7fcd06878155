"""Log-probabilities of K targets a token, and their gradient, without ever holding all of [T, V].

May import segmented_lora, for LoRA on the head.
The head is never gathered; the vocabulary may be split over devices, features may not in the kernels.
"""
