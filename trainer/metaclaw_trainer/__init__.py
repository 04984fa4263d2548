"""The training server: samples with rewards in, LoRA adapters out, one for each agent, on one frozen base model.

Rooms: ``settings`` and ``errors``; ``losses``, ``advantages``, ``batching``, ``distillation`` are pure numerics;
``lora_engine`` owns the model in one thread; ``checkpoints`` owns the files; ``loop`` ties them together.
"""
