"""A whole run whose teacher is an HTTP server: labelled text of your own, answered through the OpenAI protocol.

    python benchmarks/labels_over_http.py TEXT_FILE --labels ar,bg,de,... --run-dir runs/labels

TEXT_FILE has one text a line, and line i (from 0) has label i modulo the number of labels. A server on loopback knows
them: asked to name the language of a text it reasons for a line and ends in "Final Answer: <label>", as a large model
with a long instruction would. The run goes through the `openai` engine, the ledger, DeepSpeed and the evaluation like
any other; the student is the built-in demo model. Texts of one group (as many lines as labels: the same sentence in
every language) are kept together, so that no held-out sentence was trained on in another language.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.waste import CountingServer
from distill_ray.config import parse_config
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.reporting.result import summary_table
from distill_ray.pipeline.run import run

HELD_OUT_GROUPS = 15  # of a hundred


class LabelServer(CountingServer):
    """Answers with the known label of the text that it is asked about."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        super().__init__(latency_s=0.0)

    def answer(self, question: str) -> str:
        """See the base class."""
        return f"The words tell the language.\nFinal Answer: {self._labels[question]}"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text_file", type=Path)
    parser.add_argument("--labels", required=True, help="comma-separated, in the order of the lines")
    parser.add_argument("--run-dir", default="runs/labels")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    names = options.labels.split(",")
    texts = options.text_file.read_text(encoding="utf-8").splitlines()
    rows = [
        {"id": f"line-{i}", "text": text, "label": names[i % len(names)], "group": i // len(names)}
        for i, text in enumerate(texts)
    ]
    server = LabelServer({row["text"]: row["label"] for row in rows})
    base = Path(options.run_dir)
    base.mkdir(parents=True, exist_ok=True)
    held_out = max(row["group"] for row in rows) + 1 - HELD_OUT_GROUPS
    for name, chosen in (
        ("train", [r for r in rows if r["group"] < held_out]),
        ("test", [r for r in rows if r["group"] >= held_out]),
    ):
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
    config = parse_config(
        {
            "name": "labels",
            "recipe": {
                "type": "context",
                "context": {"text": "Name the language. Reason first, then write `Final Answer:` and its code."},
                "parse": {"regex": r"Final Answer: (\w+)"},
            },
            "data": {"source": str(base / "train.jsonl"), "test": str(base / "test.jsonl"), "id": "id"},
            "teacher": {
                "type": "openai",
                "model": "labels",
                "base_url": f"http://127.0.0.1:{server.port}/v1",
                "api_key_env": None,
                "sampling": {"max_tokens": 32},
            },
            "train": {"epochs": options.epochs, "learning_rate": 1e-3, "max_tokens_per_batch": 1024},
            "evaluate": {"reference": "label", "engine": "hf", "max_tokens": 8},
        }
    )
    metrics = run(config, RunFolder(base))
    Console().print(summary_table(metrics))
    print(f"calls answered over HTTP: {len(server.began)}")


if __name__ == "__main__":
    main()
