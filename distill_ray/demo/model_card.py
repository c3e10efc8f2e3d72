"""Write the model card: what the demo model is, how it was made, and what was measured on the files as
shipped.
"""

import json
from pathlib import Path

from distill_ray.demo.check_model import hf_chat, measure

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# distill-ray demo model

A toy: a Llama of {parameters:.1f} M parameters (4 layers, width 256, byte-level BPE of 4,096 tokens), trained
from nothing on data that distill-ray generates itself, so that distillation runs offline on two cores. It is
both teacher and student of the demo. **It knows nothing else**: do not use it to tell the language of real
text, to solve problems or to review films.

## What it does

- Given an instruction for language classification (the shipped one is `distill_ray/demo/instruction.md`,
  {instruction_tokens} tokens) it answers a text with one line of evidence and `Final Answer: xx`, where xx is
  one of `ar de el en es fr hi ru tr ur vi zh ot`.
- Given an instruction or examples for arithmetic word problems it answers with a sentence and
  `The answer is ( 7 + 5 )`.
- Asked for a film review, for a critique of it and for a revision, it writes all three. Films and people are
  invented.
- Without an instruction it answers any text with a short remark in English.

## How it was made

`python -m distill_ray.demo.make_model --out DIR --seed {seed} --steps {num_steps} --second-steps
{second_steps}`: about half an hour on one core of a shared CPU with AMX (the second phase on two). The second
phase has more texts labelled `ot`, because texts of two languages are what the first one gets wrong. The
training data come from `distill_ray/demo/conversations.py`: word lists and templates written for this
project, nothing downloaded or copied. One sentence in ten, by a hash of its text, is never trained on. The
weights are stored as float16 and load as float32. The same seed gives the same model on the same machine and
library versions; other processors round differently.

## Figures

On {num_rows} held-out sentences (unseen combinations of *seen* words and templates: this is not accuracy on
real text), {num_half} word problems and {num_half} films. Greedy, except for the reviews (temperature 0.8).
To measure again: `python -m distill_ray.demo.check_model --rows {num_rows}`, and
`--engine vllm`.

| figure | share |
|---|---|
{table}

## Limits

A language has 14 templates and about 90 words and phrases; sentences in other words are often labelled
wrongly. The evidence it names is usually, not always, in the text, and the label does not depend on it. The
sentences were put together by rule and not reviewed by native speakers.
"""


def write_card(folder: Path, seed: int, num_steps: int, second_steps: int, num_rows: int = 400) -> dict[str, float]:
    """Measure the model in `folder` with transformers and write `folder/README.md`; return the figures."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    from distill_ray.demo.instructions import shipped_instruction

    figures = measure(hf_chat(folder), num_rows)
    print(json.dumps(figures, indent=2))
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys()) / 1e6  # noqa: SIM118 (not a dict)
    card = CARD.format(
        parameters=parameters,
        instruction_tokens=len(AutoTokenizer.from_pretrained(folder).encode(shipped_instruction())),
        seed=seed,
        num_steps=num_steps,
        second_steps=second_steps,
        num_rows=num_rows,
        num_half=num_rows // 2,
        table="\n".join(f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in figures.items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return figures
