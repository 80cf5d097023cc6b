"""`python scripts/evaluate.py`: the same command as `llmq evaluate`."""

from llmq.cli.commands import evaluate, run_script

if __name__ == "__main__":
    run_script(evaluate)
