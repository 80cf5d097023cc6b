"""`python scripts/generate.py`: the same command as `llmq generate`."""

from llmq.cli.commands import generate, run_script

if __name__ == "__main__":
    run_script(generate)
