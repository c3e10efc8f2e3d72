"""Make the demo model from nothing: `python -m distill_ray.demo.make_model --out DIR --seed 0`.

    conversations (random.Random(seed)) -> byte-level BPE -> packed rows -> Llama of 3.4 M parameters -> DIR

Training reads families of chats (`conversations.py`): a shared beginning and branches that continue it. They
lie behind one another in a row of ids under an attention mask by which a branch sees its own beginning and
itself, at the positions it would have alone. So a long instruction is computed once for a dozen texts, which
is what makes twenty minutes on one core enough. The loss, and the language-model head, are on what the
assistant says and nowhere else.

Nothing is downloaded. The number of steps is fixed: the same seed, machine, threads and versions give the
same model.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill_ray.demo.conversations import Family, Message, families
from distill_ray.demo.instructions import shipped_instruction
from distill_ray.demo.sentences import OTHER_SHARE

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
VOCABULARY = 4096
CONTEXT = 2048
# Content goes in as it is, without strip: a user's text is found again in the rendered prompt.
CHAT_TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' ~ message['role'] ~ ': use system, user or assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' -}}{{- message['content'] -}}{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# Letters stay with their marks (Hindi vowels are marks); digits stand alone (equations copy them).
_PIECES = r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"

ROW_LENGTH = 1024
ROWS_A_STEP = 4
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 40
COOLDOWN_STEPS = 200
# The second phase. Texts of two languages are what the first one gets wrong: it names one of the two.
SECOND_OTHER_SHARE = 0.5
SECOND_PEAK_LEARNING_RATE = 1.5e-3


def train_tokenizer(seed: int, num_families: int = 6000) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on what the conversations say, and give it the chat template."""
    rng = random.Random(f"tokenizer-{seed}")

    def texts() -> Iterator[str]:
        yield from [shipped_instruction()] * 300
        for _ in range(num_families):
            for branch in families(rng).branches:
                yield from (message["content"] for message in branch)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, BOS, END, *ROLES.values()],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 4 layers of width 256, grouped attention, embeddings tied to the head."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=_id(tokenizer, BOS),
            eos_token_id=_id(tokenizer, END),
            pad_token_id=_id(tokenizer, PAD),
            dtype="float32",
        )
    )


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


class Packer:
    """Turns families into rows of `ROW_LENGTH` ids with the mask that keeps branches apart.

    Shapes: B rows, T = ROW_LENGTH positions.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, rng: random.Random, other_share: float = OTHER_SHARE
    ) -> None:
        self._other_share = other_share
        self._encode = tokenizer.backend_tokenizer.encode
        self._ids = {token: _id(tokenizer, token) for token in (BOS, END, PAD, *ROLES.values())}
        self._rng = rng
        self._kept: list[tuple[list[int], list[int], list[int], list[bool]]] = []

    def batch(self) -> dict[str, torch.Tensor]:
        """Return one optimizer step: `ids`, `positions`, `is_target` (BT) and `mask` (B1TT, True: sees)."""
        rows = [self._row() for _ in range(ROWS_A_STEP)]
        ids_BT, positions_BT, family_BT, branch_BT, is_target_BT = (
            torch.tensor(column) for column in zip(*rows, strict=True)
        )
        same_family = family_BT[:, :, None] == family_BT[:, None, :]
        own_branch = (branch_BT[:, None, :] == 0) | (branch_BT[:, :, None] == branch_BT[:, None, :])
        causal = torch.ones(ROW_LENGTH, ROW_LENGTH, dtype=torch.bool).tril()
        return {
            "ids": ids_BT,
            "positions": positions_BT,
            "mask": (same_family & own_branch & causal)[:, None],
            "is_target": is_target_BT,
        }

    def _row(self) -> tuple[list[int], ...]:
        """Fill one row with families until the next one does not fit; that one waits for the next row."""
        row: tuple[list[int], ...] = ([], [], [], [], [])  # ids, positions, families, branches, is_target (bool)
        number = 0
        while True:
            if not self._kept:
                self._kept.append(self._family(families(self._rng, other_share=self._other_share)))
            ids, positions, branches, targets = self._kept[-1]
            if len(row[0]) + len(ids) > ROW_LENGTH:
                break
            self._kept.pop()
            number += 1
            for column, values in zip(row, (ids, positions, [number] * len(ids), branches, targets), strict=True):
                column.extend(values)
        rest = ROW_LENGTH - len(row[0])
        for column, value in zip(row, (self._ids[PAD], 0, 0, 0, False), strict=True):
            column.extend([value] * rest)
        return row

    def _family(self, family: Family) -> tuple[list[int], list[int], list[int], list[bool]]:
        shared, _ = self._messages(family.shared)
        ids = [self._ids[BOS], *shared]
        start = len(ids)
        positions, branches, targets = list(range(start)), [0] * start, [False] * start
        for number, branch in enumerate(family.branches, 1):
            more, is_target = self._messages(branch)
            if len(ids) + len(more) > ROW_LENGTH:
                break
            ids += more
            positions += range(start, start + len(more))
            branches += [number] * len(more)
            targets += is_target
        return ids, positions, branches, targets

    def _messages(self, messages: tuple[Message, ...]) -> tuple[list[int], list[bool]]:
        """Return the ids the chat template gives for `messages`, and which of them the assistant says."""
        ids: list[int] = []
        targets: list[bool] = []
        for message in messages:
            content = [*self._encode(message["content"]).ids, self._ids[END]]
            ids += [self._ids[ROLES[message["role"]]], *content]
            targets += [False] + [message["role"] == "assistant"] * len(content)
        return ids, targets


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, constant, and linear to zero at the end.

    Constant in the middle, so that a run of more steps is the same run for longer.
    """
    warm = (step + 1) / WARMUP_STEPS
    cool = (num_steps - step) / COOLDOWN_STEPS
    return peak * min(1.0, warm, cool)


def train(model: LlamaForCausalLM, packer: Packer, num_steps: int, peak: float = PEAK_LEARNING_RATE) -> None:
    """Train in bfloat16 arithmetic on float32 weights, and print the loss now and then."""
    embedding = model.get_input_embeddings().weight  # tied, so it is the head too
    matrices = [weight for weight in model.parameters() if weight.dim() == 2 and weight is not embedding]
    others = [weight for weight in model.parameters() if weight.dim() < 2 or weight is embedding]
    # Muon on the matrices of the layers needs fewer steps than AdamW alone; its updates are scaled like AdamW's.
    optimizers = [
        torch.optim.Muon(matrices, lr=PEAK_LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    model.train()
    started, shown = time.monotonic(), 0.0
    for step in range(num_steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps, peak)
        batch = packer.batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_BTD = model.model(
                input_ids=batch["ids"],
                attention_mask=batch["mask"],
                position_ids=batch["positions"],
                use_cache=False,
            ).last_hidden_state
            # The position before a target predicts it. It is in the same branch: a role token comes first.
            is_target = batch["is_target"][:, 1:]
            logits_NV = model.lm_head(hidden_BTD[:, :-1][is_target])
        loss = torch.nn.functional.cross_entropy(logits_NV.float(), batch["ids"][:, 1:][is_target])
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}: lower PEAK_LEARNING_RATE")
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if step % 50 == 0 or step == num_steps - 1:
            print(f"step {step + 1}/{num_steps}  loss {shown:.4f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder: float16 on disk to halve the size, float32 in config.json and so in memory."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.generation_config.bos_token_id = model.config.bos_token_id
    model.save_pretrained(out)
    weights = {name: weight.half() for name, weight in load_file(out / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def main() -> None:
    """Train tokenizer and model, measure them and write the folder with its model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1300, help="optimizer steps of the first phase")
    parser.add_argument("--second-steps", type=int, default=350, help="of the second, with more texts labelled `ot`")
    parser.add_argument("--first-phase", type=Path, help="take the result of the first phase from this folder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more may round differently")
    arguments = parser.parse_args()
    # One thread by default: on a shared machine two wait for one another (measured: 5 s a step instead of 1).
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(arguments.seed)
    print(f"tokenizer: {len(tokenizer)} tokens; instruction: {len(tokenizer.encode(shipped_instruction()))}")
    model = new_model(tokenizer, arguments.seed)
    print(f"model: {model.num_parameters():,} parameters", flush=True)
    if arguments.first_phase is None:
        train(model, Packer(tokenizer, random.Random(f"train-{arguments.seed}")), arguments.steps)
        save(model, tokenizer, arguments.out)
    # From the files, so that both phases in one go and the second alone start from the same rounded weights.
    model.load_state_dict(load_file((arguments.first_phase or arguments.out) / "model.safetensors"), strict=False)
    rng = random.Random(f"train-second-{arguments.seed}")
    packer = Packer(tokenizer, rng, other_share=SECOND_OTHER_SHARE)
    train(model, packer, arguments.second_steps, peak=SECOND_PEAK_LEARNING_RATE)
    save(model, tokenizer, arguments.out)

    from distill_ray.demo.model_card import write_card  # measures the folder as a user would load it

    write_card(arguments.out, seed=arguments.seed, num_steps=arguments.steps, second_steps=arguments.second_steps)


if __name__ == "__main__":
    main()
