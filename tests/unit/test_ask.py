"""What a student is asked from the command line."""

from __future__ import annotations

from pathlib import Path

from distill_ray.config import parse_config
from distill_ray.pipeline.ask import asked


def test_a_context_whose_file_is_gone_keeps_nobody_from_asking_the_student(tmp_path: Path) -> None:
    recipe = {"context": {"file": str(tmp_path / "gone.md")}, "query": "{{ q }}"}
    config = parse_config({"recipe": recipe, "data": {"source": "q.jsonl"}, "teacher": {"type": "fake"}})
    assert asked(config.recipe, "Hello?") == [{"role": "user", "content": "Hello?"}]


def test_a_task_keeps_its_prefix() -> None:
    recipe = {"type": "step_by_step", "query": "{{ q }}", "label_column": "l", "mode": "task_prefix"}
    config = parse_config({"recipe": recipe, "data": {"source": "q.jsonl"}, "teacher": {"type": "fake"}})
    [message] = asked(config.recipe, "2 + 2")
    assert message["content"].endswith("2 + 2")
    assert message["content"] != "2 + 2"
