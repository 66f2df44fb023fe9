"""A transformers model on every rank. The forge imports transformers once, before it forks."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import fastllm
from fastllm.dist import mesh, zero


def transformers_steps(stage, checkpointing, patched):
    """Losses and weights of a transformers model after three steps of an own loop."""
    with mesh.world("cpu", timeout=60) as world:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))
        if checkpointing:
            model.gradient_checkpointing_enable()
        if patched:
            fastllm.patch(model)
        engine = zero.shard(model, stage=stage)
        optimizer = engine.optimizer("adamw", lr=1e-2, grad_clip=1.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 3)
        model.train()
        losses = []
        for step in range(3):
            draw = torch.Generator().manual_seed(step)
            ids = torch.randint(61, (4, 9), generator=draw).chunk(world.size)[world.rank]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(world.gather_numbers([float(loss)]).mean()))
        rates = [group["lr"] for group in optimizer.param_groups]
        with engine.gathered():
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return losses, weights, rates
