"""ckptools merges model checkpoints by recipe, tensor by tensor."""
