"""What the student is and how it learns from one batch. torch only: no Ray, no recipe, no engine.

    tokens     examples as token ids on disk, memory-mapped               (numpy, arrow)
    batches    which examples meet in which optimizer step, on which rank  (numpy)
    schedule   learning rate as a function of the step
    load       a Hugging Face model, causal or seq2seq, full or LoRA
    module     collate + forward: micro-batch -> logits at the positions that are learnt -> loss
    losses     functions of those logits
    export     weights -> a folder that plain transformers and vLLM load

`pipeline.training` runs it on a cluster.
"""
