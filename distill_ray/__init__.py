"""distill-ray: what a large model does with a long prompt becomes what a small model does by itself.

The map, in the order data flows (each package may import only what stands left of it; a test checks it):

    errors, records <- plugins <- config <- models <- recipes | engines | student | demo <- pipeline <- cli <- jobs

- `errors`    the exception tree; every message says what, where, the value, and what to do
- `records`   Row, Completion, Example, Reject and their Arrow schemas: the contracts between the stages
- `plugins`   recipes, engines, rewards, metrics and readers from other installed packages
- `config`    pydantic models of the YAML; light: no ray, torch or vllm
- `models`    where a model lives and how its chat template becomes token ids
- `recipes`   what the teacher does with one row (one async function a method)
- `engines`   who answers: vLLM, an OpenAI-compatible URL, plain transformers, a fake
- `student`   torch only: load, tokenise, batch, losses
- `pipeline`  Ray Data and Ray Train: generate, train, evaluate, the call ledger, the report
- `demo`      a tiny built-in model and its synthetic data, so that everything runs offline
- `cli`       the `distill-ray` command
"""

__version__ = "0.1.0"
