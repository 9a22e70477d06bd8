"""The builtin policy server: OpenAI-compatible completions from any Hugging Face causal language model folder.

python -m rlhf_trainer.serve --model FOLDER --served-name NAME --digest sha256:…
"""
