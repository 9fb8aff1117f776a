"""The Hugging Face Hub: models read from it (`remote`), models published to it (`upload`).

The only package that imports huggingface_hub, and that inside its functions.
"""
