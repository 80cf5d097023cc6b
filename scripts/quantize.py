"""`python scripts/quantize.py`: the same command as `llmq quantize`."""

from llmq.cli.commands import quantize, run_script

if __name__ == "__main__":
    run_script(quantize)
