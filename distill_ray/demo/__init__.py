"""The built-in demo: a tiny model that follows instructions, and the data it was made from.

It lets every part of distill-ray run offline on two cores: `model: demo` is the folder `MODEL_PATH`, which
plain `transformers` and plain `vllm serve` load like any other model.

| module | what it holds |
|---|---|
| `languages.py` | word lists and templates of the languages |
| `sentences.py` | `language_rows`: labelled sentences, and the split into training and held-out |
| `reviews.py` | film reviews: draft, critique, revision |
| `arithmetic.py` | word problems with a rationale and an equation |
| `instructions.py` | the shipped `instruction.md` and its paraphrases |
| `conversations.py` | the training mix: chats made of all of the above |
| `make_model.py` | trains tokenizer and model and writes the model folder (the only user of torch here) |
| `check_model.py` | measures the model, with and without the instruction, through transformers or vLLM |

Importing this package needs neither torch nor transformers.
"""

from pathlib import Path

from distill_ray.demo.arithmetic import problem_rows
from distill_ray.demo.reviews import film_rows
from distill_ray.demo.sentences import LABELS, language_rows

MODEL_PATH: Path = Path(__file__).parent / "model"
"""The folder of the shipped model, in Hugging Face format."""
INSTRUCTION_PATH: Path = Path(__file__).parent / "instruction.md"
"""The long prompt of the demo: how to classify a text by language."""

__all__ = ["INSTRUCTION_PATH", "LABELS", "MODEL_PATH", "film_rows", "language_rows", "problem_rows"]
