"""Managing adapters: what `ckptools lora` does. Every verb is one file with pure-looking functions.

`reading` opens files, `factors` is the linear algebra, `writing` spools modules to disk and writes
the file; `inspection`, `check`, `extract`, `resize` and `concatenate` are the verbs. Importing any
of them loads no torch.
"""
