"""lm-eval by local-completions: a task of 20 items in a file that is written here, scored by log-likelihood."""

import json
import os
import random
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

folder = Path("lm-eval-task").resolve()
folder.mkdir(exist_ok=True)
draw = random.Random(0)
numbers = "one two three four five six seven eight nine".split()
with (folder / "items.jsonl").open("w") as lines:
    for _ in range(20):
        at = draw.randrange(len(numbers) - 3)
        wrong = draw.choice([word for word in numbers if word not in numbers[at : at + 4]])
        row = {"question": " ".join(numbers[at : at + 3]), "choices": [numbers[at + 3], wrong], "answer": 0}
        lines.write(json.dumps(row) + "\n")
(folder / "counting.yaml").write_text(
    f"""task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "items.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)
os.environ["OPENAI_API_KEY"] = os.environ["KEY"]
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": os.environ["MODEL"],
        "base_url": os.environ["BASE_URL"] + "/completions",
        "tokenizer": os.environ["TOKENIZER"],
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_length": 500,
    },
    tasks=["counting"],
    task_manager=TaskManager(include_path=str(folder)),
    batch_size=4,
    log_samples=True,
)
samples = found["samples"]["counting"]
print("lm-eval", lm_eval.__version__, found["results"]["counting"])
assert len(samples) == 20
assert all(float(item[0][0]) < 0 for sample in samples for item in sample["resps"])
