"""Checkpoints in and out: the original LLaVA-1.5, the published Dynamic-LLaVA, llava-hf, LoRA folders, and ours.

`convert.convert` converts, `plan.make_plan` checks. Nothing is imported here, so that --help answers at once.
"""
