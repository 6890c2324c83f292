"""What leaves the project: an adapter, a merged or a whole model, a reward model, GGUF; each with a card, launch
files and a receipt.

What is written: `adapter` (`align.models.plain_lora` makes it plain LoRA), `merged`, `gguf` (by llama.cpp's
`converters`), their `bases`, and beside each `card` (whose code is `snippet`'s), `launch`, `ollama`; `reward` is what
others need to read a reward model's scores; `align.run.atomic` lets all of it appear whole or not at all. `kinds` puts
it together: one function a kind, which writes it and has it measured; `askable` says which kinds there are of what.

What is measured: `trained` is the model that must be found again, `engines` loads exports by transformers,
`align.rollout.engine_process` asks other engines in processes of their own, `checks` says who is asked what and held to
which bound, `receipt_rows` what a check is and whether it is good enough, `align.run.receipt` what the file is.
"""
