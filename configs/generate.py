"""Continues a text with the model of configs/quickstart.py, from its newest checkpoint.

    python scripts/generate.py --config configs/generate.py --prompt 'def main():'

Expect text that looks like Python code: the model has two million parameters and was trained for minutes. The same
script generates with any checkpoint: --weights DIRECTORY, or a .gguf file, in place of --config.
"""

from ringattn.config import Generation, Mesh

config = Generation(run="runs/quickstart", max_tokens=200, temperature=0.8, top_p=0.95, mesh=Mesh(simulate=8))
