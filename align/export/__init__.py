"""Exports of trained models: an adapter, a merged model, a reward model or GGUF, with a model card, launch scripts and
a receipt.

Writing: `kinds` has one function per kind of export, which writes it and measures it. `adapter` writes plain LoRA,
`merged` a merged model, `gguf` GGUF files by llama.cpp's `converters`, `bases` the bases that exports share. `card`
(with `history`), `launch` and `ollama` write the files beside the weights, and `reward` prepares what others need to
read a reward model's scores. `align.run.atomic` publishes a folder complete or not at all. `preflight` lists which
kinds an artifact can be exported as.

Measuring: `trained_model` is the reference model. `engines` loads exports by transformers, and
`align.rollout.engine_process` runs other engines in processes of their own. `checks` decides which engine reads which
export and which bound it must keep. `receipt_rows` holds the rows and their verdicts, `align.run.receipt` the receipt's
file.
"""
